"""Graph operators against dense matrices in NumPy, and the properties that networks rely on."""

import functools
from inspect import unwrap

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.experimental.sparse import BCOO
from jax.test_util import check_grads

from qpde import graphs

NODES, EDGES, CHANNELS = 9, 14, 3
SEEDS = st.integers(0, 2**31 - 1)
KINDS = st.sampled_from(sorted(graphs.GRADIENTS))
SCALES = st.sampled_from([1e-3, 1.0, 1e3])
KIND_LIST = sorted(graphs.GRADIENTS)


def random_edges(seed, nodes=NODES, edges=EDGES):
    """Ends of exactly `edges` different edges, each in a random direction; the last node stays isolated."""
    rng = np.random.default_rng(seed)
    pairs = np.stack(np.triu_indices(nodes - 1, 1), 1)
    chosen = pairs[rng.choice(len(pairs), edges, replace=False)]
    flip = rng.random(edges) < 0.5
    return np.where(flip, chosen[:, 0], chosen[:, 1]), np.where(flip, chosen[:, 1], chosen[:, 0])


def random_graph(seed, **sizes):
    return graphs.from_edges(*random_edges(seed, **sizes), num_nodes=sizes.get("nodes", NODES))


def field(seed, rows=NODES, scale=1.0):
    return np.asarray(np.random.default_rng(seed).standard_normal((rows, CHANNELS)) * scale, np.float32)


def dense_gradient(graph, kind):
    """G as a matrix, in float64, straight from the definition."""
    senders, receivers = np.asarray(graph.senders), np.asarray(graph.receivers)
    degree = 1.0 + np.bincount(senders, minlength=NODES) + np.bincount(receivers, minlength=NODES)
    g = np.zeros((len(senders), NODES))
    for e, (i, j) in enumerate(zip(senders, receivers, strict=True)):
        if kind == "normalized":
            g[e, i], g[e, j] = degree[i] ** -0.5, -(degree[j] ** -0.5)
        else:
            g[e, i], g[e, j] = (degree[i] * degree[j]) ** -0.5, -((degree[i] * degree[j]) ** -0.5)
    return g


def close(a, b, scale=1.0):
    # Sums of a few float32 terms of the size of the data.
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * scale)


@functools.cache
def jitted(name, **options):
    return jax.jit(functools.partial(getattr(graphs, name), **options))


@functools.cache
def jitted_step(kind):
    """x - h G^T tanh(G x), a non-linear diffusion with slope 1."""

    def step(graph, x, h):
        return x + h * graphs.divergence(graph, jnp.tanh(graphs.gradient(graph, x, kind=kind)), kind=kind)

    return jax.jit(step)


@functools.cache
def jitted_slope(kind):
    """The exact gradient of the total variation."""
    return jax.jit(jax.grad(lambda x, graph, eps: graphs.total_variation(graph, x, eps=eps, kind=kind)))


@given(seed=SEEDS, kind=KINDS, scale=SCALES)
def test_operators_equal_the_dense_matrices_of_their_definition(seed, kind, scale):
    graph, x, p = random_graph(seed), field(seed, scale=scale), field(seed + 1, EDGES, scale)
    g = dense_gradient(graph, kind)
    close(jitted("gradient", kind=kind)(graph, x), g @ x, scale)
    close(jitted("divergence", kind=kind)(graph, p), -g.T @ p, scale)
    close(jitted("laplacian", kind=kind)(graph, x), g.T @ g @ x, scale)
    close(jitted("dirichlet_energy", kind=kind)(graph, x), 0.5 * np.sum((g @ x) ** 2), scale**2)


