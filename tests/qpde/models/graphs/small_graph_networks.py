"""Small networks on graphs, compiled once for each structure, and the graph they run on."""

import collections
import functools

import jax
import numpy as np
from hypothesis import strategies as st

import qpde
from qpde import graphs
from qpde.models import calibrate_clips
from qpde.models.graphs import networks

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
