"""Registries: where releases are published and found.

The layout is made of plain files, so that any static host can serve it:

    config.json                      which layout this is
    index/<shard>/<name>.jsonl       one line per release: all that resolving needs
    blobs/<aa>/<sha256>              manifests and files by digest
    records/<name>/<version>.json    one release as published; created once, never changed
    records/<name>/<version>.yanked  there while the release is yanked
    names/<key>                      the one name that owns a look-alike key

Clients read `config.json`, `index/` and `blobs/`. Publishers agree through `records/` and `names/`,
whose files are created exclusively: of two that publish the same version or look-alike names,
exactly one succeeds. The index is derived from the records. A publisher creates its record, writes
the index from all records, then looks again, and repeats while the index is behind them. Whoever
writes the index last looks after writing, and every record that was created before is seen then; a
record created later has a publisher that is yet to write. So the last index written is whole, with
no lock; the lock that is taken only saves repeats.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from composable.errors import (
    IntegrityError,
    ManifestError,
    RegistryError,
    UnknownExpertError,
)
from composable.interface.digest import canonical_json, digest_bytes, is_digest
from composable.packaging import atomic
from composable.packaging.manifest import Manifest, PackageFile
from composable.packaging.names import check_package_name, confusable_key, did_you_mean
from composable.packaging.packing import pack_expert
from composable.packaging.release import Release
from composable.packaging.toml import MAX_TOML_BYTES
from composable.packaging.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

Progress = Callable[[str, int, int], None]
SCHEMA: Final = 1
CONFIG_FILE: Final = "config.json"
MAX_INDEX_BYTES: Final = 64 << 20
MAX_ATTEMPTS: Final = 100


class BlobSink(Protocol):
    """What a blob is written to."""

    def write(self, data: bytes, /) -> object:
        """Take the next bytes."""


class Registry(Protocol):
    """The port through which releases are found; knows nothing of stores or locks."""

    @property
    def location(self) -> str:
        """Where it is, as an error message shows it: without any secret."""

    def names(self) -> list[str]:
        """Return all package names, sorted."""

    def versions(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest version first; none for an unknown name."""

    def fetch(self, digest: str, sink: BlobSink) -> None:
        """Write the blob with this digest to `sink`, which verifies it."""


