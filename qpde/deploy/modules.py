"""Networks of `qpde.quantized` for deployment: kernels packed in few bits, and programs that hold them packed.

    packed = qpde.deploy.pack_module(model, variables, x, bits=qpde.Bits(4, 4))
    qpde.deploy.save_module("network.safetensors", packed)
    logits = qpde.deploy.load_module("network.safetensors").apply(model, x)     # with the module's own code
    program = qpde.deploy.export_module(model, packed, (8, 8, 1))               # without it: StableHLO

Kernels become whole numbers, whose product with their scale is the rounded kernel, bit for bit. Activations are rounded
in float32, as they are in training: a user's module may do anything between its layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import export

from qpde.bits import Bits
from qpde.deploy.files import seal, unseal
from qpde.deploy.packing import PACKED_BITS, pack, packed_size, unpack, unpack_traced
from qpde.deploy.stablehlo import PLATFORMS
from qpde.files import write_whole

__all__ = ["PackedKernel", "PackedModule", "export_module", "load_module", "pack_module", "save_module"]

FORMAT = "qpde packed module 1"


@dataclasses.dataclass(frozen=True, eq=False)
class PackedKernel:
    """Whole numbers in few bits, and their scale.

    Attributes:
      data: uint8, as `qpde.deploy.packing.pack` makes it.
      bits: 2, 3, 4 or 8.
      shape: Shape of the kernel.
      scale: float32, broadcasts to the kernel.
    """

    data: np.ndarray
    bits: int
    shape: tuple[int, ...]
    scale: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class PackedModule:
    """A network of `qpde.quantized` whose kernels are packed.

    Attributes:
      kernels: Packed kernels by their paths, such as "params/Conv_0/kernel".
      rest: All other variables by their paths.
      act_bits: Bits of the activations: one number, one for each quantized layer, or None for exact.
      signs: What `QuantizedModule.with_signs` found.
    """

    kernels: dict[str, PackedKernel]
    rest: dict[str, np.ndarray]
    act_bits: int | tuple[int, ...] | None
    signs: tuple[tuple[str, bool], ...]

    @property
    def bits(self) -> Bits:
        """Bits to call the network with: its kernels are rounded already."""
        return Bits(None, jnp.asarray(self.act_bits) if isinstance(self.act_bits, tuple) else self.act_bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        packed = sum(kernel.data.nbytes + kernel.scale.nbytes for kernel in self.kernels.values())
        return packed + sum(value.nbytes for value in self.rest.values())

    def variables(self) -> dict[str, Any]:
        """The network's collections, kernels multiplied out."""
        kernels = {
            path: jnp.asarray(unpack(kernel.data, kernel.bits, kernel.shape), jnp.float32) * kernel.scale
            for path, kernel in self.kernels.items()
        }
        return unflatten_dict(kernels | {path: jnp.asarray(value) for path, value in self.rest.items()}, sep="/")

    def apply(self, model: Any, x: Any, **arguments: Any) -> Any:
        """Outputs of the network.

        Args:
          model: The network of `qpde.quantized`, with the rules that it was packed with.
          x: Inputs.
          **arguments: Passed on to `model.apply`.
        """
        return model.clone(signs=self.signs).apply(self.variables(), x, bits=self.bits, **arguments)


def pack_module(model: Any, variables: Mapping[str, Any], x: Any, *, bits: Bits | None = None) -> PackedModule:
    """Pack the kernels of a network of `qpde.quantized`.

    Args:
      model: The network.
      variables: Its collections.
      x: An input, of which only shape and dtype count.
      bits: Whole numbers, scalars or one for each quantized layer. Kernels of more than 8 bits stay in float32. None:
        the network's own.
    Returns:
      What gives the same outputs as `model.apply(variables, x, bits=bits)`.
    Raises:
      ValueError: Something else than a network of `qpde.quantized`.
    """
    if not hasattr(model, "stored_kernels"):
        raise ValueError(
            f"{type(model).__name__} is no network of qpde.quantized: fold networks of qpde.models by qpde.deploy.fold"
        )
    rest = {path: np.asarray(leaf) for path, leaf in _flat(variables).items() if not path.startswith("observed/")}
    kernels = {}
    for name, stored in model.stored_kernels(variables, x, bits).items():
        path = f"params/{name}"
        if stored.bits is None:
            rest[path] = stored.values
            continue
        del rest[path]
        packed = next(b for b in PACKED_BITS if b >= stored.bits)
        kernels[path] = PackedKernel(pack(stored.values, packed), packed, stored.values.shape, stored.scale)
    act_bits = (model.layer_bits(variables, x) if bits is None else bits).activations
    if act_bits is not None:
        act_bits = int(act_bits) if np.ndim(act_bits) == 0 else tuple(int(b) for b in np.asarray(act_bits))
    return PackedModule(kernels, rest, act_bits, tuple(model.signs))


