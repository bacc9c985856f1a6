"""DeepLabV3+ over a short plain resnet20, written in PyTorch from its description alone: makes deeplabv3plus.npz.

    python tests/golden/deeplabv3plus_torch.py        # needs torch and numpy, and nothing of this project

Weights follow from their names, so that only the logits need be kept. An encoder at output stride 8: a stem of two
convolutions of stride 2, stages of 1, 2 and 2 blocks of 16, 32 and 64 channels, the last one dilated by 2; ASPP with
rates 12, 24 and 36, separable; low-level features at stride 4; everything of 8 channels behind.
"""

import zlib
from pathlib import Path

import numpy as np

CLASSES, WIDTH, SIZE = 3, 8, (1, 45, 61, 3)


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of that name in Flax, without the axis of equal blocks: kernels are HWIO, those of the head IO."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    kind = name.rsplit("/", 1)[-1]
    if "kernel" in kind:
        draw = draw * np.sqrt(2 / np.prod(shape[:-1]))
    elif kind in ("var", "scale"):
        draw = 0.5 + np.abs(draw)
    return draw.astype(np.float32)


def image() -> np.ndarray:
    """(1, H, W, 3), of odd height and width."""
    return value("image", SIZE)


def reference() -> np.ndarray:
    """Logits (1, H, W, classes) of the network for that image."""
    import torch
    import torch.nn.functional as F

    def conv_norm(x, at, kernel, norm, shape, *, stride=1, dilation=1, groups=1):
        k = torch.from_numpy(value(f"params/{at}/{kernel}", shape)).permute(3, 2, 0, 1)
        x = F.conv2d(x, k, stride=stride, padding=dilation * (shape[0] // 2), dilation=dilation, groups=groups)
        own = {
            name: torch.from_numpy(value(f"{collection}/{at}/{norm}/{name}", shape[-1:]))
            for collection, name in (
                ("batch_stats", "mean"),
                ("batch_stats", "var"),
                ("params", "scale"),
                ("params", "bias"),
            )
        }
        return F.batch_norm(x, own["mean"], own["var"], own["scale"], own["bias"], training=False, eps=1e-5)

    def block(x, at, width_in, width_out, *, stride=1, first=1, second=1):
        y = F.relu(conv_norm(x, at, "kernel1", "norm1", (3, 3, width_in, width_out), stride=stride, dilation=first))
        y = conv_norm(y, at, "kernel2", "norm2", (3, 3, width_out, width_out), dilation=second)
        if width_in != width_out:
            x = conv_norm(x, at, "shortcut_kernel", "shortcut_norm", (1, 1, width_in, width_out), stride=stride)
        return F.relu(x - y)

    def separable(x, at, width_in, width_out, rate=1):
        x = F.relu(conv_norm(x, at, "kernel1", "norm1", (3, 3, 1, width_in), dilation=rate, groups=width_in))
        return F.relu(conv_norm(x, at, "kernel2", "norm2", (1, 1, width_in, width_out)))

    def pointwise(x, at, width_in, width_out):
        return F.relu(conv_norm(x, at, "kernel1", "norm1", (1, 1, width_in, width_out)))

    def upsample(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    given = torch.from_numpy(image()).permute(0, 3, 1, 2)
    x = F.relu(conv_norm(given, "stem", "kernel", "norm", (3, 3, 3, 16), stride=2))
    x = F.relu(conv_norm(x, "stem2", "kernel", "norm", (3, 3, 16, 16), stride=2))
    low = block(x, "stage0/block0", 16, 16)
    x = block(low, "stage1/block0", 16, 32, stride=2)
    x = block(x, "stage1/block1", 32, 32)
    x = block(x, "stage2/block0", 32, 64, second=2)
    x = block(x, "stage2/block1", 64, 64, first=2, second=2)
    branches = [pointwise(x, "aspp0/block0", 64, WIDTH)]
    branches += [separable(x, f"aspp{i}/block0", 64, WIDTH, rate) for i, rate in enumerate((12, 24, 36), start=1)]
    pooled = pointwise(x.mean((2, 3), keepdim=True), "aspp4/block0", 64, WIDTH)
    branches.append(upsample(pooled, x))
    x = pointwise(torch.cat(branches, 1), "project/block0", 5 * WIDTH, WIDTH)
    low = pointwise(low, "low/block0", 16, 8)
    x = separable(torch.cat([upsample(x, low), low], 1), "fuse/block0", WIDTH + 8, WIDTH)
    x = separable(x, "fuse/block1", WIDTH, WIDTH)
    head = torch.from_numpy(value("params/head/kernel", (WIDTH, CLASSES))).T[:, :, None, None]
    x = F.conv2d(x, head, torch.from_numpy(value("params/head/bias", (CLASSES,))))
    return upsample(x, given).permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("deeplabv3plus.npz"), logits=reference())
