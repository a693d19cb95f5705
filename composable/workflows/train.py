"""Train the expert of a folder on text.

The folder holds `expert.toml` and README, and after training the tensors. What must not be
published (held-out text, checkpoints, curves) is in its `.work` folder. Vetting and publishing are
in `vet.py` and `publish.py`.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import make_expert, save_expert
from composable.corpora.documents import (
    Document,
    read_documents,
    split_documents,
    write_documents,
)
from composable.errors import TextError, TrainingError
from composable.files import atomic
from composable.files.reading import read_bytes
from composable.files.records import format_record
from composable.files.safetensors import write_tensors
from composable.interface import BodyKind, body_signature, digest_bytes, scout_signature
from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.model import Pluggable
from composable.model.tensors import shapes_of, to_tensors
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    BodySpec,
    Manifest,
)
from composable.packaging.manifests.packing import fit_interface
from composable.parallel import batch_share, fetch_tree, is_first_process, make_mesh
from composable.progress import CountProgress, TrainingProgress
from composable.training.config import TrainConfig
from composable.training.data import batches, tapped_batches, token_stream
from composable.training.loop import BatchIterator, Fitted, Objective, fit
from composable.training.objectives import expert_objective, tapped_objective
from composable.training.optimizers import muon
from composable.training.record import CacheRecord, ScoutRecord, TrainingRecord
from composable.training.scouts import (
    SCOUT_ROWS,
    Features,
    ScoutFit,
    train_scout,
)
from composable.training.updates import (
    add_factors,
    find_changes,
    find_factors,
    place_parent,
)
from composable.workflows.trunk_cache import (
    TrainingPlan,
    compute_features,
    count_trunk_parameters,
    count_upper_parameters,
    cut_rows,
    plan_training,
    run_trunk,
    scout_features,
    trunk_features,
)
from composable.workflows.updates import remove_factors, write_factors
from composable.workflows.workspace import HELDOUT_FILE, HELDOUT_FRACTION, TRAINING_FILE, WORK

# Positions of a row.
_WINDOW: Final = 256
# Peak learning rates: of low-rank bodies, and of full ones at the width of `tiny-bytes` (ADR 45).
_RATE: Final = 1e-2
_RATE_WIDTH: Final = 192
# Weights times tokens between two checkpoints, one to two minutes: on two cores ...
_CHECKPOINT_WORK: Final = 3e12
# ... and on each chip of an accelerator.
_CHECKPOINT_CHIP_WORK: Final = 1.5e15


def expert_config(
    steps: int,
    seed: int = 0,
    *,
    rows: int = 4,
    window: int = _WINDOW,
    backbone: Backbone | None = None,
    kind: BodyKind = "lora",
    learning_rate: float | None = None,
    n_devices: int | None = None,
    accumulate: int = 1,
) -> TrainConfig:
    """Return the settings that experts are trained with: rows of 256 tokens, for Muon.

    Many small steps learned more per second than few large ones. Windows of half the context lost
    nothing: attention belongs to the backbone, which was trained on the full context. The wider
    the backbone, the smaller the steps of full bodies: at the rate of a small one, those of
    SmolLM2-135M unlearned more than they learned (ADR 45).

    Args:
        steps: Optimiser steps.
        seed: Seed of the initial weights and of the order of the data.
        rows: Rows per step, rounded up so that every device gets as many in each part.
        window: Positions of a row.
        backbone: The backbone: the larger, the fewer steps between checkpoints. Without it,
            there are 400, and the rate is that of a small one.
        kind: Kind of the body that is trained.
        learning_rate: Peak learning rate, where it should be another one.
        n_devices: Number of devices, by default those that are here.
        accumulate: Parts that the rows of a step are run in.

    Example:
        >>> cfg = expert_config(steps=300)
        >>> cfg.window, cfg.learning_rate
        (256, 0.01)
    """
    n_devices = n_devices or jax.device_count()
    n_shares = n_devices * accumulate
    every, rate = 400, _RATE
    if backbone is not None:
        if kind == "ffn":
            rate *= min(1.0, (_RATE_WIDTH / backbone.cfg.d_model) ** 2)
        is_cpu = jax.default_backend() == "cpu"
        work = _CHECKPOINT_WORK if is_cpu else _CHECKPOINT_CHIP_WORK * n_devices
        every = max(1, round(work / (count_upper_parameters(backbone) * rows * window)))
    return TrainConfig(
        steps=steps,
        batch_size=-(-rows // n_shares) * n_shares,
        window=window,
        learning_rate=rate if learning_rate is None else learning_rate,
        seed=seed,
        checkpoint_every=min(every, 400),
    )


def train_expert(
    loaded: LoadedBackbone,
    folder: Path,
    data: Sequence[Path],
    cfg: TrainConfig,
    *,
    parent: Pluggable | None = None,
    update_rank: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    trunk: Path | None = None,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    n_sharing: int = 1,
    salt: str | None = None,
    checkpoints: Path | str | None = None,
    progress: TrainingProgress | None = None,
) -> TrainingRecord:
    """Train the expert of a folder on text, and write its tensors there.

    One document in ten is held out for vetting, chosen by its id. In a run of many processes all
    call this, with the same folder and texts, and the first one writes.

    Args:
        loaded: The backbone.
        folder: The expert, with `expert.toml`.
        data: Text files, JSON-lines files or folders of them.
        cfg: How to train.
        parent: The release that the expert derives from; training starts from its weights.
        update_rank: Rank of the products that training adds to the parent's matrices; by default
            it changes all of them.
        optimizer: `muon(cfg)` by default.
        trunk: Folder for the trunk's outputs, which are then always kept there and read by every
            run on the same text; by default the run's own, if keeping them is worth while.
        mesh: Devices to train body and scout on; all of them as data parallel by default.
        accumulate: Parts that the rows of a step are run in; see `fit`.
        n_sharing: Runs on the same text that read the trunk's outputs in `trunk`. The more there
            are, the more text their scouts are trained on.
        salt: What decides, with a document's id, whether it is held out; by default the expert's
            name. Experts with one salt hold out the same documents of one text.
        checkpoints: Where checkpoints are, a folder or `gs://BUCKET/PATH`; by default in the
            expert's folder.
        progress: Called with the stage (the trunk, where its output is cached; body and scout;
            features; scout alone), steps or positions done and in all, and the newest figures.

    Returns:
        The record of the run, as it is written to `training.json`.

    Raises:
        ManifestError, InterfaceError: If the manifest is invalid or for another interface.
        TextError: If there is no text, or only one document.
        TrainingError: If an earlier run in this folder started with other text or settings, the
            backbone is quantized, or the parent cannot be updated with such a rank.
    """
    manifest = _read_manifest(loaded, folder)
    if update_rank is not None:
        parent = _require_updatable(manifest, parent, update_rank)
    train, heldout = read_texts(data, salt or manifest.name)
    work = folder / WORK
    work.mkdir(exist_ok=True)
    if is_first_process():
        write_documents(work / HELDOUT_FILE, heldout)
    stream_M = token_stream(train, loaded.tokenizer)
    derives_from = None if parent is None else manifest.derives_from
    _require_same_start(work, stream_M, derives_from, update_rank)
    plan = plan_training(loaded.backbone, cfg, len(stream_M), SCOUT_ROWS, n_sharing)

    start = time.perf_counter()
    if parent is not None and update_rank is not None:
        placed = place_parent(loaded.backbone, parent.body)
        loaded = dataclasses.replace(loaded, backbone=placed)
    expert = _make_start(loaded.backbone, manifest, cfg.seed, parent, update_rank)
    show = progress or (lambda stage, done, total, figures: None)
    run = _Run(
        cfg=cfg,
        work=work,
        trunk=trunk or work / "trunk",
        optimizer=optimizer or muon(cfg),
        mesh=mesh or make_mesh(),
        accumulate=accumulate,
        checkpoints=checkpoints,
        progress=show,
    )
    fit_parts = _fit_on_cached_trunk if trunk or plan.caches_trunk else _fit_on_stream
    fitted = fit_parts(loaded, expert, stream_M, run, plan)
    scout = _fit_scout(fitted, cfg, plan, show)
    fitted.expert.scout = scout.scout

    seconds = time.perf_counter() - start
    record = _make_record(train, cfg, fitted, scout, seconds, derives_from, update_rank)
    if is_first_process():
        if parent is not None and update_rank is not None:
            save_update(folder, parent, fitted.expert, manifest)
        else:
            save_expert(folder, fitted.expert, manifest)
            remove_factors(folder)
        atomic.write_text(work / TRAINING_FILE, format_record(record))
    return record


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Settings and folders of a run."""

    cfg: TrainConfig
    work: Path
    trunk: Path
    optimizer: optax.GradientTransformation
    mesh: Mesh
    accumulate: int
    checkpoints: Path | str | None
    progress: TrainingProgress


