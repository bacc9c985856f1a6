"""Weights of the published PyTorch networks, by their own names, as variables of qpde."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpde import quantizers
from qpde.models.images.blocks import Block
from qpde.models.images.network import Network, groups
from qpde.models.registry import create

__all__ = ["from_torch_state", "tree_from_torch"]

Read = Callable[[str], np.ndarray]


def from_torch_state(name: str, state: Mapping[str, np.ndarray], **options: Any) -> tuple[Network, dict]:
    """A network with published weights.

    Args:
      name, options: of `qpde.models.image_network`; they must describe the network of the state (num_classes,
        symmetric, ...), with `norm="separate"`.
      state: arrays by published name (`layers.S.B.conv1_weight` in OIHW, `bn1.running_var`, ...). Clips that are
        missing, as in full-precision nets, take their starting values.
    Returns:
      The module, and {"params", "batch_stats"}.
    Raises:
      ValueError: an array is missing, left over, or of another shape than the network's.
    """
    model = create(name, **options)
    side = model.smallest_image
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    if set(template) != {"params", "batch_stats"}:
        raise ValueError("published networks have norm='separate'; create another norm and train it")
    used: set[str] = set()

    def read(torch_name: str) -> np.ndarray:
        used.add(torch_name)
        if torch_name in state:
            return np.asarray(state[torch_name])
        if torch_name.endswith("alpha"):
            weight = "conv" in torch_name or "downsample" in torch_name
            return np.asarray(quantizers.WEIGHT_CLIP if weight else quantizers.ACTIVATION_CLIP, np.float32)
        raise ValueError(f"the state lacks {torch_name!r}, which {name} with these options has")

    variables = tree_from_torch(model, read)
    left = [k for k in state if k not in used and not k.endswith(("num_batches_tracked", "alpha"))]
    if left:
        raise ValueError(f"the state has arrays that {name} with these options has not: {', '.join(sorted(left)[:5])}")

    def check(path, expected, value):
        if expected.shape != value.shape:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{where} has shape {value.shape} in the state, the network needs {expected.shape}")
        return jnp.asarray(value, expected.dtype)

    return model, jax.tree_util.tree_map_with_path(check, template, variables)


def tree_from_torch(model: Network, read: Read, *, collections: tuple[str, ...] = ("params", "batch_stats")) -> dict:
    """Arrays under published names, laid out as the collections of `model`.

    Args:
      model: of a published kind.   read: published name -> array (weights, gradients or statistics alike).
      collections: which to build; their names alone are read.
    Returns:
      Nested dictionaries of NumPy arrays.
    """
    build = {"params": _params, "batch_stats": _statistics}
    return {name: build[name](model, read) for name in collections}


def _params(model: Network, read: Read) -> dict:
    tree = {
        "stem_kernel": _hwio(read("conv1")),
        "stem_norm": _affine(read, "bn1"),
        "head": {"kernel": read("dense_output.weight").T, "bias": read("dense_output.bias")},
    }
    if model.neck_width is not None:
        tree["neck_kernel"] = _hwio(read("layers.7.0.0.weight"))
        tree["neck_norm"] = _affine(read, "layers.7.0.1")

    def block_params(block: Block, at: str) -> dict:
        kernels = list(block.kernel_shapes())
        weights = [_torch_kernel(k) for k in kernels]
        return {
            **{k: _hwio(read(f"{at}.{w}_weight")) for k, w in zip(kernels, weights, strict=True)},
            **{norm: _affine(read, f"{at}.{_torch_norm(norm)}") for norm in block.norm_widths()},
            "weight_clips": np.stack([read(f"{at}.{w}_quantizer.alpha") for w in weights]),
            "act_clips": np.stack([read(f"{at}.act{i + 1}_quantizer.alpha") for i in range(block.act_count)]),
        }

    return tree | _stages(model, block_params)


def _statistics(model: Network, read: Read) -> dict:
    def running(at: str) -> dict:
        return {"mean": read(f"{at}.running_mean"), "var": read(f"{at}.running_var")}

    tree = {"stem_norm": running("bn1")}
    if model.neck_width is not None:
        tree["neck_norm"] = running("layers.7.0.1")
    return tree | _stages(
        model, lambda block, at: {norm: running(f"{at}.{_torch_norm(norm)}") for norm in block.norm_widths()}
    )


def _stages(model: Network, of_block: Callable[[Block, str], dict]) -> dict:
    tree: dict = {}
    for s, blocks in enumerate(model.stages):
        tree[f"stage{s}"] = {
            name: jax.tree.map(
                lambda *leaves: np.stack(leaves),
                *(of_block(block, f"layers.{s}.{b}") for b in range(start, start + count)),
            )
            for name, block, start, count in groups(blocks)
        }
    return tree


def _affine(read: Read, at: str) -> dict:
    return {"scale": read(f"{at}.weight"), "bias": read(f"{at}.bias")}


def _torch_kernel(name: str) -> str:
    return "downsample" if name == "shortcut_kernel" else name.replace("kernel", "conv")


def _torch_norm(name: str) -> str:
    return "downsample_bn" if name == "shortcut_norm" else name.replace("norm", "bn")


def _hwio(oihw: np.ndarray) -> np.ndarray:
    return oihw.transpose(2, 3, 1, 0)
