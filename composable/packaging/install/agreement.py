"""Whether the manifest of an expert agrees with the lock that names it.

A lock is made from what indexes repeat of manifests. The manifests are the truth, so each is held
against the lock, and against the other experts in it, before its expert is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from composable.errors import LockError
from composable.packaging.install.lock import LOCK_FILE, Lock, LockedExpert
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.versions.constraint import Constraint


def check_manifest(manifest: Manifest, expert: LockedExpert, lock: Lock) -> None:
    """Check that a published manifest agrees with the lock.

    Args:
        manifest: The manifest, whose digest is that in the lock.
        expert: Its entry in the lock.
        lock: The lock.

    Raises:
        LockError: When it does not, so that the index from which the lock was made is wrong.
    """
    for difference in find_differences(manifest, expert, lock):
        raise LockError(
            f"the manifest of {expert.name} {expert.version} does not match the registry: "
            f"{difference}",
            where=LOCK_FILE,
            hint=f"{expert.origin} is damaged or malicious; nothing was installed",
        )


def find_differences(manifest: Manifest, expert: LockedExpert, lock: Lock) -> Iterator[str]:
    """Yield what a manifest states otherwise than the lock, or than the index it was made from."""
    if expert.release is not None and (found := expert.release.find_difference(manifest)):
        yield found
    pairs: dict[str, tuple[object, object]] = {
        "name": (expert.name, manifest.name),
        "version": (expert.version, manifest.version),
        "requires": (_to_texts(expert.requires), _to_texts(manifest.requires)),
        "extras": (
            {extra: _to_texts(ranges) for extra, ranges in expert.extras.items()},
            {extra: _to_texts(manifest.extras.get(extra, {})) for extra in expert.extras},
        ),
    }
    if not expert.is_editable:
        pairs["interface.digest"] = (expert.interface, manifest.interface.digest)
        pairs["files"] = (set(expert.files), set(manifest.files))
    if expert.license is not None:
        pairs["license"] = (expert.license, manifest.license)
    for field, (locked, actual) in pairs.items():
        if locked != actual:
            yield f"{field} is {str(locked)[:200]} in the lock, {str(actual)[:200]} in the manifest"
    need, have = manifest.interface, lock.interface
    if have is not None and not (need.name == have.name and need.requires.contains(have.version)):
        yield (
            f"it needs router interface {need.name} {need.requires}, and {have.name} "
            f"{have.version} is locked"
        )
    for other in lock.experts:
        range_ = manifest.conflicts.get(other.name)
        if range_ is not None and range_.contains(other.version):
            yield f"it conflicts with {other.name} {range_}, and {other.version} is locked"


def _to_texts(ranges: Mapping[str, Constraint]) -> dict[str, str]:
    return {name: str(range_) for name, range_ in ranges.items()}
