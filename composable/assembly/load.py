"""Loads a model by names: resolves, locks, installs and plugs in requirements."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import platformdirs
from jax.sharding import Mesh

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import load_expert
from composable.errors import MissingProjectError, PackagingError
from composable.interface import canonical_json, digest_bytes
from composable.model.model import Model, Pluggable
from composable.packaging.install.environment import Environment
from composable.packaging.project.locking import lock_project
from composable.packaging.project.policy import Policy
from composable.packaging.project.project import Project, Wanted
from composable.packaging.project.sync import sync_project
from composable.packaging.versions.constraint import Requirement
from composable.parallel import make_mesh, parse_mesh

REGISTRY_VARIABLE: Final = "COMPOSABLE_REGISTRY"


def load(
    backbone: str | None = None,
    experts: Sequence[str] | None = None,
    *,
    registry: str | Path | None = None,
    capacity: int | None = None,
    mesh: str | Mesh | None = None,
) -> Model:
    """Return a model: a backbone with experts plugged in.

    Without `experts`, the experts installed in the project of the working directory; outside a
    project, the backbone alone. With them, the newest compatible releases from `registry`, or else
    from the project's registries, or else from the one in COMPOSABLE_REGISTRY; they are installed
    once and reused afterwards. In a project, its policy holds for all of them, as it is now.

    Args:
        backbone: Name of a backbone that ships with composable, or the folder of one; by default
            the project's, which must exist then.
        experts: Requirements such as "python-code>=1.0" or "set-mm"; an empty list gives the
            backbone alone.
        registry: The registry to install from: a folder, an export, or a URL.
        capacity: Entries of the bank; see `Model`.
        mesh: Devices along each axis, such as "data=2,expert=4", or a mesh of `make_mesh`; see
            `Model`.

    Returns:
        The model, by default on the default device.

    Raises:
        TrainingError: If the mesh does not fit the devices.
        MissingProjectError: If no backbone is named outside a project.
        PackagingError: If something does not exist, does not resolve, or is damaged.

    Example:
        >>> model = load("tiny-bytes", experts=[])
        >>> model.names
        ('backbone',)
    """
    loaded, folders = gather(backbone, experts, registry=registry)
    devices = make_mesh(**parse_mesh(mesh)) if isinstance(mesh, str) else mesh
    plugged = [load_expert(loaded, folder) for folder in folders]
    return loaded.plug(plugged, capacity=capacity, mesh=devices)


def gather(
    backbone: str | None = None,
    experts: Sequence[str] | None = None,
    *,
    registry: str | Path | None = None,
) -> tuple[LoadedBackbone, list[Path]]:
    """Return the parts that `load` combines: the backbone, and the folders of installed experts.

    Arguments and errors as for `load`.
    """
    if experts is None and backbone is not None and _find_project() is None:
        experts = []
    if experts is None:
        project = Project.find()
        loaded = load_backbone(backbone or project.backbone)
        environment = sync_project(project, interface=loaded.interface)
        environment.require_intact()
    else:
        loaded = load_backbone(backbone or Project.find().backbone)
        if not experts:
            return loaded, []
        environment = install_experts(
            loaded, [Requirement.parse(text) for text in experts], registry
        )
    return loaded, [environment.expert_path(m.name) for m in environment.manifests()]


def expert(
    requirement: str, *, backbone: str | None = None, registry: str | Path | None = None
) -> Pluggable:
    """Return one expert as flax modules, for use in research code.

    Args:
        requirement: For example "set-mm@1.0.0".
        backbone: Its backbone; by default the project's, or else tiny-bytes.
        registry: As for `load`.

    Returns:
        The expert: `body` and `scout` are flax modules.

    Raises:
        PackagingError: If it does not exist, does not resolve, or is damaged.

    Example:
        With a registry that has the release, `expert("set-mm@1.0.0", registry="registry").scout`
        is a flax module.
    """
    wanted = Requirement.parse(requirement)
    loaded = load_backbone(backbone or default_backbone())
    environment = install_experts(loaded, [wanted], registry)
    return load_expert(loaded, environment.expert_path(wanted.name))


def default_backbone() -> str:
    """Return the backbone of the project of the working directory, or else tiny-bytes."""
    project = _find_project()
    return "tiny-bytes" if project is None else project.backbone


def _find_project() -> Project | None:
    """Return the project of the working directory, or None if there is none."""
    try:
        return Project.find()
    except MissingProjectError:
        return None


def install_experts(
    loaded: LoadedBackbone, wanted: Sequence[Requirement], registry: str | Path | None
) -> Environment:
    """Resolve and install requirements into an environment of their own, in the user's cache.

    Args:
        loaded: The backbone that they plug into.
        wanted: The requirements.
        registry: The registry to install from, as for `load`.

    Raises:
        PackagingError: If something does not exist, does not resolve, or is damaged.
    """
    source = find_registries(registry)
    experts = {}
    for requirement in wanted:
        known = source.experts.get(requirement.name, Wanted())
        experts[requirement.name] = dataclasses.replace(
            known,
            constraint=requirement.constraint,
            extras=requirement.extras or known.extras,
        )
    identity = {
        "interface": loaded.interface.digest,
        "experts": {name: dataclasses.astuple(want)[1:] for name, want in experts.items()},
        "ranges": {name: str(want.constraint) for name, want in experts.items()},
        "registries": dict(source.registries),
    }
    key = digest_bytes(canonical_json(identity)).removeprefix("sha256:")[:16]
    cache = Path(platformdirs.user_cache_dir("composable", appauthor=False))
    project = dataclasses.replace(
        source,
        root=cache / "environments" / key,
        backbone=str(loaded.folder),
        experts=experts,
    )
    lock = lock_project(project, loaded.interface, upgrade=True)
    environment = sync_project(project, lock, interface=loaded.interface)
    if environment.verify():  # has removed damaged files
        environment = sync_project(project, lock, interface=loaded.interface)
    return environment


def find_registries(registry: str | Path | None) -> Project:
    """Return the registries to install from, as a project whose locations are absolute.

    Args:
        registry: A registry; by default the project's, or else that of COMPOSABLE_REGISTRY.

    Raises:
        PackagingError: If there is none.
    """
    location = registry or os.environ.get(REGISTRY_VARIABLE)
    project = _find_project()
    if registry is None and project is not None:
        experts = {
            name: dataclasses.replace(want, path=str(project.folder_of(name)))
            if want.path
            else want
            for name, want in project.experts.items()
        }
        places = {n: _anchor(place, project.root) for n, place in project.registries.items()}
        return dataclasses.replace(project, registries=places, experts=experts)
    if location is None:
        raise PackagingError(
            "no registry to install experts from",
            hint=f"give registry=LOCATION, set {REGISTRY_VARIABLE}, or work inside a project",
        )
    places = {"default": _anchor(str(location), Path.cwd())}
    # What a project refuses, it refuses wherever it comes from.
    policy = Policy() if project is None else project.policy
    return Project(
        root=Path.cwd(),
        backbone="",
        registries=places,
        default_registry="default",
        policy=policy,
    )


def _anchor(location: str, root: Path) -> str:
    """Return a location with an absolute path, unless it is a URL."""
    return location if "://" in location else str((root / Path(location).expanduser()).resolve())
