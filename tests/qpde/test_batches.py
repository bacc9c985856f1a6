"""Batches as people have them: every function reads the same forms, and says the same of others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import qpde
from qpde import Bits, certify, graphs, measure, models, ptq
from qpde.batches import read_batches
from qpde.bits import stack_bits
from qpde.measure.bit_widths import Elastic
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock

BITS = Bits(4, 4)
IMAGES = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32)
LABELS = np.zeros(4, np.int32)


@pytest.fixture(scope="module")
def networks():
    """A network in full precision, one with quantizers, and the variables of each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(registry.ARCHITECTURES, "tiny", registry.Architecture("tiny", BasicBlock, ((4, 4, 2, 1, 1),)))
        exact = models.create("tiny", num_classes=3)
        rounded = models.create("tiny", num_classes=3, weight_bits=4, act_bits=4, norm="tied", step_size="auto")
    return tuple((model, jax.jit(model.init)(jax.random.key(0), IMAGES)) for model in (exact, rounded))


def read_by(networks):
    """Every function of batches, as a function of them and of what happens to the variables before."""
    (exact, of_exact), (rounded, of_rounded) = networks
    return {
        "compare": lambda b, f: measure.compare(rounded, f(of_rounded), b, BITS),
        "compare with statistics": lambda b, f: measure.compare(
            rounded, f(of_rounded), [IMAGES], BITS, statistics_batches=b
        ),
        "compare_bits": lambda b, f: measure.compare_bits(rounded, f(of_rounded), b, [BITS]),
        "distributions": lambda b, f: measure.distributions(rounded, f(of_rounded), b, BITS),
        "sensitivity": lambda b, f: ptq.sensitivity(rounded, f(of_rounded), b, [BITS]),
        "quantize": lambda b, f: ptq.quantize(exact, f(of_exact), b, BITS, equalize=True)[1],
        "correct_bias": lambda b, f: ptq.correct_bias(rounded, f(of_rounded), b, BITS, exact=f(of_rounded)),
        "equalize": lambda b, f: ptq.equalize(exact, f(of_exact), b),
    }


def same(variables):
    return variables


NAMES = list(read_by(((None, None), (None, None))))


def numbers(result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result if isinstance(result, dict) else vars_of(result))]


def vars_of(result):
    return [vars(r) for r in result] if isinstance(result, list) else vars(result)


