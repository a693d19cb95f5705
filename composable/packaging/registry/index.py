"""The lines of a registry's indexes, records and catalogue: format, parse and derive them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from composable.errors import ManifestError, PackagingError, RegistryError
from composable.files.strays import drop_strays, warn_about_stray
from composable.packaging.manifests.manifest import MAX_DESCRIPTION_LENGTH, read_tags
from composable.packaging.manifests.toml import Table
from composable.packaging.registry.lines import format_document, parse_line
from composable.packaging.registry.release import Release
from composable.packaging.registry.storage import Document, Folder, Storage, WritableStorage
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version

# A name and a range.
MAX_INTERFACE_LENGTH: Final = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A package's line in the catalogue: its newest release, for search.

    Args:
        name: Package name.
        version: Its newest version.
        interface: Name and range of its router interface.
        description: One line.
        tags: Languages, domains and capabilities.
    """

    name: str
    version: Version
    interface: str
    description: str = ""
    tags: tuple[str, ...] = ()


def index_path(name: str) -> str:
    """Return the path of a package's index.

    Raises:
        ManifestError: When `name` is not a package name, so that it cannot escape the folder.

    Example:
        >>> index_path("german")
        'index/ge/german.jsonl'
    """
    return f"index/{check_package_name(name)[:2]}/{name}.jsonl"


def record_path(name: str, version: Version, suffix: str = "json") -> str:
    """Return the path of a release's record or, with suffix `yanked`, of its yank marker.

    Example:
        >>> record_path("german", Version("1.2.0"))
        'records/german/1.2.0.json'
    """
    # Versions that differ only in build metadata are equal, so it is not part of the file's name.
    return f"records/{check_package_name(name)}/{_stem_of(version)}.{suffix}"


def _stem_of(version: Version) -> str:
    return str(version).partition("+")[0]


def is_index_behind(folder: Folder, name: str, indexed: Mapping[Version, Release]) -> bool:
    """Return whether the records of a package contain releases or yanks that its index lacks."""
    recorded = list_records(folder, name)
    known = {version: release.is_yanked for version, release in indexed.items()}
    return recorded.keys() >= known.keys() and recorded != known


def list_records(storage: WritableStorage, name: str) -> dict[Version, bool]:
    """Return the versions that have a record, each with whether it is yanked.

    Files that are neither a record nor a yank marker are ignored, with a warning that names them.
    """
    folder = f"records/{name}"

    def belongs(file: str) -> bool:
        stem, _, suffix = file.rpartition(".")
        with contextlib.suppress(PackagingError):
            version = Version(stem)
            return suffix in ("json", "yanked") and record_path(name, version, suffix) == (
                f"{folder}/{file}"
            )
        return False

    where = f"{storage.location}/{folder}"
    kept = set(drop_strays(storage.names_in(folder), belongs, where, "the record of a version"))
    stems = sorted(file.removesuffix(".json") for file in kept if file.endswith(".json"))
    return {Version(stem): f"{stem}.yanked" in kept for stem in stems}


def compile_index(storage: WritableStorage, name: str, current: Document | None) -> bytes:
    """Return the index that follows from a package's records.

    Only the records that the current index lacks are read, so that publishing takes the same number
    of reads however many releases there are.

    Args:
        storage: The storage of the registry.
        name: The package.
        current: Its index so far; lines of it that are damaged are read from their records.
    """
    recorded = list_records(storage, name)
    rows = {} if current is None else _read_rows(current, name)
    for version in recorded.keys() - rows.keys():
        found = read_record(storage, name, version)
        if found is not None:
            rows[version] = found.to_row()
    # Yanks are files beside the records; a release without a record is as it is in the index.
    for version in recorded.keys() & rows.keys():
        rows[version] = {**rows[version], "yanked": recorded[version]}
    return format_document([rows[version] for version in sorted(rows)])


