"""Differential operators on graphs: gradient, divergence, Laplacian, total variation.

A graph is a `jraph.GraphsTuple` that lists every undirected edge e = (i, j) once, i the sender; `from_edges` makes
one. With d_i = 1 + the edges at node i (a self-loop counted), the gradient of a node field x is the edge field

    "normalized"   (G x)_e = x_i / sqrt(d_i) - x_j / sqrt(d_j)       kernel: multiples of sqrt(d)
    "gcn"          (G x)_e = (x_i - x_j) / sqrt(d_i d_j)             kernel: constants

on every connected component, and the divergence is -G^T. For "normalized" G^T G is the normalised Laplacian
I - D^-1/2 (A + I) D^-1/2, whose eigenvalues lie in [0, 2). Which end of an edge is the sender changes the sign of
(G x)_e and nothing that is made of it by an odd function and the divergence.

Fields have the nodes, or the edges, on their leading axis. Padding and batching by jraph change nothing: a padded
edge is a loop at a padding node, where G x = 0 and the degree does not count it. On CPUs all sums run in the order
of the edges and are reproducible; on GPUs XLA needs the flag --xla_gpu_deterministic_ops=true for that.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax.experimental.sparse import BCOO
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from qpde.checks import known_value, scalar
from qpde.devices import by_compiler, vary_alike

__all__ = [
    "BLOCK_SIZE",
    "GRADIENTS",
    "LARGE_BLOCK_SIZE",
    "dirichlet_energy",
    "divergence",
    "fold_blocks",
    "from_edges",
    "gradient",
    "laplacian",
    "largest_eigenvalue_bound",
    "max_stable_step",
    "nonlinear_laplacian",
    "normalize",
    "total_variation",
    "tv_step",
]

GRADIENTS = {"normalized": 2.0, "gcn": 1.0}
"""The gradients by name, and a number that no eigenvalue of G^T G exceeds on any graph."""

BLOCK_SIZE = 2**17
"""Numbers in a block of edges, or of entries of sparse features, on a CPU: half a MiB of float32, so that a few blocks
fit a core's cache."""

LARGE_BLOCK_SIZE = 2**24
"""The same on GPUs and TPUs, which want much work at a time: 64 MiB of float32."""


