import dataclasses
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from composable.corpora.documents import Document
from composable.errors import TrainingError
from composable.training.config import TrainConfig
from composable.training.data import batches, token_stream
from composable.training.loop import fit
from composable.training.objectives import expert_objective
from composable.training.optimizers import adamw

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("line_program.py")
LINE = runpy.run_path(str(PROGRAM))
CFG = LINE["CFG"]


def fit_line(cfg=CFG, **kwargs):
    return fit(LINE["objective"], *LINE["parts"](), cfg, **kwargs)


def assert_same_bits(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return a run of all six steps, and where it left its files."""
    directory = tmp_path_factory.mktemp("straight")
    return fit_line(directory=directory), directory


def test_what_is_trained_changes_and_what_was_given_does_not():
    trained, frozen, data = LINE["parts"]()
    before = jax.tree.map(np.array, (trained, frozen))
    fitted = fit(LINE["objective"], trained, frozen, data, CFG)
    assert_same_bits((trained, frozen), before)
    for found, start in zip(jax.tree.leaves(fitted.trained), jax.tree.leaves(trained), strict=True):
        assert (np.asarray(found) != np.asarray(start)).any()


def test_the_loss_falls_and_is_logged(straight):
    history = straight[0].history
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    losses = [row["loss"] for row in history]
    assert losses[-1] < losses[0]
    assert all({"largest", "grad_norm", "tokens_per_second"} <= row.keys() for row in history)


def test_progress_hears_of_every_step():
    heard = []
    fit_line(
        dataclasses.replace(CFG, log_every=4),
        progress=lambda step, steps, figures: heard.append((step, steps, figures["step"])),
    )
    assert heard == [(1, 6, 1), (2, 6, 1), (3, 6, 1), (4, 6, 4), (5, 6, 4), (6, 6, 6)]


def test_curves_for_tensorboard_are_written(straight):
    events = list((straight[1] / "curves").glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"grad_norm" in events[0].read_bytes()


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_line()
    assert list(tmp_path.iterdir()) == []


class StoppedError(Exception):
    """Stands for whatever ends a run: a key press, a full disk, a lost machine."""


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(straight, tmp_path):
    def stop(step, steps, figures):
        if step == 4:
            LINE["wait_for_checkpoint"](tmp_path, 3)
            raise StoppedError

    with pytest.raises(StoppedError):
        fit_line(directory=tmp_path, progress=stop)
    resumed = fit_line(directory=tmp_path)
    assert [row["step"] for row in resumed.history] == [4, 5, 6]
    assert_same_bits(resumed.trained, straight[0].trained)
    losses = [row["loss"] for row in straight[0].history]
    assert [row["loss"] for row in resumed.history] == losses[3:]


def test_a_killed_process_leaves_a_run_that_goes_on(straight, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    command = [sys.executable, str(PROGRAM), str(tmp_path), "5"]
    killed = subprocess.run(command, env=env, capture_output=True, timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    resumed = fit_line(directory=tmp_path)
    assert [row["step"] for row in resumed.history] == [4, 5, 6]
    assert_same_bits(resumed.trained, straight[0].trained)


def test_a_finished_run_has_nothing_left_to_do(straight):
    again = fit_line(directory=straight[1])
    assert again.history == []
    assert_same_bits(again.trained, straight[0].trained)


@pytest.mark.parametrize("change", [{"learning_rate": 2e-2}, {"seed": 1}, {"steps": 7}])
def test_a_checkpoint_of_other_settings_is_refused(straight, change):
    with pytest.raises(TrainingError, match=f"another {next(iter(change))}"):
        fit_line(dataclasses.replace(CFG, **change), directory=straight[1])


def test_a_loss_that_is_not_finite_ends_the_run():
    def broken(trained, frozen, tokens_BT):
        loss, figures = LINE["objective"](trained, frozen, tokens_BT)
        return jnp.where(jnp.abs(trained["w"]).sum() > 0.1, jnp.nan, loss), figures

    with pytest.raises(TrainingError, match="the loss is nan at step"):
        fit(broken, *LINE["parts"](), CFG)


@pytest.mark.parametrize("field", ["steps", "batch_size", "window", "learning_rate", "clip_norm"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(TrainingError) as caught:
        dataclasses.replace(CFG, **{field: value})
    assert caught.value.where == f"training.{field}"


def test_matrices_decay_and_vectors_do_not():
    optimizer = adamw(dataclasses.replace(CFG, weight_decay=0.5))
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    state = optimizer.init(params)
    still = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):  # the first step's rate is zero: warm-up
        updates, state = optimizer.update(still, state, params)
        params = optax.apply_updates(params, updates)
    assert (np.asarray(params["w"]) < 1).all()
    assert (np.asarray(params["b"]) == 1).all()


TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def trained_expert(tiny):
    """Return (module before, module after, history) of an expert trained for 30 steps."""
    expert = tiny_expert(tiny)
    graph, params = nnx.split(expert)
    stream = token_stream([Document("fox", TEXT)], tiny_tokenizer())
    cfg = TrainConfig(steps=30, batch_size=4, window=32, learning_rate=1e-2, log_every=1)
    data = batches(stream, window=32, batch_size=4, seed=0)
    backbone_before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(tiny.backbone)))
    fitted = fit(expert_objective(graph), params, tiny.backbone, data, cfg)
    return backbone_before, params, fitted


def tiny_expert(tiny):
    from composable.model.body import Expert

    pluggable = tiny.expert("fox", noise=0.0, scout_noise=0.1)
    expert = nnx.eval_shape(
        lambda: Expert(tiny.backbone, kind="ffn", scout_width=16, rngs=nnx.Rngs(0))
    )
    expert.body, expert.scout = pluggable.body, pluggable.scout
    return expert


def tiny_tokenizer():
    from composable.model.tokenizer import ByteTokenizer

    return ByteTokenizer()


def test_an_expert_learns_its_text_body_and_scout_alike(trained_expert):
    history = trained_expert[2].history
    for figure in ("bits_per_token", "scout_bits"):
        assert history[-1][figure] < 0.9 * history[0][figure], figure


def test_training_an_expert_leaves_the_backbone_alone_to_the_bit(tiny, trained_expert):
    after = nnx.to_pure_dict(nnx.state(tiny.backbone))
    assert_same_bits(after, trained_expert[0])


def test_the_optimiser_keeps_two_numbers_per_trained_parameter_and_none_for_the_frozen(
    trained_expert,
):
    params = trained_expert[1]
    trained = sum(x.size for x in jax.tree.leaves(params))
    state = jax.eval_shape(adamw(CFG).init, params)
    kept = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 0)
    assert kept == 2 * trained


def test_a_trained_tree_has_the_structure_it_came_with(trained_expert):
    _, params, fitted = trained_expert
    assert jax.tree.structure(fitted.trained) == jax.tree.structure(params)


def test_the_step_compiles_once():
    """The optimiser's first state is placed like the step's outputs, or step 2 compiles again."""
    compiled, at_step = [], []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fit_line(progress=lambda step, steps, figures: at_step.append(len(compiled)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert at_step[0] > 0, "the first step compiles something"
    assert at_step[-1] == at_step[0]


def test_a_run_may_have_one_step_only():
    fitted = fit_line(dataclasses.replace(CFG, steps=1))
    assert [row["step"] for row in fitted.history] == [1]
    start = LINE["parts"]()[0]
    changed = jax.tree.map(
        lambda x, y: (np.asarray(x) != np.asarray(y)).any(), fitted.trained, start
    )
    assert all(jax.tree.leaves(changed)), "at its full rate: there is nothing to warm up for"
