"""Published experts that a contributor's expert is compared with: peers and previous releases.

They are looked up where a project looks for experts: in registries, or in folders. What can be
measured on a peer depends on its text, which may be private; this file finds the available texts.
Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.assembly.load import find_registries, install_experts
from composable.corpora.documents import read_documents
from composable.corpora.recipe import shipped_folder
from composable.errors import ManifestError, TextError, UnknownExpertError, VettingError
from composable.interface import RouterInterface
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import BODY_FILE, EXPERT_FILE, SCOUT_FILE, Manifest
from composable.packaging.manifests.packing import fit_interface
from composable.packaging.registry.compatibility import (
    Change,
    Step,
    choose_previous,
    compare_manifests,
)
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import Release, choose_newest
from composable.packaging.versions.constraint import Constraint, Requirement
from composable.packaging.versions.version import Version
from composable.vetting.card import tensor_digests
from composable.vetting.checks import Verdict
from composable.vetting.evidence import vetted_texts
from composable.vetting.peers import Peer
from composable.workflows.workspace import HELDOUT_FILE, WORK

# Stands for every expert in the registries that fits the backbone.
ALL: Final = "all"


@dataclass(frozen=True, kw_only=True)
class PreviousRelease:
    """A previous release of an expert.

    Args:
        manifest: Its manifest, with the interface's digest.
        tensors: Digests of its tensor files, by name.
        expert: The expert; None if it does not fit this backbone.
    """

    manifest: Manifest
    tensors: Mapping[str, str]
    expert: Pluggable | None


@dataclass(frozen=True, kw_only=True)
class PeerRelease:
    """A published expert that may not be on this machine yet.

    Args:
        name: Its name.
        release: Its release, `NAME@VERSION`.
        manifest: Digest of its manifest.
        tensors: Digests of its tensor files, by name.
        place: What to load it from: a folder, or `NAME@VERSION` in a registry.
        texts: Text of its domain that it was not trained on, if any is available.
        source: Where that text comes from.
        is_related: As `Peer` has it.
    """

    name: str
    release: str
    manifest: str
    tensors: Mapping[str, str]
    place: str
    texts: tuple[bytes, ...] = ()
    source: str = ""
    is_related: bool = False


def find_peers(
    loaded: LoadedBackbone,
    newcomer: str,
    wanted: Sequence[str],
    texts: Mapping[str, Path],
    *,
    derives_from: str | None = None,
    registry: str | None = None,
) -> list[Peer]:
    """Return published experts, loaded; arguments and errors as for `list_peers`."""
    found = list_peers(
        loaded, newcomer, wanted, texts, derives_from=derives_from, registry=registry
    )
    return [load_peer(loaded, peer, registry=registry) for peer in found]


def list_peers(
    loaded: LoadedBackbone,
    newcomer: str,
    wanted: Sequence[str],
    texts: Mapping[str, Path],
    *,
    derives_from: str | None = None,
    registry: str | None = None,
) -> list[PeerRelease]:
    """Return published experts, with their texts where these are available.

    Args:
        loaded: The backbone.
        newcomer: Name of the expert that will be installed with them.
        wanted: Requirements, folders, or `all`: the newest release of every expert in the
            registries that fits the backbone.
        texts: Held-out text by name of the expert, if it is neither in the expert's own folder nor
            in this installation.
        derives_from: The release that the newcomer derives from, by its manifest.
        registry: Registry to look in; by default as for `load`.

    Raises:
        PackagingError: If one does not exist, does not resolve, or is damaged.
        VettingError: If one of them is the newcomer itself, or a text belongs to none of them.
    """
    peers = []
    for folder, manifest, tensors in _expand(loaded, newcomer, wanted, registry):
        if manifest.name == newcomer:
            raise VettingError(
                f"{newcomer!r} cannot be its own peer",
                where="--beside",
                hint=f"to compare it with a previous release: --against {newcomer}",
            )
        file = texts.get(manifest.name) or _find_text(manifest, folder)
        release = f"{manifest.name}@{manifest.version}"
        peers.append(
            PeerRelease(
                name=manifest.name,
                release=release,
                manifest=manifest.digest,
                tensors=tensors,
                place=release if folder is None else str(folder.absolute()),
                texts=tuple(vetted_texts(read_documents([file]))) if file else (),
                source=str(file or ""),
                is_related=bool(
                    _family(newcomer, derives_from) & _family(manifest.name, manifest.derives_from)
                ),
            )
        )
    for name in texts.keys() - {peer.name for peer in peers}:
        raise VettingError(
            f"text of {name!r} is given, but {name!r} is not one of the peers",
            where="--beside-data",
            hint=f"add --beside {name}",
        )
    return peers


def load_peer(loaded: LoadedBackbone, peer: PeerRelease, *, registry: str | None = None) -> Peer:
    """Return a published expert, installed if it is in a registry, and loaded.

    Args:
        loaded: The backbone.
        peer: What `list_peers` returned.
        registry: Registry to look in; by default as for `load`.

    Raises:
        PackagingError: If it does not resolve any more, or is damaged.
        VettingError: If its tensors are others than when it was listed.
    """
    if is_folder(peer.place):
        folder = Path(peer.place)
    else:
        environment = install_experts(loaded, [Requirement.parse(peer.place)], registry)
        folder = environment.expert_path(peer.name)
    if tensor_digests(folder) != peer.tensors:
        raise VettingError(
            "the tensors changed while the expert was vetted with", where=str(folder)
        )
    return Peer(
        expert=load_expert(loaded, folder),
        release=peer.release,
        texts=peer.texts,
        source=peer.source,
        is_related=peer.is_related,
    )


def find_previous(
    loaded: LoadedBackbone, folder: Path, wanted: str, *, registry: str | None = None
) -> PreviousRelease:
    """Return a previous release of the expert in a folder.

    Args:
        loaded: The backbone.
        folder: The expert.
        wanted: A folder, `NAME@VERSION`, or a range, which stands for the newest release in it up
            to the version of the expert.
        registry: Registry to look in; by default as for `load`.

    Raises:
        UnknownExpertError: If there is no such release.
        VettingError: If it is a release of another expert.
        PackagingError: If it does not resolve, or is damaged.
    """
    new = Manifest.read(folder)
    if is_folder(wanted):
        path = Path(wanted).expanduser()
        manifest = fit_interface(Manifest.read(path), loaded.interface)
        _require_name(manifest.name, new.name)
        return PreviousRelease(
            manifest=manifest, tensors=tensor_digests(path), expert=load_expert(loaded, path)
        )
    requirement = Requirement.parse(wanted)
    _require_name(requirement.name, new.name)
    registries = find_registries(registry)
    source = registries.open_registry(registries.registry_of(new.name))
    release = _choose_release(source, requirement, new.version)
    expert = None
    if _fits(release, loaded.interface):
        exactly = Requirement(new.name, Constraint.exactly(release.version))
        environment = install_experts(loaded, [exactly], registry)
        expert = load_expert(loaded, environment.expert_path(new.name))
    return PreviousRelease(
        manifest=source.read_manifest(release), tensors=_tensors_of(release), expert=expert
    )


def find_parent(
    loaded: LoadedBackbone, manifest: Manifest, *, registry: str | None = None
) -> Pluggable | None:
    """Return the release that an expert derives from, from which its training starts.

    Args:
        loaded: The backbone.
        manifest: The expert's manifest.
        registry: Registry to look in; by default as for `load`.

    Returns:
        The parent; None if the manifest names none.

    Raises:
        PackagingError: If it does not exist, does not fit the backbone, or is damaged.
        ManifestError: If its body or its scout is of another kind or size.
    """
    if manifest.derives_from is None:
        return None
    wanted = Requirement.parse(manifest.derives_from)
    folder = install_experts(loaded, [wanted], registry).expert_path(wanted.name)
    found = Manifest.read(folder)
    kinds = [(m.body.kind, m.body.rank, m.scout_width) for m in (found, manifest)]
    if kinds[0] != kinds[1]:
        theirs, own = (
            f"{kind}{f' of rank {rank}' if rank else ''}, scout {width} wide"
            for kind, rank, width in kinds
        )
        raise ManifestError(
            f"training cannot start from {manifest.derives_from}, which is {theirs}; this is {own}",
            where=f"{EXPERT_FILE}: expert.derives-from",
            hint="give body and scout the same kind and size, or remove derives-from",
        )
    return load_expert(loaded, folder)


def compare_releases(
    folder: Path, interface: RouterInterface, previous: PreviousRelease, verdict: Verdict
) -> Step:
    """Return the step from a previous release to an expert that was vetted against it.

    Args:
        folder: The expert.
        interface: The backbone's contract.
        previous: The previous release.
        verdict: What `check_expert` returned for that release.
    """
    manifest = fit_interface(Manifest.read(folder), interface)
    worse = [Change("major", found) for found in verdict.regressions or ()]
    if previous.tensors != tensor_digests(folder) and not worse:
        worse = [Change("patch", "other weights, nothing on the card worse beyond noise")]
    if verdict.regressions is None:
        worse = [Change("major", "it could not be compared")]
    changes = (*compare_manifests(previous.manifest, manifest), *worse)
    return Step(previous.manifest.version, manifest.version, changes)


def is_folder(text: str) -> bool:
    """Return whether a text names a folder rather than a requirement.

    Args:
        text: What the user wrote.

    Returns:
        Whether it starts with a dot or has a slash or backslash.

    Example:
        >>> is_folder("./german"), is_folder("german@1.0.0")
        (True, False)
    """
    return text.startswith(".") or "/" in text or "\\" in text


def _expand(
    loaded: LoadedBackbone, newcomer: str, wanted: Sequence[str], registry: str | None
) -> Iterator[tuple[Path | None, Manifest, Mapping[str, str]]]:
    """Yield the wanted experts, with every expert that fits in place of `all`.

    Yields:
        The expert's folder, None for a release that is not installed yet; its manifest; and the
        digests of its tensor files by name.
    """
    for text in wanted:
        if text == ALL:
            yield from _list_fitting(loaded.interface, newcomer, registry)
            continue
        if is_folder(text):
            folder = Path(text).expanduser()
        else:
            requirement = Requirement.parse(text)
            folder = install_experts(loaded, [requirement], registry).expert_path(requirement.name)
        yield folder, Manifest.read(folder), tensor_digests(folder)


def _list_fitting(
    interface: RouterInterface, newcomer: str, registry: str | None
) -> Iterator[tuple[None, Manifest, Mapping[str, str]]]:
    """Yield the newest release of every expert in the registries that fits; installs nothing."""
    registries = find_registries(registry)
    for place in registries.registries:
        source = registries.open_registry(place)
        for name in source.names():
            if name == newcomer or registries.registry_of(name) != place:
                continue
            release = find_newest(source, name, interface)
            if release is not None:
                yield None, source.read_manifest(release), _tensors_of(release)


def _tensors_of(release: Release) -> dict[str, str]:
    """Return the digests of a release's tensor files, by name."""
    return {
        file.name: file.digest for file in release.files if file.name in (BODY_FILE, SCOUT_FILE)
    }


