"""Networks on graphs: `pde_gcn` and the baselines `gcn`, `gcnii` and `gat`, in one frame.

    stem dense, ReLU  ->  hidden layers, integrated step by step  ->  head dense

with dropout around the dense layers in training. Stem and head layers are exact, the weights and inputs of the
hidden ones are quantized (`qpde.models.graphs.layers` holds their formulas). So a baseline of depth L has L graph
convolutions between the two dense layers, as in GCNII. Kipf and Welling's GCN has no dense layers: `gcn` makes graph
convolutions of them with `stem="graph"` and `head="graph"`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from flax.core import unfreeze
from jax.experimental.sparse import BCOO

from qpde import graphs
from qpde.bits import Bits
from qpde.integrators import integrate
from qpde.models.graphs.layers import (
    DYNAMICS,
    KERNEL_INITS,
    NONLINEARITIES,
    ROUNDINGS,
    AttentionLayer,
    Call,
    ConvolutionLayer,
    GraphLayer,
    GraphSmoothing,
    InitialResidualLayer,
    PDELayer,
    propagate,
)
from qpde.models.layers import Observe
from qpde.quantizers import LEVEL_SETS

__all__ = ["GraphNetwork", "gat", "gcn", "gcnii", "pde_gcn"]

LOOPS = ("auto", "scan", "unroll")
ENDS = ("dense", "graph")

# The deepest network that "auto" unrolls. A scan compiles faster, but copies what the backward pass needs into stacks.
# Rematerialisation is there to save memory and has little to copy.
UNROLL_TO = 8


class GraphNetwork(nn.Module):
    """Node classifier; make one with `pde_gcn`, `gcn`, `gcnii` or `gat`, which document the attributes.

    Parameters of the hidden layers are stacked on a leading axis: `layers/kernel` (depth, width, width),
    `layers/weight_clips` (depth, kernels), `layers/act_clips` (depth, quantizers).
    """

    layer: GraphLayer
    depth: int
    num_classes: int
    dropout: float
    weight_bits: int | None
    act_bits: int | None
    loop: str
    remat: bool

    @property
    def bits(self) -> Bits:
        """The widths that the network was created with."""
        return Bits(self.weight_bits, self.act_bits)

    def with_quantizers(self, bits: Bits, *, per_channel: bool = False) -> GraphNetwork:
        """This network with quantizers of these widths, whose parameters keep their meaning; see `Network`'s."""
        layer = dataclasses.replace(self.layer, per_channel=per_channel)
        return self.clone(layer=layer).with_bits(bits)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(lowest, largest) of parameters that must stay in between, by path: none but the clips."""
        return {}

    def block_names(self, variables: Any = None, x: Any = None) -> list[str]:
        """Names of the hidden layers, in order."""
        del variables, x
        return [f"layer{i}" for i in range(self.depth)]

    def output_bias(self, variables: Any = None, x: Any = None) -> tuple[str, ...]:
        """Place in "params" of the bias that is added to the logits last."""
        del variables, x
        return ("head_bias",)

    def with_bits(self, bits: Bits) -> GraphNetwork:
        """This network with other bits of its own, whole numbers or None."""
        return self.clone(weight_bits=bits.weights, act_bits=bits.activations)

    @nn.compact
    def __call__(
        self,
        graph: jraph.GraphsTuple,
        *,
        train: bool = False,
        bits: Bits | None = None,
        return_states: bool = False,
        observe: Observe | None = None,
    ):
        """Logits of all nodes.

        Args:
          graph: each undirected edge once, as `qpde.graphs.from_edges` makes it; `nodes` holds features (nodes, F)
            float32, dense or a `jax.experimental.sparse.BCOO`, which is multiplied as it is. Padding and batching by
            jraph change nothing.
          train: dropout is on; needs rngs={"dropout": key} unless its rate is 0.
          bits: `qpde.Bits` for this call, scalars or one value for each layer, static or traced; None is the widths
            the network was created with.
          return_states: also return the hidden layers' outputs, in order.
          observe: sees what every quantizer rounds, chooses its clip for this call, and records anything, which is
            sown into the collection "observed" under "layers": lists of records in place of `weight_clips` and
            `act_clips`. See `qpde.models.layers.Observe`.
        Returns:
          logits (nodes, num_classes), or (logits, tuple of depth states (nodes, width)).
        Raises:
          ValueError: features of a wrong rank or type, per-layer bits of another length than the depth.
        """
        features = graph.nodes
        if not hasattr(features, "ndim") or features.ndim != 2 or not jnp.issubdtype(features.dtype, jnp.floating):
            found = f"{features.dtype} {features.shape}" if hasattr(features, "ndim") else type(features).__name__
            raise ValueError(f"graph.nodes must hold floating-point features (nodes, F); got {found}")
        bits = self._checked_bits(self.bits if bits is None else bits)

        scale = graphs.normalize(graph)
        spread = {"dense": None, "graph": partial(propagate, graph, scale=scale)}
        x = self._dense("stem", self._dropout(features, train), self.layer.width, spread[self.layer.stem])
        x = jax.nn.relu(x)
        if not self.layer.drops_inputs:
            x = self._dropout(x, train)
        x, states = self._hidden(graph._replace(nodes=x), scale, bits, train, return_states, observe)
        logits = self._dense("head", self._dropout(x, train), self.num_classes, spread[self.layer.head])
        return (logits, states) if return_states else logits

    def _hidden(self, graph, scale, bits, train, return_states, observe):
        layer, depth = self.layer, self.depth
        params = self.param("layers", lambda key: jax.vmap(layer.init)(jax.random.split(key, depth)))
        params = unfreeze(params)
        shared = {name: self.param(name, nn.initializers.zeros, ()) for name in layer.shared_params}
        call = Call(graph, scale, graph.nodes, observe, shared)
        keys = impl = None
        if train and self.dropout and layer.drops_inputs:
            keys = jax.random.split(self.make_rng("dropout"), depth)
            keys, impl = jax.random.key_data(keys), jax.random.key_impl(keys)
        # Widths given per layer travel with the stacked parameters; common ones stay outside the loop.
        own_bits = Bits(*(None if v is None or jnp.ndim(v) == 0 else v for v in bits))

        def step(state, stacked, step_size):
            params, own, key = stacked
            widths = Bits(*(common if v is None else v for v, common in zip(own, bits, strict=True)))
            drop = None if key is None else partial(_dropout, jax.random.wrap_key_data(key, impl=impl), self.dropout)
            state, observed = layer(state, params, step_size, widths, drop, call)
            return state, (observed, layer.output(state) if return_states else None)

        loop = self.loop
        if loop == "auto":
            loop = "unroll" if depth <= UNROLL_TO and not self.remat else "scan"
        state, (observed, states) = integrate(
            step,
            (params, own_bits, keys),
            layer.start(graph.nodes),
            step_size=layer.step_size(depth),
            loop=loop,
            remat=self.remat,
            has_aux=True,
        )
        if observed:
            self.sow("observed", "layers", observed, reduce_fn=lambda _, new: new)
        return layer.output(state), tuple(states) if return_states else ()

    def _dense(self, name: str, x: Any, width: int, then: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """x W + b, for a dense or sparse x; or then(x W) + b."""
        kernel = self.param(f"{name}_kernel", nn.initializers.glorot_uniform(), (x.shape[-1], width))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (width,))
        product = _sparse_product(x, kernel) if isinstance(x, BCOO) else x @ kernel
        return (product if then is None else then(product)) + bias[None]

    def _dropout(self, x: Any, train: bool) -> Any:
        if not (train and self.dropout):
            return x
        key = self.make_rng("dropout")
        if isinstance(x, BCOO):  # what is absent stays absent
            return BCOO(
                (_dropout(key, self.dropout, x.data), x.indices),
                shape=x.shape,
                indices_sorted=x.indices_sorted,
                unique_indices=x.unique_indices,
            )
        return _dropout(key, self.dropout, x)

    def _checked_bits(self, bits):
        # A whole number as float32: what a flux closes over must be floating point.
        values = [v if v is None or isinstance(v, int | float) else jnp.asarray(v, jnp.float32) for v in bits]
        for field, value in zip(Bits._fields, values, strict=True):
            if value is not None and jnp.ndim(value) > 0 and jnp.shape(value) != (self.depth,):
                raise ValueError(
                    f"bits.{field} has shape {jnp.shape(value)}; give one value, or one for each of the "
                    f"{self.depth} layers"
                )
        return Bits(*values)


def pde_gcn(
    *,
    num_classes: int,
    layers: int = 8,
    width: int = 64,
    dynamics: str = "diffusion",
    symmetric: bool = True,
    nonlinearity: str = "identity",
    step_size: float | str = 0.7,
    gradient_kind: str = "normalized",
    rounding: str = "branch",
    kernel_init: str = "identity",
    dropout: float = 0.7,
    smoothing: GraphSmoothing | None = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    levels: str = "uniform",
    loop: str = "auto",
    remat: bool = False,
) -> GraphNetwork:
    """A graph network whose layers are steps of a differential equation on the graph.

    Diffusion, symmetric: x - h G^T s(G x K) K^T, a gradient step on a convex energy. It never amplifies a difference,
    of rounding for instance, while h |K|^2 <= 1 ("normalized") or 2 ("gcn").

    Args:
      num_classes: at least 1.
      layers: depth, at least 1.
      width: Width of the hidden fields.
      dynamics: "diffusion" x' = x - h f(x); "wave" x' = 2x - x_before - h^2 f(x); "mixed", a learned mean of both.
      symmetric: K^T, instead of a second matrix, after the nonlinearity.
      nonlinearity: on edges: "identity", "tanh", "huber" (the clip to [-1, 1]) or "relu". All are odd, so the
        orientation of an edge does not matter. "relu" is the published form, with both directions of each edge listed:
        relu(z) - relu(-z) = z, the identity with unsigned activations.
      step_size: h > 0, or "auto": h |K|^2 |G|^2 = 1.9 in each layer, for symmetric networks; |K| of the quantized
        matrix by power iteration, which approaches it from below.
      gradient_kind: "normalized" (|G|^2 <= 2) or "gcn" (<= 1, as published), see `qpde.graphs.gradient`.
      rounding: "branch": the state is kept exact and rounded where it enters f; "state": it is rounded itself, as
        published, and the error grows with depth. The edges' activations are rounded in either case.
      kernel_init: Start of K: "identity" or "orthogonal" (random).
      dropout: rate, 0 <= rate < 1, before and after the stem and before the head layer; none on edges.
      smoothing: total variation, or None.
      weight_bits: Default bits of the hidden layers' matrices, 2 to 32, or None for exact; `model.apply(..., bits=)`
        overrides them call by call.
      act_bits: Default bits of the activations, likewise.
      levels: Level set of the quantizers: "uniform", "pot" or "apot".
      loop: over the layers: "scan" (compiles fast), "unroll", or "auto", which scans more than 8 layers.
      remat: recompute each layer in the backward pass instead of keeping its intermediates.
    Returns:
      Module with `init(key, graph)` and `apply(variables, graph, ...)`, see `GraphNetwork`.
    Raises:
      ValueError: an unknown option, a number out of range, "auto" for a plain network.
    """
    for option, value, valid in (
        ("dynamics", dynamics, DYNAMICS),
        ("nonlinearity", nonlinearity, NONLINEARITIES),
        ("gradient_kind", gradient_kind, graphs.GRADIENTS),
        ("rounding", rounding, ROUNDINGS),
        ("kernel_init", kernel_init, KERNEL_INITS),
    ):
        _check_known(option, value, valid)
    if step_size == "auto":
        if not symmetric:
            raise ValueError(
                "step_size='auto' needs symmetric=True: with two matrices f is no gradient, and no step size makes the "
                "step non-expansive"
            )
    elif isinstance(step_size, str) or not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size must be a positive number or 'auto'; got {step_size!r}")
    if smoothing is not None:
        _check_smoothing(smoothing, gradient_kind)
    layer = PDELayer(
        width=width,
        levels=levels,
        dynamics=dynamics,
        symmetric=symmetric,
        nonlinearity=nonlinearity,
        h=step_size,
        kind=gradient_kind,
        rounding=rounding,
        kernel_init=kernel_init,
        smoothing=smoothing,
    )
    return _network(layer, layers, num_classes, dropout, weight_bits, act_bits, loop, remat)


def gcn(
    *,
    num_classes: int,
    layers: int = 2,
    width: int = 64,
    dropout: float = 0.5,
    stem: str = "dense",
    head: str = "dense",
    weight_bits: int | None = None,
    act_bits: int | None = None,
    levels: str = "uniform",
    loop: str = "auto",
    remat: bool = False,
) -> GraphNetwork:
    """Graph convolutions relu(A x W + b) (Kipf and Welling, 2017) in the frame of this module.

    Activations are unsigned.

    Args:
      num_classes: Number of classes, at least 1.
      layers: Depth, at least 1.
      width: Channels of the hidden fields.
      dropout: Rate, 0 <= rate < 1, on every layer's input and before the head.
      stem: What makes the first layer's x of the features: "dense", relu(x W + b), or "graph", relu(A x W + b).
      head: What makes logits of the last layer's x: "dense", x W + b, or "graph", A x W + b.
      weight_bits: Default bits of the hidden layers' matrices, 2 to 32, or None for exact; `model.apply(..., bits=)`
        overrides them call by call.
      act_bits: Default bits of the activations, likewise.
      levels: Levels of the quantizers: "uniform", "pot" or "apot".
      loop: How the layers run: "scan" (compiles fast), "unroll", or "auto", which scans more than 8 layers.
      remat: Recompute each layer in the backward pass instead of keeping its intermediates.
    Returns:
      Module with `init(key, graph)` and `apply(variables, graph, ...)`, see `GraphNetwork`.
    Raises:
      ValueError: An unknown option, or a number out of range.
    """
    _check_known("stem", stem, ENDS)
    _check_known("head", head, ENDS)
    layer = ConvolutionLayer(width=width, levels=levels, stem=stem, head=head)
    return _network(layer, layers, num_classes, dropout, weight_bits, act_bits, loop, remat)


def gcnii(
    *,
    num_classes: int,
    layers: int = 64,
    width: int = 64,
    alpha: float = 0.1,
    lambda_: float = 0.5,
    dropout: float = 0.6,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    levels: str = "uniform",
    loop: str = "auto",
    remat: bool = False,
) -> GraphNetwork:
    """GCNII (Chen et al., ICML 2020): convolutions with initial residual and identity mapping.

    Args:
      num_classes: Number of classes, at least 1.
      layers: Depth, at least 1.
      width: Channels of the hidden fields.
      alpha: Share of the stem layer's output in every layer, within [0, 1].
      lambda_: lambda > 0; layer l weighs its matrix by log(lambda / l + 1).
      dropout: Rate, 0 <= rate < 1, on every layer's input and before the head.
      weight_bits: Default bits of the hidden layers' matrices, 2 to 32, or None for exact; `model.apply(..., bits=)`
        overrides them call by call.
      act_bits: Default bits of the activations, likewise.
      levels: Levels of the quantizers: "uniform", "pot" or "apot".
      loop: How the layers run: "scan" (compiles fast), "unroll", or "auto", which scans more than 8 layers.
      remat: Recompute each layer in the backward pass instead of keeping its intermediates.
    Returns:
      Module with `init(key, graph)` and `apply(variables, graph, ...)`, see `GraphNetwork`.
    Raises:
      ValueError: An unknown option, or a number out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within [0, 1]; got {alpha}")
    if not (lambda_ > 0 and math.isfinite(lambda_)):
        raise ValueError(f"lambda_ must be positive and finite; got {lambda_}")
    layer = InitialResidualLayer(width=width, levels=levels, alpha=alpha, lambda_=lambda_)
    return _network(layer, layers, num_classes, dropout, weight_bits, act_bits, loop, remat)


