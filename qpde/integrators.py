"""Time steppers for x' = -f(x): a residual network is one of these, its layers are the steps.

`integrate` carries a state through a stack of steps, one set of parameters per step. A step is any function
`(state, params, step_size) -> state`; the schemes below build one from a vector field `f(state, params)`:

    integrate(partial(euler, f), params, x, step_size=0.1)

The sign is that of a gradient flow: if f is the gradient of an energy, the flow descends it. A state is any
pytree of arrays. Below, x_j is the state after j steps, theta_j the parameters of step j and h the step size.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float

from qpde.devices import vary_alike

__all__ = ["SCAN_FROM", "euler", "hamiltonian", "integrate", "leapfrog", "midpoint", "rk4"]

State = TypeVar("State")
Params = Any
StepSize = int | Float[ArrayLike, ""]
Field = Callable[[Any, Params], Any]

# The shortest stack that "auto" runs as a scan. XLA compiles a scan's body once: the gradient of a stage of
# quantized basic blocks compiles in 0.95 s at any depth, unrolled in 0.33 s a block (one CPU core). They meet at
# three blocks; up to there unrolling costs nothing and lets XLA fuse across steps.
SCAN_FROM = 4


def integrate(
    step: Callable[[Any, Params, Any], Any],
    params: Params,
    state: State,
    *,
    step_size: int | Float[ArrayLike, ""] | Float[ArrayLike, " steps"],
    loop: str = "auto",
    remat: bool = False,
    has_aux: bool = False,
) -> Any:
    """Carry a state through a stack of steps: x_{j+1} = step(x_j, theta_j, h_j), j = 0 .. L-1.

    Every `loop` gives the same result up to float32 rounding, gradients too. They differ in what the compiler
    sees: "scan" compiles one step whatever the depth, "unroll" compiles all and may fuse across them.

    Args:
      step: (state, params of one step, step size) -> state of the same structure and shapes, or (state, aux) if
        `has_aux`. The same function at every step: what varies goes into `params`.
      params: Pytree of arrays, each stacking the L steps on its leading axis. It may be empty (`None`) if
        `step_size` says how many steps there are.
      state: x_0, any pytree of arrays.
      step_size: h, a scalar for all steps or shape (L,); may be traced. The sign is not checked: a negative
        one integrates backwards.
      loop: "scan", "unroll", or "auto", which scans from `SCAN_FROM` steps on.
      remat: Recompute the intermediates of a step in the backward pass, so that only states are stored.
      has_aux: The step also returns an auxiliary pytree, for instance the state itself to record all of them.
    Returns:
      x_L, or (x_L, aux) with the L auxiliary values stacked on a leading axis if `has_aux`. Each leaf of x_L has the
        dtype of that of x_0: a step may compute in a wider one.
    Raises:
      ValueError: Stacks of different lengths (all leaves are listed), a leaf without leading axis, no steps,
        a `step_size` that is neither scalar nor (L,), an unknown `loop`, a whole number in the state that a step
        makes a fraction.

    >>> step = lambda x, k, h: x - h * k * x
    >>> print(integrate(step, jnp.array([1.0, 2.0]), jnp.array(8.0), step_size=0.25))
    3.0
    """
    if loop not in ("auto", "scan", "unroll"):
        raise ValueError(f'`loop` (={loop!r}) must be "auto", "scan" or "unroll"')
    length = _count_steps(params, step_size)
    scanned = loop == "scan" or (loop == "auto" and length >= SCAN_FROM)
    if remat:
        # Outside a scan only a barrier keeps XLA from merging the recomputation with the original.
        step = jax.checkpoint(step, prevent_cse=not scanned)
    per_step = jnp.ndim(step_size) == 1

    def advance(state, inputs):
        params_j, step_size_j = inputs if per_step else (inputs, step_size)
        result = step(state, params_j, step_size_j)
        new, aux = result if has_aux else (result, None)
        return _in_dtypes_of(state, new), aux

    inputs = (params, step_size) if per_step else params
    if scanned:
        state = _like_result(advance, state, inputs)
        state, aux = lax.scan(advance, state, inputs, length=length)
    else:
        records = []
        for inputs_j in _unstack(inputs, length):
            state, record = advance(state, inputs_j)
            records.append(record)
        aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
    return (state, aux) if has_aux else state


def euler(f: Field, state: State, params: Params, step_size: StepSize) -> State:
    """Forward Euler, order 1: x_{j+1} = x_j - h f(x_j).

    With f(x) = K^T s(K x), s monotone with slope at most 1, a step is non-expansive for h <= 2 / |K|^2: noise
    in x_j is carried along but never amplified.

    Args:
      f: Vector field (state, params) -> pytree like `state`.
      state: x_j.
      params: theta_j.
      step_size: h.
    Returns:
      x_{j+1}, in the shapes and dtypes of `state`: it is computed in the widest dtype of the three and rounded once.
    """
    return _descend(state, step_size, f(state, params))


def midpoint(f: Field, state: State, params: Params, step_size: StepSize) -> State:
    """Explicit midpoint rule, order 2: x_{j+1} = x_j - h f(x_j - h/2 f(x_j)).

    Two evaluations of `f`.

    Args:
      f: Vector field (state, params) -> pytree like `state`.
      state: x_j.
      params: theta_j.
      step_size: h.
    Returns:
      x_{j+1}, in the shapes and dtypes of `state`, as for `euler`.
    """
    middle = _descend(state, step_size / 2, f(state, params))
    return _descend(state, step_size, f(middle, params))


def rk4(f: Field, state: State, params: Params, step_size: StepSize) -> State:
    """The classical Runge-Kutta method, order 4 (Kutta, 1901): x_{j+1} = x_j - h/6 (k1 + 2 k2 + 2 k3 + k4).

    k1 = f(x_j), k2 = f(x_j - h/2 k1), k3 = f(x_j - h/2 k2), k4 = f(x_j - h k3).
    Four evaluations of `f`.

    Args:
      f: Vector field (state, params) -> pytree like `state`.
      state: x_j.
      params: theta_j.
      step_size: h.
    Returns:
      x_{j+1}, in the shapes and dtypes of `state`, as for `euler`.
    """
    k1 = f(state, params)
    k2 = f(_descend(state, step_size / 2, k1), params)
    k3 = f(_descend(state, step_size / 2, k2), params)
    k4 = f(_descend(state, step_size, k3), params)
    return jax.tree.map(
        _keep_dtype(lambda x, a, b, c, d: x - step_size * ((a + 2 * b + 2 * c + d) / 6)), state, k1, k2, k3, k4
    )


def leapfrog(f: Field, state: tuple[State, State], params: Params, step_size: StepSize) -> tuple[State, State]:
    """Leap-frog (Störmer-Verlet) for the wave equation x'' = -f(x), order 2.

    x_{j+1} = 2 x_j - x_{j-1} - h^2 f(x_j).

    It conserves instead of damping and runs backwards when the two states change places. For f(x) = K^T K x
    it is stable exactly if h^2 |K|^2 < 4.

    Args:
      f: Vector field (x, params) -> pytree like x.
      state: (x_j, x_{j-1}). A start with velocity v is x_{-1} = x_0 - h v - h^2/2 f(x_0); (x_0, x_0) starts
        at rest up to O(h).
      params: theta_j.
      step_size: h, the same at every step: the formula is of order 2 on an even grid only.
    Returns:
      (x_{j+1}, x_j).
    """
    x, before = state

    @_keep_dtype
    def after(x, before, slope):
        return 2 * x - before - step_size * step_size * slope

    return jax.tree.map(after, x, before, f(x, params)), x


def hamiltonian(f: Field, g: Field, state: tuple[State, Any], params: Params, step_size: StepSize) -> tuple[State, Any]:
    """Symplectic Euler for the pair y' = -f(z), z' = -g(y), order 1 (Hairer, Lubich and Wanner, 2006, VI.3).

    y_{j+1} = y_j - h f(z_j),   z_{j+1} = z_j - h g(y_{j+1}).

    If f = -dH/dz and g = dH/dy for an energy H(y, z) = G(y) + F(z), the step preserves volume in phase space
    and keeps H within O(h) over very long times. It inverts without solving: z_j = z_{j+1} + h g(y_{j+1}),
    then y_j = y_{j+1} + h f(z_j). Networks of this form: Haber and Ruthotto (2017), Stable architectures.

    Args:
      f: Vector field (z, params) -> pytree like y.
      g: Vector field (y, params) -> pytree like z.
      state: (y_j, z_j), for instance two halves of the channels.
      params: theta_j, handed to both fields.
      step_size: h.
    Returns:
      (y_{j+1}, z_{j+1}).
    """
    y, z = state
    y = _descend(y, step_size, f(z, params))
    z = _descend(z, step_size, g(y, params))
    return y, z


def _descend(state: Any, step_size: Any, slope: Any) -> Any:
    return jax.tree.map(_keep_dtype(lambda x, k: x - step_size * k), state, slope)


def _keep_dtype(formula: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A formula of one leaf x and others, computed in their widest dtype and rounded to that of x."""

    def kept(x, *others):
        # What is of several dtypes is promoted here, and only here, also where JAX was told to be strict.
        with jax.numpy_dtype_promotion("standard"):
            return _cast(x, formula(x, *others))

    return kept


