"""Layers on graphs are their formulas, and keep what the formulas promise: decay, stability, bounded rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graph_networks import (
    BUILDERS,
    CLASSES,
    DEPTH,
    EXACT,
    FEATURES,
    NODES,
    SEEDS,
    WIDTH,
    close,
    make,
    random_graph,
    runner,
    with_layers,
)

import qpde
from qpde import graphs
from qpde.models.graphs.layers import GraphSmoothing
from qpde.quantizers import ACTIVATION_CLIP


def test_a_diffusion_network_is_its_formula():
    model, variables = make(nonlinearity="tanh", kernel_init="orthogonal", step_size=0.3)
    graph, params = random_graph(), variables["params"]
    logits, states = model.apply(variables, graph, return_states=True)
    np.testing.assert_array_equal(logits, model.apply(variables, graph))
    x = np.maximum(graph.nodes @ params["stem_kernel"] + params["stem_bias"][None], 0)
    for j in range(DEPTH):
        k = params["layers"]["kernel"][j]
        x = x + 0.3 * graphs.divergence(graph, jnp.tanh(graphs.gradient(graph, x) @ k)) @ k.T
        close(states[j], x)
    close(logits, x @ params["head_kernel"] + params["head_bias"][None])
    assert len(states) == DEPTH


def test_wave_and_mixed_networks_are_their_formulas():
    graph = random_graph()
    for dynamics, mixing in (("wave", None), ("mixed", 0.7)):
        model, variables = make(dynamics=dynamics, symmetric=False, kernel_init="orthogonal", step_size=0.3)
        params = variables["params"]
        if mixing is not None:
            assert params["mixing"].shape == ()
            variables = {"params": {**params, "mixing": jnp.float32(mixing)}}
        share = 1.0 if mixing is None else float(jax.nn.sigmoid(mixing))
        _, states = model.apply(variables, graph, return_states=True)
        x = before = jax.nn.relu(graph.nodes @ params["stem_kernel"])
        for j in range(DEPTH):
            k, k2 = params["layers"]["kernel"][j], params["layers"]["kernel2"][j]
            f = graphs.laplacian(graph, x @ k) @ k2
            wave, diffusion = 2 * x - before - 0.3**2 * f, x - 0.3 * f
            x, before = share * wave + (1 - share) * diffusion, x
            close(states[j], x)


def test_published_relu_on_both_directions_is_linear():
    graph = random_graph()
    _, variables = make(nonlinearity="relu")
    rectified, linear = runner(nonlinearity="relu"), runner(nonlinearity="identity")
    close(rectified(variables, graph, EXACT)[0], linear(variables, graph, EXACT)[0])
    # Its unsigned halves have together the levels that one bit more would give to signed activations.
    unsigned = rectified(variables, graph, qpde.Bits(None, 4))[1][0]
    assert float(jnp.abs(unsigned - linear(variables, graph, qpde.Bits(None, 4))[1][0]).max()) > 1e-3


def normalized_adjacency(graph):
    """D^-1/2 (adjacency + I) D^-1/2."""
    adjacency = np.eye(NODES)
    adjacency[graph.senders, graph.receivers] = adjacency[graph.receivers, graph.senders] = 1
    root = np.diag(adjacency.sum(1) ** -0.5)
    return root @ adjacency @ root


@pytest.mark.parametrize("ends", [{}, {"stem": "graph"}, {"head": "graph"}])
def test_a_convolution_layer_is_that_of_kipf_and_welling(ends):
    graph = random_graph()
    _, variables = make("gcn")
    rng = np.random.default_rng(0)
    bias, stem_bias, head_bias = (
        jnp.asarray(rng.random(shape), jnp.float32) for shape in ((DEPTH, WIDTH), WIDTH, CLASSES)
    )
    variables = with_layers(variables, bias=bias)
    params = variables["params"] | {"stem_bias": stem_bias, "head_bias": head_bias}
    logits, states = runner("gcn", **ends)({"params": params}, graph, EXACT)

    spread, kernels = normalized_adjacency(graph), params["layers"]["kernel"]
    before, behind = (spread if end in ends else np.eye(NODES) for end in ("stem", "head"))
    start = np.maximum(before @ graph.nodes @ params["stem_kernel"] + stem_bias[None], 0)
    for state, kernel, b in zip(states, kernels, bias, strict=True):
        close(state, np.maximum(spread @ start @ kernel + b[None], 0))
        start = state
    close(logits, behind @ start @ params["head_kernel"] + head_bias[None])


def test_an_initial_residual_layer_is_that_of_gcnii():
    graph = random_graph()
    _, variables = make("gcnii", alpha=0.2, lambda_=1.5)
    _, states = runner("gcnii", alpha=0.2, lambda_=1.5)(variables, graph, EXACT)
    start = jax.nn.relu(graph.nodes @ variables["params"]["stem_kernel"])
    beta = np.log(1.5 / 3 + 1)
    y = 0.8 * (states[1] - graphs.laplacian(graph, states[1])) + 0.2 * start
    w = variables["params"]["layers"]["kernel"][2]
    close(states[2], jax.nn.relu((1 - beta) * y + beta * y @ w))


def test_an_attention_layer_is_that_of_gat():
    graph = random_graph()
    _, variables = make("gat", heads=2)
    _, states = runner("gat", heads=2)(variables, graph, EXACT)
    p = jax.tree.map(lambda leaf: np.asarray(leaf[1], np.float64), variables["params"]["layers"])
    y = np.asarray(states[0]) @ p["kernel"]
    neighbours = np.eye(NODES, dtype=bool)
    neighbours[graph.senders, graph.receivers] = neighbours[graph.receivers, graph.senders] = True
    out = np.zeros((NODES, WIDTH))
    for head in range(2):
        own = y[:, 4 * head : 4 * head + 4]
        score = (own @ p["attention_to"][head])[:, None] + (own @ p["attention_from"][head])[None]
        weight = np.where(neighbours, np.exp(np.where(score > 0, score, 0.2 * score)), 0)
        out[:, 4 * head : 4 * head + 4] = weight / weight.sum(1, keepdims=True) @ own
    close(states[1], np.where(out > 0, out, np.expm1(out)), 3e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_nodes_without_edges_learn_from_themselves_alone(name):
    """Isolated nodes beside others, and a graph without any edge."""
    model, variables = make(name, layers=1)
    graph = graphs.from_edges([0, 1], [1, 2], num_nodes=5, nodes=random_graph().nodes[:5])
    alone = graphs.from_edges([], [], num_nodes=5, nodes=graph.nodes)

    @jax.jit
    def logits_and_gradient(graph):
        gradient = jax.grad(lambda v: jnp.sum(jnp.square(model.apply(v, graph, bits=qpde.Bits(4, 4)))))(variables)
        return model.apply(variables, graph), gradient

    (some, first), (none, second) = logits_and_gradient(graph), logits_and_gradient(alone)
    close(some[3:], none[3:])
    assert np.abs(some[:3] - none[:3]).max() > 1e-3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((first, second)))


def test_nan_in_a_node_reaches_as_many_neighbours_as_there_are_layers():
    model, variables = make(nonlinearity="tanh", layers=2)
    features = jnp.asarray(random_graph().nodes[:6])
    path = graphs.from_edges(np.arange(5), np.arange(1, 6), num_nodes=6, nodes=features)
    broken = path._replace(nodes=features.at[0].set(jnp.nan))
    logits = jax.jit(model.apply, static_argnames="bits")(variables, broken, bits=qpde.Bits(4, 4))
    assert np.isnan(logits).any(axis=1).tolist() == [True, True, True, False, False, False]


@functools.cache
def hidden_layers(**options):
    """The hidden layers alone: the opening is the identity, its ReLU harmless for positive features."""
    model, variables = make(width=FEATURES, **options)
    variables = {"params": variables["params"] | {"stem_kernel": jnp.eye(FEATURES)}}

    @jax.jit
    def run(kernel, x, bits):
        graph = random_graph()._replace(nodes=x)
        return model.apply(with_layers(variables, kernel=kernel), graph, bits=bits, return_states=True)[1]

    return run


def random_kernels(seed, norm):
    """(DEPTH, FEATURES, FEATURES) with that spectral norm, and two positive node fields."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((DEPTH, FEATURES, FEATURES))
    kernel *= norm / np.linalg.norm(kernel, 2, axis=(1, 2), keepdims=True)
    x, y = np.float32(rng.random((2, NODES, FEATURES)) * 3)
    return np.float32(kernel), x, y


