"""How much a step amplifies a perturbation: its maps' norms, its Lipschitz constant, its Jacobian's spectrum.

A step x - h K^T s(K x) with a nondecreasing, 1-Lipschitz s has the symmetric Jacobian I - h K^T D K with 0 <=
D <= 1. Its eigenvalues lie in [1 - h |K|^2, 1]: the step carries rounding errors along and never amplifies
them while h |K|^2 <= 2. Everything here needs only products with a map and with its adjoint, or reverse-mode
derivatives of a step: `custom_vjp` rules out forward mode, so J v is the vjp of the vjp. `certify`, which puts the
constants of all steps together, is that of `qpde.certificate`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

LinearMap = Callable[[Array], Array]

# The largest side of a Jacobian that is written out: 64 MiB in float32.
DENSE_LIMIT = 4096


def __getattr__(name: str):
    # The networks stand on this module and the certificate on the networks, so it is found when it is asked for.
    if name == "certify":
        from qpde.certificate import certify

        return certify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
      shape: of x. A map on images keeps its batch axis: (1, H, W, C).
      adjoint: y -> x, its exact adjoint; by default the vjp of `linear_map`.
      iterations: products with A^T A, at least 1.
      key: of the random start.
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
    if iterations < 1:
        raise ValueError(f"`iterations` (={iterations}) must be at least 1; 20 is enough for a step size")
    if adjoint is None:
        _, pullback = jax.vjp(linear_map, jnp.zeros(shape, jnp.float32))
        adjoint = _first(pullback)
    v = jax.random.normal(key, shape, jnp.float32)
    v = lax.fori_loop(0, iterations - 1, lambda _, v: power_iteration_step(linear_map, adjoint, v)[1], v / _norm(v))
    sigma, _ = power_iteration_step(linear_map, adjoint, v)
    return sigma


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
    w = adjoint(_direction(u, _norm(u))).astype(v.dtype)
    sigma = _norm(w).astype(v.dtype)
    v = jnp.where(sigma == 0, v, _direction(w, sigma))
    return sigma, lax.stop_gradient(v)


def step_lipschitz(
    norm: Float[ArrayLike, "*#layers"],
    second_norm: Float[ArrayLike, "*#layers"] | None = None,
    *,
    step_size: int | Float[ArrayLike, "*#layers"],
) -> Float[Array, "*layers"]:
    """Lipschitz constant, in the 2-norm, of a step with a nondecreasing, 1-Lipschitz s (ReLU, clip, tanh).

    Symmetric, x - h K^T s(K x + b): max(1, h |K|^2 - 1), so 1, non-expansive, up to h |K|^2 = 2.
    Plain, x - h K2 s(K1 x + b): 1 + h |K1| |K2|.

    Norm layers belong into the maps: K is D K for a tied norm of scale D. Unless that norm is tied the step
    is plain.

    Args:
      norm: |K|, or |K1|; for all layers or one per layer. An estimate from below needs a margin.
      second_norm: |K2| of a plain step, alike; None for the symmetric step.
      step_size: h >= 0, alike.
    Returns:
      The constant of each layer, never below 1. A sequence of steps has at most their product.
    """
    norm, h = jnp.asarray(norm), jnp.asarray(step_size, jnp.float32)
    if second_norm is None:
        return jnp.maximum(1.0, h * norm**2 - 1.0)
    return 1.0 + h * norm * jnp.asarray(second_norm)


class JacobianSpectrum(NamedTuple):
    """What `jacobian_spectrum` found at one point."""

    eigenvalues: Float[Array, " k"] | None
    """Of the symmetric part (J + J^T) / 2, ascending; None where f changes the shape."""
    singular_values: Float[Array, " m"]
    """Of J, descending; the first is the gain, the largest amplification of a small perturbation."""


def jacobian_spectrum(
    f: Callable[[Array], Array],
    x: Float[Array, "..."],
    *,
    method: str = "dense",
    num: int = 32,
    key: PRNGKeyArray | None = None,
) -> JacobianSpectrum:
    """Spectrum of the Jacobian J of f at x: the eigenvalues of its symmetric part and its singular values.

    "dense" writes J out, one vjp a row, and is exact; for maps of up to `DENSE_LIMIT` numbers. "lanczos"
    takes `num` Lanczos steps, fully reorthogonalised, on (J + J^T) / 2 and on J^T J: its values lie inside
    the true range and the outermost converge first, so they show how far the spectrum reaches, not how it is
    distributed (Golub and Van Loan, 10.1). Singular values below 3e-4 of the largest are lost in float32
    there, as roots of eigenvalues of J^T J.

    Only reverse mode is used, so f may contain `custom_vjp`; through a quantizer the spectrum is the one of
    its straight-through surrogate. For many points: `jax.vmap` or `jax.lax.map` over x, under `jax.jit`.

    Args:
      f: array -> array, differentiable in reverse mode; for "lanczos" its pullback too, in the cotangent.
      x: the point, any shape; a step on images keeps its batch axis.
      method: "dense" or "lanczos".
      num: Lanczos steps and so values of each kind, at least 1; at most x.size are taken. Unused by "dense".
      key: of the random start of "lanczos".
    Returns:
      `JacobianSpectrum` in x's dtype, float32 at least: with "dense" x.size eigenvalues and min(x.size, f(x).size)
        singular values.
    Raises:
      ValueError: an x that is not floating, an unknown method, `num` < 1, "lanczos" without a key, "dense" on too large
        a map.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`x` has dtype {x.dtype}; it must be floating: x.astype(jnp.float32)")
    # Only f itself is in half precision, where x is.
    y, pullback = jax.vjp(lambda wide: _wide(f(wide.astype(x.dtype))), _wide(x))
    transposed = _first(pullback)
    square = y.shape == x.shape
    if method == "dense":
        return _dense_spectrum(transposed, x, y, square)
    if method != "lanczos":
        raise ValueError(f"`method` (={method!r}) must be 'dense' or 'lanczos'")
    if num < 1:
        raise ValueError(f"`num` (={num}) must be at least 1")
    if key is None:
        raise ValueError("method 'lanczos' needs `key`, for instance jax.random.key(0)")

    _, second_pullback = jax.vjp(transposed, jnp.zeros_like(y))
    jacobian = _first(second_pullback)  # the transpose of u -> J^T u

    def lanczos(product):
        return _lanczos(lambda q: product(q.reshape(x.shape)).ravel(), x.size, min(num, x.size), key, y.dtype)

    eigenvalues = lanczos(lambda v: (jacobian(v) + transposed(v)) / 2) if square else None
    squares = lanczos(lambda v: transposed(jacobian(v)))
    return JacobianSpectrum(eigenvalues, jnp.sqrt(jnp.maximum(squares, 0))[::-1])


