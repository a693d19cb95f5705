"""The releases that a project can choose from: in its registries and in local folders."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import PackagingError, RegistryError, UnknownExpertError, did_you_mean
from composable.packaging.install.download import MAX_THREADS, run_concurrently
from composable.packaging.manifests.packing import pack_named
from composable.packaging.project.project import Project
from composable.packaging.registry.index import Entry
from composable.packaging.registry.locations import pin
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import Release, Signer
from composable.packaging.resolution.universe import Candidate
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

# Each alternative costs a resolution, and each of a remote registry reads its index.
MAX_ALTERNATIVES: Final = 3


class ProjectSource:
    """The releases that a project can choose from. Each package has one registry or folder.

    Args:
        project: The project.
        interface: The router interface. Releases that were trained against a digest that it does
            not honour are refused. None accepts all.
        exclude_newer: Releases published after this time (RFC 3339 in UTC) are refused.
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
        self._failures: dict[str, PackagingError] = {}
        self._licenses: dict[tuple[str, Version], str] = {}

    def releases(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest first; none for an unknown name.

        Raises:
            RegistryError: When its registry cannot be read.
            ManifestError: When its folder holds another expert, or none.
        """
        if name in self._failures:
            raise self._failures[name]
        if name not in self._releases:
            self._releases[name] = self._read_releases(name)
        return self._releases[name]

    def release(self, name: str, version: Version) -> Release:
        """Return one release.

        Raises:
            UnknownExpertError: When it does not exist.
        """
        for release in self.releases(name):
            if release.version == version:
                return release
        raise UnknownExpertError(f"no release {name} {version}")

    def candidates(self, name: str) -> Sequence[Candidate]:
        """Return all releases of a package as candidates."""
        return [self._to_candidate(release) for release in self.releases(name)]

    def find_license(self, release: Release) -> str | None:
        """Return the licence of a release; None if it states none, or if it is not known.

        Registries of before 0.3 have it only in manifests. These are read if the project has a
        policy for licences.

        Raises:
            RegistryError: When the manifest cannot be read.
        """
        if release.license is None and self._project.policy.licenses is not None:
            key = (release.name, release.version)
            if key not in self._licenses:
                registry = self._open_registry(self._project.registry_of(release.name))
                self._licenses[key] = registry.read_manifest(release).license
            return self._licenses[key] or None
        return release.license or None

    def verify_releases(self, releases: Sequence[Release]) -> dict[str, Signer]:
        """Verify the statements on releases of signed registries, and return who signed each.

        Args:
            releases: The releases, of which those from folders have no signer.

        Raises:
            SignatureError: When a release of a signed registry is not signed by its publisher.
            RegistryError: When a registry is unsigned, and the policy of the project refuses that.
        """
        from_registries = [
            (release, self._open_registry(self._project.registry_of(release.name)))
            for release in releases
            if self._project.folder_of(release.name) is None
        ]
        is_remote = any(registry.storage.is_remote for _, registry in from_registries)
        signers = run_concurrently(
            [partial(registry.verify_release, release) for release, registry in from_registries],
            n_threads=MAX_THREADS if is_remote else 1,
        )
        found = zip(from_registries, signers, strict=True)
        return {release.name: signer for (release, _), signer in found if signer is not None}

    def require_releases(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest first.

        Raises:
            UnknownExpertError: When there are none.
        """
        releases = self.releases(name)
        if not releases:
            origin = self._open_origin(name)
            raise UnknownExpertError(
                f"no expert {name!r}",
                where=str(origin) if isinstance(origin, Path) else origin.location,
                hint=self._hint_at_known(name),
            )
        return releases

    def names(self) -> Sequence[str]:
        """Return the names in the project's readable registries, for hints."""
        return sorted({name for names in self._names_by_registry().values() for name in names})

    def alternatives(self, name: str) -> dict[str, str]:
        """Return the experts that share tags with one, those that share most first.

        Only the catalogues of readable registries are asked, and an expert counts only in the
        registry that it would be taken from.
        """
        known: dict[str, Entry] = {}
        for registry in self._project.registries:
            with contextlib.suppress(PackagingError):
                for entry in self._open_registry(registry).entries():
                    if self._project.registry_of(entry.name) == registry:
                        known[entry.name] = entry
        tags = set(known[name].tags) if name in known else set()
        shared = {other: sorted(tags.intersection(entry.tags)) for other, entry in known.items()}
        order = sorted(shared, key=lambda other: (-len(shared[other]), other))
        close = [other for other in order if shared[other] and other != name]
        return {
            other: f"both are about {' and '.join(shared[other])}"
            for other in close[:MAX_ALTERNATIVES]
        }

    def _names_by_registry(self) -> dict[str, Collection[str]]:
        found: dict[str, Collection[str]] = {}
        for registry in self._project.registries:
            with contextlib.suppress(RegistryError):
                found[registry] = {*self._open_registry(registry).names()}
        return found

    def _hint_at_known(self, name: str) -> str | None:
        """Return where a name without releases is known, or which one may be meant."""
        bound = self._project.registry_of(name)
        known = self._names_by_registry()
        if name in known.get(bound, ()):
            return "its catalogue lists that name, but has no index of releases for it: try later"
        for registry, names in known.items():
            if name in names:
                return (
                    f"registry {registry!r} has it: `composable add {name} --registry {registry}`"
                )
        return did_you_mean(name, {other for names in known.values() for other in names})

    def prefetch_releases(self, names: Iterable[str]) -> None:
        """Read the remote indexes of packages and of their dependencies concurrently.

        The resolver reads one index at a time, and each costs a round trip to the registry. Only
        the dependencies of the newest releases are followed. Indexes that cannot be read are
        not requested again; their errors are raised if the resolver needs one of them.
        """
        names = sorted({name for name in names if self._is_remote(name)} - self._releases.keys())
        while names:
            found = run_concurrently([partial(self._try_to_read_releases, name) for name in names])
            read = {n: releases for n, releases in zip(names, found, strict=True) if releases}
            self._releases.update(read)
            newest = (max(releases, key=lambda r: r.version) for releases in read.values())
            needed = {other for release in newest for other in release.requires}
            names = sorted(filter(self._is_remote, needed - self._releases.keys() - {*names}))

    def _is_remote(self, name: str) -> bool:
        with contextlib.suppress(PackagingError):
            origin = self._open_origin(name)
            return isinstance(origin, Registry) and origin.storage.is_remote
        return False

    def _try_to_read_releases(self, name: str) -> tuple[Release, ...] | None:
        try:
            return self._read_releases(name)
        except PackagingError as error:
            self._failures[name] = error
            return None

    def _read_releases(self, name: str) -> tuple[Release, ...]:
        origin = self._open_origin(name)
        if isinstance(origin, Path):
            return (Release.of(pack_named(origin, name, self._interface), ""),)
        return origin.versions(name)

    def _open_origin(self, name: str) -> Path | Registry:
        """Return the folder or the registry that a package comes from."""
        return self._project.folder_of(name) or self._open_registry(self._project.registry_of(name))

    def locate_registry(self, registry: str) -> str:
        """Return the location of a registry, with the commit that was read if it has commits."""
        return pin(self._project.registries[registry], self._open_registry(registry).commit)

    def _open_registry(self, registry: str) -> Registry:
        if registry not in self._registries:
            self._registries[registry] = self._project.open_registry(registry)
        return self._registries[registry]

    def _to_candidate(self, release: Release) -> Candidate:
        need = release.interface
        refusal, remedy = None, None
        if self._exclude_newer is not None and release.published > self._exclude_newer:
            refusal = f"was published at {release.published}, after {self._exclude_newer}"
        elif (
            self._interface is not None
            and need.name == self._interface.name
            and need.requires.contains(Version(self._interface.version))
            and not self._interface.honours_digest(need.digest or "")
        ):
            refusal = (
                f"was trained against router interface {shorten_digest(need.digest)}, which "
                f"{self._interface.name} {self._interface.version} does not honour"
            )
        elif refused := self._project.policy.find_refusal(self.find_license(release)):
            refusal, remedy = refused
        return Candidate(
            version=release.version,
            requires=release.requires,
            extras=release.extras,
            conflicts=release.conflicts,
            interface=(need.name, need.requires),
            is_yanked=release.is_yanked,
            refusal=refusal,
            remedy=remedy,
        )


def find_expert(project: Project, name: str) -> tuple[Release, ...]:
    """Return all releases of an expert, oldest first.

    Raises:
        UnknownExpertError: When its registry has none.
    """
    return ProjectSource(project).require_releases(name)


def shorten_digest(digest: str | None) -> str:
    """Return the start of a digest, for messages.

    Example:
        >>> shorten_digest("sha256:0123456789abcdef0123456789abcdef")
        'sha256:0123456789ab…'
    """
    return f"{digest[:19]}…" if digest else "of unknown digest"
