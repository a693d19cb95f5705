"""Mirrors: copies of releases from one registry to another, of any two kinds.

A mirror adds and never removes. A release is verified like one that is installed, and keeps its
digests and its time of publication; yanks and advisories follow. What is there already is not
copied again, so a mirror that was interrupted is continued by the same command. Everything is
copied in the order in which a reader needs it: files, manifest, record, index, catalogue,
advisories, and signatures last.

A mirror of everything copies documents as they are, byte for byte, so that signatures of them hold.
Documents of the target that list more are merged instead.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from composable.errors import (
    DeltaError,
    IntegrityError,
    RegistryError,
    UnknownExpertError,
    UnreachableError,
    did_you_mean,
)
from composable.files.blobs import blob_path
from composable.packaging.install.download import (
    MAX_THREADS,
    download_file,
    require_space,
    run_concurrently,
)
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry.advisories import merge_feeds
from composable.packaging.registry.index import (
    compile_index,
    describe_newest,
    index_path,
    is_record_of,
    parse_index,
    record_path,
)
from composable.packaging.registry.lines import (
    ADVISORIES_FILE,
    CATALOG_FILE,
    check_document,
    find_lost,
    has_same_lines,
    key_fields,
)
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import Release, choose_newest
from composable.packaging.registry.served import ServedRegistry
from composable.packaging.registry.signed import statement_path
from composable.packaging.registry.storage import (
    CONFIG_FILE,
    MAX_DOCUMENT_BYTES,
    Document,
    Folder,
    Storage,
    put_blob,
    read_verified,
)
from composable.packaging.registry.updates import update_document
from composable.packaging.trust.metadata import metadata_path
from composable.packaging.versions.constraint import Constraint, Requirement
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress

# Folders of files that are copied as they are, after all that they may refer to.
SIGNED_FOLDERS: Final = ("statements", "trust")
# What a client reads first is written last: it names the state of all others.
_TIMESTAMP: Final = "trust/timestamp.json"
# How often a mirror starts over because the source was signed anew in the meantime.
_MAX_ROUNDS: Final = 3


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which releases are copied.

    Args:
        requirements: Packages and ranges of their versions, with all that they require; empty for
            all packages.
        interface: Only releases that plug into the router interface of this name, which is that of
            their backbone; empty for all.
        is_latest: Whether only the newest fitting release of each package is copied.

    Example:
        >>> Selection().is_everything
        True
    """

    requirements: tuple[Requirement, ...] = ()
    interface: str = ""
    is_latest: bool = False

    @property
    def is_everything(self) -> bool:
        """Whether all releases are copied, and with them all documents."""
        return self == Selection()


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """What a mirror changed.

    Args:
        releases: Name, version and bytes of each release that was copied.
        n_present: How many releases were there already.
        yanked: Releases that are yanked now.
        unyanked: Releases that no longer are.
        documents: Paths of the indexes and other documents that changed.
        missing: What the chosen releases require and the source lacks.
    """

    releases: tuple[tuple[str, Version, int], ...]
    n_present: int
    yanked: tuple[tuple[str, Version], ...]
    unyanked: tuple[tuple[str, Version], ...]
    documents: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """The size of all releases that were copied, in bytes."""
        return sum(size for _, _, size in self.releases)


def mirror_registry(
    source: Registry,
    target: Registry,
    selection: Selection | None = None,
    *,
    is_checking: bool = False,
    progress: ByteProgress | None = None,
) -> Mirrored:
    """Copy releases from one registry to another.

    Args:
        source: Where they are.
        target: Where they are copied to; created if it does not exist.
        selection: Which ones; by default all.
        is_checking: Whether to read files that are in the target again, and to replace damaged
            ones.
        progress: Called with a file's label, bytes done and total bytes; from several threads.

    Returns:
        What changed.

    Raises:
        RegistryError: When the target is read only, or has a release with other content or a name
            that looks like one of the source.
        UnknownExpertError: When the source has no such package or release.
        IntegrityError: When bytes of the source do not match their digest.
        UnreachableError: When a registry cannot be reached; what was copied stays.
        DiskError: When the disk of the target is full.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from composable.packaging import open_for_publishing, open_registry
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = open_for_publishing(Path(folder) / "target")
        ...     mirror_registry(open_registry(Path(folder) / "source"), target)
        Traceback (most recent call last):
        composable.errors.RegistryError: ...is not a registry: it has no config.json...
    """
    if isinstance(target, ServedRegistry):
        raise RegistryError(
            "is a server, which verifies releases itself",
            where=target.location,
            hint=f"run there: `composable registry import {source.location}`",
        )
    if source.location == target.location:
        raise RegistryError("is both the source and the target", where=source.location)
    chosen = selection or Selection()
    _check_signatures(source, target, chosen)
    return target.change(
        f"Mirror {source.location}",
        lambda: _copy(_Mirror(source, target, chosen, is_checking, progress)),
    )


