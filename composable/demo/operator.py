"""The operator of the demo's registry: has it signed, grants names, and confirms publications.

Keys are stored without pass phrases, and the confirmation holds for a year instead of a month.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from composable.packaging.registry.locations import forget_keys, open_for_publishing
from composable.packaging.trust.keys import create_key

REGISTRY: Final = "registry"
OPERATOR: Final = "operator"
_DAYS: Final = 365


def create_registry(folder: Path, contributors: Iterable[str]) -> None:
    """Create a signed registry, and a key for each contributor to publish its expert with.

    Args:
        folder: The demo's folder.
        contributors: Their names, which are those of their experts.
    """
    # Another demo may have had a registry here, with other keys.
    forget_keys(folder / REGISTRY)
    registry = open_for_publishing(folder / REGISTRY, keys=keys_of(folder, OPERATOR))
    registry.create()
    signatures = registry.open_signatures()
    signatures.create(None)
    for name in contributors:
        key = create_key(keys_of(folder, name), name, None)
        signatures.authority().grant(name, [name], [key.public])
    confirm_publications(folder)


def confirm_publications(folder: Path) -> None:
    """Make visible what the contributors have published."""
    registry = open_for_publishing(folder / REGISTRY, keys=keys_of(folder, OPERATOR))
    registry.open_signatures().sign(days=_DAYS)


def keys_of(folder: Path, name: str) -> Path:
    """Return the folder of the keys of a contributor, or of the operator."""
    return folder / "keys" / name
