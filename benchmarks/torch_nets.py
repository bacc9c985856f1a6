"""The published networks in PyTorch, as a good PyTorch user would write them: what train_step.py races against.

    python benchmarks/torch_nets.py GOLDEN_FOLDER

checks them against the published networks' own logits, losses and gradients, which makes the race an honest one.
Parameters carry the published names, so `load_state_dict` takes a published state as it is.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# (channels in, channels out, blocks, stride[, expansion]) of every stage
THREE_STAGES = [(16, 16, 1, 1), (16, 32, 1, 2), (32, 64, 1, 2)]
MOBILENET_V2 = [
    (16, 16, 1, 1, 1),
    (16, 24, 2, 1, 6),
    (24, 32, 3, 2, 6),
    (32, 64, 4, 2, 6),
    (64, 96, 3, 1, 6),
    (96, 160, 3, 2, 6),
    (160, 320, 1, 1, 6),
]
DEPTHWISE_BITS = 8


def create(name: str, *, classes=10, symmetric=True, weight_bits=None, act_bits=None, step_size=0.1) -> nn.Module:
    """The network by its published name: resnet20, resnet56, stablenet20, stablenet56 or mobilenetv2."""
    options = {
        "symmetric": symmetric,
        "weight_bits": weight_bits or None,
        "act_bits": act_bits or None,
        "step_size": step_size,
    }
    if name == "mobilenetv2":
        return Network(InvertedBlock, MOBILENET_V2, classes, options, closing=1280)
    block = {"resnet": BasicBlock, "stablenet": StableBlock}[name.rstrip("0123456789")]
    blocks = (int(name[-2:]) - 2) // 6
    return Network(block, [(c_in, c_out, blocks, s) for c_in, c_out, _, s in THREE_STAGES], classes, options)


class Round(torch.autograd.Function):
    """alpha * round(clip(t / alpha, low, 1) * n) / n with the learned clip's gradients."""

    @staticmethod
    def forward(ctx, t: Tensor, alpha: Tensor, low: float, levels: int) -> Tensor:
        v = t / alpha
        q = v.clamp(low, 1).mul_(levels).round_().div_(levels)
        ctx.save_for_backward(v, q)
        ctx.low = low
        return q * alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        v, q = ctx.saved_tensors
        inside = (v >= ctx.low) & (v <= 1)
        # Outside, q is the end of the interval: sign(v) of a weight, 1 or 0 of an activation.
        return g * inside, (g * torch.where(inside, q - v, q)).sum(), None, None


class Quantizer(nn.Module):
    """Owner of one clip; `bits=None` passes its argument on."""

    def __init__(self, bits: int | None, *, signed: bool):
        super().__init__()
        self.bits, self.signed = bits, signed
        if bits is not None:
            self.alpha = nn.Parameter(torch.tensor(3.0 if signed else 6.0))

    def forward(self, t: Tensor) -> Tensor:
        if self.bits is None:
            return t
        if self.signed:
            std, mean = torch.std_mean(t)
            return Round.apply((t - mean) / std, self.alpha, -1.0, 2 ** (self.bits - 1) - 1)
        return Round.apply(t, self.alpha, 0.0, 2**self.bits - 1)


class Block(nn.Module):
    """Keeps a block's options and makes its parts."""

    def __init__(self, symmetric: bool, weight_bits: int | None, act_bits: int | None, step_size: float):
        super().__init__()
        self.symmetric, self.weight_bits, self.act_bits, self.step_size = symmetric, weight_bits, act_bits, step_size

    def add_kernel(self, name: str, *shape: int, bits: int | None = None):
        kernel = torch.empty(shape)
        nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        self.register_parameter(f"{name}_weight", nn.Parameter(kernel))
        self.add_module(f"{name}_quantizer", Quantizer(bits or self.weight_bits, signed=True))

    def kernel(self, name: str) -> Tensor:
        return getattr(self, f"{name}_quantizer")(getattr(self, f"{name}_weight"))

    def add_activations(self, count: int):
        for i in range(count):
            self.add_module(f"act{i + 1}_quantizer", Quantizer(self.act_bits, signed=False))


