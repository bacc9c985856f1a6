"""What an experiment is: frozen values, checked when they are built.

A file in configs/ defines `recipes: dict[str, Experiment]`; its first entry is the default.  Every field here
is also an option of `python -m train run`, spelled as in `--optimizer.learning-rate 0.05`.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import tyro

from qpde.models import NetworkOptions, Smoothing
from qpde.pictures import CENTRE
from qpde.suggestions import did_you_mean

_LARGEST = 2**31 - 1
"""Of an int32, which is what counts on the device."""

_LARGEST_SEED = 2**32 - 1
"""A random key is made of the last 32 bits of its seed: a larger one would repeat the run of a smaller."""

_LONGEST_NAME = 128
"""Bytes. File systems take 143 to 255, and other names are made of a run's: NAME_W4A4, NAME_sweep."""


_RESERVED = ("checkpoints", "export", "report", "tensorboard")
_FILES = (".json", ".jsonl", ".part", ".png")

FOLDER, NPZ = "folder/", "npz/"
"""Own pictures and own arrays have a name that is this and their path."""


@dataclass(frozen=True)
class Data:
    """The images, and how each training batch is varied."""

    name: str = "digits"
    """The set of images: digits (part of scikit-learn), cifar10 (binary files in the data folder), tfds/NAME (written
    by `python -m train data prepare NAME`), folder/PATH (your own pictures, a folder for each class) or npz/PATH (your
    own arrays). PATH is stored as an absolute path."""
    test: str | None = None
    """Another prepared set to test on, such as tfds/cifar10_corrupted/fog_3. None: the set's own test images."""
    validation: float = 0.1
    """Share of the training images held out to choose the best epoch. It has no effect on sets with a validation part
    of their own, such as the digits."""
    test_share: float = 0.2
    """Share of your own images held out for the test. It has no effect where they have a part "test"."""
    size: int = 16
    """Side in pixels of the digits, and of the squares that photographs are cropped to. Other sets keep their size."""
    channels: Literal[1, 3] = 3
    """Channels of the pictures in a folder: 3 for colour, 1 for grey."""
    centre: float = CENTRE
    """Side of the square in the middle of a photograph that evaluation sees, as a share of the short side."""
    skip_unreadable: bool = False
    """Leave out the pictures of a folder that cannot be read, and list them. Otherwise one of them is an error."""
    smallest_crop: float = 0.08
    """Training sees a random part of each photograph, resized. This is the part's smallest share of the area."""
    streamed: bool | None = None
    """Read images when a step needs them, instead of keeping all on the device. None: photographs and large sets."""
    crop_padding: int = 4
    """Pad each training image by this many pixels and crop it back at a random place. 0 turns it off."""
    flip: bool = True
    """Mirror half of the training images. Turn it off for digits, which mean something else when mirrored."""
    mixup: float = 0.0
    """Mix pairs of training images and of their labels; the share is drawn from Beta(mixup, mixup). 0 turns it off."""

    def __post_init__(self):
        if self.name in (FOLDER, NPZ):
            raise ValueError(f"data.name (={self.name!r}) has no path: give {self.name}PATH")
        object.__setattr__(self, "name", with_absolute_path(self.name, FOLDER, NPZ))
        if not self.name.startswith((FOLDER, NPZ)):
            _check_set("data.name", self.name, "digits", "cifar10")
        if self.test is not None:
            _check_set("data.test", self.test)
        limits = {"validation": 0.5, "test_share": 0.5, "centre": 1.0, "smallest_crop": 1.0}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 < value <= limit:
                raise ValueError(f"data.{name} (={value}) must be above 0 and at most {limit}")
        check_at_least("data.size", self.size, 1)
        check_at_least("data.crop_padding", self.crop_padding, 0)
        _check_not_negative("data.mixup", self.mixup)


@dataclass(frozen=True, kw_only=True)
class Model(NetworkOptions):
    """The network: options of `qpde.models.create`."""

    name: str = field(default="resnet20", kw_only=False)
    """Architecture."""
    width: float = 1.0
    """Channels of its stages, as a multiple of the architecture's own."""
    weight_bits: int | None = 4
    """Bits of the kernels. None: full precision."""
    act_bits: int | None = 4
    """Bits of the activations. None: full precision."""
    smoothing: tyro.conf.AvoidSubcommands[Smoothing | None] = None
    """Total-variation smoothing before the activations' quantizers."""


