"""Segmentation networks: every pixel a class, dilation that keeps a network's function, and all that measures them."""

import functools
import runpy

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qpde
from qpde import deploy, measure, models, ptq
from qpde.models.images.blocks import BasicBlock, InvertedBlock, StableBlock
from qpde.models.images.segmentation import SegmentationArchitecture, resize

CLASSES = 3
DECODERS = ("unet", "deeplabv3plus")
BITS = qpde.Bits(4, 4)


def images(n=2, size=(33, 46), seed=0):
    return jax.random.normal(jax.random.key(seed), (n, *size, 3))


def tiny(decoder="deeplabv3plus", encoder="resnet20", stages=None, **options):
    """A network of one or two blocks a stage."""
    options = {"num_classes": CLASSES, "encoder": encoder, "decoder_width": 8} | options
    model = models.create(decoder, **options)
    architecture = model.architecture.with_blocks(*(stages or (1, 2, 2)))
    return models.image_network(architecture, num_classes=CLASSES, **vars(model.options))


@functools.cache
def made(*args, **options):
    model = tiny(*args, **options)
    return model, jax.jit(model.init)(jax.random.key(0), images(1))


@functools.partial(jax.jit, static_argnames=("model", "return_states"))
def apply(model, variables, x, bits=None, return_states=False):
    return model.apply(variables, x, bits=bits, return_states=return_states)