class FolderRegistry:
    """A registry in a folder, which a static host can serve as it is.

    Args:
        path: The folder; the first publish creates it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.path)

    def names(self) -> list[str]:
        """Return all package names, sorted."""
        return sorted(file.stem for file in self.path.glob("index/*/*.jsonl"))

    def versions(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest version first; none for an unknown name.

        Raises:
            RegistryError: For an index that cannot be read.
        """
        path = self._index_path(name)
        self._check_config()
        try:
            if path.stat().st_size > MAX_INDEX_BYTES:
                raise RegistryError("the index is larger than 64 MiB", where=str(path))
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return ()
        releases = {}
        for number, line in enumerate(lines, 1):
            release = Release.from_line(line, name, f"{path}:{number}")
            if release.version in releases:
                raise RegistryError(f"{release.version} is there twice", where=f"{path}:{number}")
            releases[release.version] = release
        return tuple(releases[version] for version in sorted(releases))

    def fetch(self, digest: str, sink: BlobSink) -> None:
        """Write the blob with this digest to `sink`, which verifies it.

        Raises:
            RegistryError: When there is no such blob.
        """
        path = self._blob_path(digest)
        try:
            with path.open("rb") as file:
                for chunk in iter(lambda: file.read(atomic.CHUNK), b""):
                    sink.write(chunk)
        except FileNotFoundError as error:
            raise RegistryError("has no such blob", where=f"{self.location}: {digest}") from error

    def publish(
        self,
        directory: Path,
        *,
        interface: RouterInterface | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Publish the expert in a directory: its blobs, its manifest, then its index line.

        Publishing the same content again changes nothing and succeeds.

        Args:
            directory: Holds `expert.toml`, `body.safetensors`, `scout.safetensors` and, if there
                are any, `card.json` and `README.md`; other files are left alone.
            interface: The router interface to check manifest and tensors against, and whose digest
                to record where the manifest names none.
            progress: Called with a file's name, bytes done and bytes in all.

        Returns:
            The manifest as published.

        Raises:
            ManifestError: For a bad manifest or a missing file.
            TensorFileError: For tensors that must not be loaded, or that do not fit.
            InterfaceError: For an expert that does not fit the interface.
            RegistryError: When the version exists with other content, or the name may be taken for
                another one here.
        """
        manifest = pack_expert(directory, interface=interface)
        self._check_config(create=True)
        atomic.sweep(self.path / "records" / manifest.name)
        existing = self._read_record(manifest.name, manifest.version)
        if existing is not None and existing.manifest != manifest.digest:
            raise self._taken(manifest)
        self._claim_name(manifest.name)
        for file in manifest.files:
            self._add_file(directory / file.name, file, progress)
        text = manifest.to_toml().encode()
        self._add_blob(manifest.digest, text)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = Release.of(manifest, now).to_line()
        record = self._record_path(manifest.name, manifest.version)
        if not atomic.create_bytes(record, line):
            existing = self._read_record(manifest.name, manifest.version)
            if existing is None:
                atomic.write_bytes(record, line)  # cut by a crash, so never acknowledged
            elif existing.manifest != manifest.digest:
                raise self._taken(manifest)
        self._write_index(manifest.name)
        return manifest

    def yank(self, name: str, version: Version) -> None:
        """Withdraw a release from new resolutions; locks that have it keep working.

        Raises:
            UnknownExpertError: When there is no such release.
        """
        self._check_release(name, version)
        atomic.create_bytes(self._record_path(name, version, "yanked"), b"")
        self._write_index(name)

    def unyank(self, name: str, version: Version) -> None:
        """Take back a yank.

        Raises:
            UnknownExpertError: When there is no such release.
        """
        self._check_release(name, version)
        atomic.remove_file(self._record_path(name, version, "yanked"))
        self._write_index(name)

    def _write_index(self, name: str) -> None:
        """Write the index of a package from its records until it agrees with them."""
        path = self._index_path(name)
        with atomic.polite_lock(self.path / "locks" / name):
            for _ in range(MAX_ATTEMPTS):
                wanted = self._compile_index(name)
                if path.exists() and path.read_bytes() == wanted:
                    return
                atomic.write_bytes(path, wanted)
        raise RegistryError(
            f"others changed the index of {name!r} {MAX_ATTEMPTS} times in a row",
            where=self.location,
            hint="publish again",
        )

    def _compile_index(self, name: str) -> bytes:
        """Return the index that the records imply."""
        folder = self.path / "records" / name
        releases = []
        for path in folder.glob("*.json"):
            release = self._read_record(name, Version(path.stem))
            if release is not None:
                is_yanked = path.with_suffix(".yanked").exists()
                releases.append(dataclasses.replace(release, is_yanked=is_yanked))
        releases.sort(key=lambda release: release.version)
        return b"".join(release.to_line() + b"\n" for release in releases)

    def _read_record(self, name: str, version: Version) -> Release | None:
        """Return a record, or None where there is none that is whole."""
        path = self._record_path(name, version)
        try:
            return Release.from_line(path.read_bytes(), name, str(path))
        except (FileNotFoundError, RegistryError):
            return None

    def _check_release(self, name: str, version: Version) -> None:
        if self._read_record(check_package_name(name), version) is None:
            have = ", ".join(str(release.version) for release in self.versions(name))
            raise UnknownExpertError(
                f"no release {name} {version}",
                where=self.location,
                hint=f"there are {have}" if have else did_you_mean(name, self.names()),
            )

    def _claim_name(self, name: str) -> None:
        """Make sure that no other package has a name that a reader may take for this one."""
        path = self.path / "names" / confusable_key(name)
        if atomic.create_bytes(path, name.encode()):
            return
        owner = path.read_text()
        if owner != name:
            raise RegistryError(
                f"{name!r} may be taken for {owner!r}, which is published here",
                where=self.location,
                hint="choose a name that differs by more than look-alike letters or hyphens",
            )

    def _add_file(self, source: Path, file: PackageFile, progress: Progress | None) -> None:
        target = self._blob_path(file.digest)
        if target.exists():
            return
        with (
            source.open("rb") as stream,
            atomic.Sink(target, digest=file.digest, size=file.size, is_read_only=True) as sink,
        ):
            for chunk in iter(lambda: stream.read(atomic.CHUNK), b""):
                sink.write(chunk)
                if progress is not None:
                    progress(file.name, sink.size, file.size)

    def _add_blob(self, digest: str, data: bytes) -> None:
        target = self._blob_path(digest)
        if not target.exists():
            with atomic.Sink(target, digest=digest, is_read_only=True) as sink:
                sink.write(data)

    def _taken(self, manifest: Manifest) -> RegistryError:
        return RegistryError(
            f"{manifest.name} {manifest.version} is already published with other content",
            where=self.location,
            hint="a release never changes: raise the version",
        )

    def _check_config(self, *, create: bool = False) -> None:
        """Check that the folder has a layout that this release reads; create it if asked."""
        path = self.path / CONFIG_FILE
        if create:
            config = {"kind": "composable-registry", "schema": SCHEMA}
            atomic.create_bytes(path, canonical_json(config) + b"\n")
        try:
            config = json.loads(path.read_bytes())
            schema = config["schema"] if config["kind"] == "composable-registry" else None
        except FileNotFoundError as error:
            raise RegistryError(
                "is not a registry: it has no config.json",
                where=self.location,
                hint="`composable publish` to a folder creates one",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError("cannot be read", where=str(path)) from error
        if schema != SCHEMA:
            raise RegistryError(
                f"has layout {schema!r}, this release reads {SCHEMA}", where=self.location
            )

    def _index_path(self, name: str) -> Path:
        return self.path / "index" / check_package_name(name)[:2] / f"{name}.jsonl"

    def _record_path(self, name: str, version: Version, suffix: str = "json") -> Path:
        # Build metadata takes no part in what a version is, so it is not part of the file's name.
        text = str(version).partition("+")[0]
        return self.path / "records" / check_package_name(name) / f"{text}.{suffix}"

    def _blob_path(self, digest: str) -> Path:
        return self.path / blob_path(digest)


def blob_path(digest: str) -> str:
    """Return where a blob lies under the root of a registry or a store.

    Raises:
        IntegrityError: For text that is not a digest, before any path is joined.
    """
    if not is_digest(digest):
        raise IntegrityError(f"{digest[:80]!r} is not a digest (sha256: and 64 hex digits)")
    hex_digits = digest.removeprefix("sha256:")
    return f"blobs/{hex_digits[:2]}/{hex_digits}"


def open_registry(location: str, base: Path) -> Registry:
    """Return the registry at a location.

    Args:
        location: A folder, absolute or relative to `base`, or a `file:` URL.
        base: Directory that relative folders are counted from.

    Raises:
        RegistryError: For a kind of location that this release does not know.
    """
    scheme, found, rest = location.partition("://")
    if found and scheme != "file":
        raise RegistryError(
            f"{scheme!r} registries are not supported", where=location, hint="give a folder"
        )
    return FolderRegistry(base / Path(rest if found else location).expanduser())


def read_manifest(registry: Registry, release: Release) -> Manifest:
    """Fetch, verify and read the manifest of a release.

    Raises:
        IntegrityError: When the bytes are not those that the index promised.
        ManifestError: When they are, but are not a manifest of this release.
    """
    buffer = _Buffer()
    registry.fetch(release.manifest, buffer)
    if digest_bytes(buffer.data) != release.manifest:
        raise IntegrityError(
            f"the manifest of {release.name} {release.version} is not what the index promises",
            where=registry.location,
        )
    manifest = Manifest.loads(
        buffer.data.decode(), f"{release.name} {release.version}: expert.toml"
    )
    if (manifest.name, manifest.version) != (release.name, release.version):
        raise ManifestError(
            f"describes {manifest.name} {manifest.version}",
            where=f"{release.name} {release.version}: expert.toml",
        )
    return manifest


class _Buffer:
    """A sink in memory, for manifests."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes, /) -> None:
        self.data += data
        if len(self.data) > MAX_TOML_BYTES:
            raise IntegrityError("is too large for a manifest")
