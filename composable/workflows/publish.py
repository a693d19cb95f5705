"""Publish the expert of a folder to a registry, without JAX.

An expert is published as it was vetted, described in its author's words, under a version that
reflects what changed. Nothing is measured here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from composable.errors import ManifestError, PackagingError, VettingError
from composable.interface import RouterInterface
from composable.packaging.install.deltas import prepare_deltas
from composable.packaging.install.store import Store
from composable.packaging.manifests.licenses import parse_license
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.packing import fit_interface, pack_expert
from composable.packaging.manifests.template import find_template
from composable.packaging.registry.compatibility import (
    Change,
    Step,
    choose_previous,
    compare_manifests,
)
from composable.packaging.registry.registry import Registry
from composable.progress import ByteProgress
from composable.vetting.card import Card, find_regressions, require_passed
from composable.workflows.updates import read_factors


@dataclass(frozen=True)
class Published:
    """A release, and what was sent of it.

    Args:
        manifest: The manifest.
        parent: The release that deltas start from, as `NAME@VERSION`; None without one.
        deltas: Bytes of the deltas that were sent, by the name of the file.
        whole: Why a tensor file was sent whole, by its name.
    """

    manifest: Manifest
    parent: str | None = None
    deltas: Mapping[str, int] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)


def publish_expert(
    folder: Path,
    interface: RouterInterface,
    registry: Registry,
    *,
    store: Store | None = None,
    is_whole: bool = False,
    progress: ByteProgress | None = None,
) -> Published:
    """Publish an expert that passed vetting, if its version reflects what changed.

    Where the registry has the release that it derives from, or its previous one, only what changed
    is sent.

    Args:
        folder: The expert.
        interface: The router interface that it must fit and must have been vetted against.
        registry: Where to publish.
        store: Where the files of the parent are kept; by default the user's store.
        is_whole: Whether to send all files whole.
        progress: Called with a file's name, and the bytes done and in all.

    Returns:
        The manifest, and what was sent.

    Raises:
        VettingError: If it was not vetted in this state, a check failed, or its version is a
            smaller bump than its changes need.
        ManifestError: If the manifest still has a text of the template, or its licence is not an
            SPDX expression.
        RegistryError: If the registry refuses it.
    """
    card = require_passed(folder, interface)
    _require_own_texts(folder)
    _require_license(folder)
    _require_bump(folder, interface, registry, card)
    if is_whole:
        return Published(registry.publish(folder, interface=interface, progress=progress))
    packed = pack_expert(folder, interface=interface)
    factors = read_factors(folder)
    with prepare_deltas(
        registry, folder, packed, store or Store(), factors=factors, progress=progress
    ) as prepared:
        manifest = registry.publish(
            folder, interface=interface, deltas=prepared.deltas, progress=progress
        )
        sizes = {name: delta.file.size for name, delta in prepared.deltas.items()}
        return Published(manifest, prepared.parent, sizes, prepared.reasons)


def _require_own_texts(folder: Path) -> None:
    """Refuse a manifest whose description, licence or data is still that of the template."""
    try:
        template = _list_texts(Manifest.read(find_template()))
    except PackagingError:
        return  # this installation has no template to compare with
    own = _list_texts(Manifest.read(folder))
    left = {field: text for field, text in own.items() if text and text == template[field]}
    if left:
        is_one, fields = len(left) == 1, ", ".join(left)
        raise ManifestError(
            f"{', '.join(map(repr, left.values()))} "
            f"{'is the placeholder' if is_one else 'are placeholders'} of the template",
            where=f"{folder / EXPERT_FILE}: {fields}",
            hint=f"edit {fields} in {folder / EXPERT_FILE}, or remove {'it' if is_one else 'them'}",
        )


def _require_license(folder: Path) -> None:
    """Refuse a licence that is stated and not an SPDX expression."""
    if license_ := Manifest.read(folder).license:
        parse_license(license_, f"{folder / EXPERT_FILE}: expert.license")


def _list_texts(manifest: Manifest) -> dict[str, str]:
    """Return the texts that only an expert's author can write, by field."""
    return {
        "expert.description": manifest.description,
        "expert.license": manifest.license,
        "training.data": manifest.training.data if manifest.training else "",
    }


def _require_bump(folder: Path, interface: RouterInterface, registry: Registry, card: Card) -> None:
    """Refuse a version that is a smaller bump than the changes since the previous release need."""
    manifest = fit_interface(Manifest.read(folder), interface)
    releases = registry.versions(manifest.name) if registry.exists else ()
    previous = choose_previous(releases, manifest.version)
    if previous is None or any(release.version == manifest.version for release in releases):
        return  # the first release; or published already, and the registry refuses other content
    regressions = find_regressions(card, previous.files)
    name, before = manifest.name, previous.version
    changes = compare_manifests(registry.read_manifest(previous), manifest)
    hint = ""
    if regressions is None:
        # Weights that were not compared may be worse in any way.
        changes.append(Change("major", f"its weights were not compared with those of {before}"))
        command = ["composable", "check", str(folder), "--against", f"{name}@{before}"]
        hint = f"run `{shlex.join([*command, '--registry', registry.location])}`; or "
    else:
        changes += [Change("major", found) for found in regressions]
    step = Step(before, manifest.version, tuple(changes))
    if not step.is_enough:
        raise VettingError(
            f"{step.new} is too small a step from {name} {before}, for this is a {step.needed} "
            f"change: {'; '.join(step.reasons)}",
            where=f"{folder / EXPERT_FILE}: expert.version",
            hint=f'{hint}write version = "{step.version}"',
        )
