"""Norms of linear maps by power iteration, which needs only products with a map and with its adjoint."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from qpde.checks import whole_number
from qpde.devices import vary_alike

__all__ = ["LinearMap", "power_iteration_step", "power_iterations", "spectral_norm"]

LinearMap = Callable[[Array], Array]


def spectral_norm(
    linear_map: LinearMap,
    shape: tuple[int, ...],
    *,
    adjoint: LinearMap | None = None,
    iterations: int = 20,
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """Largest singular value of a linear map, by power iteration.

    |A|_2 = max |A x| / |x|, from v <- A^T A v / |A^T A v|. The estimate rises to the value from below; from a
    random start its relative error shrinks by (s2/s1)^4 an iteration, s1 >= s2 >= ... the singular values
    (Golub and Van Loan, 8.2), and is of the order log(n) / `iterations` at worst, when many lie close
    together (Kuczynski and Wozniakowski 1992). A bound that must hold therefore needs a margin: choose h with
    h |A|^2 <= 1.9, not 2.

    The gradient with respect to what the map closes over is exact at convergence: it flows through the last
    iteration only, d|A| = <u, dA v> with the singular vectors u, v held fixed.

    Args:
      linear_map: x of `shape` -> y, linear.
      shape: Shape of x. A map on images keeps its batch axis: (1, H, W, C).
      adjoint: y -> x, its exact adjoint; by default the vjp of `linear_map`.
      iterations: Products with A^T A, at least 1.
      key: Random key of the random start.
    Returns:
      Scalar float32 estimate, never above the true norm (up to rounding); 0 for the zero map. Squares of norms must be
        numbers of float32: outside 1e-18 to 1e18 scale the map.
    Raises:
      ValueError: `iterations` < 1.

    >>> kernel = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> norm = spectral_norm(lambda x: kernel @ x, (3,), key=jax.random.key(0))
    >>> round(float(norm), 4)
    3.0
    """
    iterations = whole_number("iterations", iterations, least=1)
    if adjoint is None:
        _, pullback = jax.vjp(linear_map, jnp.zeros(shape, jnp.float32))
        adjoint = first_cotangent(pullback)
    v = jax.random.normal(key, shape, jnp.float32)
    return power_iterations(linear_map, adjoint, v / two_norm(v), iterations)[0]


def power_iterations(
    linear_map: LinearMap, adjoint: LinearMap, v: Float[Array, "..."], iterations: int
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Several times `power_iteration_step`: the last sigma, through which gradients flow, and the last v'.

    Args:
      linear_map: A, x -> y.
      adjoint: A^T, y -> x.
      v: |v| = 1, the start.
      iterations: How many steps, at least 1.
    Returns:
      sigma, a scalar, and v'.
    """

    def step(v):
        return power_iteration_step(linear_map, adjoint, v)[1]

    (v,) = vary_alike(lax.stop_gradient(v), like=jax.eval_shape(step, v))
    v = lax.fori_loop(0, iterations - 1, lambda _, v: step(v), v)
    return power_iteration_step(linear_map, adjoint, v)


def power_iteration_step(
    linear_map: LinearMap, adjoint: LinearMap, v: Float[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """One iteration of `spectral_norm` from v, for a norm that is followed through training.

    u = A v / |A v|, sigma = |A^T u|, v' = A^T u / sigma. Of the estimates that two products allow this is the
    later: |A v| <= sigma <= |A v'| <= |A|. No gradient flows through u and v; the one of sigma is <u, dA v'>,
    the gradient of the norm itself once v has converged. From the previous training step's v one iteration is
    enough.

    Args:
      linear_map: A, x -> y.
      adjoint: A^T, y -> x, exact: the gradient of sigma flows through it.
      v: |v| = 1, any shape that A takes; for instance what the last call returned.
    Returns:
      sigma, a scalar, and v', both in v's dtype. Where A v = 0 they are 0 and v itself.
    """
    v = lax.stop_gradient(v)
    u = lax.stop_gradient(linear_map(v))
    w = adjoint(direction(u, two_norm(u))).astype(v.dtype)
    sigma = two_norm(w).astype(v.dtype)
    v = jnp.where(sigma == 0, v, direction(w, sigma))
    return sigma, lax.stop_gradient(v)


def first_cotangent(pullback):
    """The pullback of a function of one argument, without the tuple around its result."""

    def apply(cotangent):
        (gradient,) = pullback(cotangent)
        return gradient

    return apply


def two_norm(x):
    """The 2-norm, in float32 at least, with gradient 0 instead of NaN at x = 0."""
    square = jnp.sum(jnp.square(wide(x)))
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def direction(x, length):
    """x / length, and 0 where the length is 0."""
    return (wide(x) / jnp.where(length == 0, 1, length)).astype(x.dtype)


def wide(x):
    """x in float32 at least."""
    return x if x.dtype.itemsize > 4 else x.astype(jnp.float32)
