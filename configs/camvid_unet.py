"""python -m train run configs/camvid_unet.py --data-dir FOLDER        # FOLDER holds camvid

U-Net over resnet20, symmetric and plain, on CamVid's road scenes of 180 x 240 pixels.
"""

from train.config.recipes import camvid

recipes = camvid("unet", encoder="resnet20")
