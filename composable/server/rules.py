"""What may be published: names, licences, version bumps, tensors, and the card.

The rules are those of `composable publish`, applied again to the bytes that arrived, since a client
can send anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from composable.errors import ManifestError, VettingError
from composable.files.reading import read_bytes
from composable.files.records import parse_record
from composable.interface import RouterInterface
from composable.packaging.manifests.licenses import parse_license
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.compatibility import Change, Step, compare_manifests
from composable.packaging.versions.names import confusable_key
from composable.server.refusal import RefusedError
from composable.server.settings import Settings
from composable.vetting.card import CARD_FILE, Card, find_regressions, tensor_digests

MAX_CARD_BYTES: Final = 1 << 20
# Names shorter than this are alike by accident.
MIN_TYPO_LENGTH: Final = 5


def check_sizes(sizes: Collection[int], settings: Settings) -> None:
    """Refuse a release whose files are larger than the server takes.

    Args:
        sizes: Bytes of each of its files, whole.
        settings: The server's limits.

    Raises:
        RefusedError: For a file, or all of them, beyond a limit.

    Example:
        >>> check_sizes([1 << 20, 4096], Settings())
    """
    total, largest = sum(sizes), max(sizes)
    if largest > settings.max_file_bytes or total > settings.max_release_bytes:
        raise RefusedError(
            413,
            f"{total:,} bytes of whole files, the largest {largest:,}; at most "
            f"{settings.max_release_bytes:,} and {settings.max_file_bytes:,} are allowed",
            where=f"{EXPERT_FILE}: files",
        )


def check_license(expression: str) -> str:
    """Return a licence in its one spelling if it is an SPDX expression.

    Raises:
        ManifestError: For any other text, or none.

    Example:
        >>> check_license("Apache-2.0 OR (MIT AND CC-BY-4.0)")
        'Apache-2.0 OR (MIT AND CC-BY-4.0)'
    """
    return parse_license(expression, f"{EXPERT_FILE}: expert.license")


def check_new_name(name: str, known: Iterable[str]) -> None:
    """Refuse a new name that readers may take for a known one.

    Args:
        name: The new name.
        known: All names that are, or ever were, in use.

    Raises:
        RefusedError: For one that differs by look-alike letters, case or hyphens, by one letter
            more, less or other, or by two letters swapped.

    Example:
        >>> check_new_name("french", ["german"])
        >>> check_new_name("germna", ["german"])
        Traceback (most recent call last):
        ...
        composable.server.refusal.RefusedError: 'germna' looks like 'german', which is taken
          hint: choose a name that differs in more than a letter
    """
    key, letters = confusable_key(name), name.replace("-", "")
    for other in known:
        if confusable_key(other) == key or _is_typo(letters, other.replace("-", "")):
            raise RefusedError(
                409,
                f"{name!r} looks like {other!r}, which is taken",
                hint="choose a name that differs in more than a letter",
            )


def _is_typo(one: str, other: str) -> bool:
    """Return whether two texts differ by one edit: a letter, or two neighbours swapped."""
    if abs(len(one) - len(other)) > 1 or min(len(one), len(other)) < MIN_TYPO_LENGTH:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    a, b = one[start:], other[start:]
    if a[:1].isdigit() or b[:1].isdigit():
        return False  # `legal-2` is a name of its own
    if len(a) == len(b):
        return a[1:] == b[1:] or (a[2:] == b[2:] and a[:2] == b[1::-1])
    return a[1:] == b or a == b[1:]


def check_files(folder: Path, manifest: Manifest, interface: RouterInterface | None) -> str:
    """Check the files of a release: every byte, tensor headers and values, and the card.

    Args:
        folder: The files as they arrived, with the manifest.
        manifest: The manifest.
        interface: The interface that it was trained against, if the registry knows it.

    Returns:
        The text of the card.

    Raises:
        ManifestError: When files and manifest differ.
        TensorFileError: For an unsafe tensor file, or one with other tensors.
        VettingError: For a card of another expert, or that does not pass.
    """
    packed = pack_expert(folder, interface=interface)
    if packed.digest != manifest.digest:
        raise ManifestError("is not the canonical text of a packed manifest", where=EXPERT_FILE)
    card = read_card(folder)
    if card.expert != f"{manifest.name}@{manifest.version}":
        raise VettingError(f"is the card of {card.expert[:80]!r}", where=CARD_FILE)
    if card.interface.digest != manifest.interface.digest:
        raise VettingError("vetted against another interface", where=CARD_FILE)
    if card.tensors != tensor_digests(folder):
        raise VettingError("the tensors changed since they were vetted", where=CARD_FILE)
    failed = [check.name for check in card.checks if not check.passed]
    if failed or not card.passed or not card.checks:
        raise VettingError(f"checks failed: {', '.join(failed) or 'none ran'}", where=CARD_FILE)
    return read_bytes(folder / CARD_FILE, MAX_CARD_BYTES).decode()


def read_card(folder: Path) -> Card:
    """Read the card in a folder.

    Raises:
        VettingError: When there is none, or it is not a card.
    """
    try:
        data = read_bytes(folder / CARD_FILE, MAX_CARD_BYTES)
    except FileNotFoundError as error:
        raise VettingError(
            "the expert was not vetted", where=CARD_FILE, hint="run `composable check DIR`"
        ) from error
    return parse_record(Card, data, CARD_FILE, VettingError)


def check_bump(card: Card, old: Manifest, new: Manifest) -> None:
    """Refuse a version that is a smaller step than the changes need.

    Args:
        card: The card of the new release.
        old: The manifest of the previous release.
        new: The manifest of the new release.

    Raises:
        VettingError: With the changes, and the lowest version that permits them.
    """
    changes = compare_manifests(old, new)
    regressions = find_regressions(card, old.files)
    if regressions is None:
        found = f"its weights were not compared with those of {old.version}"
        changes.append(Change("major", found))
    else:
        changes += [Change("major", found) for found in regressions]
    step = Step(old.version, new.version, tuple(changes))
    if not step.is_enough:
        raise VettingError(
            f"{new.version} is too small a step from {new.name} {old.version}, for this is a "
            f"{step.needed} change: {'; '.join(step.reasons)}",
            where=f"{EXPERT_FILE}: expert.version",
            hint=f'write version = "{step.version}", or check with --against',
        )