@given(seed=SEEDS, nonlinearity=st.sampled_from(["identity", "tanh", "huber"]))
def test_symmetric_diffusion_is_non_expansive_within_the_bound(seed, nonlinearity):
    h = 0.8
    run = hidden_layers(nonlinearity=nonlinearity, step_size=h)
    kernel, x, y = random_kernels(seed, norm=0.999 / h**0.5)  # h |K|^2 |G|^2 < 2 as |G|^2 < 2
    distances = [np.linalg.norm(np.float64(x) - y)]
    for a, b in zip(run(kernel, x, qpde.Bits()), run(kernel, y, qpde.Bits()), strict=True):
        distances.append(np.linalg.norm(np.float64(a) - np.float64(b)))
    assert (np.diff(distances) <= 1e-5 * distances[0]).all()


@given(seed=SEEDS)
def test_symmetric_diffusion_beyond_the_bound_expands(seed):
    kernel, x, y = random_kernels(seed, norm=3.0)
    run = hidden_layers(nonlinearity="identity", step_size=0.8)
    a, b = (run(kernel, v, qpde.Bits())[-1] for v in (x, y))
    assert np.linalg.norm(a - b) > 1.5 * np.linalg.norm(x - y)


@given(seed=SEEDS, norm=st.sampled_from([0.01, 1.0, 50.0]))
def test_automatic_step_is_non_expansive_for_every_matrix(seed, norm):
    run = hidden_layers(nonlinearity="tanh", step_size="auto")
    kernel, x, y = random_kernels(seed, norm)
    a, b = run(kernel, x, qpde.Bits()), run(kernel, y, qpde.Bits())
    distances = [np.linalg.norm(np.float64(v) - w) for v, w in [(x, y), *zip(a, b, strict=True)]]
    assert (np.diff(distances) <= 1e-5 * distances[0]).all()


