"""An own U-Net and an own small ViT in 4 bits: `qpde.quantized` beside qwix (JAX) and brevitas (PyTorch).

    python benchmarks/own_networks.py [--data digits cifar10] [--networks unet vit] [--libraries qpde qwix brevitas]

All train the same architecture from scratch, with weights and activations of 4 bits, and 8 in the first layer and the
head, by Adam with the same rate, batches and epochs. qpde learns its clips; qwix scales by the largest value of each
call, and as it multiplies whole numbers, a CPU without 4-bit convolutions is asked for 8 bits too ("qwix8"); brevitas
takes its scales from statistics of the first batches. Printed are accuracy on the test images, agreement with the same
network whose activations are not rounded, the lines that quantize the network, and the time of a step. "smoothing" is
qpde with a total-variation step before each quantizer. Needs the extra [bench]; cifar10 is read from QPDE_DATA_DIR.
"""

import argparse
import inspect
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import qpde

RATE = 3e-3


class UNet(nn.Module):
    """Down, up, and the fine maps beside the coarse ones."""

    width: int = 16

    @nn.compact
    def __call__(self, x, train=False):
        def after(x):
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

        fine = after(nn.Conv(self.width, (3, 3), name="first")(x))
        x = after(nn.Conv(2 * self.width, (3, 3), strides=2)(fine))
        x = after(nn.Conv(2 * self.width, (3, 3))(x))
        x = after(nn.ConvTranspose(self.width, (2, 2), strides=(2, 2))(x))
        x = after(nn.Conv(2 * self.width, (3, 3))(jnp.concatenate([fine, x], axis=-1)))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class ViT(nn.Module):
    """Patches, two blocks of attention, and the mean of all tokens."""

    patch: int
    width: int = 32

    @nn.compact
    def __call__(self, x, train=False):
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, strides=side, name="first")(x)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            h = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(h)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(1))


def quantized_by_qpde(net, x, smoothing=None):
    """Count the lines from here."""
    ends = {"weights": 8, "activations": 8}
    rules = [
        qpde.Rule("first", signed=True, **ends),
        qpde.Rule("head", **ends),
        qpde.Rule("", weights=4, activations=4, smoothing=smoothing),
    ]
    model = qpde.quantized(net, rules)
    variables = model.init(jax.random.key(0), x)
    model = model.with_signs(variables, [x])
    return model, qpde.models.calibrate_clips(model, variables, x, train=True)


def quantized_by_qwix(net, x, inner_type):
    """Count the lines from here."""
    import qwix

    def rules(activations):
        ends = {"weight_qtype": "int8", "act_qtype": activations and "int8"}
        inner = {"weight_qtype": inner_type, "act_qtype": activations}
        return [qwix.QtRule(module_path="first|head", **ends), qwix.QtRule(module_path=".*", **inner)]

    model, twin = (qwix.quantize_model(net, qwix.QtProvider(rules(qtype))) for qtype in (inner_type, None))
    return model, twin, model.init(jax.random.key(0), x)


