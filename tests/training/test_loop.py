import dataclasses
import os
import runpy
import shutil
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
from composable.parallel import make_mesh
from composable.parallel.program import measure_program
from composable.training import loop
from composable.training.config import TrainConfig
from composable.training.data import batches, token_stream
from composable.training.loop import fit, lower_step
from composable.training.objectives import expert_objective
from composable.training.optimizers import adamw, learning_rate, muon
from tests.support.compiling import counted_compiling

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


BROKEN = 5  # the step whose batch makes the loss or the gradient NaN


class OneBadBatch:
    """Data whose batch of one step is marked."""

    def __init__(self, bad=BROKEN):
        self.bad, self.step = bad, 0

    def __next__(self):
        self.step += 1
        return np.full((4, 8), 7 if self.step == self.bad else 1, np.int32)

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def nan_loss(w, bad):
    return jnp.square(w - 1).sum() * jnp.where(bad, jnp.nan, 1.0)


def nan_gradient(w, bad):
    """Return a finite loss with a gradient that is NaN: sqrt at zero, times zero."""
    return jnp.square(w - 1).sum() + jnp.sqrt(jnp.where(bad, jnp.abs(w) * 0, 1.0)).sum()


@pytest.mark.parametrize("loss", [nan_loss, nan_gradient])
@pytest.mark.parametrize("every", [1, 2, 5, 6])
def test_nothing_that_is_not_finite_is_kept(tmp_path, loss, every):
    """Wherever checkpoints fall: they are finite, and a run without the bad batch goes on."""

    def objective(params, _, batch_BU):
        return loss(params["w"], batch_BU[0, 0] == 7), {}

    cfg = dataclasses.replace(CFG, steps=12, checkpoint_every=every, log_every=100)
    start = {"w": jnp.full((2, 2), 0.5)}
    with pytest.raises(TrainingError, match=r"not finite|the loss is nan") as caught:
        fit(objective, start, {}, OneBadBatch(), cfg, directory=tmp_path)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert all(step < BROKEN for step in kept)
    if kept:
        assert f"run again to resume from step {kept[-1]}" in caught.value.hint
    again = fit(objective, start, {}, OneBadBatch(bad=None), cfg, directory=tmp_path)
    assert np.isfinite(again.trained["w"]).all()


def test_what_is_returned_is_finite_without_a_directory_too():
    def objective(params, _, batch_BU):
        return nan_gradient(params["w"], batch_BU[0, 0] == 7), {}

    cfg = dataclasses.replace(CFG, steps=BROKEN, log_every=1)
    with pytest.raises(TrainingError, match="the weights are not finite after step 5"):
        fit(objective, {"w": jnp.full((2, 2), 0.5)}, {}, OneBadBatch(), cfg)


def test_the_cure_of_a_loss_that_stays_broken_works(tmp_path):
    """As the hint says: remove the folder, and start with other settings."""

    def objective(params, _, batch_BU):
        return nan_loss(params["w"], batch_BU[0, 0] == 7), {}

    start = {"w": jnp.zeros(2)}
    for _ in range(2):
        with pytest.raises(TrainingError, match="the loss is nan") as caught:
            fit(objective, start, {}, OneBadBatch(), CFG, directory=tmp_path)
    folder = tmp_path / "checkpoints"
    assert f"remove {folder} and start with other text or settings" in caught.value.hint
    shutil.rmtree(folder)
    other = dataclasses.replace(CFG, learning_rate=1e-3)
    fit(objective, start, {}, OneBadBatch(bad=None), other, directory=tmp_path)


INTERRUPTED = """
import signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import jax.numpy as jnp, numpy as np
from pathlib import Path
from composable.training.config import TrainConfig
from composable.training.loop import fit, lower_step

class Data:
    def __next__(self): return np.ones((4, 8), np.int32)
    def get_state(self): return {}
    def set_state(self, state): pass

def progress(step, steps, figures):
    if step == 4:
        print("now", flush=True)
    if step == 5 and sys.argv[2] == "error":
        raise ZeroDivisionError

cfg = TrainConfig(steps=100_000, batch_size=4, window=7, learning_rate=1e-2, checkpoint_every=1)
start = {"w": jnp.zeros((512, 512))}
fit(lambda p, _, x: (jnp.square(p["w"] - 1).mean(), {}), start, {}, Data(), cfg,
    directory=Path(sys.argv[1]), progress=progress)
"""


