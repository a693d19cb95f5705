"""The audit of a lock: which locked releases the advisories of their registries affect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from composable.packaging.install.lock import Lock, LockedExpert
from composable.packaging.project.project import Project
from composable.packaging.registry.advisories import Advisory
from composable.packaging.versions.version import Version


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A locked release that an advisory affects.

    Args:
        expert: The release.
        advisory: The advisory.
        registry: The registry of the project that has it.
        fix: The release to use instead: the lowest that is newer than the locked one, or else the
            highest; None if none fixes it.
        is_fix_allowed: Whether the ranges of the project and of all locked experts contain it.
    """

    expert: LockedExpert
    advisory: Advisory
    registry: str
    fix: Version | None
    is_fix_allowed: bool


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the advisories of a project's registries say about its lock.

    Args:
        findings: The affected releases, sorted by name and advisory.
        feeds: Number of advisories of each registry in the lock; None for one without a feed.
        without_registry: Experts that come from folders. Only advisories that name their content
            can affect them.
    """

    findings: tuple[Finding, ...]
    feeds: Mapping[str, int | None]
    without_registry: tuple[str, ...]


def audit_lock(project: Project, lock: Lock) -> Audit:
    """Compare a lock with the advisories of the registries that its experts come from.

    An advisory affects the releases of its own registry by name and version, and any release, from
    wherever it comes, by the digest of its manifest or of a file.

    Args:
        project: The project.
        lock: Its lock.

    Raises:
        RegistryError: When the feed of a registry is damaged.
        UnreachableError: When a registry cannot be read: its experts may be affected or not.
    """
    feeds = {name: project.open_registry(name).advisories() for name in sorted(lock.registries)}
    findings = [
        _describe(project, lock, expert, advisory, registry, advisories or ())
        for expert in lock.experts
        for registry, advisories in feeds.items()
        for advisory in sorted(advisories or (), key=lambda advisory: advisory.id)
        if advisory.affects(
            expert.name if expert.registry == registry else "",
            expert.version,
            expert.digests.values(),
        )
    ]
    return Audit(
        findings=tuple(findings),
        feeds={name: None if found is None else len(found) for name, found in feeds.items()},
        without_registry=tuple(expert.name for expert in lock.experts if expert.registry is None),
    )


def _describe(
    project: Project,
    lock: Lock,
    expert: LockedExpert,
    advisory: Advisory,
    registry: str,
    advisories: Sequence[Advisory],
) -> Finding:
    """Return a finding with the release that fixes it, which no other advisory affects."""
    fixed: list[Version] = []
    if advisory.name == expert.name:  # else it is a copy, which no release of the original replaces
        fixed = [
            version
            for version in sorted(advisory.fixed)
            if not any(other.affects(expert.name, version, ()) for other in advisories)
        ]
    newer = [version for version in fixed if version > expert.version]
    fix = newer[0] if newer else fixed[-1] if fixed else None
    needs = [need for other in lock.experts for need in other.needs]
    ranges = [need.constraint for need in needs if need.name == expert.name]
    if expert.name in project.experts:
        ranges.append(project.experts[expert.name].constraint)
    return Finding(
        expert=expert,
        advisory=advisory,
        registry=registry,
        fix=fix,
        is_fix_allowed=fix is not None and all(range_.contains(fix) for range_ in ranges),
    )
