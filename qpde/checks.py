"""Checks of arguments that several operators share. Each returns the argument as the operator uses it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_variables", "known_value", "scalar", "whole_number"]


def known_value(x: Any) -> np.ndarray | None:
    """Get the value of a number or an array where it is known: None for a traced array, or one of other processes.

    Args:
      x: Number or array.
    """
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def scalar(name: str, value: Any) -> Any:
    """Check that a value is a number, or an array of JAX of shape ().

    Args:
      name: Name of the argument, for the message.
      value: What was given.
    Raises:
      ValueError: Another shape, which the gradient would have too.
    """
    if np.shape(value) != ():
        raise ValueError(f"`{name}` has shape {np.shape(value)}; it must be one number: take one of them by an index")
    return value.item() if isinstance(value, np.ndarray) else value


def whole_number(name: str, value: Any, *, least: int) -> int:
    """Check that a value is a whole number, and return it as an int.

    Args:
      name: Name of the argument, for the message.
      value: What was given.
      least: The smallest that is allowed.
    Raises:
      ValueError: A fraction, a float such as 2.0, or less than `least`.
    """
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` (={value!r}) must be a whole number, {least} or more")
    return int(value)


def check_variables(variables: Any, where: str) -> None:
    """ValueError for variables that no network can run with: NaN or infinite numbers, clips that are not positive.

    Args:
      variables: Collections, nested or by path.
      where: What messages call them, such as the name of a file.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = np.asarray(leaf)
        if jnp.issubdtype(value.dtype, jnp.inexact) and not np.isfinite(value).all():
            raise ValueError(
                f"{where}: {name} holds NaN or infinite numbers: the training diverged, or the file is damaged"
            )
        if name.endswith("clips") and not (value > 0).all():
            raise ValueError(
                f"{where}: {name} holds {value.min()}, and clips must be positive: raise them by qpde.project after "
                "every step of training"
            )
