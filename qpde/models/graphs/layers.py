"""Hidden layers of graph networks as pure functions: one step of a differential equation each, and the baselines.

A layer is a frozen description. `init` makes its parameters, and calling it takes one step with a node field x
(nodes, width); row vectors, so a matrix K on the channels stands on the right. With the gradient G of `qpde.graphs`,
quantizers Q and an odd s:

    diffusion   x' = x - h f(x),                  f(x) = G^T Q_2(s(G Q_1(x) K)) K^T,  or K2 instead of K^T (plain)
    wave        x' = 2 x - x_before - h^2 f(x)
    mixed       x' = a wave + (1 - a) diffusion   with one learned a in (0, 1)

(Eliasof, Haber and Treister, PDE-GCN, 2021). K commutes with G and is applied to nodes, of which there are fewer than
edges. Weights are rounded as they are: standardising K, which starts at the identity, would take the identity away.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph

from qpde import graphs, quantizers
from qpde.bits import Bits
from qpde.integrators import euler, leapfrog
from qpde.models.layers import Observe, Quantizer
from qpde.norms import spectral_norm

__all__ = [
    "DYNAMICS",
    "KERNEL_INITS",
    "NONLINEARITIES",
    "ROUNDINGS",
    "AttentionLayer",
    "Call",
    "ConvolutionLayer",
    "GraphLayer",
    "GraphSmoothing",
    "InitialResidualLayer",
    "PDELayer",
]

DYNAMICS = ("diffusion", "wave", "mixed")
ROUNDINGS = ("branch", "state")
KERNEL_INITS = ("identity", "orthogonal")
LIPSCHITZ_TARGET = 1.9  # of h |K|^2 |G|^2; the diffusion step is non-expansive up to 2


def _identity(z: jax.Array) -> jax.Array:
    return z


# "relu" is the published form, which lists every edge in both directions: the two rectified halves z and -z enter G^T
# with opposite signs, and relu(z) - relu(-z) = z. What is left of it is that its activations are unsigned.
NONLINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": _identity,
    "tanh": jnp.tanh,
    "huber": lambda z: jnp.clip(z, -1.0, 1.0),
    "relu": _identity,
}


@dataclasses.dataclass(frozen=True)
class GraphSmoothing:
    """Total-variation smoothing of the state after each layer, so before the next one's quantizer.

    Attributes:
      steps: explicit steps a layer.
      gamma2: their size, at most `eps` ("normalized") or 2 `eps` ("gcn").
      eps: Width of the energy, see `qpde.graphs.tv_step`.
    """

    steps: int = 1
    gamma2: float = 0.01
    eps: float = 0.1


class Call(NamedTuple):
    """What one call of a network gives to every layer.

    Attributes:
      graph: its edges.
      scale: `qpde.graphs.normalize` of it.
      start: output of the stem.
      observe: sees what every quantizer rounds, or None.
      shared: parameters that all layers share.
    """

    graph: jraph.GraphsTuple
    scale: jax.Array
    start: jax.Array
    observe: Observe | None
    shared: dict


@dataclasses.dataclass(frozen=True)
class GraphLayer(abc.ABC):
    """What all layers share: their quantizers and the form of their parameters.

    Attributes:
      width: channels, in and out.
      levels: Level set of the quantizers.
      per_channel: a clip for each output channel of a kernel, instead of one for the kernel.
    """

    width: int
    levels: str = "uniform"
    per_channel: bool = False

    act_count = 1  # quantizers of activations
    drops_inputs = True  # whether training drops entries of every layer's input
    stem = "dense"
    head = "dense"

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """The kernels of a layer, in the order of their clips."""
        return ("kernel",)

    @property
    def shared_params(self) -> tuple[str, ...]:
        """Scalars, starting at 0, that all layers share."""
        return ()

    def init(self, key: jax.Array) -> dict:
        """Parameters of one layer: kernels, and clips, a weight's being the largest magnitude of its kernel."""
        keys = jax.random.split(key, len(self.kernel_names))
        params = {name: self.initial_kernel(k) for name, k in zip(self.kernel_names, keys, strict=True)}
        options: dict[str, Any] = {"signed": True, "method": "absmax", "per_channel": self.per_channel}
        clips = [quantizers.initial_clip(k, None, **options).reshape(-1) for k in params.values()]
        return (
            params
            | self.more_params(key)
            | {
                "weight_clips": jnp.concatenate(clips),
                "act_clips": jnp.full(self.act_count, quantizers.ACTIVATION_CLIP),
            }
        )

    def initial_kernel(self, key: jax.Array) -> jax.Array:
        """(width, width), Glorot's uniform start."""
        limit = math.sqrt(3 / self.width)
        return jax.random.uniform(key, (self.width, self.width), minval=-limit, maxval=limit)

    def more_params(self, key: jax.Array) -> dict:
        """Parameters that are not quantized."""
        del key
        return {"bias": jnp.zeros(self.width)}

    def step_size(self, depth: int) -> Any:
        """What `integrate` hands to the layers: a scalar, or one value for each."""
        del depth
        return 1.0

    def start(self, x: jax.Array) -> Any:
        """State of the integration from the stem's output."""
        return x

    def output(self, state: Any) -> jax.Array:
        """The node field of a state."""
        return state

    @abc.abstractmethod
    def step(self, state: Any, step_size: Any, q: _Quantized, call: Call) -> Any:
        """The layer's formula."""

    def __call__(
        self, state: Any, params: dict, step_size: Any, bits: Bits, dropout: Callable | None, call: Call
    ) -> tuple[Any, dict]:
        """One layer.

        Args:
          state: State of `start`.
          params: Parameters of one layer.
          step_size: scalar.
          bits: scalars or None.
          dropout: applied to the layer's input, or None.
          call: what all layers share.
        Returns:
          The next state, and what was observed: {"weight_clips", "act_clips"} if the call observes, else {}.
        """
        q = _Quantized(self, params, bits, call.observe, dropout or (lambda x: x))
        return self.step(state, step_size, q, call), q.observed


