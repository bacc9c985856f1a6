"""python -m train paper --minutes 60 --data-dir FOLDER

The experiments behind the paper's claims, in order of importance: short ones that two cores reach, then the published
recipes. `paper` works through them, takes up where it was stopped, never repeats what is finished,
and lists what did not fit. Each is a recipe of this file, which `run` takes as well:

python -m train run configs/paper.py --recipe cifar10_resnet20_published_0 --data-dir FOLDER

The list as a whole has not been run: what was measured of it is in docs/results.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from train.config.images import Experiment, Variant
from train.config.recipes import cifar10

FORMS = (
    Variant("plain", {"symmetric": False}),
    Variant("symmetric", {"symmetric": True}),
    Variant("tied", {"symmetric": True, "norm": "tied", "step_size": "auto", "residual": "precise"}),
    Variant("spectral", {"symmetric": True, "norm": "spectral", "residual": "precise"}),
)
"""The plain network, the symmetric one as published, and two whose steps never amplify an error."""

WIDE = Variant("tied-wide", FORMS[2].changes | {"width": 1.5, "expansion": 0.45})
"""A tied network with as many parameters as the plain one, for resnet20."""


def _cifar10(model: str, recipe: str, seed: int, *, clip_rate: float = 3.0) -> Experiment:
    experiment = cifar10(model, fast_epochs=6, clip_rate=clip_rate)[recipe]
    # Tied norms are for the blocks of residual networks.
    forms = {"resnet20": (*FORMS, WIDE), "mobilenetv2": FORMS[:2]}.get(model, FORMS)
    return replace(experiment, name=f"{experiment.name}_{seed}", variants=forms, seed=seed)


def _recipes_of(name: str) -> dict:
    return run_path(str(Path(__file__).with_name(f"{name}.py")))["recipes"]


_graphs = _recipes_of("cora_pdegcn")

_in_order = (
    _cifar10("resnet20", "fast", 0),
    _graphs["cora"],
    _cifar10("resnet20", "published", 0),
    _cifar10("mobilenetv2", "fast", 0, clip_rate=0.3),
    _recipes_of("cifar10_smoothing")["full"],
    _cifar10("resnet20", "published", 1),
    _cifar10("resnet56", "published", 0),
    _cifar10("mobilenetv2", "published", 0),
    _graphs["citeseer"],
    _graphs["pubmed"],
    _cifar10("resnet56", "published", 1),
    _cifar10("mobilenetv2", "published", 1),
)

recipes = {experiment.name: experiment for experiment in _in_order}
