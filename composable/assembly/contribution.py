"""A contributor's path: an expert's folder is trained, vetted and published.

The folder holds `expert.toml` and README, and after training the tensors. What must not be
published (held-out text, checkpoints, curves) lives in its `.work` folder.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jax
import numpy as np
import optax
from flax import nnx

from composable.assembly.backbones import BackboneRelease
from composable.assembly.experts import load_expert, make_expert, save_expert
from composable.assembly.features import (
    SCOUT_ROWS,
    Features,
    count_scout_steps,
    cut_rows,
    train_scout,
    trunk_features,
)
from composable.assembly.publication import publish_vetted
from composable.assembly.trunk_cache import (
    Reading,
    plan_reading,
    run_trunk,
    scout_features,
    trunk_parameters,
    upper_parameters,
)
from composable.errors import TensorFileError, TextError, TrainingError, VettingError
from composable.interface import body_signature, digest_bytes, scout_signature
from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.model import Pluggable
from composable.packaging import atomic
from composable.packaging.manifest import BODY_FILE, SCOUT_FILE, Manifest
from composable.packaging.packing import fit_interface
from composable.packaging.registry import Registry
from composable.training.data import batches, tapped_batches, token_stream
from composable.training.documents import (
    Document,
    read_documents,
    split_documents,
    write_documents,
)
from composable.training.loop import Progress, TrainConfig, fit, muon
from composable.training.objectives import expert_objective, tapped_objective
from composable.vetting.card import write_card
from composable.vetting.checks import MAX_BYTES, Check, Verdict, gather_evidence, vet
from composable.vetting.neighbours import Neighbour, vet_beside
from composable.vetting.regression import compare_evidence

if TYPE_CHECKING:
    from composable.assembly.references import Older

WORK: Final = ".work"
HELDOUT_FILE: Final = "heldout.jsonl"
TRAINING_FILE: Final = "training.json"
HELDOUT_FRACTION: Final = 0.1
# Positions of a row.
_WINDOW: Final = 256
# Weights times tokens between two checkpoints: some two minutes of two cores.
_CHECKPOINT_WORK: Final = 6e11
# Vetting scores this many documents of either text at most.
VETTED_DOCUMENTS: Final = 8


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
    release: BackboneRelease,
    folder: Path,
    data: Sequence[Path],
    cfg: TrainConfig,
    *,
    parent: Pluggable | None = None,
    optimizer: optax.GradientTransformation | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the expert of a folder on text, and write its tensors there.

    One document in ten is held out for vetting, chosen by its id.

    Args:
        release: The backbone.
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
    fit_interface(manifest, release.interface)
    # Raise before training, not after, for a body or scout that the interface does not allow.
    body_signature(release.interface, manifest.body.kind, manifest.body.rank)
    scout_signature(release.interface, manifest.scout_width)
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

    stream = token_stream(train, release.tokenizer)
    begun = digest_bytes(stream.tobytes())
    _require_same_start(work, begun if parent is None else f"{begun} {manifest.derives_from}")
    reading = plan_reading(release.backbone, cfg, len(stream), SCOUT_ROWS)
    start = time.perf_counter()
    fit_parts = _fit_on_cached_trunk if reading.pays_cache else _fit_on_stream
    expert = make_expert(release, manifest, cfg.seed)
    if parent is not None:
        expert.body, expert.scout = nnx.clone((parent.body, parent.scout))

    def show(step: int, _: int, row: Mapping[str, float]) -> None:
        if progress:
            progress(step, cfg.steps + count_scout_steps(reading.scout_steps), row)

    run = _Run(cfg=cfg, work=work, optimizer=optimizer or muon(cfg), progress=show)
    trained, history, features, seconds, figures = fit_parts(release, expert, stream, run, reading)
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
    progress: Progress | None


# The trained expert, what was logged, what its scout is to read, seconds by step, and further
# figures for the record.
_Trained = tuple[Expert, list[dict[str, float]], Features, dict[str, float], dict[str, Any]]


def _fit_on_stream(
    release: BackboneRelease, expert: Expert, stream: np.ndarray, run: _Run, reading: Reading
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
        release.backbone,
        data,
        run.cfg,
        optimizer=run.optimizer,
        directory=run.work,
        progress=run.progress,
    )
    rows_RT = cut_rows(stream, run.cfg.window, reading.scout_tokens)
    features = trunk_features(release.backbone, rows_RT)
    seconds = {"body": fitted.seconds}
    return nnx.merge(graph, fitted.trained), fitted.history, features, seconds, {}


def _fit_on_cached_trunk(
    release: BackboneRelease, expert: Expert, stream: np.ndarray, run: _Run, reading: Reading
) -> _Trained:
    """Train on fixed rows whose trunk is run once."""
    cfg, backbone = run.cfg, release.backbone
    start = time.perf_counter()
    rows = run_trunk(release, cut_rows(stream, cfg.window, cfg.tokens), run.work / "trunk")
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


def check_expert(
    release: BackboneRelease,
    folder: Path,
    data: Sequence[Path] = (),
    *,
    neighbours: Sequence[Neighbour] = (),
    older: Older | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Vet the expert of a folder and write its card.

    Args:
        release: The backbone.
        folder: The expert, trained.
        data: Held-out text; by default what training held out.
        neighbours: Published experts to plug it in beside.
        older: An older release to compare it with.
        progress: Called with scoring passes done and in all.

    Raises:
        TextError: If there is no held-out text.
        VettingError: If the expert was not trained yet.
    """
    manifest = Manifest.read(folder)
    if not (folder / BODY_FILE).exists():
        raise VettingError(
            "the expert was not trained yet",
            where=str(folder),
            hint=f"run: composable train {folder} --data FILES",
        )
    heldout = folder / WORK / HELDOUT_FILE
    if not data and not heldout.exists():
        raise TextError(
            "there is no held-out text to vet on",
            where=str(folder),
            hint="train first, or give text with --data",
        )
    texts = vetted_texts(read_documents(data or [heldout])), vetted_texts(release.anchor)
    try:
        expert = load_expert(release, folder)
    except TensorFileError as error:
        verdict = Verdict(checks=(_check_format(release, folder, manifest, error),), measured={})
    else:
        verdict = _vet(release, expert, *texts, neighbours, older, progress)
        form = _check_format(release, folder, manifest)
        verdict = dataclasses.replace(verdict, checks=(form, *verdict.checks))
    training = folder / WORK / TRAINING_FILE
    record = json.loads(training.read_text()) if training.exists() else {}
    against = None
    if older is not None and verdict.regressions is not None:
        against = {
            "release": f"{older.manifest.name}@{older.manifest.version}",
            "tensors": older.tensors,
            "regressions": list(verdict.regressions),
        }
    write_card(folder, manifest, release.interface, verdict, record, against)
    return verdict


