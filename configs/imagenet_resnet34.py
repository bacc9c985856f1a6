"""python -m train run configs/imagenet_resnet34.py --data-dir FOLDER

Symmetric and plain resnet34 with 4-bit weights and activations on ImageNet, which `python -m train data prepare
imagenet2012 --data-dir FOLDER` prepares once. `--recipe fast` (the default) takes 30 epochs at 64 pixels in one cycle,
`--recipe published` the usual 90 epochs at 224 (train/config/recipes.py). `--devices all` uses all devices,
`--workers N` reads the photographs with N processes.

The networks open with a 3x3 convolution of stride 1, as for CIFAR-10, so 224 pixels cost 12 times what 64 do. Neither
recipe has been run on the real photographs, so no result is stated; tests run both files on made-up ones.
"""

from train.config.recipes import imagenet

recipes = imagenet("resnet34", epochs=90, learning_rate=0.1, weight_decay=1e-4)