def save_module(path: str | Path, packed: PackedModule) -> Path:
    """Write a packed network into one safetensors file.

    Args:
      path: Path of the file.
      packed: Result of `pack_module`.
    Returns:
      The path.
    """
    tensors = {f"rest/{name}": np.array(value, order="C") for name, value in packed.rest.items()}
    for name, kernel in packed.kernels.items():
        tensors |= {f"codes/{name}": kernel.data, f"scale/{name}": kernel.scale}
    described = {
        "kernels": {name: [kernel.bits, *kernel.shape] for name, kernel in packed.kernels.items()},
        "act_bits": packed.act_bits,
        "signs": packed.signs,
    }
    return write_whole(path, seal(tensors, FORMAT, json.dumps(described)))


def load_module(path: str | Path) -> PackedModule:
    """Read what `save_module` wrote.

    Args:
      path: Path of the file.
    Returns:
      The packed network, equal to the one that was written, number for number.
    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is no packed module, or was cut, altered or padded; the message names it.
    """
    tensors, metadata = unseal(path, FORMAT, "packed module")
    try:
        return _read(json.loads(metadata["network"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a packed module: {error}") from None


def export_module(
    model: Any, packed: PackedModule, input_shape: tuple[int, ...], *, dtype: Any = jnp.float32
) -> export.Exported:
    """A program of a packed network with a symbolic batch, which runs on cpu, cuda and tpu without its code.

    `exported.serialize()` is a file's content, `jax.export.deserialize` reads it. Kernels lie in it packed.

    Args:
      model: The network of `qpde.quantized`.
      packed: Result of `pack_module`.
      input_shape: Shape of one input.
      dtype: Dtype of the input.
    Returns:
      Program of inputs (batch, *input_shape) with the outputs.
    """
    network = model.clone(signs=packed.signs)

    def outputs(x):
        kernels = {
            path: unpack_traced(kernel.data, kernel.bits, kernel.shape) * kernel.scale
            for path, kernel in packed.kernels.items()
        }
        return network.apply(unflatten_dict(kernels | packed.rest, sep="/"), x, bits=packed.bits)

    (batch,) = export.symbolic_shape("batch")
    return export.export(jax.jit(outputs), platforms=PLATFORMS)(jax.ShapeDtypeStruct((batch, *input_shape), dtype))


def _read(described, tensors):
    kernels = {}
    for name, (bits, *shape) in described["kernels"].items():
        data, scale = tensors.pop(f"codes/{name}"), tensors.pop(f"scale/{name}")
        if bits not in PACKED_BITS or data.shape != (packed_size(int(np.prod(shape)), bits),):
            raise ValueError(f"{name} has {data.shape} bytes for codes of {bits} bits and shape {shape}")
        np.broadcast_to(scale, shape)
        kernels[name] = PackedKernel(data, bits, tuple(shape), scale)
    if others := [name for name in tensors if not name.startswith("rest/")]:
        raise ValueError(f"{others[0]} belongs to no kernel")
    act_bits = described["act_bits"]
    return PackedModule(
        kernels,
        {name.removeprefix("rest/"): value for name, value in tensors.items()},
        tuple(act_bits) if isinstance(act_bits, list) else act_bits,
        tuple((str(path), bool(sign)) for path, sign in described["signs"]),
    )


def _flat(variables: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
