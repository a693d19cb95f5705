"""The project file `composable.toml`: which backbone, which registries, which experts.

Edits keep what the user wrote: order, comments and spacing of everything that is not edited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from composable.errors import ManifestError, PackagingError, did_you_mean
from composable.files import atomic
from composable.packaging.install.environment import FOLDER, Environment
from composable.packaging.install.lock import LOCK_FILE, Lock
from composable.packaging.manifests.toml import Table, format_toml, parse_toml
from composable.packaging.project.project_file import edit_experts
from composable.packaging.registry.locations import open_registry
from composable.packaging.registry.registry import Registry
from composable.packaging.versions.constraint import ANY, Constraint, Requirement
from composable.packaging.versions.names import check_package_name

PROJECT_FILE: Final = "composable.toml"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One expert that a project asks for.

    Args:
        constraint: Versions that will do.
        extras: Its extras that are asked for.
        registry: Name of the registry that it comes from; None for the default one.
        path: A folder that it comes from instead, as the user wrote it.
        is_editable: Whether it is used where it lies rather than as it was when it was locked.
    """

    constraint: Constraint = ANY
    extras: tuple[str, ...] = ()
    registry: str | None = None
    path: str | None = None
    is_editable: bool = False


@dataclass(frozen=True, kw_only=True)
class Project:
    """What `composable.toml` says. Immutable: edits write the file and return the new project.

    Args:
        root: Directory of the file.
        backbone: The backbone, as the user names it.
        registries: Location of each registry, as the user wrote it.
        default_registry: Where experts come from that are bound to no other; None without any.
        experts: What is wanted, by package name, in the file's order.
        bindings: Registry of packages that only other experts ask for.
        is_offline: Whether registries answer from what is kept of them alone. No field of the
            file.
    """

    root: Path
    backbone: str
    registries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_registry: str | None = None
    experts: Mapping[str, Wanted] = dataclasses.field(default_factory=dict)
    bindings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_offline: bool = False

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
        """What is wanted, in the file's order."""
        return [
            Requirement(name, wanted.constraint, wanted.extras)
            for name, wanted in self.experts.items()
        ]

    @property
    def lock(self) -> Lock | None:
        """The lock, or None when there is none yet.

        Raises:
            LockError: For a bad lock file.
        """
        return Lock.read(self.lock_path) if self.lock_path.exists() else None

    def folder_of(self, name: str) -> Path | None:
        """Return the folder that an expert comes from; None where it comes from a registry."""
        wanted = self.experts.get(name)
        return self.root / Path(wanted.path).expanduser() if wanted and wanted.path else None

    def registry_of(self, name: str) -> str:
        """Return the name of the one registry that a package may come from.

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
            hint='name one under [registries], and with several say `registry = "NAME"` '
            "under [project]",
        )

    def open_registry(self, name: str) -> Registry:
        """Return a registry by its name in this project.

        Raises:
            ManifestError: When the project does not name it.
        """
        if name not in self.registries:
            raise ManifestError(
                f"no registry {name!r}",
                where=f"{PROJECT_FILE}: registries",
                hint=did_you_mean(name, self.registries),
            )
        return open_registry(
            self.registries[name], self.root, name=name, is_offline=self.is_offline
        )

    @classmethod
    def find(cls, start: Path | None = None) -> Self:
        """Read the project file of `start`, by default the working directory, or a parent of it.

        Raises:
            PackagingError: When there is none up to the root of the file system.
        """
        start = (start or Path.cwd()).resolve()
        for folder in (start, *start.parents):
            if (folder / PROJECT_FILE).is_file():
                return cls.read(folder)
        raise PackagingError(
            f"no {PROJECT_FILE} here or above",
            where=str(start),
            hint="run `composable init` to make this directory a project",
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `composable.toml`, or that file in a directory.

        Raises:
            ManifestError: When there is none, or it is bad; `where` is the dotted path.
        """
        path = path / PROJECT_FILE if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ManifestError("there is no such file", where=str(path)) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"cannot be read: {error}", where=str(path)) from error
        return cls._from_table(parse_toml(text, PROJECT_FILE), path.parent.absolute())

    @classmethod
    def create(cls, root: Path, backbone: str, registries: Mapping[str, str] | None = None) -> Self:
        """Write a new project file.

        Args:
            root: Directory of the project.
            backbone: Name or folder of the backbone.
            registries: Locations by name; with several, the first is the default.

        Raises:
            PackagingError: When there is one already.
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
                    hint=did_you_mean(registry, registries) or "name it under [registries]",
                )
        head.finish()
        top.finish()
        return cls(
            root=root,
            backbone=backbone,
            registries=registries,
            default_registry=default,
            experts=experts,
            bindings=bindings,
        )

    def add(
        self,
        requirement: Requirement,
        *,
        registry: str | None = None,
        path: str | None = None,
        is_editable: bool = False,
    ) -> Self:
        """Ask for an expert, or change what is asked of one, in the file.

        Args:
            requirement: Name, range and extras; of an expert from a folder the range says nothing.
            registry: Name of the registry to bind it to; by default as before, or the default one.
            path: A folder that it comes from instead, counted from the project's.
            is_editable: Whether it is used where it lies.

        Returns:
            The new project.

        Raises:
            ManifestError: For a registry that the project does not name.
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
        """Stop asking for experts, in the file.

        Raises:
            PackagingError: When the project does not ask for one of them.
        """
        for name in names:
            if name not in self.experts:
                raise PackagingError(
                    f"the project does not ask for {name!r}",
                    where=str(self.path),
                    hint=did_you_mean(name, self.experts),
                )
        return self.change(dict.fromkeys(names))

    def change(self, wanted: Mapping[str, Wanted | None]) -> Self:
        """Ask for several experts at once, or stop asking for them: all in one write of the file.

        Args:
            wanted: What to ask of each expert, by name, or None to stop. Without a registry or a
                path an expert stays bound as before, or to the default registry.

        Returns:
            The new project.

        Raises:
            ManifestError: For a registry that the project does not name.
            PackagingError: When the file is written in a way that cannot be edited line by line.
        """
        text = atomic.read_bytes(self.path).decode()
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
        atomic.write_text(self.path, edited)
        return type(self).read(self.root)

    def _describe_entry(self, name: str, want: Wanted) -> Any:
        """Return the entry of an expert as the file writes it."""
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
                        "an expert from a folder has the version that its manifest says, and no "
                        "registry",
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
                "only an expert from a folder can be editable", where=entry.where("editable")
            )
        entry.finish()
    return experts


def _read_without(text: str, names: Container[str], root: Path) -> Project:
    """Read a project as it would be if it did not ask for `names`."""
    project = Project._from_table(parse_toml(text, PROJECT_FILE), root)
    experts = {name: wanted for name, wanted in project.experts.items() if name not in names}
    return dataclasses.replace(project, experts=experts)
