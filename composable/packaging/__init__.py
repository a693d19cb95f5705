"""Experts as packages: versions, manifests, registries, resolving, locking, installing. Never JAX.

Names are imported when they are first used, so that a command that needs one file loads one file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composable.files.safetensors import check_tensors, read_tensors, write_tensors
    from composable.packaging.install.environment import Environment
    from composable.packaging.install.lock import Lock
    from composable.packaging.install.store import Store
    from composable.packaging.manifests.manifest import BackbonePackage, Manifest
    from composable.packaging.project.locking import lock_project
    from composable.packaging.project.project import Project
    from composable.packaging.project.sync import sync_project
    from composable.packaging.registry.locations import open_for_publishing, open_registry
    from composable.packaging.registry.registry import Registry
    from composable.packaging.resolution.resolver import Resolution, resolve
    from composable.packaging.resolution.universe import Universe
    from composable.packaging.versions.constraint import Constraint, Requirement
    from composable.packaging.versions.version import Version

__all__ = [
    "BackbonePackage",
    "Constraint",
    "Environment",
    "Lock",
    "Manifest",
    "Project",
    "Registry",
    "Requirement",
    "Resolution",
    "Store",
    "Universe",
    "Version",
    "check_tensors",
    "lock_project",
    "open_for_publishing",
    "open_registry",
    "read_tensors",
    "resolve",
    "sync_project",
    "write_tensors",
]

_HOMES = {
    "files.safetensors": ("check_tensors", "read_tensors", "write_tensors"),
    "packaging.install.environment": ("Environment",),
    "packaging.install.lock": ("Lock",),
    "packaging.install.store": ("Store",),
    "packaging.manifests.manifest": ("BackbonePackage", "Manifest"),
    "packaging.project.locking": ("lock_project",),
    "packaging.project.project": ("Project",),
    "packaging.project.sync": ("sync_project",),
    "packaging.registry.locations": ("open_for_publishing", "open_registry"),
    "packaging.registry.registry": ("Registry",),
    "packaging.resolution.resolver": ("Resolution", "resolve"),
    "packaging.resolution.universe": ("Universe",),
    "packaging.versions.constraint": ("Constraint", "Requirement"),
    "packaging.versions.version": ("Version",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the file that holds a public name."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"composable.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
