"""Read-only queries on a project: its dependency tree, reasons, newer releases, search, details."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from composable.errors import ManifestError, PackagingError, UnknownExpertError, did_you_mean
from composable.files.records import parse_table
from composable.packaging.install.lock import Lock, LockedExpert
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sources import find_expert
from composable.packaging.registry.index import Entry
from composable.packaging.registry.release import Release, Signer, choose_newest
from composable.packaging.versions.constraint import Constraint, Requirement
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

MAX_CARD_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Need:
    """One expert in the dependency tree of a project.

    Args:
        name: The expert.
        version: Its locked version.
        range: The range that its dependent requires here.
        needs: Its own dependencies; empty if they are listed elsewhere in the tree.
        is_repeated: Whether its dependencies are listed elsewhere in the tree.
    """

    name: str
    version: Version
    range: Constraint
    needs: tuple[Need, ...] = ()
    is_repeated: bool = False


@dataclass(frozen=True, kw_only=True)
class Outdated:
    """A locked expert that has a newer release.

    Args:
        name: The expert.
        locked: Its locked version.
        allowed: The version that an upgrade within all requirements would choose.
        newest: The newest version in its registry.
    """

    name: str
    locked: Version
    allowed: Version
    newest: Version


@dataclass(frozen=True, kw_only=True)
class LockChange:
    """An expert that differs between two locks; None where it is not locked.

    Args:
        name: Package name.
        before: What the first lock holds.
        after: What the second holds.
    """

    name: str
    before: LockedExpert | None
    after: LockedExpert | None


@dataclass(frozen=True, kw_only=True)
class Details:
    """One release with its manifest and its card.

    Args:
        release: The release, from the index.
        manifest: Its manifest.
        card: The content of its `card.json`; empty without one.
        versions: All releases of the expert, oldest first.
        signer: Who signed the release; None in an unsigned registry.
    """

    release: Release
    manifest: Manifest
    card: dict[str, Any]
    versions: tuple[Release, ...]
    signer: Signer | None = None


def build_dependency_tree(project: Project, lock: Lock) -> list[Need]:
    """Return the experts that a project requires and their dependencies.

    The dependencies of each expert are listed once, where the expert first occurs.
    """
    seen: set[str] = set()

    def build_node(name: str, range_: Constraint) -> Need:
        expert = lock[name]
        if name in seen and expert.needs:
            return Need(name=name, version=expert.version, range=range_, is_repeated=True)
        seen.add(name)
        needs = tuple(build_node(need.name, need.constraint) for need in expert.needs)
        return Need(name=name, version=expert.version, range=range_, needs=needs)

    return [
        build_node(name, wanted.constraint)
        for name, wanted in sorted(project.experts.items())
        if name in lock.versions
    ]


def find_reasons(project: Project, lock: Lock, name: str) -> list[list[Requirement]]:
    """Return why an expert is installed: for each dependent, the shortest chain from the project.

    Returns:
        Chains of requirements. The first one of a chain is the project's; each of the others is a
        requirement of the expert before it; the last one is on `name`.

    Raises:
        PackagingError: When the expert is not locked.
    """
    if name not in lock.versions:
        raise PackagingError(
            f"{name!r} is not locked",
            where=str(project.lock_path),
            hint=did_you_mean(name, lock.versions),
        )
    shortest: dict[str, list[Requirement]] = {}
    reasons = []
    queue = deque([[requirement] for requirement in project.requirements])
    while queue:
        chain = queue.popleft()
        last = chain[-1].name
        if last == name:
            reasons.append(chain)
        if last in shortest or last not in lock.versions:
            continue
        shortest[last] = chain
        queue.extend([*chain, need] for need in lock[last].needs)
    return reasons


def find_outdated(project: Project, lock: Lock, interface: RouterInterface) -> list[Outdated]:
    """Return the locked experts that have a newer release, sorted by name."""
    allowed = lock_project(project, interface, upgrade=True, is_dry_run=True).versions
    found = []
    for expert in lock.experts:
        if expert.path is not None:
            continue
        newest = choose_newest(find_expert(project, expert.name)).version
        best = allowed.get(expert.name, expert.version)
        if expert.version < max(best, newest):
            found.append(
                Outdated(name=expert.name, locked=expert.version, allowed=best, newest=newest)
            )
    return found


def diff_locks(before: Lock, after: Lock) -> Iterator[LockChange]:
    """Yield the experts that differ between two locks, by name: added, removed, or other content.

    Args:
        before: One lock.
        after: The other.

    Example:
        >>> list(diff_locks(Lock(), Lock()))
        []
    """
    for name in sorted({*before.versions, *after.versions}):
        old = before[name] if name in before else None  # noqa: SIM401 (a lock has no `get`)
        new = after[name] if name in after else None  # noqa: SIM401
        if old is None or new is None or old.digests != new.digests or old.version != new.version:
            yield LockChange(name=name, before=old, after=new)


def search_experts(
    project: Project, word: str, *, only_signed: bool = False
) -> Iterator[tuple[str, Entry]]:
    """Yield the registry and the catalogue entry of every expert that matches a word.

    Names, descriptions and tags are searched, ignoring case.

    Args:
        project: The project whose registries are searched.
        word: The word.
        only_signed: Whether unsigned registries are left out.
    """
    word = word.casefold()
    for registry in project.registries:
        opened = project.open_registry(registry)
        if only_signed and opened.find_signatures() is None:
            continue
        for entry in opened.entries():
            if word in " ".join((entry.name, entry.description, *entry.tags)).casefold():
                yield registry, entry


def describe_expert(project: Project, wanted: Requirement) -> Details:
    """Return the newest release that a requirement allows, with its manifest and card.

    Raises:
        UnknownExpertError: When there is no such expert, or no release in the range.
        SignatureError: When its registry is signed, and the release not by its publisher.
    """
    releases = find_expert(project, wanted.name)
    fitting = [release for release in releases if wanted.constraint.contains(release.version)]
    if not fitting and not wanted.constraint.comparators:
        fitting = list(releases)  # no range was given and all releases are prereleases
    if not fitting:
        have = ", ".join(str(release.version) for release in releases)
        raise UnknownExpertError(f"no release {wanted}", hint=f"available: {have}")
    release = choose_newest(fitting)
    registry = project.open_registry(project.registry_of(wanted.name))
    signer = registry.verify_release(release)
    manifest = registry.read_manifest(release)
    card: dict[str, Any] = {}
    for file in release.files:
        if file.name == "card.json":
            what = f"{release.name} {release.version} {file.name}"
            data = registry.read_blob(file.digest, what, MAX_CARD_BYTES)
            with contextlib.suppress(ManifestError):
                card = parse_table(data, what, ManifestError)
    return Details(release=release, manifest=manifest, card=card, versions=releases, signer=signer)
