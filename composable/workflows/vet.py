"""Vet the expert of a folder and write its card."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, read_documents
from composable.errors import TensorFileError, TextError, VettingError
from composable.files.reading import read_bytes
from composable.files.records import parse_record
from composable.interface import RouterInterface, body_signature, digest_bytes, scout_signature
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    SCOUT_FILE,
    STATISTICS_FILE,
    Manifest,
)
from composable.progress import CountProgress
from composable.training.record import TrainingRecord
from composable.vetting.card import Against, Check, write_card
from composable.vetting.checks import Verdict, vet
from composable.vetting.evidence import gather_evidence, vetted_texts
from composable.vetting.peers import Peer, vet_with_peers
from composable.vetting.regression import compare_evidence
from composable.workflows.statistics import write_statistics
from composable.workflows.workspace import HELDOUT_FILE, TRAINING_FILE, WORK

if TYPE_CHECKING:
    from composable.workflows.references import PreviousRelease

# Vets an expert with others: from a callback for progress to checks and figures.
VetPeers = Callable[[CountProgress | None], tuple[list[Check], dict[str, Any]]]


def check_expert(
    loaded: LoadedBackbone,
    folder: Path,
    data: Sequence[Path] = (),
    *,
    peers: Sequence[Peer] = (),
    vet_peers: VetPeers | None = None,
    previous: PreviousRelease | None = None,
    progress: CountProgress | None = None,
) -> Verdict:
    """Vet the expert of a folder and write its card.

    Args:
        loaded: The backbone.
        folder: The expert, trained.
        data: Held-out text; by default what training held out.
        peers: Published experts to install it with, one at a time.
        vet_peers: Vets it with published experts in place of `peers`, such as those that many
            processes share: called with `progress`, it returns what `vet_with_peers` does.
        previous: A previous release to compare it with.
        progress: Called with the number of passes over text done and in all.

    Returns:
        The checks and their figures. An expert whose tensors do not fit the interface cannot run:
        then there is only the check `format`.

    Raises:
        TextError: If there is no held-out text.
        VettingError: If the expert was not trained yet.
    """
    manifest = Manifest.read(folder)
    require_trained(folder)
    heldout, anchor = _find_heldout(folder, data), vetted_texts(loaded.anchor)
    try:
        expert = load_expert(loaded, folder)
    except TensorFileError as error:
        verdict = Verdict(
            checks=(_check_format(loaded.interface, folder, manifest, error),), measured={}
        )
    else:
        if vet_peers is None and peers:
            vet_peers = partial(_vet_peers, loaded, expert, peers, anchor)
        verdict = _vet(loaded, expert, heldout, anchor, vet_peers, previous, progress)
        format_check = _check_format(loaded.interface, folder, manifest)
        verdict = dataclasses.replace(verdict, checks=(format_check, *verdict.checks))
    write_card(
        folder,
        manifest,
        loaded.interface,
        verdict.checks,
        verdict.measured,
        _read_training(folder),
        _describe_comparison(previous, verdict.regressions),
    )
    return verdict


def write_heldout_statistics(
    loaded: LoadedBackbone,
    folder: Path,
    data: Sequence[Path] = (),
    *,
    progress: CountProgress | None = None,
) -> Path:
    """Write statistics of held-out text beside an expert, for those who merge it.

    Args:
        loaded: The backbone.
        folder: The expert, trained.
        data: Held-out text; by default what training held out.
        progress: Called with rows of text done and in all.

    Returns:
        The file.

    Raises:
        TextError: If there is no held-out text.
    """
    documents = _read_heldout(folder, data)
    write_statistics(loaded, folder, load_expert(loaded, folder), documents, progress)
    return folder / STATISTICS_FILE


def require_trained(folder: Path) -> None:
    """Refuse an expert without tensors.

    Raises:
        VettingError: If it was not trained yet.
    """
    if not (folder / BODY_FILE).exists():
        raise VettingError(
            "the expert was not trained yet",
            where=str(folder),
            hint=f"run `composable train {shlex.quote(str(folder))} --data FILES`",
        )


def _find_heldout(folder: Path, data: Sequence[Path]) -> list[bytes]:
    """Return the given text, or else what training held out, as vetting scores it."""
    return vetted_texts(_read_heldout(folder, data))


def _read_heldout(folder: Path, data: Sequence[Path]) -> list[Document]:
    """Return the documents given, or else those that training held out."""
    heldout = folder / WORK / HELDOUT_FILE
    if not data and not heldout.exists():
        raise TextError(
            "there is no held-out text to vet on",
            where=str(folder),
            hint="train first, or give text with --data",
        )
    return read_documents(data or [heldout])


def _vet(
    loaded: LoadedBackbone,
    expert: Pluggable,
    heldout: Sequence[bytes],
    anchor: Sequence[bytes],
    vet_peers: VetPeers | None,
    previous: PreviousRelease | None,
    progress: CountProgress | None,
) -> Verdict:
    """Vet an expert alone, with its peers, and against a previous release."""
    parts = loaded.backbone, loaded.interface
    verdict = vet(*parts, expert, heldout, anchor, tokenizer=loaded.tokenizer, progress=progress)
    measured = {**verdict.measured}
    measured["documents"] |= {"own_digest": digest_bytes(b"\0".join(heldout))}
    checks = verdict.checks
    if vet_peers is not None:
        more, measured["beside"] = vet_peers(progress)
        checks = (*checks, *more)
    regressions = before = None
    if previous is not None and previous.expert is not None and verdict.evidence is not None:
        model = loaded.plug([previous.expert])
        before = gather_evidence(model, previous.expert.name, heldout, anchor)
        regressions = tuple(compare_evidence(before, verdict.evidence))
    return dataclasses.replace(
        verdict, checks=checks, measured=measured, before=before, regressions=regressions
    )


def _vet_peers(
    loaded: LoadedBackbone,
    expert: Pluggable,
    peers: Sequence[Peer],
    anchor: Sequence[bytes],
    progress: CountProgress | None,
) -> tuple[list[Check], dict[str, Any]]:
    """Vet an expert with others that are in memory."""
    return vet_with_peers(
        loaded.backbone,
        loaded.interface,
        expert,
        peers,
        anchor,
        tokenizer=loaded.tokenizer,
        progress=progress,
    )


def _check_format(
    interface: RouterInterface,
    folder: Path,
    manifest: Manifest,
    error: TensorFileError | None = None,
) -> Check:
    """Return the check that the tensors fit the interface: names, shapes, types, finite."""
    specs = {
        **body_signature(interface, manifest.body.kind, manifest.body.rank),
        **scout_signature(interface, manifest.scout_width),
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


def _read_training(folder: Path) -> TrainingRecord:
    """Return what training recorded in a folder; an empty record if there is none."""
    file = folder / WORK / TRAINING_FILE
    if not file.exists():
        return TrainingRecord()
    return parse_record(TrainingRecord, read_bytes(file), str(file), VettingError)


def _describe_comparison(
    previous: PreviousRelease | None, regressions: tuple[str, ...] | None
) -> Against | None:
    """Return the comparison as the card records it; None if there was none."""
    if previous is None or regressions is None:
        return None
    return Against(
        release=f"{previous.manifest.name}@{previous.manifest.version}",
        tensors=dict(previous.tensors),
        regressions=regressions,
    )