def _dense_spectrum(transposed, x, y, square):
    if max(x.size, y.size) > DENSE_LIMIT:
        raise ValueError(
            f"a dense Jacobian from {x.size} to {y.size} numbers is above the limit of {DENSE_LIMIT}; "
            "use method='lanczos' or a smaller map"
        )
    unit_vectors = jnp.eye(y.size, dtype=y.dtype).reshape(y.size, *y.shape)
    jacobian = jax.vmap(transposed)(unit_vectors).reshape(y.size, x.size)
    eigenvalues = jnp.linalg.eigvalsh((jacobian + jacobian.T) / 2) if square else None
    return JacobianSpectrum(eigenvalues, jnp.linalg.svd(jacobian, compute_uv=False))


def _lanczos(product, n, num, key, dtype):
    """Eigenvalues of the `num` x `num` tridiagonal section of a symmetric product, ascending.

    Where the Krylov space closes (for the identity after one step) the iteration goes on from a fresh random
    vector: the section then is block diagonal, and its values are still inside the true range.
    """

    def unit(w, basis):
        """w, orthogonal to the basis (twice is enough, Parlett 1998, 6.9) and normalised, and its length."""
        for _ in range(2):
            w = w - jnp.matmul(jnp.matmul(basis, w, precision="highest"), basis, precision="highest")
        length = _norm(w)
        return _direction(w, length), length

    def step(i, carry):
        basis, q, diagonal, off_diagonal = carry
        basis = basis.at[i].set(q)
        w = product(q)
        q_next, length = unit(w, basis)
        fresh, _ = unit(jax.random.normal(jax.random.fold_in(key, i + 1), (n,), dtype), basis)
        closed = length <= 8 * jnp.finfo(dtype).eps * _norm(w)
        return (
            basis,
            jnp.where(closed, fresh, q_next),
            diagonal.at[i].set(jnp.vdot(q, w, precision="highest")),
            off_diagonal.at[i].set(jnp.where(closed, 0, length)),
        )

    basis = jnp.zeros((num, n), dtype)
    start, _ = unit(jax.random.normal(jax.random.fold_in(key, 0), (n,), dtype), basis)
    zeros = jnp.zeros(num, dtype)
    _, _, diagonal, off_diagonal = lax.fori_loop(0, num, step, (basis, start, zeros, zeros))
    off = jnp.diag(off_diagonal[:-1], 1)
    return jnp.linalg.eigvalsh(jnp.diag(diagonal) + off + off.T)


def _first(pullback):
    """The pullback of a function of one argument, without the tuple around its result."""

    def apply(cotangent):
        (gradient,) = pullback(cotangent)
        return gradient

    return apply


def _norm(x):
    """The 2-norm, in float32 at least, with gradient 0 instead of NaN at x = 0."""
    square = jnp.sum(jnp.square(_wide(x)))
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _direction(x, length):
    """x / length, and 0 where the length is 0."""
    return (_wide(x) / jnp.where(length == 0, 1, length)).astype(x.dtype)


def _wide(x):
    return x if x.dtype.itemsize > 4 else x.astype(jnp.float32)