@pytest.mark.parametrize("encoder", ["resnet20", "stablenet20", "mobilenetv2", "resnet18"])
@pytest.mark.parametrize(("decoder", "symmetric"), [("unet", True), ("deeplabv3plus", False)])
def test_logits_have_the_size_of_the_image_and_the_summary_that_of_every_map(encoder, decoder, symmetric):
    model = tiny(decoder, encoder, (1,) * len(models.ARCHITECTURES[encoder].stages), symmetric=symmetric)
    for size in ((32, 32), (45, 33)):
        x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        (logits, states), variables = jax.eval_shape(
            lambda x: model.init_with_output(jax.random.key(0), x, return_states=True), x
        )
        assert logits.shape == (1, *size, CLASSES)
        rows = models.summary(model, (*size, 3)).rows
        assert [row.output for row in rows if row.name in model.block_names()] == [s.shape[1:] for s in states]
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
        assert sum(leaf.size for path, leaf in leaves if "clips" not in str(path)) == sum(r.parameters for r in rows)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_the_output_stride_is_what_was_asked_for_and_aspp_follows_it(output_stride):
    model = models.create("deeplabv3plus", encoder="resnet18", num_classes=CLASSES, output_stride=output_stride)
    assert model.maps[-1].stride == output_stride
    sizes = {name: size for name, _, size in model.sized_parts((160, 224, 3))}
    assert sizes["aspp0.block0"] == (160 // output_stride, 224 // output_stride)
    rates = [layer.blocks[0].dilation for layer in model.layers if layer.name.startswith("aspp")]
    assert rates == [1, *(rate * 16 // output_stride for rate in (6, 12, 18)), 1]
    assert sizes["fuse.block0"] == (40, 56)


def test_bit_operations_count_the_decoder_at_its_bits():
    model = tiny(weight_bits=4, act_bits=3)
    rows = {row.name: row for row in models.summary(model, (64, 96, 3)).rows}
    separable = 8 * 9 * 8 + 4 * 8 * 8  # the depthwise kernel has 8 bits; fuse works at stride 4
    assert rows["fuse.block1"].bit_operations == 16 * 24 * 3 * separable
    assert rows["head"].bit_operations == 32 * 32 * rows["head"].macs == 32 * 32 * 16 * 24 * 8 * CLASSES


@pytest.mark.parametrize(
    ("decoder", "encoder", "symmetric"),
    [("unet", "resnet20", True), ("deeplabv3plus", "mobilenetv2", True), ("deeplabv3plus", "stablenet20", False)],
)
def test_every_parameter_learns_in_low_bits(decoder, encoder, symmetric):
    stages = (1, 1, 1, 1) if encoder == "mobilenetv2" else (1, 1, 2)
    model = tiny(decoder, encoder, stages, symmetric=symmetric, weight_bits=4, act_bits=4)
    x, labels = images(4, (32, 35)), jax.random.randint(jax.random.key(1), (4, 32, 35), 0, CLASSES)

    @jax.jit
    def gradient(key):
        variables = model.init(key, x)

        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
            return -chosen.mean(), updates["batch_stats"]

        found, updated = jax.grad(loss, has_aux=True)(variables["params"])
        return found, jax.tree.map(lambda a, b: (a != b).any(), variables["batch_stats"], updated)

    found, changed = gradient(jax.random.key(0))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(found))
    still = [str(path) for path, g in jax.tree_util.tree_leaves_with_path(found) if not np.abs(g).max() > 0]
    assert not still
    assert all(jax.tree.leaves(changed))


BLOCKS = (BasicBlock, StableBlock, functools.partial(InvertedBlock, expansion=2, padded=True), InvertedBlock)


@given(
    st.sampled_from(BLOCKS),
    st.integers(1, 3),
    st.tuples(st.integers(7, 10), st.integers(7, 10)),
    st.integers(0, 2**16),
)
def test_a_dilated_symmetric_block_has_an_exact_adjoint(kind, dilation, size, seed):
    block = kind(width_in=2, width_out=2, stride=1, symmetric=True, dilation=dilation, dilation_after=dilation)
    keys = jax.random.split(jax.random.key(seed), 3)
    linear, adjoint = block.linear_pair(block.init(keys[0])[0])
    x = jax.random.normal(keys[1], (1, *size, 2))
    image = linear(x)
    y = jax.random.normal(keys[2], image.shape)
    back = adjoint(y)
    assert back.shape == x.shape
    np.testing.assert_allclose(jnp.vdot(image, y), jnp.vdot(x, back), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "stages", "symmetric"),
    [("resnet20", (1, 2, 2), True), ("resnet20", (1, 2, 2), False), ("mobilenetv2", (1, 1, 2, 2), True)],
)
def test_dilation_keeps_what_a_stride_computes_and_fills_in_between(encoder, stages, symmetric):
    """The finer map holds the coarse one at every second pixel, up to its borders."""
    options = {"encoder": encoder, "stages": stages, "symmetric": symmetric, "weight_bits": 4, "act_bits": 8}
    coarse, variables = made(output_stride=16, **options)
    fine = tiny(output_stride=8, **options)
    last = sum(stages) - 1
    x = images(1, (64, 96))
    expected = apply(coarse, variables, x, return_states=True)[1][last]
    found = apply(fine, variables, x, return_states=True)[1][last]
    assert found.shape == (1, 8, 12, expected.shape[-1])
    np.testing.assert_allclose(found[:, ::2, ::2], expected, rtol=1e-4, atol=1e-4)


def test_deeplabv3plus_computes_what_pytorch_does_with_the_same_weights(small_golden_dir):
    """Against tests/golden/deeplabv3plus_torch.py, written in PyTorch from the network's description alone."""
    published = runpy.run_path(str(small_golden_dir / "deeplabv3plus_torch.py"))
    model = tiny(output_stride=8, symmetric=False)
    x = jnp.asarray(published["image"]())

    def weight(path, leaf):
        names = [entry.key for entry in path]
        shape = leaf.shape[1:] if "block" in names[2] else leaf.shape  # equal blocks are stacked
        if names[-1].endswith("clips"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(published["value"]("/".join(names), shape).reshape(leaf.shape))

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    logits = apply(model, jax.tree_util.tree_map_with_path(weight, shapes), x)
    expected = np.load(small_golden_dir / "deeplabv3plus.npz")["logits"]
    assert float(np.abs(expected).std()) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=2e-4)


def test_interpolation_keeps_constants_and_ramps():
    ramp = jnp.broadcast_to(jnp.arange(5.0)[None, None, :, None], (1, 4, 5, 2))
    wide = resize(ramp, (7, 15))
    assert wide.shape == (1, 7, 15, 2)
    np.testing.assert_allclose(wide[0, 3, :, 0], np.clip((np.arange(15) + 0.5) / 3 - 0.5, 0, 4), atol=1e-6)
    np.testing.assert_array_equal(resize(jnp.full((1, 1, 1, 1), 3.0), (2, 3)), np.full((1, 2, 3, 1), 3.0))


@pytest.mark.parametrize("decoder", DECODERS)
def test_smoothing_reaches_every_part_but_the_ends(decoder):
    options = {"symmetric": True, "weight_bits": 4, "act_bits": 4}
    plain, variables = made(decoder, **options)
    smooth = tiny(decoder, **options, smoothing=models.Smoothing(gamma2=0.02, output=True))
    before, after = (apply(m, variables, images(), return_states=True)[1] for m in (plain, smooth))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert sum(map(_variation, after)) < sum(map(_variation, before))


def _variation(x):
    return float(jnp.abs(jnp.diff(x, axis=1)).sum() + jnp.abs(jnp.diff(x, axis=2)).sum())


@pytest.fixture(scope="module")
def calibrated():
    model, variables = made("deeplabv3plus", symmetric=True, weight_bits=4, act_bits=4)
    return model, models.calibrate_clips(model, variables, images(4), train=True)


def test_its_faithfulness_is_measured_with_labels_that_do_not_count(calibrated):
    model, variables = calibrated
    labels = np.array(jax.random.randint(jax.random.key(1), (2, 33, 46), 0, CLASSES))
    labels[:, :20] = -1
    found = measure.compare(model, variables, [(images(), labels)], BITS)
    assert len(found.layer_error) == len(model.blocks)
    low = apply(model, variables, images(), bits=BITS).argmax(-1)
    counted = labels >= 0
    assert found.accuracy == pytest.approx(np.mean((low == labels)[counted]))
    assert 0.5 < found.agreement <= 1


def test_bits_are_traced_block_by_block_through_the_decoder(calibrated):
    model, variables = calibrated
    bits = jnp.full(len(model.blocks), 4).at[-1].set(2)
    uniform = apply(model, variables, images(), bits=BITS, return_states=True)[1]
    changed = apply(model, variables, images(), bits=qpde.Bits(4, bits), return_states=True)[1]
    for a, b in zip(uniform[:-1], changed[:-1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert bool((jnp.abs(uniform[-1] - changed[-1]) > 1e-3).any())


def test_its_distributions_are_seen_block_by_block(calibrated):
    model, variables = calibrated
    found = measure.distributions(model, variables, [images()], BITS)
    assert {row.block for row in found} == set(range(len(model.blocks)))


def test_a_trained_network_is_quantized_without_labels():
    model, variables = made("unet", symmetric=True)
    variables = measure.reestimate_statistics(model, variables, [images(4)], model.bits)  # as after a training
    low, quantized = ptq.quantize(model, variables, [images(4)], qpde.Bits(8, 8))
    exact, rounded = apply(model, variables, images(4)), apply(low, quantized, images(4))
    assert rounded.shape == exact.shape
    assert float(jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)) < 0.1


def test_saved_and_loaded_it_predicts_the_same_map(calibrated, tmp_path):
    model, variables = calibrated
    qpde.save(tmp_path, model, variables, classes=["a", "b", "c"], input_shape=(33, 46, 3))
    network = qpde.load(tmp_path)
    assert network.model == model
    x = np.asarray(images(3))
    np.testing.assert_array_equal(network.predict(x), apply(model, variables, x).argmax(-1))
    assert network.predict(x[:0]).shape == (0, 33, 46)


@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "unet", "symmetric": True},
        {"encoder": "mobilenetv2", "stages": (1, 1, 2, 2), "symmetric": True, "weight_bits": 4, "act_bits": 8},
        {"encoder": "resnet20", "stages": (1, 2, 2), "symmetric": False, "weight_bits": 4, "act_bits": 8},
    ],
    ids=str,
)
def test_its_integer_program_computes_what_it_does(options):
    """Dilated, depthwise and strided convolutions, joined and interpolated maps, two stems."""
    is_unet = options.get("decoder") == "unet"
    model, variables = made(**options) if is_unet else made(output_stride=16, **options)
    if not is_unet:  # the same parameters, at half the stride
        model = tiny(output_stride=8, **options)
    logits, codes = deploy.run_reference(deploy.fold(model, variables), np.asarray(images()))
    expected = apply(model, variables, images())
    assert logits.shape == (2, 33, 46, CLASSES)
    # A sum in another order can move a value across a rounding threshold.
    assert float(np.abs(logits - expected).mean()) < 1e-3 * float(np.abs(expected).mean())
    assert len(codes) == 0 if is_unet else min(code.max() for code in codes.values()) > 0


