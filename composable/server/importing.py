"""Fill a server with the releases of another registry, each verified as if it was published."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from composable.errors import ComposableError
from composable.files.reading import open_file
from composable.packaging.install.download import download_file
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import CHUNK_BYTES, PackageFile
from composable.packaging.manifests.toml import MAX_TOML_BYTES
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import Release
from composable.packaging.registry.signed import statement_path
from composable.server.accounts import Caller
from composable.server.services import Services


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What became of a release.

    Args:
        name: Its package.
        version: Its version.
        problem: Why it was refused; None if it was published.
    """

    name: str
    version: str
    problem: ComposableError | None


def import_registry(services: Services, caller: Caller, source: Registry) -> list[Imported]:
    """Publish all releases of a registry, oldest first. Those that are here already stay.

    Args:
        services: The server's parts.
        caller: Who publishes them, and owns the packages that are new.
        source: Where they are.

    Raises:
        RegistryError: When the source cannot be read.
    """
    found = []
    for name in source.names():
        for release in source.versions(name):
            problem = None
            try:
                _import_release(services, caller, source, release)
            except ComposableError as error:
                problem = error
            found.append(Imported(name=name, version=str(release.version), problem=problem))
    return found


def _import_release(services: Services, caller: Caller, source: Registry, release: Release) -> None:
    publishing = services.publishing
    signer = source.verify_release(release)
    found = source.storage.read(statement_path(release.name, release.version)) if signer else None
    statement = b"" if found is None else found.data
    text = source.read_blob(release.manifest, f"{release.name} expert.toml", MAX_TOML_BYTES)
    opened = publishing.start(caller, text.decode())
    if opened["is_published"]:
        return
    missing = {entry["digest"]: entry["missing"] for entry in opened["files"]}
    with tempfile.TemporaryDirectory(prefix="composable-import-") as folder:
        store = Store(folder)
        for file in release.files:
            if missing.get(file.digest):
                # The source may have the file only as a delta.
                download_file(source, store, file, label=f"{release.name} {file.name}")
                _send(services, caller, store.path(file.digest), opened["id"], file)
    publishing.commit(caller, opened["id"], statement=statement)


def _send(
    services: Services, caller: Caller, path: Path, publication: str, file: PackageFile
) -> None:
    with open_file(path) as source:
        for number, _ in enumerate(range(0, file.size, CHUNK_BYTES)):
            data = source.read(CHUNK_BYTES)
            services.publishing.receive(caller, publication, file.digest, number, data)
