"""python -m train run configs/cifar10_resnet20.py --data-dir FOLDER

Symmetric and plain resnet20 with 4-bit weights and activations on CIFAR-10. `--recipe fast` (the default) takes
6 epochs in one cycle, `--recipe published` the 200 epochs of the paper (train/config/recipes.py).

The fast recipe on two busy CPU cores, seed 0: symmetric 75.30% test accuracy after 41 minutes, agreement with its
high-precision twin 95.93%; plain 79.90% after 26 minutes, 97.02%. The table is in docs/results/index.md. The published
recipe has not been run.

python -m train run configs/cifar10_resnet20.py --recipe stable --data-dir FOLDER

The symmetric network with its symmetric steps kept from amplifying an error, by spectral norms or by tied norms and
step sizes from power iterations, and with a shortcut that is not rounded. Seed 0: 75.25% and 74.96%, agreement 97.92%
and 97.39%, relative layer-wise error 0.057 and 0.064, where the fast recipe has 0.113 (symmetric) and 0.097 (plain).
With `--epochs 30`, on a GPU: 82.19% and 83.02%, the fast recipe's 83.13% and 86.08%.

python -m train run configs/cifar10_resnet20.py --recipe any_bit --data-dir FOLDER

Bits drawn at every step: one network for all of them, with clips for each. Seed 0, by `python -m train elastic`:
symmetric 65.07% at 2 bits, 71.16% at 4, 72.18% at 8; plain 72.28%, 78.56% and 79.00%; half an hour each on one core.
"""

from train.config.recipes import any_bit, cifar10, stable

recipes = cifar10("resnet20", fast_epochs=6)
recipes["stable"] = stable(recipes["fast"], name="cifar10_resnet20_stable")
recipes["any_bit"] = any_bit(recipes["fast"], name="cifar10_resnet20_any_bit")
