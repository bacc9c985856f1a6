"""python -m train run configs/digits.py

Symmetric and plain resnet20 with 4-bit weights and activations on scikit-learn's handwritten digits, 1280 images of
16x16 to train on. No download. Expect 99% of the 320 test images right for both networks, each agreeing with its
high-precision twin on at least 99% of them; most of the time goes into compiling.
"""

from train.config import Data, Experiment, Model, Optimizer, Rule, Variant

recipes = {
    "fast": Experiment(
        name="digits",
        variants=(
            Variant("symmetric", {"symmetric": True}),
            Variant("plain", {"symmetric": False}),
            Variant("non-expansive", {"symmetric": True, "norm": "spectral", "residual": "precise"}),
        ),
        data=Data("digits", size=16, crop_padding=1, flip=False),
        model=Model("resnet20", weight_bits=4, act_bits=4),
        optimizer=Optimizer(
            learning_rate=0.1,
            schedule="one_cycle",
            nesterov=True,
            weight_decay=5e-4,
            rules=(Rule("clip", learning_rate=3.0, weight_decay=0.0),),
        ),
        epochs=15,
        batch_size=128,
    ),
}
