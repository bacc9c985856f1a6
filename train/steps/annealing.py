"""Bits and smoothing over a run: functions from the epoch, 1 for the first, to bits and to a share of the smoothing.

A network that starts with many bits and loses them one after the other reaches a better minimum than one that starts
with few (Ben-Yair et al., 2022, section 5).  Bits are traced in the training step, so all of them share one compiled
program; and they follow from the epoch, so a resumed run needs no record of them.

Random bits belong to a step, not to an epoch: they are drawn inside it, from its key (`make_draw`).

The smoothing scale, the share of the full smoothing, is a part of the state, which every part of the program hands to
the network as it does batch statistics; it is set when an epoch begins.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from qpde.bits import Bits
from train.config.images import Annealing, BitSchedule, SmoothingSchedule

BitsOf = Callable[[int], int]
Scale = Callable[[int], float | None]

SMOOTHING = "smoothing"
"""The collection of a network's variables that holds the smoothing scale."""


def constant(schedule: BitSchedule, target: int) -> BitsOf:
    """`target` throughout."""
    return lambda epoch: target


def staircase(schedule: BitSchedule, target: int) -> BitsOf:
    """max(target, start - floor((epoch - 1) / every)): one bit less after every `every` epochs."""
    return lambda epoch: max(target, schedule.start - (epoch - 1) // schedule.every)


def listed(schedule: BitSchedule, target: int) -> BitsOf:
    """The bits of the list, each for `every` epochs, then `target`."""
    listed_bits = [*schedule.bits, target]
    return lambda epoch: listed_bits[min((epoch - 1) // schedule.every, len(listed_bits) - 1)]


BIT_SCHEDULES: dict[str, Callable[[BitSchedule, int], BitsOf]] = {
    "constant": constant,
    "staircase": staircase,
    "listed": listed,
    "random": constant,
}


def is_annealed(annealing: Annealing) -> bool:
    """Whether any bits change with the epoch."""
    return any(BIT_SCHEDULES[part.schedule] is not constant for part in (annealing.weights, annealing.activations))


def is_random(annealing: Annealing) -> bool:
    """Whether any bits change with the step."""
    return "random" in (annealing.weights.schedule, annealing.activations.schedule)


def make_draw(annealing: Annealing, own: Bits) -> Callable[[Key[Array, ""], Bits | None], Bits | None]:
    """`draw(key, bits) -> bits`: the bits of the step of that key, inside jit.

    Weights and activations are drawn apart, each from its list and the bits given, all equally likely; that the list
    may name those given makes no difference.

    Args:
      annealing: the schedules; without a random one, `draw` returns the bits given.
      own: bits of the model, which None stands for.
    """

    def part(key, schedule: BitSchedule, given):
        if schedule.schedule != "random":
            return given

        # As `train.data.resident.make_inputs`: vmapped, the generator of a run's keys would draw other numbers.
        @jax.custom_batching.sequential_vmap
        def place(key, count):
            return jax.random.randint(key, (), 0, count)

        listed_bits, given = np.array(schedule.bits, np.int32), jnp.asarray(given, jnp.int32)
        is_own = listed_bits == given
        others_first = jnp.append(jnp.asarray(listed_bits)[jnp.argsort(is_own)], given)
        return others_first[place(key, (~is_own).sum() + 1)]

    def draw(key, bits):
        if not is_random(annealing):
            return bits
        # Not the keys that the images' variation is drawn from.
        keys = jax.random.split(jax.random.fold_in(key, 1))
        return Bits(*map(part, keys, (annealing.weights, annealing.activations), own if bits is None else bits))

    return draw


def bits_of(annealing: Annealing, target: Bits, epochs: int) -> Callable[[int], Bits]:
    """The epoch's `Bits`, of Python integers or None.

    Args:
      annealing: The schedules.
      target: Bits of the model, reached in the last epoch at the latest.
      epochs: Length of the run.
    Raises:
      ValueError: a schedule for a part that is not quantized, or one that is not at its target by the last epoch.
    """

    def part(name: str) -> Callable[[int], int | None]:
        schedule, bits = getattr(annealing, name), getattr(target, name)
        if schedule.schedule == "constant":
            return lambda epoch: bits
        if bits is None:
            raise ValueError(f"annealing.{name} has no target: give the model bits of {name}, not None")
        scheduled = BIT_SCHEDULES[schedule.schedule](schedule, bits)
        if scheduled(epochs) != bits:
            raise ValueError(
                f"annealing.{name} ends at {scheduled(epochs)} bits after {epochs} epochs, not at the model's {bits}: "
                f"give more --epochs, or shorten it by annealing.{name}.start, .every or .bits"
            )
        return scheduled

    weights, activations = part("weights"), part("activations")
    return lambda epoch: Bits(weights(epoch), activations(epoch))


def smoothing_scale_of(schedule: SmoothingSchedule, *, smooths: bool, epochs: int) -> Scale:
    """The epoch's share of the full smoothing, from 0 to 1, or None where nothing is scheduled.

    Args:
      schedule: rises as min(1, (epoch - 1) / schedule.epochs), falls as 1 less this.
      smooths: whether the model does.
      epochs: length of the run.
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
            f"annealing.smoothing.epochs (={schedule.epochs}) leaves none of {epochs} epochs at the final scale: "
            "give more --epochs, or a shorter schedule"
        )

    def rise(epoch):
        return min(1.0, (epoch - 1) / schedule.epochs)

    return rise if schedule.schedule == "rise" else lambda epoch: 1.0 - rise(epoch)


def with_smoothing_scale(collections: dict[str, Any], smoothing_scale: float | None) -> dict[str, Any]:
    """Collections of a network at this smoothing scale, see `qpde.models.images.network.Network`; None leaves them."""
    return (
        collections if smoothing_scale is None else {**collections, SMOOTHING: {"scale": jnp.float32(smoothing_scale)}}
    )