def _vet(
    release: BackboneRelease,
    expert: Pluggable,
    heldout: Sequence[bytes],
    anchor: Sequence[bytes],
    neighbours: Sequence[Neighbour],
    older: Older | None,
    progress: Callable[[int, int], None] | None,
) -> Verdict:
    """Vet an expert alone, beside others, and against what it was before."""
    parts = release.backbone, release.interface
    verdict = vet(*parts, expert, heldout, anchor, tokenizer=release.tokenizer, progress=progress)
    measured = {**verdict.measured}
    measured["documents"] |= {"own_digest": digest_bytes(b"\0".join(heldout))}
    checks = verdict.checks
    if neighbours:
        more, measured["beside"] = vet_beside(
            *parts, expert, neighbours, anchor, tokenizer=release.tokenizer, progress=progress
        )
        checks = (*checks, *more)
    regressions = None
    if older is not None and older.expert is not None and verdict.evidence is not None:
        before = gather_evidence(release.plug([older.expert]), older.expert.name, heldout, anchor)
        regressions = tuple(compare_evidence(before, verdict.evidence))
    return dataclasses.replace(verdict, checks=checks, measured=measured, regressions=regressions)


def _check_format(
    release: BackboneRelease,
    folder: Path,
    manifest: Manifest,
    error: TensorFileError | None = None,
) -> Check:
    """Tell whether the tensors are what the interface wants: names, shapes, types, finite."""
    specs = {
        **body_signature(release.interface, manifest.body.kind, manifest.body.rank),
        **scout_signature(release.interface, manifest.scout_width),
    }
    size = sum((folder / name).stat().st_size for name in (BODY_FILE, SCOUT_FILE))
    return Check(
        name="format",
        passed=error is None,
        found=f"{error.where}: {error.message}"
        if error is not None
        else f"{len(specs)} tensors in {size:,} bytes, every number finite",
        expected="the tensors that the interface names, every number finite",
    )


def publish_expert(release: BackboneRelease, folder: Path, registry: Registry) -> Manifest:
    """Publish a vetted expert.

    Raises:
        VettingError: If it was not vetted as it is, or failed.
        RegistryError: If the registry refuses it.
    """
    return publish_vetted(folder, release.interface, registry)


def vetted_texts(documents: Sequence[Document]) -> list[bytes]:
    """Return the begins of the first documents, cut so that no character is split."""
    cut = [document.text.encode()[:MAX_BYTES] for document in documents[:VETTED_DOCUMENTS]]
    return [text.decode(errors="ignore").encode() for text in cut]
