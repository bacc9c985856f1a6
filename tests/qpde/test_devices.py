"""Batches spread over devices: by `jax.shard_map` with its checks, and over explicit axes, as on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qpde import graphs, models, operators, quantizers
from qpde.bits import Bits
from qpde.measure import histograms
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock, InvertedBlock, StableBlock
from qpde.models.options import Smoothing

IMAGES, CLASSES = 8, 3

SMALL = {
    "resnet20": registry.Architecture("tiny", BasicBlock, ((4, 4, 2, 1, 1), (4, 8, 1, 2, 1))),
    "stablenet20": registry.Architecture("tiny", StableBlock, ((4, 4, 1, 1, 1), (4, 8, 1, 2, 1))),
    "mobilenetv2": registry.Architecture("tiny", InvertedBlock, ((4, 4, 2, 1, 2), (4, 6, 1, 2, 2)), neck_width=8),
}
NETWORKS = {
    "resnet": ("resnet20", {}),
    "plain resnet": ("resnet20", {"symmetric": False, "loop": "scan", "per_channel": True}),
    "tied resnet": ("resnet20", {"norm": "tied", "step_size": "auto", "loop": "scan"}),
    "stablenet": ("stablenet20", {"norm": "spectral", "smoothing": Smoothing(steps=2, learned=True)}),
    "mobilenet": ("mobilenetv2", {}),
}
# Compiling is what these tests cost: one network runs on two devices too.
CASES = [("resnet", 2), *[(name, 4) for name in NETWORKS]]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of three blocks."""
    for name, architecture in SMALL.items():
        monkeypatch.setitem(registry.ARCHITECTURES, name, architecture)


def mesh_of(devices, axis_type):
    return jax.make_mesh((devices,), ("data",), axis_types=(axis_type,))


def place(mesh, x, variables):
    """The batch split over the devices, the variables on each of them."""
    return jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(variables, NamedSharding(mesh, P()))


def assert_close(found, expected):
    """Equal up to float32 sums in another order: of gradients, small ones are differences of larger numbers."""
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, desired), actual in zip(paths, jax.tree.leaves(found), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(actual, desired, rtol=1e-2, atol=3e-5 * largest, err_msg=where)


def image_network(name):
    network, options = NETWORKS[name]
    model = models.create(network, num_classes=CLASSES, weight_bits=4, act_bits=4, **options)
    x = jax.random.normal(jax.random.key(2), (IMAGES, 8, 8, 3))
    return model, x, jax.jit(model.init)(jax.random.key(1), x[:1])


def train_step(model, x, variables, bits=None):
    """What a step of gradient descent needs: the gradient, with the loss and the changed collections."""
    collections = dict(variables)
    params = collections.pop("params")

    def loss(params):
        variables = {"params": params, **collections}
        logits, updates = model.apply(variables, x, bits=bits, train=True, mutable=list(collections))
        return -jax.nn.log_softmax(logits)[:, 0].mean(), updates

    updates, gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return gradient, updates


def on_each(devices, step):
    """`step` of (a part of the batch, variables) by `shard_map`, means over the devices."""

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(devices, AxisType.Auto), in_specs=(P("data"), P()), out_specs=P())
    def on_devices(x, variables):
        gradient, others = step(x, variables)
        # The gradient of what all devices share is the sum over them already.
        return jax.tree.map(lambda g: g / devices, gradient), jax.lax.pmean(others, "data")

    return on_devices


@pytest.mark.parametrize(("name", "devices"), CASES)
def test_a_training_step_on_explicit_axes_is_that_of_one_device(name, devices):
    """The step of the twin: where activations are rounded, sums in another order may move one across a threshold."""
    model, x, variables = image_network(name)
    step, bits = jax.jit(partial(train_step, model)), Bits(jnp.int32(4), jnp.int32(4)).twin
    found = step(*place(mesh_of(devices, AxisType.Explicit), x, variables), bits)
    assert_close(found, step(x, variables, bits))


@pytest.mark.parametrize("levels", ["uniform", "pot"])
def test_rounding_on_explicit_axes_is_that_of_one_device(levels):
    x = jax.random.normal(jax.random.key(0), (IMAGES, 4, 4, 3))

    @jax.jit
    def rounded(x, clip):
        y, pullback = jax.vjp(lambda x, clip: quantizers.quantize_activation(x, clip, 4, levels=levels), x, clip)
        return y, *pullback(jnp.ones_like(y))

    found, expected = rounded(*place(mesh_of(4, AxisType.Explicit), x, jnp.float32(1.3))), rounded(x, jnp.float32(1.3))
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)


