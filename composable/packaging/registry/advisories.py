"""Advisories: what is known against published releases, as lines of a registry's feed.

    advisories.jsonl                 one line per advisory; optional

A release never changes, so what is learned about it afterwards is stated here. Lines have the
checksums and the extent of an index. An advisory is never removed, only withdrawn: a feed that lost
one is an old copy. In a signed registry the feed is signed with a root key, see `signed.py`. Fields
that are not known here are kept and not read.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeVar, get_args

from composable.errors import ManifestError, PackagingError, RegistryError, UnknownExpertError
from composable.packaging.manifests.manifest import MAX_FILES, check_digest
from composable.packaging.manifests.toml import Table
from composable.packaging.registry.lines import (
    ADVISORIES_FILE,
    EXTENT,
    format_document,
    parse_line,
)
from composable.packaging.registry.release import Release, check_time
from composable.packaging.registry.storage import Document
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version

T = TypeVar("T")
Kind = Literal["recalled", "poisoned", "licence-withdrawn"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
MAX_TEXT_LENGTH: Final = 2000
MAX_RANGES: Final = 64
_ID: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_MAX_ID_LENGTH: Final = 100


@dataclass(frozen=True, kw_only=True)
class Advisory:
    """A statement against releases of one package.

    Args:
        id: Its name in the registry: lower-case letters, digits and hyphens.
        name: The package.
        kind: `recalled` by its author, `poisoned` on purpose, or `licence-withdrawn`.
        affected: Ranges of affected versions; a prerelease counts like any version.
        digests: Digests of manifests or files that are affected under any name and version.
        fixed: Releases of the package that are not affected and replace the others.
        text: What is wrong, and what to do.
        published: Time of publication, as RFC 3339 in UTC.
        is_withdrawn: Whether it no longer holds.

    Example:
        >>> advisory = Advisory(
        ...     id="german-1",
        ...     name="german",
        ...     kind="recalled",
        ...     affected=(Constraint("<1.2"),),
        ...     fixed=(Version("1.2.0"),),
        ...     text="Trained on its own held-out text.",
        ...     published="2026-11-24T12:00:00Z",
        ... )
        >>> advisory.affects("german", Version("1.1.0"), ())
        True
    """

    id: str
    name: str
    kind: Kind
    affected: tuple[Constraint, ...] = ()
    digests: tuple[str, ...] = ()
    fixed: tuple[Version, ...] = ()
    text: str
    published: str
    is_withdrawn: bool = False

    def affects(self, name: str, version: Version, digests: Collection[str]) -> bool:
        """Return whether a release is affected, by its version or by what it contains.

        Args:
            name: Its package; empty to compare only the content.
            version: Its version.
            digests: Digests of its manifest and files.
        """
        if self.is_withdrawn:
            return False
        is_in_range = name == self.name and any(
            all(comparator.contains(version) for comparator in range_.comparators)
            for range_ in self.affected
        )
        return is_in_range or any(digest in self.digests for digest in digests)

    def to_row(self) -> dict[str, Any]:
        """Return the fields of its line in the feed."""
        return {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "affected": [str(range_) for range_ in self.affected],
            "digests": list(self.digests),
            "fixed": [str(version) for version in self.fixed],
            "text": self.text,
            "published": self.published,
            "withdrawn": self.is_withdrawn,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """Check the fields of a line of the feed; unknown fields are ignored.

        Raises:
            RegistryError: When they are not those of an advisory.
        """
        try:
            return cls._from_table(Table(row, where))
        except ManifestError as error:
            raise RegistryError(error.message, where=error.where, hint=error.hint) from error

    @classmethod
    def _from_table(cls, table: Table) -> Self:
        for field in ("affected", "digests", "fixed"):
            if field not in table:
                raise ManifestError("missing", where=table.where(field))
        advisory = cls(
            id=table.value("id", check_id),
            name=table.value("name", check_package_name),
            kind=table.value("kind", check_kind),
            affected=_read_each(table, "affected", Constraint, MAX_RANGES),
            digests=_read_each(table, "digests", check_digest, MAX_FILES),
            fixed=_read_each(table, "fixed", Version, MAX_RANGES),
            text=table.text("text", max_length=MAX_TEXT_LENGTH),
            published=table.value("published", check_time),
            is_withdrawn=table.boolean("withdrawn"),
        )
        if not advisory.affected and not advisory.digests:
            raise ManifestError("affects nothing: no range and no digest", where=table.where())
        if not advisory.text.strip():
            raise ManifestError("says nothing", where=table.where("text"))
        return advisory


def make_id(name: str) -> str:
    """Return a new name for an advisory on a package."""
    return f"{name[: _MAX_ID_LENGTH - 9]}-{secrets.token_hex(4)}"


def check_id(text: str) -> str:
    """Return the name of an advisory.

    Raises:
        ManifestError: For text of another form.
    """
    if len(text) > _MAX_ID_LENGTH or _ID.fullmatch(text) is None:
        raise ManifestError(
            f"{text[:80]!r} does not name an advisory",
            hint="expected lower-case letters, digits and hyphens, such as german-2026-1",
        )
    return text


def check_kind(text: str) -> Kind:
    """Return a kind of advisory.

    Raises:
        ManifestError: For any other text.
    """
    for kind in KINDS:
        if text == kind:
            return kind
    raise ManifestError(
        f"{text[:80]!r} is not a kind of advisory", hint=f"expected one of {', '.join(KINDS)}"
    )


def parse_feed(document: Document, where: str) -> tuple[Advisory, ...]:
    """Return the advisories of a feed, in its order.

    Raises:
        RegistryError: When a line is damaged or not an advisory, or an advisory is listed twice.
    """
    found: dict[str, Advisory] = {}
    for number, line in enumerate(document.data.splitlines(), 1):
        at = f"{where}:{number}"
        advisory = Advisory.from_row(parse_line(line, at, needs_checksum=True), at)
        if advisory.id in found:
            raise RegistryError(f"{advisory.id!r} is listed twice", where=at)
        found[advisory.id] = advisory
    return tuple(found.values())


def compile_feed(advisory: Advisory, current: Document | None) -> bytes:
    """Return the feed with one advisory added, or changed if it lists one of that name.

    Lines of others are kept as they are, also fields of theirs that are not known here.

    Args:
        advisory: The advisory.
        current: The feed so far.

    Raises:
        RegistryError: When the feed is damaged.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(current.data.splitlines() if current else (), 1):
        row = parse_line(line, f"{ADVISORIES_FILE}:{number}", needs_checksum=True)
        row.pop(EXTENT, None)
        rows[str(row.get("id"))] = row
    known = rows.get(advisory.id, {})
    if known.get("name") not in (None, advisory.name):
        raise RegistryError(
            f"{advisory.id!r} is about {str(known.get('name'))[:80]!r}, not {advisory.name!r}",
            where=ADVISORIES_FILE,
            hint="choose another --id",
        )
    row = advisory.to_row()
    if any(known.get(field) != value for field, value in row.items()):
        rows[advisory.id] = row
    return format_document(list(rows.values()))


