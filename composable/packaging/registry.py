"""Registries: where releases are published and found.

The layout is made of plain files, so that any static host can serve it:

    config.json                      which layout this is
    index/<shard>/<name>.jsonl       one line per release: all that resolving needs
    blobs/<aa>/<sha256>              manifests and files by digest
    catalog.jsonl                    one line per package, for search and hints
    records/<name>/<version>.json    one release as published; created once, never changed
    records/<name>/<version>.yanked  there while the release is yanked
    names/<key>                      the one name that owns a look-alike key

Clients read the first four. Publishers agree through `records/` and `names/`, whose files are
created exclusively: of two that publish the same version or look-alike names, exactly one succeeds.
The index is derived from the records, and the catalogue from the indexes. A publisher creates its
record, writes the index from all records, then looks again, and repeats while the index is behind
them. An object store replaces the index only if it is still the one that the publisher saw, so what
was acknowledged once is never lost. In a folder that cannot be had without trusting locks, but
whoever writes the index last looks after writing, and every record that was created before is seen
then; a record created later has a publisher that is yet to write. What a publisher that is killed
between writing and looking may leave behind, the next look into that folder mends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from composable.errors import (
    IntegrityError,
    ManifestError,
    PackagingError,
    RegistryError,
    UnknownExpertError,
    UnreachableError,
)
from composable.interface.digest import canonical_json, digest_bytes, is_digest
from composable.packaging.manifest import Manifest
from composable.packaging.names import check_package_name, confusable_key, did_you_mean
from composable.packaging.packing import pack_expert
from composable.packaging.release import TIME_FORMAT, Release, choose_newest
from composable.packaging.storage import Document, Folder, Progress, Storage, WritableStorage
from composable.packaging.toml import MAX_TOML_BYTES
from composable.packaging.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

SCHEMA: Final = 1
CONFIG_FILE: Final = "config.json"
CATALOG_FILE: Final = "catalog.jsonl"
MAX_ATTEMPTS: Final = 100
SMALL_BLOB_ATTEMPTS: Final = 3
MAX_TEXT: Final = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What the catalogue says of a package: its newest release, for search.

    Args:
        name: Package name.
        version: Its newest version.
        interface: Name and range of the router interface that it plugs into.
        description: One line.
        tags: Languages, domains and capabilities.
    """

    name: str
    version: Version
    interface: str
    description: str = ""
    tags: tuple[str, ...] = ()


