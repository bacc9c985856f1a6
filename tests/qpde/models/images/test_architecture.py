"""Shapes of networks, without running one: parameters, widths, and options that are refused."""

import dataclasses
import math

import pytest

from qpde import models

PUBLISHED_COUNTS = [
    ("resnet20", 10, 272_474, 175_706),
    ("resnet56", 10, 855_770, 468_698),
    ("stablenet20", 10, 223_450, 112_858),
    ("stablenet56", 10, 806_746, 405_850),
    ("mobilenetv2", 10, 2_236_074, 1_719_306),
    ("resnet18", 10, 11_173_962, 8_040_522),
    ("resnet34", 100, 21_328_292, 13_144_484),
    ("stablenet34", 100, 18_056_100, 9_061_284),
]


@pytest.mark.parametrize(("name", "classes", "plain", "symmetric"), PUBLISHED_COUNTS)
def test_parameter_counts_equal_the_published_networks(name, classes, plain, symmetric):
    for is_symmetric, expected in ((False, plain), (True, symmetric)):
        model = models.create(name, num_classes=classes, symmetric=is_symmetric)
        assert models.summary(model, (32, 32, 3)).parameters == expected


@pytest.mark.parametrize(("name", "per_stage"), [("stablenet20x2", 6), ("stablenet56x2", 18)])
def test_doubled_networks_have_the_blocks_of_the_table(name, per_stage):
    assert [len(stage) for stage in models.create(name, num_classes=10).stages] == [per_stage] * 3


@pytest.mark.parametrize(("name", "millions"), [("resnet32", 0.46), ("resnet44", 0.66), ("resnet110", 1.7)])
def test_depths_of_he_et_al_have_their_parameters(name, millions):
    """Table 6 of "Deep residual learning", with the projections that widen the shortcut here."""
    model = models.create(name, num_classes=10, symmetric=False)
    assert models.summary(model, (32, 32, 3)).parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_a_tied_resnet32_has_the_parameters_of_a_plain_resnet20():
    tied = models.create("resnet32", num_classes=10, norm="tied", step_size="auto")
    plain = models.create("resnet20", num_classes=10, symmetric=False)
    assert models.summary(tied, (32, 32, 3)).parameters == models.summary(plain, (32, 32, 3)).parameters


def test_an_expanded_tied_resnet20_has_the_kernels_of_a_plain_one():
    tied = models.create("resnet20", num_classes=10, norm="tied", expansion=2.0)
    plain = models.create("resnet20", num_classes=10, symmetric=False)
    assert tied.blocks[1].kernel_shapes() == {"kernel1": (3, 3, 16, 32)}
    assert tied.blocks[3] == dataclasses.replace(plain.blocks[3], norm="tied")  # the first of a stage stays as it is

    def of_kernels(model):
        return sum(math.prod(shape) for block in model.blocks for shape in block.kernel_shapes().values())

    assert of_kernels(tied) == of_kernels(plain)


def test_the_expansion_of_mobilenet_multiplies_its_own():
    model = models.create("mobilenetv2", num_classes=10, expansion=0.5)
    assert {block.expansion for block in model.blocks if block.symmetric} == {3}
    assert {block.expansion for block in model.blocks if not block.symmetric} == {1, 6}


@pytest.mark.parametrize("name", ["resnet20", "stablenet20"])
def test_a_wider_network_has_as_many_times_the_channels(name):
    narrow = models.create(name, num_classes=10)
    wide = models.create(name, num_classes=10, width=1.5)
    assert wide.architecture.stages == ((24, 24, 3, 1, 1), (24, 48, 3, 2, 1), (48, 96, 3, 2, 1))
    assert [block.width_in * 2 for block in wide.blocks] == [block.width_in * 3 for block in narrow.blocks]
    assert "width 1.5" in wide.architecture.name
    assert models.create(name, num_classes=10, width=1.0) == narrow


def test_the_neck_of_mobilenet_grows_but_does_not_shrink():
    necks = {w: models.create("mobilenetv2", num_classes=2, width=w).architecture.neck_width for w in (0.5, 1.0, 1.5)}
    assert necks == {0.5: 1280, 1.0: 1280, 1.5: 1920}


def test_the_encoder_of_a_segmentation_network_has_a_width():
    model = models.create("unet", num_classes=3, encoder="resnet20", width=0.5)
    assert model.architecture.stages == ((8, 8, 3, 1, 1), (8, 16, 3, 2, 1), (16, 32, 3, 2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet21"}, "resnet20.*pde_gcn"),
        ({"weight_bits": 1}, "weight_bits must be 2 to 32.*got 1"),
        ({"act_bits": 33}, "act_bits must be 2 to 32.*got 33"),
        ({"step_size": 0.0}, "positive.*got 0.0"),
        ({"step_size": float("nan")}, "positive"),
        ({"step_size": "fast"}, "'auto'.*'fast'"),
        ({"step_size": "auto"}, "norm='tied'"),
        ({"lipschitz_target": 2.5}, "lipschitz_target.*2.5.*at most 2"),
        ({"lipschitz_target": float("nan")}, "lipschitz_target"),
        ({"expansion": 0.03}, r"expansion \(=0.03\) must.*a channel where x has 16"),
        ({"expansion": float("inf")}, r"expansion \(=inf\) must be finite"),
        ({"norm": "batch"}, "separate, tied, spectral"),
        ({"residual": "exact"}, "rounded, precise"),
        ({"head": "normed"}, "dense, scaled"),
        ({"levels": "log"}, "uniform, pot, apot"),
        ({"loop": "while"}, "auto, scan, unroll"),
        ({"num_classes": 0}, "num_classes.*0"),
        ({"width": 0.0}, r"width \(=0.0\) must be positive.*1 keeps the channels of resnet20"),
        ({"width": float("inf")}, "width.*finite"),
        ({"width": 0.03}, r"width \(=0.03\) leaves a stage of resnet20 without channels"),
        ({"widht": 2.0}, "unknown option 'widht'; did you mean 'width'?"),
        ({"signed_inputs": True}, "mobilenetv2"),
        ({"smoothing": models.Smoothing(gamma2=1.0)}, "max_stable_step"),
        ({"smoothing": models.Smoothing(blocks=(9,))}, "blocks 0 to 8"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        models.create(**({"name": "resnet20", "num_classes": 10} | options))
