"""Widths and smoothing over a run: functions from the epoch, 1 for the first, to bits and to a strength.

A network that starts with many bits and loses them one after the other reaches a better minimum than one that starts
with few (Ben-Yair et al., 2022, section 5).  Widths are traced in the training step, so all of them share one compiled
program; and they follow from the epoch, so a resumed run needs no record of them.

Random widths belong to a step, not to an epoch: they are drawn inside it, from its key (`make_draw`).

The strength of smoothing is a part of the state, which every part of the program hands to the network as it does batch
statistics; it is set when an epoch begins.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from qpde.bits import Bits
from train.config.images import Annealing, BitSchedule, StrengthSchedule

Widths = Callable[[int], int]
Strength = Callable[[int], float | None]

SMOOTHING = "smoothing"
"""The collection of a network's variables that holds the strength."""


def constant(schedule: BitSchedule, target: int) -> Widths:
    """`target` throughout."""
    return lambda epoch: target


def staircase(schedule: BitSchedule, target: int) -> Widths:
    """max(target, start - floor((epoch - 1) / every)): one bit less after every `every` epochs."""
    return lambda epoch: max(target, schedule.start - (epoch - 1) // schedule.every)


def listed(schedule: BitSchedule, target: int) -> Widths:
    """The widths of the list, each for `every` epochs, then `target`."""
    widths = [*schedule.widths, target]
    return lambda epoch: widths[min((epoch - 1) // schedule.every, len(widths) - 1)]


BIT_SCHEDULES: dict[str, Callable[[BitSchedule, int], Widths]] = {
    "constant": constant,
    "staircase": staircase,
    "listed": listed,
    "random": constant,
}


def is_annealed(annealing: Annealing) -> bool:
    """Whether any width changes with the epoch."""
    return any(BIT_SCHEDULES[part.schedule] is not constant for part in (annealing.weights, annealing.activations))


def is_random(annealing: Annealing) -> bool:
    """Whether any width changes with the step."""
    return "random" in (annealing.weights.schedule, annealing.activations.schedule)


def make_draw(annealing: Annealing, own: Bits) -> Callable[[Key[Array, ""], Bits | None], Bits | None]:
    """`draw(key, bits) -> bits`: the widths of the step of that key, inside jit.

    Weights and activations are drawn apart, each from its list and the width given, all equally likely; that the list
    may name the width given makes no difference.

    Args:
      annealing: the schedules; without a random one, `draw` returns the widths given.
      own: widths of the model, which None stands for.
    """

    def part(key, schedule: BitSchedule, width):
        if schedule.schedule != "random":
            return width

        # As `train.data.make_prepare`: vmapped, the generator of a run's keys would draw other numbers.
        @jax.custom_batching.sequential_vmap
        def place(key, count):
            return jax.random.randint(key, (), 0, count)

        listed_widths, width = np.array(schedule.widths, np.int32), jnp.asarray(width, jnp.int32)
        is_own = listed_widths == width
        others_first = jnp.append(jnp.asarray(listed_widths)[jnp.argsort(is_own)], width)
        return others_first[place(key, (~is_own).sum() + 1)]

    def draw(key, bits):
        if not is_random(annealing):
            return bits
        # Not the keys that the images' variation is drawn from.
        keys = jax.random.split(jax.random.fold_in(key, 1))
        return Bits(*map(part, keys, (annealing.weights, annealing.activations), own if bits is None else bits))

    return draw


def widths_of(annealing: Annealing, target: Bits, epochs: int) -> Callable[[int], Bits]:
    """The epoch's `Bits`, of Python integers or None.

    Args:
      annealing: the schedules.   target: widths of the model, reached in the last epoch at the latest.
      epochs: length of the run.
    Raises:
      ValueError: a schedule for a part that is not quantized, or one that is not at its target by the last epoch.
    """

    def part(name: str) -> Callable[[int], int | None]:
        schedule, bits = getattr(annealing, name), getattr(target, name)
        if schedule.schedule == "constant":
            return lambda epoch: bits
        if bits is None:
            raise ValueError(f"annealing.{name} has no target: give the model a width of {name}, not None")
        widths = BIT_SCHEDULES[schedule.schedule](schedule, bits)
        if widths(epochs) != bits:
            raise ValueError(
                f"annealing.{name} ends at {widths(epochs)} bits after {epochs} epochs, not at the model's {bits}: "
                "give more --epochs, or less to start from or to hold (start, every, widths)"
            )
        return widths

    weights, activations = part("weights"), part("activations")
    return lambda epoch: Bits(weights(epoch), activations(epoch))


def strength_of(schedule: StrengthSchedule, *, smooths: bool, epochs: int) -> Strength:
    """The epoch's strength of smoothing, within 0 and 1, or None where nothing is scheduled.

    Args:
      schedule: rises as min(1, (epoch - 1) / schedule.epochs), falls as 1 less this.
      smooths: whether the model does.   epochs: length of the run.
    Raises:
      ValueError: nothing to smooth, or a schedule that is not at its end by the last epoch.
    """
    if schedule.schedule == "constant":
        return lambda epoch: None
    if not smooths:
        raise ValueError(
            f"annealing.smoothing.schedule (={schedule.schedule!r}) has nothing to schedule: give the recipe's model "
            "smoothing, Model(smoothing=qpde.models.Smoothing()), or leave the schedule constant"
        )
    if epochs <= schedule.epochs:
        raise ValueError(
            f"annealing.smoothing.epochs (={schedule.epochs}) leaves none of {epochs} epochs at the final strength: "
            "give more --epochs, or a shorter schedule"
        )

    def rise(epoch):
        return min(1.0, (epoch - 1) / schedule.epochs)

    return rise if schedule.schedule == "rise" else lambda epoch: 1.0 - rise(epoch)


def with_strength(collections: dict[str, Any], strength: float | None) -> dict[str, Any]:
    """Collections of a network at this strength of smoothing, see `qpde.models.Network`; None leaves them."""
    return collections if strength is None else {**collections, SMOOTHING: {"strength": jnp.float32(strength)}}
