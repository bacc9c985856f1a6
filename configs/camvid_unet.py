"""python -m train run configs/camvid_unet.py --data-dir FOLDER        # FOLDER holds camvid

U-Net over resnet20, symmetric and plain, on CamVid's road scenes of 180 x 240 pixels. `--recipe full` gives the
symmetric network in full precision a mean IoU of 47.35%, and 49.44% with `--seed 1`, in 63 and 39 minutes on one busy
core of different machines (docs/guides/segmentation.md).
"""

from train.config.recipes import camvid

recipes = camvid("unet", encoder="resnet20", stem_stride=2)
