"""Vet the expert of a folder and write its card."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import read_documents
from composable.errors import TensorFileError, TextError, VettingError
from composable.files.records import parse_record
from composable.interface import body_signature, digest_bytes, scout_signature
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import BODY_FILE, SCOUT_FILE, Manifest
from composable.progress import CountProgress
from composable.training.record import TrainingRecord
from composable.vetting.card import Against, Check, write_card
from composable.vetting.checks import Verdict, gather_evidence, vet
from composable.vetting.peers import Peer, vet_with_peers
from composable.vetting.regression import compare_evidence
from composable.workflows.workspace import HELDOUT_FILE, TRAINING_FILE, WORK, vetted_texts

if TYPE_CHECKING:
    from composable.workflows.references import PreviousRelease


def check_expert(
    loaded: LoadedBackbone,
    folder: Path,
    data: Sequence[Path] = (),
    *,
    peers: Sequence[Peer] = (),
    older: PreviousRelease | None = None,
    progress: CountProgress | None = None,
) -> Verdict:
    """Vet the expert of a folder and write its card.

    Args:
        loaded: The backbone.
        folder: The expert, trained.
        data: Held-out text; by default what training held out.
        peers: Published experts to plug it in beside.
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
    texts = vetted_texts(read_documents(data or [heldout])), vetted_texts(loaded.anchor)
    try:
        expert = load_expert(loaded, folder)
    except TensorFileError as error:
        verdict = Verdict(checks=(_check_format(loaded, folder, manifest, error),), measured={})
    else:
        verdict = _vet(loaded, expert, *texts, peers, older, progress)
        form = _check_format(loaded, folder, manifest)
        verdict = dataclasses.replace(verdict, checks=(form, *verdict.checks))
    training = folder / WORK / TRAINING_FILE
    record = TrainingRecord()
    if training.exists():
        record = parse_record(TrainingRecord, training.read_bytes(), str(training), VettingError)
    against = None
    if older is not None and verdict.regressions is not None:
        against = Against(
            release=f"{older.manifest.name}@{older.manifest.version}",
            tensors=dict(older.tensors),
            regressions=verdict.regressions,
        )
    write_card(
        folder,
        manifest,
        loaded.interface,
        verdict.checks,
        verdict.measured,
        record,
        against,
    )
    return verdict


def _vet(
    loaded: LoadedBackbone,
    expert: Pluggable,
    heldout: Sequence[bytes],
    anchor: Sequence[bytes],
    peers: Sequence[Peer],
    older: PreviousRelease | None,
    progress: CountProgress | None,
) -> Verdict:
    """Vet an expert alone, beside others, and against what it was before."""
    parts = loaded.backbone, loaded.interface
    verdict = vet(*parts, expert, heldout, anchor, tokenizer=loaded.tokenizer, progress=progress)
    measured = {**verdict.measured}
    measured["documents"] |= {"own_digest": digest_bytes(b"\0".join(heldout))}
    checks = verdict.checks
    if peers:
        more, measured["beside"] = vet_with_peers(
            *parts, expert, peers, anchor, tokenizer=loaded.tokenizer, progress=progress
        )
        checks = (*checks, *more)
    regressions = None
    if older is not None and older.expert is not None and verdict.evidence is not None:
        before = gather_evidence(loaded.plug([older.expert]), older.expert.name, heldout, anchor)
        regressions = tuple(compare_evidence(before, verdict.evidence))
    return dataclasses.replace(verdict, checks=checks, measured=measured, regressions=regressions)


def _check_format(
    loaded: LoadedBackbone,
    folder: Path,
    manifest: Manifest,
    error: TensorFileError | None = None,
) -> Check:
    """Return the check that the tensors fit the interface: names, shapes, types, finite."""
    specs = {
        **body_signature(loaded.interface, manifest.body.kind, manifest.body.rank),
        **scout_signature(loaded.interface, manifest.scout_width),
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
