"""Data on several devices: what an operator of this library needs to run under every kind of mesh.

A batch is spread over devices in three ways, and JAX checks two of them in the types of arrays.

    automatic axes    `jax.jit` alone splits the program; types say nothing and nothing is to be done
    `jax.shard_map`   each device runs the program on its part; a type says over which axes a value varies
    explicit axes     the default of `jax.make_mesh`: a type says along which axes a dimension is split

A derivative has the type of what it belongs to. A custom rule that returns the gradient of a clip from a device's own
images breaks that rule, and so does a loop that starts at a constant. So `vary_alike` casts the arguments before the
custom rule, since the transpose of a cast is the sum over the devices. And `by_compiler` runs a function with automatic
axes, where its reshapes and sums need no types.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["by_compiler", "on_each_device", "vary_alike"]

Result = TypeVar("Result")


def vary_alike(*trees: Any, like: Any = ()) -> tuple[Any, ...]:
    """Cast arrays so that all vary over the same axes of `jax.shard_map`; elsewhere the arrays as they are.

    Args:
      trees: pytrees of arrays.
      like: more arrays, which say over which axes to vary and are not returned.
    Returns:
      The trees.
    """
    axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves((trees, like))))

    def cast(leaf):
        missing = tuple(axes - _varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, trees) if axes else trees


def on_each_device(x: jax.Array, *, batch: bool = False) -> jax.Array:
    """An array whole on every device of a mesh with explicit axes, or split along its first axis at most.

    Args:
      x: Array.
      batch: Whether to keep the split of the first axis.
    Returns:
      x, in another sharding where that is needed.
    """
    sharding = jax.typeof(x).sharding
    kept = sharding.spec[:1] if batch else ()
    if all(names is None for names in sharding.spec[len(kept) :]):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*kept)))


def by_compiler(f: Callable[..., Result], *, like: int | None = None) -> Callable[..., Result]:
    """f of arrays for every kind of mesh: where axes are explicit, the compiler splits f as if they were automatic.

    Under `jax.vmap` a type does not tell how the mapped axis is split; there `jax.set_mesh` must say so.

    Args:
      f: (arrays) -> array or pytree of arrays.
      like: position of an argument. The results are split along their first axis as this one is; without it every
        device holds them whole.
    Returns:
      A function like f.
    """

    @wraps(f)
    def on_any_mesh(*arrays):
        shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(arrays)]
        meshes = [s.mesh for s in shardings if any(names is not None for names in s.spec)]
        mesh = meshes[0] if meshes else jax.sharding.get_abstract_mesh()
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = tuple(name for name, axis_type in types if axis_type == AxisType.Explicit)
        if not explicit:
            return f(*arrays)
        first = () if like is None else jax.typeof(arrays[like]).sharding.spec[:1]
        out = NamedSharding(mesh, PartitionSpec(*first))
        return jax.sharding.auto_axes(f, axes=explicit, out_sharding=out)(*arrays)

    return on_any_mesh


def _varying(leaf: Any) -> frozenset:
    return jax.typeof(leaf).manual_axis_type.varying
