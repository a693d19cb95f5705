import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.errors import ComposableWarning, TrainingError
from composable.training.checkpoints import Checkpoints, _sum_arrays, find_home
from composable.training.config import TrainConfig

pytestmark = pytest.mark.slow

CFG = TrainConfig(steps=3, batch_size=1, window=1, learning_rate=1.0)


def state_of(seed):
    """Return a tree of flax variables and a plain one, as training holds them."""
    rng = np.random.default_rng(seed)
    trained = nnx.State({"w": nnx.Param(jnp.asarray(rng.normal(size=(2, 3)), jnp.float32))})
    return trained, {"count": jnp.int32(seed), "mu": jnp.asarray(rng.normal(size=3), jnp.float32)}


def save(directory, *steps, cfg=CFG):
    checkpoints = Checkpoints(directory, cfg)
    for step in steps:
        checkpoints.save(step, *state_of(step), {"position": step})
    checkpoints.close()


def restore(directory, cfg=CFG):
    checkpoints = Checkpoints(directory, cfg)
    try:
        return checkpoints.restore(*state_of(99))
    finally:
        checkpoints.close()


@pytest.mark.parametrize("address", ["s3://bucket/run", "az://bucket/run", "S3://bucket"])
def test_an_address_that_orbax_cannot_write_to_is_refused(address):
    with pytest.raises(TrainingError, match=f"cannot keep checkpoints on {address[:5]}") as caught:
        Checkpoints(address, CFG)
    assert caught.value.where == address
    assert "mount the bucket" in caught.value.hint


def test_without_its_library_a_bucket_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(TrainingError, match="gs:// need the `gcsfs` library") as caught:
        find_home("gs://bucket/run")
    assert caught.value.hint == "pip install 'composable[gcs]'"


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_newest_checkpoint_comes_back_to_the_bit(tmp_path):
    save(tmp_path, 1, 2, 3)
    step, trained, opt_state, data_state = restore(tmp_path)
    assert (step, data_state) == (3, {"position": 3})
    expected = state_of(3)
    assert jax.tree.structure((trained, opt_state)) == jax.tree.structure(expected)
    for found, leaf in zip(
        jax.tree.leaves((trained, opt_state)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(found, leaf)
        assert found.dtype == leaf.dtype


def test_only_the_newest_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TrainingError, match="another learning_rate, seed") as caught:
        restore(tmp_path, dataclasses.replace(CFG, learning_rate=2.0, seed=5))
    assert caught.value.where == str(tmp_path)


def damage(directory, step, how):
    """Spoil a checkpoint; `how` changes the bytes of one file."""
    for file in sorted((directory / str(step)).rglob("*"), key=lambda file: file.stat().st_size):
        if file.is_file() and file.stat().st_size:
            largest = file
    data = bytearray(largest.read_bytes())
    largest.write_bytes(how(data))


def flip(data):
    data[len(data) // 2] ^= 1
    return data


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": flip,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, how):
    save(tmp_path, 1, 2)
    damage(tmp_path, 2, DAMAGE[how])
    with pytest.warns(ComposableWarning, match="step 2 is damaged .*; resuming from step 1"):
        found = restore(tmp_path)
    assert (found.step, found.data_state) == (1, {"position": 1})
    np.testing.assert_array_equal(found.trained["w"][...], state_of(1)[0]["w"][...])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda step: shutil.rmtree(step / "arrays"),
        lambda step: shutil.rmtree(step / "run"),
        lambda step: (step / "run" / "metadata").write_text("[1]"),
        lambda step: (step / "run" / "metadata").write_text('{"data": {}, "settings": 3}'),
        lambda step: (shutil.rmtree(step), step.mkdir()),
    ],
    ids=["no arrays", "no record", "a list", "another type", "an empty folder"],
)
def test_a_checkpoint_that_lacks_parts_is_passed_over(tmp_path, spoil):
    save(tmp_path, 1, 2)
    spoil(tmp_path / "2")
    with pytest.warns(ComposableWarning, match="step 2 is damaged"):
        assert restore(tmp_path).step == 1


def test_every_flipped_bit_is_noticed(tmp_path):
    """Whatever file it is in: restored is what was saved, or nothing."""
    save(tmp_path, 1)
    expected = jax.tree.leaves(state_of(1))
    rng = np.random.default_rng(0)
    refused = 0
    for file in sorted(file for file in tmp_path.rglob("*") if file.is_file()):
        data = file.read_bytes()
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        try:
            found = restore(tmp_path)
        except TrainingError:
            refused += 1
        else:
            leaves = jax.tree.leaves((found.trained, found.opt_state))
            assert all((a == b).all() for a, b in zip(leaves, expected, strict=True)), file
            assert found.data_state == {"position": 1}
        file.write_bytes(data)
    assert refused >= 3


