"""Publish the expert of a folder to a registry. Never JAX.

An expert is published as it was vetted, under a version that reflects what changed.
"""

from __future__ import annotations

from pathlib import Path

from composable.errors import VettingError
from composable.interface import RouterInterface
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.packing import fit_interface
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
        progress: Called with a file's name, bytes done and bytes in all.

    Returns:
        The manifest as published.

    Raises:
        VettingError: If it was not vetted in this state, a check failed, or its version is a
            smaller bump than its changes need.
        RegistryError: If the registry refuses it.
    """
    card = require_passed(folder, interface)
    _require_bump(folder, interface, registry, card)
    return registry.publish(folder, interface=interface, progress=progress)


def _require_bump(folder: Path, interface: RouterInterface, registry: Registry, card: Card) -> None:
    """Refuse a version that is a smaller bump than its changes since the release before it need."""
    manifest = fit_interface(Manifest.read(folder), interface)
    releases = registry.versions(manifest.name) if registry.exists else ()
    older = choose_previous(releases, manifest.version)
    if older is None or any(release.version == manifest.version for release in releases):
        return  # the first; or there already, and the registry refuses other content
    regressions = find_regressions(card, older.files)
    name, before = manifest.name, older.version
    changes = compare_manifests(registry.read_manifest(older), manifest)
    hint = ""
    if regressions is None:
        # Other weights that nobody compared may be worse in any way.
        changes.append(Change("major", f"its weights were not compared with those of {before}"))
        hint = f"run: composable check {folder} --against {name}@{before}; or "
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
