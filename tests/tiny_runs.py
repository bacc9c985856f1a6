"""A file of recipes for a network of two blocks, small enough to train in a test, and what its runs leave."""

import json

CONFIG = """
from train.config import Data, Experiment, Model, Optimizer, Rule, Variant

tiny = Experiment(
    name="tiny",
    variants=(Variant("symmetric"), Variant("plain", {"symmetric": False})),
    data=Data("digits", size=8, crop_padding=1, flip=False),
    model=Model("tiny"),
    optimizer=Optimizer(rules=(Rule("clip", weight_decay=0.0),)),
    epochs=3,
    batch_size=256,
    clip_start="rms",
)
recipes = {"fast": tiny, "full_precision": Experiment(
    name="exact",
    variants=(Variant("plain", {"symmetric": False, "weight_bits": None, "act_bits": None}),),
    data=tiny.data,
    model=tiny.model,
    epochs=1,
    batch_size=256,
)}
"""


def summary(tmp_path, name="tiny"):
    """The results of a run in the folder "runs", without what the clock adds."""
    variants = json.loads((tmp_path / "runs" / name / "summary.json").read_text())["variants"]
    return {name: {k: v for k, v in result.items() if k != "training_seconds"} for name, result in variants.items()}


def files(tmp_path):
    """Names of all files."""
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
