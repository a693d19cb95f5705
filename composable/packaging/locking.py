"""From a project to its lock, and from a lock to an installed environment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import (
    IntegrityError,
    LockError,
    MissingBlobError,
    PackagingError,
    RegistryError,
    UnknownExpertError,
)
from composable.packaging.download import MAX_AT_ONCE, download_files, require_space, run_at_once
from composable.packaging.environment import Environment
from composable.packaging.lock import LOCK_FILE, Lock, LockedExpert, LockedInterface
from composable.packaging.manifest import EXPERT_FILE, Manifest
from composable.packaging.names import did_you_mean
from composable.packaging.packing import describe_file, fit_interface, pack_named
from composable.packaging.project import PROJECT_FILE, Project, Wanted
from composable.packaging.registry import Registry
from composable.packaging.release import Release
from composable.packaging.storage import Progress
from composable.packaging.store import Store
from composable.packaging.toml import MAX_TOML_BYTES
from composable.packaging.universe import Candidate
from composable.packaging.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface
    from composable.packaging.resolver import Resolution
    from composable.packaging.solver import Solver

# How often a sync fetches again what others prune meanwhile.
MAX_ATTEMPTS: Final = 20


class ProjectSource:
    """The releases that a project may choose from, each name from the one place bound to it.

    Args:
        project: The project.
        interface: The router interface; a release trained against a digest that it does not honour
            is refused. None refuses nothing.
        exclude_newer: Releases published after this time, RFC 3339 in UTC, are refused.
    """

    def __init__(
        self,
        project: Project,
        interface: RouterInterface | None = None,
        *,
        exclude_newer: str | None = None,
    ) -> None:
        self._project = project
        self._interface = interface
        self._exclude_newer = exclude_newer
        self._registries: dict[str, Registry] = {}
        self._releases: dict[str, tuple[Release, ...]] = {}

    def releases(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest first; none for an unknown name.

        Raises:
            RegistryError: When its registry cannot answer.
            ManifestError: For a folder that holds another expert, or none.
        """
        if name not in self._releases:
            self._releases[name] = self._read(name)
        return self._releases[name]

    def release(self, name: str, version: Version) -> Release:
        """Return one release.

        Raises:
            UnknownExpertError: When there is none.
        """
        for release in self.releases(name):
            if release.version == version:
                return release
        raise UnknownExpertError(f"no release {name} {version}")

    def candidates(self, name: str) -> Sequence[Candidate]:
        """Return all releases of a package as candidates."""
        return [self._to_candidate(release) for release in self.releases(name)]

    def require(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest first.

        Raises:
            UnknownExpertError: When there are none.
        """
        releases = self.releases(name)
        if not releases:
            place = self._place(name)
            raise UnknownExpertError(
                f"no expert {name!r}",
                where=str(place) if isinstance(place, Path) else place.location,
                hint=did_you_mean(name, self.names()),
            )
        return releases

    def names(self) -> Sequence[str]:
        """Return the names in those registries of the project that tell, for hints."""
        found: set[str] = set()
        for registry in self._project.registries:
            with contextlib.suppress(RegistryError):
                found.update(self._open(registry).names())
        return sorted(found)

    def prefetch(self, names: Iterable[str]) -> None:
        """Read remote indexes of packages, and of what their newest releases need, all at once.

        The resolver asks for one at a time, and every question to a remote registry is a journey.
        What cannot be read is left for the resolver to ask for, if it ever does.
        """
        names = sorted({name for name in names if self._is_remote(name)} - self._releases.keys())
        while names:
            found = run_at_once([partial(self._try_to_read, name) for name in names])
            read = {n: releases for n, releases in zip(names, found, strict=True) if releases}
            self._releases.update(read)
            newest = (max(releases, key=lambda r: r.version) for releases in read.values())
            needed = {other for release in newest for other in release.requires}
            names = sorted(filter(self._is_remote, needed - self._releases.keys() - {*names}))

    def _is_remote(self, name: str) -> bool:
        with contextlib.suppress(PackagingError):
            place = self._place(name)
            return isinstance(place, Registry) and place.storage.is_remote
        return False

    def _try_to_read(self, name: str) -> tuple[Release, ...] | None:
        with contextlib.suppress(PackagingError):
            return self._read(name)
        return None

    def _read(self, name: str) -> tuple[Release, ...]:
        place = self._place(name)
        if isinstance(place, Path):
            return (Release.of(pack_named(place, name, self._interface), ""),)
        return place.versions(name)

    def _place(self, name: str) -> Path | Registry:
        """Return the folder or the registry that a package comes from."""
        return self._project.folder_of(name) or self._open(self._project.registry_of(name))

    def _open(self, registry: str) -> Registry:
        if registry not in self._registries:
            self._registries[registry] = self._project.open_registry(registry)
        return self._registries[registry]

    def _to_candidate(self, release: Release) -> Candidate:
        need = release.interface
        refusal = None
        if self._exclude_newer is not None and release.published > self._exclude_newer:
            refusal = f"was published at {release.published}, after {self._exclude_newer}"
        elif (
            self._interface is not None
            and need.name == self._interface.name
            and need.requires.contains(Version(self._interface.version))
            and not self._interface.honours_digest(need.digest or "")
        ):
            refusal = (
                f"was trained against router interface {_short(need.digest)}, which "
                f"{self._interface.name} {self._interface.version} does not honour"
            )
        return Candidate(
            version=release.version,
            requires=release.requires,
            extras=release.extras,
            conflicts=release.conflicts,
            interface=(need.name, need.requires),
            is_yanked=release.is_yanked,
            refusal=refusal,
        )


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
    from composable.packaging.resolver import resolve_from  # here: a project in sync needs none

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


def sync_project(
    project: Project,
    lock: Lock | None = None,
    store: Store | None = None,
    *,
    interface: RouterInterface | None = None,
    source: Registry | None = None,
    progress: Progress | None = None,
) -> Environment:
    """Fetch what a lock names and the store lacks, and make it the environment in use.

    A synced project is left as it is: nothing is fetched and nothing is written.

    Args:
        project: The project.
        lock: Its lock; by default the one in its lock file.
        store: Where files are kept; by default the user's store.
        interface: The backbone's router interface, checked against every expert if it is known.
        source: Where files come from instead of the registries that the lock names: an export.
        progress: Called with a file, bytes done and bytes in all, and with `install` and experts.

    Returns:
        The environment.

    Raises:
        LockError: When there is no lock, or it no longer fits the project.
        IntegrityError: When a registry sends other bytes than the lock promises.
        UnreachableError: When a registry cannot be reached; what has arrived is kept.
    """
    if lock is None:
        lock = Lock.read(project.root)
    store = store or Store()
    check_lock(project, lock, interface)
    environment = project.environment
    if environment.holds(lock):
        environment.settle()
        return environment
    store.register(project.root)
    for attempt in range(MAX_ATTEMPTS):
        try:
            fetch_missing(project, lock, store, source=source, progress=progress)
            environment.install(lock, store, progress=progress)
            break
        except MissingBlobError:  # pruned in between
            if attempt == MAX_ATTEMPTS - 1:
                raise
    return environment


def fetch_missing(
    project: Project,
    lock: Lock,
    store: Store,
    *,
    source: Registry | None = None,
    progress: Progress | None = None,
) -> None:
    """Put every file of a lock into the store that is not there: manifests first, then the rest.

    What is there and not yet in use by the project is read again, for disks forget; damaged files
    are fetched anew.

    Raises:
        IntegrityError: When a registry sends other bytes than the lock promises.
        RegistryError: When a registry cannot answer.
    """
    for digest in lock.digests() - _digests_in_use(project):
        store.check(digest)
    registries: dict[str, Registry] = {}
    fetched: list[tuple[LockedExpert, Registry]] = []
    for expert in lock.experts:
        if all(store.has(digest) for digest in expert.digests.values()) and all(
            store.has(file.digest, file.size) for file in expert.files
        ):
            continue
        folder = project.folder_of(expert.name)
        if folder is not None and source is None:
            _copy_folder(folder, expert, store)
            continue
        name = expert.registry or ""
        if source is None and name not in registries:
            registries[name] = project.open_registry(name)
        fetched.append((expert, source or registries[name]))
    is_remote = any(registry.storage.is_remote for _, registry in fetched)
    manifests = run_at_once(
        [partial(_fetch_manifest, expert, registry, store) for expert, registry in fetched],
        n_at_once=MAX_AT_ONCE if is_remote else 1,
    )
    wanted = []
    for (expert, registry), manifest in zip(fetched, manifests, strict=True):
        if set(manifest.files) != set(expert.files):
            raise IntegrityError(
                f"the manifest of {expert.name} {expert.version} lists other files than the lock",
                where=registry.location,
                hint="the registry is damaged or dishonest; nothing was installed",
            )
        label = f"{expert.name} {expert.version}"
        wanted += [(registry, file, f"{label} {file.name}") for file in manifest.files]
    require_space(store, [file for _, file, _ in wanted])
    download_files(wanted, store, progress)


def _digests_in_use(project: Project) -> set[str]:
    try:
        return project.environment.lock.digests()
    except PackagingError:
        return set()  # a damaged pointer, which installing mends


def _fetch_manifest(expert: LockedExpert, registry: Registry, store: Store) -> Manifest:
    """Return the manifest of an expert from the store, where it is put if it is not there."""
    assert expert.manifest is not None  # editable ones are never fetched
    what = f"{expert.name} {expert.version} {EXPERT_FILE}"
    data = store.read(expert.manifest)
    if data is None:
        data = registry.read_blob(expert.manifest, what, MAX_TOML_BYTES)
        store.add(data, expert.manifest)
    return Manifest.loads(data.decode(errors="replace"), what)


def _copy_folder(folder: Path, expert: LockedExpert, store: Store) -> None:
    """Put the files of an expert that comes from a folder into the store."""
    for file in expert.files:
        store.add(folder / file.name, file.digest, file.size)
    assert expert.manifest is not None
    packed = dataclasses.replace(
        Manifest.read(folder),
        files=tuple(describe_file(folder / file.name) for file in expert.files),
    )
    need = dataclasses.replace(packed.interface, digest=expert.interface)
    store.add(dataclasses.replace(packed, interface=need).to_toml().encode(), expert.manifest)


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


def find_expert(project: Project, name: str) -> tuple[Release, ...]:
    """Return all releases of an expert, oldest first.

    Raises:
        UnknownExpertError: When its registry knows none.
    """
    return ProjectSource(project).require(name)


def _lock_interface(interface: RouterInterface) -> LockedInterface:
    return LockedInterface(
        name=interface.name, version=Version(interface.version), digest=interface.digest
    )


def _short(digest: str | None) -> str:
    return f"{digest[:19]}…" if digest else "of unknown digest"
