"""python -m train run configs/imagenet_mobilenetv2.py --data-dir FOLDER

Symmetric and plain MobileNetV2 with 4-bit weights and activations on ImageNet, which `python -m train data prepare
imagenet2012 --data-dir FOLDER` prepares once. `--recipe fast` (the default) takes 30 epochs at 64 pixels in one cycle,
`--recipe published` 150 epochs at 224 (train/config/recipes.py). `--devices all` uses all devices,
`--workers N` reads the photographs with N processes.

The networks open with a 3x3 convolution of stride 1, as for CIFAR-10, so 224 pixels cost 12 times what 64 do. Neither
recipe has been run on the real photographs, so no result is stated; tests run both files on made-up ones.
"""

from train.config.recipes import imagenet

recipes = imagenet("mobilenetv2", epochs=150, learning_rate=0.05, weight_decay=4e-5, clip_rate=0.3)
