"""From a project to its lock, and from a lock to an installed environment."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from composable.errors import IntegrityError, LockError, UnknownExpertError
from composable.packaging.environment import Environment
from composable.packaging.lock import LOCK_FILE, Lock, LockedExpert, LockedInterface
from composable.packaging.names import did_you_mean
from composable.packaging.project import PROJECT_FILE, Project
from composable.packaging.registry import BlobSink, Progress, Registry
from composable.packaging.release import Release
from composable.packaging.resolver import resolve_from
from composable.packaging.solver import Solver
from composable.packaging.store import Store
from composable.packaging.universe import Candidate
from composable.packaging.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface


class ProjectSource:
    """The releases that a project may choose from, each name from the one registry bound to it.

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
        """Return all releases of a package, oldest first; none for an unknown name."""
        if name not in self._releases:
            self._releases[name] = self._registry(name).versions(name)
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

    def names(self) -> Sequence[str]:
        """Return the names in all registries of the project."""
        opened = [self._project.open_registry(name) for name in self._project.registries]
        return sorted({name for registry in opened for name in registry.names()})

    def _registry(self, name: str) -> Registry:
        bound = self._project.registry_of(name)
        if bound not in self._registries:
            self._registries[bound] = self._project.open_registry(bound)
        return self._registries[bound]

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
        solver: The search; PubGrub by default.
        is_dry_run: Whether to leave the file alone.

    Returns:
        The lock. The file is written only if that changes it.

    Raises:
        ResolutionError: When no choice will do; the message tells why and what would.
        RegistryError: When a registry cannot answer.
    """
    source = ProjectSource(project, interface, exclude_newer=exclude_newer)
    before = project.lock
    kept = {} if before is None or upgrade is True else before.versions
    if not isinstance(upgrade, bool):
        kept = {name: version for name, version in kept.items() if name not in upgrade}
    resolution = resolve_from(
        source,
        project.requirements,
        interface=None if interface is None else {interface.name: Version(interface.version)},
        locked=kept,
        solver=solver,
    )
    experts = []
    for name, version in resolution.packages.items():
        release = source.release(name, version)
        experts.append(
            LockedExpert(
                name=name,
                version=version,
                registry=project.registry_of(name),
                manifest=release.manifest,
                interface=release.interface.digest,
                requires=release.requires,
                wanted_by=tuple(
                    f"{f'{who} {resolution.packages[who]}' if who else PROJECT_FILE}: {range_}"
                    for who, range_ in resolution.wanted_by[name]
                ),
                files=release.files,
            )
        )
    used = sorted({expert.registry for expert in experts})
    lock = Lock(
        interface=None if interface is None else _lock_interface(interface),
        registries={name: project.registries[name] for name in used},
        experts=tuple(experts),
    )
    if not is_dry_run:
        lock.write(project.lock_path)
    return lock


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
    for expert in lock.experts:
        for name, range_ in expert.requires.items():
            if name not in versions or not range_.contains(versions[name]):
                refuse(f"{expert.name} {expert.version} needs {name} {range_}")
        if project.registry_of(expert.name) != expert.registry:
            refuse(f"{expert.name} is bound to another registry than {expert.registry!r}")
        if interface is not None and not interface.honours_digest(expert.interface or ""):
            refuse(
                f"{expert.name} {expert.version} was trained against router interface "
                f"{_short(expert.interface)}, which {interface.name} {interface.version} "
                "does not honour"
            )
    needed = list(project.experts)
    for name in needed:
        needed.extend(other for other in lock[name].requires if other not in needed)
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
    progress: Progress | None = None,
) -> Environment:
    """Fetch what a lock names and the store lacks, and make it the environment in use.

    A synced project is left as it is: nothing is fetched and nothing is written.

    Args:
        project: The project.
        lock: Its lock; by default the one in its lock file.
        store: Where files are kept; by default the user's store.
        interface: The backbone's router interface, checked against every expert if it is known.
        progress: Called with a file, bytes done and bytes in all, and with `install` and experts.

    Returns:
        The environment.

    Raises:
        LockError: When there is no lock, or it no longer fits the project.
        IntegrityError: When a registry sends other bytes than the lock promises.
    """
    if lock is None:
        lock = Lock.read(project.root)
    store = store or Store()
    check_lock(project, lock, interface)
    environment = project.environment
    if environment.holds(lock):
        return environment
    fetch_missing(project, lock, store, progress=progress)
    environment.install(lock, store, progress=progress)
    return environment


def fetch_missing(
    project: Project, lock: Lock, store: Store, *, progress: Progress | None = None
) -> int:
    """Put every file of a lock into the store that is not there.

    Returns:
        How many were fetched.

    Raises:
        IntegrityError: When a registry sends other bytes than the lock promises.
        RegistryError: When a registry cannot answer.
    """
    count = 0
    for expert in lock.experts:
        registry: Registry | None = None
        wanted: list[tuple[str, str, int | None]] = [("expert.toml", expert.manifest, None)]
        wanted += [(file.name, file.digest, file.size) for file in expert.files]
        for name, digest, size in wanted:
            if store.has(digest, size):
                continue
            registry = registry or project.open_registry(expert.registry)
            label = f"{expert.name} {expert.version} {name}"
            try:
                with store.sink(digest, size) as sink:
                    registry.fetch(digest, _Counting(sink, label, size or 0, progress))
            except IntegrityError as error:
                raise IntegrityError(
                    f"{label} from {registry.location}: {error.message}", hint=error.hint
                ) from error
            count += 1
    return count


def find_expert(project: Project, name: str) -> tuple[Release, ...]:
    """Return all releases of an expert, oldest first.

    Raises:
        UnknownExpertError: When its registry knows none.
    """
    source = ProjectSource(project)
    releases = source.releases(name)
    if not releases:
        raise UnknownExpertError(
            f"no expert {name!r}",
            where=project.open_registry(project.registry_of(name)).location,
            hint=did_you_mean(name, source.names()),
        )
    return releases


class _Counting:
    """A sink that reports what passes through it."""

    def __init__(self, sink: BlobSink, label: str, total: int, progress: Progress | None) -> None:
        self._sink = sink
        self._label = label
        self._total = total
        self._done = 0
        self._progress = progress

    def write(self, data: bytes, /) -> None:
        self._sink.write(data)
        self._done += len(data)
        if self._progress is not None:
            self._progress(self._label, self._done, max(self._total, self._done))


def _lock_interface(interface: RouterInterface) -> LockedInterface:
    return LockedInterface(
        name=interface.name, version=Version(interface.version), digest=interface.digest
    )


def _short(digest: str | None) -> str:
    return f"{digest[:19]}…" if digest else "of unknown digest"
