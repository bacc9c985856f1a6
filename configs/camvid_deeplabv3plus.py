"""python -m train run configs/camvid_deeplabv3plus.py --data-dir FOLDER        # FOLDER holds camvid

DeepLabV3+ over resnet20 at output stride 16, symmetric and plain, on CamVid's road scenes of 180 x 240 pixels.
"""

from train.config.recipes import camvid

recipes = camvid("deeplabv3plus", encoder="resnet20", decoder_width=64)
