"""The lock file `composable.lock`: the exact version, source and files of every expert.

The same inputs give the same bytes on every machine: entries are sorted, versions and ranges have
one spelling, and there are no times, secrets, or paths other than those in `composable.toml`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from composable.errors import LockError, ManifestError
from composable.files.reading import read_bytes
from composable.files.user_files import replace_text
from composable.interface.digest import is_digest
from composable.packaging.manifests.licenses import MAX_LICENSE_LENGTH
from composable.packaging.manifests.manifest import EXPERT_FILE, PackageFile
from composable.packaging.manifests.toml import Table, find_conflict, format_toml, parse_toml
from composable.packaging.registry.release import Release, Signer
from composable.packaging.versions.constraint import Constraint, Requirement
from composable.packaging.versions.names import check_file_name, check_package_name
from composable.packaging.versions.version import Version

LOCK_FILE: Final = "composable.lock"
SCHEMA: Final = 1
# An identity is longer than a key.
MAX_SIGNER_LENGTH: Final = 700
_HEADER: Final = "# Written by composable. Change composable.toml and lock again.\n"


@dataclass(frozen=True, kw_only=True)
class LockedInterface:
    """The router interface that a lock was made for.

    Args:
        name: Its name.
        version: Its version.
        digest: Its digest.
    """

    name: str
    version: Version
    digest: str


@dataclass(frozen=True, kw_only=True)
class LockedExpert:
    """One expert of a lock.

    Args:
        name: Package name.
        version: The one version.
        registry: Name of the registry that it comes from; None for one from a folder.
        path: The folder that it comes from, as written in `composable.toml`; None otherwise.
        is_editable: Whether the folder is used in place, with its content at the time of use.
        manifest: Digest of its manifest; None if it is editable.
        interface: Digest of the router interface that it was trained against.
        requires: Its required experts.
        extras: The additional required experts for each of its extras in use.
        license: Its licence as its manifest states it; None if it states none, or if the lock was
            made before locks had licences.
        wanted_by: Its dependents with their ranges, such as `composable.toml: ^1.2`.
        files: Its files except the manifest.
        signer: Who signed it; None if its registry is unsigned, or if the lock was made before
            locks had signers.
        release: What the registry's index listed, if the lock was made in this process. It is no
            field of the file.
    """

    name: str
    version: Version
    registry: str | None = None
    path: str | None = None
    is_editable: bool = False
    manifest: str | None
    interface: str | None
    requires: Mapping[str, Constraint]
    extras: Mapping[str, Mapping[str, Constraint]] = dataclasses.field(default_factory=dict)
    license: str | None = None
    wanted_by: tuple[str, ...]
    files: tuple[PackageFile, ...]
    signer: Signer | None = None
    release: Release | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the manifest and the files, by file name; none if it is editable."""
        if self.manifest is None:
            return {}
        return {EXPERT_FILE: self.manifest, **{file.name: file.digest for file in self.files}}

    @property
    def needs(self) -> list[Requirement]:
        """Its required experts, including those of the extras in use, sorted by name."""
        ranges = [*self.requires.items()]
        for extra in self.extras.values():
            ranges += extra.items()
        wanted = {Requirement(name, range_) for name, range_ in ranges}
        return sorted(wanted, key=lambda need: (need.name, str(need.constraint)))

    @property
    def origin(self) -> str:
        """Where it comes from, for messages: the name of a registry, or a folder."""
        return self.registry or f"{self.path}{' (editable)' if self.is_editable else ''}"


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The locked experts of a project.

    Args:
        interface: The router interface that the experts were chosen for; None if it was not known.
        registries: Location of each registry in use, as written in `composable.toml`.
        experts: The experts, sorted by name.

    Example:
        >>> lock = Lock(registries={"team": "../registry"})
        >>> Lock.loads(lock.to_toml()) == lock
        True
    """

    interface: LockedInterface | None = None
    registries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    experts: tuple[LockedExpert, ...] = ()

    @property
    def versions(self) -> dict[str, Version]:
        """The locked version of every expert."""
        return {expert.name: expert.version for expert in self.experts}

    def without(self, names: Collection[str]) -> Lock:
        """Return this lock without some experts."""
        experts = tuple(expert for expert in self.experts if expert.name not in names)
        return dataclasses.replace(self, experts=experts)

    def __getitem__(self, name: str) -> LockedExpert:
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(expert.name == name for expert in self.experts)

    def digests(self) -> set[str]:
        """Return the digests of all manifests and files."""
        return {digest for expert in self.experts for digest in expert.digests.values()}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a lock file, or the `composable.lock` in a directory.

        Raises:
            LockError: When it is missing or invalid.
        """
        path = path / LOCK_FILE if path.is_dir() else path
        try:
            return cls.loads(read_bytes(path).decode(), path.name)
        except FileNotFoundError as error:
            raise LockError(
                "no lock file", where=str(path), hint="run `composable lock`"
            ) from error
        except UnicodeDecodeError as error:
            raise LockError(
                "is not UTF-8 text", where=str(path), hint="run `composable lock`"
            ) from error

    @classmethod
    def loads(cls, text: str, where: str = LOCK_FILE) -> Self:
        """Read a lock from TOML text.

        Raises:
            LockError: `where` is the dotted path of the bad field.
        """
        try:
            return cls._parse(text, where)
        except ManifestError as error:
            kept = ", which keeps what both sides agree on" * (find_conflict(text) is not None)
            raise LockError(
                error.message, where=error.where, hint=f"run `composable lock`{kept}"
            ) from error

    @classmethod
    @functools.lru_cache(maxsize=4)  # the lock file and the installed lock are often the same text
    def _parse(cls, text: str, where: str) -> Self:
        top = _open(text, where)
        interface = _read_interface(top.table("interface")) if "interface" in top else None
        registries, experts = _read_entries(top)
        top.finish(also=("interface",))
        names = [expert.name for expert in experts]
        if len(set(names)) != len(names):
            raise ManifestError("an expert is listed twice", where=top.where("expert"))
        return cls(
            interface=interface,
            registries=registries,
            experts=tuple(sorted(experts, key=lambda expert: expert.name)),
        )

    def to_toml(self) -> str:
        """Return the canonical text of this lock."""
        interface = {}
        if self.interface is not None:
            interface = {
                "name": self.interface.name,
                "version": str(self.interface.version),
                "digest": self.interface.digest,
            }
        return _HEADER + format_toml(
            [
                ("", {"schema": SCHEMA}),
                ("interface", interface),
                ("registries", dict(sorted(self.registries.items()))),
                *(("[expert]", _expert_fields(e)) for e in sorted(self.experts, key=_name_of)),
            ]
        )

    def write(self, path: Path) -> bool:
        """Write the lock unless the file already holds it, with whatever line endings.

        Returns:
            Whether the file was written.
        """
        return replace_text(path, self.to_toml())


