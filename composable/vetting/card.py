"""The card: the JSON record of an expert's checks and figures, and how to repeat them.

Nothing is measured here; the checks are in `checks.py` and `peers.py`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from composable.errors import VettingError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.files.reading import read_bytes
from composable.files.records import parse_record, to_plain
from composable.interface import RouterInterface
from composable.packaging.manifests.manifest import BODY_FILE, SCOUT_FILE, Manifest, PackageFile
from composable.training.record import TrainingRecord

CARD_FILE: Final = "card.json"
_MEASURE_AGAIN: Final = "composable check DIR --data HELD_OUT_TEXT"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One requirement on an expert, and what was found.

    Args:
        name: Name of the check.
        passed: Whether the requirement was met.
        found: The figure, in words.
        expected: The limit, in words.
    """

    name: str
    passed: bool
    found: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class CardInterface:
    """The router interface that an expert was vetted against.

    Args:
        name: Its name.
        digest: Its digest.
    """

    name: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Against:
    """The comparison with a previous release.

    Args:
        release: The previous release, `NAME@VERSION`.
        tensors: Digests of its tensor files, by name.
        regressions: What is worse beyond noise, in words.
    """

    release: str = ""
    tensors: dict[str, str]
    regressions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Card:
    """What was measured of an expert.

    Args:
        expert: The release, `NAME@VERSION`.
        interface: The router interface that it was vetted against.
        tensors: Digests of its tensor files, by name.
        passed: Whether every check passed.
        checks: The checks, in the order they ran.
        measured: The figures behind them. Which there are depends on the checks that ran; a figure
            that is not finite is None.
        against: The comparison with a previous release, if there was one.
        training: What training recorded.
        measure_again: The command that repeats the measurement.
    """

    expert: str
    interface: CardInterface
    tensors: dict[str, str]
    passed: bool
    checks: tuple[Check, ...]
    measured: dict[str, Any] = field(default_factory=dict)
    against: Against | None = None
    training: TrainingRecord = field(default_factory=TrainingRecord)
    measure_again: str = _MEASURE_AGAIN


def format_card(card: Card) -> str:
    """Return a card as JSON text.

    Example:
        >>> interface = CardInterface(name="tiny", digest="sha256:0")
        >>> card = Card(expert="a@1.0.0", interface=interface, tensors={}, passed=True, checks=())
        >>> json.loads(format_card(card))["expert"]
        'a@1.0.0'
    """
    plain = to_plain(card)
    if card.training == TrainingRecord():
        plain["training"] = {}
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def write_card(
    folder: Path,
    manifest: Manifest,
    interface: RouterInterface,
    checks: Sequence[Check],
    measured: dict[str, Any],
    training: TrainingRecord,
    against: Against | None = None,
) -> Card:
    """Write `card.json` into an expert's folder and return the card.

    Args:
        folder: The expert's folder.
        manifest: Its manifest.
        interface: The router interface that it was vetted against.
        checks: The checks, in the order they ran; the card passes if every one did.
        measured: The figures behind them.
        training: What training recorded.
        against: The comparison with a previous release, if there was one.
    """
    card = Card(
        expert=f"{manifest.name}@{manifest.version}",
        interface=CardInterface(name=interface.name, digest=interface.digest),
        tensors=tensor_digests(folder),
        passed=all(check.passed for check in checks),
        checks=tuple(checks),
        measured=measured,
        against=against,
        training=training,
    )
    atomic.write_text(folder / CARD_FILE, format_card(card))
    return card


def require_passed(folder: Path, interface: RouterInterface) -> Card:
    """Return an expert's card if it allows publishing.

    Raises:
        VettingError: If there is no valid card, it is for other tensors or another interface, or a
            check failed.
    """
    where, hint = str(folder / CARD_FILE), f"run `composable check {shlex.quote(str(folder))}`"
    try:
        card = parse_record(Card, read_bytes(folder / CARD_FILE), where, VettingError)
    except FileNotFoundError as error:
        raise VettingError("the expert was not vetted", where=where, hint=hint) from error
    except VettingError as error:
        raise VettingError(error.message, where=where, hint=hint) from error
    try:
        tensors = tensor_digests(folder)
    except FileNotFoundError as error:
        raise VettingError(
            "the tensor file is missing", where=str(error.filename), hint="train the expert first"
        ) from error
    if card.tensors != tensors:
        raise VettingError("the tensors changed since they were vetted", where=where, hint=hint)
    if card.interface.digest != interface.digest:
        raise VettingError("vetted against another interface", where=where, hint=hint)
    failed = [check for check in card.checks if not check.passed]
    if failed or not card.passed:
        figures = [f"{check.name}: {check.found}, expected {check.expected}" for check in failed]
        raise VettingError(f"a check failed: {'; '.join(figures)}", where=where)
    return card


def find_regressions(card: Card, previous: tuple[PackageFile, ...]) -> list[str] | None:
    """Return how the tensors of a card are worse than those of a previous release.

    Args:
        card: The card.
        previous: The previous release's files.

    Returns:
        What is worse beyond noise, in words; None if the two were never compared.

    Example:
        >>> interface = CardInterface(name="tiny", digest="sha256:0")
        >>> tensors = {BODY_FILE: "sha256:1"}
        >>> card = Card(
        ...     expert="a@1.0.1", interface=interface, tensors=tensors, passed=True, checks=()
        ... )
        >>> same, other = (
        ...     PackageFile(name=BODY_FILE, size=10, digest=digest)
        ...     for digest in ("sha256:1", "sha256:2")
        ... )
        >>> find_regressions(card, (same,))
        []
        >>> find_regressions(card, (other,)) is None
        True
    """
    tensors = {file.name: file.digest for file in previous if file.name in (BODY_FILE, SCOUT_FILE)}
    if tensors == card.tensors:
        return []
    if card.against is None or card.against.tensors != tensors:
        return None
    return list(card.against.regressions)


def tensor_digests(folder: Path) -> dict[str, str]:
    """Return the digests of an expert's tensor files, by name."""
    return {name: digest_file(folder / name) for name in (BODY_FILE, SCOUT_FILE)}
