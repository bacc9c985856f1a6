"""Graph networks: what their layers promise, and what quantization, padding, loops and traced bits leave alone."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO

import qpde
from qpde import graphs
from qpde.models import calibrate_clips
from qpde.models.graphs import networks
from qpde.models.graphs.layers import GraphSmoothing
from qpde.quantizers import ACTIVATION_CLIP

NODES, FEATURES, WIDTH, CLASSES, DEPTH = 10, 6, 8, 3, 4
SEEDS = st.integers(0, 2**31 - 1)
BUILDERS = {name: getattr(networks, name) for name in ("pde_gcn", "gcn", "gcnii", "gat")}
SMALL = {"num_classes": CLASSES, "layers": DEPTH, "width": WIDTH, "loop": "scan"}  # one layer to compile, not four


def random_graph(seed=0, nodes=NODES, edges=20):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((nodes, FEATURES)).astype(np.float32)
    ends = rng.integers(0, nodes, (2, edges))
    return graphs.from_edges(*ends, num_nodes=nodes, nodes=features)


def make(name="pde_gcn", **options):
    model = BUILDERS[name](**SMALL | options)
    structure = {k: v for k, v in options.items() if k in STRUCTURE}
    return model, initial(name, **structure)


# The options that decide which parameters there are, and how they start.
STRUCTURE = ("layers", "width", "heads", "symmetric", "kernel_init", "dynamics")


@functools.cache
def initial(name, **structure):
    model = BUILDERS[name](**SMALL | structure)
    return jax.jit(model.init)(jax.random.key(0), random_graph())


TRACES = collections.Counter()


@functools.cache
def runner(name="pde_gcn", **options):
    """(variables, graph, bits) -> logits and states, compiled once for every width."""
    model, _ = make(name, **options)

    @jax.jit
    def run(variables, graph, bits):
        TRACES[name] += 1
        return model.apply(variables, graph, bits=bits, return_states=True)

    return run


EXACT = qpde.Bits()


def with_layers(variables, **changed):
    params = variables["params"]
    return {"params": {**params, "layers": {**params["layers"], **changed}}}


def calibrated(model, variables, graph, bits, method="absmax"):
    return calibrate_clips(model, variables, graph, method=method, bits=bits)


def close(a, b, tolerance=1e-5):
    # Sums in another order, through four layers.
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("name", BUILDERS)
def test_renaming_nodes_padding_and_batching_change_nothing(name):
    options = {"kernel_init": "orthogonal"} if name == "pde_gcn" else {}
    _, variables = make(name, **options)
    graph, other = random_graph(), random_graph(1, nodes=6, edges=9)
    rename = np.random.default_rng(0).permutation(NODES)
    moved = np.zeros_like(graph.nodes)
    moved[rename] = graph.nodes
    renamed = graphs.from_edges(rename[graph.senders], rename[graph.receivers], num_nodes=NODES, nodes=moved)

    def run(graph, bits):
        return runner(name, **options)(variables, graph, bits)[0]

    pad = functools.partial(jraph.pad_with_graphs, n_node=20, n_edge=40, n_graph=4)
    for bits in (qpde.Bits(32, 32), qpde.Bits(4, 8)):
        logits = run(graph, bits)
        # A sum in another order may flip single codes of rounded activations.
        tolerance = 1e-5 if bits.activations == 32 else 0.05 * np.abs(logits).max()
        close(run(pad(graph), bits)[:NODES], logits, tolerance)
        close(run(pad(renamed), bits)[rename], logits, tolerance)
        close(run(pad(jraph.batch([other, graph])), bits)[6 : 6 + NODES], logits, tolerance)


@pytest.mark.parametrize("block_size", [1, 7 * WIDTH, 100 * WIDTH])
def test_sparse_features_give_what_dense_ones_give(monkeypatch, block_size):
    monkeypatch.setattr(graphs, "BLOCK_SIZE", block_size)
    model, variables = make("gcn", layers=1)
    graph = random_graph()
    sparse = graph._replace(nodes=BCOO.fromdense(jnp.where(jnp.abs(graph.nodes) > 1, graph.nodes, 0.0)))
    dense = graph._replace(nodes=sparse.nodes.todense())

    @jax.jit
    def loss_and_gradient(variables, graph):
        return jax.value_and_grad(lambda variables: jnp.sum(jnp.square(model.apply(variables, graph))))(variables)

    results = [jax.tree.leaves(loss_and_gradient(variables, g)) for g in (sparse, dense)]
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("shape", [(1000, 33), (32_999,)])
@pytest.mark.parametrize("rate", [0.7, 0.01])
def test_dropout_drops_at_its_rate_and_keeps_the_expectation(shape, rate):
    y = np.asarray(networks._dropout(jax.random.key(0), rate, jnp.ones(shape))).ravel()
    deviation = (rate * (1 - rate) / y.size) ** 0.5
    assert abs(np.mean(y == 0) - rate) < 4 * deviation
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-4)
    first, second = (y == 0)[: y.size // 2], (y == 0)[-(y.size // 2) :]
    assert abs(np.mean(first & second) - rate**2) < 4 * deviation  # one random number decides on an entry of each


@pytest.mark.parametrize("name", BUILDERS)
def test_every_entry_between_two_layers_is_dropped_once(name):
    model, variables = make(name, layers=1, dropout=0.5)
    graph = random_graph()
    graph = graph._replace(nodes=BCOO.fromdense(graph.nodes))
    program = jax.make_jaxpr(lambda key: model.apply(variables, graph, train=True, rngs={"dropout": key}))
    # Features, input of the hidden layer, input of the closing one; of the features only the entries that are there.
    assert str(program(jax.random.key(0))).count("= random_bits") == 3
    assert f"u32[{graph.nodes.nse // 2}]" in str(program(jax.random.key(0)))


@functools.cache
def low_bit_gradient(name, **options):
    """Training loss and its gradient at 4 bits, from clips that some activations exceed."""
    model, variables = make(name, dropout=0.2, **options)
    clips = variables["params"]["layers"]["act_clips"]
    params = with_layers(variables, act_clips=jnp.full_like(clips, 0.7))["params"]

    def loss(params):
        key = {"dropout": jax.random.key(0)}
        logits = model.apply({"params": params}, random_graph(), bits=qpde.Bits(4, 4), train=True, rngs=key)
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    return jax.jit(jax.value_and_grad(loss))(params)


# The identity lies on the levels of its quantizer, where the clip has no gradient: hence another start.
MIXED = {"dynamics": "mixed", "symmetric": False, "nonlinearity": "tanh", "kernel_init": "orthogonal"}
STATE = {"dynamics": "wave", "rounding": "state", "nonlinearity": "relu", "gradient_kind": "gcn"}
SMOOTH = {"step_size": "auto", "nonlinearity": "huber", "smoothing": GraphSmoothing()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pde_gcn", MIXED),
        ("pde_gcn", STATE | {"kernel_init": "orthogonal"}),
        ("pde_gcn", SMOOTH | {"kernel_init": "orthogonal"}),
        ("gcn", {"stem": "graph", "head": "graph"}),
        ("gcnii", {}),
        ("gat", {}),
    ],
)
def test_every_parameter_learns_in_low_bits(name, options):
    _, gradient = low_bit_gradient(name, **options)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize(("name", "options"), [("pde_gcn", MIXED), ("gcn", {})])
def test_scan_unroll_and_remat_agree(name, options):
    scanned = low_bit_gradient(name, **options)
    unrolled = low_bit_gradient(name, loop="unroll", remat=True, **options)
    # Sums in another order; a rounding tie may flip single codes, hence not float32's full precision.
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(a).max() + 1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_changing_traced_bits_never_recompiles(name):
    options = {"kernel_init": "orthogonal"} if name == "pde_gcn" else {}
    graph, (_, variables), run = random_graph(), make(name, **options), runner(name, **options)
    run(variables, graph, qpde.Bits(4, 4))
    traces = TRACES[name]
    outputs = [run(variables, graph, qpde.Bits(*w))[0] for w in itertools.product((2, 4, 8), (5, 8, 32))]
    assert TRACES[name] == traces
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(outputs, 2))


def test_bits_are_the_models_or_the_calls_or_one_for_each_layer():
    graph, (model, variables) = random_graph(), make(kernel_init="orthogonal", weight_bits=8, act_bits=5)
    expected, _ = runner(kernel_init="orthogonal")(variables, graph, qpde.Bits(8, 5))
    close(model.apply(variables, graph), expected)
    close(model.apply(variables, graph, bits=qpde.Bits(jnp.full(DEPTH, 8), (5,) * DEPTH)), expected)
    assert float(jnp.abs(model.apply(variables, graph, bits=qpde.Bits(8, (5, 5, 5, 2))) - expected).max()) > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_high_precision_twin_clips_and_does_not_round(name):
    _, variables = make(name)
    graph, run = random_graph(), runner(name)
    # No value reaches the clips' start, so the twin is the exact network; a tight clip is felt.
    exact, twin = run(variables, graph, EXACT)[0], run(variables, graph, qpde.Bits(32, 32))[0]
    close(twin, exact)
    tight = with_layers(variables, act_clips=0.05 * variables["params"]["layers"]["act_clips"])
    assert float(jnp.abs(run(tight, graph, qpde.Bits(32, 32))[0] - exact).max()) > 1e-3


def test_calibration_reads_the_clips_off_the_graph_layer_after_layer():
    model, variables = make(kernel_init="orthogonal")
    graph = random_graph()
    layers = calibrated(model, variables, graph, qpde.Bits(8, 8))["params"]["layers"]
    _, states = runner(kernel_init="orthogonal")(with_layers(variables, **layers), graph, qpde.Bits(8, 8))
    inputs = [jax.nn.relu(graph.nodes @ variables["params"]["stem_kernel"]), *states[:-1]]
    close(layers["act_clips"][:, 0], [jnp.abs(x).max() for x in inputs])
    close(layers["weight_clips"][:, 0], jnp.abs(layers["kernel"]).max((1, 2)))
    # What is exact keeps its clips.
    only = calibrated(model, variables, graph, qpde.Bits(8, None))["params"]["layers"]
    close(only["act_clips"], variables["params"]["layers"]["act_clips"])


def test_the_identity_survives_its_quantizer():
    _, variables = make()
    layers = variables["params"]["layers"]
    np.testing.assert_array_equal(layers["kernel"], np.tile(np.eye(WIDTH)[None], (DEPTH, 1, 1)))
    exact, _ = runner()(variables, random_graph(), EXACT)
    for bits in (2, 4, 8):
        close(runner()(variables, random_graph(), qpde.Bits(bits, None))[0], exact)


def test_precise_state_is_more_faithful_than_a_rounded_one():
    graph = random_graph(3, nodes=40, edges=100)
    errors = {}
    for rounding in ("branch", "state"):
        _, variables = make(rounding=rounding, layers=32, step_size=0.1)
        variables = with_layers(variables, act_clips=jnp.full((32, 2), 2.0))
        run = runner(rounding=rounding, layers=32, step_size=0.1)
        rounded, twin = (run(variables, graph, qpde.Bits(None, a))[1][-1] for a in (4, 32))
        errors[rounding] = np.linalg.norm(rounded - twin)
    assert errors["branch"] < 0.7 * errors["state"]


def test_seeds_can_be_trained_side_by_side():
    model, _ = make()
    graph = random_graph()
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.jit(jax.vmap(lambda k: model.init(k, graph)))(keys)
    together = jax.jit(jax.vmap(lambda v: model.apply(v, graph)))(variables)
    for i in range(3):
        close(together[i], runner()(jax.tree.map(lambda leaf, i=i: leaf[i], variables), graph, EXACT)[0])


def test_dropout_is_off_outside_training_and_needs_a_key_in_it():
    model, variables = make(dropout=0.5)
    graph = random_graph()
    np.testing.assert_array_equal(model.apply(variables, graph), model.apply(variables, graph, train=False))
    with pytest.raises(Exception, match="dropout"):
        model.apply(variables, graph, train=True)
    certain, _ = make(dropout=0.0)
    close(certain.apply(variables, graph, train=True), model.apply(variables, graph))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pde_gcn", {"num_classes": 0}, "num_classes must be at least 1; got 0"),
        ("pde_gcn", {"layers": 0}, "layers must be at least 1"),
        ("pde_gcn", {"dynamics": "heat"}, "unknown dynamics 'heat'; valid: diffusion, wave, mixed"),
        ("pde_gcn", {"nonlinearity": "gelu"}, "valid: identity, tanh, huber, relu"),
        ("pde_gcn", {"gradient_kind": "mean"}, "valid: normalized, gcn"),
        ("pde_gcn", {"rounding": "none"}, "valid: branch, state"),
        ("pde_gcn", {"kernel_init": "zero"}, "valid: identity, orthogonal"),
        ("pde_gcn", {"levels": "log"}, "valid: uniform, pot, apot"),
        ("pde_gcn", {"loop": "while"}, "valid: auto, scan, unroll"),
        ("pde_gcn", {"step_size": 0.0}, "step_size must be a positive number"),
        ("pde_gcn", {"step_size": "large"}, "step_size must be a positive number"),
        ("pde_gcn", {"step_size": "auto", "symmetric": False}, "needs symmetric=True"),
        ("pde_gcn", {"smoothing": GraphSmoothing(gamma2=0.2, eps=0.1)}, "gamma2 within .0, 0.1."),
        ("pde_gcn", {"dropout": 1.0}, "dropout must be within"),
        ("pde_gcn", {"weight_bits": 1}, "weight_bits must be 2 to 32"),
        ("gcn", {"act_bits": 33}, "act_bits must be 2 to 32"),
        ("gcn", {"head": "scaled"}, "unknown head 'scaled'; valid: dense, graph"),
        ("gcnii", {"alpha": 1.5}, "alpha must be within"),
        ("gcnii", {"lambda_": 0.0}, "lambda_ must be positive"),
        ("gat", {"heads": 3}, "heads .=3. must divide width .=64."),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](**({"num_classes": 3} | options))


@pytest.mark.parametrize("nodes", [None, np.ones(NODES, np.float32), np.ones((NODES, FEATURES), np.int32)])
def test_features_of_a_wrong_form_are_refused(nodes):
    model, variables = make()
    with pytest.raises(ValueError, match="floating-point features"):
        model.apply(variables, random_graph()._replace(nodes=nodes))


def test_bits_of_a_wrong_length_are_refused():
    model, variables = make()
    with pytest.raises(ValueError, match="one for each of the 4 layers"):
        model.apply(variables, random_graph(), bits=qpde.Bits((4, 4), 4))