def read_entries(text: str, where: str) -> tuple[dict[str, str], list[LockedExpert]]:
    """Return the registries and all entries of a lock in the order of the text, checked singly.

    Raises:
        ManifestError: When an entry is malformed.
        LockError: When a newer version of composable wrote it.
    """
    return _read_entries(_open(text, where))


def _open(text: str, where: str) -> Table:
    """Parse the text of a lock, and check that this version reads its schema."""
    top = parse_toml(text, where)
    schema = top.integer("schema")
    if schema > SCHEMA:
        raise LockError(
            f"{schema} is not supported, expected {SCHEMA}",
            where=top.where("schema"),
            hint="a newer version of composable wrote it: use that one",
            is_newer=True,
        )
    if schema != SCHEMA:
        raise ManifestError(f"{schema} is not {SCHEMA}", where=top.where("schema"))
    return top


def _read_entries(top: Table) -> tuple[dict[str, str], list[LockedExpert]]:
    table = top.table("registries", {})
    registries = {name: table.text(name) for name in table.names()}
    return registries, [_read_expert(entry, registries) for entry in top.tables("expert")]


def _name_of(expert: LockedExpert) -> str:
    return expert.name


def _expert_fields(expert: LockedExpert) -> dict[str, object]:
    files = sorted(expert.files, key=lambda file: file.name)
    return {
        "name": expert.name,
        "version": str(expert.version),
        "registry": expert.registry,
        "path": expert.path,
        "editable": expert.is_editable or None,
        "manifest": expert.manifest,
        "interface": expert.interface,
        "license": expert.license,
        "signer": dataclasses.asdict(expert.signer) if expert.signer is not None else None,
        "requires": _to_texts(expert.requires) or None,
        "extras": {name: _to_texts(ranges) for name, ranges in sorted(expert.extras.items())}
        or None,
        "wanted-by": list(expert.wanted_by),
        "files": [{"name": f.name, "size": f.size, "digest": f.digest} for f in files] or None,
    }


def _to_texts(ranges: Mapping[str, Constraint]) -> dict[str, str]:
    return {name: str(range_) for name, range_ in sorted(ranges.items())}


def _read_interface(table: Table) -> LockedInterface:
    interface = LockedInterface(
        name=check_package_name(table.text("name"), table.where("name")),
        version=table.version("version"),
        digest=_read_digest(table, "digest"),
    )
    table.finish()
    return interface


def _read_expert(table: Table, registries: Mapping[str, str]) -> LockedExpert:
    registry, path = table.text("registry", None), table.text("path", None)
    if (registry is None) == (path is None):
        raise ManifestError("expected either a registry or a path", where=table.where())
    if registry is not None and registry not in registries:
        raise ManifestError(f"{registry!r} is not in [registries]", where=table.where("registry"))
    is_editable = table.boolean("editable", False)
    if is_editable and path is None:
        raise ManifestError(
            "only experts from folders can be editable", where=table.where("editable")
        )
    files = []
    for entry in table.tables("files"):
        name = check_file_name(entry.text("name"), entry.where("name"))
        size, digest = entry.integer("size"), _read_digest(entry, "digest")
        files.append(PackageFile(name=name, size=size, digest=digest))
        entry.finish()
    if len({file.name.lower() for file in files} | {EXPERT_FILE}) != len(files) + 1:
        raise ManifestError("a file is listed twice", where=table.where("files"))
    extras = table.table("extras", {})
    expert = LockedExpert(
        name=check_package_name(table.text("name"), table.where("name")),
        version=table.version("version"),
        registry=registry,
        path=path,
        is_editable=is_editable,
        manifest=None if is_editable else _read_digest(table, "manifest"),
        interface=_read_digest(table, "interface") if "interface" in table else None,
        requires=table.ranges("requires"),
        extras={
            check_package_name(name, extras.where(name)): extras.ranges(name)
            for name in extras.names()
        },
        license=table.text("license", None, max_length=MAX_LICENSE_LENGTH),
        wanted_by=table.texts("wanted-by"),
        files=tuple(files),
        signer=_read_signer(table.table("signer")) if "signer" in table else None,
    )
    table.finish(also=("interface", "signer"))
    return expert


def _read_signer(table: Table) -> Signer:
    signer = Signer(
        publisher=check_package_name(table.text("publisher"), table.where("publisher")),
        key=table.text("key", max_length=MAX_SIGNER_LENGTH),
    )
    table.finish()
    return signer


def _read_digest(table: Table, field: str) -> str:
    text = table.text(field)
    if not is_digest(text):
        raise ManifestError(f"{text[:80]!r} is not a digest", where=table.where(field))
    return text
