"""Training from cached trunk outputs equals training without them; resuming; cache files."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from composable.errors import TrainingError
from composable.model.body import Expert
from composable.training.config import TrainConfig
from composable.training.data import TappedRows, tapped_batches
from composable.training.loop import fit
from composable.training.objectives import expert_objective, tapped_objective
from composable.workflows import train as contribution
from composable.workflows.train import expert_config, train_expert
from composable.workflows.trunk_cache import (
    count_trunk_parameters,
    count_upper_parameters,
    cut_rows,
    plan_training,
    run_trunk,
    scout_features,
)

pytestmark = pytest.mark.slow

# Two programs that sum in another order, in float32, over a few steps of an optimiser.
SAME_MATHS = 1e-4
KINDS = ("lora", "ffn")
CFG = TrainConfig(steps=3, batch_size=2, window=16, learning_rate=1e-2, checkpoint_every=1)


@pytest.fixture(scope="module")
def rows(loaded, tmp_path_factory):
    stream_M = np.random.default_rng(0).integers(1, 256, 100)
    return run_trunk(loaded, cut_rows(stream_M, 16, 96), tmp_path_factory.mktemp("trunk"))


class OnlyTokens:
    """The batches of another iterator, without the trunk's outputs."""

    def __init__(self, data):
        self.data = data

    def __next__(self):
        return next(self.data).tokens_BU

    def get_state(self):
        return self.data.get_state()

    def set_state(self, state):
        self.data.set_state(state)


