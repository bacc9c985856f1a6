"""What an experiment on images with a class for every pixel is: frozen values, checked when they are built."""

import math
from dataclasses import dataclass, field
from typing import Literal

from qpde.suggestions import did_you_mean
from train.config.images import FOLDER, Experiment, Loss, Model, check_at_least, with_absolute_path

SETS = ("camvid", "cityscapes", "tfds/cityscapes/semantic_segmentation")


@dataclass(frozen=True)
class SegmentationData:
    """The images with their label maps, and how each training batch is varied."""

    name: str = "camvid"
    """camvid or cityscapes, read from their own folders in the data folder; tfds/cityscapes/semantic_segmentation, as
    tensorflow-datasets prepares it; or folder/PATH, your own pairs, see `qpde.datasets.load_label_maps`. PATH is kept
    as an absolute one."""
    validation: float = 0.1
    """Share of Cityscapes' training images held out to choose the best epoch. Other sets have their own split."""
    size: tuple[int, int] | None = None
    """Height and width that images and label maps are resized to as they are read. None: as they are."""
    crop: tuple[int, int] | None = None
    """Height and width of the part that training sees of each image. None: the whole. In parts that are small for the
    dilation of the network, its outer taps meet only the border and stay untrained."""
    smallest_scale: float = 0.75
    """Each training image is enlarged by a random factor, from this one on."""
    largest_scale: float = 1.5
    """The largest such factor."""
    flip: bool = True
    """Mirror half of the training images."""
    colour: float = 0.2
    """Brightness, contrast and saturation of training images change by up to this share. 0 turns it off."""

    def __post_init__(self):
        object.__setattr__(self, "name", with_absolute_path(self.name, FOLDER))
        if self.name not in SETS and not (self.name.startswith(FOLDER) and self.name != FOLDER):
            known = ", ".join(map(repr, (*SETS, f"{FOLDER}PATH")))
            raise ValueError(
                f"data.name (={self.name!r}) is no set of label maps: {did_you_mean(self.name, SETS)}choose {known}"
            )
        if not 0 < self.validation <= 0.5:
            raise ValueError(f"data.validation (={self.validation}) must be above 0 and at most 0.5")
        for name, value in (("size", self.size), ("crop", self.crop)):
            if value is not None:
                if len(value) != 2:
                    raise ValueError(f"data.{name} (={value}) must be a height and a width")
                for side in value:
                    check_at_least(f"data.{name}", side, 32)
        if not (0 < self.smallest_scale <= self.largest_scale and math.isfinite(self.largest_scale)):
            raise ValueError(
                f"data.smallest_scale (={self.smallest_scale}) must be positive and at most data.largest_scale "
                f"(={self.largest_scale})"
            )
        if not 0 <= self.colour < 1:
            raise ValueError(f"data.colour (={self.colour}) must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class SegmentationModel(Model):
    """Arguments of `qpde.models.create` for a segmentation network."""

    name: str = field(default="deeplabv3plus", kw_only=False)
    """Decoder: unet or deeplabv3plus."""
    encoder: str = "resnet20"
    """Image network whose blocks read the image."""
    stem_stride: int | None = None
    """Stride of the stem: 1, 2 or 4. None: what brings the encoder nearest to a stride of 32."""
    output_stride: int | None = None
    """Stride of the encoder's last map; what is beyond becomes dilation. None: 16 for DeepLabV3+, the encoder's own for
    U-Net."""
    decoder_width: int = 256
    """Channels of DeepLab's decoder."""


@dataclass(frozen=True)
class SegmentationLoss(Loss):
    """What is minimised; the cross entropy is a mean over the pixels that count, see `train.steps.pixel_losses`."""

    class_weights: Literal["none", "median_frequency"] = "median_frequency"
    """Weight of a class in the cross entropy: 1, or the median of the classes' frequencies over its own."""
    focal: float = 0.0
    """Exponent of 1 - p, the factor of a pixel whose class has probability p (Lin et al., 2017). 0 turns it off."""
    dice: float = 0.0
    """Share of 1 - Dice's coefficient, averaged over the classes, that is added."""

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is not None:
            raise ValueError(f"loss.teacher (={self.teacher!r}) is for classifiers, not for segmentation: leave it out")
        for name in ("focal", "dice"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"loss.{name} (={value}) must be finite and not negative")


@dataclass(frozen=True)
class SegmentationExperiment(Experiment):
    """Segmentation networks."""

    data: SegmentationData = field(default_factory=SegmentationData)  # type: ignore[assignment]
    model: SegmentationModel = field(default_factory=SegmentationModel)
    loss: SegmentationLoss = field(default_factory=SegmentationLoss)
    batch_size: int = 8
    """Images in a step, on all devices together. Images left over at the end of an epoch are dropped."""
