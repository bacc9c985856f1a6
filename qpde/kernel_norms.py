"""Proven upper bounds of the norm of a convolution with zero borders.

Power iteration (`qpde.norms.spectral_norm`) approaches a norm from below, which proves nothing. Two ways that do:

    symbol          On an unbounded image the convolution multiplies the frequency w by the matrix
                    k(w) = sum_t k_t e^{i w t}. Zero borders only cut its input and output, so |K| <= max_w |k(w)| for
                    every image size, stride and padding. v^T k(w) u is a trigonometric polynomial of degree
                    d = (taps - 1) / 2 along each axis, so its maximum is at most that over N equidistant points an
                    axis, divided by cos(pi d / N) for each axis (Ehlich and Zeller, 1964).
    factorisation   |K| <= c if c^2 I - K^T K has a Cholesky factor. For one image size, borders included, where the
                    symbol is a few per cent too large. Rows of the image are blocks of a banded matrix.

Both run on the host in float64; the second is exact up to its rounding errors, of relative size 1e-10.
"""

import numpy as np
from jaxtyping import Array, Float

__all__ = ["conv_norm_bound", "conv_norm_is_at_most", "depthwise_norm_bound"]


def conv_norm_bound(kernel: Float[Array | np.ndarray, "kh kw c_in c_out"], *, points: int = 32) -> float:
    """An upper bound of |K| on images of any size, for every stride and padding, from the symbol.

    Args:
      kernel: HWIO, odd size.
      points: N, frequencies an axis, more than the taps. With 3 taps the bound is at most 1.0 % above the largest
        |k(w)| at N = 32, for 1x1 kernels it is exact.
    Returns:
      The bound.
    Raises:
      ValueError: A kernel of even size, or NaN or infinite; too few points.
    """
    return _symbol_bound(kernel, points, lambda symbol: np.linalg.norm(symbol, 2, axis=(2, 3)))


def depthwise_norm_bound(kernel: Float[Array | np.ndarray, "kh kw 1 c"], *, points: int = 32) -> float:
    """Bound the norm of a depthwise convolution, whose symbol is diagonal.

    Args:
      kernel: (kh, kw, 1, C), odd size.
      points: Frequencies on each axis, as for `conv_norm_bound`.
    Raises:
      ValueError: As `conv_norm_bound`.
    """
    return _symbol_bound(kernel, points, lambda symbol: np.abs(symbol).max((2, 3)))


def _symbol_bound(kernel, points, norm):
    kernel = _checked(kernel)
    taps = kernel.shape[:2]
    if points <= max(taps):
        raise ValueError(f"`points` (={points}) must exceed the kernel's taps {taps}: 32 are enough for 3x3")
    # Along an axis with one tap the symbol is constant. The kernel is real: half of the frequencies are conjugates.
    height, width = (1 if t == 1 else points for t in taps)
    symbol = np.fft.fft(np.fft.rfft(kernel, width, axis=1), height, axis=0)
    aliasing = np.prod([np.cos(np.pi * (t - 1) / 2 / points) for t in taps])
    return float(norm(symbol).max() / aliasing)


def conv_norm_is_at_most(
    kernel: Float[Array | np.ndarray, "kh kw c_in c_out"],
    bound: float,
    size: tuple[int, int],
    *,
    padding: int | None = None,
) -> bool:
    """Whether |K| <= bound on images of one size, proven by a Cholesky factorisation of bound^2 I - K^T K.

    The work is that of height * taps^2 products of square matrices of width * c_in rows: a second for 32x32x16.

    Args:
      kernel: HWIO, odd size.
      bound: Not negative.
      size: Height and width of the input.
      padding: As for `qpde.operators.conv`, at stride 1.
    Returns:
      True is a proof. False means a larger norm, or one within 1e-9 of the bound.
    Raises:
      ValueError: A kernel of even size, or NaN or infinite; a bound that is negative or NaN.
    """
    kernel = _checked(kernel)
    if not bound >= 0:
        raise ValueError(f"`bound` (={bound}) must be at least 0: no norm is smaller")
    rows = _rows(kernel, size[1], _padding(kernel.shape[1], padding))
    reach, pad, height = kernel.shape[0] - 1, _padding(kernel.shape[0], padding), size[0]
    outputs = range(height + 2 * pad - reach)

    def block(i, j):
        """Rows i and j <= i of bound^2 I - K^T K."""
        taps = [(i - o + pad, j - o + pad) for o in outputs if j - o + pad >= 0 and i - o + pad <= reach]
        gram = sum(rows[a] @ rows[b].T for a, b in taps) if taps else np.zeros((len(rows[0]),) * 2)
        return bound**2 * (1 - 1e-9) * np.eye(len(gram)) * (i == j) - gram

    factor: dict[tuple[int, int], np.ndarray] = {}
    try:
        for i in range(height):
            for j in range(max(0, i - reach), i + 1):
                s = block(i, j) - sum(factor[i, k] @ factor[j, k].T for k in range(max(0, i - reach), j))
                factor[i, j] = np.linalg.cholesky(s) if i == j else np.linalg.solve(factor[j, j], s.T).T
            factor = {key: value for key, value in factor.items() if key[0] > i - reach}
    except np.linalg.LinAlgError:
        return False
    return True


def _checked(kernel):
    kernel = np.asarray(kernel, np.float64)
    if any(taps % 2 == 0 for taps in kernel.shape[:2]):
        raise ValueError(f"`kernel` has even size {kernel.shape[:2]}; pad it with a row or column of zeros")
    if not np.isfinite(kernel).all():
        raise ValueError("`kernel` is NaN or infinite, and so has no norm: look for what made it so")
    return kernel


def _padding(taps, padding):
    return (taps - 1) // 2 if padding is None else padding


def _rows(kernel, width, pad):
    """For each row of taps the matrix (W C_in, W_out C_out) that takes a row of pixels to one of outputs."""
    taps, c_in, c_out = kernel.shape[1:]
    width_out = width + 2 * pad - taps + 1
    matrices = np.zeros((len(kernel), width, c_in, width_out, c_out))
    for b in range(taps):
        for o in range(width_out):
            if 0 <= o + b - pad < width:
                matrices[:, o + b - pad, :, o, :] = kernel[:, b]
    return matrices.reshape(len(kernel), width * c_in, width_out * c_out)