@given(seed=SEEDS, kind=KINDS)
def test_divergence_is_minus_the_adjoint_of_the_gradient(seed, kind):
    graph, x, p = random_graph(seed), field(seed), field(seed + 1, EDGES)
    left = np.vdot(np.float64(jitted("gradient", kind=kind)(graph, x)), p)
    right = -np.vdot(x, np.float64(jitted("divergence", kind=kind)(graph, p)))
    np.testing.assert_allclose(left, right, atol=1e-6 * EDGES * CHANNELS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 edges: the 14 edges fill three, and half of a fourth."""
    monkeypatch.setattr(graphs, "BLOCK_SIZE", 4 * CHANNELS)


@pytest.mark.parametrize("kind", KIND_LIST)
def test_nonlinear_laplacian_and_its_gradients_are_those_of_the_fields_on_the_edges(small_blocks, kind):
    graph, x, cotangent = random_graph(4), jnp.asarray(field(4)), jnp.asarray(field(5))
    g = dense_gradient(graph, kind)

    def by_blocks(x, a):
        return graphs.nonlinear_laplacian(graph, x, lambda z: jnp.tanh(a * z), kind=kind)

    def by_fields(x, a):
        return jnp.float32(g.T) @ jnp.tanh(a * (jnp.float32(g) @ x))

    def pulled_back(f):
        return jax.jit(lambda x, a: (f(x, a), *jax.vjp(f, x, a)[1](cotangent)))(x, jnp.float32(1.5))

    for blocks, fields in zip(pulled_back(by_blocks), pulled_back(by_fields), strict=True):
        close(blocks, fields, scale=10)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KIND_LIST)
def test_fields_of_any_dtype_are_summed_in_that_of_the_degrees(kind, dtype):
    graph, x = random_graph(4), jnp.asarray(10 * field(4)).astype(dtype)
    with jax.numpy_dtype_promotion("standard"):
        total = unwrap(graphs.nonlinear_laplacian)(graph, x, lambda p: p, kind=kind)
        expected = unwrap(graphs.laplacian)(graph, x.astype(jnp.float32), kind=kind)
    assert total.dtype == jnp.float32
    close(total, expected, scale=10)


def test_blocks_of_edges_are_small_on_a_cpu_alone(small_blocks):
    graph, x = random_graph(4), jnp.asarray(field(4))
    f = jax.jit(jax.grad(lambda x: jnp.sum(graphs.nonlinear_laplacian(graph, x, jnp.tanh))))
    for platform, rows in (("cpu", 4), ("cuda", EDGES), ("tpu", EDGES)):
        program = export.export(f, platforms=[platform])(x).mlir_module()
        assert f"tensor<{rows}x{CHANNELS}xf32>" in program, platform
        assert (f"tensor<4x{CHANNELS}xf32>" in program) == (rows == 4), platform


def test_nonlinear_laplacian_has_second_derivatives(small_blocks):
    graph, x, v = random_graph(4), jnp.asarray(field(4)), jnp.asarray(field(5))
    g = jnp.float32(dense_gradient(graph, "normalized"))

    def curvature(f):  # of a scalar, along v
        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(x) ** 2))(x) * v)))(x)

    blocks = curvature(lambda x: graphs.nonlinear_laplacian(graph, x, jnp.tanh))
    close(blocks, curvature(lambda x: g.T @ jnp.tanh(g @ x)), scale=10)


def test_nonlinear_laplacian_stores_no_field_on_the_edges(small_blocks):
    many = random_graph(0, nodes=60, edges=1500)
    x = jnp.ones((60, CHANNELS))

    def temporary_numbers(f):
        compiled = jax.jit(jax.grad(lambda x: jnp.sum(f(x)))).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 4

    def by_fields(x):
        return -graphs.divergence(many, jnp.tanh(graphs.gradient(many, x)))

    assert temporary_numbers(lambda x: graphs.nonlinear_laplacian(many, x, jnp.tanh)) < 1500 * CHANNELS
    assert temporary_numbers(by_fields) >= 1500 * CHANNELS


@given(seed=SEEDS)
def test_normalized_laplacian_is_that_of_the_graph_with_self_loops(seed):
    graph, x = random_graph(seed), field(seed)
    adjacency = np.eye(NODES)
    np.add.at(adjacency, (np.asarray(graph.senders), np.asarray(graph.receivers)), 1)
    np.add.at(adjacency, (np.asarray(graph.receivers), np.asarray(graph.senders)), 1)
    root = np.diag(adjacency.sum(1) ** -0.5)
    close(jitted("laplacian", kind="normalized")(graph, x), x - root @ adjacency @ root @ x)


@given(seed=SEEDS, kind=KINDS)
def test_kernel_holds_constants_or_roots_of_degrees_and_every_isolated_node(seed, kind):
    graph = random_graph(seed)
    x = np.ones((NODES, 1)) if kind == "gcn" else 1 / np.asarray(jitted("normalize")(graph))[:, None]
    x[-1] = 100.0  # isolated
    assert float(jnp.abs(jitted("gradient", kind=kind)(graph, np.float32(x))).max()) < 1e-6


@given(seed=SEEDS, kind=KINDS)
def test_no_eigenvalue_exceeds_the_bounds(seed, kind):
    graph = random_graph(seed)
    largest = np.linalg.eigvalsh(dense_gradient(graph, kind).T @ dense_gradient(graph, kind))[-1]
    bound = float(jitted("largest_eigenvalue_bound", kind=kind)(graph))
    assert largest <= bound * (1 + 1e-6)
    assert bound <= graphs.GRADIENTS[kind]


def test_eigenvalue_bound_is_reached_by_an_even_ring():
    ring = graphs.from_edges(np.arange(8), (np.arange(8) + 1) % 8, num_nodes=8)
    alternating = jnp.asarray((-1.0) ** np.arange(8))[:, None]
    for kind in KIND_LIST:
        bound = graphs.largest_eigenvalue_bound(ring, kind=kind)
        close(graphs.laplacian(ring, alternating, kind=kind), bound * alternating)


@given(seed=SEEDS, kind=KINDS, fraction=st.floats(0.05, 1.0), scale=SCALES)
def test_diffusion_is_non_expansive_and_loses_energy_within_the_bound(seed, kind, fraction, scale):
    graph, x, y = random_graph(seed), field(seed, scale=scale), field(seed + 1, scale=scale)
    h = fraction * float(jitted("max_stable_step", kind=kind)(graph))
    step = jitted_step(kind)
    new_x, new_y = np.float64(step(graph, x, h)), np.float64(step(graph, y, h))
    assert np.linalg.norm(new_x - new_y) <= np.linalg.norm(np.float64(x) - y) * (1 + 1e-6)
    g = dense_gradient(graph, kind)

    def energy(v):  # sum log cosh, whose gradient is tanh
        return np.sum(np.logaddexp(2 * (g @ v), 0) - g @ v - np.log(2))

    assert energy(new_x) <= energy(np.float64(x)) + 1e-5 * scale


@given(kind=KINDS, excess=st.floats(1.05, 3.0))
def test_diffusion_beyond_the_bound_expands(kind, excess):
    ring = graphs.from_edges(np.arange(8), (np.arange(8) + 1) % 8, num_nodes=8)
    x = jnp.asarray(1e-3 * (-1.0) ** np.arange(8), jnp.float32)[:, None]  # small: tanh has slope 1 there
    h = excess * graphs.max_stable_step(ring, kind=kind)
    assert float(jnp.linalg.norm(jitted_step(kind)(ring, x, h))) > 1.05 * float(jnp.linalg.norm(x))


@given(seed=SEEDS, kind=KINDS, eps=st.sampled_from([0.01, 0.1, 1.0]), fraction=st.floats(0.05, 1.0), scale=SCALES)
def test_total_variation_step_is_non_expansive_and_never_raises_the_energy(seed, kind, eps, fraction, scale):
    graph, x, y = random_graph(seed), field(seed, scale=scale), field(seed + 1, scale=scale)
    # The step is clamped to what is stable on every graph, this graph's own bound may be larger.
    own = float(jitted("max_stable_step", kind=kind)(graph, lipschitz=1 / eps))
    gamma2 = fraction * min(own, 2 * eps / graphs.GRADIENTS[kind])
    step = jitted("tv_step", kind=kind)
    new_x, new_y = step(graph, x, gamma2=gamma2, eps=eps), step(graph, y, gamma2=gamma2, eps=eps)
    distance = np.linalg.norm(np.float64(x) - y)
    assert np.linalg.norm(np.float64(new_x) - np.float64(new_y)) <= distance * (1 + 1e-6)
    before, after = (jitted("total_variation", kind=kind)(graph, v, eps=eps) for v in (x, new_x))
    assert float(after) <= float(before) * (1 + 1e-6)
    # And it is a step down that energy, with its exact gradient.
    slope = jitted_slope(kind)(x, graph, eps)
    close(new_x, x - gamma2 * np.asarray(slope), scale)


def test_total_variation_step_keeps_a_jump_that_diffusion_blurs():
    path = graphs.from_edges(np.arange(7), np.arange(1, 8), num_nodes=8)
    jump = jnp.asarray((np.arange(8) > 3) * 1.0, jnp.float32)[:, None]
    tv = diffused = jump
    for _ in range(20):
        tv = graphs.tv_step(path, tv, gamma2=0.01, eps=0.01, kind="gcn")
        diffused = diffused - graphs.laplacian(path, diffused, kind="gcn")
    assert float(tv[4, 0] - tv[3, 0]) > 3 * float(diffused[4, 0] - diffused[3, 0])


@given(seed=SEEDS, kind=KINDS)
def test_renaming_the_nodes_renames_the_result(seed, kind):
    senders, receivers = random_edges(seed)
    x = field(seed)
    rename = np.random.default_rng(seed).permutation(NODES)
    graph = graphs.from_edges(senders, receivers, num_nodes=NODES)
    renamed = graphs.from_edges(rename[senders], rename[receivers], num_nodes=NODES)
    moved = np.zeros_like(x)
    moved[rename] = x
    close(np.asarray(jitted_step(kind)(renamed, moved, 0.5))[rename], jitted_step(kind)(graph, x, 0.5))


@given(seed=SEEDS, kind=KINDS)
def test_turning_edges_round_changes_the_sign_of_the_gradient_and_nothing_else(seed, kind):
    graph, x = random_graph(seed), field(seed)
    turn = np.random.default_rng(seed).random(EDGES) < 0.5
    turned = graph._replace(
        senders=jnp.where(turn, graph.receivers, graph.senders),
        receivers=jnp.where(turn, graph.senders, graph.receivers),
    )
    sign = np.where(turn, -1.0, 1.0)[:, None]
    gradient = jitted("gradient", kind=kind)
    close(gradient(turned, x), sign * np.asarray(gradient(graph, x)))  # a fused product rounds one end only
    close(jitted_step(kind)(turned, x, 0.5), jitted_step(kind)(graph, x, 0.5))


@given(seed=SEEDS, kind=KINDS)
def test_padding_changes_nothing(seed, kind):
    graph, x = random_graph(seed)._replace(nodes=field(seed)), field(seed)
    padded = jraph.pad_with_graphs(graph, NODES + 5, EDGES + 7)
    close(jitted("normalize")(padded)[:NODES], jitted("normalize")(graph))
    for operator in (jitted("laplacian", kind=kind), functools.partial(jitted_step(kind), h=0.5)):
        result = operator(padded, padded.nodes)
        close(result[:NODES], operator(graph, x))
        assert not np.any(result[NODES:])
    close(
        jitted("total_variation", kind=kind)(padded, padded.nodes, eps=0.5),
        jitted("total_variation", kind=kind)(graph, x, eps=0.5),
    )
    bound = jitted("largest_eigenvalue_bound", kind=kind)
    close(bound(padded), bound(graph))


@given(seed=SEEDS, kind=KINDS)
def test_a_batch_of_graphs_is_the_graphs_apart(seed, kind):
    several = [random_graph(seed + i)._replace(nodes=jnp.asarray(field(seed + i))) for i in range(3)]
    batch = jraph.batch(several)
    apart = [jitted_step(kind)(graph, graph.nodes, 0.5) for graph in several]
    close(jitted_step(kind)(batch, batch.nodes, 0.5), np.concatenate(apart))


@given(seed=SEEDS)
def test_a_matrix_on_the_channels_commutes_with_the_gradient(seed):
    graph, x, k = random_graph(seed), field(seed), field(seed + 1, CHANNELS)
    gradient = jitted("gradient", kind="normalized")
    close(gradient(graph, x @ k), np.asarray(gradient(graph, x)) @ k, scale=4)


@pytest.mark.parametrize("kind", KIND_LIST)
def test_eager_jit_and_vmap_agree(kind):
    graph, xs, ps = random_graph(0), np.stack([field(i) for i in range(4)]), field(5, EDGES)
    operators = {
        "gradient": lambda x: graphs.gradient(graph, x, kind=kind),
        "divergence": lambda x: graphs.divergence(graph, x[0, 0] * jnp.asarray(ps), kind=kind),
        "laplacian": lambda x: graphs.laplacian(graph, x, kind=kind),
        "nonlinear_laplacian": lambda x: graphs.nonlinear_laplacian(graph, x, jnp.tanh, kind=kind),
        "tv_step": lambda x: graphs.tv_step(graph, x, gamma2=0.05, eps=0.1, kind=kind),
        "dirichlet_energy": lambda x: graphs.dirichlet_energy(graph, x, kind=kind),
    }
    for operator in operators.values():
        eager = np.stack([operator(jnp.asarray(x)) for x in xs])
        close(jax.jit(jax.vmap(operator))(xs), eager)
        close(jax.vmap(operator)(jnp.asarray(xs)), eager)
    # Without channels, and with more than one axis of them.
    x = jnp.asarray(field(0))
    close(graphs.laplacian(graph, x[:, 0], kind=kind), operators["laplacian"](x)[:, 0])
    close(graphs.laplacian(graph, x[:, :, None], kind=kind)[..., 0], operators["laplacian"](x))


@pytest.mark.parametrize("kind", KIND_LIST)
def test_gradients_in_both_modes_equal_finite_differences(kind):
    graph = random_graph(1)

    def f(x):
        return graphs.tv_step(graph, x - graphs.laplacian(graph, x, kind=kind), gamma2=0.2, eps=0.5, kind=kind)

    check_grads(f, (jnp.asarray(field(2)),), order=2, modes=("fwd", "rev"), rtol=2e-2, atol=2e-2)


def test_a_given_scale_saves_the_degrees_and_changes_nothing():
    graph, x = random_graph(3), jnp.asarray(field(3))
    scale = graphs.normalize(graph)
    np.testing.assert_array_equal(graphs.laplacian(graph, x, scale=scale), graphs.laplacian(graph, x))
    text = jax.jit(lambda g, x, s: graphs.laplacian(g, x, scale=s)).lower(graph, x, scale).as_text()
    assert "rsqrt" not in text


@given(seed=SEEDS)
def test_loops_duplicates_and_directions_make_the_same_graph(seed):
    senders, receivers = random_edges(seed)
    rng = np.random.default_rng(seed)
    loops = rng.integers(0, NODES, 5)
    order = rng.permutation(3 * EDGES + 5)
    s = np.concatenate([senders, receivers, senders, loops])[order]
    r = np.concatenate([receivers, senders, receivers, loops])[order]
    graph, expected = graphs.from_edges(s, r, num_nodes=NODES), random_graph(seed)
    for a, b in zip(jax.tree.leaves(graph), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert graph.n_edge.tolist() == [EDGES]
    assert (np.asarray(graph.senders) < np.asarray(graph.receivers)).all()
    assert (np.diff(graph.receivers) >= 0).all()


def test_graphs_without_edges_are_allowed():
    graph = graphs.from_edges([], [], num_nodes=3)
    x = jnp.ones((3, 2))
    assert graphs.gradient(graph, x).shape == (0, 2)
    np.testing.assert_array_equal(graphs.laplacian(graph, x), jnp.zeros((3, 2)))
    np.testing.assert_array_equal(graphs.nonlinear_laplacian(graph, x, jnp.tanh), jnp.zeros((3, 2)))
    assert np.isinf(graphs.max_stable_step(graph))
    assert graph.nodes.shape == (3, 0)


def test_sparse_features_are_kept_sparse():
    features = BCOO.fromdense(jnp.eye(3))
    graph = graphs.from_edges([0], [1], num_nodes=3, nodes=features)
    assert graph.nodes is features
    assert graphs.laplacian(graph, jnp.ones((3, 1))).shape == (3, 1)


def test_features_may_be_in_half_precision():
    assert graphs.from_edges([0], [1], num_nodes=3, nodes=jnp.ones((3, 1), jnp.bfloat16)).nodes.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nodes": 0}, "num_nodes"),
        ({"senders": [3]}, "senders hold node 3, outside the graph's nodes 0 to 2"),
        ({"receivers": [-1]}, "receivers hold node -1"),
        ({"senders": [0, 1]}, "2 senders but 1 receivers"),
        ({"nodes": np.ones((4, 2), np.float32)}, "4 rows"),
        ({"nodes": np.ones((3, 2), np.int32)}, "int32"),
        ({"nodes": np.array([[1.0], [2.0], [np.nan]], np.float32)}, "node 2"),
        ({"nodes": BCOO.fromdense(jnp.array([[0.0], [0.0], [jnp.inf]]))}, "NaN or infinite"),
    ],
)
def test_bad_graphs_are_refused(arguments, message):
    good = {"senders": [0], "receivers": [1], "num_nodes": 3}
    with pytest.raises(ValueError, match=message):
        graphs.from_edges(**(good | arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, x: graphs.gradient(g, x, kind="mean"), "unknown kind 'mean': choose one of normalized, gcn"),
        (lambda g, x: graphs.gradient(g, x[:-1]), "8 rows, the graph has 9 nodes"),
        (lambda g, x: graphs.divergence(g, x), "9 rows, the graph has 14 edges"),
        (lambda g, x: graphs.nonlinear_laplacian(g, x[:-1], jnp.tanh), "8 rows, the graph has 9 nodes"),
        (lambda g, x: graphs.tv_step(g, x, gamma2=0.11, eps=0.1), "0.11.*within .0, 0.1."),
        (lambda g, x: graphs.tv_step(g, x, gamma2=np.float32(50), eps=0.1), "50.*within .0, 0.1."),
        (lambda g, x: graphs.tv_step(g, x, gamma2=-0.1, eps=0.1), "-0.1"),
        (lambda g, x: graphs.tv_step(g, x, gamma2=0.0, eps=0.0), "eps"),
        (lambda g, x: graphs.total_variation(g, x, eps=-1.0), "eps"),
        (lambda g, x: graphs.max_stable_step(g, lipschitz=0.0), "lipschitz"),
        (lambda g, x: graphs.gradient(g._replace(nodes=None), x), "does not tell"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_graph(0), jnp.asarray(field(0)))


def test_a_traced_step_beyond_the_bound_is_clamped_to_it():
    graph, x = random_graph(0), jnp.asarray(field(0))
    step = jitted("tv_step", kind="normalized")
    np.testing.assert_array_equal(step(graph, x, gamma2=5.0, eps=0.1), step(graph, x, gamma2=0.1, eps=0.1))


@pytest.mark.parametrize("gamma2", [0.0, 0.1])
def test_a_step_at_a_bound_learns_as_one_beside_it(gamma2):
    graph, x = random_graph(0), jnp.asarray(field(0))

    def loss(gamma2):
        return jnp.sum(x * graphs.tv_step(graph, x, gamma2=gamma2, eps=0.1))

    slope = jax.jit(jax.grad(loss))
    close(slope(jnp.float32(gamma2)), slope(jnp.float32(0.05)))  # the step is linear in gamma2


def test_nan_in_a_node_reaches_its_neighbours_only():
    path = graphs.from_edges(np.arange(4), np.arange(1, 5), num_nodes=5)
    x = jnp.ones((5, 1)).at[1].set(jnp.nan)
    assert np.isnan(graphs.laplacian(path, x)[:, 0]).tolist() == [True, True, True, False, False]
