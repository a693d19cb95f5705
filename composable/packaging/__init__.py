"""Experts as packages: versions, manifests, registries, resolving, locking, installing. Never JAX.

Names are imported when they are first used, so that a command that needs one file loads one file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composable.packaging.constraint import Constraint, Requirement
    from composable.packaging.environment import Environment
    from composable.packaging.lock import Lock
    from composable.packaging.locking import lock_project, sync_project
    from composable.packaging.manifest import BackbonePackage, Manifest
    from composable.packaging.project import Project
    from composable.packaging.registry import Registry, open_for_publishing, open_registry
    from composable.packaging.resolver import Resolution, resolve
    from composable.packaging.store import Store
    from composable.packaging.tensors import check_tensors, read_tensors, write_tensors
    from composable.packaging.universe import Universe
    from composable.packaging.version import Version

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
    "constraint": ("Constraint", "Requirement"),
    "environment": ("Environment",),
    "lock": ("Lock",),
    "locking": ("lock_project", "sync_project"),
    "manifest": ("BackbonePackage", "Manifest"),
    "project": ("Project",),
    "registry": ("Registry", "open_for_publishing", "open_registry"),
    "resolver": ("Resolution", "resolve"),
    "store": ("Store",),
    "tensors": ("check_tensors", "read_tensors", "write_tensors"),
    "universe": ("Universe",),
    "version": ("Version",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the file that holds a public name."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
