"""The policy of a project holds for whatever is loaded in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.assembly.load import find_registries
from composable.errors import RegistryError, ResolutionError
from composable.packaging import Project, Requirement, lock_project
from composable.packaging.project.project import Wanted
from composable.packaging.registry.locations import open_for_publishing
from tests.packaging.conftest import make_interface
from tests.support.signed_registries import World

INTERFACE = make_interface()


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Return a function that resolves german from a registry as `load` does, under a policy."""
    folder = World(tmp_path, INTERFACE).make_expert("german", "1.0.0")
    open_for_publishing(tmp_path / "registry").publish(folder, interface=INTERFACE)
    project = Project.create(tmp_path / "project", "tiny-bytes")
    monkeypatch.chdir(project.root)
    text = project.path.read_text()

    def run(policy: str) -> object:
        project.path.write_text(f"{text}\n[policy]\n{policy}\n")
        source = find_registries(tmp_path / "registry")
        german = Wanted(constraint=Requirement.parse("german").constraint)
        asked = dataclasses.replace(
            source, root=tmp_path / "cache", backbone="tiny-bytes", experts={"german": german}
        )
        return lock_project(asked, INTERFACE, upgrade=True)

    return run


def test_a_policy_holds_for_a_registry_that_is_named(resolve: Callable[[str], object]) -> None:
    resolve('licenses = ["Apache-2.0", "MIT"]')
    with pytest.raises(ResolutionError, match=r"MIT, which \[policy\] in composable.toml"):
        resolve('licenses = ["Apache-2.0"]')
    with pytest.raises(RegistryError, match=r"is unsigned, and \[policy\]"):
        resolve("signed = true")
