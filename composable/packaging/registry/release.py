"""A release: one version of an expert as a registry's index lists it."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from composable.errors import PackagingError, RegistryError
from composable.interface.digest import canonical_json, digest_bytes, is_digest
from composable.packaging.manifests.manifest import InterfaceNeed, Manifest, PackageFile
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.names import check_file_name, check_package_name
from composable.packaging.versions.version import Version

TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, kw_only=True)
class Release:
    """One version of an expert as the index lists it.

    Args:
        name: Package name.
        version: Version.
        interface: The router interface that it requires.
        manifest: Digest of its manifest.
        files: Its files except the manifest.
        requires: Its required experts.
        extras: The additional required experts for each of its extras.
        conflicts: Experts that it cannot be installed with.
        is_yanked: Whether it is excluded from new resolutions.
        published: Time of publication, as RFC 3339 in UTC.
        description: One line, for search.
        tags: Languages, domains and capabilities, for search.
    """

    name: str
    version: Version
    interface: InterfaceNeed
    manifest: str
    files: tuple[PackageFile, ...]
    requires: Mapping[str, Constraint] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, Mapping[str, Constraint]] = dataclasses.field(default_factory=dict)
    conflicts: Mapping[str, Constraint] = dataclasses.field(default_factory=dict)
    is_yanked: bool = False
    published: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, published: str) -> Self:
        """Return the release that a packed manifest describes."""
        return cls(
            name=manifest.name,
            version=manifest.version,
            interface=manifest.interface,
            manifest=manifest.digest,
            files=manifest.files,
            requires=manifest.requires,
            extras=manifest.extras,
            conflicts=manifest.conflicts,
            published=published,
            description=manifest.description,
            tags=(*manifest.languages, *manifest.domains, *manifest.provides),
        )

    def to_line(self) -> bytes:
        """Return its line in the index, without the newline."""
        interface = {
            "name": self.interface.name,
            "requires": str(self.interface.requires),
            "digest": self.interface.digest,
        }
        files = [{"name": f.name, "size": f.size, "digest": f.digest} for f in self.files]
        return format_line(
            {
                "name": self.name,
                "version": str(self.version),
                "interface": interface,
                "manifest": self.manifest,
                "files": files,
                "requires": _to_texts(self.requires),
                "extras": {extra: _to_texts(ranges) for extra, ranges in self.extras.items()},
                "conflicts": _to_texts(self.conflicts),
                "yanked": self.is_yanked,
                "published": self.published,
                "description": self.description,
                "tags": list(self.tags),
            }
        )

    @classmethod
    def from_line(cls, line: bytes, name: str, where: str) -> Self:
        """Parse a line of the index; unknown fields are ignored.

        The checksum detects accidental corruption only. A malicious line is detected when the
        manifest does not match it.

        Args:
            line: One JSON object.
            name: The package whose index contains the line.
            where: File and line number, for errors.

        Raises:
            RegistryError: When the line is not a release of `name`.
        """
        try:
            data = json.loads(line)
            if data.pop("check") != _checksum_of(data):
                raise ValueError("the checksum does not match")
            if data["name"] != name:
                raise ValueError(f"a release of {str(data['name'])[:80]!r}, expected {name!r}")
            digests = [data["manifest"], data["interface"]["digest"]]
            digests += [file["digest"] for file in data["files"]]
            if not all(map(is_digest, digests)):
                raise ValueError("a digest is malformed")
            sizes = [file["size"] for file in data["files"]]
            if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
                raise ValueError("a size is malformed")
            if not isinstance(data["yanked"], bool):
                raise ValueError("'yanked' is not true or false")
            return cls(
                name=name,
                version=Version(data["version"]),
                interface=InterfaceNeed(
                    name=check_package_name(data["interface"]["name"]),
                    requires=Constraint(data["interface"]["requires"]),
                    digest=data["interface"]["digest"],
                ),
                manifest=data["manifest"],
                files=tuple(
                    PackageFile(
                        name=check_file_name(file["name"]), size=file["size"], digest=file["digest"]
                    )
                    for file in data["files"]
                ),
                requires=_read_ranges(data["requires"]),
                extras={
                    check_package_name(extra): _read_ranges(ranges)
                    for extra, ranges in data.get("extras", {}).items()
                },
                conflicts=_read_ranges(data["conflicts"]),
                is_yanked=data["yanked"],
                published=str(data["published"]),
                description=str(data.get("description", "")),
                tags=tuple(map(str, data.get("tags", ()))),
            )
        except PackagingError as error:
            raise RegistryError(error.message, where=where) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RegistryError(f"not a release: {error}", where=where) from error


def parse_cutoff(text: str) -> str:
    """Parse the time after which releases are ignored into the format of registries.

    Args:
        text: An RFC 3339 time, or a date such as `2026-11-24`, which includes that day in UTC.

    Raises:
        PackagingError: When the text is neither.

    Example:
        >>> parse_cutoff("2026-11-24")
        '2026-11-24T23:59:59Z'
    """
    try:
        if len(text) == 10:
            return f"{datetime.date.fromisoformat(text).isoformat()}T23:59:59Z"
        time = datetime.datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError("no time zone")
    except ValueError as error:
        raise PackagingError(
            f"{text[:60]!r} is not a date or a time: {error}",
            hint="expected for example 2026-11-24 or 2026-11-24T12:00:00Z",
        ) from error
    return time.astimezone(datetime.UTC).strftime(TIME_FORMAT)


def choose_newest(releases: Iterable[Release]) -> Release:
    """Return the newest release; a prerelease or a yanked one only if there are no others."""
    return max(releases, key=lambda r: (not r.is_yanked, not r.version.is_prerelease, r.version))


def _to_texts(ranges: Mapping[str, Constraint]) -> dict[str, str]:
    return {name: str(range_) for name, range_ in ranges.items()}


def format_line(fields: Mapping[str, Any]) -> bytes:
    """Return the fields as a line of JSON that includes a checksum over them.

    Example:
        >>> format_line({"name": "german"})
        b'{"check":"a0b71369af16c9bc","name":"german"}'
    """
    return canonical_json({**fields, "check": _checksum_of(fields)})


def _checksum_of(fields: Mapping[str, Any]) -> str:
    return digest_bytes(canonical_json(fields)).removeprefix("sha256:")[:16]


def _read_ranges(data: Mapping[str, Any]) -> dict[str, Constraint]:
    return {check_package_name(name): Constraint(text) for name, text in data.items()}
