"""python -m train run configs/cora_pdegcn.py --data-dir FOLDER

PDE-GCN on citation graphs with the published split, ten seeds, in full precision and quantized from it.
"""

from dataclasses import replace

from train.config import Adam, Rule
from train.nodes.config import GraphData, GraphExperiment, GraphModel, GraphVariant

DEPTHS = {2: 0.7, 8: 0.7, 32: 0.2}
"""Layers, and the step size for so many: the time that the diffusion runs grows more slowly than the depth."""


def adam(learning_rate: float, *, kernels: float) -> Adam:
    """Adam with weight decay for the dense layers only, and a learning rate of their own for the kernels K.

    The kernels start at the identity, and 120 labels can be learned by heart through them: at the learning rate of the
    dense layers they cost ten points of accuracy. Their clips are read off the trained kernels and stay.
    """
    return Adam(
        learning_rate,
        rules=(
            Rule("clips", learning_rate=0.0),
            Rule("layers/kernel", learning_rate=kernels / learning_rate),
            Rule("opening|closing", weight_decay=5e-4),
        ),
    )


BASELINE = Adam(0.01, rules=(Rule("clips", learning_rate=0.0), Rule("", weight_decay=5e-4)))

cora = GraphExperiment(
    name="cora_pdegcn",
    variants=tuple(
        GraphVariant(f"{form}-{layers}", {"symmetric": form == "symmetric", "layers": layers, "step_size": h})
        for layers, h in DEPTHS.items()
        for form in ("symmetric", "plain")
    ),
    data=GraphData("cora"),
    model=GraphModel("pde_gcn", width=64, dropout=0.7),
    optimizer=adam(0.03, kernels=2e-4),
    epochs=150,
)
citeseer = replace(
    cora,
    name="citeseer_pdegcn",
    data=GraphData("citeseer"),
    optimizer=adam(0.04, kernels=1e-4),
    epochs=100,
    tune_epochs=10,
)
pubmed = replace(
    cora,
    name="pubmed_pdegcn",
    data=GraphData("pubmed"),
    model=replace(cora.model, dropout=0.5),
    optimizer=adam(0.01, kernels=1e-4),
    epochs=100,
    tune_epochs=10,
)
_baselines = tuple(
    GraphVariant(name, {"name": name, "layers": 2, "dropout": dropout}, optimizer=BASELINE)
    for name, dropout in (("gcn", 0.5), ("gcnii", 0.6), ("gat", 0.6))
)
_by_depth = {
    "symmetric": {"symmetric": True},
    "plain": {"symmetric": False},
    "gcn": {"name": "gcn", "dropout": 0.5},
    "gcnii": {"name": "gcnii", "dropout": 0.6},
}

recipes = {
    "cora": cora,
    "citeseer": citeseer,
    "pubmed": pubmed,
    "cora_baselines": replace(cora, name="cora_baselines", variants=_baselines),
    "citeseer_baselines": replace(citeseer, name="citeseer_baselines", variants=_baselines),
    "pubmed_baselines": replace(pubmed, name="pubmed_baselines", variants=_baselines),
    "cora_large_kernels": replace(
        cora,
        name="cora_large_kernels",
        variants=tuple(
            GraphVariant(f"{form}-{layers}", {"symmetric": form == "symmetric", "layers": layers, "step_size": h})
            for layers, h in ((8, 0.7), (32, 0.7))
            for form in ("symmetric", "plain")
        ),
        model=replace(cora.model, rounding="state"),
        optimizer=adam(0.03, kernels=3e-3),
        bits=((4, 4), (3, 3)),
        epochs=100,
    ),
    "cora_depth": replace(
        cora,
        name="cora_depth",
        variants=tuple(
            GraphVariant(
                f"{kind}-{layers}",
                changes | {"layers": layers, "step_size": min(0.7, 6.4 / layers)},
                optimizer=BASELINE if "name" in changes else None,
            )
            for kind, changes in _by_depth.items()
            for layers in (2, 4, 8, 16, 32, 64)
        ),
        bits=(),
        epochs=100,
        seeds=3,
    ),
}
