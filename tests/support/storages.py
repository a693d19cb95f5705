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
    open_for_publishing,
    open_registry,
    sync_project,
)
from composable.packaging.install.mirror import mirror_registry
from tests.support.updates import BODY, Family

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


def check_deltas(registry: Registry, url: str, interface: RouterInterface, home: Path) -> None:
    """Publish generations of an expert as deltas, and install each where it is newer or alone."""
    family = Family(home / "experts", interface)
    family.publish(registry, Store(home / "publisher"))
    releases = open_registry(url).versions("german")
    bodies = [next(f for f in release.files if f.name == BODY) for release in releases]
    assert [len(body.deltas) for body in bodies] == [0, 1, 2]
    assert [open_registry(url).has_blob(body.digest) for body in bodies] == [True, False, False]
    for versions in (["1.0.0", "1.2.0"], ["1.2.0"]):
        place = home / "-".join(versions)
        store = Store(place / "store")
        project = Project.create(place / "project", "tiny-bytes", {"cloud": url})
        for version in versions:
            project = project.add(Requirement.parse(f"german@{version}"))
            sync_project(project, lock_project(project, interface), store, interface=interface)
            installed = project.environment.expert_path("german") / BODY
            folder = next(f for f in family.folders if f.name.endswith(version))
            assert installed.read_bytes() == (folder / BODY).read_bytes()
        assert store.verify() == []
    target = open_for_publishing(home / "mirror")
    mirror_registry(open_registry(url), target)
    mirror_registry(target, registry)  # and back, where nothing is new
    assert [release.deltas for release in target.versions("german")] == [
        release.deltas for release in releases
    ]


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder registry, by path, without locks of publishers."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "locks" not in path.parts
    }