@dataclasses.dataclass(frozen=True)
class PDELayer(GraphLayer):
    """A step of diffusion, of the wave equation, or of both. See `pde_gcn` for the attributes."""

    dynamics: str = "diffusion"
    symmetric: bool = True
    nonlinearity: str = "identity"
    h: float | str = 0.7
    kind: str = "normalized"
    rounding: str = "branch"
    kernel_init: str = "identity"
    smoothing: GraphSmoothing | None = None

    act_count = 2  # nodes, edges
    drops_inputs = False

    @property
    def kernel_names(self):
        return ("kernel",) if self.symmetric else ("kernel", "kernel2")

    @property
    def shared_params(self):
        return ("mixing",) if self.dynamics == "mixed" else ()

    def initial_kernel(self, key):
        if self.kernel_init == "identity":
            return jnp.eye(self.width)
        return jax.nn.initializers.orthogonal()(key, (self.width, self.width))

    def more_params(self, key):
        return {}

    def step_size(self, depth):
        return 1.0 if self.h == "auto" else self.h

    def start(self, x):
        return x if self.dynamics == "diffusion" else (x, x)

    def output(self, state):
        return state if self.dynamics == "diffusion" else state[0]

    def step(self, state, step_size, q, call):
        kernel = q.kernel("kernel")
        adjoint = kernel.T if self.symmetric else q.kernel("kernel2")
        if self.h == "auto":
            step_size = self._stable_step(kernel)
        nodes_clip = q.act_clip(self.output(state), 0, signed=True)

        def rounded(x):
            return q.activation(x, 0, signed=True, clip=nodes_clip)

        if self.rounding == "state":
            state = jax.tree.map(rounded, state)

        is_linear = NONLINEARITIES[self.nonlinearity] is _identity and q.bits.activations is None
        is_linear &= call.observe is None  # who observes sees the edges too

        def f(x, _):
            x = x if self.rounding == "state" else rounded(x)
            if is_linear:  # G^T (G x K) K^T, in any order
                return graphs.laplacian(call.graph, x, kind=self.kind, scale=call.scale) @ (kernel @ adjoint)
            x = x @ kernel
            flux = self._flux(x, q, call)
            return graphs.nonlinear_laplacian(call.graph, x, flux, kind=self.kind, scale=call.scale) @ adjoint

        if self.dynamics == "diffusion":
            return self._smooth(euler(f, state, None, step_size), call)
        if self.dynamics == "wave":
            after, before = leapfrog(f, state, None, step_size)
        else:
            a = jax.nn.sigmoid(call.shared["mixing"])
            x, before = state
            weight = a * step_size * step_size + (1 - a) * step_size
            after, before = x + a * (x - before) - weight * f(x, None), x
        return self._smooth(after, call), before

    def _flux(self, x, q, call):
        """Q_2(s(.)), a function of values on any edges."""
        s, signed = NONLINEARITIES[self.nonlinearity], self.nonlinearity != "relu"
        edges = None
        if call.observe is not None:  # only then is the whole field G x needed
            edges = jnp.abs(s(graphs.gradient(call.graph, x, kind=self.kind, scale=call.scale)))
        clip = q.act_clip(edges, 1, signed=signed)

        def rounded(z):
            return q.activation(z, 1, signed=signed, clip=clip)

        if signed:
            return lambda z: rounded(s(z))
        return lambda z: rounded(jax.nn.relu(z)) - rounded(jax.nn.relu(-z))

    def _stable_step(self, kernel):
        norm = spectral_norm(lambda v: v @ kernel, (self.width,), key=jax.random.key(0))
        # A zero kernel has no bound; the floor keeps the step finite.
        h = LIPSCHITZ_TARGET / (jnp.maximum(jnp.square(norm), 1e-6) * graphs.GRADIENTS[self.kind])
        # The wave is stable for h^2 |K|^2 |G|^2 < 4, the mixture within both bounds.
        return {"diffusion": h, "wave": jnp.sqrt(h), "mixed": jnp.minimum(h, jnp.sqrt(h))}[self.dynamics]

    def _smooth(self, x, call):
        if self.smoothing is None:
            return x
        s = self.smoothing
        for _ in range(s.steps):
            x = graphs.tv_step(call.graph, x, gamma2=s.gamma2, eps=s.eps, kind=self.kind, scale=call.scale)
        return x


