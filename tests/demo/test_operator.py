"""The demo's registry is signed, by each contributor with its own key in its confined process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from composable.demo.operator import REGISTRY, confirm_publications, create_registry, keys_of
from composable.demo.properties import show_signatures
from composable.errors import KeyFileError
from composable.interface import RouterInterface
from composable.packaging import Requirement, open_registry
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.packing import fit_interface
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sync import sync_project
from composable.packaging.registry.locations import open_for_publishing
from tests.packaging.conftest import make_interface
from tests.support.signed_registries import World

NAMES = ("german", "french")
CONTRIBUTE = """
import os, sys
from pathlib import Path
from composable.demo.sandbox import python_paths, restrict

folder, registry, others = map(Path, sys.argv[1:])
keys = Path(os.environ["COMPOSABLE_KEYS"])
restrict(read=[*python_paths(), keys], write=[folder, registry])
try:
    (others / f"{others.name}.key").read_bytes()
except PermissionError:
    pass
else:
    sys.exit("could read the key of another contributor")
from composable.packaging.registry.locations import open_for_publishing
open_for_publishing(registry).publish(folder)
"""


@pytest.fixture
def interface() -> RouterInterface:
    return make_interface()


@pytest.fixture
def published(tmp_path: Path, interface: RouterInterface) -> Path:
    """Return the folder of a demo in which two contributors have published."""
    create_registry(tmp_path, NAMES)
    for name, other in zip(NAMES, reversed(NAMES), strict=True):
        folder = make_expert(tmp_path, interface, name, "1.0.0")
        keys = {"COMPOSABLE_KEYS": str(keys_of(tmp_path, name))}
        subprocess.run(
            [
                sys.executable,
                "-c",
                CONTRIBUTE,
                folder,
                tmp_path / REGISTRY,
                keys_of(tmp_path, other),
            ],
            env={**os.environ, **keys, "COMPOSABLE_STORE": str(folder / "store")},
            check=True,
        )
    return tmp_path


def make_expert(home: Path, interface: RouterInterface, name: str, version: str) -> Path:
    folder = World(home, interface).make_expert(name, version)
    manifest = fit_interface(Manifest.read(folder), interface)
    (folder / EXPERT_FILE).write_text(manifest.to_toml())
    return folder


def install(folder: Path, interface: RouterInterface) -> Project:
    root = folder / "project"
    root.mkdir()
    project = Project.create(root, "tiny-bytes", {"demo": "../registry"})
    for name in NAMES:
        project = project.add(Requirement.parse(name))
    sync_project(project, lock_project(project, interface), interface=interface)
    return project


@pytest.mark.slow
def test_every_release_is_signed_and_verified(published: Path, interface: RouterInterface) -> None:
    assert not open_registry(published / REGISTRY).names()  # not confirmed yet
    confirm_publications(published)
    project = install(published, interface)
    passed, found = show_signatures(published, project)
    assert passed and "french 1.0.0, german 1.0.0" in found

    # One contributor cannot publish under the name of another.
    folder = make_expert(published, interface, "german", "1.1.0")
    with pytest.raises(KeyFileError, match="'german'"):
        open_for_publishing(published / REGISTRY, keys=keys_of(published, "french")).publish(folder)

    # Nor is what it signed accepted as that of the other.
    own, other = (keys_of(published, name) for name in NAMES)
    kept = own.rename(published / "kept")
    other.rename(own)
    passed, found = show_signatures(published, project)
    assert not passed and "german is not signed by its contributor" in found
    own.rename(other)
    kept.rename(own)

    file = project.environment.expert_path("german") / "body.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    passed, found = show_signatures(published, project)
    assert not passed and "body.safetensors differs" in found


def test_another_demo_in_the_same_folder_has_new_keys(tmp_path: Path) -> None:
    create_registry(tmp_path, NAMES)
    before = open_registry(tmp_path / REGISTRY).find_signatures()
    assert before is not None
    pinned = before.documents.root_fingerprint
    for folder in (REGISTRY, "keys"):
        (tmp_path / folder).rename(tmp_path / f"old {folder}")
    create_registry(tmp_path, NAMES)
    after = open_registry(tmp_path / REGISTRY).find_signatures()
    assert after is not None and after.documents.root_fingerprint != pinned