@pytest.mark.parametrize("name", NAMES)
def test_every_function_of_batches_takes_images_and_pairs_and_frozen_variables(networks, name):
    run = read_by(networks)[name]
    plain = numbers(run([IMAGES], same))
    for found in (run([(IMAGES, LABELS)], same), run([[jnp.asarray(IMAGES), LABELS]], freeze)):
        for a, b in zip(plain, numbers_without_accuracy(found, plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def numbers_without_accuracy(found, plain):
    """What is measured without labels too."""
    if not isinstance(found, dict | list):
        labelled = ("accuracy", "accuracy_twin", "accuracy_reference")
        found = {name: value for name, value in vars(found).items() if name not in labelled}
    return numbers(found)


WRONG = {
    "a dictionary": ([{"image": IMAGES, "label": LABELS}], r"batch 0 is a dictionary of 'image', 'label'.*pair"),
    "a triple": ([(IMAGES, LABELS, LABELS)], "batch 0 is a tuple of 3: give images.*pair"),
    "NCHW": ([IMAGES, IMAGES.transpose(0, 3, 1, 2)], r"batch 1 is of shape \(4, 3, 4, 4\).*3\); put the channels last"),
    "grey": ([IMAGES[..., :1]], r"batch 0 is of shape \(4, 4, 4, 1\), the network takes images \(N, H, W, 3\)"),
    "one image": ([IMAGES[0]], r"batch 0 is of shape \(4, 4, 3\), the network takes"),
    "text": (["digits"], "inputs of batch 0 are of type str"),
    "an array": (IMAGES, r"`batches` is one array of shape \(4, 4, 4, 3\): give a list"),
    "one dictionary": ({"image": IMAGES}, "`batches` is one dict: give a list"),
    "nothing": ([IMAGES[:0]], "batch 0 holds no images"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_every_function_says_the_same_of_other_forms(networks, name, wrong):
    batches, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        read_by(networks)[name](batches, same)


def read_once_by(networks, folder):
    """Every function of one batch alike."""
    _, (model, variables) = networks
    own = qpde.quantized(nn.Dense(2), [qpde.Rule("", weights=4, activations=4)])
    of_own = nn.Dense(2).init(jax.random.key(0), IMAGES)
    saved = qpde.load(qpde.save(folder, model, variables))
    return {
        "calibrate_clips": lambda x: models.calibrate_clips(model, variables, x),
        "converge_norms": lambda x: models.converge_norms(model, variables, x),
        "certify": lambda x: vars(certify.certify(model, variables, x, BITS)),
        "exact_twin": lambda x: certify.exact_twin(model, variables, x, BITS),
        "logits": lambda x: saved.logits(x),
        "adopt": lambda x: own.adopt(of_own, x),
        "with_signs": lambda x: np.array([sign for _, sign in own.with_signs(of_own, [x]).signs]),
    }


ONCE = ["calibrate_clips", "converge_norms", "certify", "exact_twin", "logits", "adopt", "with_signs"]


@pytest.mark.parametrize("name", ONCE)
def test_every_function_of_one_batch_reads_it_alike(networks, name, tmp_path):
    run = read_once_by(networks, tmp_path)[name]
    jax.tree.map(np.testing.assert_array_equal, run((IMAGES, LABELS)), run(IMAGES))
    for wrong, message in (
        ({"image": IMAGES}, "batch.* is a dictionary of 'image'.*pair"),
        ((IMAGES, LABELS, LABELS), "batch.* is a tuple of 3: give images"),
    ):
        with pytest.raises(ValueError, match=message):
            run(wrong)
    if name not in ("adopt", "with_signs", "logits"):  # any layout may be right there, or it is normalised first
        with pytest.raises(ValueError, match=r"the batch is of shape.*put the channels last"):
            run(IMAGES.transpose(0, 3, 1, 2))


def test_a_batch_of_nothing_is_refused_where_something_is_read_off_it():
    own = qpde.quantized(nn.Dense(2), [qpde.Rule("", weights=4, activations=4)])
    variables = nn.Dense(2).init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="batch 0 holds no images"):
        own.with_signs(variables, [IMAGES[:0]])
    with pytest.raises(ValueError, match="`batches` is one array"):
        own.with_signs(variables, IMAGES)


def test_a_batch_of_nothing_is_computed_where_nothing_is_the_answer(networks):
    _, (model, variables) = networks
    nothing = IMAGES[:0]
    found = certify.certify(model, variables, nothing, BITS)
    assert found.logits.shape == (0, 3)
    assert np.isnan(found.certified_fraction)

    def loss(params, train):
        return model.apply(variables | {"params": params}, nothing, train=train, mutable=["batch_stats"])[0].sum()

    for train in (False, True):
        for gradient in jax.tree.leaves(jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], train)):
            np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    _, updates = model.apply(variables, nothing, train=True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])


def test_a_graph_is_a_batch_and_not_a_set_of_them():
    graph = graphs.from_edges([0], [1], num_nodes=2)
    (x, labels), pair = read_batches([graph, (graph, np.array([0, 1]))], {})
    assert x is graph
    assert labels is None
    np.testing.assert_array_equal(pair[1], [0, 1])
    with pytest.raises(ValueError, match="`batches` is one GraphsTuple: give a list"):
        list(read_batches(graph, {}))


def test_frozen_variables_are_those_of_a_dictionary(networks):
    """The functions that take one batch, and those that take none."""
    _, (model, variables) = networks
    frozen = freeze(variables)
    once = lambda f: jax.tree.map(np.testing.assert_array_equal, f(variables), f(frozen))  # noqa: E731
    once(lambda v: models.calibrate_clips(model, v, IMAGES))
    once(lambda v: models.converge_norms(model, v, IMAGES))
    once(lambda v: models.clips.replace_clips(v, {}))
    once(lambda v: Elastic(model).variables(v, stack_bits([BITS, Bits(8, 8)]), [IMAGES]))
    once(lambda v: vars(certify.certify(model, v, IMAGES, BITS)))
    once(lambda v: certify.exact_twin(model, v, IMAGES, BITS))
    assert len(model.steps(frozen)) == len(model.steps(variables)) == 2


def test_frozen_variables_can_be_specialised_to_a_width(monkeypatch):
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", registry.Architecture("tiny", BasicBlock, ((4, 4, 1, 1, 1),)))
    model = models.create("tiny", num_classes=3, weight_bits=4, act_bits=4, clip_bits=(2, 4))
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    ordinary, plain = model.at_bits(variables, BITS)
    again, found = model.at_bits(freeze(variables), BITS)
    assert again == ordinary
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_a_graph_network_takes_frozen_variables():
    graph = graphs.from_edges([0, 1], [1, 2], num_nodes=3, nodes=np.eye(3, dtype=np.float32))
    model = models.create("pde_gcn", num_classes=2, layers=2, width=4)
    variables = jax.jit(model.init)(jax.random.key(0), graph)
    np.testing.assert_array_equal(model.apply(freeze(variables), graph), model.apply(variables, graph))
    ptq.quantize(model, freeze(variables), [(graph, np.zeros(3, np.int32))], Bits(8, 8))