@dataclass(frozen=True)
class Variant:
    """One network of an experiment: a name, and what differs from the shared `model`."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_folder_name("variant", self.name)
        if self.name in _RESERVED or self.name.endswith(_FILES):
            raise ValueError(
                f"variant {self.name!r} has the name of something that every run holds: choose another name"
            )


@dataclass(frozen=True)
class Rule:
    """Parameters whose path matches `pattern` (a regular expression, searched anywhere in "a/b/c")."""

    pattern: str
    learning_rate: float = 1.0
    """Multiplier of the schedule's learning rate."""
    weight_decay: float | None = None
    """Weight decay instead of the shared one. None keeps that."""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rule pattern {self.pattern!r} is not a regular expression: {error}") from error
        _check_not_negative(f"learning_rate of rule {self.pattern!r}", self.learning_rate)
        if self.weight_decay is not None:
            _check_not_negative(f"weight_decay of rule {self.pattern!r}", self.weight_decay)


@dataclass(frozen=True)
class Optimizer:
    """How parameters are updated."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Gradient descent with momentum (sgd), Adam with weight decay in the gradient as in PyTorch (adam), or Adam with
    decoupled weight decay (adamw)."""
    learning_rate: float = 0.1
    """Peak of the learning rate. Adam needs far less than sgd, about 0.001."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """Shape of the learning rate over the run."""
    momentum: float = 0.9
    """Momentum of sgd, and beta1 of Adam. Adam's beta2 is 0.999."""
    nesterov: bool = False
    """Use Nesterov's momentum."""
    weight_decay: float = 1e-4
    """Weight decay. adamw adds it to the step, the others to the gradient."""
    averaging: float = 0.0
    """Decay of a moving average of the parameters, such as 0.999. The average is what is evaluated. 0 turns it off."""
    rules: tyro.conf.Fixed[tuple[Rule, ...]] = ()
    """Exceptions by parameter path; the first match counts."""

    def __post_init__(self):
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"optimizer.learning_rate (={self.learning_rate}) must be positive and finite")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"optimizer.averaging (={self.averaging}) must lie in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum (={self.momentum}) must lie in [0, 1)")
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs a momentum above 0")
        _check_not_negative("optimizer.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, 2015) with a constant learning rate; decay is part of the gradient, as in PyTorch."""

    learning_rate: float = 0.01
    """Learning rate of all parameters that no rule names."""
    weight_decay: float = 0.0
    """Weight decay, added to the gradient."""
    rules: tyro.conf.Fixed[tuple[Rule, ...]] = ()
    """Exceptions by parameter path; the first match counts."""

    def __post_init__(self):
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"optimizer.learning_rate (={self.learning_rate}) must be positive and finite")
        _check_not_negative("optimizer.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class BitSchedule:
    """Bits of the weights or of the activations over the epochs. They end at the model's own bits."""

    schedule: Literal["constant", "staircase", "listed", "random"] = "constant"
    """constant: the model's bits throughout. staircase: one bit less every few epochs. listed: the bits of a list, one
    after the other. random: bits drawn for each step from the list and the model's, for one network at all of them."""
    start: int = 16
    """First bits of a staircase."""
    every: int = 10
    """Epochs at each number of bits, of a staircase or a list."""
    bits: tuple[int, ...] = ()
    """The list of bits, in their order. The model's own bits follow it, so leave them out, except with "random"."""

    def __post_init__(self):
        check_at_least("every", self.every, 1)
        outside = [bits for bits in (self.start, *self.bits) if not 2 <= bits <= 32]
        if outside:
            raise ValueError(f"a bit schedule holds {outside[0]}: bits are 2 to 32")
        if self.schedule == "random" and not self.bits:
            raise ValueError("a random bit schedule needs bits to draw from: give them, such as --bits 2 3 6 8")


@dataclass(frozen=True)
class SmoothingSchedule:
    """Scale of the model's total-variation smoothing over the epochs, a factor of gamma2."""

    schedule: Literal["constant", "rise", "fall"] = "constant"
    """constant: 1 throughout, or the final scale of start_from. rise: from 0 to 1. fall: from 1 to 0, for networks
    that smooth only during training."""
    epochs: int = 10
    """Epochs of a rise or a fall. The epoch after them is the first at the final scale."""

    def __post_init__(self):
        check_at_least("annealing.smoothing.epochs", self.epochs, 1)


@dataclass(frozen=True)
class Annealing:
    """How bits and smoothing change over a run.

    The best epoch is chosen among those at the model's own bits and at the final smoothing. With random bits every
    epoch is validated at the model's own bits, with batch statistics estimated for them.
    """

    weights: BitSchedule = field(default_factory=BitSchedule)
    activations: BitSchedule = field(default_factory=BitSchedule)
    smoothing: SmoothingSchedule = field(default_factory=SmoothingSchedule)
    reestimate: bool = False
    """Estimate batch statistics again, from training images, after each change of bits or smoothing."""


@dataclass(frozen=True)
class Loss:
    """What is minimised, see `train.steps.losses`."""

    name: Literal["cross_entropy", "distillation", "similarity"] = "cross_entropy"
    """cross_entropy: of the network alone. distillation: of the network and of its high-precision twin, plus the
    distance between the two (similarity). similarity: only that distance; it needs no labels and tunes a trained
    network (start_from)."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    similarity_weight: float = 1e-5
    """Weight of the similarity, which is a sum over the images of a batch."""
    similarity_target: float = 0.0
    """With the loss "similarity", training stops after the first epoch whose mean similarity is at most this."""
    teacher: str | None = None
    """Folder of a trained network, RUN/VARIANT or one of `qpde.save`, such as a wider one in full precision. Its
    probabilities are learned beside the labels (Hinton et al., 2015)."""
    teacher_weight: float = 0.5
    """Share of the teacher's probabilities in the targets, above 0 and at most 1; the labels have the rest."""

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing (={self.label_smoothing}) must lie in [0, 1)")
        _check_not_negative("loss.similarity_weight", self.similarity_weight)
        _check_not_negative("loss.similarity_target", self.similarity_target)
        if not 0 < self.teacher_weight <= 1:
            raise ValueError(f"loss.teacher_weight (={self.teacher_weight}) must be above 0 and at most 1")
        if self.teacher is not None and self.name == "similarity":
            raise ValueError(
                f"loss.teacher (={self.teacher!r}) has no effect on the loss 'similarity', which has no targets: leave "
                "it out, or choose another loss.name"
            )


@dataclass(frozen=True)
class Calibration:
    """Quantization of the trained network that the run starts from, see `qpde.ptq.quantize`."""

    weights: Literal["absmax", "percentile", "mse", "entropy"] = "mse"
    """How the clips of kernels are chosen."""
    activations: Literal["absmax", "percentile", "mse", "entropy"] = "mse"
    """How the clips of activations are chosen."""
    equalize: bool = False
    """Rescale channels first, so that their ranges agree. The full-precision network computes the same."""
    bias_correction: bool = True
    """Correct each channel's mean and variance to those of the full-precision network."""
    images: int = 1024
    """Number of training images used, without their labels."""

    def __post_init__(self):
        check_at_least("calibration.images", self.images, 1)


@dataclass(frozen=True)
class Comparison:
    """What every kind of experiment has: variants of one `model`, trained alike and compared."""

    if TYPE_CHECKING:  # not a field of this class, which would come before those without defaults

        @property
        def model(self) -> Any:
            """The network, a dataclass of options."""

    name: str
    """Name of the run, and of its folder."""
    variants: tyro.conf.Fixed[tuple[Variant, ...]]
    only: tuple[str, ...] = ()
    """Train only the variants with these names."""

    def __post_init__(self):
        check_folder_name("name", self.name)
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"variants (={names}) must be at least one, with different names")
        known = [option.name for option in dataclasses.fields(self.model)]
        for variant in self.variants:
            unknown = sorted(set(variant.changes) - set(known))
            if unknown:
                raise ValueError(
                    f"variant {variant.name!r} changes {unknown}, which are no fields of the model: "
                    f"{did_you_mean(unknown[0], known)}choose from {known}"
                )
        unknown = sorted(set(self.only) - set(names))
        if unknown:
            raise ValueError(
                f"only (={unknown}) names no variant: {did_you_mean(unknown[0], names)}choose from {names}"
            )

    @property
    def chosen(self) -> tuple[Variant, ...]:
        """The variants to train, in their order."""
        return tuple(variant for variant in self.variants if not self.only or variant.name in self.only)

    def model_of(self, variant: Variant) -> Any:
        """The shared model with the variant's changes."""
        return dataclasses.replace(self.model, **variant.changes)


