"""From a project to its lock, and from a lock to an installed environment."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from composable.errors import LockError
from composable.packaging.install.lock import LOCK_FILE, Lock, LockedExpert, LockedInterface
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.manifests.packing import fit_interface, pack_named
from composable.packaging.project.project import PROJECT_FILE, Project, Wanted
from composable.packaging.project.sources import ProjectSource, _short
from composable.packaging.registry.release import Release
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface
    from composable.packaging.resolution.resolver import Resolution
    from composable.packaging.resolution.solver import Solver


def lock_project(
    project: Project,
    interface: RouterInterface | None = None,
    *,
    upgrade: bool | Collection[str] = False,
    exclude_newer: str | None = None,
    must_exist: Iterable[str] = (),
    solver: Solver | None = None,
    is_dry_run: bool = False,
) -> Lock:
    """Choose a version for everything that a project needs and write `composable.lock`.

    Args:
        project: The project.
        interface: The backbone's router interface. With None, interfaces are recorded but not
            checked, and the lock can only be used where something else checks them.
        upgrade: Whether to forget what was locked: for all packages, or for those named.
        exclude_newer: Releases published after this time, RFC 3339 in UTC, do not exist.
        must_exist: Names whose absence is worth an error of its own, with what was meant.
        solver: The search; PubGrub by default.
        is_dry_run: Whether to leave the file alone.

    Returns:
        The lock. The file is written only if that changes it.

    Raises:
        UnknownExpertError: When one of `must_exist` is in no registry.
        ResolutionError: When no choice will do; the message tells why and what would.
        RegistryError: When a registry cannot answer.
    """
    from composable.packaging.resolution.resolver import (
        resolve_from,  # here: a project in sync needs none
    )

    source = ProjectSource(project, interface, exclude_newer=exclude_newer)
    before = None if upgrade is True else project.lock
    source.prefetch([*project.experts, *(before.versions if before else ())])
    for name in must_exist:
        source.require(name)
    kept = {} if before is None else before.versions
    if not isinstance(upgrade, bool):
        kept = {name: version for name, version in kept.items() if name not in upgrade}
    resolution = resolve_from(
        source,
        project.requirements,
        interface=None if interface is None else {interface.name: Version(interface.version)},
        locked=kept,
        solver=solver,
    )
    experts = [
        _lock_expert(project, source.release(name, version), resolution)
        for name, version in resolution.packages.items()
    ]
    used = sorted({expert.registry for expert in experts if expert.registry is not None})
    lock = Lock(
        interface=None if interface is None else _lock_interface(interface),
        registries={name: project.registries[name] for name in used},
        experts=tuple(experts),
    )
    if not is_dry_run:
        lock.write(project.lock_path)
    return lock


def _lock_expert(project: Project, release: Release, resolution: Resolution) -> LockedExpert:
    wanted = project.experts.get(release.name, Wanted())
    by = []
    for who, range_ in resolution.wanted_by[release.name]:
        package = who.partition("[")[0]
        by.append(f"{f'{who} {resolution.packages[package]}' if who else PROJECT_FILE}: {range_}")
    extras = resolution.extras.get(release.name, ())
    return LockedExpert(
        name=release.name,
        version=release.version,
        registry=None if wanted.path else project.registry_of(release.name),
        path=wanted.path,
        is_editable=wanted.is_editable,
        manifest=None if wanted.is_editable else release.manifest,
        interface=release.interface.digest,
        requires=release.requires,
        extras={extra: release.extras[extra] for extra in extras},
        wanted_by=tuple(by),
        files=() if wanted.is_editable else release.files,
    )


def check_lock(project: Project, lock: Lock, interface: RouterInterface | None = None) -> None:
    """Check that a lock still is what its project asks for.

    Args:
        project: The project.
        lock: Its lock.
        interface: The backbone's router interface, if it is known.

    Raises:
        LockError: Naming the first thing that no longer fits.
    """

    def refuse(message: str) -> None:
        raise LockError(message, where=LOCK_FILE, hint="run `composable lock`")

    versions = lock.versions
    for requirement in project.requirements:
        version = versions.get(requirement.name)
        if version is None:
            refuse(f"{requirement.name} is asked for but not locked")
        elif not requirement.constraint.contains(version):
            refuse(f"{requirement} is asked for, but {version} is locked")
        elif set(lock[requirement.name].extras) != set(requirement.extras):
            refuse(f"other extras of {requirement.name} are asked for than are locked")
    for expert in lock.experts:
        for need in expert.needs:
            if need.name not in versions or not need.constraint.contains(versions[need.name]):
                refuse(f"{expert.name} {expert.version} needs {need}")
        wanted = project.experts.get(expert.name, Wanted())
        if (wanted.path, wanted.is_editable) != (expert.path, expert.is_editable):
            refuse(f"{expert.name} is to come from elsewhere than {expert.origin}")
        if expert.path is not None:
            if not _is_as_locked(project, expert, interface):
                refuse(f"{expert.name} in {expert.path} was changed since it was locked")
        elif project.registry_of(expert.name) != expert.registry:
            refuse(f"{expert.name} is bound to another registry than {expert.registry!r}")
        if interface is not None and not interface.honours_digest(expert.interface or ""):
            refuse(
                f"{expert.name} {expert.version} was trained against router interface "
                f"{_short(expert.interface)}, which {interface.name} {interface.version} "
                "does not honour"
            )
    needed = list(project.experts)
    for name in needed:
        needed.extend(need.name for need in lock[name].needs if need.name not in needed)
    for name in versions:
        if name not in needed:
            refuse(f"{name} is locked, but no longer asked for")
    for name, location in lock.registries.items():
        if project.registries.get(name) != location:
            refuse(f"registry {name!r} is at another place than {location!r}")


def _is_as_locked(
    project: Project, expert: LockedExpert, interface: RouterInterface | None
) -> bool:
    """Say whether the folder of an expert holds what was locked; of an editable one, its needs."""
    folder = project.folder_of(expert.name)
    assert folder is not None
    if not expert.is_editable:
        return pack_named(folder, expert.name, interface).digest == expert.manifest
    manifest = Manifest.read(folder)
    if interface is not None:
        manifest = fit_interface(manifest, interface)
    extras = {extra: manifest.extras.get(extra) for extra in expert.extras}
    return (
        (manifest.name, manifest.version) == (expert.name, expert.version)
        and dict(manifest.requires) == dict(expert.requires)
        and extras == dict(expert.extras)
    )


def _lock_interface(interface: RouterInterface) -> LockedInterface:
    return LockedInterface(
        name=interface.name, version=Version(interface.version), digest=interface.digest
    )
