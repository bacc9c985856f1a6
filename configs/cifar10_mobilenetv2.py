"""python -m train run configs/cifar10_mobilenetv2.py --data-dir FOLDER

Symmetric and plain MobileNetV2 with 4-bit weights and activations on CIFAR-10. `--recipe fast` (the default) takes
10 epochs in one cycle, `--recipe published` the 200 epochs of the paper (train/recipes.py).

Neither recipe has been run to its end yet, so no result is stated.
"""

from train.recipes import cifar10

recipes = cifar10("mobilenetv2", fast_epochs=10, clip_rate=0.3)