@dataclass(frozen=True, kw_only=True)
class _FittedExpert:
    """A trained expert, and what its scout is trained on next.

    Args:
        expert: The expert; body and scout were trained together.
        history: Logged figures.
        features: Inputs and targets of the scout-only steps.
        seconds: Wall time by stage.
        cache: The cached trunk, if one was used.
    """

    expert: Expert
    history: list[dict[str, float]]
    features: Features
    seconds: dict[str, float]
    cache: CacheRecord | None = None

    @property
    def last(self) -> dict[str, float]:
        """The last logged figures; empty if no step ran."""
        return self.history[-1] if self.history else {}


def _read_manifest(loaded: LoadedBackbone, folder: Path) -> Manifest:
    """Return the manifest of an expert that the interface allows.

    It is checked here, before training starts rather than after.
    """
    manifest = Manifest.read(folder)
    fit_interface(manifest, loaded.interface)
    body_signature(loaded.interface, manifest.body.kind, manifest.body.rank)
    scout_signature(loaded.interface, manifest.scout_width)
    return manifest


def read_texts(data: Sequence[Path], salt: str) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and those held out."""
    documents = read_documents(data)
    if len(documents) < 2:
        raise TextError(
            "one document cannot be split into training and held-out text",
            where=str(data[0]),
            hint="give several files, or a .jsonl file with one document per line",
        )
    return split_documents(documents, HELDOUT_FRACTION, salt=salt)


def _require_updatable(manifest: Manifest, parent: Pluggable | None, rank: int) -> Pluggable:
    """Return the parent, if training can change it by products of a rank.

    Raises:
        TrainingError: If there is none, its body is low-rank, or the rank is too large to be worth
            it.
    """
    if parent is None:
        raise TrainingError(
            "an update changes a release, and none is named",
            where=f"{EXPERT_FILE}: expert.derives-from",
            hint=f'write derives-from = "{manifest.name}@VERSION", or train without --update',
        )
    if parent.body.kind != "ffn":
        raise TrainingError(
            f"the body of {manifest.derives_from} is already low-rank ({parent.body.rank}), and an "
            f"update of rank {rank} would be no smaller than a new generation",
            where="--update",
            hint="train without --update: a changed low-rank body is small to send",
        )
    shapes = [shape for shape in shapes_of(parent.body).values() if len(shape) == 2]
    largest = min(math.prod(shape) // (2 * sum(shape)) for shape in shapes)
    if not 1 <= rank <= largest:
        raise TrainingError(
            f"rank {rank} is not from 1 to {largest}, above which factors have half the numbers of "
            "the matrices that they change",
            where="--update",
            hint="choose a lower rank, or train without --update",
        )
    return parent


def _make_start(
    backbone: Backbone,
    manifest: Manifest,
    seed: int,
    parent: Pluggable | None,
    update_rank: int | None,
) -> Expert:
    """Return the expert that training starts from."""
    if backbone.cfg.matrix_dtype is not None:
        raise TrainingError(
            f"the backbone's matrices are kept in {backbone.cfg.matrix_dtype}, which is for use",
            where=f"{manifest.name}: backbone",
            hint="train for the release that it was made from, whose digest its card names",
        )
    if parent is not None and update_rank is not None:
        # The backbone has the parent's matrices, so a low-rank body starts as the parent.
        spec = BodySpec(kind="lora", rank=update_rank)
        expert = make_expert(backbone, dataclasses.replace(manifest, body=spec), seed)
        expert.scout = nnx.clone(parent.scout)
        return expert
    expert = make_expert(backbone, manifest, seed)
    if parent is not None:
        expert.body, expert.scout = nnx.clone((parent.body, parent.scout))
    return expert


def save_update(folder: Path, parent: Pluggable, expert: Expert, manifest: Manifest) -> None:
    """Write the tensors of an update, and the factors that make its body from the parent's.

    Args:
        folder: The expert.
        parent: The parent.
        expert: A trained low-rank body on the parent's matrices, and a trained scout, whose change
            is rounded and not approximated by products: that lost more than training had gained.
        manifest: The expert's manifest.
    """
    before, after = to_tensors(parent.scout), to_tensors(expert.scout)
    body, changes = find_factors(to_tensors(expert.body)), find_changes(before, after)
    own = to_tensors(parent.body, manifest.body.dtype)
    write_tensors(folder / BODY_FILE, add_factors(own, body))
    vectors = {name: array for name, array in after.items() if name not in changes}
    write_tensors(folder / SCOUT_FILE, add_factors({**before, **vectors}, changes))
    write_factors(folder, {BODY_FILE: body, SCOUT_FILE: changes})


def _fit_on_stream(
    loaded: LoadedBackbone, expert: Expert, stream_M: np.ndarray, run: _Run, plan: TrainingPlan
) -> _FittedExpert:
    """Train on rows cut anew in each epoch; the trunk runs at every step."""
    part, n_parts = batch_share(run.mesh)
    data = batches(
        stream_M,
        window=run.cfg.window,
        batch_size=run.cfg.batch_size,
        seed=run.cfg.seed,
        process=part,
        n_processes=n_parts,
    )
    trained, fitted = _fit_expert(expert_objective, expert, loaded.backbone, data, run)
    rows_BU = cut_rows(stream_M, run.cfg.window, plan.scout_tokens)
    return _FittedExpert(
        expert=trained,
        history=fitted.history,
        features=trunk_features(loaded.backbone, rows_BU, _count(run.progress, "features")),
        seconds={"body": fitted.seconds},
    )


def _fit_on_cached_trunk(
    loaded: LoadedBackbone, expert: Expert, stream_M: np.ndarray, run: _Run, plan: TrainingPlan
) -> _FittedExpert:
    """Train on fixed rows, through which the trunk runs once."""
    cfg = run.cfg
    start = time.perf_counter()
    rows_BU = cut_rows(stream_M, cfg.window, cfg.tokens)
    rows = run_trunk(loaded, rows_BU, run.trunk, _count(run.progress, "trunk"))
    trunk_seconds = time.perf_counter() - start
    part, n_parts = batch_share(run.mesh)
    data = tapped_batches(
        rows, batch_size=cfg.batch_size, seed=cfg.seed, process=part, n_processes=n_parts
    )
    trained, fitted = _fit_expert(tapped_objective, expert, loaded.backbone, data, run)
    n_rows, window, _ = rows.x_BTD.shape
    scout_rows_BU = cut_rows(stream_M, window, plan.scout_tokens)
    if len(scout_rows_BU) > n_rows:
        count, identity = _count(run.progress, "features"), loaded.interface.trunk
        features = compute_features(loaded.backbone, identity, scout_rows_BU, run.trunk, count)
    else:
        features = scout_features(loaded.backbone, rows)
    return _FittedExpert(
        expert=trained,
        history=fitted.history,
        features=features,
        seconds={"trunk": trunk_seconds, "body": fitted.seconds},
        cache=CacheRecord(
            tokens=n_rows * window,
            bytes=int(rows.x_BTD.nbytes),
            # The body would run the trunk for every token of every step, the scout once more.
            flops_saved=2 * count_trunk_parameters(loaded.backbone) * cfg.tokens,
        ),
    )


def _fit_expert(
    make_objective: Callable[[nnx.GraphDef[Any]], Objective],
    expert: Expert,
    backbone: Backbone,
    data: BatchIterator,
    run: _Run,
) -> tuple[Expert, Fitted]:
    """Train body and scout together."""
    graph, params = nnx.split(expert)
    run.progress("body and scout", 0, run.cfg.steps, {})
    fitted = fit(
        make_objective(graph),
        params,
        backbone,
        data,
        run.cfg,
        optimizer=run.optimizer,
        mesh=run.mesh,
        accumulate=run.accumulate,
        directory=run.work,
        checkpoints=run.checkpoints,
        progress=partial(run.progress, "body and scout"),
    )
    # On a CPU neither makes a copy.
    trained: Expert = nnx.merge(graph, jax.device_put(fetch_tree(fitted.trained)))
    return trained, fitted


def _fit_scout(
    fitted: _FittedExpert, cfg: TrainConfig, plan: TrainingPlan, progress: TrainingProgress
) -> ScoutFit:
    """Run the scout-only steps."""

    def show(step: int, steps: int, row: Mapping[str, float]) -> None:
        progress("scout alone", step, steps, {**fitted.last, "scout_bits": row["scout_bits"]})

    return train_scout(
        fitted.expert.scout,
        fitted.features,
        steps=plan.scout_steps,
        seed=cfg.seed,
        progress=show,
    )


def _count(progress: TrainingProgress, stage: str) -> CountProgress:
    """Return a callback that reports what a stage has done, without figures."""
    return lambda done, total: progress(stage, done, total, {})


def _make_record(
    train: Sequence[Document],
    cfg: TrainConfig,
    fitted: _FittedExpert,
    scout: ScoutFit,
    seconds: float,
    derives_from: str | None,
    update_rank: int | None,
) -> TrainingRecord:
    """Return the record of a run that took `seconds` of wall time."""
    last, bits = fitted.last, scout.heldout_bits
    if last and bits is not None:
        last = {**last, "scout_bits": bits}
    stages = {**fitted.seconds, "scout": scout.seconds}
    return TrainingRecord(
        documents=len(train),
        text_bytes=sum(len(document.text.encode()) for document in train),
        tokens=cfg.tokens,
        seconds=round(seconds, 1),
        seed=cfg.seed,
        learning_rate=cfg.learning_rate,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind} ({platform.machine()})",
        last=dict(last),
        step_seconds={name: round(value, 1) for name, value in stages.items()},
        derives_from=derives_from,
        update_rank=update_rank,
        cache=fitted.cache,
        scout=ScoutRecord(
            tokens=fitted.features.classes_BT.size,
            steps=scout.steps,
            heldout_bits=None if bits is None else round(bits, 4),
        ),
    )


def _require_same_start(
    work: Path, stream_M: np.ndarray, parent: str | None, update_rank: int | None
) -> None:
    """Refuse to resume a run in this folder that started from other text or another parent."""
    file = work / "text.digest"
    update = None if update_rank is None else f"rank={update_rank}"
    start = " ".join(filter(None, [digest_bytes(stream_M.tobytes()), parent, update]))
    if file.exists() and (begun := read_bytes(file).decode(errors="replace").strip()) != start:
        before, now = ([*text.split(), "", ""] for text in (begun, start))
        names = ("text", "parent", "rank of the update")
        changed = next(name for name, x, y in zip(names, before, now, strict=False) if x != y)
        raise TrainingError(
            f"the {changed} is not the one that training started with",
            where=str(work),
            hint=f"use the same {changed} to resume, or remove {work} to start again",
        )
    if is_first_process():
        atomic.write_text(file, start + "\n")


def parse_update(text: str) -> int:
    """Return the rank of an update.

    Args:
        text: What follows `--update`.

    Raises:
        TrainingError: For other text than `rank=N`.

    Example:
        >>> parse_update("rank=8")
        8
    """
    name, _, number = text.partition("=")
    if name != "rank" or not (number.isascii() and number.isdigit()) or len(number) > 6:
        raise TrainingError(f"{text[:80]!r} is not rank=N, such as rank=8", where="--update")
    return int(number)
