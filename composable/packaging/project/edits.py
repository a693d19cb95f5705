"""Changes to a project. A change whose requirements cannot be resolved is never written."""

from __future__ import annotations

import dataclasses
import os
import shlex
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
from composable.packaging.project.verification import find_uses
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface


@dataclass(frozen=True, kw_only=True)
class VersionChange:
    """One expert that differs between two locks: in its version, or only in its content.

    Args:
        name: The expert.
        before: Its version in the first lock; None when it was added.
        after: Its version in the second lock; None when it was removed.
        digest_before: Digest of its manifest in the first lock; None where it has none.
        digest_after: Digest of its manifest in the second lock; None where it has none.
    """

    name: str
    before: Version | None
    after: Version | None
    digest_before: str | None = None
    digest_after: str | None = None


def compare_locks(before: Lock | None, after: Lock) -> list[VersionChange]:
    """Return the experts whose version or content differs between two locks, sorted by name."""
    old = {expert.name: expert for expert in before.experts} if before else {}
    new = {expert.name: expert for expert in after.experts}
    changes = []
    for name in sorted(old.keys() | new.keys()):
        one, other = old.get(name), new.get(name)
        if one and other and (one.version, one.digests) == (other.version, other.digests):
            continue
        changes.append(
            VersionChange(
                name=name,
                before=one.version if one else None,
                after=other.version if other else None,
                digest_before=one.manifest if one else None,
                digest_after=other.manifest if other else None,
            )
        )
    return changes


def read_wanted(
    project: Project,
    texts: Sequence[str],
    *,
    registry: str | None = None,
    is_editable: bool = False,
    base: Path | None = None,
) -> dict[str, Wanted]:
    """Parse requirements and folders from the command line.

    A text that contains a slash or starts with a dot is a folder.

    Args:
        project: The project.
        texts: For example `german[code]>=1.2` or `../my-expert`.
        registry: Name of the registry to bind the experts to; by default the one that each is bound
            to already, or else the default registry.
        is_editable: Whether folders are used in place instead of being copied.
        base: Directory that relative folders start from; by default the working directory.

    Returns:
        The project file's entry for each expert, by name; folders are relative to the project.

    Raises:
        ConstraintError: For a text that is not a requirement.
        ManifestError: For a folder without an expert.
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
            raise ManifestError("no such folder", where=text)
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
    """Add experts to the project file if the result can be resolved.

    Args:
        project: The project.
        wanted: The new entry of each expert, by name.
        interface: The backbone's router interface.
        exclude_newer: Ignore releases published after this time (RFC 3339 in UTC).
        is_dry_run: Whether to leave the project file unchanged.

    Returns:
        The new project and the lock that fits it. The lock file is not written.

    Raises:
        UnknownExpertError: When a name is not in its registry.
        ResolutionError: When no versions satisfy all requirements.
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
    """Return the project's lock; resolve again only if there is none or it is out of date.

    Raises:
        LockError: When the lock file cannot be read.
        ResolutionError: When the lock is out of date and no versions satisfy all requirements.
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


def roll_back_project(project: Project) -> Generation:
    """Return to the previous generation and restore its lock file.

    Raises:
        PackagingError: When there is no previous generation.
    """
    generation = project.environment.rollback()
    generation.lock.write(project.lock_path)
    return generation


def prune_store(store: Store, older_than_seconds: float = PRUNE_GRACE_SECONDS) -> Pruned:
    """Remove files that no registered project needs from the store.

    Files that a project's lock lists are kept, installed or not, and so are the files of its
    installed generations. A project without a lock file needs only the latter.

    Raises:
        LockError: When a project's lock cannot be read; nothing is removed then.
    """
    needed = store.linked() | find_uses(store).keys()
    for root in store.projects():
        try:
            needed |= Lock.read(root / LOCK_FILE).digests()
        except LockError as error:
            if not (root / LOCK_FILE).exists():
                continue
            raise LockError(
                f"cannot tell which files the project in {root} needs: {error.message}",
                where=error.where,
                hint=f"run `cd {shlex.quote(str(root))} && composable lock`; nothing was removed",
            ) from error
    return store.prune(needed, older_than_seconds)
