"""The gate between an expert's folder and a registry: vetted as it is, or not published. No JAX."""

from __future__ import annotations

from pathlib import Path

from composable.interface import RouterInterface
from composable.packaging.manifest import Manifest
from composable.packaging.registry import Registry
from composable.packaging.storage import Progress
from composable.vetting.card import require_passed


def publish_vetted(
    folder: Path,
    interface: RouterInterface,
    registry: Registry,
    *,
    progress: Progress | None = None,
) -> Manifest:
    """Publish an expert that was vetted and passed.

    Args:
        folder: The expert.
        interface: The router interface that it must fit and must have been vetted against.
        registry: Where to.
        progress: Called with a file's name, bytes done and bytes in all.

    Returns:
        The manifest as published.

    Raises:
        VettingError: If it was not vetted as it is, or failed.
        RegistryError: If the registry refuses it.
    """
    require_passed(folder, interface)
    return registry.publish(folder, interface=interface, progress=progress)
