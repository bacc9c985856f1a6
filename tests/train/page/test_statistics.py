"""Intervals and tests against published and exactly computed values."""

import math

import numpy as np
import pytest

from train.page.statistics import decibels, mcnemar, wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 / (1 + 1.959964**2 / 29), 1.0),
    ],
)
def test_wilson_s_intervals_are_those_of_the_literature(count, total, low, high):
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (0, 5, 2 / 2**5),
        (1, 7, 2 * (1 + 8) / 2**8),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_counts_and_tosses_coins(only_first, only_second, p):
    both, none = 10, 4
    first = np.repeat([True, True, False, False], [both, only_first, only_second, none])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, none])
    assert mcnemar(first, second) == pytest.approx((only_first, only_second, p), rel=1e-12)


def test_decibels_of_errors():
    assert decibels(0.1) == pytest.approx(20)
    assert decibels(1.0) == 0
    assert decibels(2.0) == pytest.approx(-6.0206, abs=1e-4)
    assert decibels(0.0) == math.inf
