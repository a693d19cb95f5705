"""Where the experts of a project come from: registries and folders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from composable.errors import PackagingError, RegistryError, UnknownExpertError, did_you_mean
from composable.packaging.install.download import run_at_once
from composable.packaging.manifests.packing import pack_named
from composable.packaging.project.project import Project
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import Release
from composable.packaging.resolution.universe import Candidate
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface


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


def find_expert(project: Project, name: str) -> tuple[Release, ...]:
    """Return all releases of an expert, oldest first.

    Raises:
        UnknownExpertError: When its registry knows none.
    """
    return ProjectSource(project).require(name)


def _short(digest: str | None) -> str:
    return f"{digest[:19]}…" if digest else "of unknown digest"
