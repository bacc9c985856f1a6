"""python -m train run configs/cifar10_stablenet20.py --data-dir FOLDER

Symmetric and plain stablenet20 with 4-bit weights and activations on CIFAR-10, as the other configs/cifar10_*.py.

python -m train run configs/cifar10_stablenet20.py --recipe non_expansive --data-dir FOLDER
python -m train certify runs/cifar10_stablenet20_non_expansive --data-dir FOLDER

The same network with every step from the stem to the pooling proven not to amplify an error: spectral norms, a
shortcut that is not rounded, a head that sees shrunken features. Its learning rate is a quarter of the other's.
Seed 0, 4-bit activations: test accuracy 59.40%, agreement with its high-precision twin 97.56%, relative layer-wise
error 0.034. With `--epochs 30`, on a GPU: 76.15%, 96.15%, 0.045. How many predictions are certified is in
docs/results/certificates.md. The first recipe has not been run.

Over many epochs the clips go far above what they clip; `--start-from RUN --reset-clips` sets them anew. With a lower
bound, `--model.lipschitz-target 1.3 --optimizer.learning-rate 0.07 --epochs 30`, accuracy is 73.35%, agreement 95.79%,
error 0.044; three epochs with new clips and `--optimizer.learning-rate 0.02` make it 73.61%, 97.04%, 0.031. With
`--model.lipschitz-target 1.0 --optimizer.learning-rate 0.1` the two trainings end at 71.09%, 86.91%, 0.067 and at
70.90%, 97.33%, 0.025.
"""

from dataclasses import replace

from train.config.images import Variant
from train.config.recipes import cifar10

_stable = {"symmetric": True, "norm": "spectral", "residual": "precise", "head": "scaled"}

recipes = cifar10("stablenet20", fast_epochs=6)
recipes["non_expansive"] = replace(
    recipes["fast"],
    name="cifar10_stablenet20_non_expansive",
    variants=(Variant("non-expansive", _stable),),
    optimizer=replace(recipes["fast"].optimizer, learning_rate=0.05),
)
