"""The version bump that a new release needs, from a comparison of two manifests.

A change that can break a dependent is *major*: another interface, other tensors, a removed extra or
capability, a narrower range. A change that only adds something is *minor*. All others are *patch*
changes. Manifests do not record the quality of a release; `vetting/regression.py` compares that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from composable.packaging.manifests.manifest import Manifest
from composable.packaging.registry.release import Release, choose_newest
from composable.packaging.versions.constraint import Constraint, is_within
from composable.packaging.versions.version import Version

Bump = Literal["patch", "minor", "major"]
BUMPS: Final[tuple[Bump, ...]] = ("patch", "minor", "major")


@dataclass(frozen=True)
class Change:
    """One difference between two releases.

    Args:
        needs: The smallest bump that permits it.
        found: A description of the difference.
    """

    needs: Bump
    found: str


@dataclass(frozen=True)
class Step:
    """The step from one release to the next.

    Args:
        old: The version of the older release.
        new: The version of the newer release.
        changes: All differences.
    """

    old: Version
    new: Version
    changes: tuple[Change, ...]

    @property
    def needed(self) -> Bump:
        """The smallest bump that permits all changes."""
        return needed_bump(self.changes)

    @property
    def is_enough(self) -> bool:
        """Whether the new version permits the changes, or is the same and nothing changed."""
        return (self.old == self.new and not self.changes) or is_enough(
            self.old, self.new, self.needed
        )

    @property
    def reasons(self) -> list[str]:
        """Descriptions of the changes that need this bump."""
        return [change.found for change in self.changes if change.needs == self.needed]

    @property
    def version(self) -> Version:
        """The lowest version that permits the changes."""
        return next_version(self.old, self.needed)


def compare_manifests(old: Manifest, new: Manifest) -> list[Change]:
    """Return the differences between two releases that dependents can notice.

    Args:
        old: The older release's manifest, with the interface's digest.
        new: The newer release's manifest, likewise.
    """
    return [
        *_compare_fixed_fields(old, new),
        *_compare_names("provides", old.provides, new.provides),
        *_compare_names("domains", old.domains, new.domains),
        *_compare_names("languages", old.languages, new.languages),
        *_compare_names("extras", old.extras, new.extras),
        *_compare_ranges("requires", old.requires, new.requires, is_provided=True),
        *_compare_ranges("conflicts", old.conflicts, new.conflicts, is_provided=False),
        *(
            change
            for extra in sorted(old.extras.keys() & new.extras.keys())
            for change in _compare_ranges(
                f"extras.{extra}", old.extras[extra], new.extras[extra], is_provided=True
            )
        ),
    ]


def needed_bump(changes: Iterable[Change]) -> Bump:
    """Return the smallest bump that permits all changes.

    Example:
        >>> needed_bump([Change("patch", "body.dtype"), Change("minor", "extras: 'code' is new")])
        'minor'
    """
    return max((change.needs for change in changes), key=BUMPS.index, default="patch")


def bump_between(old: Version, new: Version) -> Bump | None:
    """Return the bump between two versions by Cargo's rules; None if `new` is not newer.

    Before 1.0.0, the leftmost nonzero number counts as the major version and the number after it as
    the minor version. Any step from a prerelease is a major bump.

    Example:
        >>> bump_between(Version("1.2.0"), Version("1.3.0"))
        'minor'
        >>> bump_between(Version("0.2.0"), Version("0.3.0"))
        'major'
    """
    if new <= old:
        return None
    if old.is_prerelease or old.major != new.major:
        return "major"
    if old.minor != new.minor:
        return "minor" if old.major else "major"
    if old.major:
        return "patch"
    return "minor" if old.minor else "major"


def is_enough(old: Version, new: Version, needed: Bump) -> bool:
    """Return whether the bump from `old` to `new` is at least `needed`."""
    bump = bump_between(old, new)
    return bump is not None and BUMPS.index(bump) >= BUMPS.index(needed)


def next_version(old: Version, needed: Bump) -> Version:
    """Return the lowest version after `old` whose bump is at least `needed`.

    Example:
        >>> str(next_version(Version("1.2.3"), "minor"))
        '1.3.0'
    """
    major, minor, patch = old.release
    candidates = (
        f"{major}.{minor}.{patch}",
        f"{major}.{minor}.{patch + 1}",
        f"{major}.{minor + 1}.0",
        f"{major + 1}.0.0",
    )
    return next(v for v in map(Version, candidates) if is_enough(old, v, needed))


def choose_previous(
    releases: Iterable[Release], version: Version, *, or_same: bool = False
) -> Release | None:
    """Return the newest release before a version that is not yanked; None if there is none.

    Args:
        releases: Releases of one package.
        version: The version to look before.
        or_same: Whether a release of exactly this version counts too.
    """
    older = [
        release
        for release in releases
        if not release.is_yanked
        and (release.version < version or (or_same and release.version == version))
    ]
    return choose_newest(older) if older else None


def _compare_fixed_fields(old: Manifest, new: Manifest) -> Iterator[Change]:
    """Compare the fields that must be equal for one release to replace another."""
    fixed = {
        "backbone": (old.backbone, new.backbone),
        "interface.name": (old.interface.name, new.interface.name),
        "interface.digest": (old.interface.digest, new.interface.digest),
        "body.kind": (old.body.kind, new.body.kind),
        "body.rank": (old.body.rank, new.body.rank),
        "scout.width": (old.scout_width, new.scout_width),
    }
    for field, (before, after) in fixed.items():
        if before != after:
            yield Change("major", f"{field} was {before}, is {after}")
    if old.body.dtype != new.body.dtype:
        yield Change("patch", f"body.dtype was {old.body.dtype}, is {new.body.dtype}")
    before_range, after_range = old.interface.requires, new.interface.requires
    if not is_within(before_range, after_range):
        yield Change("major", f"interface.requires was {before_range}, is now only {after_range}")
    elif not is_within(after_range, before_range):
        yield Change("minor", f"interface.requires was {before_range}, is {after_range}")


def _compare_names(field: str, old: Iterable[str], new: Iterable[str]) -> Iterator[Change]:
    before, after = set(old), set(new)
    for name in sorted(before - after):
        yield Change("major", f"{field}: {name!r} was removed")
    for name in sorted(after - before):
        yield Change("minor", f"{field}: {name!r} is new")


def _compare_ranges(
    field: str,
    old: Mapping[str, Constraint],
    new: Mapping[str, Constraint],
    *,
    is_provided: bool,
) -> Iterator[Change]:
    """Compare packages with ranges.

    Args:
        field: The field of the manifest, for messages.
        old: The ranges of the older release.
        new: The ranges of the newer release.
        is_provided: Whether the packages are installed along with the expert, so that dependents
            can rely on them; false for conflicts.
    """
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield Change("major" if is_provided else "minor", f"{field}: {name!r} was removed")
        elif name not in old:
            yield Change("minor" if is_provided else "major", f"{field}: {name!r} is new")
        elif old[name] != new[name]:
            is_breaking = not is_provided and not is_within(new[name], old[name])
            found = f"{field}: {name!r} was {old[name]}, is {new[name]}"
            yield Change("major" if is_breaking else "minor", found)
