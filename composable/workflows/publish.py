"""Publish the expert of a folder to a registry, without JAX.

An expert is published as it was vetted, described in its author's words, under a version that
reflects what changed. Nothing is measured here.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from composable.errors import ManifestError, PackagingError, VettingError
from composable.interface import RouterInterface
from composable.packaging.manifests.licenses import parse_license
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.packing import fit_interface
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


def publish_expert(
    folder: Path,
    interface: RouterInterface,
    registry: Registry,
    *,
    progress: ByteProgress | None = None,
) -> Manifest:
    """Publish an expert that passed vetting, if its version reflects what changed.

    Args:
        folder: The expert.
        interface: The router interface that it must fit and must have been vetted against.
        registry: Where to publish.
        progress: Called with a file's name, and the bytes done and in all.

    Returns:
        The manifest as published.

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
    return registry.publish(folder, interface=interface, progress=progress)


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