@functools.lru_cache(maxsize=4)  # publishing reads what it wrote, and a project may ask repeatedly
def parse_index(data: bytes, name: str, where: str) -> Mapping[Version, Release]:
    """Return the releases that an index lists, by version.

    Raises:
        RegistryError: When a line is damaged, or a version is listed twice.
    """
    releases: dict[Version, Release] = {}
    for number, line in enumerate(data.splitlines(), 1):
        release = Release.from_line(line, name, f"{where}:{number}")
        if release.version in releases:
            raise RegistryError(f"{release.version} is listed twice", where=f"{where}:{number}")
        releases[release.version] = release
    return MappingProxyType(releases)


def change_index(data: bytes | None, name: str, releases: Iterable[Release]) -> bytes:
    """Return an index with some releases added, or changed if it lists them.

    Args:
        data: The index so far.
        name: The package.
        releases: The releases.
    """
    rows = {} if data is None else _read_rows(Document(data, None), name)
    for release in releases:
        rows[release.version] = release.to_row()
    return format_document([rows[version] for version in sorted(rows)])


def _read_rows(index: Document, name: str) -> dict[Version, dict[str, Any]]:
    """Return the undamaged lines of an index by version."""
    rows = {}
    for line in index.data.splitlines():
        with contextlib.suppress(PackagingError):
            row = parse_line(line, index_path(name), needs_checksum=True)
            if row.get("name") == name:
                rows[Version(row.get("version", ""))] = row
    return rows


def is_record_of(document: Document, release: Release | None) -> bool:
    """Return whether a record is readable and equals `release`."""
    if release is None:
        return False
    with contextlib.suppress(RegistryError):
        return Release.from_line(document.data, release.name, "") == release
    return False


def read_record(storage: Storage, name: str, version: Version) -> Release | None:
    """Read the record of a release, or its line in the index if the record is damaged.

    A record of another version, such as a copy under another name, counts as damaged.

    Returns:
        The release, not yanked; None if there is no record, or if a crash truncated it before the
        release was indexed.
    """
    path = record_path(name, version)
    document = storage.read(path)
    if document is None:
        return None
    with contextlib.suppress(RegistryError):
        release = Release.from_line(document.data, name, path)
        if release.version == version:
            return release
        file = path.rpartition("/")[2]
        warn_about_stray(file, f"{storage.location}/records/{name}", f"a record of {version}")
    index = storage.read(index_path(name))
    for line in index.data.splitlines() if index is not None else ():
        with contextlib.suppress(RegistryError):
            release = Release.from_line(line, name, path)
            if release.version == version:
                return dataclasses.replace(release, is_yanked=False)
    return None


def describe_newest(release: Release) -> Entry:
    """Return the catalogue entry of a package from its newest release."""
    return Entry(
        name=release.name,
        version=release.version,
        interface=f"{release.interface.name} {release.interface.requires}",
        description=release.description,
        tags=release.tags,
    )


def format_catalog(entries: Iterable[Entry]) -> bytes:
    """Return the catalogue with these entries, sorted by name."""
    return format_document(
        [
            {**dataclasses.asdict(entry), "version": str(entry.version), "tags": list(entry.tags)}
            for entry in sorted(entries, key=lambda entry: entry.name)
        ]
    )


def parse_entry(line: bytes, where: str) -> Entry:
    """Parse a line of the catalogue; unknown fields are ignored.

    Raises:
        RegistryError: When the line is not an entry; its location begins with `where`.
    """
    try:
        table = Table(parse_line(line, where), where)
        return Entry(
            name=check_package_name(table.text("name"), table.where("name")),
            version=table.version("version"),
            interface=table.text("interface", max_length=MAX_INTERFACE_LENGTH),
            description=table.text("description", max_length=MAX_DESCRIPTION_LENGTH),
            tags=read_tags(table, "tags"),
        )
    except ManifestError as error:
        raise RegistryError(error.message, where=error.where, hint=error.hint) from error
