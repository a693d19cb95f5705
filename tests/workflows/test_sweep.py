"""Sweeps: one pass of the trunk, one program per rank, and the best variant becomes the expert."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, write_documents
from composable.errors import TrainingError
from composable.packaging.manifests.manifest import Manifest
from composable.training.config import TrainConfig
from composable.training.loop import _compile_step
from composable.workflows import heldout, trunk_cache
from composable.workflows import sweep as sweeps
from composable.workflows import train as contribution
from composable.workflows.sweep import parse_sweep, train_variants
from composable.workflows.train import train_expert
from tests.support.tiny import PRIVATE_WORDS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_scout_pass")]

CFG = TrainConfig(steps=4, batch_size=2, window=16, learning_rate=1e-2, seed=7)
SEEDS, RANKS = (0, 1), (2, 3)


@pytest.fixture(scope="module")
def texts(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "logic.jsonl"
    documents = [
        Document(f"private/{i}", tiny.text(PRIVATE_WORDS, seed=i, length=60)) for i in range(30)
    ]
    write_documents(path, documents)
    return [path]


def write_folder(trained_folder, folder, rank=None):
    folder.mkdir()
    text = (trained_folder / "expert.toml").read_text()
    body = 'kind = "ffn"' if rank is None else f'kind = "lora"\nrank = {rank}  # of ours'
    (folder / "expert.toml").write_text(text.replace('kind = "ffn"', body))
    return folder


class Swept:
    """A sweep of seeds and ranks, and what was run for it."""

    def __init__(self, loaded, trained_folder, texts, folder):
        self.folder = write_folder(trained_folder, folder, rank=4)
        # As an editor on Windows saves it.
        text = "\ufeff" + (self.folder / "expert.toml").read_text().replace("\n", "\r\n")
        (self.folder / "expert.toml").write_bytes(text.encode())
        self.trunk_batches, self.compiled = [], []
        tap = trunk_cache._tap

        def count_batches(backbone, tokens_BT):
            self.trunk_batches.append(len(tokens_BT))
            return tap(backbone, tokens_BT)

        def listen(event, duration, **_):
            if event == "/jax/core/compile/backend_compile_duration":
                self.compiled.append(duration)

        def train(loaded, folder, *arguments, **options):
            self.at_start.append((folder.name, len(self.compiled)))
            return train_expert(loaded, folder, *arguments, **options)

        self.at_start, self.stages = [], set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trunk_cache, "_tap", count_batches)
            patch.setattr(
                contribution, "trunk_features", lambda *_: pytest.fail("the trunk is cached")
            )
            patch.setattr(sweeps, "train_expert", train)
            _compile_step.cache_clear()
            jax.monitoring.register_event_duration_secs_listener(listen)
            try:
                sweep = {"rank": RANKS, "seed": SEEDS}
                self.variants = train_variants(
                    loaded,
                    self.folder,
                    texts,
                    CFG,
                    sweep,
                    progress=lambda stage, *_: self.stages.add(stage),
                )
            finally:
                jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def swept(loaded, trained_folder, texts, tmp_path_factory):
    return Swept(loaded, trained_folder, texts, tmp_path_factory.mktemp("sweep") / "logic")


def test_the_trunk_runs_once_for_the_text_and_once_for_what_is_held_out(loaded, swept):
    row_bytes = 4 * CFG.window * loaded.backbone.cfg.d_model
    files = (swept.folder / ".work" / "sweep" / "trunk").glob("*.tap")
    rows = sorted(file.stat().st_size // row_bytes for file in files)
    assert len(rows) == 2
    assert CFG.tokens // CFG.window in rows
    assert len(swept.trunk_batches) == sum(-(-n // trunk_cache._TAP_ROWS) for n in rows)


def test_scouts_of_all_variants_read_more_text_than_bodies_and_it_is_run_once(swept):
    (features,) = (swept.folder / ".work" / "sweep" / "trunk").glob("*.npy")
    n_rows, window, _ = np.load(features, mmap_mode="r").shape
    assert n_rows * window > CFG.tokens
    assert {v.record.scout.tokens for v in swept.variants} == {n_rows * window}


def test_variants_of_one_rank_compile_once(swept):
    """The second seed of a rank compiles nothing; the second rank does."""
    names, counts = zip(*swept.at_start, strict=True)
    assert list(names) == [f"rank={rank},seed={seed}" for rank in RANKS for seed in SEEDS]
    assert {stage.split()[0] for stage in swept.stages} == set(names)
    first, second, third = np.diff(counts)
    assert first > 0 and third > 0
    assert second == 0


def test_a_variant_is_what_training_it_alone_makes(loaded, swept, trained_folder, texts, tmp_path):
    """With another rank and seed, to the bit: the trunk is read from a cache either way."""
    folder = write_folder(trained_folder, tmp_path / "logic", rank=RANKS[1])
    cfg = dataclasses.replace(CFG, seed=SEEDS[1])
    train_expert(loaded, folder, texts, cfg, trunk=tmp_path / "trunk")
    alone = load_expert(loaded, folder)
    (variant,) = [v for v in swept.variants if v.name == f"rank={RANKS[1]},seed={SEEDS[1]}"]
    together = load_expert(loaded, variant.folder)
    for x, y in zip(
        *(jax.tree.leaves((found.body, found.scout)) for found in (alone, together)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_the_best_on_held_out_text_becomes_the_expert(loaded, swept):
    bits = [variant.heldout.bits_per_token for variant in swept.variants]
    assert bits == sorted(bits)
    assert len(set(bits)) == len(SEEDS) * len(RANKS)
    best = swept.variants[0]
    manifest = Manifest.read(swept.folder)
    assert manifest.body.rank == Manifest.read(best.folder).body.rank
    text = (swept.folder / "expert.toml").read_bytes().decode()
    assert text.startswith("\ufeff") and "# of ours\r\n" in text
    assert text.count("\n") == text.count("\r\n")
    found, kept = load_expert(loaded, swept.folder), load_expert(loaded, best.folder)
    for x, y in zip(jax.tree.leaves(found.body), jax.tree.leaves(kept.body), strict=True):
        np.testing.assert_array_equal(x, y)
    record = json.loads((swept.folder / ".work" / "training.json").read_text())
    assert f"seed={record['seed']}" in best.name


@pytest.mark.parametrize(("steps", "n_tokens"), [(4, 32), (400, 64)], ids=["short", "long"])
def test_a_quarter_of_the_tokens_of_a_short_training_is_measured(
    loaded, swept, monkeypatch, tmp_path, steps, n_tokens
):
    measured = []

    def count(loaded, tokens_BU, cache):
        measured.append(tokens_BU[:, 1:].size)
        return trunk_cache.run_trunk(loaded, tokens_BU, cache)

    monkeypatch.setattr(heldout, "run_trunk", count)
    monkeypatch.setattr(heldout, "_TOKENS", (16, 64))
    cfg = dataclasses.replace(CFG, steps=steps)
    heldout.measure_heldout(loaded, swept.variants[0].folder, cfg, tmp_path)
    assert measured == [n_tokens]


def test_rates_are_swept(loaded, trained_folder, texts, tmp_path):
    folder = write_folder(trained_folder, tmp_path / "logic")
    cfg = dataclasses.replace(CFG, learning_rate=0.5)
    sweep = parse_sweep(["learning-rate=1e-3,.02"])
    best, other = train_variants(loaded, folder, texts, cfg, sweep)
    assert best.heldout.bits_per_token < other.heldout.bits_per_token
    rates = {variant.name: variant.record.learning_rate for variant in (best, other)}
    assert rates == {"learning-rate=0.001": 0.001, "learning-rate=0.02": 0.02}
    kept = json.loads((folder / ".work" / "training.json").read_text())
    assert kept["learning_rate"] == best.record.learning_rate


def test_ranks_of_a_full_body_are_refused(loaded, trained_folder, texts, tmp_path):
    folder = write_folder(trained_folder, tmp_path / "logic")
    with pytest.raises(TrainingError, match="ranks can be swept only of a low-rank body"):
        train_variants(loaded, folder, texts, CFG, {"rank": [2, 4]})


@pytest.mark.parametrize("option", ["width=3", "rank", "rank=", "rank=a", "seed=1,,2", "rank=-1"])
def test_what_is_no_sweep_is_refused(option):
    with pytest.raises(TrainingError, match="is not a setting and its values"):
        parse_sweep([option])


@pytest.mark.parametrize("rate", ["0", "-0.1", "nan", "1,inf", "x", ""])
def test_what_is_no_rate_is_not_swept(rate):
    with pytest.raises(TrainingError, match="is not a setting and its values"):
        parse_sweep([f"learning-rate={rate}"])


def test_a_setting_is_swept_once():
    with pytest.raises(TrainingError):
        parse_sweep(["seed=1", "seed=2"])