def test_if_all_are_damaged_the_error_says_so_and_its_hint_cures(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path, step, flip)
    with pytest.raises(
        TrainingError, match=r"no checkpoint can be read: .*step 2.*step 1"
    ) as caught:
        restore(tmp_path)
    assert caught.value.hint.startswith(f"remove {tmp_path} to start again")
    shutil.rmtree(tmp_path)
    assert restore(tmp_path) is None


def test_damaged_checkpoints_are_replaced_by_the_next_ones(tmp_path):
    save(tmp_path, 1, 2)
    damage(tmp_path, 2, flip)
    with Checkpoints(tmp_path, CFG) as checkpoints:
        with pytest.warns(ComposableWarning):
            checkpoints.restore(*state_of(99))
        checkpoints.save(2, *state_of(5), {"position": 5})
    assert restore(tmp_path).data_state == {"position": 5}


def test_a_checkpoint_with_broken_weights_is_passed_over(tmp_path):
    """Those before 0.3 were saved without being looked at."""
    save(tmp_path, 1)
    trained, opt_state = state_of(2)
    with Checkpoints(tmp_path, CFG) as checkpoints:
        broken = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), trained)
        checkpoints.save(2, broken, opt_state, {"position": 2})
    with pytest.warns(ComposableWarning, match="its weights are not finite"):
        assert restore(tmp_path).step == 1


def test_checkpoints_without_digests_are_read(tmp_path):
    save(tmp_path, 1)
    record = tmp_path / "1" / "run" / "metadata"
    run = json.loads(record.read_text())
    record.write_text(json.dumps({"data": run["data"], "settings": run["settings"]}))
    assert restore(tmp_path).step == 1


def test_what_a_killed_write_left_is_removed(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", left)
    assert restore(tmp_path).step == 1
    assert not left.exists()
    save(tmp_path, 3)
    assert restore(tmp_path).step == 3


def test_positions_of_several_processes_are_kept(tmp_path):
    """As many processes have their own again; other numbers go on only from a common one."""
    checkpoints = Checkpoints(tmp_path, CFG)
    assert checkpoints._own_position([{"done": 3}]) == {"done": 3}
    assert checkpoints._own_position([{"done": 3}, {"done": 3}]) == {"done": 3}
    with pytest.raises(TrainingError, match=r"2 processes wrote .* different positions") as caught:
        checkpoints._own_position([{"done": 3}, {"done": 4}])
    assert "with 2 processes" in caught.value.hint
    checkpoints.close()


def test_sums_notice_values_and_positions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    assert _sum_arrays({"x": x}) == _sum_arrays({"x": x + 0})
    for changed in (x.at[3, 5].set(7.0), x.T, x[::-1], x.at[0, 0].set(-x[0, 0])):
        assert _sum_arrays({"x": changed}) != _sum_arrays({"x": x})
    kinds = {"b": x > 0, "h": x.astype(jnp.bfloat16), "i": jnp.arange(3)}
    assert len({*_sum_arrays(kinds).values()}) == 3


def test_a_save_while_another_is_written_is_not_left_out(tmp_path):
    save(tmp_path, *range(1, 8))
    assert restore(tmp_path).step == 7


def test_a_write_that_fails_is_reported_in_our_words(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", CFG)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder was")
    with pytest.raises(TrainingError, match="of step 1 cannot be written") as caught:
        checkpoints.save(1, *state_of(1), {})
        checkpoints.close()
    assert caught.value.where == str(tmp_path / "run")
    with pytest.raises(TrainingError, match="cannot be used"):
        Checkpoints(tmp_path / "run", CFG)


def test_an_error_in_the_block_is_not_replaced_by_one_of_the_write(tmp_path):
    with (
        pytest.warns(ComposableWarning, match="of step 2 cannot be written"),
        pytest.raises(ZeroDivisionError),
        Checkpoints(tmp_path / "run", CFG) as checkpoints,
    ):
        checkpoints.save(1, *state_of(1), {})
        checkpoints._manager.wait_until_finished()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("a file where the folder was")
        with contextlib.suppress(TrainingError):
            checkpoints.save(2, *state_of(2), {})
        checkpoints._newest = 2
        raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore::composable.errors.ComposableWarning")
@pytest.mark.parametrize("seconds", [0.0, 0.002, 0.01, 0.03, 0.1])
def test_ctrl_c_does_not_tear_a_write(tmp_path, seconds):
    """Whenever it comes, it takes effect, and what was started is whole."""
    saved = []
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    with (
        pytest.raises(KeyboardInterrupt),
        Checkpoints(tmp_path, CFG) as checkpoints,
    ):
        timer.start()
        for step in range(1, 1000):
            checkpoints.save(step, *state_of(step), {"position": step})
            saved.append(step)
    timer.join()
    found = restore(tmp_path)
    # A step is counted after it was saved, so one more may be on disk.
    assert (found.step if found else 0) - len(saved) in (0, 1)
    assert not list(tmp_path.glob("*tmp*"))