def merge_feeds(source: Document, names: Collection[str] | None, current: Document | None) -> bytes:
    """Return the feed with the lines of another registry's feed, as they are.

    Args:
        source: The other feed; where both have an advisory, its line is used.
        names: The packages whose advisories are taken; those that name digests are taken always.
            None for all.
        current: The feed so far.

    Raises:
        RegistryError: When a feed is damaged.
    """
    chosen = {
        advisory.id
        for advisory in parse_feed(source, ADVISORIES_FILE)
        if names is None or advisory.name in names or advisory.digests
    }
    rows: dict[str, dict[str, Any]] = {}
    for document in filter(None, (current, source)):
        for number, line in enumerate(document.data.splitlines(), 1):
            row = parse_line(line, f"{ADVISORIES_FILE}:{number}", needs_checksum=True)
            row.pop(EXTENT, None)
            if document is current or row["id"] in chosen:
                rows[str(row.get("id"))] = row
    return format_document(list(rows.values()))


def _read_each(table: Table, field: str, read: Callable[[str], T], most: int) -> tuple[T, ...]:
    """Return a list of texts, each converted by `read`."""
    texts = table.texts(field)
    if len(texts) > most:
        raise ManifestError(
            f"{len(texts)} entries, expected at most {most}", where=table.where(field)
        )
    found = []
    for index, text in enumerate(texts):
        try:
            found.append(read(text))
        except PackagingError as error:
            where = table.where(f"{field}[{index}]")
            raise ManifestError(error.message, where=where, hint=error.hint) from error
    return tuple(found)


def check_advisory(advisory: Advisory, known: Sequence[Release], where: str) -> None:
    """Refuse an advisory that names releases which are not there.

    Args:
        advisory: The advisory.
        known: All releases of its package.
        where: The registry, for error messages.

    Raises:
        UnknownExpertError: When none of the releases that it affects, or one of those that fix it,
            is published.
        RegistryError: When one of its fields has a form that clients refuse.
    """
    Advisory.from_row(advisory.to_row(), "advisory")
    releases = {release.version: release for release in known}
    have = ", ".join(map(str, releases))
    affected = {
        version
        for version, release in releases.items()
        if advisory.affects(release.name, version, release.digests)
    }
    for version in advisory.fixed:
        if version not in releases or version in affected:
            raise UnknownExpertError(
                f"{advisory.name} {version} is not a release that fixes anything: it is "
                f"{'affected itself' if version in releases else 'not published'}",
                where=where,
                hint=f"available: {have}",
            )
    if advisory.affected and not advisory.is_withdrawn and not affected:
        ranges = " or ".join(map(str, advisory.affected))
        raise UnknownExpertError(
            f"no release {advisory.name} {ranges}",
            where=where,
            hint=f"available: {have}",
        )
