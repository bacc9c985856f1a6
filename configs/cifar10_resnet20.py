"""python -m train run configs/cifar10_resnet20.py --data-dir FOLDER

Symmetric and plain resnet20 with 4-bit weights and activations on CIFAR-10. `--recipe fast` (the default) takes
6 epochs in one cycle, `--recipe published` the 200 epochs of the paper.
"""

from dataclasses import replace

from train.config import Data, Experiment, Model, Optimizer, Rule, Variant

published = Experiment(
    name="cifar10_resnet20_published",
    variants=(Variant("symmetric", {"symmetric": True}), Variant("plain", {"symmetric": False})),
    data=Data("cifar10", crop_padding=4, flip=True),
    model=Model("resnet20", weight_bits=4, act_bits=4),
    optimizer=Optimizer(learning_rate=0.1, schedule="cosine", momentum=0.9, weight_decay=1e-4),
    epochs=200,
    batch_size=128,
    clip_start="constant",
)

fast = replace(
    published,
    name="cifar10_resnet20",
    optimizer=Optimizer(
        learning_rate=0.2,
        schedule="one_cycle",
        nesterov=True,
        weight_decay=5e-4,
        rules=(Rule("clip", learning_rate=3.0, weight_decay=0.0),),
    ),
    epochs=6,
    clip_start="rms",
)

recipes = {"fast": fast, "published": published}
