"""python -m train run configs/own_pictures.py --data.name folder/PATH --data.size 64

Symmetric and plain resnet20 with 4-bit weights and activations on your own pictures: PATH holds a folder of pictures
for each class, or folders train, validation and test of this kind. docs/own_pictures.md tells the rest.

Without --data.name it is the folder `pictures` of the working directory.
"""

from train.config.images import Data, Experiment, Model, Optimizer, Rule, Variant

fast = Experiment(
    name="own_pictures",
    variants=(Variant("symmetric", {"symmetric": True}), Variant("plain", {"symmetric": False})),
    data=Data("folder/pictures", size=32, smallest_crop=0.35, crop_padding=0),
    model=Model("resnet20", weight_bits=4, act_bits=4),
    optimizer=Optimizer(
        learning_rate=0.05,
        schedule="one_cycle",
        nesterov=True,
        weight_decay=5e-4,
        rules=(Rule("clip", learning_rate=3.0, weight_decay=0.0),),
    ),
    epochs=20,
    batch_size=64,
)

recipes = {"fast": fast}
