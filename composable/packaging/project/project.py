"""Projects: the backbone, the registries and the experts that a `composable.toml` asks for.

The text edits themselves are in `project_file.py`; resolving is in `locking.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from composable.errors import ManifestError, MissingProjectError, PackagingError, did_you_mean
from composable.files import atomic
from composable.files.user_files import replace_text
from composable.packaging.install.environment import FOLDER, Environment
from composable.packaging.install.lock import LOCK_FILE, Lock
from composable.packaging.manifests.toml import Table, format_toml, parse_toml, read_toml_text
from composable.packaging.project.policy import Policy
from composable.packaging.project.project_file import edit_experts
from composable.packaging.registry.locations import open_registry, unpin
from composable.packaging.registry.registry import Registry
from composable.packaging.versions.constraint import ANY, Constraint, Requirement
from composable.packaging.versions.names import check_package_name

PROJECT_FILE: Final = "composable.toml"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The entry of one expert in a project file.

    Args:
        constraint: The allowed versions.
        extras: The required extras of the expert.
        registry: Name of the registry that it comes from; None for the default one.
        path: A folder that it comes from instead, as written in the file.
        is_editable: Whether the folder is used in place rather than copied when it is locked.
    """

    constraint: Constraint = ANY
    extras: tuple[str, ...] = ()
    registry: str | None = None
    path: str | None = None
    is_editable: bool = False


