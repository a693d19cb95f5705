"""The verdict of a review: a record without times and without paths, and its file.

The same proposal, registry and text give the same bytes. It names all that it was made from, so
that a later change of any of it shows. What it is made of is in `review.py`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from composable.errors import ProposalError
from composable.files import atomic
from composable.files.reading import read_bytes
from composable.files.records import format_record, parse_record
from composable.interface import digest_bytes
from composable.packaging.manifests.manifest import BODY_FILE, EXPERT_FILE, SCOUT_FILE
from composable.packaging.registry.compatibility import Bump, Change
from composable.vetting.card import Check

VERDICT_FILE: Final = "verdict.json"
# What a proposal was merged to, beside the verdict on it.
MERGED: Final = "merged"
SCHEMA: Final = 1
# The check that nothing is worse than in the newest release.
AGAINST: Final = "against"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a verdict was made from.

    Args:
        backbone: Name of the backbone.
        interface: Digest of its router interface.
        releases: The published releases that it was compared with: of the expert itself the
            newest one, and of every peer; by name, as `VERSION MANIFEST-DIGEST`.
        texts: Digests of the texts that were scored, by name: `own`, `anchor`, and peers'; and of
            a proposal that was merged, `merge`: all that the maintainer gave.
    """

    backbone: str
    interface: str
    releases: dict[str, str]
    texts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DocumentBits:
    """Bits per byte of one document of the maintainer's text.

    Args:
        backbone: With the backbone alone.
        base: With the base in mix mode.
        proposed: With the proposed expert in mix mode.
    """

    backbone: float | None
    base: float | None
    proposed: float | None


@dataclass(frozen=True, kw_only=True)
class ReviewVerdict:
    """The outcome of a review.

    Args:
        schema: Version of this record.
        proposal: The proposal's id.
        name: The expert.
        base: The release that it is a change of, `NAME@VERSION`.
        base_manifest: Digest of that release's manifest.
        onto: The newest release. If it is another one than the base, what was vetted is the merge
            of both.
        manifest: Digest of the manifest that was vetted.
        proposer: The public key that signed it; empty if unsigned.
        passed: Whether every check passed.
        summary: The outcome in words.
        checks: The checks.
        warnings: What is suspicious but fails no check, in words.
        needs: The version bump that the changes need.
        version: The lowest version after the base that permits them.
        changes: The changes that dependents can notice.
        regressions: What is worse than in the base beyond noise, in words.
        tensors: Digests of the tensor files that were vetted.
        measured: The figures behind the checks.
        documents: The figures of each document of the maintainer's text.
        inputs: What it was made from.
    """

    schema: int = SCHEMA
    proposal: str
    name: str
    base: str
    base_manifest: str
    onto: str
    manifest: str
    proposer: str
    passed: bool
    summary: str
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    needs: Bump
    version: str
    changes: tuple[Change, ...]
    regressions: tuple[str, ...]
    tensors: dict[str, str]
    measured: dict[str, Any]
    documents: tuple[DocumentBits, ...]
    inputs: Inputs

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if not check.passed]


def write_verdict(folder: Path, verdict: ReviewVerdict, expert: Path) -> Path:
    """Write a verdict into a folder, and the expert if it was merged; return the verdict's path.

    Args:
        folder: Where to write.
        verdict: The verdict.
        expert: Folder of the expert that was vetted.
    """
    if verdict.onto != verdict.base and verdict.passed:
        atomic.make_directory(folder / MERGED)
        for name in (EXPERT_FILE, BODY_FILE, SCOUT_FILE):
            shutil.copyfile(expert / name, folder / MERGED / name)
    path = folder / VERDICT_FILE
    atomic.write_text(path, format_record(verdict))
    return path


def read_verdict(path: Path) -> tuple[ReviewVerdict, str]:
    """Return a verdict and its digest.

    Args:
        path: The file, or the folder that `composable review` wrote.

    Raises:
        ProposalError: If there is none, or it is not one.
    """
    path = path / VERDICT_FILE if path.is_dir() else path
    try:
        data = read_bytes(path)
    except FileNotFoundError as error:
        raise ProposalError(
            "no verdict", where=str(path), hint="review the proposal first, or give --verdict DIR"
        ) from error
    return parse_record(ReviewVerdict, data, str(path), ProposalError), digest_bytes(data)