class BasicBlock(Block):
    """out = relu(shortcut(xq) - h y), y = N2(K^T z) or N2(K2 z), z = Q(relu(N1(K xq)))."""

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool, options: dict):
        super().__init__(**options)
        self.symmetric &= not first
        self.stride = stride
        self.projects = stride != 1 or c_in != c_out
        self.add_kernel("conv1", c_out, c_in, 3, 3)
        if not self.symmetric:
            self.add_kernel("conv2", c_out, c_out, 3, 3)
        if self.projects:
            self.add_kernel("downsample", c_out, c_in, 1, 1)
            self.downsample_bn = nn.BatchNorm2d(c_out)
        self.bn1, self.bn2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        self.add_activations(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1_quantizer(x)
        kernel = self.kernel("conv1")
        z = self.act2_quantizer(F.relu(self.bn1(F.conv2d(x, kernel, stride=self.stride, padding=1))))
        shortcut = x
        if self.projects:
            shortcut = self.downsample_bn(F.conv2d(x, self.kernel("downsample"), stride=self.stride))
        if self.symmetric:
            return F.relu(shortcut - self.step_size * self.bn2(F.conv_transpose2d(z, kernel, padding=1)))
        return F.relu(shortcut - self.bn2(F.conv2d(z, self.kernel("conv2"), padding=1)))


class StableBlock(Block):
    """The symmetric step keeps its width; a stage's first block then appends channels and pools."""

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool, options: dict):
        super().__init__(**options)
        self.added, self.stride = c_out - c_in, stride
        self.add_kernel("conv1", c_in, c_in, 3, 3)
        if not self.symmetric:
            self.add_kernel("conv2", c_in, c_in, 3, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_in)
        self.add_activations(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1_quantizer(x)
        kernel = self.kernel("conv1")
        z = self.act2_quantizer(F.relu(self.bn1(F.conv2d(x, kernel, padding=1))))
        if self.symmetric:
            out = F.relu(x - self.step_size * self.bn2(F.conv_transpose2d(z, kernel, padding=1)))
        else:
            out = F.relu(x - self.bn2(F.conv2d(z, self.kernel("conv2"), padding=1)))
        if self.added:
            out = torch.cat([out, x[:, : self.added]], dim=1)
        return F.avg_pool2d(out, self.stride) if self.stride > 1 else out


class InvertedBlock(Block):
    """MobileNetV2's block, and its symmetric form around K = depthwise after expansion."""

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool, options: dict, expansion: int = 1):
        super().__init__(**options)
        hidden = expansion * c_in
        self.stride, self.keeps_width = stride, stride == 1 and c_in == c_out
        self.symmetric &= self.keeps_width and not first
        self.add_kernel("conv1", hidden, c_in, 1, 1)
        self.add_kernel("conv2", hidden, 1, 3, 3, bits=self.weight_bits and DEPTHWISE_BITS)
        self.bn1 = nn.BatchNorm2d(hidden)
        if self.symmetric:
            self.bn2 = nn.BatchNorm2d(c_in)
        else:
            self.add_kernel("conv3", c_out, hidden, 1, 1)
            self.bn2, self.bn3 = nn.BatchNorm2d(hidden), nn.BatchNorm2d(c_out)
        self.add_activations(2 if self.symmetric else 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1_quantizer(x)
        expand, depthwise = self.kernel("conv1"), self.kernel("conv2")
        groups = len(depthwise)
        y = F.conv2d(x, expand)
        if self.symmetric:
            z = self.act2_quantizer(F.relu(self.bn1(F.conv2d(y, depthwise, groups=groups))))
            y = F.conv_transpose2d(F.conv_transpose2d(z, depthwise, groups=groups), expand)
            return x - self.step_size * self.bn2(y)
        z = self.act2_quantizer(F.relu(self.bn1(y)))
        z = F.relu(self.bn2(F.conv2d(z, depthwise, stride=self.stride, padding=1, groups=groups)))
        y = self.bn3(F.conv2d(self.act3_quantizer(z), self.kernel("conv3")))
        return x - y if self.keeps_width else y


class Network(nn.Module):
    """Opening convolution, stages, global average pool and dense layer; opening and closing in full precision."""

    def __init__(self, block: type[Block], stages: list, classes: int, options: dict, closing: int | None = None):
        super().__init__()
        self.conv1 = nn.Parameter(torch.empty(stages[0][0], 3, 3, 3))
        nn.init.kaiming_normal_(self.conv1, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stages[0][0])
        self.layers = nn.Sequential()
        for c_in, c_out, count, stride, *expansion in stages:
            first = block(c_in, c_out, stride, True, options, *expansion)
            rest = [block(c_out, c_out, 1, False, options, *expansion) for _ in range(count - 1)]
            self.layers.append(nn.Sequential(first, *rest))
        width = stages[-1][1]
        if closing:
            convolution = nn.Conv2d(width, closing, 1, bias=False)
            self.layers.append(nn.Sequential(nn.Sequential(convolution, nn.BatchNorm2d(closing), nn.ReLU())))
        self.dense_output = nn.Linear(closing or width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(F.conv2d(x, self.conv1, padding=1)))
        return self.dense_output(self.layers(x).mean(dim=(2, 3)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Tensor:
    """One step of training; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def relative_error(actual: Tensor, desired: np.ndarray) -> float:
    """Median deviation over the largest value: one flipped rounding must not hide what the rest does."""
    desired = torch.from_numpy(desired)
    return ((actual.detach() - desired).abs().median() / desired.abs().max().clamp_min(1e-12)).item()


def check(path: Path) -> dict[str, float]:
    """Relative errors against one published network: logits, loss and the worst gradient."""
    golden = dict(np.load(path))
    model = create(
        str(golden["meta/arch"]),
        classes=int(golden["meta/classes"]),
        symmetric=bool(golden["meta/stable"]),
        weight_bits=int(golden["meta/weight_bits"]),
        act_bits=int(golden["meta/activation_bits"]),
        step_size=float(golden["meta/stability_coeff"]),
    )
    state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("state/")}
    model.load_state_dict(state)
    x, labels = torch.from_numpy(golden["input"]), torch.from_numpy(golden["labels"])
    errors = {"eval logits": relative_error(model.eval()(x), golden["eval/logits"])}
    logits = model.train()(x)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    errors["train logits"] = relative_error(logits, golden["train/logits"])
    errors["loss"] = abs(loss.item() / float(golden["train/loss"]) - 1)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    errors["worst gradient"] = max(relative_error(g, golden[f"train/grad/{name}"]) for name, g in gradients.items())
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("golden", type=Path, help="folder with the published networks' results")
    for path in sorted(parser.parse_args().golden.glob("*net*.npz")):
        print(f"{path.stem:>24}  " + "  ".join(f"{name} {error:.1e}" for name, error in check(path).items()))


if __name__ == "__main__":
    main()
