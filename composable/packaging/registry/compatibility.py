"""Which version bump a change needs: what a new release gives and asks for, against an older one.

Less of anything is a *major* change, for a dependent may rely on it: another interface, other
tensors, an extra or a capability that is gone, a narrower range. More, and nothing less, is a
*minor* one. All else is a *patch*. How well a release does its work is not in its manifest; that is
`vetting/regression.py`.
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
        needs: The smallest bump that may bring it.
        found: What differs, in words.
    """

    needs: Bump
    found: str


@dataclass(frozen=True)
class Step:
    """The step from one release to the next.

    Args:
        old: The older version.
        new: The version that is to come after it.
        changes: All that differs.
    """

    old: Version
    new: Version
    changes: tuple[Change, ...]

    @property
    def needed(self) -> Bump:
        """The smallest bump that may bring all changes."""
        return needed_bump(self.changes)

    @property
    def is_enough(self) -> bool:
        """Whether the new version is at least that bump, or nothing changed at all."""
        return (self.old == self.new and not self.changes) or is_enough(
            self.old, self.new, self.needed
        )

    @property
    def reasons(self) -> list[str]:
        """What asks for the bump that is needed, in words."""
        return [change.found for change in self.changes if change.needs == self.needed]

    @property
    def version(self) -> Version:
        """The lowest version that may bring the changes."""
        return next_version(self.old, self.needed)


def compare_manifests(old: Manifest, new: Manifest) -> list[Change]:
    """Return what a new release changes of what an older one gives and asks for.

    Args:
        old: The older release's manifest, with the interface's digest.
        new: The new one's, likewise.
    """
    return [
        *_compare_fits(old, new),
        *_compare_names("provides", old.provides, new.provides),
        *_compare_names("domains", old.domains, new.domains),
        *_compare_names("languages", old.languages, new.languages),
        *_compare_names("extras", old.extras, new.extras),
        *_compare_ranges("requires", old.requires, new.requires, is_gift=True),
        *_compare_ranges("conflicts", old.conflicts, new.conflicts, is_gift=False),
        *(
            change
            for extra in sorted(old.extras.keys() & new.extras.keys())
            for change in _compare_ranges(
                f"extras.{extra}", old.extras[extra], new.extras[extra], is_gift=True
            )
        ),
    ]


def needed_bump(changes: Iterable[Change]) -> Bump:
    """Return the smallest bump that may bring all of some changes."""
    return max((change.needs for change in changes), key=BUMPS.index, default="patch")


def bump_between(old: Version, new: Version) -> Bump | None:
    """Return the bump from one version to another, as Cargo counts; None if it is not newer.

    Before 1.0.0 the leftmost number that is not zero takes the part of the major version, and
    whatever comes after it may bring more. A prerelease has promised nothing.
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
    """Say whether the bump from `old` to `new` may bring what needs `needed`."""
    bump = bump_between(old, new)
    return bump is not None and BUMPS.index(bump) >= BUMPS.index(needed)


def next_version(old: Version, needed: Bump) -> Version:
    """Return the lowest version after `old` that may bring what needs `needed`."""
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
    """Return the newest release before a version that was not yanked, if there is one.

    Args:
        releases: Of one package.
        version: The version that is to come after it.
        or_same: Whether the release of that very version will do, too.
    """
    older = [
        release
        for release in releases
        if not release.is_yanked
        and (release.version < version or (or_same and release.version == version))
    ]
    return choose_newest(older) if older else None


def _compare_fits(old: Manifest, new: Manifest) -> Iterator[Change]:
    """Compare what must be the same for one release to take another's place."""
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
        yield Change("major", f"interface.requires was {before_range}, is only {after_range}")
    elif not is_within(after_range, before_range):
        yield Change("minor", f"interface.requires was {before_range}, is {after_range}")


def _compare_names(field: str, old: Iterable[str], new: Iterable[str]) -> Iterator[Change]:
    before, after = set(old), set(new)
    for name in sorted(before - after):
        yield Change("major", f"{field}: {name!r} is gone")
    for name in sorted(after - before):
        yield Change("minor", f"{field}: {name!r} is new")


def _compare_ranges(
    field: str,
    old: Mapping[str, Constraint],
    new: Mapping[str, Constraint],
    *,
    is_gift: bool,
) -> Iterator[Change]:
    """Compare packages with ranges: those that come along, or those that must stay away."""
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield Change("major" if is_gift else "minor", f"{field}: {name!r} is gone")
        elif name not in old:
            yield Change("minor" if is_gift else "major", f"{field}: {name!r} is new")
        elif old[name] != new[name]:
            is_less = not is_gift and not is_within(new[name], old[name])
            found = f"{field}: {name!r} was {old[name]}, is {new[name]}"
            yield Change("major" if is_less else "minor", found)
