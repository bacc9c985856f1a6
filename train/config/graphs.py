"""What an experiment on a graph is. Files in configs/ define `recipes: dict[str, GraphExperiment]`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import tyro

from qpde.models import GraphSmoothing
from qpde.quantizers import Levels
from qpde.suggestions import did_you_mean
from train.config.images import Adam, Comparison, Variant, check_at_least, check_seeds, with_absolute_path

GRAPHS = ("digits", "cora", "citeseer", "pubmed")

OWN_GRAPH = "npz/"
"""Your own graph has a name that is this and its path."""


@dataclass(frozen=True)
class GraphData:
    """The graph and which of its labels are known."""

    name: str = "digits"
    """The graph: digits (nearest neighbours, made from scikit-learn's digits), cora, citeseer or pubmed (read from the
    data folder), or npz/PATH (your own, see `qpde.datasets.load_node_graph`). PATH is stored as an absolute path."""
    split: Literal["public", "full", "random"] = "public"
    """Labels to train on. public: the published ones; for your own graph, the parts that its file names, or 60, 20 and
    20% drawn by `split_seed`. full: all but those of validation and test. random: 20 for each class, drawn by
    `split_seed`. The digits have a random split only."""
    split_seed: int = 0
    """Seed of the random split."""

    def __post_init__(self):
        check_seeds("data.split_seed", self.split_seed)
        object.__setattr__(self, "name", with_absolute_path(self.name, OWN_GRAPH))
        if self.name not in GRAPHS and (not self.name.startswith(OWN_GRAPH) or self.name == OWN_GRAPH):
            known = ", ".join((*GRAPHS, f"{OWN_GRAPH}PATH"))
            raise ValueError(f"data.name (={self.name!r}) is no graph: {did_you_mean(self.name, GRAPHS)}choose {known}")
        if self.name.startswith(OWN_GRAPH) and self.split == "full":
            raise ValueError("data.split (='full') needs a citation graph: your own names its parts in the file")
        if self.name == "digits" and self.split == "full":
            raise ValueError("data.split (='full') needs a citation graph: the digits have no published split")


@dataclass(frozen=True)
class GraphModel:
    """The network: options of `qpde.models.create`. Options that the named network does not have are ignored."""

    name: Literal["pde_gcn", "gcn", "gcnii", "gat"] = "pde_gcn"
    """Architecture."""
    layers: int = 8
    """Number of hidden layers, between the two dense ones."""
    width: int = 64
    """Channels of the hidden layers."""
    dropout: float = 0.7
    """Rate of dropout before and after the stem, and before the head."""
    symmetric: bool = True
    """Use one matrix K and its transpose in each layer of pde_gcn. Variants usually set this."""
    dynamics: Literal["diffusion", "wave", "mixed"] = "diffusion"
    """Differential equation of pde_gcn."""
    nonlinearity: Literal["identity", "tanh", "huber", "relu"] = "identity"
    """Nonlinearity on the edges of pde_gcn."""
    step_size: float | Literal["auto"] = 0.7
    """Step size h of pde_gcn."""
    gradient_kind: Literal["normalized", "gcn"] = "normalized"
    """Gradient on the edges of pde_gcn."""
    rounding: Literal["branch", "state"] = "branch"
    """What pde_gcn rounds."""
    kernel_init: Literal["identity", "orthogonal"] = "identity"
    """Initial value of pde_gcn's K."""
    stem: Literal["dense", "graph"] = "dense"
    """First layer of gcn: a dense one, or a graph convolution as in the paper."""
    head: Literal["dense", "graph"] = "dense"
    """Last layer of gcn, likewise."""
    lambda_: float = 0.5
    """lambda of gcnii: the larger, the more its kernels count."""
    smoothing: tyro.conf.AvoidSubcommands[GraphSmoothing | None] = None
    """Total-variation smoothing of pde_gcn's states."""
    levels: Levels = "uniform"
    """Spacing of the quantized values: even, powers of two (pot), or sums of powers of two (apot)."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


@dataclass(frozen=True)
class GraphVariant(Variant):
    """One network of an experiment: a name, and what differs from the shared `model` and `optimizer`."""

    optimizer: Adam | None = None
    """Instead of the shared one, for another kind of network."""


@dataclass(frozen=True)
class GraphExperiment(Comparison):
    """Graph networks, each trained from several seeds, in full precision and in few bits."""

    if TYPE_CHECKING:  # what `Comparison` does with these variants

        @property
        def chosen(self) -> tuple[GraphVariant, ...]: ...

    variants: tyro.conf.Fixed[tuple[GraphVariant, ...]]
    data: GraphData = field(default_factory=GraphData)
    model: GraphModel = field(default_factory=GraphModel)
    optimizer: Adam = field(default_factory=Adam)
    epochs: int = 200
    """Steps in full precision, each on the whole graph. The best step on the validation nodes is kept."""
    bits: tuple[tuple[int, int], ...] = ((8, 8), (4, 8), (4, 4))
    """Pairs of bits to quantize to: of weights, then of activations."""
    start: Literal["trained", "random"] = "trained"
    """Start of the quantized networks: the trained full-precision network, or random weights."""
    tune_epochs: int = 20
    """Training steps of a quantized network after a trained start. 0: its clips are set from the graph, and that is
    all."""
    tune_learning_rate: float = 0.1
    """Learning rate of these steps, as a share of the optimizer's."""
    seeds: int = 10
    """Number of seeds, counted up from `seed`. Results are means and standard deviations over them."""
    seeds_at_once: int | None = None
    """Seeds that train side by side (vmap), a divisor of `seeds`. Default: 1 on a CPU, where that is faster, and all of
    them elsewhere."""
    seed: int = 0
    """First seed, of the initial weights and of dropout."""
    report_every: int = 50
    """Steps in one compiled call. Progress is logged and saved after each call."""

    def __post_init__(self):
        super().__post_init__()
        for name, limit in (("epochs", 1), ("tune_epochs", 0), ("seeds", 1), ("report_every", 1)):
            check_at_least(name, getattr(self, name), limit)
        check_seeds("seed", self.seed, self.seeds)
        if self.seeds_at_once is not None and (self.seeds_at_once < 1 or self.seeds % self.seeds_at_once):
            raise ValueError(f"seeds_at_once (={self.seeds_at_once}) must divide the {self.seeds} seeds")
        if len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits (={self.bits}) lists a pair of bits twice")
        outside = [bits for pair in self.bits for bits in pair if not 2 <= bits <= 32]
        if outside:
            raise ValueError(f"bits holds {outside[0]}: give some of 2 to 32")
        if not 0 < self.tune_learning_rate <= 1:
            raise ValueError(f"tune_learning_rate (={self.tune_learning_rate}) must lie in (0, 1]")

    def optimizer_of(self, variant: GraphVariant) -> Adam:
        """The variant's own optimizer, or the shared one."""
        return variant.optimizer or self.optimizer
