"""Packing: from an expert's directory to a manifest with all files hashed and tensors checked."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import InterfaceError, ManifestError
from composable.files import atomic
from composable.files.reading import is_regular, open_file
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    CHUNK_BYTES,
    EXPERT_FILE,
    EXPERT_FILES,
    SCOUT_FILE,
    STATISTICS_FILE,
    Manifest,
    PackageFile,
)
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

REQUIRED_FILES: Final = (BODY_FILE, SCOUT_FILE)


def pack_expert(directory: Path, *, interface: RouterInterface | None = None) -> Manifest:
    """Return the manifest of an expert's directory with files and interface digest filled in.

    Nothing is written. Without an interface the manifest must already contain the digest that the
    expert was trained against, and tensors are checked only for format and finite values.

    Args:
        directory: The expert's directory.
        interface: The router interface that it must fit.

    Raises:
        ManifestError: For an invalid manifest, a missing file, or files that do not match a
            manifest that is already packed.
        TensorFileError: For invalid tensor files, or tensors that do not fit the interface.
        InterfaceError: For an expert that does not fit the interface.
    """
    manifest = Manifest.read(directory)
    if interface is not None:
        manifest = fit_interface(manifest, interface)
    elif manifest.interface.digest is None:
        raise ManifestError(
            "missing, and no interface is given to fill it in",
            where="expert.toml: interface.digest",
            hint="train or pack the expert against a backbone, which fills it in",
        )
    files = []
    for name in EXPERT_FILES:
        path = directory / name
        if is_regular(path):
            files.append(describe_file(path))
        elif name in REQUIRED_FILES or os.path.lexists(path):
            raise ManifestError("is missing or not a regular file", where=str(path))
    packed = dataclasses.replace(manifest, files=tuple(sorted(files, key=lambda f: f.name)))
    if manifest.files and manifest.files != packed.files:
        raise ManifestError(
            "does not match the files in this directory",
            where="expert.toml: files",
            hint="leave out [[files]]: packing fills it in",
        )
    check_expert_tensors(directory, packed, interface=interface)
    if any(file.name == STATISTICS_FILE for file in files):
        from composable.packaging.manifests.statistics import check_statistics

        check_statistics(directory, manifest.scout_width, interface)
    return packed


def pack_named(directory: Path, name: str, interface: RouterInterface | None) -> Manifest:
    """Return the packed manifest of an expert's directory, and check the expert's name.

    Raises:
        ManifestError: When the directory does not exist or contains another expert.
    """
    if not directory.is_dir():
        raise ManifestError(f"no such folder, expected expert {name!r}", where=str(directory))
    manifest = pack_expert(directory, interface=interface)
    if manifest.name != name:
        raise ManifestError(
            f"contains expert {manifest.name!r}, expected {name!r}",
            where=str(directory / EXPERT_FILE),
        )
    return manifest


def check_expert_tensors(
    directory: Path, manifest: Manifest, *, interface: RouterInterface | None = None
) -> None:
    """Check an expert's tensor files, against its signature if an interface is given.

    Raises:
        TensorFileError: For invalid tensor files, or tensors that do not fit the interface.
        InterfaceError: For a body or a scout that the interface does not allow.
    """
    from composable.files.safetensors import check_tensors, read_header
    from composable.interface.contract import TensorSpec
    from composable.interface.signature import body_signature, scout_signature

    if interface is None:
        for name in REQUIRED_FILES:
            header = read_header(directory / name)
            as_found = {
                tensor: TensorSpec(shape=info.shape, dtypes=(info.dtype,))
                for tensor, info in header.items()
            }
            check_tensors(directory / name, as_found)
        return
    body = body_signature(interface, manifest.body.kind, manifest.body.rank)
    scout = scout_signature(interface, manifest.scout_width)
    declared = {
        name: dataclasses.replace(spec, dtypes=(manifest.body.dtype,))
        for name, spec in body.items()
    }
    check_tensors(directory / BODY_FILE, declared)
    check_tensors(directory / SCOUT_FILE, scout)


def fit_interface(manifest: Manifest, interface: RouterInterface) -> Manifest:
    """Return the manifest with the interface's digest filled in.

    Raises:
        InterfaceError: For an expert that does not fit the interface.
    """
    need = manifest.interface
    if need.name != interface.name:
        raise InterfaceError(
            f"the expert needs router interface {need.name!r}, not {interface.name!r}",
            where="expert.toml: interface.name",
        )
    if not need.requires.contains(Version(interface.version)):
        raise InterfaceError(
            f"{need.requires} does not contain {interface.name} {interface.version}",
            where="expert.toml: interface.requires",
        )
    digest = need.digest or interface.digest
    if not interface.honours_digest(digest):
        raise InterfaceError(
            f"{interface.name} {interface.version} does not honour {digest}, "
            "which the expert was trained against",
            where="expert.toml: interface.digest",
            hint="train the expert against this interface",
        )
    return dataclasses.replace(manifest, interface=dataclasses.replace(need, digest=digest))


def describe_file(path: Path) -> PackageFile:
    """Return a file's name, size and digests: of the whole and, if several, of its chunks."""
    whole, size = hashlib.sha256(), 0
    chunks: list[str] = []
    with open_file(path) as file, atomic.explained(path, "read"):
        while data := file.read(CHUNK_BYTES):
            whole.update(data)
            size += len(data)
            chunks.append(hashlib.sha256(data).hexdigest())
    return PackageFile(
        name=path.name,
        size=size,
        digest=f"sha256:{whole.hexdigest()}",
        chunks=tuple(chunks) if len(chunks) > 1 else (),
    )
