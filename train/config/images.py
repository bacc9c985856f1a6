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
    """digits, which come with scikit-learn; cifar10, read from its binary files in the data folder; tfds/NAME, any
    set of labelled images that `python -m train data prepare NAME` has put there, as tfds/imagenet2012; folder/PATH,
    your own pictures, a folder for each class; or npz/PATH, your own arrays. PATH is kept as an absolute one."""
    test: str | None = None
    """Test on the test images of a prepared set, as tfds/cifar10_corrupted/fog_3. None: on the set's own."""
    validation: float = 0.1
    """Share of the training images held out to choose the best epoch. The digits have their own split, and so has a
    folder or a file with a part "validation"."""
    test_share: float = 0.2
    """Share of your own images to test on, where they have no part "test"."""
    size: int = 16
    """Side in pixels of the digits, and of the squares that photographs are cropped to. Other images have their own."""
    channels: Literal[1, 3] = 3
    """Channels of pictures in a folder: 3 for colours, 1 for shades of grey."""
    centre: float = CENTRE
    """Evaluation looks at the square in the middle of a photograph, of this share of its short side."""
    skip_unreadable: bool = False
    """Leave pictures of a folder that cannot be read out, and say which, instead of refusing the folder."""
    smallest_crop: float = 0.08
    """Each training photograph is a random part, at least this share of its area, resized."""
    streamed: bool | None = None
    """Read images when a step needs them instead of keeping them on the device. None: photographs and what is large."""
    crop_padding: int = 4
    """Each training image is padded by so many pixels and cropped back at random. 0 turns it off."""
    flip: bool = True
    """Mirror half of the training images. Off for digits, whose mirror images are other signs."""
    mixup: float = 0.0
    """Mix pairs of training images and their labels, with a share drawn from Beta(mixup, mixup). 0 turns it off."""

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
    """Arguments of `qpde.models.create`, which checks them and knows the names."""

    name: str = field(default="resnet20", kw_only=False)
    """Architecture."""
    weight_bits: int | None = 4
    """Bits of the kernels; None trains them in full precision."""
    act_bits: int | None = 4
    """Bits of the activations; None leaves them as they are."""
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
    """Gradient descent: with momentum, or Adam's."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Momentum (sgd); Adam with the decay in the gradient, as in PyTorch; or Adam with decoupled decay (adamw)."""
    learning_rate: float = 0.1
    """Peak of the schedule. Adam wants far less than sgd: about 0.001."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """Shape of the learning rate over the run."""
    momentum: float = 0.9
    """Share of the last step kept in the next; beta1 of Adam, whose beta2 is 0.999."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    weight_decay: float = 1e-4
    """Added to the gradient, times the parameter; by adamw to the step."""
    averaging: float = 0.0
    """Share that the moving average of parameters keeps a step, near 1. The average is what is evaluated. 0 turns it
    off."""
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
    """Of all parameters that no rule names."""
    weight_decay: float = 0.0
    """Added to the gradient, times the parameter."""
    rules: tyro.conf.Fixed[tuple[Rule, ...]] = ()
    """Exceptions by parameter path; the first match counts."""

    def __post_init__(self):
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"optimizer.learning_rate (={self.learning_rate}) must be positive and finite")
        _check_not_negative("optimizer.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class BitSchedule:
    """Bits of weights or of activations over the epochs; they end at the model's."""

    schedule: Literal["constant", "staircase", "listed", "random"] = "constant"
    """The model's bits throughout; one bit less after every so many epochs; those of a list one after the other; or for
    every step a number drawn from the list and the model's, so that one network serves at all of them."""
    start: int = 16
    """First bits of the staircase."""
    every: int = 10
    """Epochs at each number of bits of a staircase or a list."""
    bits: tuple[int, ...] = ()
    """The list, from the first on, without the model's; where bits are drawn, the model's may be in it."""

    def __post_init__(self):
        check_at_least("every", self.every, 1)
        outside = [bits for bits in (self.start, *self.bits) if not 2 <= bits <= 32]
        if outside:
            raise ValueError(f"a bit schedule holds {outside[0]}: bits are 2 to 32")
        if self.schedule == "random" and not self.bits:
            raise ValueError("a random bit schedule needs bits to draw from: give them, such as --bits 2 3 6 8")


@dataclass(frozen=True)
class SmoothingSchedule:
    """Share of the model's total-variation smoothing over the epochs, a factor of gamma2, learned or not."""

    schedule: Literal["constant", "rise", "fall"] = "constant"
    """1 throughout, or what start_from ended with; from 0 to 1 in equal steps; or from 1 to 0, where smoothing helps to
    train a network that then does without."""
    epochs: int = 10
    """Steps of a rise or a fall, one an epoch: the epoch after so many is the first at the final smoothing scale."""

    def __post_init__(self):
        check_at_least("annealing.smoothing.epochs", self.epochs, 1)


@dataclass(frozen=True)
class Annealing:
    """How bits and smoothing change over a run. Only epochs at the model's own bits and at the final smoothing can be
    the best. Where bits are drawn for every step, an epoch is validated at the model's, with batch statistics of
    these."""

    weights: BitSchedule = field(default_factory=BitSchedule)
    activations: BitSchedule = field(default_factory=BitSchedule)
    smoothing: SmoothingSchedule = field(default_factory=SmoothingSchedule)
    reestimate: bool = False
    """Estimate batch statistics again after each change, from training images as the network now takes them."""


@dataclass(frozen=True)
class Loss:
    """What is minimised, see `train.steps.losses`."""

    name: Literal["cross_entropy", "distillation", "similarity"] = "cross_entropy"
    """Cross entropy; that of the network and of its high-precision twin, and their similarity; or this alone, which
    needs no labels, to tune a trained network (start_from)."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    similarity_weight: float = 1e-5
    """c, the weight of the similarity, which is a sum over the images of a batch."""
    similarity_target: float = 0.0
    """The loss "similarity" stops after the epoch whose mean similarity of an image is at most this."""

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing (={self.label_smoothing}) must lie in [0, 1)")
        _check_not_negative("loss.similarity_weight", self.similarity_weight)
        _check_not_negative("loss.similarity_target", self.similarity_target)


@dataclass(frozen=True)
class Calibration:
    """Post-training quantization of the network that training starts from, see `qpde.ptq.quantize`."""

    weights: Literal["absmax", "percentile", "mse", "entropy"] = "mse"
    """How the clips of kernels are chosen."""
    activations: Literal["absmax", "percentile", "mse", "entropy"] = "mse"
    """How the clips of activations are."""
    equalize: bool = False
    """Rescale channels first, where the network's function does not depend on it."""
    bias_correction: bool = True
    """Lead the moments of every channel back to those of full precision."""
    images: int = 1024
    """Training images that it sees, without their labels."""

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
    """The run lives in the folder of this name."""
    variants: tyro.conf.Fixed[tuple[Variant, ...]]
    only: tuple[str, ...] = ()
    """Train only the variants of these names."""

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
                    f"variant {variant.name!r} changes {unknown}, no fields of the model: "
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
    """Passes over the training images. 0 evaluates what training would start from."""
    batch_size: int = 128
    """Images a step, of all devices together. The images left over at the end of an epoch are dropped."""
    accumulate: int = 1
    """Parts of a batch whose gradients are computed one after the other and averaged, where the whole one needs too
    much memory. Batch norms then see one part at a time: its statistics normalise it and move the running ones."""
    devices: int | Literal["all"] = 1
    """Devices that share each batch: a number, or all there are, as runs of several processes need. The result depends
    on it by the rounding of sums alone."""
    clip_start: str = "rms"
    """How the first clips are read off a batch: a method of `qpde.quantizers.initial_clip`."""
    start_from: str | None = None
    """Folder of another run: its best states, of the variants of the same names, are where training starts. Clips that
    were not trained there, because the network was not quantized, are read off a batch, or chosen by `calibration`."""
    calibration: tyro.conf.AvoidSubcommands[Calibration | None] = None
    """Quantize the full-precision networks of start_from with care. `python -m train quantize` sets it."""
    checkpoint_every: int = 0
    """Steps between saves. The end of each epoch is saved anyway, and so is the step that SIGTERM or Ctrl-C ends; only
    what a harder end would cost depends on this."""
    workers: int = 0
    """Processes that read images during training, where they are streamed. 0 reads in threads of this one. The images
    of a step do not depend on it."""
    seed: int = 0
    """Initial weights, order and variation of the images follow from it."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least("workers", self.workers, 0)
        check_at_least("epochs", self.epochs, 0)
        if self.start_from is None:
            if self.epochs == 0:
                raise ValueError("epochs (=0) trains nothing: give --start-from RUN, or at least 1")
            if self.calibration is not None:
                raise ValueError("calibration quantizes a trained network: give --start-from RUN")
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
