"""Base and sides of a merge, read from their folders; what cannot be merged is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.assembly.load import find_registries
from composable.errors import InterfaceError, MergeError, PackagingError, UnreachableError
from composable.merging.updates import Matrices
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.manifests.packing import fit_interface
from composable.vetting.card import tensor_digests
from composable.workflows.expert_matrices import to_matrices
from composable.workflows.statistics import ExpertStatistics, read_statistics


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side, or the base.

    Args:
        folder: Its folder.
        manifest: Its manifest.
        expert: Body and scout.
        matrices: The same as matrices by name.
        statistics: What it publishes instead of text, if it does.
    """

    folder: Path
    manifest: Manifest
    expert: Pluggable
    matrices: Matrices
    statistics: ExpertStatistics | None

    @property
    def release(self) -> str:
        """Its release, `NAME@VERSION`."""
        return f"{self.manifest.name}@{self.manifest.version}"


def read_sides(
    loaded: LoadedBackbone, base: Path, sides: Sequence[Path]
) -> tuple[Side, list[Side]]:
    """Return base and sides; what cannot be merged is refused with a `MergeError`."""
    if len(sides) < 2:
        raise MergeError(f"{len(sides)} expert to merge, expected two at least")
    manifests = [Manifest.read(folder) for folder in (base, *sides)]
    _require_alike(loaded, manifests)
    digests: dict[str, str] = {}
    for folder, manifest in zip((base, *sides), manifests, strict=True):
        release, key = (
            f"{manifest.name}@{manifest.version}",
            str(sorted(tensor_digests(folder).items())),
        )
        if key in digests:
            raise MergeError(
                f"{release} has the same tensors as {digests[key]}: there is nothing to merge",
                where=str(folder),
                hint="leave one of them out",
            )
        digests[key] = release
    root, *members = [
        Side(
            folder=folder,
            manifest=manifest,
            expert=(expert := load_expert(loaded, folder)),
            matrices=to_matrices(loaded, expert),
            statistics=read_statistics(loaded, folder),
        )
        for folder, manifest in zip((base, *sides), manifests, strict=True)
    ]
    return root, members


def _require_alike(loaded: LoadedBackbone, manifests: Sequence[Manifest]) -> None:
    """Refuse sides of another interface, base, kind or size, before any tensor is read."""
    base, *sides = manifests
    release = f"{base.name}@{base.version}"
    for manifest in manifests:
        side = f"{manifest.name}@{manifest.version}"
        if manifest.interface.name != base.interface.name:
            raise MergeError(
                f"{side} is for router interface {manifest.interface.name}, {release} for "
                f"{base.interface.name}",
                where=f"{side}: interface.name",
                hint="only experts for one backbone can be merged",
            )
        try:
            fit_interface(manifest, loaded.interface)
        except InterfaceError as error:
            raise MergeError(
                f"{side} is for another version of the interface: {error.message}",
                where=f"{side}: {error.where}",
                hint="train it again for this backbone, or merge with the backbone it was made for",
            ) from error
    for manifest in sides:
        side = f"{manifest.name}@{manifest.version}"
        if manifest.derives_from != release:
            found = (
                f"derives from {manifest.derives_from}"
                if manifest.derives_from
                else ("derives from no release")
            )
            raise MergeError(
                f"{side} {found}, expected {release}",
                where=f"{side}: expert.derives-from",
                hint="give as BASE the release that all others derive from",
            )
        if _size(manifest) != _size(base):
            raise MergeError(
                f"{side} has {_size(manifest)}, {release} has {_size(base)}",
                where=f"{side}: body",
                hint="experts with the same kind of body, rank and width of scout can be merged; "
                "`composable train` keeps those of the release in derives-from",
            )
    names = [f"{manifest.name}@{manifest.version}" for manifest in manifests]
    for release in names:
        if names.count(release) > 1:
            raise MergeError(
                f"{release} is given twice, expected different releases",
                where=release,
                hint="a folder that changed a published release needs a version of its own",
            )


def _size(manifest: Manifest) -> str:
    rank = f" of rank {manifest.body.rank}" if manifest.body.rank else ""
    return f"a {manifest.body.kind} body{rank} and a scout {manifest.scout_width} wide"


def refuse_without_evidence(members: Sequence[Side]) -> None:
    """Refuse a merge without text of which a side has published no statistics."""
    lacking = [side for side in members if side.statistics is None]
    raise MergeError(
        f"nothing to choose a method by: no text is given, and no statistics were published by "
        f"{', '.join(side.release for side in lacking)}",
        hint=f"give text, as --data {lacking[0].manifest.name}=FILES, or ask the author to run "
        "`composable check DIR --statistics` before publishing",
    )


def require_published_base(base: Path, registry: str | None = None) -> None:
    """Refuse a folder with other tensors than the release of that name and version.

    Sides name the release that they derive from. Its digests are in the registry, if there is one
    that has it; where there is none, the folder's manifest is all there is to go by.

    Args:
        base: Folder of the base.
        registry: Registry to look in; by default as for `load`.

    Raises:
        MergeError: If the tensors differ.
    """
    manifest = Manifest.read(base)
    try:
        registries = find_registries(registry)
        source = registries.open_registry(registries.registry_of(manifest.name))
        releases = source.versions(manifest.name) if source.exists else ()
    except UnreachableError:
        raise
    except PackagingError:
        return  # no registry, or none that has it
    digests = tensor_digests(base)
    for release in releases:
        published = {file.name: file.digest for file in release.files if file.name in digests}
        if release.version == manifest.version and published != digests:
            raise MergeError(
                f"not the {manifest.name}@{manifest.version} of {source.location}, from which the "
                "sides derive: its tensors have other digests",
                where=str(base),
                hint=f"give {manifest.name}@{manifest.version} as BASE instead of the folder",
            )
