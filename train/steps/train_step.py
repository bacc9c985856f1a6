"""One step of training and one of evaluation, as pure functions of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from qpde.bits import Bits
from qpde.measure import confusion_matrix, intersection_over_union, mean_iou
from train.config.images import Loss
from train.host.mesh import batch_sharding, replicated
from train.steps import twin_clips
from train.steps.guards import Ranges, all_finite, choose, hold
from train.steps.losses import LOSSES, Entropy, Outputs, classification_sums
from train.steps.state import TrainState, update_averages

Batch = tuple[UInt8[Array, "n h w c"], Int[Array, " n"]]
Metrics = dict[str, Float[Array, ""]]


def make_loss(
    model: Any, config: Loss, entropy: Entropy | None = None
) -> Callable[..., tuple[Float[Array, ""], tuple[Metrics, Array, dict[str, Any]]]]:
    """`loss(params, model_state, x, targets, bits) -> (value, (terms, logits, model_state))`, in training mode.

    Args:
      model: called as `model.apply(variables, x, train=True, bits=bits, return_states=..., mutable=...)`.
      config: names the row of `train.steps.losses.LOSSES`.
      entropy: (logits, targets) -> CE. Default: `train.steps.losses.cross_entropy`, smoothed as `config` says.
    Returns:
      A function of the network's input x, the targets that `entropy` takes, such as (N, classes), and the bits, traced,
      or None for the network's own.  Logits and batch statistics are those of the quantized network, not of its twin.
    """
    row = LOSSES[config.name]

    def forward(params, model_state, x, bits):
        outputs, updated = model.apply(
            {"params": params, **model_state},
            x,
            train=True,
            bits=bits,
            return_states=row.twin,
            mutable=list(model_state),
        )
        return Outputs(*outputs) if row.twin else Outputs(outputs, ()), {**model_state, **updated}

    def loss(params, model_state, x, targets, bits):
        low, updated = forward(twin_clips.low(params), model_state, x, bits)
        high, act_bits = None, None
        if row.twin:
            own = model.bits if bits is None else bits
            assert own is not None, "a network that is trained has bits of its own"
            high, _ = forward(twin_clips.high(params), model_state, x, own.twin)
            act_bits = own.activations
        terms = row.formula(low, high, targets, act_bits, config, entropy)
        return terms["loss"], (terms, low.logits, updated)

    return loss


def make_train_step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    inputs: Callable[..., tuple[Array, Array, Array]],
    *,
    draw: Callable[[Key[Array, ""], Bits | None], Bits | None] = lambda key, bits: bits,
    ranges: Ranges | None = None,
    averaging: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch, Key[Array, ""], Bits | None], tuple[TrainState, Metrics]]:
    """`train_step(state, batch, key, bits) -> (state, sums)`: one step down the loss.

    Args:
      loss: Result of `make_loss`.
      optimizer: its state is `state.opt_state`.
      inputs: (key, images, labels) -> the model's input, the targets and the input's labels, as
        `train.data.resident.make_inputs` makes it.
      draw: (key, bits) -> the bits of the step, as `train.steps.annealing.make_draw` makes it.
      ranges: where parameters have to stay; each step ends with their projection. None: only clips have a limit.
      averaging: share that moving averages keep; 0 for a state without them.
      accumulate: parts of the batch, a divisor of its size, whose gradients are averaged.  Batch norms normalise each
        part by its own statistics, and running ones move after each; without batch norms the step is the same.
    Returns:
      A pure function.  Its batch is (images, labels); its sums over the images are the loss's terms, "correct", "count"
      and "collapsed_clips", the clips that had to be held up (`train.steps.guards.hold`).
    """

    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""], bits) -> tuple[TrainState, Metrics]:
        images, labels = batch
        x, targets, labels = inputs(key, images, labels)
        bits = draw(key, bits)
        model_state, grads, sums = gradients(state.params, state.model_state, (x, targets, labels), bits)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, collapsed = hold(optax.apply_updates(state.params, updates), ranges or {})
        state = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
        if averaging:
            state = update_averages(state, averaging)
        return state, sums | {"collapsed_clips": collapsed}

    gradients = _in_parts(loss, accumulate)

    return train_step


def make_epoch_step(train_step, select, *, mesh: Mesh | None = None):
    """`epoch_step(state, totals, bits, *data) -> (state, totals)`: the next step of an epoch, its sums added, jitted.

    `state` is donated.  A call returns at once, before the device is done, and costs 2 ms, so the loop over steps is in
    Python; a scan over ten steps of resnet20 took the same time, within noise.

    A step that breaks down, and every one after it, changes nothing but `totals["broken"]` (see `train.steps.guards`).

    Args:
      train_step: Result of `make_train_step`.
      select: (state, *data) -> (batch, key), of `make_select` or `select_given`.
      mesh: devices that share the batch and hold the state; None is the one that the arguments are on.
    """

    def epoch_step(state: TrainState, totals: Metrics, bits: Bits | None, *data) -> tuple[TrainState, Metrics]:
        batch, key = select(state, *data)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        after, sums = train_step(state, batch, key, bits)
        good = all_finite((after, sums)) & ~totals["broken"]
        added = {name: totals[name] + value for name, value in sums.items()}
        state, kept = choose(good, (after, added), (state, {name: totals[name] for name in sums}))
        return state, kept | {"broken": ~good}

    return jax.jit(epoch_step, donate_argnums=0, out_shardings=None if mesh is None else replicated(mesh))


def empty_totals(*more: str) -> Metrics:
    """Sums before the first batch, with those of these names too; "broken" says whether a step broke down."""
    zero = {name: jnp.float32(0) for name in ("loss", "correct", "count", "collapsed_clips", *more)}
    return zero | {"broken": jnp.bool_(False)}


def _in_parts(loss: Callable[..., Any], parts: int) -> Callable[..., tuple[dict[str, Any], PyTree, Metrics]]:
    """`gradients(params, model_state, (x, targets, labels), bits) -> (model_state, gradients, sums of the images)`."""

    def whole(params, model_state, batch, bits):
        x, targets, labels = batch
        grads, (terms, logits, model_state) = jax.grad(loss, has_aux=True)(params, model_state, x, targets, bits)
        counts = classification_sums(logits, labels)
        return model_state, grads, counts | {name: value * counts["count"] for name, value in terms.items()}

    def in_parts(params, model_state, batch, bits):
        def add(carry, part):
            model_state, *found = whole(params, carry[0], part, bits)
            return (model_state, *jax.tree.map(jnp.add, carry[1:], tuple(found))), None

        # Every `parts`-th image, so that each part is spread over the devices as the batch is.
        batch = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda a: a[0], batch)
        _, *shapes = jax.eval_shape(whole, params, model_state, first, bits)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (model_state, grads, sums), _ = jax.lax.scan(add, (model_state, *zeros), batch)
        return model_state, jax.tree.map(lambda g: g / parts, grads), sums

    return whole if parts == 1 else in_parts


def make_evaluate(model: Any, normalize, *, map_classes: int | None = None) -> Callable[..., dict[str, Any]]:
    """`evaluate(variables, stacks, bits=None) -> {"loss", "accuracy"}` over all that `stack_batches` gave.

    The bits are traced; None takes the model's own.

    Args:
      model: The network.
      normalize: Bytes -> its input.
      map_classes: Number of classes where labels are maps. The result then has "mean_iou" and "iou", one number a
        class, None for one that does not occur.
    """
    names: dict[str, tuple[int, ...]] = {"loss": (), "correct": (), "count": ()}
    if map_classes is not None:
        names["confusion"] = (map_classes, map_classes)

    def sums_over(logits, labels):
        sums = classification_sums(logits, labels)
        if map_classes is not None:
            sums["confusion"] = confusion_matrix(labels, logits.argmax(-1), num_classes=map_classes)
        return sums

    @jax.jit
    def sums_of(variables, images, labels, bits):
        def add(totals, batch):
            logits = model.apply(variables, normalize(batch[0]), train=False, bits=bits)
            return jax.tree.map(jnp.add, totals, sums_over(logits, batch[1])), None

        zero = {name: jnp.zeros(shape, jnp.float32) for name, shape in names.items()}
        return jax.lax.scan(add, zero, (images, labels))[0]

    def evaluate(variables, stacks, bits=None):
        sums = []
        for stack in stacks:
            sums.append(sums_of(variables, *stack, bits))
            jax.block_until_ready(sums[-2:-1])  # one is prepared while one runs, no more: they need memory
        sums = jax.tree.map(lambda *values: sum(values), *jax.device_get(sums))
        scores = {
            "loss": float(sums["loss"] / sums["count"]),
            "accuracy": float(sums["correct"] / sums["count"]),
        }
        if map_classes is None:
            return scores
        iou = [None if np.isnan(own) else float(own) for own in intersection_over_union(sums["confusion"])]
        return scores | {"mean_iou": mean_iou(sums["confusion"]), "iou": iou}

    return evaluate