def _in_dtypes_of(state: Any, new: Any) -> Any:
    """The new state in the dtypes of the old; one of another structure as it is, for `lax.scan` to explain."""
    structure: Any = jax.tree.structure(state)
    same = structure == jax.tree.structure(new)
    return jax.tree.map(_cast, state, new) if same else new


def _cast(x: Any, new: Any) -> Any:
    wanted, found = jnp.result_type(x), jnp.result_type(new)
    if wanted == found:
        return new
    if not jnp.issubdtype(wanted, jnp.inexact):
        raise ValueError(f"a step makes {found} of a state of {wanted}: give the state as floating-point numbers")
    return jnp.asarray(new).astype(wanted)


def _like_result(advance: Callable, state: State, inputs: Any) -> State:
    """The state, varying over the devices of `jax.shard_map` as it will after a step."""
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    new, _ = jax.eval_shape(advance, state, first)
    return vary_alike(state, like=new)[0]


def _count_steps(params: Params, step_size: Any) -> int:
    """The leading length that all stacks share, checked."""
    if jnp.ndim(step_size) > 1:
        raise ValueError(f"`step_size` has shape {jnp.shape(step_size)}: give a scalar or one value per step")
    shapes = {
        f"params{jax.tree_util.keystr(path)}": jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    if jnp.ndim(step_size) == 1:
        shapes["step_size"] = jnp.shape(step_size)
    if not shapes:
        raise ValueError(
            "the number of steps is unknown, as `params` has no arrays: pass one `step_size` value per step"
        )
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) > 1 or () in lengths:
        listing = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise ValueError(f"every leaf must stack the same number of steps on its leading axis, got {listing}")
    (length,) = lengths.pop()
    if length < 1:
        raise ValueError("at least one step is needed, got stacks of length 0")
    return length


def _unstack(stacked: Any, length: int) -> list[Any]:
    """One pytree per step. The gradient of `lax.split` is one concatenation, that of slices a sum of pads."""
    leaves, treedef = jax.tree.flatten(stacked)
    columns = [[lax.squeeze(part, (0,)) for part in lax.split(leaf, (1,) * length)] for leaf in leaves]
    return [jax.tree.unflatten(treedef, [column[j] for column in columns]) for j in range(length)]
