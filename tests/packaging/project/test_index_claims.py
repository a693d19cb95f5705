"""What an index repeats of a manifest is held against the manifest before it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composable.errors import LockError, ManifestError, ResolutionError
from composable.interface import RouterInterface
from composable.packaging import (
    Lock,
    Project,
    Registry,
    Requirement,
    Store,
    lock_project,
    sync_project,
)
from composable.packaging.registry.index import index_path
from composable.packaging.registry.lines import format_line

MakeExpert = Callable[..., Path]
EXTRA = '[extras.medicine]\nfrench = "^1"\n[conflicts]\ndutch = "*"\n'


@pytest.fixture
def world(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface, project: Project
) -> Project:
    for name in ("french", "dutch"):
        registry.publish(make_expert(name), interface=interface)
    folder = make_expert("german", requires={"french": "^1"}, extra=EXTRA)
    text = (folder / "expert.toml").read_text()
    head = 'description = "News"\ndomains = ["news"]\nbackbone ='
    (folder / "expert.toml").write_text(text.replace("backbone =", head))
    registry.publish(folder, interface=interface)
    return project.add(Requirement.parse("german"))


def rewrite(registry: Registry, **fields: Any) -> None:
    """Write the index line of german with other fields, checksum and all."""
    path = registry.storage.root / index_path("german")  # type: ignore[attr-defined]
    row = json.loads(path.read_text())
    del row["check"]
    interface = {**row["interface"], **fields.pop("interface", {})}
    path.write_bytes(format_line({**row, "interface": interface, **fields}) + b"\n")


def test_the_honest_index_installs(
    world: Project, interface: RouterInterface, store: Store, registry: Registry
) -> None:
    rewrite(registry)
    sync_project(world, lock_project(world, interface), store, interface=interface)


@pytest.mark.parametrize(
    "fields",
    [
        {"conflicts": {}}, {"conflicts": {"dutch": "<1"}}, {"conflicts": {"german-law": "*"}},
        {"requires": {}}, {"requires": {"french": "*"}}, {"interface": {"requires": "*"}},
        {"interface": {"requires": ">=1.1"}}, {"extras": {}}, {"extras": {"law": {"french": "*"}}},
        {"description": "Better news"}, {"description": ""}, {"tags": []}, {"tags": ["law"]},
        {"version": "1.0.1"}, {"version": "1.0.0+build"}, {"files": []},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_an_index_repeats_wrongly_is_not_installed(
    world: Project,
    interface: RouterInterface,
    store: Store,
    registry: Registry,
    fields: dict[str, Any],
) -> None:
    rewrite(registry, **fields)
    lock = lock_project(world, interface)
    with pytest.raises(LockError, match=r"manifest of german .* does not match the registry"):
        sync_project(world, lock, store, interface=interface)
    assert world.environment.current is None
    with pytest.raises(ManifestError, match="does not match the index"):
        registry.read_manifest(registry.versions("german")[0])


def test_a_lock_from_a_file_is_held_against_manifests(
    world: Project, interface: RouterInterface, store: Store, registry: Registry
) -> None:
    """What a lock was made from is forgotten; that it breaks a manifest's conditions is not."""
    world = world.add(Requirement.parse("dutch"))
    with pytest.raises(ResolutionError):
        lock_project(world, interface)
    rewrite(registry, conflicts={})
    lock_project(world, interface)
    lock = Lock.read(world.root)
    for _ in range(2):  # the second time, all files are in the store
        with pytest.raises(LockError, match=r"conflicts with dutch \*, and 1.0.0 is locked"):
            sync_project(world, lock, store, interface=interface)
    assert world.environment.current is None


def test_an_interface_range_that_was_widened(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    project: Project,
    store: Store,
) -> None:
    folder = make_expert(needs="^2")
    text = (folder / "expert.toml").read_text()
    digest = f'requires = "^2"\ndigest = "{interface.digest}"'
    (folder / "expert.toml").write_text(text.replace('requires = "^2"', digest))
    registry.publish(folder)
    project = project.add(Requirement.parse("german"))
    with pytest.raises(ResolutionError):
        lock_project(project, interface)
    rewrite(registry, interface={"requires": "*"})
    lock_project(project, interface)
    with pytest.raises(LockError, match=r"needs router interface tiny-bytes \^2"):
        sync_project(project, Lock.read(project.root), store, interface=interface)


def test_an_editable_expert_that_now_conflicts(
    world: Project, make_expert: MakeExpert, interface: RouterInterface, store: Store
) -> None:
    folder = make_expert("danish")
    world = world.add(Requirement.parse("danish"), path=str(folder), is_editable=True)
    lock = lock_project(world, interface)
    sync_project(world, lock, store, interface=interface)
    with (folder / "expert.toml").open("a") as file:
        file.write('[conflicts]\ngerman = "^1"\n')
    with pytest.raises(LockError, match=r"danish in .* has changed"):
        sync_project(world, lock, store, interface=interface)
