"""Steps that break down, and parameters that are held in their ranges."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import normalize

from train.config.images import Loss
from train.data.order import epoch_order, make_select
from train.steps.guards import SMALLEST_CLIP, clips_of, hold, make_explain
from train.steps.state import create_state
from train.steps.train_step import empty_totals, make_epoch_step, make_loss, make_train_step


class Fragile(nn.Module):
    """Two blocks and a head, each of which can be made to break down by its parameter."""

    @nn.compact
    def __call__(self, x, *, train=False, bits=None, return_states=False):
        x = x.reshape(x.shape[0], -1)
        states = []
        for name in ("stage0", "stage1"):
            gain = self.param(name, lambda _: {"gain": jnp.ones(()), "act_clips": jnp.full(2, 3.0)})
            # A root at zero: finite itself, infinite slope.
            x = x * gain["gain"] + jnp.sqrt(jnp.maximum(gain["act_clips"][0] - 3.0, 0.0))
            states.append(x)
        logits = nn.Dense(3, name="head")(x)
        return (logits, tuple(states)) if return_states else logits


def _fragile(harm):
    """The jitted step of `Fragile`, a state after harm(params), and what explains its breakdown."""
    model, optimizer = Fragile(), optax.sgd(0.1)
    variables = model.init(jax.random.key(0), jnp.zeros((2, 4, 4, 1)))
    loss, select = make_loss(model, Loss()), make_select(steps_per_epoch=4, batch_size=8)
    prepare = lambda key, x, labels: (normalize(x), jax.nn.one_hot(labels, 3), labels)  # noqa: E731
    step = make_epoch_step(make_train_step(loss, optimizer, prepare), select)
    explain = make_explain(model, loss, prepare, lambda key, bits: bits)
    state = create_state({"params": harm(variables["params"])}, optimizer, jax.random.key(1))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (32, 4, 4, 1)), jnp.uint8)
    data = (images, jnp.zeros(32, jnp.int32), epoch_order(state, count=32, steps_per_epoch=4))
    return state, step, data, lambda state: explain(state, *select(state, *data), None)


def _with(params, stage, **values):
    return params | {stage: params[stage] | {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}}


@pytest.mark.parametrize(
    ("harm", "explanation"),
    [
        (lambda p: _with(p, "stage1", gain=np.inf), "the output of block 1 (first"),
        (lambda p: p | {"head": p["head"] | {"bias": jnp.full(3, jnp.nan)}}, "the logits (first"),
        (lambda p: p, "the gradient of stage1/act_clips not finite, as 2 in all"),
    ],
)
def test_a_step_that_breaks_down_changes_nothing_and_names_the_place_and_the_clips(harm, explanation):
    state, step, data, explain = _fragile(harm)
    before, totals = jax.tree.map(np.array, (state.step, state.params, state.opt_state)), empty_totals()
    for _ in range(2):
        state, totals = step(state, totals, None, *data)
    assert totals["broken"]
    assert float(totals["count"]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, (state.step, state.params, state.opt_state))
    message = explain(state)
    assert explanation in message
    assert "stage0/act_clips [3. 3.]; stage1/act_clips [3. 3.]" in message


def test_after_a_broken_step_a_good_one_changes_nothing_either():
    state, step, data, _ = _fragile(
        lambda p: _with(_with(p, "stage0", act_clips=[4.0, 3.0]), "stage1", act_clips=[4, 3])
    )
    params = jax.tree.map(np.array, state.params)
    state, totals = step(state, empty_totals() | {"broken": jnp.bool_(True)}, None, *data)
    assert totals["broken"]
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    state, totals = step(state, empty_totals(), None, *data)
    assert not totals["broken"]
    assert int(state.step) == 1


def test_a_clip_that_collapses_is_raised_and_counted_and_no_other_parameter_is():
    params = {
        "stage0": {"act_clips": jnp.array([[1.0, -0.5], [0.0, 2.0]]), "kernel": jnp.array([-1.0])},
        "weight_clips": jnp.array([SMALLEST_CLIP]),
    }
    held, count = jax.jit(hold)(params, {})
    np.testing.assert_array_equal(held["stage0"]["act_clips"], np.float32([[1.0, SMALLEST_CLIP], [SMALLEST_CLIP, 2.0]]))
    assert float(held["stage0"]["kernel"][0]) == -1.0
    assert float(count) == 2
    assert set(clips_of(params)) == {"stage0/act_clips", "weight_clips"}
    assert float(hold({"kernel": jnp.zeros(3)}, {})[1]) == 0


def test_parameters_are_projected_onto_their_ranges_and_what_is_not_finite_is_left_to_be_seen():
    params = {"a": {"gamma2": jnp.array([-1.0, 0.01, 2.0, jnp.nan, jnp.inf])}, "b": {"gamma2": jnp.array([3.0])}}
    held, count = jax.jit(lambda params: hold(params, {"a/gamma2": (0.0, 0.025)}))(params)
    np.testing.assert_array_equal(held["a"]["gamma2"], np.float32([0, 0.01, 0.025, np.nan, np.inf]))
    assert float(held["b"]["gamma2"][0]) == 3
    assert float(count) == 0  # of clips
