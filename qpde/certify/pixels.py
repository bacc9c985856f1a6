"""The certificate of a segmentation network: pixels whose class the rounding of activations provably does not change.

A step may take several maps: they are interpolated to one size, and their channels stand side by side. With R_s the
interpolation of map s, errors of norms E_s are one of norm sqrt(sum (|R_s| E_s)^2) of the joined map. |R_s| is the
product of the norms along both axes. All else is as in `qpde.certify.certificate`.

One number for a whole map says little of a pixel. So bounds are kept of every pixel as well, of the 2-norm of its
channels: with K_t the taps of a convolution, e'(p) = sum_t |K_t| e(p + t). It knows where an error is, but adds up what
the norm of K knows to cancel. In the interior of an encoder that is much worse than the constant of the step, 1 for a
symmetric one. Near the logits it is much better, since a pixel has not the error of the whole map.

Both serve each defect by itself. Replace the twin's states by the candidate's one by one, from the first on: the change
of the last features is a sum, and each term starts at one defect d_j and goes through the steps behind j. Of every
term, at every step, the smaller of both bounds is kept. Smoothing has the bound of the whole map alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qpde.certify.proof import Certificate, conclude, jvp, norms, pair_norms
from qpde.certify.step_bounds import StepBounds, to_float64
from qpde.models.images.network import Network
from qpde.models.images.segmentation import SegmentationNetwork, interpolation, join, resize

__all__ = ["follow", "pixel_proof", "worst_case"]


def follow(model: Network, parts: Sequence[Callable[[Array], Array]], x: Array) -> tuple[Array, list[Array]]:
    """Logits, and the outputs of stems and blocks in order.

    Args:
      model: The network.
      parts: Its parts as functions of a map, in the order of `Network.bound_parts`.
      x: (N, H, W, C).
    """
    size, stems, states = (x.shape[1], x.shape[2]), len(model.stem_parts()), []
    for part in parts[:stems]:
        x = part(x)
        states.append(x)
    sources = _sources(model)
    for part, taken in zip(parts[stems:], sources, strict=False):
        states.append(part(join([states[s] for s in taken])))
    x = states[-1]
    for part in parts[stems + len(sources) :]:
        x = part(x)
    return resize(x, size) if isinstance(model, SegmentationNetwork) else x, states


def _sources(model: Network) -> list[tuple[int, ...]]:
    """For every block the states that it takes, by their number: stems first, then blocks."""
    places = {name: i for i, (name, _) in enumerate(model.stem_parts())}
    found, count = [], len(places)
    for layer in model.layers:
        taken = tuple(places[source] for source in layer.sources)
        for _ in layer.blocks:
            found.append(taken)
            taken, count = (count,), count + 1
        places[layer.name] = count - 1
    return found


def worst_case(model: Network, steps: StepBounds, size: tuple[int, int]) -> float:
    """By how much the last state differs from the twin's at most, for every image of that size.

    Args:
      model: The network.
      steps: Constants of its steps.
      size: Height and width of the images.
    """
    stems = model.stem_parts()
    bounds = [0.0] * len(stems)
    sizes = [own for _, _, own in model.sized_parts((*size, 3))][len(stems) :]
    shapes: list[tuple[int, int]] = [model.map_sizes((*size, 3))[name] for name, _ in stems]
    for step, block, own, taken in zip(steps.bounds, model.blocks, sizes, _sources(model), strict=False):
        entering = np.sqrt(sum((_gain(shapes[s], own) * bounds[s]) ** 2 for s in taken))
        bounds.append(float(step.lipschitz * entering + step.injected))
        shapes.append(block.output_size(*own))
    return bounds[-1]


def _gain(size: tuple[int, int], size_out: tuple[int, int]) -> float:
    """Norm of the interpolation."""
    if size == size_out:
        return 1.0
    return float(np.prod([np.linalg.norm(interpolation(*n), 2) for n in zip(size, size_out, strict=True)]))


def pixel_proof(
    model: SegmentationNetwork,
    parts: Sequence[Callable[[Array], Array]],
    x: Array,
    run: tuple[Array, Sequence[Array]],
    kernel: Array,
    lipschitz: Any,
    local: Sequence[Any],
    a_priori: Any,
    newton_steps: Any,
) -> Certificate:
    """The certificate of every pixel, in float64 and traced.

    Args:
      model: The network.
      parts: The twin's, as functions of a map.
      x: Images.
      run: Logits and states of the quantized network.
      kernel: (C, classes) of the head.
      lipschitz: (L,) L_j.
      local: Norms of the taps of every block, None where it smooths.
      a_priori: By how much the last state moves at most, for all images.
      newton_steps: Steps of Newton's method from the quantized network's states on. None: the candidate is the twin.
    """
    logits, states = run
    stems, steps, head = len(model.stem_parts()), parts[len(model.stem_parts()) : -1], parts[-1]
    sources, size = _sources(model), (x.shape[1], x.shape[2])
    start = []
    for part in parts[:stems]:
        x = part(x)
        start.append(x)
    states = [*start, *to_float64(list(states[stems:]))]

    def newton_step(_, candidate):
        moves, improved = [jnp.zeros_like(v) for v in start], list(start)
        for step, taken, leaving in zip(steps, sources, candidate[stems:], strict=True):
            entering = [candidate[s] for s in taken]
            reached, moved = jvp(lambda maps, step=step: step(join(maps)), entering, [moves[s] for s in taken])
            moves.append(moved + (leaving - reached))
            improved.append(leaving - moves[-1])
        return improved

    if newton_steps is None:
        candidate = list(start)
        for step, taken in zip(steps, sources, strict=True):
            candidate.append(step(join([candidate[s] for s in taken])))
        reached = candidate[stems:]
    else:
        candidate = jax.lax.fori_loop(0, newton_steps, newton_step, states)
        reached = [step(join([candidate[s] for s in taken])) for step, taken in zip(steps, sources, strict=True)]
        candidate[-1] = reached[-1]  # without a defect in the last step, what is known needs no bound
    defects = [c - r for c, r in zip(candidate[stems:], reached, strict=True)]

    # Of every state and of the defect of every step, in this order: the bound of a pixel, and of the whole map.
    count, batch = len(steps), len(logits)
    pixels = [jnp.zeros((batch, count, *v.shape[1:3])) for v in start]
    whole = [jnp.zeros((batch, count)) for _ in start]
    bounds = []
    for j, (block, taken, own, defect) in enumerate(zip(model.blocks, sources, local, defects, strict=True)):
        e, total = _joined([(pixels[s], whole[s]) for s in taken])
        total = lipschitz[j] * total
        shape = defect.shape[1:3]
        if own is None:
            e = jnp.broadcast_to(total[..., None, None], (batch, count, *shape))
        else:
            e = block.spread(own, e.reshape(-1, *e.shape[2:], 1)).reshape(batch, count, *shape)
            total = jnp.minimum(total, jnp.sqrt(jnp.sum(e * e, axis=(2, 3))))
            e = jnp.minimum(e, total[..., None, None])
        pixels.append(e.at[:, j].set(jnp.linalg.norm(defect, axis=-1)))
        whole.append(total.at[:, j].set(norms(defect)))
        bounds.append(whole[-1].sum(1) + norms(states[stems + j] - candidate[stems + j]))

    rows, columns = (interpolation(*n) for n in zip(candidate[-1].shape[1:3], size, strict=True))
    reach = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(columns, axis=1)
    seen = jnp.einsum("ih,nkhw,jw->nkij", rows, pixels[-1], columns)
    terms = jnp.minimum(seen, whole[-1][..., None, None] * reach[None, None])
    return conclude(
        logits,
        resize(head(candidate[-1]), size),
        pair_norms(kernel, jnp.argmax(logits, axis=-1)),
        terms.sum(1),
        a_priori,
        state_bound=jnp.stack(bounds, axis=1),
        defect=jnp.stack([norms(d) for d in defects], axis=1),
        lipschitz=lipschitz,
        shares=terms.mean((2, 3)),
    )


def _joined(maps: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Bounds of joined maps, of pixels and of the whole."""
    if len(maps) == 1:
        return maps[0]
    sizes = [(e.shape[2], e.shape[3]) for e, _ in maps]
    size = max(sizes)
    pixels, whole = [], []
    for (e, total), own in zip(maps, sizes, strict=True):
        rows, columns = (interpolation(*n) for n in zip(own, size, strict=True))
        pixels.append(jnp.einsum("ih,nkhw,jw->nkij", rows, e, columns) ** 2)
        whole.append((_gain(own, size) * total) ** 2)
    return jnp.sqrt(sum(pixels)), jnp.sqrt(sum(whole))
