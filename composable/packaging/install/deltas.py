"""Prepare what publishing sends in place of whole files: deltas against a release of the registry.

A delta is sent where it is clearly smaller than its file, and where the registry has the file that
it starts from, or makes it from others. The chain of deltas that a client may have to apply is
bounded in length and in size: where it would be longer, the file is sent whole as well. Where no
delta is sent, the reason is reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from composable.errors import ConstraintError, PackagingError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.files.delta import Factors, write_delta
from composable.packaging.install.download import download_file
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import Delta, Manifest, PackageFile
from composable.packaging.manifests.packing import REQUIRED_FILES
from composable.packaging.registry.compatibility import choose_previous
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import (
    MAX_CHAIN,
    MIN_DELTA_BYTES,
    PreparedDelta,
    Release,
)
from composable.packaging.versions.constraint import Requirement
from composable.progress import ByteProgress

# A delta that is hardly smaller than its file is not worth the time to apply it.
_MAX_DELTA_SHARE: Final = 0.9
# What a client without any of the files downloads on top of a base.
_MAX_CHAIN_SHARE: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class PreparedDeltas:
    """What a release is published with.

    Args:
        deltas: The deltas, by name of the file that they make.
        reasons: Why a file has none, by its name.
        parent: The release that they start from, as `NAME@VERSION`; None without one.
    """

    deltas: Mapping[str, PreparedDelta] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None


@contextlib.contextmanager
def prepare_deltas(
    registry: Registry,
    folder: Path,
    manifest: Manifest,
    store: Store,
    *,
    factors: Mapping[str, Factors] | None = None,
    is_proposal: bool = False,
    progress: ByteProgress | None = None,
) -> Iterator[PreparedDeltas]:
    """Write deltas of an expert's tensor files into a scratch folder, for the time of a block.

    They start from the release that the expert derives from, if the registry has it, and else from
    the previous release. What of that is not in the store is downloaded.

    Args:
        registry: Where the expert is published.
        folder: The expert.
        manifest: Its packed manifest.
        store: Where the files of the parent are kept.
        factors: Factors of updates, by name of the file; see `write_delta`.
        is_proposal: Whether they go to the inbox, where none is part of a chain.
        progress: Called with a label, bytes done and total bytes.
    """
    large = {
        file.name: file
        for file in manifest.files
        if file.name in REQUIRED_FILES and file.size >= MIN_DELTA_BYTES
    }
    parent = find_parent_release(registry, manifest) if large else None
    if parent is None:
        wanted = manifest.derives_from or f"an earlier release of {manifest.name}"
        reason = f"{registry.location} does not have {wanted}"
        yield PreparedDeltas(reasons=dict.fromkeys(large, reason))
        return
    release = f"{parent.name}@{parent.version}"
    scratch = atomic.make_scratch_directory(store.root)
    deltas: dict[str, PreparedDelta] = {}
    reasons: dict[str, str] = {}
    try:
        for name, file in large.items():
            base = next((found for found in parent.files if found.name == name), None)
            if base is None:
                reasons[name] = f"{release} does not have the file"
                continue
            label = f"{parent.name} {parent.version} {name}"
            try:
                download_file(registry, store, base, label=label, progress=progress)
                job = _Job(registry, store, folder / name, scratch / f"{name}.delta", file, base)
                prepare = job.prepare_alone if is_proposal else job.prepare
                deltas[name] = prepare((factors or {}).get(name))
            except PackagingError as error:
                reasons[name] = f"no delta against {release}: {error.message}"
        yield PreparedDeltas(deltas=deltas, reasons=reasons, parent=release)
    finally:
        atomic.remove_directory(scratch)


def find_parent_release(registry: Registry, manifest: Manifest) -> Release | None:
    """Return the release of a registry that an expert's deltas start from; None without one.

    Raises:
        RegistryError: When the registry cannot be read.
    """
    if not registry.exists:
        return None
    if manifest.derives_from is not None:
        with contextlib.suppress(ConstraintError):
            origin = Requirement.parse(manifest.derives_from)
            for release in registry.versions(origin.name):
                if release.version == origin.constraint.pinned:
                    return release
    return choose_previous(registry.versions(manifest.name), manifest.version)


@dataclass(frozen=True)
class _Job:
    """One delta to prepare: of a file at `source`, written to `path`."""

    registry: Registry
    store: Store
    source: Path
    path: Path
    file: PackageFile
    base: PackageFile

    def prepare(self, factors: Factors | None) -> PreparedDelta:
        """Return the delta.

        Raises:
            PackagingError: When there is none, or it is not worth sending.
        """
        if self.file.digest == self.base.digest:
            return self._reuse()
        has_base = self.registry.has_blob(self.base.digest)
        chain = (self._write(factors), *(() if has_base else self.base.deltas))
        return self._chain(chain, self.path)

    def prepare_alone(self, factors: Factors | None) -> PreparedDelta:
        """Return the delta, also of an unchanged file, and none of those that make its base.

        Raises:
            PackagingError: When it is not worth sending.
        """
        delta = self._write(factors)
        return PreparedDelta(
            path=self.path, target=self.file.digest, chain=(delta,), is_whole_needed=False
        )

    def _write(self, factors: Factors | None) -> Delta:
        """Write a delta from the parent's file; errors as for `prepare_alone`."""
        base = self.store.path(self.base.digest)
        size = write_delta(self.path, base, self.source, factors).size
        if size > _MAX_DELTA_SHARE * self.file.size:
            raise PackagingError(
                f"it would have {size:,} bytes, {size / self.file.size:.0%} of the file"
            )
        return Delta(
            digest=digest_file(self.path), size=size, base=self.base.digest,
            base_size=self.base.size,
        )  # fmt: skip

    def _reuse(self) -> PreparedDelta:
        """Return the delta that makes the same file of the parent."""
        if not self.base.deltas or self.registry.has_blob(self.base.digest):
            raise PackagingError("the file is the same, and the registry has it")
        first = self.base.deltas[0]
        found = PackageFile(name=self.file.name, size=first.size, digest=first.digest)
        download_file(self.registry, self.store, found, label=f"{self.file.name} (delta)")
        return self._chain(self.base.deltas, self.store.path(first.digest))

    def _chain(self, chain: tuple[Delta, ...], path: Path) -> PreparedDelta:
        """Return a delta, cut off from those before it where these are too many or too large."""
        is_long = len(chain) > MAX_CHAIN
        is_large = sum(delta.size for delta in chain) > _MAX_CHAIN_SHARE * self.file.size
        is_cut = len(chain) > 1 and (is_long or is_large)
        return PreparedDelta(
            path=path,
            target=self.file.digest,
            chain=chain[:1] if is_cut else chain,
            is_whole_needed=is_cut,
        )