def train_jax(apply, variables, data, options, project=lambda params: params):
    """The trained variables, and the median time of a step."""
    labels = qpde.optimizer_labels
    rates = {"weights": optax.adam(RATE), "clips": optax.adam(RATE), "smoothing": optax.adam(RATE)}
    optimizer = optax.multi_transform(rates, labels)
    params, statistics = variables["params"], variables.get("batch_stats", {})
    state = optimizer.init(params)

    @jax.jit
    def step(params, statistics, state, x, y):
        def loss(params):
            collections = {"params": params, **({"batch_stats": statistics} if statistics else {})}
            logits, updates = apply(collections, x, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, updates.get("batch_stats", {})

        grads, statistics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return project(optax.apply_updates(params, updates)), statistics, state

    times = []
    for rows in batches(len(data["train"][1]), options):
        x, y = (part[rows] for part in data["train"])
        start = time.perf_counter()
        params, statistics, state = jax.block_until_ready(step(params, statistics, state, x, y))
        times.append(time.perf_counter() - start)
    return {"params": params, **({"batch_stats": statistics} if statistics else {})}, float(np.median(times))


def predictions(apply, variables, images):
    """Predicted classes."""
    apply = jax.jit(apply)
    return np.concatenate([apply(variables, x).argmax(-1) for x in np.array_split(images, max(1, len(images) // 200))])


def run_qpde(net, data, options, smoothing=None):
    """A row of the table."""
    model, variables = quantized_by_qpde(net, data["train"][0][:100], smoothing)
    variables, seconds = train_jax(model.apply, variables, data, options, lambda params: qpde.project(params, model))
    bits = model.layer_bits(variables, data["test"][0][:1])
    found = qpde.measure.compare(model, variables, [data["test"]], bits)
    return found.accuracy, found.agreement, inspect.getsource(quantized_by_qpde), seconds


def run_qwix(net, data, options, inner_type="int4"):
    """A row of the table."""
    model, twin, variables = quantized_by_qwix(net, data["train"][0][:100], inner_type)
    variables, seconds = train_jax(model.apply, variables, data, options)
    images, labels = data["test"]
    low, high = (predictions(one.apply, variables, images) for one in (model, twin))
    return (low == labels).mean(), (low == high).mean(), inspect.getsource(quantized_by_qwix), seconds


def brevitas_networks():
    """The same architectures in PyTorch, written with the layers of brevitas."""
    import brevitas.nn as qnn
    import torch
    from brevitas.quant import Int8ActPerTensorFloat, Uint8ActPerTensorFloat

    def layer(kind, *sizes, bits=4, signed=True, **options):
        quant = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
        return kind(*sizes, weight_bit_width=bits, input_quant=quant, input_bit_width=bits, **options)

    class UNet(torch.nn.Module):
        def __init__(self, channels, width=16):
            super().__init__()
            w = width
            self.first = layer(qnn.QuantConv2d, channels, w, 3, padding=1, bits=8)
            self.down = layer(qnn.QuantConv2d, w, 2 * w, 3, stride=2, padding=1, signed=False)
            self.coarse = layer(qnn.QuantConv2d, 2 * w, 2 * w, 3, padding=1, signed=False)
            self.up = layer(qnn.QuantConvTranspose2d, 2 * w, w, 2, stride=2, signed=False)
            self.fine = layer(qnn.QuantConv2d, 2 * w, 2 * w, 3, padding=1, signed=False)
            self.head = layer(qnn.QuantLinear, 2 * w, 10, bits=8, signed=False, bias=True)
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(n) for n in (w, 2 * w, 2 * w, w, 2 * w))

        def forward(self, x):
            norms = iter(self.norms)
            fine = torch.relu(next(norms)(self.first(x)))
            x = torch.relu(next(norms)(self.down(fine)))
            x = torch.relu(next(norms)(self.coarse(x)))
            x = torch.relu(next(norms)(self.up(x)))
            x = torch.relu(next(norms)(self.fine(torch.cat([fine, x], 1))))
            return self.head(x.mean((2, 3)))

    class Block(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.query, self.key, self.value, self.out = (
                layer(qnn.QuantLinear, width, width, bias=True) for _ in range(4)
            )
            self.wide = layer(qnn.QuantLinear, width, 2 * width, bias=True)
            self.narrow = layer(qnn.QuantLinear, 2 * width, width, bias=True)
            self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))

        def forward(self, x):
            h = self.norms[0](x)
            heads = [f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
            h = torch.nn.functional.scaled_dot_product_attention(*heads)
            x = x + self.out(h.transpose(1, 2).flatten(2))
            h = torch.nn.functional.gelu(self.wide(self.norms[1](x)), approximate="tanh")
            return x + self.narrow(h)

    class ViT(torch.nn.Module):
        def __init__(self, channels, size, patch, width=32):
            super().__init__()
            self.first = layer(qnn.QuantConv2d, channels, width, patch, stride=patch, bits=8)
            self.position = torch.nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
            self.blocks = torch.nn.Sequential(Block(width), Block(width))
            self.norm = torch.nn.LayerNorm(width, eps=1e-6)
            self.head = layer(qnn.QuantLinear, width, 10, bits=8, bias=True)

        def forward(self, x):
            x = self.first(x).flatten(2).transpose(1, 2) + self.position
            return self.head(self.norm(self.blocks(x)).mean(1))

    return UNet, ViT


def run_brevitas(net, data, options):
    """A row of the table."""
    import torch
    from brevitas.graph.calibrate import quantization_status_manager

    torch.manual_seed(0)
    unet, vit = brevitas_networks()
    size, channels = data["train"][0].shape[2:]
    model = unet(channels) if isinstance(net, UNet) else vit(channels, size, net.patch)

    def tensors(images, labels):
        return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2)), torch.tensor(np.asarray(labels)).long()

    images, labels = tensors(*data["train"])
    optimizer, times = torch.optim.Adam(model.parameters(), RATE), []
    for rows in batches(len(labels), options):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    model.eval()
    images, labels = tensors(*data["test"])

    def predicted():
        with torch.no_grad():
            return torch.cat([model(x).argmax(-1) for x in images.split(200)])

    low = predicted()
    with quantization_status_manager(model, disable_act_quant=True):
        high = predicted()
    source = inspect.getsource(brevitas_networks)
    return (low == labels).float().mean(), (low == high).float().mean(), source, float(np.median(times))


def batches(count, options):
    """Rows of every step: each epoch in an order of its own, which all libraries share."""
    rng = np.random.default_rng(0)
    for _ in range(options.epochs):
        order = rng.permutation(count)
        for start in range(0, count - options.batch + 1, options.batch):
            yield order[start : start + options.batch]


def load(name, options):
    """{"train": (images, labels), "test": ...}, images float32."""
    if name == "digits":
        images = qpde.datasets.load_digits(size=8)
    else:
        images = qpde.datasets.load_cifar10(os.environ["QPDE_DATA_DIR"])
    rows = {"train": options.images, "test": options.test_images}
    splits = {part: [v[: rows[part]] for v in getattr(images, part)] for part in rows}
    return {part: (images.normalize(x), jnp.asarray(y, jnp.int32)) for part, (x, y) in splits.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], choices=["digits", "cifar10"])
    parser.add_argument("--networks", nargs="+", default=["unet", "vit"], choices=["unet", "vit"])
    parser.add_argument("--libraries", nargs="+", default=["qpde", "smoothing", "qwix", "qwix8", "brevitas"])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=None, help="training images, from the first on")
    parser.add_argument("--test-images", type=int, default=None)
    options = parser.parse_args()
    runs = {"qpde": run_qpde, "qwix": run_qwix, "brevitas": run_brevitas}
    runs["qwix8"] = lambda *args: run_qwix(*args, inner_type="int8")
    runs["smoothing"] = lambda *args: run_qpde(*args, smoothing=qpde.models.Smoothing(gamma2=0.01))
    print(
        "| data | network | by | accuracy | agreement | lines | ms a step |\n|---|---|---|---|---|---|---|", flush=True
    )
    for name in options.data:
        data = load(name, options)
        for network in options.networks:
            net = UNet() if network == "unet" else ViT(patch=2 if name == "digits" else 4)
            for library in options.libraries:
                if library == "smoothing" and network == "vit":
                    continue  # it is for maps, not for tokens
                row = f"| {name} | {network} | {library} |"
                try:
                    accuracy, agreement, source, seconds = runs[library](net, data, options)
                except Exception as error:  # a library that cannot do it is a result, too
                    print(f"{row} fails: {str(error).splitlines()[0][:120]} | | | |", flush=True)
                    continue
                lines = sum(bool(line.strip()) for line in source.splitlines()) - 2  # its head and its docstring
                figures = f"{float(accuracy):.1%} | {float(agreement):.1%} | {lines} | {1e3 * seconds:.0f}"
                print(f"{row} {figures} |", flush=True)


if __name__ == "__main__":
    main()