def test_it_runs_elsewhere_from_every_file(calibrated, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, variables = calibrated
    network = qpde.TrainedNetwork(model, variables, ("a", "b", "c"), (33, 46, 3))
    packed, graph, program = deploy.export(network, tmp_path, ("packed", "onnx", "stablehlo"), settle=True)
    x = np.asarray(images(3))
    folded = deploy.load_packed(packed)
    expected, codes = deploy.run_reference(folded, x)
    found, found_codes = deploy.run(folded, return_codes=True)(x)
    assert all(np.array_equal(codes[name], found_codes[name]) for name in codes)
    session = onnxruntime.InferenceSession(str(graph))
    logits = jax.export.deserialize(bytearray(program.read_bytes())).call(x)
    for other in (found, session.run(["logits"], {"images": x})[0], logits):
        np.testing.assert_allclose(other, expected, atol=1e-5)
    with pytest.raises(ValueError, match="export by onnx or stablehlo"):
        deploy.export(network, tmp_path, ("c",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "resnet19"}, "did you mean 'resnet18'"),
        ({"stem_stride": 3}, r"stem_stride \(=3\) must be 1, 2 or 4"),
        ({"output_stride": 12}, "must be one of 4, 8, 16, 32"),
        ({"encoder": "resnet20", "stem_stride": 2, "output_stride": 16}, "must lie in 8 to 8"),
        ({"decoder_width": 4}, r"decoder_width \(=4\)"),
        ({"decoder_widt": 4}, "did you mean 'decoder_width'?"),
        ({"head": "scaled"}, r"head \(='scaled'\)"),
        ({"smoothing": models.Smoothing(blocks=(99,))}, "names block 99"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("deeplabv3plus", num_classes=CLASSES, **options)


def test_an_image_that_is_too_small_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="at least 32x32"):
        jax.eval_shape(model.init, jax.random.key(0), images(1, (31, 64)))
    assert isinstance(model.architecture, SegmentationArchitecture)
