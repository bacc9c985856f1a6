"""Checkpoints: which are kept, which are refused, and what a damaged one costs."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import problem, train

from train.host.console import quiet_libraries
from train.runs import checkpoints as checkpoints_module
from train.runs.checkpoints import CheckpointError, Checkpoints


def test_checkpoints_keep_the_last_two_and_the_best_state(tmp_path):
    _, state, step, data, _ = problem()
    states, quality = {}, {1: (0.5, 1.0), 2: (0.7, 0.9), 3: (0.7, 0.8), 4: (0.6, 0.1), 5: None, 6: None}
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.last_step, checkpoints.best_step) == (0, 0)
        for number, scores in quality.items():
            state, *_ = train(state, step, data, 1)
            checkpoints.save(number, state, scores and dict(zip(("accuracy", "loss"), scores, strict=True)))
            states[number] = jax.tree.map(np.asarray, state.params)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.last_step, checkpoints.best_step) == (6, 3)
        assert checkpoints.damaged == []
        for number in (3, 5, 6):
            loaded = checkpoints.load(number, state)
            jax.tree.map(np.testing.assert_array_equal, loaded.params, states[number])
            assert int(loaded.step) == 4 * number
            assert loaded.key == state.key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5", "6"]


def test_a_state_without_validation_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)})
        assert (checkpoints.last_step, checkpoints.best_step) == (1, 0)


def test_a_save_holds_the_state_as_it_was_though_the_next_steps_take_its_memory(tmp_path):
    """Saves go on in the background while the loop donates what they were given."""
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"large": jnp.zeros((1000, 1000)), "small": jnp.zeros(3)}
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(1, 6):
            state = advance(state)
            checkpoints.save(number, state)
            for _ in range(10):
                state = advance(state)
            loaded = checkpoints.load(number, state)
            jax.tree.map(lambda leaf, n=number: np.testing.assert_array_equal(leaf, 11.0 * n - 10), loaded)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "unseal"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_counts(tmp_path, harm):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            scores = {"accuracy": 0.1 * number, "loss": 1.0}
            checkpoints.save(number, {"a": jnp.full(1000, number, jnp.float32)}, scores)
    for path in [path for path in (tmp_path / "2").rglob("*") if path.is_file()]:
        if harm == "flip" and path.parent.name == "d":
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if harm == "truncate" and path.name == "metrics":
            path.write_bytes(path.read_bytes()[:5])
        if (harm == "remove" and path.name == "manifest.ocdbt") or (harm == "unseal" and path.name == "SHA256SUMS"):
            path.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.damaged == [tmp_path / "2.damaged"]
        assert (checkpoints.last_step, checkpoints.best_step) == (1, 1)
        np.testing.assert_array_equal(checkpoints.load(1, {"a": jnp.zeros(1000)})["a"], 1.0)
        checkpoints.save(2, {"a": jnp.zeros(1000)})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.damaged == []
        assert checkpoints.last_step == 2


@pytest.mark.parametrize("like", [{"a": jnp.zeros(4)}, {"b": jnp.zeros(3)}, {"a": jnp.zeros(3), "b": jnp.zeros(3)}])
def test_a_state_of_another_network_is_refused_and_stays(tmp_path, like):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(3)})
        with pytest.raises(CheckpointError, match="does not fit this network"):
            checkpoints.load(1, like)
        assert checkpoints.last_step == 1


@pytest.fixture
def full(monkeypatch):
    """The disk is full from the second state on, which a thread of orbax notices."""
    seal, calls = checkpoints_module.seal, []

    def fail(folder):
        calls.append(folder)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        seal(folder)

    monkeypatch.setattr(checkpoints_module, "seal", fail)


SAVED = {"a": jnp.arange(1000.0)}


@pytest.mark.parametrize("notices", ["the next save", "the end", "the best step", "a load"])
def test_a_full_disk_is_one_line_and_what_was_saved_before_stays(tmp_path, full, notices, capfd):
    quiet_libraries()
    checkpoints = Checkpoints(tmp_path / "states")

    def act():
        with checkpoints:
            checkpoints.save(1, SAVED, {"accuracy": 0.5, "loss": 1.0})
            checkpoints.save(2, SAVED)
            if notices == "the next save":
                checkpoints.save(3, SAVED)
            if notices == "the best step":
                assert checkpoints.best_step
            if notices == "a load":
                checkpoints.load(1, SAVED)

    with pytest.raises(CheckpointError) as caught:
        act()
    assert str(caught.value) == (
        f"a state could not be written to {tmp_path / 'states'}: No space left on device. Earlier checkpoints are "
        "kept. Once the cause is removed, the same command continues from there"
    )
    assert capfd.readouterr().err == ""
    with Checkpoints(tmp_path / "states") as again:
        assert (again.last_step, again.best_step, again.damaged) == (1, 1, [])
        np.testing.assert_array_equal(again.load(1, SAVED)["a"], SAVED["a"])


def test_an_error_in_training_is_not_hidden_by_one_in_writing(tmp_path, full):
    def act():
        with Checkpoints(tmp_path / "states") as checkpoints:
            checkpoints.save(1, SAVED)
            checkpoints.save(2, SAVED)
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        act()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied", "file"), "Permission denied"),
        (ValueError("OUT_OF_RANGE: Failed to write [os_error_code='28'] [source='x']"), "No space left on device"),
        (ValueError("a page\n" * 100), "a page a page"),
    ],
)
def test_the_reason_is_what_the_system_said(error, reason):
    found = checkpoints_module._reason(error)
    assert found.startswith(reason)
    assert len(found) <= 200
