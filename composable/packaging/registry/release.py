"""A release: one version of an expert as a registry's index lists it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from composable.errors import ManifestError, PackagingError, RegistryError
from composable.packaging.manifests.licenses import MAX_LICENSE_LENGTH
from composable.packaging.manifests.manifest import (
    EXPERT_FILE,
    MAX_DESCRIPTION_LENGTH,
    MAX_FILES,
    Delta,
    InterfaceNeed,
    Manifest,
    PackageFile,
    check_digest,
    read_extras,
    read_tags,
)
from composable.packaging.manifests.toml import Table
from composable.packaging.registry.lines import format_line, parse_line
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.names import check_file_name, check_package_name
from composable.packaging.versions.version import Version

TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"
# Smaller files are always kept whole.
MIN_DELTA_BYTES: Final = 1 << 16
# How many deltas may have to be applied, one after the other, to make a file.
MAX_CHAIN: Final = 8
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Who signed a release.

    Args:
        publisher: The name of the publisher in the registry.
        key: Its public key, as `ed25519:` and 64 hexadecimal digits, or the identity that signed,
            as `sigstore:ISSUER#SUBJECT`.
    """

    publisher: str
    key: str


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
        license: Its licence as the manifest states it, empty if it states none; None if the line
            does not repeat it, as lines written before 0.3.
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
    license: str | None = None

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
            license=manifest.license,
        )

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of its manifest and its files."""
        return (self.manifest, *(file.digest for file in self.files))

    def with_yank(self, is_yanked: bool) -> Self:
        """Return this release, yanked or not."""
        return dataclasses.replace(self, is_yanked=is_yanked)

    def with_deltas(self, deltas: Mapping[str, tuple[Delta, ...]]) -> Self:
        """Return this release with other deltas.

        Args:
            deltas: The deltas of files, by name; other files have none.
        """
        files = (dataclasses.replace(file, deltas=deltas.get(file.name, ())) for file in self.files)
        return dataclasses.replace(self, files=tuple(files))

    def without_deltas(self) -> Self:
        """Return this release as its manifest lists it."""
        return self.with_deltas({})

    @property
    def deltas(self) -> dict[str, tuple[Delta, ...]]:
        """The deltas of its files, by name of the file; only files that have any."""
        return {file.name: file.deltas for file in self.files if file.deltas}

    def to_row(self) -> dict[str, Any]:
        """Return the fields of its line in the index."""
        files = sorted(self.files, key=lambda file: file.name)
        return {
            "name": self.name,
            "version": str(self.version),
            "interface": {
                "name": self.interface.name,
                "requires": str(self.interface.requires),
                "digest": self.interface.digest,
            },
            "manifest": self.manifest,
            "files": [_format_file(file) for file in files],
            "requires": _to_texts(self.requires),
            "extras": {extra: _to_texts(ranges) for extra, ranges in self.extras.items()},
            "conflicts": _to_texts(self.conflicts),
            "yanked": self.is_yanked,
            "published": self.published,
            "description": self.description,
            "tags": list(self.tags),
            **({} if self.license is None else {"license": self.license}),
        }

    def to_line(self) -> bytes:
        """Return its line in the index, without the newline; a record consists of this line."""
        return format_line(self.to_row())

    def find_difference(self, manifest: Manifest) -> str | None:
        """Return how the index differs from the manifest of this release; None if it does not.

        Everything that an index repeats of a manifest is compared. The manifest is the truth: the
        digest in the index is that of its bytes. Deltas are not in a manifest: a wrong one makes
        bytes that do not match the digest of their file.
        """
        listed = self.without_deltas().to_row()
        actual = type(self).of(manifest, self.published).to_row()
        for field in listed.keys() - {"manifest", "yanked"}:
            if listed[field] != actual[field]:
                found, expected = (json.dumps(row[field])[:200] for row in (listed, actual))
                return f"{field} is {found} in the index, {expected} in the manifest"
        return None

    @classmethod
    def from_line(cls, line: bytes, name: str, where: str) -> Self:
        """Parse a line of the index; unknown fields are ignored.

        Every field has the type, the range and the size that it has in a manifest. The checksum
        detects accidental corruption only. A malicious line is detected when the manifest does not
        match it.

        Args:
            line: One JSON object.
            name: The package whose index contains the line.
            where: File and line number, for errors.

        Raises:
            RegistryError: When the line is not a release of `name`.
        """
        return cls.from_row(parse_line(line, where, needs_checksum=True), name, where)

    @classmethod
    def from_row(cls, row: Mapping[str, Any], name: str, where: str = "release") -> Self:
        """Check the fields of a line of the index; those that `to_row` returns are valid.

        Args:
            row: The fields.
            name: The package whose index contains the line.
            where: Where the fields come from, for errors.

        Raises:
            RegistryError: When the fields are not those of a release of `name`.
        """
        try:
            return cls._from_table(Table(row, where), name)
        except ManifestError as error:
            raise RegistryError(error.message, where=error.where, hint=error.hint) from error

    @classmethod
    def _from_table(cls, table: Table, name: str) -> Self:
        if (found := table.text("name")) != name:
            raise ManifestError(
                f"a release of {found[:80]!r}, expected {name!r}", where=table.where("name")
            )
        # A line without one of these is damaged, not a release without files or requirements.
        for field in ("files", "requires", "conflicts"):
            if field not in table:
                raise ManifestError("missing", where=table.where(field))
        interface = table.table("interface")
        return cls(
            name=name,
            version=table.version("version"),
            interface=InterfaceNeed(
                name=interface.value("name", check_package_name),
                requires=interface.value("requires", Constraint),
                digest=interface.value("digest", check_digest),
            ),
            manifest=table.value("manifest", check_digest),
            files=_read_files(table),
            requires=table.ranges("requires"),
            extras=read_extras(table.table("extras", {})),
            conflicts=table.ranges("conflicts"),
            is_yanked=table.boolean("yanked"),
            published=table.value("published", check_time),
            description=table.text("description", "", max_length=MAX_DESCRIPTION_LENGTH),
            tags=read_tags(table, "tags"),
            license=table.text("license", None, max_length=MAX_LICENSE_LENGTH),
        )


@dataclass(frozen=True, kw_only=True)
class PreparedDelta:
    """A delta that is ready to be published.

    Args:
        path: Where it is.
        target: Digest of the file that it makes.
        chain: Itself, and the deltas that make its base where the registry may not have that.
        is_whole_needed: Whether the file is to be published whole as well.
    """

    path: Path
    target: str
    chain: tuple[Delta, ...]
    is_whole_needed: bool

    @property
    def file(self) -> PackageFile:
        """The delta as a file."""
        return PackageFile(
            name=self.path.name, size=self.chain[0].size, digest=self.chain[0].digest
        )


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


def _read_files(table: Table) -> tuple[PackageFile, ...]:
    files: dict[str, PackageFile] = {}
    entries = table.tables("files")
    if len(entries) > MAX_FILES:
        raise ManifestError(
            f"{len(entries)} files, expected at most {MAX_FILES}", where=table.where("files")
        )
    for entry in entries:
        name = entry.value("name", check_file_name)
        if name.lower() in files or name.lower() == EXPERT_FILE:
            raise ManifestError(f"{name!r} is listed twice", where=entry.where("name"))
        files[name.lower()] = PackageFile(
            name=name,
            size=entry.integer("size"),
            digest=entry.value("digest", check_digest),
            deltas=read_deltas(entry) if "deltas" in entry else (),
        )
    return tuple(files.values())


def read_deltas(table: Table) -> tuple[Delta, ...]:
    """Return the deltas of a file.

    Raises:
        ManifestError: For one that is malformed, or too many.
    """
    rows = table.tables("deltas")
    if len(rows) > MAX_CHAIN:
        raise ManifestError(
            f"{len(rows)} deltas, expected at most {MAX_CHAIN}", where=table.where("deltas")
        )
    return tuple(
        Delta(
            digest=row.value("digest", check_digest),
            size=row.integer("size"),
            base=row.value("base", check_digest),
            base_size=row.integer("base-size"),
        )
        for row in rows
    )


def format_deltas(deltas: Iterable[Delta]) -> list[dict[str, Any]]:
    """Return the deltas of a file as `read_deltas` reads them."""
    return [
        {"digest": d.digest, "size": d.size, "base": d.base, "base-size": d.base_size}
        for d in deltas
    ]


def _format_file(file: PackageFile) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": file.name, "size": file.size, "digest": file.digest}
    return fields | ({"deltas": format_deltas(file.deltas)} if file.deltas else {})


def check_time(text: str) -> str:
    """Return a time of publication if it has the one format in which times can be compared.

    Raises:
        PackagingError: For any other text.
    """
    with contextlib.suppress(ValueError):
        if _TIME.fullmatch(text) and datetime.datetime.fromisoformat(text):
            return text
    raise PackagingError(
        f"{text[:60]!r} is not a time in UTC", hint="expected for example 2026-11-24T12:00:00Z"
    )
