"""The card: what was measured of an expert, machine-readable, and how to measure it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from composable.errors import VettingError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.interface import RouterInterface
from composable.packaging.manifests.manifest import BODY_FILE, SCOUT_FILE, Manifest, PackageFile

if TYPE_CHECKING:
    from composable.vetting.checks import Verdict

CARD_FILE: Final = "card.json"


def write_card(
    folder: Path,
    manifest: Manifest,
    interface: RouterInterface,
    verdict: Verdict,
    training: dict[str, Any],
    against: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `card.json` into an expert's folder and return what it says.

    Args:
        folder: The expert.
        manifest: Its manifest.
        interface: What it was vetted against.
        verdict: The outcome.
        training: What training recorded.
        against: How it compares with an older release, if it was compared: its `release`, the
            digests of its `tensors`, and the `regressions`, in words.
    """
    card = {
        "expert": f"{manifest.name}@{manifest.version}",
        "interface": {"name": interface.name, "digest": interface.digest},
        "tensors": tensor_digests(folder),
        "passed": verdict.passed,
        "checks": [dataclasses.asdict(check) for check in verdict.checks],
        "measured": verdict.measured,
        **({"against": against} if against else {}),
        "training": training,
        "measure_again": "composable check DIR --data HELD_OUT_TEXT",
    }
    atomic.write_text(folder / CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return card


def require_passed(folder: Path, interface: RouterInterface) -> dict[str, Any]:
    """Return an expert's card if it allows publishing.

    Raises:
        VettingError: If there is no card, it is of other tensors or another interface, or a check
            failed.
    """
    where, hint = str(folder / CARD_FILE), f"run: composable check {folder}"
    try:
        card: dict[str, Any] = json.loads((folder / CARD_FILE).read_text())
    except FileNotFoundError as error:
        raise VettingError("the expert was not vetted", where=where, hint=hint) from error
    except ValueError as error:
        raise VettingError(f"not JSON: {error}", where=where, hint=hint) from error
    if not isinstance(card, dict):
        raise VettingError("not a table of figures", where=where, hint=hint)
    try:
        tensors = tensor_digests(folder)
    except FileNotFoundError as error:
        raise VettingError(
            "the tensors are not there", where=str(error.filename), hint="train the expert first"
        ) from error
    if card.get("tensors") != tensors:
        raise VettingError("the tensors changed since they were vetted", where=where, hint=hint)
    if card.get("interface", {}).get("digest") != interface.digest:
        raise VettingError("vetted against another interface", where=where, hint=hint)
    failed = [check for check in card.get("checks", []) if not check.get("passed")]
    if failed or not card.get("passed"):
        story = "; ".join(
            f"{check['name']}: {check['found']}, expected {check['expected']}" for check in failed
        )
        raise VettingError(f"a check failed: {story}", where=where)
    return card


def find_regressions(card: dict[str, Any], older: tuple[PackageFile, ...]) -> list[str] | None:
    """Return how the tensors of a card are worse than those of an older release.

    Args:
        card: The card.
        older: The older release's files.

    Returns:
        What is worse beyond noise, in words; None if the two were never compared.
    """
    tensors = {file.name: file.digest for file in older if file.name in (BODY_FILE, SCOUT_FILE)}
    if tensors == card["tensors"]:
        return []
    record = card.get("against")
    if not isinstance(record, dict) or record.get("tensors") != tensors:
        return None
    return [str(found) for found in record.get("regressions", ())]


def tensor_digests(folder: Path) -> dict[str, str]:
    """Return the digests of an expert's tensor files, by name."""
    return {name: digest_file(folder / name) for name in (BODY_FILE, SCOUT_FILE)}
