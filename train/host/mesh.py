"""The devices that train together: a mesh with the one axis "data", along which the images of a batch are spread.

Every device holds the whole state and a part of each batch.  The step is the program for one device; `jax.jit` splits
it after the shardings of its arguments and adds up what crosses devices: gradients, sums and the statistics of batch
norms, which are therefore those of the whole batch.  So the number of devices changes the order of sums and nothing
else.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def make_mesh(devices: int | Literal["all"]) -> Mesh:
    """The mesh of so many devices, or of all there are; of all processes if there are several.

    Raises:
      ValueError: there are fewer, or some process would be left without a part.
    """
    present = jax.devices()
    count = len(present) if devices == "all" else devices
    if count > len(present):
        raise ValueError(f"devices (={devices}) exceeds the {len(present)} of this machine: choose less, or all")
    if jax.process_count() > 1 and count != len(present):
        raise ValueError(
            f"devices (={devices}) must be all of them in a run of {jax.process_count()} processes, which have "
            f"{len(present)} together: give --devices all"
        )
    return Mesh(np.array(present[:count]), ("data",))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose leading axis are the images of a batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def stacked_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches on a leading axis: of arrays (batch, image, ...)."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Tree, sharding: NamedSharding) -> Tree:
    """Arrays and random keys, the same in every process, on the devices of the mesh."""

    def place(leaf):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)  # each process fills its own devices
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(lambda leaf: _through_data(place, leaf), tree)


def local(tree: Tree) -> Tree:
    """What every device holds whole, on this process's first device alone."""
    return jax.tree.map(lambda leaf: _through_data(lambda data: data.addressable_data(0), leaf), tree)


def check_divides(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """ValueError for a batch that the devices, or the parts of a step, cannot share evenly."""
    parts = mesh.size * accumulate
    if batch_size % parts:
        what = f"{mesh.size} devices" + (f" times {accumulate} parts (accumulate)" if accumulate > 1 else "")
        raise ValueError(
            f"batch_size (={batch_size}) must be a multiple of {parts}, {what}: choose "
            f"{max(batch_size // parts, 1) * parts}"
        )


def _through_data(function: Callable[[jax.Array], jax.Array], leaf):
    """Random keys are moved as the numbers they consist of."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return function(leaf)
    return jax.random.wrap_key_data(function(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