@dataclasses.dataclass(frozen=True)
class ConvolutionLayer(GraphLayer):
    """relu(A Q(x) W + b), A = D^-1/2 (adjacency + I) D^-1/2 (Kipf and Welling, 2017).

    Attributes:
      stem: "dense", relu(x W + b) before these layers, or "graph", relu(A x W + b).
      head: "dense", x W + b behind them, or "graph", A x W + b.
    """

    stem: str = "dense"
    head: str = "dense"

    def step(self, state, step_size, q, call):
        x = q.activation(q.dropout(state), 0)
        return jax.nn.relu(propagate(call.graph, x @ q.kernel("kernel"), call.scale) + q.params["bias"][None])


@dataclasses.dataclass(frozen=True)
class InitialResidualLayer(GraphLayer):
    """relu((1 - beta_l) y + beta_l Q(y) W), y = (1 - alpha) A Q(x) + alpha x_0, beta_l = log(lambda_ / l + 1).

    GCNII (Chen et al., Simple and Deep Graph Convolutional Networks, ICML 2020).

    Attributes:
      alpha: share of the stem's output x_0.
      lambda_: lambda, of the weights.
    """

    alpha: float = 0.1
    lambda_: float = 0.5

    act_count = 2

    def more_params(self, key):
        return {}

    def step_size(self, depth):
        return jnp.log(self.lambda_ / jnp.arange(1, depth + 1, dtype=jnp.float32) + 1)

    def step(self, state, step_size, q, call):
        x = q.activation(q.dropout(state), 0)
        y = (1 - self.alpha) * propagate(call.graph, x, call.scale) + self.alpha * call.start
        return jax.nn.relu((1 - step_size) * y + step_size * (q.activation(y, 1) @ q.kernel("kernel")))