def from_edges(
    senders: Integer[Array | np.ndarray, " edges"] | list[int],
    receivers: Integer[Array | np.ndarray, " edges"] | list[int],
    *,
    num_nodes: int,
    nodes: Any = None,
) -> jraph.GraphsTuple:
    """An undirected graph from any list of edges. Runs on the host, not under jit.

    Self-loops are dropped (the degrees count one for every node), duplicates and the two directions of an edge are
    merged. What remains points from the smaller to the larger node and is sorted by receiver, then sender, which keeps
    sums local in memory. Nodes without edges are allowed: their gradient is zero.

    Args:
      senders: One end of each edge: integers (edges,), in 0 .. num_nodes - 1; may be empty.
      receivers: The other end, likewise.
      num_nodes: At least 1.
      nodes: Features, floating point (num_nodes, ...), a list of them, or a `jax.experimental.sparse.BCOO` matrix,
        which jraph can batch or pad neither way; None stands for (num_nodes, 0).
    Returns:
      GraphsTuple of one graph; `edges` and `globals` are None.
    Raises:
      ValueError: No nodes, an end outside them, lists of different lengths or not of integers, features of another
        length, not floating point, NaN or infinite.

    >>> graph = from_edges([0, 1, 2, 2], [1, 0, 1, 2], num_nodes=4)
    >>> print(graph.senders, graph.receivers)
    [0 1] [1 2]
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes (={num_nodes}) must be at least 1: a graph without nodes has no fields")
    ends = [_checked_ends(name, e, num_nodes) for name, e in (("senders", senders), ("receivers", receivers))]
    if len(ends[0]) != len(ends[1]):
        raise ValueError(f"{len(ends[0])} senders but {len(ends[1])} receivers: an edge has one of each")
    small, large = np.minimum(*ends), np.maximum(*ends)
    keys = np.unique((large * num_nodes + small)[small != large])
    return jraph.GraphsTuple(
        nodes=_checked_nodes(nodes, num_nodes),
        edges=None,
        globals=None,
        senders=jnp.asarray(keys % num_nodes, jnp.int32),
        receivers=jnp.asarray(keys // num_nodes, jnp.int32),
        n_node=jnp.array([num_nodes], jnp.int32),
        n_edge=jnp.array([len(keys)], jnp.int32),
    )


def normalize(graph: jraph.GraphsTuple) -> Float[Array, " nodes"]:
    """1 / sqrt(d_i), d_i = 1 + the number of edges at node i. Loops are not counted, so padding changes nothing.

    Every operator below takes it as `scale`, and computes it where that is missing; a network of many layers does it
    once. It is cheap beside a gradient.

    Args:
      graph: Each undirected edge once.
    """
    count = (graph.senders != graph.receivers).astype(jnp.float32)
    return jax.lax.rsqrt(1.0 + _sum_at(graph.senders, count, graph) + _sum_at(graph.receivers, count, graph))


def gradient(
    graph: jraph.GraphsTuple,
    x: Float[Array | np.ndarray, "nodes *channels"],
    *,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, "edges *channels"]:
    """G x: differences along the edges, weighted by the degrees.

    (G x)_e = x_i / sqrt(d_i) - x_j / sqrt(d_j), or (x_i - x_j) / sqrt(d_i d_j) for "gcn" (Eliasof, Haber and Treister,
    PDE-GCN, 2021). A matrix K on the channels commutes with it, G (x K) = (G x) K, and costs less on the left.

    Args:
      graph: Each undirected edge once.
      x: Node field (nodes, ...).
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Edge field (edges, ...).
    Raises:
      ValueError: An unknown kind, a field of another length than the graph.
    """
    _check(graph, kind, x)
    scale = normalize(graph) if scale is None else scale
    if kind == "normalized":
        x = x * _along(scale, x)
    # The negative of the nodes, not of the edges: of those there are more, and the backward pass turns them, too.
    difference = _at(graph.senders, x) + _at(graph.receivers, -x)
    return difference if kind == "normalized" else difference * _along(_edge_weight(graph, scale), difference)


def divergence(
    graph: jraph.GraphsTuple,
    p: Float[Array | np.ndarray, "edges *channels"],
    *,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, "nodes *channels"]:
    """-G^T p, the exact adjoint: <G x, p> = <x, -div p>. At a node: what arrives minus what leaves, weighted.

    Args:
      graph: Each undirected edge once.
      p: Edge field (edges, ...).
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Node field (nodes, ...).
    Raises:
      ValueError: An unknown kind, a field of another length than the edges.
    """
    _check(graph, kind, p=p)
    scale = normalize(graph) if scale is None else scale
    if kind == "gcn":
        p = p * _along(_edge_weight(graph, scale), p)
    # Two plain sums in the order of the edges: XLA:CPU adds a row of 64 channels in 17 ns. Sorting p by node first
    # (half-edges, or a permutation for the senders) costs four times as much at a million edges.
    total = _sum_at(graph.receivers, p, graph) - _sum_at(graph.senders, p, graph)
    return total * _along(scale, total) if kind == "normalized" else total


def laplacian(
    graph: jraph.GraphsTuple,
    x: Float[Array | np.ndarray, "nodes *channels"],
    *,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, "nodes *channels"]:
    """G^T G x, the positive semi-definite Laplacian; for "normalized" x - D^-1/2 (A + I) D^-1/2 x.

    So x - laplacian(x) is the propagation of graph convolution (Kipf and Welling, 2017).

    Args:
      graph: Each undirected edge once.
      x: Node field (nodes, ...).
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Node field like x.
    Raises:
      ValueError: As for `gradient`.
    """
    scale = normalize(graph) if scale is None else scale
    return -divergence(graph, gradient(graph, x, kind=kind, scale=scale), kind=kind, scale=scale)


def nonlinear_laplacian(
    graph: jraph.GraphsTuple,
    x: Float[Array | np.ndarray, "nodes *channels"],
    flux: Callable[[Array], Array],
    *,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, "nodes *channels"]:
    """G^T s(G x) for a flux s, edge by edge: the right side of diffusion with a nonlinearity, or with rounding.

    No field on the edges is stored, neither here nor for the gradient, which takes G x and s of it once more. Its
    form is the same, G^T (s'(G x) G c) for a cotangent c, and like this one it runs over blocks of edges, which stay
    in a CPU's cache.

    Args:
      graph: Each undirected edge once.
      x: Node field (nodes, ...).
      flux: S, a function of values (edges in a block, ...) on the edges that treats each edge by itself, s(0) = 0. It
        may close over traced numbers, and gradients flow to those that are floating point; reverse mode only.
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Node field like x, of the dtype of x * scale.
    Raises:
      ValueError: As for `gradient`.
    """
    _check(graph, kind, x)
    scale = normalize(graph) if scale is None else scale
    x = jnp.asarray(x, jnp.result_type(x, scale))
    if kind == "normalized":
        weight, x = None, x * _along(scale, x)
    else:
        weight = scale
    channels = math.prod(x.shape[1:])
    fluxes: dict[int, Callable] = {}
    closed_over: list[Array] = []
    ends = (graph.senders, graph.receivers)
    x, weight = vary_alike(x, weight, like=ends)
    for rows in _block_rows(len(graph.senders), channels):
        a_block = jax.eval_shape(lambda x, rows=rows: jnp.zeros_like(x, shape=(rows, *x.shape[1:])), x)
        fluxes[rows], closed_over = jax.closure_convert(flux, a_block)
    total = _through_flux(fluxes.__getitem__, channels, ends, weight, x, closed_over)
    return total * _along(scale, total) if kind == "normalized" else total


def dirichlet_energy(
    graph: jraph.GraphsTuple,
    x: Float[Array | np.ndarray, "nodes *channels"],
    *,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, ""]:
    """|G x|^2 / 2, summed over edges and channels: 0 where x is over-smoothed. Its gradient is the Laplacian.

    Args:
      graph: Each undirected edge once.
      x: Node field (nodes, ...).
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Scalar.
    Raises:
      ValueError: As for `gradient`.
    """
    return 0.5 * jnp.sum(jnp.square(gradient(graph, x, kind=kind, scale=scale)))


def total_variation(
    graph: jraph.GraphsTuple,
    x: Float[Array | np.ndarray, "nodes *channels"],
    *,
    eps: ArrayLike,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, ""]:
    """TV_eps(x) = sum sqrt((G x)^2 + eps^2) over edges (not loops) and channels.

    Args:
      graph: Each undirected edge once.
      x: Node field (nodes, ...).
      eps: Width of the quadratic part, > 0; a traced one is not checked.
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Scalar.
    Raises:
      ValueError: A static eps <= 0, and as for `gradient`.
    """
    eps = _positive("eps", eps)
    lengths = jnp.sqrt(jnp.square(gradient(graph, x, kind=kind, scale=scale)) + _square(eps))
    return jnp.sum(lengths, where=_along(graph.senders != graph.receivers, lengths))


def tv_step(
    graph: jraph.GraphsTuple,
    x: Float[Array | np.ndarray, "nodes *channels"],
    *,
    gamma2: ArrayLike,
    eps: ArrayLike,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, "nodes *channels"]:
    """x - gamma2 G^T( G x / sqrt((G x)^2 + eps^2) ): an explicit step down TV_eps, every channel by itself.

    The gradient of TV_eps has the Lipschitz constant |G|^2 / eps, so the step never raises the energy and is
    non-expansive for gamma2 <= 2 eps / |G|^2; on every graph that holds up to eps ("normalized") or 2 eps ("gcn").

    Args:
      graph: Each undirected edge once.
      x: Node field (nodes, ...).
      gamma2: Size of the step, >= 0 and at most that bound. A traced value beyond it is clamped to it.
      eps: Width of the quadratic part, > 0; a traced one is not checked.
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Node field like x.
    Raises:
      ValueError: A static gamma2 outside its bounds, a static eps <= 0, and as for `gradient`.
    """
    _check(graph, kind, x)
    eps, step = _positive("eps", eps), scalar("gamma2", gamma2)
    bound = 2 * eps / GRADIENTS[kind]
    if _is_static(step, eps):
        if not 0 <= step <= bound:
            raise ValueError(
                f"gamma2 (={step}) must be within [0, {bound:g}] for kind={kind!r}, eps={eps:g}: a larger step "
                "can raise the energy; take more steps instead"
            )
    else:
        # `where`, not `clip`: the gradient at the bounds themselves is 1, so a step can start there and learn.
        step = jnp.where(step < 0, 0.0, jnp.where(step > bound, bound, step))
    scale = normalize(graph) if scale is None else scale
    g = gradient(graph, x, kind=kind, scale=scale)
    return jnp.asarray(x) + step * divergence(
        graph, g * jax.lax.rsqrt(jnp.square(g) + _square(eps)), kind=kind, scale=scale
    )


def largest_eigenvalue_bound(
    graph: jraph.GraphsTuple, *, kind: str = "normalized", scale: Float[Array, " nodes"] | None = None
) -> Float[Array, ""]:
    """A number that no eigenvalue of G^T G exceeds: twice its largest diagonal entry, as (a - b)^2 <= 2 a^2 + 2 b^2.

    It is 2 (1 - 1 / max d) for "normalized", at most 2, and reached on regular bipartite graphs; at most 1 for "gcn".

    Args:
      graph: Each undirected edge once.
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Scalar.
    Raises:
      ValueError: An unknown kind.
    """
    _check(graph, kind)
    scale = normalize(graph) if scale is None else scale
    square = jnp.square(scale)
    if kind == "normalized":
        return 2.0 * (1.0 - jnp.min(square))
    loops = graph.senders == graph.receivers
    weight = jnp.where(loops, 0.0, jnp.square(_edge_weight(graph, scale)))
    return 2.0 * jnp.max(_sum_at(graph.senders, weight, graph) + _sum_at(graph.receivers, weight, graph))


def max_stable_step(
    graph: jraph.GraphsTuple,
    *,
    lipschitz: ArrayLike = 1.0,
    kind: str = "normalized",
    scale: Float[Array, " nodes"] | None = None,
) -> Float[Array, ""]:
    """The largest h for which x - h G^T f(G x) is surely non-expansive: 2 / (lipschitz * |G|^2).

    f is the gradient of a convex function with that Lipschitz constant: 1 for the identity, tanh and the Huber clip,
    |K|^2 for K^T s(K .), 1 / eps for total variation. |G|^2 is `largest_eigenvalue_bound`.

    Args:
      graph: Each undirected edge once.
      lipschitz: Lipschitz constant of f, > 0; a traced one is not checked.
      kind: "normalized" or "gcn".
      scale: `normalize(graph)`; None computes it.
    Returns:
      Scalar; infinite for a graph without edges, where G = 0.
    Raises:
      ValueError: A static lipschitz <= 0, an unknown kind.
    """
    lipschitz = _positive("lipschitz", lipschitz)
    return 2.0 / (jnp.asarray(lipschitz, jnp.float32) * largest_eigenvalue_bound(graph, kind=kind, scale=scale))


# XLA clamps an index that is out of range in a gather and drops it in a scatter, so the promise that there is none
# saves the check and risks no foreign memory.


def _at(index, x):
    """The rows of x at the ends of edges."""
    return by_compiler(lambda index, x: x.at[index].get(mode="promise_in_bounds"), like=0)(index, jnp.asarray(x))


def _sum_at(index, p, graph):
    """Sums the rows of p by node."""

    def summed(index, p):
        zeros = jnp.zeros((_num_nodes(graph), *p.shape[1:]), p.dtype)
        return zeros.at[index].add(p, mode="promise_in_bounds")

    return by_compiler(summed)(index, p)


def fold_blocks(add, start, columns, *, channels):
    """`add(total, block)` from `start` on, over blocks of the columns, as large as the platform likes them.

    Args:
      add: Its block is a tuple, of as many entries of each column.
      start: The first total.
      columns: Arrays (entries,). Zeros fill the last block.
      channels: Numbers that an entry stands for.
    """

    def fold(rows, start, columns):
        blocks = tuple(jnp.pad(column, (0, -len(column) % rows)).reshape(-1, rows) for column in columns)
        return jax.lax.scan(lambda total, block: (add(total, block), None), start, blocks)[0]

    small, large = _block_rows(len(columns[0]), channels)
    return jax.lax.platform_dependent(start, columns, cpu=partial(fold, small), default=partial(fold, large))


def _block_rows(entries, channels):
    """Entries in a block on a CPU, and elsewhere."""
    return tuple(max(1, min(size // max(1, channels), entries)) for size in (BLOCK_SIZE, LARGE_BLOCK_SIZE))


# Loops at node 0 fill the last block of edges: there G x = 0.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _through_flux(flux_of, channels, ends, weight, x, closed_over):
    """`flux_of(rows)` is the flux of a block of so many edges."""

    def add(total, ends):
        p = flux_of(len(ends[0]))(_difference(x, ends, weight), *closed_over)
        return _add_adjoint(total, ends, p, weight)

    return fold_blocks(add, jnp.zeros_like(x), ends, channels=channels)


def _through_flux_forward(flux_of, channels, ends, weight, x, closed_over):
    return _through_flux(flux_of, channels, ends, weight, x, closed_over), (ends, weight, x, closed_over)


def _through_flux_backward(flux_of, channels, residuals, cotangent):
    ends, weight, x, closed_over = residuals

    def add(sums, ends):
        total, of_closed_over = sums
        _, pullback = jax.vjp(flux_of(len(ends[0])), _difference(x, ends, weight), *closed_over)
        p, *more = pullback(_difference(cotangent, ends, weight))
        return _add_adjoint(total, ends, p, weight), jax.tree.map(jnp.add, of_closed_over, more)

    zeros = jax.tree.map(jnp.zeros_like, (x, list(closed_over)))
    total, of_closed_over = fold_blocks(add, zeros, ends, channels=channels)
    return None, None, total, of_closed_over


_through_flux.defvjp(_through_flux_forward, _through_flux_backward)


def _difference(x, ends, weight):
    """G x on some edges, up to the weight of the nodes."""
    i, j = ends
    difference = _at(i, x) - _at(j, x)
    return difference if weight is None else difference * _along(_at(i, weight) * _at(j, weight), difference)


def _add_adjoint(total, ends, p, weight):
    i, j = ends
    if weight is not None:
        p = p * _along(_at(i, weight) * _at(j, weight), p)

    def added(total, i, j, p):
        total = total.at[i].add(p, mode="promise_in_bounds")
        return total.at[j].subtract(p, mode="promise_in_bounds")

    return by_compiler(added, like=0)(total, i, j, p)


def _edge_weight(graph, scale):
    return _at(graph.senders, scale) * _at(graph.receivers, scale)


def _along(weight, field):
    """A weight per node or edge, shaped to multiply a field."""
    return weight.reshape(weight.shape + (1,) * (field.ndim - 1))


def _num_nodes(graph):
    nodes = graph.nodes
    if not hasattr(nodes, "shape"):  # jraph allows a tree of features; a sparse matrix has leaves of other lengths
        nodes = next(iter(jax.tree.leaves(nodes)), None)
        if nodes is None:
            raise ValueError("graph.nodes (=None) does not tell how many nodes there are: give it (nodes, 0) zeros")
    return nodes.shape[0]


def _check(graph, kind, x=None, p=None):
    if kind not in GRADIENTS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(GRADIENTS)}")
    if x is not None and x.shape[0] != _num_nodes(graph):
        raise ValueError(f"x has {x.shape[0]} rows, the graph has {_num_nodes(graph)} nodes")
    if p is not None and p.shape[0] != graph.senders.shape[0]:
        raise ValueError(f"p has {p.shape[0]} rows, the graph has {graph.senders.shape[0]} edges")


def _is_static(*values):
    return all(isinstance(v, int | float | np.number) for v in values)


def _positive(name, value):
    """A positive number; a traced one is not checked."""
    known = known_value(scalar(name, value))
    if known is not None and not (known > 0 and np.isfinite(known)):
        raise ValueError(f"{name} (={value}) must be positive and finite")
    return scalar(name, value)


def _square(value):
    return value * value


def _checked_ends(name, ends, num_nodes):
    ends = np.asarray(ends)
    if ends.size == 0:
        ends = ends.astype(np.int64)
    if ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer):
        raise ValueError(f"{name} are {ends.dtype} of shape {ends.shape}; they must be integers, one for each edge")
    outside = ends[(ends < 0) | (ends >= num_nodes)]
    if outside.size:
        raise ValueError(f"{name} hold node {outside[0]}, outside the graph's nodes 0 to {num_nodes - 1}")
    return ends.astype(np.int64)


def _checked_nodes(nodes, num_nodes):
    if nodes is None:
        return jnp.zeros((num_nodes, 0))
    if isinstance(nodes, list | tuple):
        nodes = np.asarray(nodes, np.float32)
    if not getattr(nodes, "shape", ()):
        raise ValueError(
            f"features are of type {type(nodes).__name__}: give an array (num_nodes, F), for instance by "
            "np.concatenate of several kinds of features"
        )
    if nodes.shape[0] != num_nodes:
        raise ValueError(f"nodes have {nodes.shape[0]} rows of features, but num_nodes is {num_nodes}")
    sparse = isinstance(nodes, BCOO)
    values = np.asarray(nodes.data if sparse else nodes)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"features are {values.dtype}; they must be floating point: convert them to float32")
    bad = np.argwhere(~np.isfinite(values))
    if bad.size:
        where = f"entry {bad[0][0]} of their values" if sparse else f"node {bad[0][0]}"
        raise ValueError(f"features are NaN or infinite, first in {where}: repair or drop them")
    return nodes if sparse else jnp.asarray(nodes)
