"""Weights of the published PyTorch networks, by their own names, as variables of qpde."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpde import quantizers
from qpde.models.images.block import Block
from qpde.models.images.network import Network
from qpde.models.images.parts import Part, Read
from qpde.models.images.stages import groups
from qpde.models.registry import create

__all__ = ["from_torch_state", "tree_from_torch"]


def from_torch_state(name: str, state: Mapping[str, np.ndarray], **options: Any) -> tuple[Network, dict]:
    """A network with published weights.

    Args:
      name: Name of the network, as for `qpde.models.create`.
      options: Options of `qpde.models.create`. They must describe the network of the state (num_classes, symmetric,
        ...), with `norm="separate"`.
      state: Arrays by published name (`layers.S.B.conv1_weight` in OIHW, `bn1.running_var`, ...). Clips that are
        missing, as in full-precision nets, take their starting values.
    Returns:
      The module, and {"params", "batch_stats"}.
    Raises:
      ValueError: An array is missing (the names may have a prefix such as "module."), left over, of another shape than
        the network's, NaN or infinite, a negative variance, or a clip that is not one positive number.
    """
    model = create(name, **options)
    if not isinstance(model, Network):
        raise ValueError(f"{name!r} is a graph network; published weights are those of image networks")
    side = model.smallest_image
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    if set(template) != {"params", "batch_stats"}:
        raise ValueError("published networks have norm='separate'; create another norm and train it")
    used: set[str] = set()

    def read(torch_name: str) -> np.ndarray:
        used.add(torch_name)
        if torch_name in state:
            return _checked(torch_name, np.asarray(state[torch_name]))
        if torch_name.endswith("alpha"):
            weight = "conv" in torch_name or "downsample" in torch_name
            return np.asarray(quantizers.WEIGHT_CLIP if weight else quantizers.ACTIVATION_CLIP, np.float32)
        raise ValueError(
            f"the state lacks {torch_name!r}, which {name} with these options has{_hint(state, torch_name)}"
        )

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


def _checked(torch_name: str, value: np.ndarray) -> np.ndarray:
    """A published array of finite numbers; a clip as a scalar."""
    if not np.isfinite(value).all():
        raise ValueError(
            f"{torch_name!r} of the state holds NaN or infinite numbers: the training diverged, or the file is damaged"
        )
    if torch_name.endswith("running_var") and (value < 0).any():
        raise ValueError(f"{torch_name!r} of the state holds the negative variance {value.min()}")
    if torch_name.endswith("alpha"):
        if value.size != 1 or value.item() <= 0:
            raise ValueError(f"{torch_name!r} of the state (={value.tolist()}) must be one positive number, a clip")
        value = value.reshape(())
    return value


def _hint(state: Mapping[str, np.ndarray], torch_name: str) -> str:
    """What to do where all names have the same prefix, as those of a wrapped module."""
    prefixes = {k.removesuffix(torch_name) for k in state if k.endswith("." + torch_name)}
    prefix = min(prefixes, key=len, default="")
    if not prefix:
        return ""
    return f"; its names begin with {prefix!r}: pass {{k.removeprefix({prefix!r}): v for k, v in state.items()}}"


def tree_from_torch(model: Network, read: Read, *, collections: tuple[str, ...] = ("params", "batch_stats")) -> dict:
    """Arrays under published names, laid out as the collections of `model`.

    Args:
      model: Network of a published kind.
      read: Published name -> array (weights, gradients or statistics alike).
      collections: Which to build; their names alone are read.
    Returns:
      Nested dictionaries of NumPy arrays.
    """
    read_part = {"params": "read_params", "batch_stats": "read_statistics"}
    return {name: _tree(model, read, read_part[name]) for name in collections}


def _tree(model: Network, read: Read, method: str) -> dict:
    """One collection: what every part reads, blocks stacked where they are equal."""

    def own(part: Part, at: str) -> dict:
        return getattr(part, method)(read, at)

    tree = {name: own(part, "") for name, part in model.parts() if not isinstance(part, Block)}
    for s, blocks in enumerate(model.stages):
        tree[f"stage{s}"] = {
            name: jax.tree.map(
                lambda *leaves: np.stack(leaves),
                *(own(block, f"layers.{s}.{b}.") for b in range(start, start + count)),
            )
            for name, block, start, count in groups(blocks)
        }
    return {name: found for name, found in tree.items() if found}
