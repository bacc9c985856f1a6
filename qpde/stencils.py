"""Finite differences on images, and the smoothing steps built from them.

Total-variation smoothing is one explicit step down a convex energy of the feature maps.  It removes outliers and
leaves maps piecewise constant, which is what a few quantization levels can represent.  With D x the forward
differences of x along H and along W, every kind of smoothing here has a flux F with potential E,

    S(x) = x - gamma2 D^T F(D x),        F(p) = g(p) p,        E(x) = sum Psi(D x),   Psi' = F,

and differs only in the diffusivity g.  "Coupled" kinds take s = |D x| of both axes together, the others treat each
axis alone, s = |d|; `eps` is the smoothing of the absolute value, and the contrast of the classical diffusivities.

    kind            g(s)                          couples  convex  largest stable gamma2
    isotropic       1 / sqrt(s^2 + eps^2)         yes      yes     eps/4   (Rudin, Osher and Fatemi 1992)
    anisotropic     1 / sqrt(s^2 + eps^2)         no       yes     eps/4   the paper's D_x + D_y
    huber           1 / max(s, eps)               no       yes     eps/4   F = clip(d/eps, -1, 1): clip and shift only
    linear          1                             no       yes     1/4     heat equation
    charbonnier     1 / sqrt(1 + s^2/eps^2)       yes      yes     1/4     (Charbonnier et al. 1997), eps * isotropic
    perona_malik_1  exp(-s^2/eps^2)               no       no      1/4     (Perona and Malik 1990)
    perona_malik_2  1 / (1 + s^2/eps^2)           no       no      1/4     (Perona and Malik 1990)
    weickert        1 - exp(-3.31488 (eps/s)^8)   yes      no      1/4     (Weickert 1998)

What holds for 0 <= gamma2 <= `max_stable_step`, with |D|^2 <= 8 and L the largest slope of F (see there):

    every kind              the maximum principle, and the energy `total_variation` of the kind never rises;
                            the mean of each channel is kept with Neumann and periodic borders
    convex kinds            |S(x) - S(y)| <= |x - y| in the Euclidean norm
    convex and not coupled  also order preserving, hence non-expansive in the maximum norm

Symmetry: steps commute with exchanging H and W, and with periodic shifts.  Uncoupled kinds commute with flips
(Neumann and periodic borders); coupled kinds do not, because the forward differences that meet in |D x| share the
upper left corner of a pixel.  Dirichlet borders put 0 behind the last row and column only: the differences of a map
with H rows are H in number, and the one before the first row is not among them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qpde.checks import known_value, scalar, whole_number

__all__ = [
    "ENERGIES",
    "Energy",
    "divergence",
    "gradient",
    "implicit_step",
    "max_stable_step",
    "smooth",
    "total_variation",
    "tv_step",
]

Boundary: TypeAlias = Literal["neumann", "periodic", "dirichlet"]
Real: TypeAlias = int | float | np.floating | Float[Array | np.ndarray, ""]
Image: TypeAlias = Float[Array | np.ndarray, "*batch height width channels"]
VectorField: TypeAlias = Float[Array | np.ndarray, "*batch height width channels 2"]


def gradient(x: Image, *, boundary: str = "neumann") -> Float[Array, "*batch height width channels 2"]:
    """Forward differences, (D x)_H = x[i+1, j] - x[i, j] and (D x)_W = x[i, j+1] - x[i, j].

    Behind the last row and column lies the same value again ("neumann", the difference is 0), the first one
    ("periodic"), or 0 ("dirichlet").

    Args:
      x: (..., H, W, C), floating.
      boundary: "neumann", "periodic" or "dirichlet".
    Returns:
      (..., H, W, C, 2): the difference along H, then along W, in the dtype of `x`.
    Raises:
      ValueError: Unknown boundary, fewer than three axes, or a dtype that is not floating.

    >>> gradient(jnp.array([[1.0, 3.0, -2.0]])[..., None])[0, :, 0, 1].tolist()
    [2.0, -5.0, 0.0]
    """
    x = _checked_image(x)
    along_h, along_w = _differences(x, boundary)
    return jnp.stack([along_h[..., 1:, 1:, :], along_w[..., 1:, 1:, :]], axis=-1)


def divergence(p: VectorField, *, boundary: str = "neumann") -> Float[Array, "*batch height width channels"]:
    """Minus the exact adjoint of `gradient`: <D x, p> = <x, -div p> for all x and p.

    div p = p_H[i, j] - p_H[i-1, j] + p_W[i, j] - p_W[i, j-1], where nothing flows in before the first row and column
    (unless periodic), and with Neumann borders nothing flows out behind the last ones.

    Args:
      p: (..., H, W, C, 2), floating; along H, then along W.
      boundary: As in `gradient`.
    Returns:
      (..., H, W, C) in the dtype of `p`.
    Raises:
      ValueError: As in `gradient`, or the last axis of `p` is not of length 2.
    """
    p = jnp.asarray(p)
    if p.ndim < 4 or p.shape[-1] != 2:
        raise ValueError(f"`p` has shape {p.shape}; it must be (..., H, W, C, 2), as `gradient` returns it")
    along_h, along_w = (_checked_image(p[..., axis]) for axis in range(2))
    rows, columns = _border_masks(along_h, boundary)
    along_h, along_w = (_extended(p, boundary, behind=False) for p in (along_h, along_w))
    return _divergence(along_h * rows, along_w * columns)


def total_variation(
    x: Image, *, eps: Real, kind: str = "isotropic", boundary: str = "neumann"
) -> Float[Array, "*batch channels"]:
    """The energy that a step of this kind goes down, one value per image and channel: sum over pixels of Psi(D x).

    Psi is sqrt(|D x|^2 + eps^2) for "isotropic", the same per axis for "anisotropic", the Huber function for "huber",
    d^2/2 for "linear", and the potential of the flux for the others.  The derivative in `x` is -div F(D x).

    Args:
      x: (..., H, W, C), floating; computed in float32 at least.
      eps: Positive; a Python number, or a scalar array; a traced one is not checked.
      kind: A key of `ENERGIES`.
      boundary: As in `gradient`.
    Returns:
      (..., C), in float32 or wider.
    Raises:
      ValueError: As in `gradient`; unknown kind; `eps` not positive and finite.

    >>> x = jnp.array([[0.0, 0.0, 3.0]])[..., None]
    >>> total_variation(x, eps=1.0, kind="huber").tolist()
    [2.5]
    """
    x = _checked_image(x)
    row = _kind(kind)
    x = x.astype(_wide(x))
    eps = _checked_eps(eps, x.dtype)
    along_h, along_w = (d[..., 1:, 1:, :] for d in _differences(x, boundary))
    axes = (-3, -2)
    if row.coupled:
        return jnp.sum(row.density(_squared_length(along_h, along_w), eps), axis=axes)
    of_h, of_w = (jnp.sum(row.density(d * d, eps), axis=axes) for d in (along_h, along_w))
    return of_h + of_w


def max_stable_step(*, eps: Real, kind: str = "isotropic") -> float | Float[Array, ""]:
    """The largest gamma2 of an explicit step: 2 / (|D|^2 L) with |D|^2 <= 8, L the largest slope of the flux.

    At s = 0 the diffusivity g and the slope F' are largest and equal, L = 1/eps for the total-variation kinds and 1
    for the classical ones; elsewhere g <= L and F' <= L (F' may be negative, which only loosens the descent).  Thus:
    the new value is an average of the old one and its neighbours, weights gamma2 g <= 1/4 each: maximum principle.
    The curvature of the energy is at most 8 L: it never rises for gamma2 <= 2/(8 L).  Where F is monotone, a gradient
    step of a convex, 8 L-smooth energy is non-expansive for the same gamma2.

    Args:
      eps: Positive; a Python number, or a scalar array (then so is the result).
      kind: A key of `ENERGIES`.
    Returns:
      eps/4 or 1/4, see the table of the module.
    Raises:
      ValueError: Unknown kind; `eps` not positive and finite.

    >>> max_stable_step(eps=0.5), max_stable_step(eps=0.5, kind="linear")
    (0.125, 0.25)
    """
    row = _kind(kind)
    return _bound(row, _checked_eps(eps))


def tv_step(
    x: Image, *, gamma2: Real, eps: Real, kind: str = "isotropic", boundary: str = "neumann"
) -> Float[Array, "*batch height width channels"]:
    """One explicit smoothing step, S(x) = x + gamma2 div F(D x).

    Args:
      x: (..., H, W, C), floating.  Images and channels do not see each other.  Half precision is computed in float32
        and rounded once, which keeps the maximum principle.
      gamma2: Step, between 0 and `max_stable_step`.  A Python number is checked.  A scalar array (a learned step) is
        clamped to that interval; its gradient is 0 outside, not at the ends, so project a learned one onto it.
      eps: Positive; a Python number, or a scalar array; a traced one is not checked.
      kind: A key of `ENERGIES`.
      boundary: As in `gradient`.
    Returns:
      The smoothed x, same shape and dtype.
    Raises:
      ValueError: As in `total_variation`; `gamma2` negative, not finite, or beyond the bound.
    """
    return smooth(x, steps=1, gamma2=gamma2, eps=eps, kind=kind, boundary=boundary)


def smooth(
    x: Image,
    *,
    steps: int = 3,
    gamma2: Real,
    eps: Real,
    kind: str = "isotropic",
    boundary: str = "neumann",
) -> Float[Array, "*batch height width channels"]:
    """Take several explicit steps, each as `tv_step` does.

    Args:
      x: Images (..., H, W, C), floating.
      steps: Number of steps, static, 0 (the identity) or more.
      gamma2: Size of a step, as in `tv_step`.
      eps: Width of the quadratic part, as in `tv_step`.
      kind: Key of `ENERGIES`.
      boundary: Borders, as in `gradient`.
    Returns:
      The smoothed x, of the same shape and dtype.
    Raises:
      ValueError: As in `tv_step`; `steps` not a whole number of 0 or more.
    """
    x = _checked_image(x)
    wide = _wide(x)
    eps = _checked_eps(eps, wide)
    gamma2 = _checked_step(gamma2, eps, kind, wide)
    steps = whole_number("steps", steps, least=0)
    return _explicit_steps(x.astype(wide), gamma2, eps, steps, kind, boundary).astype(x.dtype)


def implicit_step(
    x: Image, *, gamma2: Real, eps: Real, kind: str = "isotropic", boundary: str = "neumann"
) -> Float[Array, "*batch height width channels"]:
    """One semi-implicit step, stable for every gamma2: lagged diffusivity and additive operator splitting.

    S(x) = 1/2 sum over the two axes of (I + 2 gamma2 D_a^T g(D x) D_a)^-1 x   (Weickert, ter Haar Romeny and Viergever
    1998).  To first order in gamma2 it is the explicit step.  Each inverse is an average with positive weights, so the
    maximum principle holds and, with Neumann and periodic borders, means are kept, whatever gamma2 is; descent of the
    energy and non-expansiveness are not claimed.

    Args:
      x: Images (..., H, W, C), floating.
      eps: Width of the quadratic part, as in `tv_step`.
      kind: Key of `ENERGIES`.
      boundary: Borders, as in `gradient`.
      gamma2: Step, 0 or more, no upper bound.  A scalar array is clamped at 0 from below.
    Returns:
      The smoothed x, same shape and dtype.
    Raises:
      ValueError: As in `total_variation`; `gamma2` negative or not finite.
    """
    x = _checked_image(x)
    wide = _wide(x)
    eps = _checked_eps(eps, wide)
    gamma2 = _checked_nonnegative(gamma2, wide)
    _kind(kind), _border_masks(x, boundary)  # checked for an image without pixels too
    if 0 in x.shape:
        return x
    return _implicit_step(x.astype(wide), gamma2, eps, kind, boundary).astype(x.dtype)


# --- The kinds: for a new one, write its two functions and its row. -------------------------------------------------

_Pointwise = Callable[[Array, Array | float], Array]


class Energy(NamedTuple):
    """One row of the table: functions of (s^2, eps), and the facts about them that the bounds rest on."""

    diffusivity: _Pointwise  # g(s)
    density: _Pointwise  # Psi(s), with Psi'(s) = s g(s)
    slope_is_one: bool  # the largest slope of the flux is 1; otherwise 1/eps
    coupled: bool  # s is the length of the whole gradient, not of one difference
    convex: bool  # s g(s) never falls
    flux: _Pointwise | None = None  # of (d, eps), where it is simpler than d g(|d|)


def _tv_diffusivity(squared, eps):
    return lax.rsqrt(squared + eps * eps)


def _tv_density(squared, eps):
    return jnp.sqrt(squared + eps * eps)


def _huber_diffusivity(squared, eps):
    return lax.rsqrt(jnp.maximum(squared, eps * eps))


def _huber_density(squared, eps):
    # Below the square root only where s > eps: the derivative of sqrt is infinite at 0.
    length = jnp.sqrt(jnp.maximum(squared, eps * eps))
    return jnp.where(squared <= eps * eps, squared / (2 * eps), length - eps / 2)


def _huber_flux(d, eps):
    return jnp.clip(d / eps, -1, 1)


def _linear_diffusivity(squared, eps):
    return jnp.ones_like(squared)


def _linear_density(squared, eps):
    return squared / 2


def _linear_flux(d, eps):
    return d


def _charbonnier_diffusivity(squared, eps):
    return lax.rsqrt(1 + squared / (eps * eps))


def _charbonnier_density(squared, eps):
    return eps * jnp.sqrt(squared + eps * eps)


def _perona_malik_1_diffusivity(squared, eps):
    return jnp.exp(-squared / (eps * eps))


def _perona_malik_1_density(squared, eps):
    return -eps * eps / 2 * jnp.expm1(-squared / (eps * eps))


def _perona_malik_2_diffusivity(squared, eps):
    return 1 / (1 + squared / (eps * eps))


def _perona_malik_2_density(squared, eps):
    return eps * eps / 2 * jnp.log1p(squared / (eps * eps))


_WEICKERT = 3.31488  # makes the flux rise below s = eps and fall beyond


def _weickert_exponent(squared, eps):
    # Outside these limits g is 1, or below 1e-15, in float32, and the derivative of the power would be infinite.
    ratio = jnp.clip(squared / (eps * eps), 0.1, 1e4)
    return _WEICKERT / (ratio * ratio * ratio * ratio)


def _weickert_diffusivity(squared, eps):
    return -jnp.expm1(-_weickert_exponent(squared, eps))


def _weickert_density(squared, eps):
    # Integral of s (1 - exp(-u)), u = c (eps/s)^8: by parts, and with t = u the rest is an incomplete gamma function.
    u = _weickert_exponent(squared, eps)
    tail = math.gamma(0.75) * jax.scipy.special.gammaincc(jnp.full_like(u, 0.75), u)
    return (-squared * jnp.expm1(-u) + _WEICKERT**0.25 * eps * eps * tail) / 2


ENERGIES: dict[str, Energy] = {  # diffusivity, density, slope_is_one, coupled, convex
    "isotropic": Energy(_tv_diffusivity, _tv_density, False, True, True),
    "anisotropic": Energy(_tv_diffusivity, _tv_density, False, False, True),
    "huber": Energy(_huber_diffusivity, _huber_density, False, False, True, flux=_huber_flux),
    "linear": Energy(_linear_diffusivity, _linear_density, True, False, True, flux=_linear_flux),
    "charbonnier": Energy(_charbonnier_diffusivity, _charbonnier_density, True, True, True),
    "perona_malik_1": Energy(_perona_malik_1_diffusivity, _perona_malik_1_density, True, False, False),
    "perona_malik_2": Energy(_perona_malik_2_diffusivity, _perona_malik_2_density, True, False, False),
    "weickert": Energy(_weickert_diffusivity, _weickert_density, True, True, False),
}


# --- Steps, on checked arguments; compiled here, so that a call outside of jit is fused and cached too. ---------------


@partial(jax.jit, static_argnames=("steps", "kind", "boundary"), inline=True)
def _explicit_steps(x: Array, gamma2: Array | float, eps: Array | float, steps: int, kind: str, boundary: str) -> Array:
    # A gradient keeps one map per step and computes the fluxes again, which is cheaper than to store them; the loop
    # (not unrolled) keeps XLA from fusing one step into the next and computing its fluxes many times.
    @jax.checkpoint
    def step(x):
        return x + gamma2 * _divergence(*_flux(_kind(kind), *_differences(x, boundary), eps))

    return step(x) if steps == 1 else lax.fori_loop(0, steps, lambda _, x: step(x), x)


@partial(jax.jit, static_argnames=("kind", "boundary"), inline=True)
def _implicit_step(x: Array, gamma2: Array | float, eps: Array | float, kind: str, boundary: str) -> Array:
    row = _kind(kind)
    along_h, along_w = (d[..., 1:, 1:, :] for d in _differences(x, boundary))
    if row.coupled:
        diffusivities = [row.diffusivity(_squared_length(along_h, along_w), eps)] * 2
    else:
        diffusivities = [row.diffusivity(d * d, eps) for d in (along_h, along_w)]
    by_h, by_w = (
        _diffuse_along(x, 2 * gamma2 * g, axis=axis, boundary=boundary)
        for axis, g in zip((-3, -2), diffusivities, strict=True)
    )
    return 0.5 * (by_h + by_w)


# --- Stencils on the extended grid -----------------------------------------------------------------------------------
#
# Differences live on H + 1 by W + 1 points, one before the first row and column, so that the divergence needs slices
# only.  XLA makes two passes of a step, one pad of x and everything else.  Slices and pads change places in a gradient;
# in this form it still fuses well on a CPU, where others vectorise badly: pads of differences took 4 times as long,
# `where` for the masks twice, edge padding 8 times.


def _differences(x: Array, boundary: str) -> tuple[Array, Array]:
    rows, columns = _border_masks(x, boundary)
    x = _extended(x, boundary)
    here, below, right = x[..., :-1, :-1, :], x[..., 1:, :-1, :], x[..., :-1, 1:, :]
    return (below - here) * rows, (right - here) * columns


def _extended(x: Array, boundary: str, *, behind: bool = True) -> Array:
    """One more row and column before the first ones, and behind the last ones: of zeros, or what lies there."""
    if boundary != "periodic" or 0 in x.shape:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, int(behind))] * 2 + [(0, 0)])
    for axis in (x.ndim - 3, x.ndim - 2):
        size = x.shape[axis]
        ends = [lax.slice_in_dim(x, size - 1, size, axis=axis), lax.slice_in_dim(x, 0, 1, axis=axis)]
        x = jnp.concatenate([ends[0], x, *ends[1 : 1 + behind]], axis=axis)
    return x


def _divergence(along_h: Array, along_w: Array) -> Array:
    inner_h, inner_w = along_h[..., 1:, :], along_w[..., 1:, :, :]
    return inner_h[..., 1:, :, :] - inner_h[..., :-1, :, :] + inner_w[..., 1:, :] - inner_w[..., :-1, :]


def _border_masks(x: Array, boundary: str) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """0 for the differences across a border that carry no flux, 1 for the others; they multiply the extended grid."""

    def mask(size) -> Array | np.ndarray:
        # Constants, unless a program is exported for sizes that are symbols.
        xp = np if isinstance(size, int) else jnp
        index = xp.arange(size + 1)
        first, last = x.dtype.type(boundary == "periodic"), x.dtype.type(boundary != "neumann")
        return xp.where(index == 0, first, xp.where(index == size, last, x.dtype.type(1)))

    if boundary not in ("neumann", "periodic", "dirichlet"):
        raise ValueError(f"unknown boundary {boundary!r}; choose 'neumann', 'periodic' or 'dirichlet'")
    height, width = x.shape[-3:-1]
    leading = (1,) * (x.ndim - 3)
    return mask(height).reshape(*leading, -1, 1, 1), mask(width).reshape(*leading, 1, -1, 1)


def _squared_length(along_h: Array, along_w: Array) -> Array:
    return along_h * along_h + along_w * along_w


def _flux(row: Energy, along_h: Array, along_w: Array, eps: Array | float) -> tuple[Array, Array]:
    if row.coupled:
        g = row.diffusivity(_squared_length(along_h, along_w), eps)
        return along_h * g, along_w * g
    if row.flux is not None:
        return row.flux(along_h, eps), row.flux(along_w, eps)
    g_h, g_w = (row.diffusivity(d * d, eps) for d in (along_h, along_w))
    return along_h * g_h, along_w * g_w


# --- Implicit diffusion along one axis -------------------------------------------------------------------------------


def _diffuse_along(x: Array, weight: Array, *, axis: int, boundary: str) -> Array:
    """Solve (I + D^T weight D) u = x along `axis`; `weight` belongs to the difference after each position."""
    x, weight = jnp.moveaxis(x, axis, 0), jnp.moveaxis(weight, axis, 0)

    def matvec(u):
        if boundary == "periodic":
            flux = weight * (jnp.roll(u, -1, axis=0) - u)
            return u - flux + jnp.roll(flux, 1, axis=0)
        flux = weight[:-1] * (u[1:] - u[:-1])
        nothing = jnp.zeros_like(u[:1])
        last = -weight[-1:] * u[-1:] if boundary == "dirichlet" else nothing
        flux = jnp.concatenate([nothing, flux, last])
        return u - (flux[1:] - flux[:-1])

    def solve(_, b):
        if boundary == "periodic":
            return _solve_ring(weight[:-1], weight[-1], b)
        return _solve_path(weight[:-1], weight[-1] if boundary == "dirichlet" else jnp.zeros_like(b[-1]), b)

    # The derivative is another solve with the same matrix, whatever `solve` does inside.
    u = lax.custom_linear_solve(matvec, x, solve, symmetric=True)
    return jnp.moveaxis(u, 0, axis)


# Both solvers eliminate node by node without a single subtraction.  Read the matrix as a resistor network: node i has
# conductance 1 to a source of potential b[i], and weight[i] to node i+1.  A removed node joins its neighbours, a star
# of conductances a, b, c turning into a triangle of ab/(a+b+c), bc/(a+b+c), ca/(a+b+c).  All terms are positive, so
# every result is an average of sources in floating point too, however large the weights.  (lax.linalg's
# tridiagonal_solve takes four times as long on a CPU, where it visits the systems one by one.)


def _solve_path(weight: Array, behind: Array, b: Array) -> Array:
    """u of (I + D^T weight D) u = b along axis 0; `behind` ties the last node to potential 0."""

    def eliminate(carry, node):
        own, current = carry  # conductance to the sources so far, and their current
        weight, b = node
        own, current = own + 1, current + b
        to_next = weight / (own + weight)
        return (own * to_next, current * to_next), (current / (own + weight), to_next)

    zero = jnp.zeros_like(behind)
    (own, current), eliminated = lax.scan(eliminate, (zero, zero), (weight, b[:-1]))
    last = (current + b[-1]) / (own + 1 + behind)

    def substitute(following, node):
        source, to_next = node
        u = source + to_next * following
        return u, u

    _, others = lax.scan(substitute, last, eliminated, reverse=True)
    return jnp.concatenate([others, last[None]])


def _solve_ring(weight: Array, around: Array, b: Array) -> Array:
    """As `_solve_path`, with the last node tied to the first one by `around`: a second neighbour for every node."""

    def eliminate(carry, node):
        own, current, to_last, last_own, last_current = carry
        weight, b = node
        own, current = own + 1, current + b
        total = own + weight + to_last
        next_share, last_share = weight / total, to_last / total
        carry = (own * next_share, current * next_share, weight * last_share,
                 last_own + own * last_share, last_current + current * last_share)  # fmt: skip
        return carry, (current / total, next_share, last_share)

    zero = jnp.zeros_like(around)
    carry, eliminated = lax.scan(eliminate, (zero, zero, around, zero, zero), (weight, b[:-1]))
    own, current, _, last_own, last_current = carry
    last = (current + last_current + b[-1]) / (own + last_own + 1)

    def substitute(following, node):
        source, next_share, last_share = node
        u = source + next_share * following + last_share * last
        return u, u

    _, others = lax.scan(substitute, last, eliminated, reverse=True)
    return jnp.concatenate([others, last[None]])


# --- Checks: on Python numbers only, arrays may be traced ------------------------------------------------------------


def _checked_image(x: Array | np.ndarray) -> Array:
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"`x` has shape {x.shape}; it must be (..., H, W, C): add the missing axes, x[..., None]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`x` has dtype {x.dtype}; it must be floating: x.astype(jnp.float32)")
    return x


def _wide(x: Array) -> np.dtype:
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else np.dtype(np.float32)


def _kind(kind: str) -> Energy:
    if kind not in ENERGIES:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(ENERGIES)}")
    return ENERGIES[kind]


def _bound(row: Energy, eps: Array | float) -> Array | float:
    return 0.25 if row.slope_is_one else eps / 4


def _checked_eps(eps: Real, dtype: np.dtype | None = None) -> Array | float:
    eps, value = scalar("eps", eps), known_value(eps)
    # Its square must be a normal float32, or flat regions would divide 0 by 0.
    if value is not None and not 1e-18 <= value <= 1e18:
        raise ValueError(f"`eps` (={eps}) must be positive and finite, between 1e-18 and 1e18")
    if isinstance(eps, jax.Array):
        return eps if dtype is None else eps.astype(dtype)
    return float(eps)


def _checked_nonnegative(gamma2: Real, dtype: np.dtype) -> Array | float:
    gamma2 = scalar("gamma2", gamma2)
    if isinstance(gamma2, jax.Array):
        gamma2 = gamma2.astype(dtype)
        return jnp.where(gamma2 < 0, jnp.zeros_like(gamma2), gamma2)
    if not 0 <= gamma2 < math.inf:
        raise ValueError(f"`gamma2` (={gamma2}) must be finite and 0 or more")
    return float(gamma2)


def _checked_step(gamma2: Real, eps: Array | float, kind: str, dtype: np.dtype) -> Array | float:
    gamma2, bound = _checked_nonnegative(gamma2, dtype), _bound(_kind(kind), eps)
    if isinstance(gamma2, jax.Array) or isinstance(bound, jax.Array):
        # `where`, not `minimum`: the gradient at the bound itself is 1, so a step can start there and learn.
        gamma2, bound = jnp.asarray(gamma2, dtype), jnp.asarray(bound, dtype)
        return jnp.where(gamma2 > bound, bound, gamma2)
    if gamma2 > bound * (1 + 1e-6):  # the slack of a float32 `eps`
        raise ValueError(
            f"`gamma2` (={gamma2}) is beyond the largest stable step {bound} of kind {kind!r} for eps={eps}: "
            "take max_stable_step(eps=..., kind=...), more `steps`, a larger `eps`, or `implicit_step`"
        )
    return gamma2
