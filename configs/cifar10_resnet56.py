"""python -m train run configs/cifar10_resnet56.py --data-dir FOLDER

Symmetric and plain resnet56 with 4-bit weights and activations on CIFAR-10. `--recipe fast` (the default) takes
10 epochs in one cycle, `--recipe published` the 200 epochs of the paper (train/config/recipes.py).

`--epochs 3`, 89 minutes on one CPU core, seed 0: symmetric 68.43% test accuracy, layer-wise error 0.158; plain 73.09%,
0.245. The figure is in docs/results/images.md. No recipe has been run to its end.

python -m train run configs/cifar10_resnet56.py --recipe stable --data-dir FOLDER

The symmetric network with spectral or tied norms and a shortcut that is not rounded. `--only tied --epochs 3`: 68.82%
test accuracy, layer-wise error 0.050.
"""

from train.config.recipes import cifar10, stable

recipes = cifar10("resnet56", fast_epochs=10)
recipes["stable"] = stable(recipes["fast"], name="cifar10_resnet56_stable")
