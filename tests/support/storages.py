"""What holds for a registry in every storage that can be published to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from composable.errors import RegistryError
from composable.interface import RouterInterface
from composable.packaging import (
    Project,
    Registry,
    Requirement,
    Store,
    Version,
    lock_project,
    open_registry,
    sync_project,
)

if TYPE_CHECKING:
    from tests.packaging.conftest import MakeExpert


def check_releases(
    registry: Registry,
    url: str,
    make_expert: MakeExpert,
    interface: RouterInterface,
    store: Store,
    home: Path,
) -> None:
    """Publish, find, yank, lock and install releases of an empty registry; try what is refused."""
    manifest = registry.publish(make_expert(), interface=interface)
    registry.publish(make_expert("german", "1.1.0", seed=1), interface=interface)
    registry.publish(make_expert(), interface=interface)  # again: changes nothing
    remote = open_registry(url)
    assert remote.names() == ["german"]
    assert [str(release.version) for release in remote.versions("german")] == ["1.0.0", "1.1.0"]
    assert remote.read_manifest(remote.versions("german")[0]) == manifest
    registry.yank("german", Version("1.1.0"))
    assert [release.is_yanked for release in remote.versions("german")] == [False, True]
    project = Project.create(home / "project", "tiny-bytes", {"cloud": url})
    project = project.add(Requirement.parse("german"))
    lock = lock_project(project, interface)
    assert str(lock.versions["german"]) == "1.0.0"
    sync_project(project, lock, store, interface=interface)
    assert store.verify() == []
    offline = dataclasses.replace(project, is_offline=True)
    assert lock_project(offline, interface, upgrade=True) == lock
    registry.unyank("german", Version("1.1.0"))
    assert [release.is_yanked for release in remote.versions("german")] == [False, False]
    with pytest.raises(RegistryError, match="already published with other content"):
        registry.publish(make_expert(seed=9), interface=interface)
    with pytest.raises(RegistryError, match="looks like 'german'"):
        registry.publish(make_expert("gerrnan"), interface=interface)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder registry, by path, without locks of publishers."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "locks" not in path.parts
    }
