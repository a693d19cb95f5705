"""Attacks on a signed registry by whoever controls the server that serves it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sqlalchemy import delete

from composable.packaging.registry.index import index_path
from composable.server.database import now
from composable.server.tables import Package, SignedFile
from tests.packaging.conftest import make_interface
from tests.support.registries import Served, run_server
from tests.support.registry_attacks import ATTACKS, Attack, meet_attack
from tests.support.signed_registries import Place, World, build_world


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("signed") / "world", make_interface())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with run_server(tmp_path_factory.mktemp("served") / "registry") as served:
        yield served


def fill(server: Served, tree: Mapping[str, bytes]) -> None:
    """Make the database like a folder: its signatures, and the indexes that are not signed."""
    folders = ("trust/", "statements/", "blobs/")
    with server.services.database.write() as session:
        session.execute(delete(SignedFile))
        session.execute(delete(Package))
        for path, data in tree.items():
            if path.startswith(folders) or path == "config.json":
                session.add(SignedFile(path=path, data=data))
            if path.startswith("index/"):
                name = Path(path).stem
                assert path == index_path(name)
                fields = {"is_private": False, "created": now(), "removal": None, "revision": 0}
                package = Package(name=name, key=name, index=data, index_digest="", **fields)
                package.summary = {}
                session.add(package)


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_server(genuine: World, server: Served, tmp_path: Path, attack: Attack) -> None:
    world = genuine.copy(tmp_path / "world")
    place = Place("server", server.url, lambda tree: fill(server, tree))
    assert meet_attack(world, place, attack) == attack.refused_for


def test_the_server_serves_the_world(genuine: World, server: Served) -> None:
    """What clients refuse above is not refused because nothing is served."""
    place = Place("server", server.url, lambda tree: fill(server, tree))
    registry = genuine.open("visitor", place.open(genuine))
    assert [str(release.version) for release in registry.versions("german")] == ["1.0.0", "1.1.0"]
    assert json.loads(registry.storage.read("config.json").data)["signed"] is True
