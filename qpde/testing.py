"""Checks for those who write stencils, steps and quantizers of their own, and hypothesis strategies to feed them.

    from qpde.testing import check_adjoint, check_non_expansive, check_maximum_principle

    check_adjoint(my_gradient, lambda p: -my_divergence(p), (2, 8, 8, 3))
    check_non_expansive(lambda x: my_step(x, gamma2=0.25), (1, 8, 8, 1))
    check_maximum_principle(lambda x: my_step(x, gamma2=0.25), (1, 8, 8, 1))

Every check takes a function and the shape of its input, tries inputs that are known to be hard, compiles the function
once, and raises an `AssertionError` that names what was violated, by how much, and on which input. Nothing is proven.
The strategies draw from few shapes, so that a compiled function is used again. They need hypothesis, the checks do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array

from qpde.bits import LARGEST_BITS, SMALLEST_BITS

__all__ = [
    "IMAGE_SHAPES",
    "bits",
    "check_adjoint",
    "check_conserves",
    "check_gradient_step",
    "check_maximum_principle",
    "check_non_expansive",
    "check_straight_through",
    "graphs",
    "hard_images",
    "images",
    "kernels",
]

Map = Callable[[Any], Any]


def check_adjoint(
    linear: Map, adjoint: Map, shape: tuple[int, ...], *, trials: int = 5, seed: int = 0, tolerance: float = 1e-5
) -> None:
    """Check that <A x, y> = <x, B y> for random x and y, that B keeps x's shape, and that A is linear.

    Args:
      linear: A, x -> y, arrays.
      adjoint: B, y -> x.
      shape: Shape of x.
      trials: Pairs to try.
      seed: Seed of the random numbers.
      tolerance: Largest difference of the two products, relative to |A x| |y| + |x| |B y|.
    Raises:
      AssertionError: naming the larger product and the difference.
    """
    linear, adjoint = jax.jit(linear), jax.jit(adjoint)
    rng = np.random.default_rng(seed)
    range_shape = jax.eval_shape(linear, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    for trial in range(trials):
        x, other = (_normal(rng, shape) for _ in range(2))
        y = _normal(rng, range_shape)
        ax, by = linear(x), adjoint(y)
        if by.shape != x.shape:
            raise AssertionError(f"the adjoint maps {y.shape} to {by.shape}, but the map is from {x.shape}")
        left, right = _dot(ax, y), _dot(x, by)
        scale = _norm(ax) * _norm(y) + _norm(x) * _norm(by)
        if not abs(left - right) <= tolerance * scale:
            raise AssertionError(
                f"not adjoint: <A x, y> = {left:.6g}, <x, B y> = {right:.6g} in trial {trial}; they differ by "
                f"{_relative(abs(left - right), scale):.1e} of their size, more than {tolerance:.0e}"
            )
        error = _norm(linear(x - 2 * other) - (ax - 2 * linear(other)))
        size = _norm(ax) + 2 * _norm(linear(other))
        if not error <= tolerance * size:
            raise AssertionError(
                f"not linear: A(x - 2 z) and A x - 2 A z differ by {_relative(error, size):.1e} of their size"
            )


def check_non_expansive(
    step: Map,
    shape: tuple[int, ...],
    *,
    trials: int = 8,
    iterations: int = 200,
    seed: int = 0,
    tolerance: float = 1e-5,
    scale: float = 1.0,
) -> None:
    """Check that |S(x) - S(y)| <= |x - y|: for random pairs, near and far, and in the worst directions.

    Random directions miss a step that expands in a few: 1 - h |K|^2 below -1 belongs to one singular vector. So at
    several points, 0 among them, a power iteration on J^T J looks for the direction that grows most. Only reverse mode
    is used. The direction is also tried as a finite difference, since a straight-through gradient says nothing.

    Args:
      step: S, an array to an array.
      shape: Shape of x.
      trials: Points, and pairs.
      iterations: Power iterations at each point. A step that expands by 1% needs some hundred.
      seed: Seed of the random numbers.
      tolerance: Largest relative growth that is taken for rounding.
      scale: Size of the numbers in x.
    Raises:
      AssertionError: naming the growth and where it was found.
    """
    step = jax.jit(step)
    rng = np.random.default_rng(seed)
    points = [x * np.float32(scale) for x in _take(hard_images(shape, seed=seed), trials)]
    for i, x in enumerate(points):
        for distance in (1.0, 1e-2):
            y = x + np.float32(distance * scale) * _normal(rng, shape)
            _check_pair(step, x, y, tolerance, f"for a random pair at distance {distance:g} (point {i})")
    worst = jax.jit(lambda x, v: _worst_direction(step, x, v, iterations))
    for i, x in enumerate(points):
        growth, direction = worst(x, _normal(rng, shape))
        if not float(growth) <= 1 + tolerance:
            raise AssertionError(
                f"expansive: the derivative at point {i} multiplies its worst direction by {float(growth):.6g}"
            )
        length = np.float32(1e-2 * scale) * np.sqrt(np.float32(direction.size))
        for sign in (1, -1):
            _check_pair(step, x, x + sign * length * direction, tolerance, f"in the worst direction of point {i}")


def check_maximum_principle(
    step: Map, shape: tuple[int, ...], *, trials: int = 8, seed: int = 0, tolerance: float = 1e-5, scale: float = 1.0
) -> None:
    """Check that no value of S(x) lies outside the range of x, channel by channel and image by image.

    Random fields do not find a step of 0.3 where 1/4 is the limit: a spike does, and so does a checkerboard, whose
    pixels all differ from their neighbours by the full range. Both are tried, faint and strong, and noise.

    Args:
      step: S, images to images of the same shape.
      shape: (N, H, W, C), or (..., H, W, C).
      trials: Images to try.
      seed: Seed of the random numbers.
      tolerance: Error of rounding, relative to the largest |x|.
      scale: Size of the numbers in x. Where the step has a scale of its own, such as eps, try some around it.
    Raises:
      AssertionError: naming the value and the range.
    """
    step = jax.jit(step)
    for i, x in enumerate(_take(hard_images(shape, seed=seed), trials)):
        x = x * np.float32(scale)
        y = step(x)
        low, high = (np.asarray(reduce(x, axis=(-3, -2))) for reduce in (jnp.min, jnp.max))
        lowest, largest = (np.asarray(reduce(y, axis=(-3, -2))) for reduce in (jnp.min, jnp.max))
        slack = tolerance * float(jnp.abs(x).max())
        if not (np.all(lowest >= low - slack) and np.all(largest <= high + slack)):
            excess = float(np.max([np.max(low - lowest), np.max(largest - high)]))
            raise AssertionError(
                f"the maximum principle is violated on {_name(i)}: values leave the range of their channel, "
                f"[{low.min():.6g}, {high.max():.6g}] at most, by {excess:.3g}"
            )


def check_gradient_step(
    step: Map,
    energy: Map,
    step_size: float,
    shape: tuple[int, ...],
    *,
    trials: int = 5,
    seed: int = 0,
    tolerance: float = 1e-4,
    scale: float = 1.0,
) -> None:
    """Check that S(x) = x - h grad E(x), and that the energy does not rise.

    Args:
      step: S.
      energy: E, an array to a number (or numbers, which are added).
      step_size: h.
      shape: Shape of x.
      trials: Points to try.
      seed: Seed of the random numbers.
      tolerance: Largest difference, relative to the largest change of a number; and of energies, relative.
      scale: Size of the numbers in x.
    Raises:
      AssertionError: naming the difference.
    """
    total = jax.jit(lambda x: jnp.sum(energy(x)))
    step, slope = jax.jit(step), jax.jit(jax.grad(total))
    for i, x in enumerate(_take(hard_images(shape, seed=seed), trials)):
        x = x * np.float32(scale)
        moved, expected = step(x) - x, -step_size * slope(x)
        # Below, x - x leaves the rounding of x itself.
        size = float(jnp.abs(expected).max()) + 1e-2 * float(jnp.abs(x).max())
        error = float(jnp.abs(moved - expected).max())
        if not error <= tolerance * size:
            raise AssertionError(
                f"not a gradient step on {_name(i)}: S(x) - x and -h grad E(x) differ by {error:.3g}, "
                f"{_relative(error, size):.1e} of the size of a step"
            )
        before, after = float(total(x)), float(total(step(x)))
        if not after <= before + tolerance * abs(before):
            raise AssertionError(f"the energy rises on {_name(i)}: from {before:.6g} to {after:.6g}")


def check_conserves(
    step: Map,
    quantity: Map,
    shape: tuple[int, ...],
    *,
    trials: int = 5,
    seed: int = 0,
    tolerance: float = 1e-5,
    scale: float = 1.0,
) -> None:
    """Check that a quantity of S(x) is that of x, such as each channel's mean: `lambda x: x.mean((-3, -2))`.

    Args:
      step: S.
      quantity: An array to numbers.
      shape: Shape of x.
      trials: Points to try.
      seed: Seed of the random numbers.
      tolerance: Largest difference, relative to the larger of the quantity and the largest |x|.
      scale: Size of the numbers in x.
    Raises:
      AssertionError: naming both values.
    """
    both = jax.jit(lambda x: (quantity(x), quantity(step(x))))
    for i, x in enumerate(_take(hard_images(shape, seed=seed), trials)):
        x = x * np.float32(scale)
        before, after = (np.asarray(q, np.float64) for q in both(x))
        size = max(float(np.abs(before).max()), float(jnp.abs(x).max()))
        error = float(np.abs(after - before).max())
        if not error <= tolerance * size:
            raise AssertionError(
                f"not conserved on {_name(i)}: the quantity changes by {error:.3g}, "
                f"{_relative(error, size):.1e} of its size"
            )


def check_straight_through(
    quantizer: Map, *, low: float, high: float, count: int = 257, tolerance: float = 1e-6
) -> None:
    """Check that a quantizer rounds into its range, leaves its levels, and has the gradient of a clamp.

    For x inside [low, high] the derivative must be 1 and outside 0, whatever is rounded; Q(Q(x)) must be Q(x), and Q
    must not decrease. (The 2-bit weight quantizer of the published networks passes gradients everywhere.)

    Args:
      quantizer: Q, a vector to a vector, number by number, its clip and bits given.
      low: Lower end of the range.
      high: Upper end.
      count: Points to try, from one range below `low` to one above `high`.
      tolerance: Error of rounding, relative to the range.
    Raises:
      AssertionError: naming the point.
    """
    quantizer = jax.jit(quantizer)
    width = high - low
    # None of them at an end of the range, where the derivative is a convention.
    x = np.linspace(low - width, high + width, count, dtype=np.float32)
    x = x[(np.abs(x - low) > 1e-3 * width) & (np.abs(x - high) > 1e-3 * width)]
    y = np.asarray(quantizer(x))
    if np.any(bad := (y < low - tolerance * width) | (y > high + tolerance * width)):
        raise AssertionError(f"Q({x[bad][0]:.6g}) = {y[bad][0]:.6g} lies outside [{low:g}, {high:g}]")
    if np.any(bad := np.abs(np.asarray(quantizer(y)) - y) > tolerance * width):
        raise AssertionError(f"Q moves its own level {y[bad][0]:.6g} to {np.asarray(quantizer(y))[bad][0]:.6g}")
    if np.any(bad := np.diff(y) < -tolerance * width):
        raise AssertionError(f"Q decreases behind x = {x[:-1][bad][0]:.6g}")
    slopes = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(quantizer(x))))(x))
    expected = ((x >= low) & (x <= high)).astype(np.float32)
    if np.any(bad := ~(np.abs(slopes - expected) <= tolerance)):
        raise AssertionError(
            f"not straight through: the derivative at {x[bad][0]:.6g} is {slopes[bad][0]:.6g}, that of the clamp to "
            f"[{low:g}, {high:g}] is {expected[bad][0]:g}"
        )


_HARD = (
    "the zero image",
    "a spike",
    "a checkerboard",
    "a faint checkerboard",
    "noise",
    "a checkerboard with noise",
    "steps with noise",
    "strong noise",
)


def hard_images(shape: tuple[int, ...], *, seed: int = 0) -> Iterator[Array]:
    """Images, or arrays of any shape, on which steps fail first, without end.

    In turn: zeros, a spike, a checkerboard, a faint one, noise, both, steps with noise, strong noise.

    Args:
      shape: (..., H, W, C), or any other, whose last two axes but one then take the part of H and W.
      seed: Seed of the random numbers.
    """
    return _hard_images(shape, seed)


# Not annotated: a checker of annotations may draw random numbers, which hypothesis forbids inside a strategy.
def _hard_images(shape, seed):
    rng = np.random.default_rng(seed)
    plane = shape[-3:-1] if len(shape) >= 3 else shape
    tail = (1,) if len(shape) >= 3 else ()
    board = (np.indices(plane).sum(axis=0) % 2 * 2 - 1).reshape(*plane, *tail)
    spike = np.zeros(shape, np.float32)
    spike[tuple(slice(None) if i < len(shape) - 1 - len(plane) else n // 2 for i, n in enumerate(shape))] = 1.0
    while True:
        noise = rng.standard_normal(shape)
        steps = rng.integers(-2, 3, shape)
        for values in (0 * noise, spike, board, 1e-2 * board, noise, board + 0.1 * noise, steps + 1e-2 * noise):
            yield jnp.asarray(np.broadcast_to(values, shape), jnp.float32)
        yield jnp.asarray(30 * noise, jnp.float32)


# --- Strategies -------------------------------------------------------------------------------------------------------

IMAGE_SHAPES = ((2, 5, 7, 3), (1, 6, 2, 1), (2, 1, 8, 2))
"""Shapes of `images`: odd and even sides, one row, and few enough for a function to be compiled for all of them."""

KERNEL_SHAPES = ((3, 3, 3, 5), (1, 1, 2, 4), (5, 3, 1, 2))
GRAPH_SIZES = ((7, 11), (12, 20))


def images(shapes: tuple[tuple[int, ...], ...] = IMAGE_SHAPES, *, largest_scale: float = 1e3) -> Any:
    """A strategy of float32 images from few shapes: noise, spikes, checkerboards and steps, from faint to strong.

    Args:
      shapes: Shapes to draw from. Each costs a compilation of what is tested.
      largest_scale: Largest size of the numbers; the smallest is its inverse.
    """
    st = _strategies()

    def image(shape, seed, kind, power):
        return _pick(_hard_images(shape, seed), kind) * np.float32(largest_scale**power)

    return st.builds(image, st.sampled_from(shapes), _seeds(st), st.integers(0, len(_HARD) - 1), st.floats(-1, 1))


def kernels(shapes: tuple[tuple[int, ...], ...] = KERNEL_SHAPES, *, largest_scale: float = 10.0) -> Any:
    """A strategy of float32 kernels (kh, kw, C_in, C_out) from few shapes, normally distributed, of many scales.

    Args:
      shapes: Shapes to draw from.
      largest_scale: Largest standard deviation; the smallest is its inverse.
    """
    st = _strategies()

    def kernel(shape, seed, power):
        return _normal(np.random.default_rng(seed), shape) * np.float32(largest_scale**power)

    return st.builds(kernel, st.sampled_from(shapes), _seeds(st), st.floats(-1, 1))


def graphs(sizes: tuple[tuple[int, int], ...] = GRAPH_SIZES, *, channels: int = 3) -> Any:
    """A strategy of graphs as `qpde.graphs.from_edges` makes them, from few sizes, with normally distributed features.

    Args:
      sizes: (nodes, edges) to draw from. Edges are distinct and no loops; some nodes may be isolated.
      channels: Features of a node.
    """
    st = _strategies()

    def graph(size, seed) -> jraph.GraphsTuple:
        rng = np.random.default_rng(seed)
        nodes, count = size
        # From the smaller to the larger node, sorted by receiver, as `from_edges` would list them.
        pairs = np.array([(i, j) for j in range(nodes) for i in range(j)], np.int32)
        chosen = pairs[np.sort(rng.choice(len(pairs), count, replace=False))]
        return jraph.GraphsTuple(
            nodes=_normal(rng, (nodes, channels)),
            edges=None,
            globals=None,
            senders=jnp.asarray(chosen[:, 0]),
            receivers=jnp.asarray(chosen[:, 1]),
            n_node=jnp.array([nodes], jnp.int32),
            n_edge=jnp.array([count], jnp.int32),
        )

    return st.builds(graph, st.sampled_from(sizes), _seeds(st))


def bits(*, smallest: int = SMALLEST_BITS, largest: int = LARGEST_BITS) -> Any:
    """A strategy of bits as int32 scalars, which are traced: one program serves all of them.

    Args:
      smallest: Smallest number of bits.
      largest: Largest number of bits.
    """
    return _strategies().integers(smallest, largest).map(jnp.int32)


def _strategies():
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ImportError(
            "the strategies of qpde.testing need hypothesis: install it, or qpde with its extra [test]"
        ) from error
    return strategies


def _seeds(st):
    return st.integers(0, 2**31 - 1)


# --- Parts ------------------------------------------------------------------------------------------------------------


def _check_pair(step, x, y, tolerance, where):
    before, after = _norm(x - y), _norm(step(x) - step(y))
    # The roundings of S(x) and S(y) themselves do not vanish with their distance.
    slack = 1e-6 * (_norm(x) + _norm(y))
    if not after <= before * (1 + tolerance) + slack:
        raise AssertionError(f"expansive: a distance of {before:.6g} becomes {after:.6g} {where}")


def _worst_direction(step, x, v, iterations):
    """How much the derivative at x multiplies the direction that it multiplies most, and that direction."""
    y, transposed = jax.vjp(step, x)
    _, derivative = jax.vjp(lambda u: transposed(u)[0], jnp.zeros_like(y))

    def normalized(v):
        return v / jnp.maximum(jnp.sqrt(jnp.sum(v * v)), 1e-30)

    def iteration(_, v):
        return normalized(transposed(derivative(v)[0])[0])

    v = jax.lax.fori_loop(0, iterations, iteration, normalized(v))
    image = derivative(v)[0]
    return jnp.sqrt(jnp.sum(image * image)), v


def _name(index: int) -> str:
    return _HARD[index % len(_HARD)]


def _relative(error, size):
    return error / max(size, 1e-30)


def _take(values, count):
    return [next(values) for _ in range(count)]


def _pick(values, index):
    return _take(values, index + 1)[-1]


def _normal(rng, shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _dot(a, b) -> float:
    return float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))


def _norm(a) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64)))