@pytest.mark.parametrize("how", ["interrupt", "error"])
def test_a_process_that_ends_during_a_save_leaves_it_whole_and_no_foreign_traceback(tmp_path, how):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), how]
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "now\n"
        if how == "interrupt":
            process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=120)[1]
    assert printed.count("Traceback") == 1
    assert printed.splitlines()[-1] in ("KeyboardInterrupt", "ZeroDivisionError")
    assert "futures" not in printed
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names and all(name.isdigit() for name in names)


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
    for _ in range(3):
        updates, state = optimizer.update(still, state, params, rate=0.1)
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


@pytest.mark.parametrize("make", [adamw, muon])
def test_a_run_of_other_length_rate_and_seed_compiles_nothing(make):
    fit_line(optimizer=make(CFG))
    other = dataclasses.replace(CFG, steps=9, learning_rate=0.3, seed=1)
    with counted_compiling() as compiled:
        fit_line(other, optimizer=make(other))
    assert compiled == []


def test_the_learning_rate_is_that_of_optax():
    for steps in (1, 2, 30):
        cfg = dataclasses.replace(CFG, steps=steps, learning_rate=0.5)
        expected = optax.warmup_cosine_decay_schedule(
            0.0, 0.5, min(max(1, steps // 20), steps - 1), steps, 0.5 * cfg.final_fraction
        )
        found = [learning_rate(cfg, step) for step in range(steps + 2)]
        np.testing.assert_allclose(found, [expected(i) for i in range(steps + 2)], rtol=1e-5)


def test_the_step_compiles_once():
    """The optimiser's first state is placed like the step's outputs, or step 2 compiles again."""
    at_step = []
    fit_line()  # what is not the step is compiled
    # A setting of its own, or the program of another test would do.
    cfg = dataclasses.replace(CFG, clip_norm=3.0)
    with counted_compiling() as compiled:
        fit_line(cfg, progress=lambda step, steps, figures: at_step.append(len(compiled)))
    assert at_step[0] > 0, "the first step compiles something"
    assert at_step[-1] == at_step[0]


def test_on_a_cpu_a_step_starts_when_the_one_before_is_done(monkeypatch):
    """So progress is what is done, and SIGTERM waits for one step."""
    were_ready = []
    compile_step = loop._compile_step

    def watch(*args):
        run = compile_step(*args)

        def run_step(trained, *others):
            were_ready.append(trained["w"].is_ready())
            return run(trained, *others)

        return run_step

    def objective(params, _, batch_BU):
        w_DD = params["w"]
        for _ in range(30):
            w_DD = jnp.tanh(w_DD @ w_DD)
        return jnp.square(w_DD).mean(), {}

    monkeypatch.setattr(loop, "_compile_step", watch)
    cfg = dataclasses.replace(CFG, log_every=100)
    fit(objective, {"w": jnp.full((512, 512), 0.01)}, {}, OneBadBatch(bad=None), cfg)
    assert were_ready == [True] * cfg.steps


def test_a_run_may_have_one_step_only():
    fitted = fit_line(dataclasses.replace(CFG, steps=1))
    assert [row["step"] for row in fitted.history] == [1]
    start = LINE["parts"]()[0]
    changed = jax.tree.map(
        lambda x, y: (np.asarray(x) != np.asarray(y)).any(), fitted.trained, start
    )
    assert all(jax.tree.leaves(changed)), "at its full rate: there is nothing to warm up for"


def test_a_step_in_parts_is_the_same_step(straight):
    expected, _ = straight
    found = fit_line(accumulate=2)
    for x, y in zip(jax.tree.leaves(found.trained), jax.tree.leaves(expected.trained), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    for row, other in zip(found.history, expected.history, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_rows_that_do_not_divide_into_parts_are_refused():
    with pytest.raises(TrainingError, match="4 rows do not divide"):
        fit_line(accumulate=3)


def test_parts_need_the_memory_of_one_of_them():
    def objective(w_DF, _, x_BD):
        return jnp.square(jnp.tanh(jnp.tanh(x_BD @ w_DF) @ w_DF)).mean(), {}

    w_DF, x_BD = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 32), (4096, 32)))
    settings = {"optimizer": optax.sgd(0.1), "mesh": make_mesh()}

    def temporary(accumulate):
        lowered = lower_step(objective, w_DF, (), x_BD, accumulate=accumulate, **settings)
        return measure_program(lowered.compile()).temporary

    assert temporary(8) < temporary(1) / 4
