"""Spectra of Jacobians: how much a step amplifies a small perturbation, and in which directions.

A step x - h K^T s(K x) with a nondecreasing, 1-Lipschitz s has the symmetric Jacobian I - h K^T D K with 0 <= D <= 1,
whose eigenvalues lie in [1 - h |K|^2, 1]. Only reverse mode is used, since `custom_vjp` rules out forward mode: J v is
the vjp of the vjp.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from qpde.norms import direction, first_cotangent, two_norm, wide

__all__ = ["DENSE_LIMIT", "JacobianSpectrum", "jacobian_spectrum"]

# The largest side of a Jacobian that is written out: 64 MiB in float32.
DENSE_LIMIT = 4096


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
      key: Random key of the random start of "lanczos".
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
    y, pullback = jax.vjp(lambda v: wide(f(v.astype(x.dtype))), wide(x))
    transposed = first_cotangent(pullback)
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
    jacobian = first_cotangent(second_pullback)  # the transpose of u -> J^T u

    def lanczos(product):
        if x.size == 0:
            return jnp.zeros(0, y.dtype)
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
        length = two_norm(w)
        return direction(w, length), length

    def step(i, carry):
        basis, q, diagonal, off_diagonal = carry
        basis = basis.at[i].set(q)
        w = product(q)
        q_next, length = unit(w, basis)
        fresh, _ = unit(jax.random.normal(jax.random.fold_in(key, i + 1), (n,), dtype), basis)
        closed = length <= 8 * jnp.finfo(dtype).eps * two_norm(w)
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