def gat(
    *,
    num_classes: int,
    layers: int = 2,
    width: int = 64,
    heads: int = 8,
    dropout: float = 0.6,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    levels: str = "uniform",
    loop: str = "auto",
    remat: bool = False,
) -> GraphNetwork:
    """Graph attention (Velickovic et al., 2018), without dropout on the attention weights, which are exact.

    Activations are signed.

    Args:
      num_classes: Number of classes, at least 1.
      layers: Depth, at least 1.
      width: Channels of the hidden fields.
      heads: Heads of the attention, a divisor of `width`.
      dropout: Rate, 0 <= rate < 1, on every layer's input and before the head.
      weight_bits: Default bits of the hidden layers' matrices, 2 to 32, or None for exact; `model.apply(..., bits=)`
        overrides them call by call.
      act_bits: Default bits of the activations, likewise.
      levels: Levels of the quantizers: "uniform", "pot" or "apot".
      loop: How the layers run: "scan" (compiles fast), "unroll", or "auto", which scans more than 8 layers.
      remat: Recompute each layer in the backward pass instead of keeping its intermediates.
    Returns:
      Module with `init(key, graph)` and `apply(variables, graph, ...)`, see `GraphNetwork`.
    Raises:
      ValueError: An unknown option, or a number out of range.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"heads (={heads}) must divide width (={width})")
    layer = AttentionLayer(width=width, levels=levels, heads=heads)
    return _network(layer, layers, num_classes, dropout, weight_bits, act_bits, loop, remat)


def _network(layer, layers, num_classes, dropout, weight_bits, act_bits, loop, remat):
    for option, value in (("num_classes", num_classes), ("layers", layers), ("width", layer.width)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1; got {value}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be within [0, 1); got {dropout}")
    for option, value in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        if value is not None and not 2 <= value <= 32:
            raise ValueError(f"{option} must be 2 to 32, or None for full precision; got {value}")
    _check_known("levels", layer.levels, LEVEL_SETS)
    _check_known("loop", loop, LOOPS)
    return GraphNetwork(
        layer=layer,
        depth=layers,
        num_classes=num_classes,
        dropout=dropout,
        weight_bits=weight_bits,
        act_bits=act_bits,
        loop=loop,
        remat=remat,
    )


def _check_known(option, value, valid):
    if value not in valid:
        raise ValueError(f"unknown {option} {value!r}; valid: {', '.join(valid)}")


def _check_smoothing(smoothing, kind):
    bound = 2 * smoothing.eps / graphs.GRADIENTS[kind]
    if smoothing.steps < 1 or not (smoothing.eps > 0 and 0 <= smoothing.gamma2 <= bound):
        raise ValueError(
            f"smoothing needs steps >= 1, eps > 0 and gamma2 within [0, {bound:g}] for gradient_kind={kind!r}; "
            f"got {smoothing}"
        )


def _dropout(key: jax.Array, rate: float, x: jax.Array) -> jax.Array:
    """Zeroes entries with that probability and scales the others so that the expectation stays.

    Sixteen random bits decide on an entry, half of what is usual: drawing them is most of the work.
    """
    values = 2**16
    dropped = min(round(rate * values), values - 1)
    words = jax.random.bits(key, (-(-x.shape[0] // 2), *x.shape[1:]))
    bits = jnp.concatenate([words >> 16, words & 0xFFFF])[: x.shape[0]]
    return jnp.where(bits >= dropped, x * (values / (values - dropped)), 0.0)


def _sparse_product(x: BCOO, kernel: jax.Array) -> jax.Array:
    """x @ kernel in blocks of entries, so that the row of the kernel that each entry asks for stays in the cache.

    The product that comes with BCOO first collects the rows for all entries, more than a cache holds.
    """

    def add(total, block):
        row, column, value = block
        rows = kernel.at[column].get(mode="promise_in_bounds") * value[:, None]
        return total.at[row].add(rows, mode="promise_in_bounds")

    zeros = jnp.zeros((x.shape[0], kernel.shape[1]), kernel.dtype)
    return graphs.fold_blocks(add, zeros, (*x.indices.T, x.data), channels=kernel.shape[1])
