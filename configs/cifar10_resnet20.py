"""python -m train run configs/cifar10_resnet20.py --data-dir FOLDER

Symmetric and plain resnet20 with 4-bit weights and activations on CIFAR-10. `--recipe fast` (the default) takes
6 epochs in one cycle, `--recipe published` the 200 epochs of the paper (train/recipes.py).

"""

from train.recipes import cifar10

recipes = cifar10("resnet20", fast_epochs=6)
