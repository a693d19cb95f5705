"""Which experts plug into a backbone, and one version of each expert in a basket.

The resolver is the one of `composable install`; conflicts are explained in its words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from composable.errors import PackagingError, RegistryError, ResolutionError
from composable.interface import RouterInterface
from composable.packaging.install.lock import Lock, LockedExpert, LockedInterface
from composable.packaging.manifests import backbone_folder
from composable.packaging.manifests.manifest import BackbonePackage
from composable.packaging.registry.release import Release
from composable.packaging.resolution.resolver import Resolution, resolve_from
from composable.packaging.resolution.universe import Candidate
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version
from composable.server import audit, tables
from composable.server.access import can_see
from composable.server.accounts import Caller
from composable.server.database import Database, now
from composable.server.documents import QUARANTINED, to_listed
from composable.server.refusal import missing

MAX_BASKET: Final = 50
MAX_REQUIREMENT_LENGTH: Final = 200
# A hostile set of packages must not keep the server busy.
MAX_LOOKUPS: Final = 2000
REGISTRY_NAME: Final = "registry"


@dataclass(frozen=True, kw_only=True)
class Basket:
    """The answer for a basket.

    Args:
        experts: The chosen releases, sorted by name; empty if there is a conflict.
        conflict: Why there is no solution, in the resolver's words; empty if there is one.
        lock: The text of `composable.lock`; empty if there is a conflict.
    """

    experts: tuple[Release, ...] = ()
    conflict: str = ""
    lock: str = ""


class StoredReleases:
    """The releases that a caller may see, as the resolver's source.

    Args:
        session: A session.
        caller: Who asks.
        interface: The interface to plug into.
    """

    def __init__(self, session: Session, caller: Caller, interface: RouterInterface) -> None:
        self._session = session
        self._caller = caller
        self._interface = interface
        self._releases: dict[str, list[Release]] = {}

    def releases(self, name: str) -> list[Release]:
        """Return all releases of a package."""
        if name not in self._releases:
            if len(self._releases) >= MAX_LOOKUPS:
                raise ResolutionError(f"more than {MAX_LOOKUPS} packages would be looked at")
            rows = self._session.scalars(
                select(tables.Release)
                .join(tables.Package)
                .where(
                    tables.Package.name == name,
                    can_see(self._caller),
                    tables.Release.state != QUARANTINED,
                )
            )
            self._releases[name] = [to_listed(row) for row in rows]
        return self._releases[name]

    def candidates(self, name: str) -> Sequence[Candidate]:
        """Return all releases of a package as candidates."""
        return [self._to_candidate(release) for release in self.releases(name)]

    def names(self) -> Sequence[str]:
        """Return all names, for a hint."""
        return self._session.scalars(select(tables.Package.name).where(can_see(self._caller))).all()

    def alternatives(self, name: str) -> Mapping[str, str]:
        """Return nothing: a basket has no policy that another package could satisfy."""
        return {}

    def _to_candidate(self, release: Release) -> Candidate:
        reason = explain_misfit(release, self._interface)
        is_other_weights = reason is not None and reason.startswith("was trained")
        return Candidate(
            version=release.version,
            requires=release.requires,
            extras=release.extras,
            conflicts=release.conflicts,
            interface=(release.interface.name, release.interface.requires),
            is_yanked=release.is_yanked,
            refusal=reason if is_other_weights else None,
        )


def add_backbone(database: Database, folder: str) -> tuple[str, str]:
    """Add a version of a backbone, from its package.

    Args:
        database: The database.
        folder: A folder, or the name of a backbone that ships with the project.

    Returns:
        Its name and version.

    Raises:
        PackagingError: When there is no such package, or it is damaged.
        RegistryError: When the version is there with another router interface.
    """
    home = backbone_folder.find_backbone(folder)
    package = BackbonePackage.read(home)
    interface = backbone_folder.read_interface(home)
    version = str(package.version)
    with database.write() as session:
        known = session.get(tables.Backbone, (package.name, version))
        if known is None:
            row = tables.Backbone(
                name=package.name,
                version=version,
                interface=interface.to_json(),
                description=package.description,
                license=package.license,
                added=now(),
            )
            session.add(row)
            detail = {"interface": interface.digest}
            audit.record(session, "server", "backbone.add", f"{package.name}@{version}", detail)
        elif read_interface(known).digest != interface.digest:
            raise RegistryError(
                f"{package.name} {version} has another router interface here", where=str(home)
            )
    return package.name, version


def list_backbones(session: Session) -> list[tables.Backbone]:
    """Return all versions of all backbones, by name, newest version first."""
    rows = session.scalars(select(tables.Backbone)).all()
    newest_first = sorted(rows, key=lambda row: Version(row.version), reverse=True)
    return sorted(newest_first, key=lambda row: row.name)


def find_backbone(session: Session, name: str, version: str = "") -> tables.Backbone:
    """Return a version of a backbone, by default the newest.

    Raises:
        RefusedError: 404 when there is none.
    """
    for row in list_backbones(session):
        if row.name == name and version in ("", row.version):
            return row
    raise missing(f"backbone {name[:64]} {version[:64]}".rstrip())


def read_interface(backbone: tables.Backbone) -> RouterInterface:
    """Return the router interface of a backbone."""
    return RouterInterface.from_json(backbone.interface, f"{backbone.name} {backbone.version}")


def explain_misfit(release: Release, interface: RouterInterface) -> str | None:
    """Return why a release does not plug into an interface; None if it does."""
    need = release.interface
    if need.name != interface.name:
        return f"needs the router interface {need.name}"
    if not need.requires.contains(Version(interface.version)):
        return f"needs {need.name} {need.requires}"
    if not interface.honours_digest(need.digest or ""):
        return (
            f"was trained against another router interface, which {interface.name} "
            f"{interface.version} does not honour"
        )
    return None


def resolve_basket(
    session: Session, caller: Caller, backbone: tables.Backbone, wanted: Iterable[str], url: str
) -> Basket:
    """Choose one version of every expert in a basket, and of what they require.

    Args:
        session: A session.
        caller: Who asks.
        backbone: What they plug into.
        wanted: Requirements, such as `german` or `german@^1`.
        url: The registry's URL, for the lock.

    Raises:
        ConstraintError: For text that is not a requirement.
    """
    interface = read_interface(backbone)
    source = StoredReleases(session, caller, interface)
    texts = list(dict.fromkeys(text for text in wanted if text))
    if len(texts) > MAX_BASKET:
        return Basket(conflict=f"{len(texts)} experts, expected at most {MAX_BASKET}")
    requires = [Requirement.parse(text[:MAX_REQUIREMENT_LENGTH]) for text in texts]
    if len({requirement.name for requirement in requires}) < len(requires):
        return Basket(conflict="an expert is in the basket twice")
    try:
        resolution = resolve_from(
            source, requires, interface={interface.name: Version(interface.version)}
        )
    except PackagingError as error:
        return Basket(conflict=str(error))
    experts = tuple(
        next(release for release in source.releases(name) if release.version == version)
        for name, version in resolution.packages.items()
    )
    lock = Lock(
        interface=LockedInterface(
            name=interface.name, version=Version(interface.version), digest=interface.digest
        ),
        registries={REGISTRY_NAME: url} if experts else {},
        experts=tuple(_lock_expert(release, resolution) for release in experts),
    )
    return Basket(experts=experts, lock=lock.to_toml())


def _lock_expert(release: Release, resolution: Resolution) -> LockedExpert:
    """Return the entry of a lock that `composable lock` would write."""
    wanted_by = []
    for dependent, range_ in resolution.wanted_by[release.name]:
        version = resolution.packages[dependent.partition("[")[0]] if dependent else None
        wanted_by.append(
            f"{f'{dependent} {version}' if dependent else 'composable.toml'}: {range_}"
        )
    extras = resolution.extras.get(release.name, ())
    return LockedExpert(
        name=release.name,
        version=release.version,
        registry=REGISTRY_NAME,
        manifest=release.manifest,
        interface=release.interface.digest,
        requires=release.requires,
        extras={extra: release.extras[extra] for extra in extras},
        wanted_by=tuple(wanted_by),
        files=release.files,
    )
