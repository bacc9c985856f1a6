"""python -m train run configs/cityscapes_deeplabv3plus.py --data-dir FOLDER     # FOLDER holds leftImg8bit and gtFine

DeepLabV3+ over MobileNetV2 at output stride 16 on Cityscapes, whole images on one large GPU (25 GB as bytes), crops of
769 pixels in batches of 16 for 90,000 steps (Chen et al., 2018). The published learning rate, 0.007, falls with the
power 0.9 of what is left; here it falls as a cosine, and training starts from random weights, not from ImageNet's. It
has not been run.
"""

from train.config.images import Optimizer, Variant
from train.config.segmentation import (
    SegmentationData,
    SegmentationExperiment,
    SegmentationLoss,
    SegmentationModel,
)

recipes = {
    "published": SegmentationExperiment(
        name="cityscapes_deeplabv3plus",
        variants=(Variant("symmetric", {"symmetric": True}), Variant("plain", {"symmetric": False})),
        data=SegmentationData(
            "cityscapes", crop=(769, 769), smallest_scale=0.5, largest_scale=2.0, colour=0.0, validation=0.05
        ),
        model=SegmentationModel(
            "deeplabv3plus", encoder="mobilenetv2", output_stride=16, decoder_width=256, weight_bits=4, act_bits=4
        ),
        loss=SegmentationLoss(class_weights="none"),
        optimizer=Optimizer(learning_rate=0.007, schedule="cosine", momentum=0.9, weight_decay=4e-5),
        epochs=512,
        batch_size=16,
        clip_start="constant",
        checkpoint_every=1000,
    )
}