def _check_signatures(source: Registry, target: Registry, selection: Selection) -> None:
    """Refuse to add releases to a signed registry that their signatures would not list.

    Raises:
        RegistryError: When it is signed, and the mirror does not bring its signatures.
    """
    is_signed = target.storage.read(_TIMESTAMP) is not None
    if is_signed and not (selection.is_everything and source.storage.read(_TIMESTAMP) is not None):
        raise RegistryError(
            "is signed, and a mirror with a filter or of an unsigned registry has no signatures",
            where=target.location,
            hint="mirror all of the signed registry, or mirror to an unsigned one",
        )


def _copy(job: _Mirror) -> Mirrored:
    """Copy until no signature changed meanwhile."""
    source = job.source
    for _ in range(_MAX_ROUNDS):
        before = source.storage.read(_TIMESTAMP) if job.selection.is_everything else None
        job.copy_releases()
        signed = {} if before is None else read_signed(source.storage, job.chosen)
        if signed.get(_TIMESTAMP) == before:
            job.copy_signed(signed)
            return job.result()
    raise RegistryError(
        f"was signed anew {_MAX_ROUNDS} times while it was copied",
        where=source.location,
        hint="run the same command again: it continues",
    )


def read_signed(storage: Storage, chosen: Mapping[str, Sequence[Release]]) -> dict[str, Document]:
    """Return the files that are copied as they are, by path, in the order to write them in.

    Args:
        storage: A signed registry.
        chosen: All its releases, for a storage that cannot list its files.
    """
    listed = [storage.files_under(folder) for folder in SIGNED_FOLDERS]
    if None in listed:
        paths = [*_follow_metadata(storage)]
        for name, releases in chosen.items():
            paths += [statement_path(name, release.version) for release in releases]
    else:
        paths = [path for group in listed for path in group or ()]
    last = [path for path in paths if path == _TIMESTAMP]
    found = {path: storage.read(path) for path in [*sorted({*paths} - {*last}), *last]}
    return {path: document for path, document in found.items() if document is not None}


def _follow_metadata(storage: Storage) -> Iterator[str]:
    """Yield the paths of the metadata that a client reads: each version of root, then the rest.

    References:
        The Update Framework specification 1.0, section 5.
    """
    version = 1
    while storage.read(metadata_path("root", version)) is not None:
        yield metadata_path("root", version)
        version += 1
    yield _TIMESTAMP
    listing = _TIMESTAMP
    for _ in range(2):  # the timestamp names the snapshot, and that all others
        for name, newest in _read_section(storage.read(listing), "meta").items():
            listing = metadata_path(name.removesuffix(".json"), newest["version"])
            yield listing


