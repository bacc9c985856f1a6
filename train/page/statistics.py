"""How sure a page can be of its numbers: intervals of shares, a paired test, and errors in decibels."""

import math

import numpy as np
from scipy.stats import binomtest


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927).

    It stays within 0 and 1, and has a width where the share is 0 or 1.

    Args:
      count: Inputs of the kind that is counted.
      total: All inputs, at least 1.
    Returns:
      The lowest and the highest share.
    """
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test (1947): are two networks equally accurate, judged by the same images?

    Only images count that one of them gets right and the other wrong. Equally accurate networks would share them like
    tosses of a coin.

    Args:
      first: Whether the first network is right, by image.
      second: Whether the second is, by image.
    Returns:
      Images that only the first gets right, those that only the second does, and the two-sided p-value.
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(~first & second))
    if only_first + only_second == 0:
        return 0, 0, 1.0
    return only_first, only_second, float(binomtest(only_first, only_first + only_second).pvalue)


def decibels(relative_error: float) -> float:
    """Signal to quantization noise (SQNR) of a relative error, |a| / |a - a_q| in dB; infinite where it is 0."""
    return -20 * math.log10(relative_error) if relative_error > 0 else math.inf