@dataclasses.dataclass(frozen=True)
class AttentionLayer(GraphLayer):
    """elu(sum_j softmax_j(leaky_relu(a . y_i + b . y_j)) y_j + bias), y = Q(x) W, j over i and its neighbours.

    GAT (Velickovic et al., 2018), every head with its own a, b and share of the channels; leaky with slope 0.2.
    """

    heads: int = 8

    def more_params(self, key):
        shape = (self.heads, self.width // self.heads)
        glorot = jax.nn.initializers.glorot_uniform()
        a, b = (glorot(k, shape) for k in jax.random.split(jax.random.fold_in(key, 1)))
        return {"attention_to": a, "attention_from": b, "bias": jnp.zeros(self.width)}

    def step(self, state, step_size, q, call):
        x = q.activation(q.dropout(state), 0, signed=True)
        nodes = x.shape[0]
        y = (x @ q.kernel("kernel")).reshape(nodes, self.heads, -1)
        to = jnp.sum(y * q.params["attention_to"][None], axis=-1)
        source = jnp.sum(y * q.params["attention_from"][None], axis=-1)
        # Both directions of every edge, and every node itself.
        loops = jnp.arange(nodes, dtype=call.graph.senders.dtype)
        i = jnp.concatenate([call.graph.receivers, call.graph.senders, loops])
        j = jnp.concatenate([call.graph.senders, call.graph.receivers, loops])
        score = jax.nn.leaky_relu(to[i] + source[j], 0.2)
        largest = jax.lax.stop_gradient(jax.ops.segment_max(score, i, nodes))
        weight = jnp.exp(score - largest[i])
        total = jax.ops.segment_sum(weight, i, nodes)
        mean = jax.ops.segment_sum(weight[..., None] * y[j], i, nodes) / total[..., None]
        return jax.nn.elu(mean.reshape(nodes, self.width) + q.params["bias"][None])


class _Quantized:
    """What the formula of one layer calls by name, and the record of what was observed."""

    def __init__(self, layer: GraphLayer, params: dict, bits: Bits, observe: Observe | None, dropout: Callable):
        self.layer, self.params, self.bits, self.dropout = layer, params, bits, dropout
        self.observe = observe
        weight_clips = params["weight_clips"].reshape(len(layer.kernel_names), -1)
        self.clips = {
            "weight_clips": list(weight_clips if layer.per_channel else weight_clips[:, 0]),
            "act_clips": list(params["act_clips"]),
        }
        self.observed = {}
        if observe is not None:
            self.observed = {name: [None] * len(clips) for name, clips in self.clips.items()}

    def kernel(self, name: str) -> jax.Array:
        """Q_w of a kernel."""
        index = self.layer.kernel_names.index(name)
        kernel, bits = self.params[name], self.bits.weights
        clip = self._clip("weight_clips", index, kernel, bits, signed=True)
        return quantizers.quantize_weight(kernel, clip, bits, levels=self.layer.levels)

    def act_clip(self, x: jax.Array | None, index: int, *, signed: bool) -> jax.Array:
        """The clip of that index, chosen by who observes x when the call is observed."""
        return self._clip("act_clips", index, x, self.bits.activations, signed=signed)

    def activation(self, x: jax.Array, index: int, *, signed: bool = False, clip: jax.Array | None = None) -> jax.Array:
        """Q_a of that index."""
        clip = self.act_clip(x, index, signed=signed) if clip is None else clip
        return quantizers.quantize_activation(x, clip, self.bits.activations, levels=self.layer.levels, signed=signed)

    def _clip(self, name, index, x, bits, *, signed):
        if self.observe is not None:
            quantizer = Quantizer(name == "weight_clips", bits, signed, self.layer.levels)
            self.observed[name][index], self.clips[name][index] = self.observe(x, self.clips[name][index], quantizer)
        return self.clips[name][index]


def propagate(graph: jraph.GraphsTuple, x: jax.Array, scale: jax.Array) -> jax.Array:
    """A x, A the normalised adjacency with self-loops, which is I minus the normalised Laplacian.

    Args:
      graph: Its edges.
      x: (nodes, C).
      scale: `qpde.graphs.normalize` of the graph.
    """
    return x - graphs.laplacian(graph, x, scale=scale)