@pytest.mark.parametrize(("kind", "rank"), [("lora", 2), ("ffn", None)])
def test_training_is_the_same_with_and_without_the_cache(loaded, rows, kind, rank):
    expert = Expert(loaded.backbone, kind=kind, rank=rank, scout_width=8, rngs=nnx.Rngs(0))
    graph, params = nnx.split(expert)
    # Large steps in proportion to the gradient, so that any difference in a gradient shows.
    optimizer = optax.sgd(1.0)
    data = tapped_batches(rows, batch_size=2, seed=0)
    with_cache = fit(
        tapped_objective(graph), params, loaded.backbone, data, CFG, optimizer=optimizer
    )
    plain = OnlyTokens(tapped_batches(rows, batch_size=2, seed=0))
    without = fit(expert_objective(graph), params, loaded.backbone, plain, CFG, optimizer=optimizer)
    for x, y, start in zip(
        *map(jax.tree.leaves, (with_cache.trained, without.trained, params)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=SAME_MATHS)
        assert (np.asarray(x) != np.asarray(start)).any()


def test_nothing_below_the_tap_is_run(loaded, rows):
    """Weights of the trunk do not reach the loss."""
    expert = Expert(loaded.backbone, kind="lora", rank=2, scout_width=8, rngs=nnx.Rngs(0))
    graph, params = nnx.split(expert)
    batch = jax.tree.map(jnp.asarray, next(tapped_batches(rows, batch_size=2, seed=0)))
    objective = jax.jit(tapped_objective(graph))
    expected, _ = objective(params, loaded.backbone, batch)
    broken = nnx.clone(loaded.backbone)
    for layer in range(broken.cfg.tap):
        broken.layers[layer].ffn.w_up[...] = jnp.nan
    assert float(objective(params, broken, batch)[0]) == float(expected)


def test_the_cache_holds_the_outputs_of_the_trunk(loaded, rows):
    x_BTD, _ = jax.jit(loaded.backbone.trunk)(rows.tokens_BU[:2, :-1])
    np.testing.assert_allclose(rows.x_BTD[:2], x_BTD, atol=SAME_MATHS)
    assert rows.x_BTD.dtype == loaded.backbone.embed[...].dtype
    features = scout_features(loaded.backbone, rows)
    expected_BTD = loaded.backbone.features(x_BTD)
    np.testing.assert_allclose(features.feature_BTD[:2], expected_BTD, atol=SAME_MATHS)
    np.testing.assert_array_equal(features.classes_BT, rows.tokens_BU[:, 1:])


def test_the_trunk_runs_once_per_text(loaded, tmp_path):
    tokens_BU = np.random.default_rng(1).integers(1, 256, (3, 17))
    seen = []
    first = run_trunk(loaded, tokens_BU, tmp_path, lambda *at: seen.append(at))
    assert seen == [(48, 48)]
    (file,) = tmp_path.iterdir()
    again = run_trunk(loaded, tokens_BU, tmp_path, lambda *at: seen.append(at))
    assert len(seen) == 1
    np.testing.assert_array_equal(first.x_BTD, again.x_BTD)
    run_trunk(loaded, tokens_BU + 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    expected_BTD = np.array(first.x_BTD)
    file.unlink()  # what is mapped must not shrink beneath its reader
    file.write_bytes(b"cut short")
    repaired = run_trunk(loaded, tokens_BU, tmp_path)
    np.testing.assert_array_equal(expected_BTD, repaired.x_BTD)


def test_an_epoch_has_every_row_once_and_resumes_where_it_stopped():
    tokens_BU = np.arange(12).reshape(6, 2)
    rows = TappedRows(tokens_BU, np.arange(6.0).reshape(6, 1, 1))
    data = tapped_batches(rows, batch_size=2, seed=3)
    epochs = [np.concatenate([next(data).tokens_BU[:, 0] for _ in range(3)]) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 2, 4, 6, 8, 10]] * 2
    assert list(epochs[0]) != list(epochs[1])
    state = data.get_state()
    expected = next(data)
    again = tapped_batches(rows, batch_size=2, seed=3)
    again.set_state(state)
    found = next(again)
    np.testing.assert_array_equal(found.tokens_BU, expected.tokens_BU)
    np.testing.assert_array_equal(found.x_BTD[:, 0, 0], expected.tokens_BU[:, 0] / 2)
    parts = [tapped_batches(rows, batch_size=2, seed=3, process=i, n_processes=2) for i in (0, 1)]
    together = np.concatenate([next(part).tokens_BU[:, 0] for part in parts])
    assert sorted(together) == sorted(epochs[0][:2])
    with pytest.raises(TrainingError, match="do not divide"):
        tapped_batches(rows, batch_size=3, seed=0, n_processes=2)


def test_a_large_trunk_is_cached_and_a_small_one_is_not(loaded, tiny):
    def plan(steps, n_tokens):
        return plan_training(tiny.backbone, dataclasses.replace(CFG, steps=steps), n_tokens, 4)

    short = plan(3, 10**6)
    assert short.scout_tokens == 8 * 3 * 2 * 16, "eight times what the body reads"
    assert short.scout_steps == 20 * (short.scout_tokens // 16) // 4
    assert not short.caches_trunk
    assert plan(3, 500).scout_tokens == 500, "no more than there is"
    assert plan(3, 20).scout_steps == 0, "one row cannot be split"
    # This trunk has 9,216 weights: 4e11 of work are 43 million tokens.
    assert plan(10**7, 10**9).scout_tokens == 10**7 * 32
    assert plan(10**7, 10**9).caches_trunk


def test_parameters_are_counted(tiny):
    layer = tiny.backbone.layers[0]
    per_layer = sum(
        leaf.size
        for part in (layer.attention, layer.ffn)
        for leaf in jax.tree.leaves(nnx.state(part))
    )
    assert count_trunk_parameters(tiny.backbone) == per_layer
    assert count_upper_parameters(tiny.backbone) == 2 * per_layer + 256 * 32


def test_a_large_backbone_has_scout_only_steps_and_frequent_checkpoints(monkeypatch):
    from composable.model.backbone import Backbone
    from composable.model.config import BackboneConfig

    cfg = BackboneConfig(
        vocab_size=49152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_head=64,
        d_ff=1536,
        tap=8,
        context=8192,
        scout_width=64,
    )
    large = nnx.eval_shape(lambda: Backbone(cfg, np.zeros(49152), 1024, rngs=nnx.Rngs(0)))
    assert count_trunk_parameters(large) + count_upper_parameters(large) == 134_479_872
    plan = plan_training(large, dataclasses.replace(CFG, steps=1000), 10**6, 2)
    assert (plan.scout_tokens, plan.caches_trunk) == (32_000, True)
    assert plan.scout_steps == 20 * 2000 // 2
    shared = plan_training(large, dataclasses.replace(CFG, steps=1000), 10**6, 2, n_sharing=8)
    assert 3 * plan.scout_tokens < shared.scout_tokens < 4 * plan.scout_tokens
    assert plan_training(large, CFG, 10**6, 2, n_sharing=10**6).scout_tokens == 8 * CFG.tokens
    assert expert_config(300, rows=4, backbone=large).checkpoint_every == 28
    assert expert_config(300).checkpoint_every == 400
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    on_chips = partial(expert_config, 300, rows=64, window=8192, backbone=large)
    assert [on_chips(n_devices=n).checkpoint_every for n in (1, 4, 16)] == [27, 108, 400]
    monkeypatch.undo()
    rates = [expert_config(300, backbone=large, kind=kind).learning_rate for kind in KINDS]
    assert rates == pytest.approx([1e-2, 1e-2 / 9])
    assert expert_config(300, kind="ffn").learning_rate == 1e-2
    assert expert_config(300, backbone=large, kind="ffn", learning_rate=0.5).learning_rate == 0.5


@pytest.fixture
def folder(trained_folder, tmp_path):
    """Return the folder of an expert that was never trained."""
    path = tmp_path / "logic"
    path.mkdir()
    shutil.copy(trained_folder / "expert.toml", path)
    return path


@pytest.fixture
def texts(tmp_path, tiny):
    lines = ({"id": f"{i}", "text": tiny.text("∀x ∃y φ→ψ ⊢A∧B", i)} for i in range(4))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class KilledError(Exception):
    """Raised in place of an interruption."""


def test_a_killed_run_resumes_to_the_same_bytes(loaded, folder, texts, tmp_path, monkeypatch):
    cfg = dataclasses.replace(CFG, steps=200, checkpoint_every=50)
    monkeypatch.setattr(
        contribution,
        "plan_training",
        lambda *args: contribution.TrainingPlan(
            scout_tokens=6400, scout_steps=9, caches_trunk=True
        ),
    )
    straight = Path(shutil.copytree(folder, tmp_path / "straight"))
    done: dict[str, tuple[int, int]] = {}
    record = train_expert(
        loaded, straight, [texts], cfg, progress=lambda stage, *at: done.update({stage: at[:2]})
    )
    # Fits of 1, 2 and 9 steps of the scout are compared.
    assert list(done) == ["trunk", "body and scout", "scout alone"]
    assert done["body and scout"] == (200, 200)
    assert done["scout alone"] == (12, 12)
    assert record.cache.flops_saved > 0
    assert record.scout.steps == 9
    assert set(record.step_seconds) == {"trunk", "body", "scout"}

    def kill(stage, step, steps, row):
        if (stage, step) == ("body and scout", 120):
            raise KilledError

    with pytest.raises(KilledError):
        train_expert(loaded, folder, [texts], cfg, progress=kill)
    assert not (folder / "body.safetensors").exists()
    train_expert(loaded, folder, [texts], cfg)
    for name in ("body.safetensors", "scout.safetensors"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
