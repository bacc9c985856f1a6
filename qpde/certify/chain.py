"""The certificate of a user's own chain of parts, see `qpde.nn.Chain`."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qpde.bits import Bits
from qpde.certify.proof import Certificate, pair_norms, proof
from qpde.certify.step_bounds import StepBounds, in_float64, rounded_link, step_bounds, to_float64

__all__ = ["certify_chain", "exact_chain"]


def certify_chain(
    model: Any,
    variables: Mapping[str, Any],
    x: Array,
    bits: Bits,
    *,
    newton_steps: Any,
    steps: StepBounds | None,
) -> Certificate:
    """`qpde.certify.certify` of a network with `links`."""
    links, own, scalars = _bound(model, variables, x, bits)
    if steps is None:
        steps = step_bounds(model, variables, x.shape[1:], bits)
    else:
        steps.check(model, variables, x.shape[1:], bits)
    with jax.default_matmul_precision("highest"):
        states = _run(links, own, x, scalars)
        rounded = [rounded_link(*bound) for bound in zip(links, own, scalars, strict=True)]
    _check_logits(states[-1])
    bounds, extra = list(steps.bounds), 0.0
    has_head = links[-1].class_kernel(rounded[-1]) is not None
    if has_head:  # its constant is that of pairs of logits, and only its quantizer counts here
        head = bounds.pop()
        extra = head.injected / head.lipschitz if head.lipschitz > 0 else 0.0
    a_priori = 0.0
    for step in bounds:
        a_priori = step.lipschitz * a_priori + step.injected
    with in_float64():
        lipschitz = np.array([step.lipschitz for step in bounds])
        found = _proof(links, rounded, states, lipschitz, a_priori + extra, newton_steps, has_head=has_head)
        return jax.device_get(found)


def exact_chain(model: Any, variables: Mapping[str, Any], x: Array, bits: Bits) -> np.ndarray:
    """`qpde.certify.exact_twin` of a network with `links`."""
    links, own, scalars = _bound(model, variables, x, bits)
    rounded = [rounded_link(*bound) for bound in zip(links, own, scalars, strict=True)]
    with in_float64():
        return np.asarray(_twin(links, to_float64(rounded), to_float64(x)))


def _bound(model, variables, x, bits):
    """Links, their variables, and their bits."""
    return tuple(tuple(part) for part in zip(*model.links(variables, x, bits), strict=True))


@partial(jax.jit, static_argnames="links")
def _run(links, own, x, bits):
    """States of the quantized chain as it runs, the input first."""
    states = [x]
    for link, variables, widths in zip(links, own, bits, strict=True):
        states.append(link.run(variables, states[-1], widths))
    return states


@partial(jax.jit, static_argnames="links")
def _twin(links, rounded, x):
    for link, variables in zip(links, rounded, strict=True):
        x = link.twin(variables, x)
    return x


@partial(jax.jit, static_argnames=("links", "has_head"))
def _proof(links, rounded, states, lipschitz, a_priori, newton_steps, *, has_head):
    rounded, logits = to_float64(rounded), states[-1]
    twin = [partial(link.twin, own) for link, own in zip(links, rounded, strict=True)]
    head, prediction = (lambda state: state), jnp.argmax(logits, axis=-1)
    # |z_i - z_k| moves by at most sqrt(2) when the logits move by 1.
    pair = jnp.where(jnp.arange(logits.shape[-1])[None] == prediction[:, None], 0.0, math.sqrt(2))
    if has_head:
        *twin, head = twin
        states, pair = states[:-1], pair_norms(links[-1].class_kernel(rounded[-1]), prediction)
    return proof(twin, to_float64(list(states)), logits, head, lipschitz, pair, a_priori, newton_steps)


def _check_logits(logits):
    if logits.ndim != 2:
        raise ValueError(
            f"the chain ends with {logits.shape}, and a certificate is about one prediction for each input: let it end "
            "with logits (N, classes), behind qpde.nn.global_mean or qpde.nn.flatten"
        )
