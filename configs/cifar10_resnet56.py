"""python -m train run configs/cifar10_resnet56.py --data-dir FOLDER

Symmetric and plain resnet56 with 4-bit weights and activations on CIFAR-10. `--recipe fast` (the default) takes
10 epochs in one cycle, `--recipe published` the 200 epochs of the paper (train/recipes.py).

Neither recipe has been run to its end yet, so no result is stated.
"""

from train.recipes import cifar10

recipes = cifar10("resnet56", fast_epochs=10)
