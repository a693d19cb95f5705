"""Questions about a project: what needs what, why it is there, what is newer, what there is."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from composable.errors import PackagingError, UnknownExpertError, did_you_mean
from composable.packaging.install.lock import Lock
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sources import find_expert
from composable.packaging.registry.index import Entry
from composable.packaging.registry.release import Release, choose_newest
from composable.packaging.versions.constraint import Constraint, Requirement
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

MAX_CARD_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Need:
    """One expert in the tree of what a project needs.

    Args:
        name: The expert.
        version: Its locked version.
        range: What is asked of it here.
        needs: What it needs in turn; empty where they were shown before.
        is_repeated: Whether its needs were shown before.
    """

    name: str
    version: Version
    range: Constraint
    needs: tuple[Need, ...] = ()
    is_repeated: bool = False


@dataclass(frozen=True, kw_only=True)
class Outdated:
    """An expert of which there is a newer release.

    Args:
        name: The expert.
        locked: Its locked version.
        allowed: The newest that fits everything that is asked for: what an upgrade would take.
        newest: The newest that there is.
    """

    name: str
    locked: Version
    allowed: Version
    newest: Version


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a registry knows of one release.

    Args:
        release: The release, from the index.
        manifest: Its manifest.
        card: What was measured of it; empty without a card.
        versions: All releases of the expert, oldest first.
    """

    release: Release
    manifest: Manifest
    card: dict[str, Any]
    versions: tuple[Release, ...]


def grow_tree(project: Project, lock: Lock) -> list[Need]:
    """Return what a project asks for, and what that needs; each expert is opened once."""
    seen: set[str] = set()

    def grow(name: str, range_: Constraint) -> Need:
        expert = lock[name]
        if name in seen and expert.needs:
            return Need(name=name, version=expert.version, range=range_, is_repeated=True)
        seen.add(name)
        needs = tuple(grow(need.name, need.constraint) for need in expert.needs)
        return Need(name=name, version=expert.version, range=range_, needs=needs)

    return [
        grow(name, wanted.constraint)
        for name, wanted in sorted(project.experts.items())
        if name in lock.versions
    ]


def find_reasons(project: Project, lock: Lock, name: str) -> list[list[Requirement]]:
    """Return why an expert is there: for everyone who asks for it, the shortest way to it.

    Returns:
        Chains of requirements; the project asks for the first of each, and each expert for the
        next. The last is the one on `name`.

    Raises:
        PackagingError: When it is not locked.
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
    """Return the locked experts of which there is a newer release, by name."""
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


def search_experts(project: Project, word: str) -> Iterator[tuple[str, Entry]]:
    """Yield registry and catalogue entry of every expert that a word is said of.

    Names, descriptions and tags are searched, letter case aside.
    """
    word = word.casefold()
    for registry in project.registries:
        for entry in project.open_registry(registry).entries():
            if word in " ".join((entry.name, entry.description, *entry.tags)).casefold():
                yield registry, entry


def describe_expert(project: Project, wanted: Requirement) -> Details:
    """Return what the registry knows of the newest release that a requirement allows.

    Raises:
        UnknownExpertError: When there is no such expert, or no such release.
    """
    releases = find_expert(project, wanted.name)
    fitting = [release for release in releases if wanted.constraint.contains(release.version)]
    if not fitting and not wanted.constraint.comparators:
        fitting = list(releases)  # nothing but prereleases, and no range was given
    if not fitting:
        have = ", ".join(str(release.version) for release in releases)
        raise UnknownExpertError(f"no release {wanted}", hint=f"there are {have}")
    release = choose_newest(fitting)
    registry = project.open_registry(project.registry_of(wanted.name))
    manifest = registry.read_manifest(release)
    card: dict[str, Any] = {}
    for file in release.files:
        if file.name == "card.json":
            what = f"{release.name} {release.version} {file.name}"
            data = registry.read_blob(file.digest, what, MAX_CARD_BYTES)
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(data)
                card = found if isinstance(found, dict) else {}
    return Details(release=release, manifest=manifest, card=card, versions=releases)
