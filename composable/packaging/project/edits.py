"""Changes of a project, all or nothing: what cannot be resolved is never written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from composable.errors import LockError, ManifestError
from composable.packaging.install.environment import Generation
from composable.packaging.install.lock import LOCK_FILE, Lock
from composable.packaging.install.store import PRUNE_GRACE_SECONDS, Pruned, Store
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.project.locking import check_lock, lock_project
from composable.packaging.project.project import Project, Wanted
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface


@dataclass(frozen=True, kw_only=True)
class VersionChange:
    """What happens to one expert between two locks.

    Args:
        name: The expert.
        before: Its version before; None when it is new.
        after: Its version after; None when it goes.
    """

    name: str
    before: Version | None
    after: Version | None


def compare_locks(before: Lock | None, after: Lock) -> list[VersionChange]:
    """Return what differs between two locks, by name."""
    old, new = before.versions if before else {}, after.versions
    return [
        VersionChange(name=name, before=old.get(name), after=new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def read_wanted(
    project: Project,
    texts: Sequence[str],
    *,
    registry: str | None = None,
    is_editable: bool = False,
    base: Path | None = None,
) -> dict[str, Wanted]:
    """Return what texts ask for: requirements, or folders where a text has a slash or begins so.

    Args:
        project: The project.
        texts: For example `german[code]>=1.2` or `../my-expert`.
        registry: Name of the registry to bind them to; by default as before, or the default one.
        is_editable: Whether folders are used where they lie.
        base: Directory that folders are counted from; by default the working directory.

    Returns:
        What is asked of each expert, by its name; folders are counted from the project's.

    Raises:
        ConstraintError: For a text that is neither.
        ManifestError: For a folder that holds no expert.
    """
    wanted = {}
    for text in texts:
        if not (text.startswith(".") or "/" in text or "\\" in text):
            requirement = Requirement.parse(text)
            before = project.experts.get(requirement.name)
            wanted[requirement.name] = Wanted(
                constraint=requirement.constraint,
                extras=requirement.extras,
                registry=registry or (before.registry if before else None),
            )
            continue
        folder = (base or Path.cwd()) / Path(text).expanduser()
        if not folder.is_dir():
            raise ManifestError("there is no such folder", where=text)
        path = Path(os.path.relpath(folder, project.root)).as_posix()
        wanted[Manifest.read(folder).name] = Wanted(path=path, is_editable=is_editable)
    if is_editable and not any(want.path for want in wanted.values()):
        raise ManifestError(
            "only experts from folders can be editable", hint="give a folder, such as ./my-expert"
        )
    return wanted


def add_experts(
    project: Project,
    wanted: Mapping[str, Wanted],
    interface: RouterInterface,
    *,
    exclude_newer: str | None = None,
    is_dry_run: bool = False,
) -> tuple[Project, Lock]:
    """Ask for experts in the project file, if what is asked for then can be resolved.

    Args:
        project: The project.
        wanted: What to ask of each expert, by name.
        interface: The backbone's router interface.
        exclude_newer: Releases published after this time, RFC 3339 in UTC, do not exist.
        is_dry_run: Whether to leave the file alone.

    Returns:
        The new project, and the lock that it will have; the lock file is left alone.

    Raises:
        UnknownExpertError: For a name that its registry does not know.
        ResolutionError: When no choice of versions will do.
    """
    planned = dataclasses.replace(project, experts={**project.experts, **wanted})
    lock = lock_project(
        planned, interface, exclude_newer=exclude_newer, is_dry_run=True, must_exist=wanted
    )
    if is_dry_run:
        return planned, lock
    return project.change(wanted), lock


def refresh_lock(
    project: Project,
    interface: RouterInterface,
    *,
    exclude_newer: str | None = None,
    is_dry_run: bool = False,
) -> Lock:
    """Return the project's lock, made anew only if there is none or it no longer fits.

    Raises:
        LockError: For a lock file that cannot be read.
        ResolutionError: When it no longer fits and no choice of versions will do.
    """
    lock = project.lock
    if lock is not None:
        try:
            check_lock(project, lock, interface)
        except LockError:
            lock = None
    return lock or lock_project(
        project, interface, exclude_newer=exclude_newer, is_dry_run=is_dry_run
    )


def roll_back(project: Project) -> Generation:
    """Put the generation before the one in use back in use, and its lock into the lock file.

    Raises:
        PackagingError: When there is none.
    """
    generation = project.environment.rollback()
    generation.lock.write(project.lock_path)
    return generation


def name_files(store: Store) -> dict[str, str]:
    """Return what the files in a store are, as far as the locks of its projects tell.

    Returns:
        For example `german 1.2.0 body.safetensors`, by digest.
    """
    names = {}
    for root in store.projects():
        with contextlib.suppress(LockError):
            for expert in Lock.read(root / LOCK_FILE).experts:
                for file, digest in expert.digests.items():
                    names[digest] = f"{expert.name} {expert.version} {file}"
    return names


def prune_store(store: Store, older_than_seconds: float = PRUNE_GRACE_SECONDS) -> Pruned:
    """Remove what no registered project needs from the store.

    Kept are the files that a project's lock names, installed or not, and those that any environment
    links to. A project whose folder is gone needs nothing.

    Raises:
        LockError: For a project whose lock cannot be read; nothing is removed then.
    """
    needed = store.linked()
    for root in store.projects():
        try:
            needed |= Lock.read(root / LOCK_FILE).digests()
        except LockError as error:
            if not (root / LOCK_FILE).exists():
                continue
            raise LockError(
                f"it is not known what the project in {root} needs: {error.message}",
                where=error.where,
                hint="mend or remove its lock first; nothing was removed",
            ) from error
    return store.prune(needed, older_than_seconds)