class Registry:
    """Releases in a storage; knows nothing of stores or locks.

    Args:
        storage: Where its files lie; to publish, one that can be written to.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._is_checked = False

    @property
    def location(self) -> str:
        """Where it is, as an error message shows it: without any secret."""
        return self.storage.location

    @property
    def exists(self) -> bool:
        """Whether there is a registry; the first to publish makes one."""
        return self.storage.read(CONFIG_FILE) is not None

    def names(self) -> list[str]:
        """Return all package names, sorted.

        Raises:
            RegistryError: For a catalogue that cannot be read.
        """
        return [entry.name for entry in self.entries()]

    def entries(self) -> list[Entry]:
        """Return what the catalogue says of every package, by name; nothing without a catalogue.

        Raises:
            RegistryError: For a catalogue that cannot be read.
        """
        self._check_config()
        catalog = self.storage.read(CATALOG_FILE)
        return sorted(self._read_catalog(catalog).values(), key=lambda entry: entry.name)

    def versions(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest version first; none for an unknown name.

        Raises:
            RegistryError: For an index that cannot be read.
        """
        path = index_path(name)
        self._check_config()
        told = self._parse_index(self.storage.read(path), name)
        if isinstance(self.storage, Folder) and _is_behind(self.storage, name, told):
            told = self._parse_index(Document(_compile_index(self.storage, name), None), name)
        return tuple(told[version] for version in sorted(told))

    def stream(self, digest: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a blob from offset `start` on; the caller verifies them.

        Raises:
            RegistryError: When there is no such blob.
            UnreachableError: When the answer breaks off, or none can be had.
        """
        return self.storage.stream(blob_path(digest), start)

    def read_blob(self, digest: str, what: str, limit: int) -> bytes:
        """Return the bytes of a small blob, verified.

        Args:
            digest: Its digest.
            what: What errors call it.
            limit: Most bytes that it may have.

        Raises:
            RegistryError: When there is no such blob.
            IntegrityError: When its bytes are not those promised.
        """
        for attempt in range(SMALL_BLOB_ATTEMPTS):
            data = bytearray()
            try:
                for piece in self.stream(digest):
                    data += piece
                    if len(data) > limit:
                        raise IntegrityError(
                            f"{what} from {self.location} is larger than {limit:,} bytes"
                        )
            except UnreachableError:
                if attempt == SMALL_BLOB_ATTEMPTS - 1:
                    raise
                continue
            if digest_bytes(bytes(data)) == digest:
                return bytes(data)
        raise IntegrityError(
            f"{what} from {self.location} is not what was promised ({digest})",
            hint="the registry is damaged or dishonest; nothing was kept",
        )

    def read_manifest(self, release: Release) -> Manifest:
        """Fetch, verify and read the manifest of a release.

        Raises:
            IntegrityError: When the bytes are not those that the index promised.
            ManifestError: When they are, but are not a manifest of this release.
        """
        where = f"{release.name} {release.version} expert.toml"
        data = self.read_blob(release.manifest, where, MAX_TOML_BYTES)
        manifest = Manifest.loads(data.decode(), where)
        if (manifest.name, manifest.version) != (release.name, release.version):
            raise ManifestError(f"describes {manifest.name} {manifest.version}", where=where)
        return manifest

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
            RegistryError: When the registry is read only, the version exists with other content,
                or the name may be taken for another one here.
        """
        storage = self._writable()
        manifest = pack_expert(directory, interface=interface)
        self._create_config(storage)
        self._require_same(manifest, _read_record(storage, manifest.name, manifest.version))
        self._claim_name(storage, manifest.name)
        for file in manifest.files:
            storage.upload(blob_path(file.digest), directory / file.name, file, progress)
        _put_blob(storage, manifest.digest, manifest.to_toml().encode())
        now = datetime.datetime.now(datetime.UTC).strftime(TIME_FORMAT)
        record = record_path(manifest.name, manifest.version)
        line = Release.of(manifest, now).to_line()
        while not storage.create(record, line):
            seen = storage.read(record)
            existing = _read_record(storage, manifest.name, manifest.version)
            self._require_same(manifest, existing)
            # One that cannot be read was cut by a crash, or is damaged: the index may know it.
            if existing is not None:
                line = existing.to_line()
            if seen and (_is_release(seen, existing) or storage.replace(record, line, seen)):
                break
        self._write_index(storage, manifest.name)
        return manifest

    def yank(self, name: str, version: Version) -> None:
        """Withdraw a release from new resolutions; locks that have it keep working.

        Raises:
            UnknownExpertError: When there is no such release.
            RegistryError: When the registry is read only.
        """
        storage = self._writable()
        self._check_release(storage, name, version)
        storage.create(record_path(name, version, "yanked"), b"")
        self._write_index(storage, name)

    def unyank(self, name: str, version: Version) -> None:
        """Take back a yank.

        Raises:
            UnknownExpertError: When there is no such release.
            RegistryError: When the registry is read only.
        """
        storage = self._writable()
        self._check_release(storage, name, version)
        storage.remove(record_path(name, version, "yanked"))
        self._write_index(storage, name)

    def _writable(self) -> WritableStorage:
        if not hasattr(self.storage, "create"):
            raise RegistryError(
                "cannot be published to",
                where=self.location,
                hint="publish to a folder or a bucket: to the one that a web server serves",
            )
        return cast(WritableStorage, self.storage)

    def _write_index(self, storage: WritableStorage, name: str) -> None:
        """Write the index of a package, then the catalogue, until they agree with the records."""
        self._derive(storage, index_path(name), lambda _: _compile_index(storage, name))
        self._derive(storage, CATALOG_FILE, lambda seen: self._compile_catalog(storage, seen, name))

    def _derive(
        self,
        storage: WritableStorage,
        path: str,
        compile_: Callable[[Document | None], bytes],
    ) -> None:
        """Write what a document should be by now, and look again until it is."""
        for attempt in range(MAX_ATTEMPTS):
            seen = storage.read(path)
            wanted = compile_(seen)
            if seen is not None and seen.data == wanted:
                storage.settle(path)
                return
            if not storage.replace(path, wanted, seen):
                time.sleep(random.uniform(0, min(0.01 * 2**attempt, 1.0)))
        raise RegistryError(
            f"others changed {path} {MAX_ATTEMPTS} times in a row",
            where=self.location,
            hint="run the same command again",
        )

    def _compile_catalog(self, storage: WritableStorage, seen: Document | None, name: str) -> bytes:
        """Return the catalogue with what is new of one package, and of any that it lacks."""
        entries = self._read_catalog(seen)
        there = {confusable_key(known) for known in entries}
        owners = (
            storage.read(f"names/{key}") for key in storage.names_in("names") if key not in there
        )
        for other in {name, *(_read_owner(owner) for owner in owners if owner)}:
            releases = self.versions(other)
            if releases:
                entries[other] = _describe(choose_newest(releases))
        return b"".join(_to_line(entries[key]) + b"\n" for key in sorted(entries))

    def _read_catalog(self, document: Document | None) -> dict[str, Entry]:
        entries = {}
        lines = document.data.splitlines() if document is not None else []
        for number, line in enumerate(lines, 1):
            entry = _parse_entry(line, f"{self.location}/{CATALOG_FILE}:{number}")
            entries[entry.name] = entry
        return entries

    def _parse_index(self, index: Document | None, name: str) -> dict[Version, Release]:
        releases: dict[Version, Release] = {}
        for number, line in enumerate(index.data.splitlines() if index is not None else (), 1):
            where = f"{self.location}/{index_path(name)}:{number}"
            release = Release.from_line(line, name, where)
            if release.version in releases:
                raise RegistryError(f"{release.version} is there twice", where=where)
            releases[release.version] = release
        return releases

    def _check_release(self, storage: WritableStorage, name: str, version: Version) -> None:
        if _read_record(storage, check_package_name(name), version) is None:
            have = ", ".join(str(release.version) for release in self.versions(name))
            raise UnknownExpertError(
                f"no release {name} {version}",
                where=self.location,
                hint=f"there are {have}" if have else did_you_mean(name, self.names()),
            )

    def _claim_name(self, storage: WritableStorage, name: str) -> None:
        """Make sure that no other package has a name that a reader may take for this one."""
        path = f"names/{confusable_key(name)}"
        if storage.create(path, name.encode()):
            return
        claimed = storage.read(path)
        owner = _read_owner(claimed) if claimed is not None else name
        if owner != name:
            raise RegistryError(
                f"{name!r} may be taken for {owner[:80]!r}, which is published here",
                where=self.location,
                hint="choose a name that differs by more than look-alike letters or hyphens",
            )

    def _require_same(self, manifest: Manifest, existing: Release | None) -> None:
        """Refuse to publish other content under a version that exists."""
        if existing is not None and existing.manifest != manifest.digest:
            raise RegistryError(
                f"{manifest.name} {manifest.version} is already published with other content",
                where=self.location,
                hint="a release never changes: raise the version",
            )

    def _create_config(self, storage: WritableStorage) -> None:
        config = {"kind": "composable-registry", "schema": SCHEMA}
        storage.create(CONFIG_FILE, canonical_json(config) + b"\n")
        self._check_config()

    def _check_config(self) -> None:
        """Check, once, that the storage has a layout that this release reads."""
        if self._is_checked:
            return
        document = self.storage.read(CONFIG_FILE)
        if document is None:
            raise RegistryError(
                "is not a registry: it has no config.json",
                where=self.location,
                hint="`composable publish` to a folder or a bucket creates one",
            )
        try:
            config = json.loads(document.data)
            schema = config["schema"] if config["kind"] == "composable-registry" else None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RegistryError("cannot be read", where=f"{self.location}/{CONFIG_FILE}") from error
        if schema != SCHEMA:
            raise RegistryError(
                f"has layout {schema!r}, this release reads {SCHEMA}", where=self.location
            )
        self._is_checked = True


def index_path(name: str) -> str:
    """Return where the index of a package lies.

    Raises:
        ManifestError: For what is no package name, before any path is joined.
    """
    return f"index/{check_package_name(name)[:2]}/{name}.jsonl"


def record_path(name: str, version: Version, suffix: str = "json") -> str:
    """Return where the record of a release lies, or with suffix `yanked` the mark of a yank."""
    # Build metadata takes no part in what a version is, so it is not part of the file's name.
    text = str(version).partition("+")[0]
    return f"records/{check_package_name(name)}/{text}.{suffix}"


def blob_path(digest: str) -> str:
    """Return where a blob lies under the root of a registry or a store.

    Raises:
        IntegrityError: For text that is not a digest, before any path is joined.
    """
    if not is_digest(digest):
        raise IntegrityError(f"{digest[:80]!r} is not a digest (sha256: and 64 hex digits)")
    hex_digits = digest.removeprefix("sha256:")
    return f"blobs/{hex_digits[:2]}/{hex_digits}"


def open_registry(
    location: str | Path, base: Path | None = None, *, name: str = "", is_offline: bool = False
) -> Registry:
    """Return the registry at a location, to read from.

    What a remote one answers is kept in the store, and asked for again only if it changed.

    Args:
        location: A folder, absolute or relative to `base`, or an export in one file; a `file:`,
            `http:` or `https:` URL; or one of a bucket: `s3:`, `gs:` or `az:`.
        base: Directory that relative folders are counted from; by default the working directory.
        name: What the project calls it; its token is looked for under that name.
        is_offline: Whether to answer for a remote one from what is kept alone.

    Raises:
        RegistryError: For a kind of location that this release does not know.
    """
    storage = _open_storage(location, base or Path(), name)
    if storage.is_remote:
        from composable.packaging.cache import CachedStorage
        from composable.packaging.store import Store

        storage = CachedStorage(storage, Store().root / "documents", is_offline=is_offline)
    return Registry(storage)


def open_for_publishing(location: str | Path) -> Registry:
    """Return the registry at a location, to publish to; a folder or a bucket.

    Raises:
        RegistryError: For a web server, or a kind of location that this release does not know.
    """
    registry = Registry(_open_storage(location, Path(), ""))
    registry._writable()
    return registry


def _open_storage(location: str | Path, base: Path, name: str) -> Storage:
    scheme, found, rest = str(location).partition("://")
    if isinstance(location, Path) or not found or scheme == "file":
        path = base / Path(rest if found and scheme == "file" else location).expanduser()
        if path.suffix == ".tar" and path.is_file():
            from composable.packaging.bundle import TarFile

            return TarFile(path)
        return Folder(path)
    if scheme in ("http", "https"):
        from composable.packaging.credentials import find_token
        from composable.packaging.web import WebStorage

        return WebStorage(location, find_token(name, location))
    from composable.packaging.bucket import SCHEMES, BucketStorage

    if scheme in SCHEMES:
        return BucketStorage(location)
    raise RegistryError(
        f"{scheme!r} registries are not supported",
        where=location,
        hint="give a folder, or a URL that begins with https://, s3://, gs:// or az://",
    )


def _is_behind(folder: Folder, name: str, told: Mapping[Version, Release]) -> bool:
    """Say whether the records of a package know of releases or yanks that its index lacks."""
    names = folder.names_in(f"records/{name}")
    recorded = {file.removesuffix(".json") for file in names if file.endswith(".json")}
    yanked = {file.removesuffix(".yanked") for file in names if file.endswith(".yanked")}
    known = {str(v).partition("+")[0]: release.is_yanked for v, release in told.items()}
    return recorded >= known.keys() and known != {v: v in yanked for v in recorded}


def _compile_index(storage: WritableStorage, name: str) -> bytes:
    """Return the index that the records imply."""
    names = set(storage.names_in(f"records/{name}"))
    releases = []
    for file in names:
        stem, _, suffix = file.rpartition(".")
        if suffix != "json":
            continue
        release = _read_record(storage, name, Version(stem))
        if release is not None:
            is_yanked = f"{stem}.yanked" in names
            releases.append(dataclasses.replace(release, is_yanked=is_yanked))
    releases.sort(key=lambda release: release.version)
    return b"".join(release.to_line() + b"\n" for release in releases)


def _is_release(document: Document, release: Release | None) -> bool:
    """Say whether a record can be read, as that of `release`."""
    if release is None:
        return False
    with contextlib.suppress(RegistryError):
        return Release.from_line(document.data, release.name, "") == release
    return False


def _read_record(storage: Storage, name: str, version: Version) -> Release | None:
    """Return a record; for one that is damaged, what the index has of it.

    None where neither tells: it is not there, or was cut by a crash and never acknowledged.
    """
    path = record_path(name, version)
    document = storage.read(path)
    if document is None:
        return None
    with contextlib.suppress(RegistryError):
        return Release.from_line(document.data, name, path)
    index = storage.read(index_path(name))
    for line in index.data.splitlines() if index is not None else ():
        with contextlib.suppress(RegistryError):
            release = Release.from_line(line, name, path)
            if release.version == version:
                return dataclasses.replace(release, is_yanked=False)
    return None


def _put_blob(storage: WritableStorage, digest: str, data: bytes) -> None:
    """Write a small blob unless it is there and whole."""
    path = blob_path(digest)
    seen = storage.read(path)
    while seen is None or digest_bytes(seen.data) != digest:
        if storage.replace(path, data, seen):
            return
        seen = storage.read(path)
    storage.settle(path)


def _describe(release: Release) -> Entry:
    return Entry(
        name=release.name,
        version=release.version,
        interface=f"{release.interface.name} {release.interface.requires}",
        description=release.description,
        tags=release.tags,
    )


def _read_owner(document: Document) -> str:
    return document.data.decode(errors="replace")


def _to_line(entry: Entry) -> bytes:
    return canonical_json(
        {**dataclasses.asdict(entry), "version": str(entry.version), "tags": list(entry.tags)}
    )


def _parse_entry(line: bytes, where: str) -> Entry:
    """Read a line of the catalogue; fields that later releases add are passed over."""
    try:
        data = json.loads(line)
        texts = (data["interface"], data["description"], *data["tags"])
        if not all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts):
            raise ValueError("a field is not text")
        return Entry(
            name=check_package_name(data["name"]),
            version=Version(data["version"]),
            interface=data["interface"],
            description=data["description"],
            tags=tuple(data["tags"]),
        )
    except PackagingError as error:
        raise RegistryError(error.message, where=where) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RegistryError(f"not an entry of a catalogue: {error}", where=where) from error
