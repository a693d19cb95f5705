"""Backbone packages as folders: finding them and reading their files. No arrays here.

A backbone package is a flat folder: `backbone.toml`, `config.json`, `interface.json`,
`weights.safetensors`, `anchor.jsonl`, `card.json` and `README.md`; and `tokenizer.json` and
`special_tokens.json` if its tokens are not bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from composable.errors import DiskError, IntegrityError, InterfaceError, PackagingError
from composable.files.blobs import digest_file
from composable.files.reading import read_bytes
from composable.files.text import decode_text
from composable.interface import RouterInterface, digest_bytes
from composable.packaging.manifests.manifest import BACKBONE_FILE, BackbonePackage, PackageFile

CONFIG_FILE: Final = "config.json"
INTERFACE_FILE: Final = "interface.json"
WEIGHTS_FILE: Final = "weights.safetensors"
ANCHOR_FILE: Final = "anchor.jsonl"
TOKENIZER_FILE: Final = "tokenizer.json"
SPECIAL_TOKENS_FILE: Final = "special_tokens.json"
_SHIPPED: Final = Path(__file__).parents[2] / "backbones"


def find_backbone(name: str, base: Path | None = None) -> Path:
    """Return the folder of a backbone package.

    Args:
        name: Name of a backbone that ships with the project, or a folder.
        base: Directory that relative folders are relative to; by default the working directory.

    Raises:
        PackagingError: If there is none.
    """
    for folder in (_SHIPPED / name, (base or Path()) / name):
        if (folder / BACKBONE_FILE).is_file():
            return folder
    shipped = ", ".join(sorted(path.parent.name for path in _SHIPPED.glob(f"*/{BACKBONE_FILE}")))
    raise PackagingError(
        f"no backbone {name!r}: expected a folder with a {BACKBONE_FILE}, or a backbone that ships "
        f"with composable ({shipped})"
    )


def read_interface(folder: Path) -> RouterInterface:
    """Return the router interface that a backbone package publishes.

    Raises:
        IntegrityError: If the file does not match the manifest.
        InterfaceError: If it is malformed.
    """
    path = str(folder / INTERFACE_FILE)
    return RouterInterface.from_json(
        decode_text(read_listed(folder, INTERFACE_FILE), path, InterfaceError), path
    )


def lists_file(folder: Path, name: str) -> bool:
    """Return whether a backbone package's manifest lists a file.

    Raises:
        ManifestError: If the manifest is missing or bad.
    """
    return any(file.name == name for file in BackbonePackage.read(folder).files)


def read_listed(folder: Path, name: str) -> bytes:
    """Return the bytes of a backbone package's file, checked against its manifest.

    Raises:
        ManifestError: If the manifest is missing or bad.
        IntegrityError: If the file is not listed, missing, or does not match the manifest.
    """
    listed = _listed(folder, name)
    try:
        data = read_bytes(folder / name)
    except (OSError, DiskError) as error:
        raise IntegrityError("the file cannot be read", where=str(folder / name)) from error
    _require_listed(folder, listed, len(data), digest_bytes(data))
    return data


def check_listed(folder: Path, name: str) -> None:
    """Check a backbone package's file against its manifest, in bounded memory.

    Raises:
        ManifestError, IntegrityError: As `read_listed`.
    """
    listed = _listed(folder, name)
    try:
        digest = digest_file(folder / name)
        size = (folder / name).stat().st_size
    except (OSError, DiskError) as error:
        raise IntegrityError("the file cannot be read", where=str(folder / name)) from error
    _require_listed(folder, listed, size, digest)


def _listed(folder: Path, name: str) -> PackageFile:
    for file in BackbonePackage.read(folder).files:
        if file.name == name:
            return file
    raise IntegrityError(f"not listed in {BACKBONE_FILE}", where=str(folder / name))


def _require_listed(folder: Path, listed: PackageFile, size: int, digest: str) -> None:
    if digest != listed.digest:
        raise IntegrityError(
            f"has {size:,} bytes with digest {digest}, but {BACKBONE_FILE} lists "
            f"{listed.size:,} with {listed.digest}",
            where=str(folder / listed.name),
            hint="the package is damaged; install it again",
        )
