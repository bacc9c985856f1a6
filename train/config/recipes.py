"""The recipes that experiments on the same images share."""

from dataclasses import replace
from typing import Any

from qpde.models import Smoothing
from train.config.images import Annealing, BitSchedule, Data, Experiment, Model, Optimizer, Rule, Variant
from train.config.segmentation import SegmentationData, SegmentationExperiment, SegmentationLoss, SegmentationModel


def cifar10(model: str, *, fast_epochs: int, clip_rate: float = 3.0) -> dict[str, Experiment]:
    """Symmetric and plain nets with 4-bit weights and activations: the paper's recipe, and one for a laptop.

    "published": 200 epochs, cosine from 0.1, clips that start at constants and learn as the weights do.
    "fast", the default: one cycle up to 0.2 with Nesterov's momentum and more decay; clips start at 4 rms of what
    they clip, and learn at a rate of their own, without decay.

    Args:
      model: name of the architecture.
      fast_epochs: length of the fast recipe.
      clip_rate: that of the clips, over the weights', in the fast recipe.
    """
    published = Experiment(
        name=f"cifar10_{model}_published",
        variants=(Variant("symmetric", {"symmetric": True}), Variant("plain", {"symmetric": False})),
        data=Data("cifar10", crop_padding=4, flip=True),
        model=Model(model, weight_bits=4, act_bits=4),
        optimizer=Optimizer(learning_rate=0.1, schedule="cosine", momentum=0.9, weight_decay=1e-4),
        epochs=200,
        batch_size=128,
        clip_start="constant",
    )
    fast = replace(
        published,
        name=f"cifar10_{model}",
        optimizer=Optimizer(
            learning_rate=0.2,
            schedule="one_cycle",
            nesterov=True,
            weight_decay=5e-4,
            rules=(Rule("clip", learning_rate=clip_rate, weight_decay=0.0),),
        ),
        epochs=fast_epochs,
        clip_start="rms",
    )
    return {"fast": fast, "published": published}


def imagenet(
    model: str, *, epochs: int, learning_rate: float, weight_decay: float, clip_rate: float = 3.0
) -> dict[str, Experiment]:
    """Symmetric and plain nets with 4-bit weights and activations on ImageNet: the usual recipe, and a fast one.

    "published": squares of 224 pixels, cosine, batches of 256, clips that start at constants and learn as the weights.
    "fast", the default: squares of 64 pixels cut from larger parts of the photographs, a twelfth of the arithmetic; 30
    epochs in one cycle; clips as in the fast recipe of `cifar10`.

    Both hold out 1% of the training photographs to choose the best epoch and test on the 50,000 of "validation".

    Args:
      model: name of the architecture.
      epochs, learning_rate, weight_decay: of the recipe with which its authors trained it in full precision.
      clip_rate: as in `cifar10`.
    """
    published = Experiment(
        name=f"imagenet_{model}_published",
        variants=(Variant("symmetric", {"symmetric": True}), Variant("plain", {"symmetric": False})),
        data=Data("tfds/imagenet2012", validation=0.01, size=224, crop_padding=0, flip=True),
        model=Model(model, weight_bits=4, act_bits=4),
        optimizer=Optimizer(learning_rate=learning_rate, schedule="cosine", weight_decay=weight_decay),
        epochs=epochs,
        batch_size=256,
        clip_start="constant",
        checkpoint_every=1000,
    )
    fast = replace(
        published,
        name=f"imagenet_{model}",
        data=replace(published.data, size=64, smallest_crop=0.25),
        optimizer=Optimizer(
            learning_rate=2 * learning_rate,
            schedule="one_cycle",
            nesterov=True,
            weight_decay=weight_decay / 2,
            rules=(Rule("clip", learning_rate=clip_rate, weight_decay=0.0),),
        ),
        epochs=30,
        clip_start="rms",
    )
    return {"fast": fast, "published": published}


def stable(recipe: Experiment, *, name: str) -> Experiment:
    """The symmetric network, its steps kept from amplifying an error, with a shortcut that is not rounded.

    "spectral" has spectral norms, "tied" tied norms and step sizes from power iterations (`qpde.models.images.block`).
    """
    spectral = {"symmetric": True, "norm": "spectral", "residual": "precise"}
    tied = {"symmetric": True, "norm": "tied", "step_size": "auto", "residual": "precise"}
    return replace(recipe, name=name, variants=(Variant("spectral", spectral), Variant("tied", tied)))


def any_bit(recipe: Experiment, *, name: str) -> Experiment:
    """The same with bits of its own for every step: one network for all of them, and clips for each.

    The clips start where they round with the least squared error at their bits: from 4 rms, two bits round nearly
    everything to nothing. They learn slowly, for each number of bits is drawn in a few of the steps only.
    """
    bits = (2, 3, 4, 6, 8, 32)
    drawn = BitSchedule("random", bits=bits)
    return replace(
        recipe,
        name=name,
        model=replace(recipe.model, clip_bits=bits),
        annealing=Annealing(weights=drawn, activations=drawn),
        optimizer=replace(recipe.optimizer, rules=(Rule("clip", learning_rate=0.3, weight_decay=0.0),)),
        clip_start="mse",
    )


def camvid(decoder: str, **model: Any) -> dict[str, SegmentationExperiment]:
    """Symmetric and plain segmentation networks on CamVid's road scenes, for two CPU cores.

    "fast", the default: 4-bit weights and activations. "full": full precision, what `python -m train quantize` takes.
    "smoothing": the plain and the symmetric network with total-variation smoothing after every nonlinearity.

    Args:
      decoder: Name of the decoder.
      model: More fields of the model.
    """
    full = SegmentationExperiment(
        name=f"camvid_{decoder}_full",
        variants=(Variant("symmetric", {"symmetric": True}), Variant("plain", {"symmetric": False})),
        data=SegmentationData("camvid"),
        model=SegmentationModel(decoder, weight_bits=None, act_bits=None, **model),
        optimizer=Optimizer(
            "adamw",
            learning_rate=0.003,
            schedule="one_cycle",
            weight_decay=0.01,
            rules=(Rule("clip", learning_rate=1.0, weight_decay=0.0),),
        ),
        loss=SegmentationLoss(class_weights="none", dice=1.0),
        epochs=60,
        batch_size=4,
        clip_start="mse",
    )
    fast = replace(full, name=f"camvid_{decoder}", model=SegmentationModel(decoder, weight_bits=4, act_bits=4, **model))
    smooth = Smoothing(gamma2=0.025, eps=0.1, output=True)
    smoothing = replace(
        fast,
        name=f"camvid_{decoder}_smoothing",
        variants=(
            Variant("symmetric", {"symmetric": True, "smoothing": smooth}),
            Variant("plain", {"symmetric": False, "smoothing": smooth}),
        ),
    )
    return {"fast": fast, "full": full, "smoothing": smoothing}