@dataclass(frozen=True)
class Experiment(Comparison):
    """Image networks."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    annealing: Annealing = field(default_factory=Annealing)
    epochs: int = 10
    """Passes over the training images. 0 only evaluates the network that start_from names."""
    batch_size: int = 128
    """Images in a step, on all devices together. Images left over at the end of an epoch are dropped."""
    accumulate: int = 1
    """Split each batch into this many parts and average their gradients, to save memory. Batch norms then see one part
    at a time."""
    devices: int | Literal["all"] = 1
    """Number of devices that share each batch, or "all", which runs on several hosts need. Results differ only by the
    order of sums."""
    clip_start: str = "rms"
    """Method of `qpde.quantizers.initial_clip` that sets the first clips from a batch."""
    start_from: str | None = None
    """Folder of another run. Training starts from the best states of its variants with the same names. If that run was
    not quantized, the clips are set from a batch, or by `calibration`."""
    reset_clips: bool = False
    """Set the clips of start_from's networks anew from a batch, by clip_start, where they were quantized as well."""
    calibration: tyro.conf.AvoidSubcommands[Calibration | None] = None
    """Quantize the full-precision networks of start_from first. `python -m train quantize` sets this."""
    checkpoint_every: int = 0
    """Steps between saves, in addition to the end of each epoch. SIGTERM and Ctrl-C always save the current step, so
    this only matters for a crash. 0 turns it off."""
    workers: int = 0
    """Processes that read streamed images. 0: threads of the main process. The images of a step are the same."""
    seed: int = 0
    """Seed of the initial weights, and of the order and the variation of the images."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least("workers", self.workers, 0)
        check_at_least("epochs", self.epochs, 0)
        if self.start_from is None:
            if self.epochs == 0:
                raise ValueError("epochs (=0) trains nothing: give --start-from RUN, or at least 1")
            if self.calibration is not None:
                raise ValueError("calibration quantizes a trained network: give --start-from RUN")
            if self.reset_clips:
                raise ValueError("reset_clips sets the clips of a trained network anew: give --start-from RUN")
        check_at_least("batch_size", self.batch_size, 2)  # batch statistics of one image have no variance
        check_at_least("accumulate", self.accumulate, 1)
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(f"accumulate (={self.accumulate}) leaves less than 2 of {self.batch_size} images a part")
        if self.devices != "all":
            if self.devices == 0:
                raise ValueError("devices (=0) must be at least 1: give --devices all for all there are")
            check_at_least("devices", self.devices, 1)
        check_at_least("checkpoint_every", self.checkpoint_every, 0)
        check_seeds("seed", self.seed)


def check_at_least(name: str, value: int, limit: int) -> None:
    """ValueError for an integer below its limit, or for one that no counter on a device holds."""
    if value < limit:
        raise ValueError(f"{name} (={value}) must be at least {limit}")
    if value > _LARGEST:
        raise ValueError(f"{name} (={value}) must be at most {_LARGEST}")


def check_seeds(name: str, first: int, count: int = 1) -> None:
    """ValueError unless `count` seeds from `first` on give different random keys."""
    if not 0 <= first <= _LARGEST_SEED - (count - 1):
        raise ValueError(f"{name} (={first}) must lie in 0 to {_LARGEST_SEED - (count - 1)}")


def with_absolute_path(name: str, *prefixes: str) -> str:
    """Name of own data with an absolute path, so that a run is read or repeated from any working directory.

    Args:
      name: Name of the data.
      prefixes: Starts of names that a path follows.
    """
    for prefix in prefixes:
        if name.startswith(prefix) and name != prefix:
            return prefix + os.path.abspath(os.path.expanduser(name.removeprefix(prefix)))
    return name


def _check_set(name: str, value: str, *others: str) -> None:
    if value not in others and not re.fullmatch(r"tfds/\w[\w./-]*", value):
        own = ("folder/PATH", "npz/PATH") if others else ()
        known = ", ".join(repr(other) for other in (*others, "tfds/NAME", *own))
        raise ValueError(f"{name} (={value!r}) is no set of images: {did_you_mean(value, others)}choose {known}")


def _check_not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} (={value}) must be finite and not negative")


def check_folder_name(name: str, value: str) -> None:
    """ValueError for what is no plain name of a folder."""
    if not re.fullmatch(r"\w[\w.-]*", value):
        raise ValueError(f"{name} (={value!r}) names a folder: use letters, digits, '_', '-' and '.' only")
    if (length := len(value.encode())) > _LONGEST_NAME:
        raise ValueError(
            f"{name} (={value[:20]}...) names a folder and has {length} bytes: choose one of at most {_LONGEST_NAME}"
        )
