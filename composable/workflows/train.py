"""A contributor's path: an expert's folder is trained, vetted and published.

The folder holds `expert.toml` and README, and after training the tensors. What must not be
published (held-out text, checkpoints, curves) lives in its `.work` folder.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import optax
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import make_expert, save_expert
from composable.corpora.documents import read_documents, split_documents, write_documents
from composable.errors import TextError, TrainingError
from composable.files import atomic
from composable.interface import body_signature, digest_bytes, scout_signature
from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.manifests.packing import fit_interface
from composable.progress import StepProgress
from composable.training.config import TrainConfig
from composable.training.data import batches, tapped_batches, token_stream
from composable.training.loop import fit
from composable.training.objectives import expert_objective, tapped_objective
from composable.training.optimizers import muon
from composable.training.scouts import SCOUT_ROWS, Features, count_scout_steps, train_scout
from composable.workflows.trunk_cache import (
    Reading,
    cut_rows,
    plan_reading,
    run_trunk,
    scout_features,
    trunk_features,
    trunk_parameters,
    upper_parameters,
)
from composable.workflows.workspace import HELDOUT_FILE, HELDOUT_FRACTION, TRAINING_FILE, WORK

# Positions of a row.
_WINDOW: Final = 256
# Weights times tokens between two checkpoints: some two minutes of two cores.
_CHECKPOINT_WORK: Final = 6e11


def expert_config(
    steps: int,
    seed: int = 0,
    *,
    rows: int = 4,
    backbone: Backbone | None = None,
) -> TrainConfig:
    """Return how experts are trained: with Muon, on rows of 256 tokens.

    Many small steps taught more per second than few large ones, and windows of half the context
    lost nothing: attention is the backbone's, and was trained at the full one.

    Args:
        steps: Optimiser steps.
        seed: Seed of weights and order.
        rows: Rows per step. With more devices than that, every device gets one.
        backbone: What they are trained for: the larger, the fewer steps between checkpoints.
    """
    n_devices = jax.device_count()
    every = 400
    if backbone is not None:
        every = max(1, round(_CHECKPOINT_WORK / (upper_parameters(backbone) * rows * _WINDOW)))
    return TrainConfig(
        steps=steps,
        batch_size=-(-rows // n_devices) * n_devices,
        window=_WINDOW,
        learning_rate=1e-2,
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
    optimizer: optax.GradientTransformation | None = None,
    progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Train the expert of a folder on text, and write its tensors there.

    One document in ten is held out for vetting, chosen by its id.

    Args:
        loaded: The backbone.
        folder: The expert, with `expert.toml`.
        data: Text files, JSON-lines files or folders of them.
        cfg: How to train.
        parent: The release that it derives from, where training starts instead of anew.
        optimizer: `muon(cfg)` by default.
        progress: Called at every step.

    Returns:
        What was recorded: tokens, seconds, seed, device, last figures.

    Raises:
        ManifestError, InterfaceError: If the manifest is bad or for another interface.
        TextError: If there is no text, or only one document.
        TrainingError: If an earlier run in this folder began with other text or settings.
    """
    manifest = Manifest.read(folder)
    fit_interface(manifest, loaded.interface)
    # Raise before training, not after, for a body or scout that the interface does not allow.
    body_signature(loaded.interface, manifest.body.kind, manifest.body.rank)
    scout_signature(loaded.interface, manifest.scout_width)
    documents = read_documents(data)
    if len(documents) < 2:
        raise TextError(
            "one document cannot be split into training and held-out text",
            where=str(data[0]),
            hint="give several files, or a .jsonl file with one document per line",
        )
    train, heldout = split_documents(documents, HELDOUT_FRACTION, salt=manifest.name)
    work = folder / WORK
    work.mkdir(exist_ok=True)
    write_documents(work / HELDOUT_FILE, heldout)

    stream = token_stream(train, loaded.tokenizer)
    begun = digest_bytes(stream.tobytes())
    _require_same_start(work, begun if parent is None else f"{begun} {manifest.derives_from}")
    reading = plan_reading(loaded.backbone, cfg, len(stream), SCOUT_ROWS)
    start = time.perf_counter()
    fit_parts = _fit_on_cached_trunk if reading.pays_cache else _fit_on_stream
    expert = make_expert(loaded.backbone, manifest, cfg.seed)
    if parent is not None:
        expert.body, expert.scout = nnx.clone((parent.body, parent.scout))

    def show(step: int, _: int, row: Mapping[str, float]) -> None:
        if progress:
            progress(step, cfg.steps + count_scout_steps(reading.scout_steps), row)

    run = _Run(cfg=cfg, work=work, optimizer=optimizer or muon(cfg), progress=show)
    trained, history, features, seconds, figures = fit_parts(loaded, expert, stream, run, reading)
    last = history[-1] if history else {}
    scout = train_scout(
        trained.scout,
        features,
        steps=reading.scout_steps,
        seed=cfg.seed,
        progress=lambda step, _, row: show(
            cfg.steps + step, 0, {**last, "scout_bits": row["scout_bits"]}
        ),
    )
    trained.scout = scout.scout
    seconds["scout"] = scout.seconds
    figures["scout"] = {"tokens": features.classes_RT.size, "steps": scout.steps}
    if scout.heldout_bits is not None:
        figures["scout"]["heldout_bits"] = round(scout.heldout_bits, 4)
        last = {**last, "scout_bits": scout.heldout_bits} if last else {}
    save_expert(folder, trained, manifest)
    record = {
        "documents": len(train),
        "text_bytes": sum(len(document.text.encode()) for document in train),
        "tokens": cfg.tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "seed": cfg.seed,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({platform.machine()})",
        "last": last,
        "step_seconds": {name: round(value, 1) for name, value in seconds.items()},
        **({"derives_from": manifest.derives_from} if parent else {}),
        **figures,
    }
    atomic.write_text(work / TRAINING_FILE, json.dumps(record, indent=2) + "\n")
    return record


