"""Damage in the store is found, named and mended; pruning spares what is used."""

import pytest

from composable.packaging.install.lock import Lock
from composable.packaging.install.store import Store


@pytest.fixture
def installed(works, project):
    works("install", "german<2")
    return project


def test_verify_finds_nothing_where_nothing_is_wrong(works, installed):
    assert works("verify").out.startswith("no damage found")


def test_verify_names_damage_and_sync_mends_it(cli, works, installed):
    digest = Lock.read(installed)["german"].files[0].digest
    path = Store().path(digest)
    path.chmod(0o644)
    path.write_bytes(b"x" * path.stat().st_size)
    outcome = cli("verify", "--json")
    assert outcome.code == 1
    assert outcome.json["corrupt"] == [digest]
    assert outcome.json["files"] == {digest: "german 1.2.0 body.safetensors"}
    assert [name.rsplit("/", 1)[1] for name in outcome.json["damaged"]] == ["body.safetensors"]
    works("sync")
    assert works("verify").out.startswith("no damage found")


def test_verify_works_outside_a_project(works):
    assert works("verify").out == "no damage found: 0 files in the store\n"


def test_prune_spares_what_is_installed(works, installed):
    before = works("cache", "list", "--json").json
    assert all(file["in_use"] for file in before)
    assert works("cache", "prune", "--older-than", 0).out == "removed 0 files, 0 B\n"
    assert works("cache", "list", "--json").json == before


def test_prune_removes_what_nobody_uses_once_it_is_old_enough(works, installed):
    from composable.interface import digest_bytes

    digest = digest_bytes(b"nobody's")
    Store().add(b"nobody's", digest)
    assert works("cache", "prune", "--json").json["removed"] == []
    assert works("cache", "prune", "--older-than", 0, "--json").json == {
        "removed": [digest],
        "bytes_freed": 8,
    }
    works("sync", "--frozen")


def test_dir_prints_where_the_store_is(works):
    assert works("cache", "dir").out == f"{Store().root}\n"
