"""The lines of a registry's indexes, records and catalogue: format, parse and derive them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Final

from composable.errors import PackagingError, RegistryError
from composable.interface.digest import canonical_json
from composable.packaging.registry.release import Release
from composable.packaging.registry.storage import Document, Folder, Storage, WritableStorage
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version

MAX_TEXT: Final = 10_000


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
    text = str(version).partition("+")[0]
    return f"records/{check_package_name(name)}/{text}.{suffix}"


def is_index_behind(folder: Folder, name: str, indexed: Mapping[Version, Release]) -> bool:
    """Return whether the records of a package contain releases or yanks that its index lacks."""
    names = folder.names_in(f"records/{name}")
    recorded = {file.removesuffix(".json") for file in names if file.endswith(".json")}
    yanked = {file.removesuffix(".yanked") for file in names if file.endswith(".yanked")}
    known = {str(v).partition("+")[0]: release.is_yanked for v, release in indexed.items()}
    return recorded >= known.keys() and known != {v: v in yanked for v in recorded}


def compile_index(storage: WritableStorage, name: str) -> bytes:
    """Return the index that follows from a package's records."""
    names = set(storage.names_in(f"records/{name}"))
    releases = []
    for file in names:
        stem, _, suffix = file.rpartition(".")
        if suffix != "json":
            continue
        release = read_record(storage, name, Version(stem))
        if release is not None:
            is_yanked = f"{stem}.yanked" in names
            releases.append(dataclasses.replace(release, is_yanked=is_yanked))
    releases.sort(key=lambda release: release.version)
    return b"".join(release.to_line() + b"\n" for release in releases)


def is_record_of(document: Document, release: Release | None) -> bool:
    """Return whether a record is readable and equals `release`."""
    if release is None:
        return False
    with contextlib.suppress(RegistryError):
        return Release.from_line(document.data, release.name, "") == release
    return False


def read_record(storage: Storage, name: str, version: Version) -> Release | None:
    """Read the record of a release, or its line in the index if the record is damaged.

    Returns:
        The release, not yanked; None if there is no record, or if a crash truncated it before the
        release was indexed.
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


def describe_newest(release: Release) -> Entry:
    """Return the catalogue entry of a package from its newest release."""
    return Entry(
        name=release.name,
        version=release.version,
        interface=f"{release.interface.name} {release.interface.requires}",
        description=release.description,
        tags=release.tags,
    )


def format_entry(entry: Entry) -> bytes:
    """Return a line of the catalogue."""
    return canonical_json(
        {**dataclasses.asdict(entry), "version": str(entry.version), "tags": list(entry.tags)}
    )


def parse_entry(line: bytes, where: str) -> Entry:
    """Parse a line of the catalogue; unknown fields are ignored.

    Raises:
        RegistryError: When the line is not an entry; its location is `where`.
    """
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
        raise RegistryError(f"not a catalogue entry: {error}", where=where) from error
