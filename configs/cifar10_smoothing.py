"""python -m train run configs/cifar10_smoothing.py --data-dir FOLDER

Plain resnet20 with and without total-variation smoothing after every nonlinearity, on CIFAR-10 in full precision, to be
quantized afterwards; and from there, trained in few bits:

python -m train quantize runs/cifar10_smoothing --bits W8A8 W4A4 W3A3 W2A2 --data-dir FOLDER
python -m train run configs/cifar10_smoothing.py --recipe tuned --name cifar10_smoothing_tuned4 --model.weight-bits 4
    --model.act-bits 4 --data-dir FOLDER

Seed 0: 75.60% in full precision, 71.41% smoothed; 75.97% and 72.07% by the last command. The tables are in
docs/results/smoothing.md.
"""

from dataclasses import replace
from typing import Any

from qpde.models import Smoothing
from train.config.images import Calibration, Variant
from train.config.recipes import cifar10

_fast = cifar10("resnet20", fast_epochs=3)["fast"]
_strong = Smoothing(gamma2=0.125, eps=0.5, output=True)


def _smoothed(name: str, **changes: Any) -> Variant:
    return Variant(name, {"symmetric": False, "smoothing": replace(_strong, **changes)})


full = replace(
    _fast,
    name="cifar10_smoothing",
    variants=(
        Variant("plain", {"symmetric": False}),
        _smoothed("smoothed"),
        _smoothed("weak", gamma2=0.025, eps=0.1),
        _smoothed("huber", kind="huber"),
        _smoothed("first_stage", blocks=(0, 1, 2)),
        _smoothed("learned", learned=True),
    ),
    only=("plain", "smoothed"),
    model=replace(_fast.model, weight_bits=None, act_bits=None),
)

recipes = {
    "full": full,
    "tuned": replace(
        full,
        name="cifar10_smoothing_tuned",
        model=replace(_fast.model, standardize=False),
        optimizer=replace(_fast.optimizer, learning_rate=0.02),
        start_from="runs/cifar10_smoothing",
        calibration=Calibration(),
        epochs=1,
    ),
}