@dataclass(frozen=True, kw_only=True)
class _Run:
    """How to train, beside what."""

    cfg: TrainConfig
    work: Path
    optimizer: optax.GradientTransformation
    progress: StepProgress | None


# The trained expert, what was logged, what its scout is to read, seconds by step, and further
# figures for the record.
_Trained = tuple[Expert, list[dict[str, float]], Features, dict[str, float], dict[str, Any]]


def _fit_on_stream(
    loaded: LoadedBackbone, expert: Expert, stream: np.ndarray, run: _Run, reading: Reading
) -> _Trained:
    """Train on windows at new offsets each epoch, trunk and all."""
    graph, params = nnx.split(expert)
    data = batches(
        stream,
        window=run.cfg.window,
        batch_size=run.cfg.batch_size,
        seed=run.cfg.seed,
        process=jax.process_index(),
        n_processes=jax.process_count(),
    )
    fitted = fit(
        expert_objective(graph),
        params,
        loaded.backbone,
        data,
        run.cfg,
        optimizer=run.optimizer,
        directory=run.work,
        progress=run.progress,
    )
    rows_RT = cut_rows(stream, run.cfg.window, reading.scout_tokens)
    features = trunk_features(loaded.backbone, rows_RT)
    seconds = {"body": fitted.seconds}
    return nnx.merge(graph, fitted.trained), fitted.history, features, seconds, {}


def _fit_on_cached_trunk(
    loaded: LoadedBackbone, expert: Expert, stream: np.ndarray, run: _Run, reading: Reading
) -> _Trained:
    """Train on fixed rows whose trunk is run once."""
    cfg, backbone = run.cfg, loaded.backbone
    start = time.perf_counter()
    rows = run_trunk(loaded, cut_rows(stream, cfg.window, cfg.tokens), run.work / "trunk")
    seconds = {"trunk": time.perf_counter() - start}
    graph, params = nnx.split(expert)
    data = tapped_batches(
        rows,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        process=jax.process_index(),
        n_processes=jax.process_count(),
    )
    fitted = fit(
        tapped_objective(graph),
        params,
        backbone,
        data,
        cfg,
        optimizer=run.optimizer,
        directory=run.work,
        progress=run.progress,
    )
    seconds["body"] = fitted.seconds
    n_rows, window, _ = rows.x_BTD.shape
    # The body would have run the trunk for every token that it reads, and the scout once more.
    figures = {
        "cache": {
            "tokens": n_rows * window,
            "bytes": int(rows.x_BTD.nbytes),
            "flops_saved": 2 * trunk_parameters(backbone) * cfg.tokens,
        }
    }
    features = scout_features(backbone, rows)
    return nnx.merge(graph, fitted.trained), fitted.history, features, seconds, figures


def _require_same_start(work: Path, start: str) -> None:
    """Refuse to resume what checkpoints of an earlier run began on other text or weights."""
    file = work / "text.digest"
    if file.exists() and (begun := file.read_text().strip()) != start:
        is_text = begun.split()[0] != start.split()[0]
        raise TrainingError(
            f"the {'text' if is_text else 'parent'} is not the one that training began with",
            where=str(work),
            hint=f"give that one to resume, or remove {work} to start anew",
        )
    atomic.write_text(file, start + "\n")