@dataclass(frozen=True, kw_only=True)
class Project:
    r"""The content of `composable.toml`. Immutable: edits write the file and return a new project.

    Args:
        root: Directory of the file.
        backbone: Name or folder of the backbone, as written in the file.
        registries: Location of each registry, as written in the file.
        default_registry: Registry of the experts that are bound to no other; None without any.
        experts: The required experts, by package name, in the file's order.
        bindings: Registries of packages that are only dependencies of other experts.
        policy: Which releases the project accepts.
        is_offline: Whether remote registries are read from the cache alone. Not a field of the
            file.
        max_stale: How long after their end the signatures of registries are accepted. Not a field
            of the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     project = Project.create(Path(folder), "tiny-bytes", {"team": "../registry"})
        ...     project.add(Requirement.parse("german^1.2")).path.read_text().split("\n\n")[-1]
        '[experts]\ngerman = "^1.2"\n'
    """

    root: Path
    backbone: str
    registries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_registry: str | None = None
    experts: Mapping[str, Wanted] = dataclasses.field(default_factory=dict)
    bindings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    policy: Policy = dataclasses.field(default_factory=Policy)
    is_offline: bool = False
    max_stale: datetime.timedelta = datetime.timedelta()

    @property
    def path(self) -> Path:
        """The project file."""
        return self.root / PROJECT_FILE

    @property
    def lock_path(self) -> Path:
        """The lock file."""
        return self.root / LOCK_FILE

    @property
    def environment(self) -> Environment:
        """The project's environment, installed or not."""
        return Environment(self.root / FOLDER)

    @property
    def requirements(self) -> list[Requirement]:
        """The project's own requirements, in the file's order."""
        return [
            Requirement(name, wanted.constraint, wanted.extras)
            for name, wanted in self.experts.items()
        ]

    @property
    def lock(self) -> Lock | None:
        """The lock, or None if there is no lock file.

        Raises:
            LockError: When the lock file is invalid.
        """
        return Lock.read(self.lock_path) if self.lock_path.exists() else None

    def folder_of(self, name: str) -> Path | None:
        """Return the folder that an expert comes from; None if it comes from a registry."""
        wanted = self.experts.get(name)
        return self.root / Path(wanted.path).expanduser() if wanted and wanted.path else None

    def registry_of(self, name: str) -> str:
        """Return the name of the only registry that a package may come from.

        Raises:
            ManifestError: When the project has several registries and none is the default.
        """
        wanted = self.experts.get(name)
        bound = (wanted.registry if wanted else None) or self.bindings.get(name)
        if bound or self.default_registry:
            return bound or str(self.default_registry)
        raise ManifestError(
            f"no registry for {name!r}",
            where=f"{PROJECT_FILE}: registries",
            hint="add one under [registries]; with several, also set "
            '`registry = "NAME"` under [project]',
        )

    def open_registry(self, name: str, locked: str | None = None) -> Registry:
        """Open a registry by its name in this project.

        Args:
            name: Its name.
            locked: Its location in the lock, which may name a commit.

        Raises:
            ManifestError: When the project has no registry of that name.
        """
        if name not in self.registries:
            raise ManifestError(
                f"no registry {name!r}",
                where=f"{PROJECT_FILE}: registries",
                hint=did_you_mean(name, self.registries),
            )
        location = self.registries[name]
        if locked is not None and unpin(locked) == location:
            location = locked
        return open_registry(
            location,
            self.root,
            name=name,
            is_offline=self.is_offline,
            must_be_signed=self.policy.must_be_signed,
            max_stale=self.max_stale,
        )

    @classmethod
    def find(cls, start: Path | None = None) -> Self:
        """Read the project file in `start`, by default the working directory, or above it.

        Raises:
            MissingProjectError: When there is none up to the root of the file system.
        """
        start = (start or Path.cwd()).resolve()
        for folder in (start, *start.parents):
            if os.path.lexists(folder / PROJECT_FILE):  # whatever it is: `read` says what is wrong
                return cls.read(folder)
        raise MissingProjectError(
            f"no {PROJECT_FILE} in this directory or above",
            where=str(start),
            hint="run `composable init` to make this directory a project",
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a project file, or the `composable.toml` in a directory.

        Raises:
            ManifestError: When it is missing or invalid; `where` is the path of the bad field.
        """
        path = path / PROJECT_FILE if path.is_dir() else path
        table = parse_toml(read_toml_text(path), PROJECT_FILE)
        return cls._from_table(table, path.parent.absolute())

    @classmethod
    def create(cls, root: Path, backbone: str, registries: Mapping[str, str] | None = None) -> Self:
        """Write a new project file.

        Args:
            root: Directory of the project.
            backbone: Name or folder of the backbone.
            registries: Locations by name; with several, the first is the default.

        Raises:
            PackagingError: When the file already exists.
        """
        registries = registries or {}
        default = next(iter(registries)) if len(registries) > 1 else None
        head = {"backbone": backbone, "registry": default}
        text = format_toml([("project", head), ("registries", registries)])
        text += "\n[experts]\n"
        cls._from_table(parse_toml(text, PROJECT_FILE), root)
        if not atomic.create_bytes(root / PROJECT_FILE, text.encode()):
            raise PackagingError("already exists", where=str(root / PROJECT_FILE))
        return cls.read(root)

    @classmethod
    def _from_table(cls, top: Table, root: Path) -> Self:
        head = top.table("project")
        backbone = head.text("backbone", max_length=1000)
        table = top.table("registries", {})
        registries = {
            check_package_name(name, table.where(name)): table.text(name) for name in table.names()
        }
        default = head.text("registry", None)
        if default is None and len(registries) == 1:
            default = next(iter(registries))
        experts = _read_experts(top.table("experts", {}))
        binding_table = top.table("bindings", {})
        bindings = {
            check_package_name(name, binding_table.where(name)): binding_table.text(name)
            for name in binding_table.names()
        }
        named = {f"experts.{name}.registry": wanted.registry for name, wanted in experts.items()}
        named |= {f"bindings.{name}": registry for name, registry in bindings.items()}
        for field, registry in {"project.registry": default, **named}.items():
            if registry is not None and registry not in registries:
                raise ManifestError(
                    f"no registry {registry!r}",
                    where=top.where(field),
                    hint=did_you_mean(registry, registries) or "add it under [registries]",
                )
        policy = Policy.from_table(top.table("policy", {}))
        head.finish()
        top.finish()
        return cls(
            root=root,
            backbone=backbone,
            registries=registries,
            default_registry=default,
            experts=experts,
            bindings=bindings,
            policy=policy,
        )

    def add(
        self,
        requirement: Requirement,
        *,
        registry: str | None = None,
        path: str | None = None,
        is_editable: bool = False,
    ) -> Self:
        """Add an expert to the file, or change its entry.

        Args:
            requirement: Name, range and extras. The range is ignored for an expert from a folder.
            registry: Name of the registry to bind it to; by default the one that it is bound to
                already, or else the default registry.
            path: A folder that it comes from instead, relative to the project's.
            is_editable: Whether the folder is used in place.

        Returns:
            The new project.

        Raises:
            ManifestError: When the project has no registry of that name.
        """
        want = Wanted(
            constraint=requirement.constraint,
            extras=requirement.extras,
            registry=registry,
            path=path,
            is_editable=is_editable,
        )
        return self.change({requirement.name: want})

    def remove(self, *names: str) -> Self:
        """Remove experts from the file.

        Raises:
            PackagingError: When one of them is not in the file.
        """
        for name in names:
            if name not in self.experts:
                raise PackagingError(
                    f"no expert {name!r} in the project",
                    where=str(self.path),
                    hint=did_you_mean(name, self.experts),
                )
        return self.change(dict.fromkeys(names))

    def change(self, wanted: Mapping[str, Wanted | None]) -> Self:
        """Add, change or remove several experts in one write of the file.

        Args:
            wanted: The new entry of each expert, by name, or None to remove it. Without a registry
                or a path, an expert keeps the registry that it is bound to.

        Returns:
            The new project.

        Raises:
            ManifestError: When the project has no registry of that name.
            PackagingError: When the file cannot be edited without changing other entries.
        """
        text = read_toml_text(self.path)
        entries = {
            name: self._describe_entry(name, want) if want else None
            for name, want in wanted.items()
        }
        edited = edit_experts(text, entries)
        if _read_without(edited, wanted, self.root) != _read_without(text, wanted, self.root):
            names = " and ".join(map(repr, wanted))
            raise PackagingError(
                f"cannot edit {names} without changing other entries",
                where=str(self.path),
                hint=f"edit the entries of {names} under [experts] by hand",
            )
        replace_text(self.path, edited)
        return type(self).read(self.root)

    def _describe_entry(self, name: str, want: Wanted) -> Any:
        """Return the entry of an expert as it is written in the file: a range or a table."""
        registry = want.registry
        if want.path is None and registry is None and name in self.experts:
            registry = self.experts[name].registry
        fields: dict[str, Any] = {
            "version": None if want.path else str(want.constraint),
            "path": want.path,
            "editable": want.is_editable or None,
            "extras": list(want.extras) or None,
            "registry": registry,
        }
        given = {field: value for field, value in fields.items() if value is not None}
        return given["version"] if given.keys() == {"version"} else given


def _read_experts(table: Table) -> dict[str, Wanted]:
    experts = {}
    for name in table.names():
        check_package_name(name, table.where(name))
        if not table.is_table(name):
            experts[name] = Wanted(constraint=table.value(name, Constraint))
            continue
        entry = table.table(name)
        path = entry.text("path", None)
        if path is not None:
            for field in ("version", "registry"):
                if field in entry:
                    raise ManifestError(
                        "not allowed together with path: the version of an expert from a folder "
                        "is in its manifest",
                        where=entry.where(field),
                    )
        experts[name] = Wanted(
            constraint=ANY if path is not None else entry.value("version", Constraint),
            extras=entry.texts("extras"),
            registry=entry.text("registry", None),
            path=path,
            is_editable=entry.boolean("editable", False),
        )
        if experts[name].is_editable and path is None:
            raise ManifestError(
                "only experts from folders can be editable", where=entry.where("editable")
            )
        entry.finish()
    return experts


def _read_without(text: str, names: Container[str], root: Path) -> Project:
    """Read a project file as if it had no entries for `names`."""
    project = Project._from_table(parse_toml(text, PROJECT_FILE), root)
    experts = {name: wanted for name, wanted in project.experts.items() if name not in names}
    return dataclasses.replace(project, experts=experts)