def find_newest(source: Registry, name: str, interface: RouterInterface) -> Release | None:
    """Return the newest release of an expert that fits a backbone and is not yanked.

    Args:
        source: The registry.
        name: The expert.
        interface: The backbone's contract.
    """
    fitting = [
        release
        for release in source.versions(name)
        if _fits(release, interface) and not release.is_yanked
    ]
    return choose_newest(fitting) if fitting else None


def _choose_release(source: Registry, wanted: Requirement, version: Version) -> Release:
    """Return the pinned release, or else the newest wanted one up to a version.

    Raises:
        UnknownExpertError: If there is none.
    """
    releases = source.versions(wanted.name)
    fitting = [release for release in releases if wanted.constraint.contains(release.version)]
    chosen = choose_previous(fitting, version, or_same=True)
    if wanted.constraint.pinned is not None:
        chosen = next(iter(fitting), None)
    if chosen is None:
        have = ", ".join(str(release.version) for release in releases)
        raise UnknownExpertError(
            f"there is no release {wanted} up to {version}",
            where=source.location,
            hint=f"there are {have}" if have else "the first release has nothing to compare with",
        )
    return chosen


def _family(name: str, derives_from: str | None) -> set[str]:
    """Return an expert's own name and that of the one it derives from."""
    return {name} if derives_from is None else {name, Requirement.parse(derives_from).name}


def _fits(release: Release, interface: RouterInterface) -> bool:
    """Return whether a release fits the backbone with this interface."""
    need = release.interface
    return (
        need.name == interface.name
        and need.requires.contains(Version(interface.version))
        and need.digest is not None
        and interface.honours_digest(need.digest)
    )


def _require_name(found: str, expected: str) -> None:
    if found != expected:
        raise VettingError(
            f"{found!r} is another expert, not a release of {expected!r}",
            where="--against",
            hint=f"to measure the effect on that one: --beside {found}",
        )


def _find_text(manifest: Manifest, folder: Path | None) -> Path | None:
    """Return the held-out text of an expert, if its folder or this installation has it."""
    places = [] if folder is None else [folder / name / HELDOUT_FILE for name in ("text", WORK)]
    try:
        shipped = shipped_folder(manifest.name)
        if Manifest.read(shipped / EXPERT_FILE).backbone == manifest.backbone:
            places.append(shipped / "text" / HELDOUT_FILE)
    except (TextError, ManifestError):
        pass  # nothing of that name ships with this installation, or it is not an expert
    return next((place for place in places if place.is_file()), None)
