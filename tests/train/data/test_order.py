"""The order of an epoch's images."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_training import problem

from train.data.order import epoch_order, make_select
from train.steps.train_step import empty_totals, make_epoch_step


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order():
    _, state, *_ = problem()
    first = epoch_order(state, count=32, steps_per_epoch=4)
    second = epoch_order(state.replace(step=jnp.int32(4)), count=32, steps_per_epoch=4)
    np.testing.assert_array_equal(np.sort(first), np.arange(32))
    np.testing.assert_array_equal(np.sort(second), np.arange(32))
    assert np.any(np.asarray(first) != np.asarray(second))
    np.testing.assert_array_equal(first, epoch_order(state, count=32, steps_per_epoch=4))


def test_the_steps_of_an_epoch_take_its_batches_one_after_the_other_with_different_keys():
    _, state, *_ = problem()
    order = epoch_order(state, count=32, steps_per_epoch=4)

    def note(state, batch, key, bits):
        sums = {"loss": jnp.sum(batch[1] ** 2).astype(jnp.float32), "correct": jax.random.uniform(key)}
        sums |= {"count": jnp.sum(batch[0]).astype(jnp.float32), "collapsed_clips": jnp.float32(0)}
        return state.replace(step=state.step + 1), sums

    step = make_epoch_step(note, make_select(steps_per_epoch=4, batch_size=8))
    labels = np.arange(32)
    expected, drawn = np.asarray(order).reshape(4, 8), []
    totals = empty_totals()
    for batch in expected:
        before = jax.device_get(totals)
        state, totals = step(state, totals, None, jnp.ones((32, 1, 1, 1), jnp.uint8), jnp.asarray(labels), order)
        assert float(totals["loss"]) - before["loss"] == np.sum(labels[batch] ** 2)  # small integers: exact
        drawn.append(float(totals["correct"]) - before["correct"])
    assert float(totals["count"]) == 32
    assert len(set(drawn)) == 4