@pytest.mark.parametrize("dynamics", ["wave", "mixed"])
def test_automatic_step_keeps_waves_bounded(dynamics):
    run = hidden_layers(dynamics=dynamics, step_size="auto", layers=64)
    kernel, x, _ = random_kernels(0, norm=20.0)
    states = run(np.tile(kernel[:1], (64, 1, 1)), x, qpde.Bits())
    assert max(np.linalg.norm(s) for s in states) < 10 * np.linalg.norm(x)


@given(seed=SEEDS, rounding=st.sampled_from(["branch", "state"]))
def test_rounding_error_is_bounded_by_what_the_layers_inject(seed, rounding):
    """Within h |K|^2 |G|^2 <= 2 errors add up and are never amplified."""
    h, bits = 0.8, 6
    run = hidden_layers(rounding=rounding, step_size=h)
    kernel, x, _ = random_kernels(seed, norm=0.999 / h**0.5)
    twin, rounded = (run(kernel, x, qpde.Bits(None, a))[-1] for a in (32.0, float(bits)))
    half_step = ACTIVATION_CLIP / (2 ** (bits - 1) - 1) / 2  # no value here reaches the clip's start
    nodes = np.sqrt(NODES * FEATURES) * half_step
    edges = np.sqrt(random_graph().senders.size * FEATURES) * half_step
    # h |K| |G| edges for what enters on the edges; the branch maps an error of its input by h |K|^2 |G|^2 < 2.
    injected = h * np.sqrt(2 / h) * edges + (2 * nodes if rounding == "branch" else nodes)
    assert np.linalg.norm(rounded - twin) <= DEPTH * injected


def test_energy_decays_with_depth():
    _, variables = make(layers=16, step_size=0.7)
    graph = random_graph()
    x = jax.nn.relu(graph.nodes @ variables["params"]["stem_kernel"])
    _, states = runner(layers=16, step_size=0.7)(variables, graph, EXACT)
    energies = np.array([graphs.dirichlet_energy(graph, s) for s in (x, *states)])
    assert (np.diff(energies) < 0).all()


def test_smoothing_lowers_the_total_variation_of_every_state():
    graph = random_graph()
    smoothing = GraphSmoothing(steps=2, gamma2=0.1, eps=0.1)
    _, variables = make(step_size=0.1)
    _, with_it = runner(smoothing=smoothing, step_size=0.1)(variables, graph, EXACT)
    _, without = runner(step_size=0.1)(variables, graph, EXACT)
    for a, b in zip(with_it, without, strict=True):
        assert graphs.total_variation(graph, a, eps=0.1) < graphs.total_variation(graph, b, eps=0.1)