@pytest.mark.parametrize(("name", "devices"), CASES)
def test_a_training_step_in_shard_map_is_the_mean_of_the_parts(name, devices):
    """Batch norms see the images of their device, as in other libraries."""
    model, x, variables = image_network(name)
    step = partial(train_step, model)

    @jax.jit
    def by_parts(x, variables):
        found = jax.lax.map(lambda part: step(part, variables), x.reshape(devices, -1, *x.shape[1:]))
        return jax.tree.map(lambda leaf: leaf.mean(0), found)

    assert_close(on_each(devices, step)(x, variables), by_parts(x, variables))


GRAPH = graphs.from_edges([0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 6, 3, 6], num_nodes=7)
GRAPH_NETWORKS = {
    "diffusion": ("pde_gcn", {"layers": 2, "nonlinearity": "tanh", "loop": "scan"}),
    "wave": ("pde_gcn", {"layers": 1, "dynamics": "wave", "step_size": "auto", "gradient_kind": "gcn"}),
    "exact": ("pde_gcn", {"layers": 1, "act_bits": None}),
    "attention": ("gat", {"layers": 1, "heads": 2}),
}


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_a_batch_of_node_fields_is_spread_over_devices(name):
    """Many fields on one graph, the batch being the fields."""
    network, options = GRAPH_NETWORKS[name]
    options = {"width": 4, "dropout": 0.0, "weight_bits": 4, "act_bits": 4} | options
    model = models.create(network, num_classes=CLASSES, **options)
    x = jax.random.normal(jax.random.key(0), (IMAGES, 7, 5))
    variables = jax.jit(model.init)(jax.random.key(1), GRAPH._replace(nodes=x[0]))

    def step(x, variables):
        def loss(variables):
            logits = jax.vmap(lambda nodes: model.apply(variables, GRAPH._replace(nodes=nodes)))(x)
            return -jax.nn.log_softmax(logits)[..., 0].mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        return gradient, value

    expected = jax.jit(step)(x, variables)
    assert_close(on_each(4, step)(x, variables), expected)
    mesh = mesh_of(4, AxisType.Explicit)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(step)(*place(mesh, x, variables)), expected)


@pytest.mark.parametrize("split", ["nodes", "edges", "both"])
def test_graph_operators_take_nodes_and_edges_split_over_explicit_axes(split):
    mesh = mesh_of(4, AxisType.Explicit)
    x = jax.random.normal(jax.random.key(0), (8, 3))
    graph = GRAPH._replace(nodes=jnp.zeros((8, 0)))

    @jax.jit
    def everything(graph, x):
        flows = [graphs.nonlinear_laplacian(graph, x, jnp.tanh, kind=kind) for kind in graphs.GRADIENTS]
        smoothed = graphs.tv_step(graph, x, gamma2=0.01, eps=0.1)
        slope = jax.grad(lambda x: graphs.dirichlet_energy(graph, x) + flows[0].sum())(x)
        return graphs.laplacian(graph, x), flows, smoothed, slope

    expected = everything(graph, x)
    nodes, edges = (NamedSharding(mesh, P("data" if split in (part, "both") else None)) for part in ("nodes", "edges"))
    ends = jax.device_put((graph.senders, graph.receivers), edges)
    placed = graph._replace(senders=ends[0], receivers=ends[1], nodes=jax.device_put(graph.nodes, nodes))
    assert_close(everything(placed, jax.device_put(x, nodes)), expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("method", ["absmax", "percentile", "rms", "mse", "entropy", "lsq"])
def test_a_clip_read_off_a_batch_on_explicit_axes_is_that_of_one_device(method, per_channel):
    x = jax.random.normal(jax.random.key(0), (IMAGES, 3, 3, 2))
    clip = jax.jit(partial(quantizers.initial_clip, bits=4, signed=True, method=method, per_channel=per_channel))
    spread, _ = place(mesh_of(4, AxisType.Explicit), x, ())
    np.testing.assert_allclose(clip(spread), clip(x), rtol=2e-5)


def test_a_histogram_of_a_batch_on_explicit_axes_is_that_of_one_device():
    x = jax.random.normal(jax.random.key(0), (IMAGES, 3, 3, 2))
    spread, _ = place(mesh_of(4, AxisType.Explicit), x, ())
    for found, expected in zip(*(histograms.histogram(a, signed=True) for a in (spread, x)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_kernel_split_over_explicit_axes_is_gathered_and_its_gradient_split_again():
    mesh = mesh_of(4, AxisType.Explicit)
    x, kernel = jax.random.normal(jax.random.key(0), (8, 4, 4, 4)), jax.random.normal(jax.random.key(1), (3, 3, 4, 8))

    @jax.jit
    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(jnp.sin(operators.conv(x, kernel))))(kernel)

    split = NamedSharding(mesh, P(None, None, None, "data"))
    found = gradient(jax.device_put(x, NamedSharding(mesh, P(None, "data"))), jax.device_put(kernel, split))
    assert found.sharding == split
    assert_close(found, gradient(x, kernel))
