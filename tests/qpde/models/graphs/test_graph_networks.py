"""Graph networks: what padding, sparse features, loops, dropout and traced bits leave alone, and what they refuse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from jax.experimental.sparse import BCOO
from small_graph_networks import (
    BUILDERS,
    DEPTH,
    EXACT,
    FEATURES,
    NODES,
    TRACES,
    WIDTH,
    calibrated,
    close,
    make,
    random_graph,
    runner,
    with_layers,
)

import qpde
from qpde import graphs
from qpde.models.graphs import networks
from qpde.models.graphs.layers import GraphSmoothing


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
