"""Backbone packages as files: where they are, and the contract they publish. No arrays here.

A backbone package is a flat folder: `backbone.toml`, `config.json`, `interface.json`,
`weights.safetensors`, `anchor.jsonl`, `card.json` and `README.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from composable.errors import IntegrityError, PackagingError
from composable.interface import RouterInterface, digest_bytes
from composable.packaging.manifest import BACKBONE_FILE, BackbonePackage

CONFIG_FILE: Final = "config.json"
INTERFACE_FILE: Final = "interface.json"
WEIGHTS_FILE: Final = "weights.safetensors"
ANCHOR_FILE: Final = "anchor.jsonl"
_SHIPPED: Final = Path(__file__).parent.parent / "backbones"


def find_backbone(name: str, base: Path | None = None) -> Path:
    """Return the folder of a backbone package.

    Args:
        name: Name of a backbone that ships with the project, or a folder.
        base: Directory that relative folders are counted from; by default the working directory.

    Raises:
        PackagingError: If there is none.
    """
    for folder in (_SHIPPED / name, (base or Path()) / name):
        if (folder / BACKBONE_FILE).is_file():
            return folder
    shipped = ", ".join(sorted(path.parent.name for path in _SHIPPED.glob(f"*/{BACKBONE_FILE}")))
    raise PackagingError(
        f"there is no backbone {name!r}: neither a folder with a {BACKBONE_FILE} nor one of those "
        f"that ship with composable ({shipped})"
    )


def read_interface(folder: Path) -> RouterInterface:
    """Return the router interface that a backbone package publishes.

    Raises:
        IntegrityError: If the file is not the one that the manifest lists.
        InterfaceError: If it is malformed.
    """
    return RouterInterface.from_json(read_listed(folder, INTERFACE_FILE).decode())


def read_listed(folder: Path, name: str) -> bytes:
    """Return the bytes of a backbone package's file, checked against its manifest.

    Raises:
        ManifestError: If the manifest is missing or bad.
        IntegrityError: If the file is not listed, missing, or other than listed.
    """
    files = {file.name: file for file in BackbonePackage.read(folder).files}
    where = str(folder / name)
    if name not in files:
        raise IntegrityError(f"{BACKBONE_FILE} does not list it", where=where)
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise IntegrityError("the file cannot be read", where=where) from error
    if digest_bytes(data) != files[name].digest:
        raise IntegrityError(
            f"{len(data):,} bytes with digest {digest_bytes(data)}, but {BACKBONE_FILE} lists "
            f"{files[name].size:,} with {files[name].digest}",
            where=where,
            hint="the package is damaged; install it again",
        )
    return data
