"""Changes of a project, all or nothing: what cannot be resolved is never written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from composable.errors import LockError
from composable.packaging.constraint import Requirement
from composable.packaging.environment import Generation
from composable.packaging.lock import Lock
from composable.packaging.locking import check_lock, find_expert, lock_project
from composable.packaging.project import Project, Wanted
from composable.packaging.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happens to one expert between two locks.

    Args:
        name: The expert.
        before: Its version before; None when it is new.
        after: Its version after; None when it goes.
    """

    name: str
    before: Version | None
    after: Version | None


def compare_locks(before: Lock | None, after: Lock) -> list[Change]:
    """Return what differs between two locks, by name."""
    old, new = before.versions if before else {}, after.versions
    return [
        Change(name=name, before=old.get(name), after=new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def add_experts(
    project: Project,
    requirements: Sequence[Requirement],
    interface: RouterInterface,
    *,
    registry: str | None = None,
    is_dry_run: bool = False,
) -> tuple[Project, Lock]:
    """Ask for experts in the project file, if what is asked for then can be resolved.

    Args:
        project: The project.
        requirements: What to ask for.
        interface: The backbone's router interface.
        registry: Name of the registry to bind them to; by default as before, or the default one.
        is_dry_run: Whether to leave the file alone.

    Returns:
        The new project, and the lock that it will have; the lock file is left alone.

    Raises:
        UnknownExpertError: For a name that its registry does not know.
        ResolutionError: When no choice of versions will do.
    """
    wanted = {
        requirement.name: _want(project, requirement, registry) for requirement in requirements
    }
    planned = dataclasses.replace(project, experts={**project.experts, **wanted})
    for requirement in requirements:
        find_expert(planned, requirement.name)
    lock = lock_project(planned, interface, is_dry_run=True)
    if is_dry_run:
        return planned, lock
    for requirement in requirements:
        project = project.add(requirement, registry=registry)
    return project, lock


def refresh_lock(project: Project, interface: RouterInterface, *, is_dry_run: bool = False) -> Lock:
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
    return lock or lock_project(project, interface, is_dry_run=is_dry_run)


def roll_back(project: Project) -> Generation:
    """Put the generation before the one in use back in use, and its lock into the lock file.

    Raises:
        PackagingError: When there is none.
    """
    generation = project.environment.rollback()
    generation.lock.write(project.lock_path)
    return generation


def _want(project: Project, requirement: Requirement, registry: str | None) -> Wanted:
    before = project.experts.get(requirement.name)
    registry = registry or (before.registry if before else None)
    return Wanted(constraint=requirement.constraint, registry=registry)