def _read_section(document: Document | None, section: str) -> dict[str, Any]:
    """Return a table of signed metadata; whoever reads it for its content verifies it."""
    try:
        found = json.loads(document.data)["signed"].get(section, {}) if document else {}
        return found if isinstance(found, dict) else {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def choose_releases(
    source: Registry, selection: Selection
) -> tuple[dict[str, tuple[Release, ...]], tuple[str, ...]]:
    """Return the releases that a selection contains, by package, and what the source lacks.

    Returns:
        The releases; and the requirements of these releases that no release of the source meets,
        because another registry has them.

    Raises:
        UnknownExpertError: When there is no package or no release of a requirement.
        RegistryError: When the source cannot be read.
    """
    if selection.requirements:
        return _follow_requirements(source, selection)
    names = source.names()
    tasks = [partial(_find_releases, source, selection, name, None) for name in names]
    n_threads = MAX_THREADS if source.storage.is_remote else 1
    found = zip(names, run_concurrently(tasks, n_threads=n_threads), strict=True)
    return {name: releases for name, releases in found if releases}, ()


def _find_releases(
    source: Registry, selection: Selection, name: str, range_: Constraint | None
) -> tuple[Release, ...]:
    """Return the releases of a package that are in a range and a selection."""
    found = [
        release
        for release in source.versions(name)
        if selection.interface in ("", release.interface.name)
        and (range_ is None or range_.contains(release.version))
    ]
    return (choose_newest(found),) if found and selection.is_latest else tuple(found)


def _follow_requirements(
    source: Registry, selection: Selection
) -> tuple[dict[str, tuple[Release, ...]], tuple[str, ...]]:
    """Return the releases of requirements, of all that these require in turn, and what is missing.

    A release is chosen for each range, so that with `is_latest` every range has its newest one.
    """
    chosen: dict[str, dict[Version, Release]] = {}
    missing: dict[str, None] = {}
    left = list(selection.requirements)
    seen: set[Requirement] = set()
    while left:
        wanted = left.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        found = _find_releases(source, selection, wanted.name, wanted.constraint)
        if not found and wanted in selection.requirements:
            raise _explain_missing(source, wanted, selection)
        if not found:
            missing[str(wanted)] = None
            continue
        chosen.setdefault(wanted.name, {}).update({r.version: r for r in found})
        for release in found:
            needs = [release.requires, *(release.extras.get(e, {}) for e in wanted.extras)]
            left += [Requirement(name, range_) for need in needs for name, range_ in need.items()]
    ordered = {name: tuple(rows[v] for v in sorted(rows)) for name, rows in chosen.items()}
    return ordered, tuple(sorted(missing))


def _explain_missing(
    source: Registry, wanted: Requirement, selection: Selection
) -> UnknownExpertError:
    have = source.versions(wanted.name)
    if not have:
        hint = did_you_mean(wanted.name, source.names())
        return UnknownExpertError(f"no expert {wanted.name!r}", where=source.location, hint=hint)
    plug = f" for {selection.interface}" if selection.interface else ""
    return UnknownExpertError(
        f"no release {wanted}{plug}",
        where=source.location,
        hint=f"available: {', '.join(f'{r.version} for {r.interface.name}' for r in have)}",
    )


class _Mirror:
    """One mirror, and what it has changed so far.

    Args:
        source: Where releases are.
        target: Where they are copied to.
        selection: Which ones.
        is_checking: Whether files of the target are read again.
        progress: Called with a label, bytes done and total bytes.
    """

    def __init__(
        self,
        source: Registry,
        target: Registry,
        selection: Selection,
        is_checking: bool,
        progress: ByteProgress | None,
    ) -> None:
        self.source = source
        # Without its signatures, which may have expired and which it is about to get.
        self.target = Registry(target.storage)
        self.selection = selection
        self._storage = target.writable_storage()
        self._is_checking = is_checking
        self._progress = progress
        self._lock = threading.Lock()
        self._copied: dict[tuple[str, Version], int] = {}
        self._present: set[tuple[str, Version]] = set()
        self._marked: dict[tuple[str, Version], bool] = {}
        self._documents: dict[str, None] = {}
        self._missing: tuple[str, ...] = ()
        self.chosen: Mapping[str, Sequence[Release]] = {}

    def copy_releases(self) -> None:
        """Copy the releases, and the documents that list them."""
        catalog = self._read_checked(CATALOG_FILE)
        chosen, self._missing = choose_releases(self.source, self.selection)
        self.chosen = chosen
        self._require_space(chosen)
        self.target.create()
        tasks = [partial(self._copy_package, name, chosen[name]) for name in sorted(chosen)]
        is_remote = self.source.storage.is_remote or self._storage.is_remote
        run_concurrently(tasks, n_threads=MAX_THREADS if is_remote else 1)
        self._copy_catalog(catalog, chosen)
        self._copy_advisories(chosen)

    def copy_signed(self, files: Mapping[str, Document]) -> None:
        """Write what signatures are about, then files as they are in their order."""
        for document in files.values():
            for target in _read_section(document, "targets").values():
                self._copy_signed_blob(f"sha256:{target['hashes']['sha256']}")
        for path, document in files.items():
            self._copy_document(path, document)
        config = self._read_checked(CONFIG_FILE) if files else None
        if config is not None:  # from now on, the target says that it is signed
            self._copy_document(CONFIG_FILE, config)

    def _copy_signed_blob(self, digest: str) -> None:
        """Copy a signed document; those of earlier states may be gone."""
        if self._storage.read(blob_path(digest)) is None:
            try:
                data = self.source.read_blob(digest, "a signed document", MAX_DOCUMENT_BYTES)
            except UnreachableError:
                raise
            except RegistryError:
                return
            put_blob(self._storage, digest, data)

    def result(self) -> Mirrored:
        """Return what was changed."""
        marked = sorted(self._marked.items())
        return Mirrored(
            releases=tuple((*key, size) for key, size in sorted(self._copied.items())),
            n_present=len(self._present - self._copied.keys()),
            yanked=tuple(key for key, is_yanked in marked if is_yanked),
            unyanked=tuple(key for key, is_yanked in marked if not is_yanked),
            documents=tuple(sorted(self._documents)),
            missing=self._missing,
        )

    def _copy_package(self, name: str, releases: Sequence[Release]) -> None:
        """Copy releases of a package, then its index."""
        path = index_path(name)
        index = self._read_checked(path)
        listed = self._storage.read(path)
        is_same = listed is not None and index is not None and listed.data == index.data
        if is_same and self.selection.is_everything and not self._is_checking:
            self._present |= {(name, release.version) for release in releases}
            return
        have = {release.version: release for release in self.target.versions(name)}
        for release in releases:
            key = (name, release.version)
            there = have.get(release.version)
            if there is None or there.manifest != release.manifest:
                self.target.check_admissible(release)
            if there is None or self._is_checking:
                self._copy_release(release, is_new=there is None)
            if there is not None:
                self._present.add(key)
            if release.is_yanked != (there is not None and there.is_yanked):
                self.target.mark_yanked(*key, release.is_yanked)
                self._marked[key] = release.is_yanked

        is_whole = self.selection.is_everything and index is not None
        # An index that nobody signed may list more than the verified releases.
        if index is not None and is_whole:
            where = f"{self.source.location}/{path}"
            is_whole = tuple(parse_index(index.data, name, where).values()) == tuple(releases)

        def compile_document(seen: Document | None) -> bytes:
            if index is None or not is_whole:
                return compile_index(self._storage, name, seen)
            compiled = compile_index(self._storage, name, index)
            return index.data if has_same_lines(index.data, compiled) else compiled

        self._write(path, compile_document)

    def _copy_release(self, release: Release, *, is_new: bool) -> None:
        """Copy the files of a release and its manifest, and record it."""
        manifest, data = self.source.fetch_manifest(release)
        deltas = release.deltas
        sizes = [
            self._copy_file(release, dataclasses.replace(file, deltas=deltas.get(file.name, ())))
            for file in manifest.files
        ]
        line = self.source.storage.read(record_path(release.name, release.version))
        unyanked = dataclasses.replace(release, is_yanked=False)
        is_usable = line is not None and is_record_of(line, unyanked)
        self.target.record(unyanked, data, line.data if line and is_usable else None)
        if is_new:
            with self._lock:
                self._copied[release.name, release.version] = sum(sizes) + len(data)

    def _copy_file(self, release: Release, file: PackageFile) -> int:
        """Copy a file as the source has it: whole, or as deltas with the file they start from.

        Whatever else is copied, the target can make the file afterwards.
        """
        label = f"{release.name} {release.version} {file.name}"
        whole = dataclasses.replace(file, deltas=())
        if not file.deltas or self.source.has_blob(file.digest):
            size = self._copy_blob(whole, label)
            for delta in file.deltas[:1]:
                found = PackageFile(name=file.name, size=delta.size, digest=delta.digest)
                if self.source.has_blob(delta.digest):
                    size += self._copy_blob(found, f"{label} (delta)")
            return size
        size = 0
        for delta in file.deltas:
            found = PackageFile(name=file.name, size=delta.size, digest=delta.digest)
            size += self._copy_blob(found, f"{label} (delta)")
            if self.source.has_blob(delta.base):
                base = PackageFile(name=file.name, size=delta.base_size, digest=delta.base)
                return size + self._copy_blob(base, f"{label} (base)")
        raise DeltaError(
            f"{label} is in {self.source.location} only as a change of another file, which is gone",
            hint="leave the release out, or have its publisher add what is missing with "
            "`composable publish DIR --whole`",
        )

    def _copy_blob(self, file: PackageFile, label: str) -> int:
        """Copy a blob unless it is there, verified and, into a folder, resumable."""
        if self._is_checking:
            self._drop_damaged(file)
        if isinstance(self._storage, Folder):
            store = Store(self._storage.root)
            download_file(self.source, store, file, label=label, progress=self._progress)
        else:
            named = dataclasses.replace(file, name=label)
            read = partial(self.source.stream, file.digest)
            self._storage.upload(blob_path(file.digest), read, named, self._progress)
        return file.size

    def _drop_damaged(self, file: PackageFile) -> None:
        """Remove a file of the target if its bytes do not match its digest."""
        path = blob_path(file.digest)
        try:
            for _ in read_verified(partial(self._storage.stream, path), file):
                pass
        except IntegrityError:
            self._storage.remove(path)
        except RegistryError:
            return  # it does not exist, or cannot be read: copying it says which

    def _copy_catalog(self, catalog: Document | None, chosen: Mapping[str, object]) -> None:
        """Copy the catalogue, or list the packages that were copied in that of the target."""
        seen = self._storage.read(CATALOG_FILE)
        if (
            self.selection.is_everything
            and catalog is not None
            and not _lists_more(CATALOG_FILE, seen, catalog)
        ):
            self._copy_document(CATALOG_FILE, catalog)
            return
        listed = {entry.name: entry for entry in self.target.entries()}
        newest = {name: choose_newest(self.target.versions(name)) for name in chosen}
        outdated = [n for n, release in newest.items() if listed.get(n) != describe_newest(release)]
        if outdated:
            self._documents[CATALOG_FILE] = None
            self.target.write_catalog(outdated)

    def _copy_advisories(self, chosen: Mapping[str, object]) -> None:
        feed = self._read_checked(ADVISORIES_FILE)
        if feed is None:
            return
        is_everything = self.selection.is_everything

        def compile_document(seen: Document | None) -> bytes:
            if is_everything and not _lists_more(ADVISORIES_FILE, seen, feed):
                return feed.data
            return merge_feeds(feed, None if is_everything else chosen.keys(), seen)

        if compile_document(None):
            self._write(ADVISORIES_FILE, compile_document)

    def _copy_document(self, path: str, document: Document) -> None:
        self._write(path, lambda _: document.data)

    def _write(self, path: str, compile_document: Callable[[Document | None], bytes]) -> None:
        """Write a document if it changes."""
        seen = self._storage.read(path)
        if seen is None or seen.data != compile_document(seen):
            self._documents[path] = None
            update_document(self._storage, path, compile_document)

    def _read_checked(self, path: str) -> Document | None:
        """Read a document of the source, undamaged."""
        document = self.source.storage.read(path)
        if document is not None:
            check_document(path, document, f"{self.source.location}/{path}")
        return document

    def _require_space(self, chosen: Mapping[str, Sequence[Release]]) -> None:
        if isinstance(self._storage, Folder):
            files = (file for rows in chosen.values() for row in rows for file in row.files)
            require_space(Store(self._storage.root), files)


def _lists_more(path: str, seen: Document | None, source: Document) -> bool:
    """Return whether a document of the target has a line that the source's lacks."""
    return seen is not None and bool(find_lost(seen, source, key_fields(path)))
