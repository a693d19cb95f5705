"""Releases that are published as deltas: what moves, what falls back, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from composable.errors import DeltaError, MissingFileError
from composable.files.blobs import blob_path
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
from composable.packaging.install import deltas as deltas_module
from composable.packaging.install.download import download_file
from composable.packaging.install.mirror import Selection, mirror_registry
from composable.packaging.project.export import export_project
from composable.packaging.registry.release import MAX_CHAIN, Release
from tests.packaging.conftest import make_interface
from tests.support.updates import BODY, LARGE, CountedFolder, Family, publish_update


@pytest.fixture
def interface() -> RouterInterface:
    return make_interface(**LARGE)


@pytest.fixture
def family(tmp_path: Path, interface: RouterInterface) -> Family:
    return Family(tmp_path / "experts", interface)


@pytest.fixture
def published(registry: Registry, family: Family, tmp_path: Path) -> Registry:
    family.publish(registry, Store(tmp_path / "publisher"))
    return registry


def body_of(release: Release) -> object:
    return next(file for file in release.files if file.name == BODY)


def install(
    project: Project, wanted: str, store: Store, interface: RouterInterface, source: Registry
) -> Project:
    project = project.add(Requirement.parse(wanted))
    sync_project(project, lock_project(project, interface), store, source=source)
    return project


def read_installed(project: Project) -> bytes:
    return (project.environment.expert_path("german") / BODY).read_bytes()


def counted(registry: Registry) -> tuple[Registry, CountedFolder]:
    folder = CountedFolder(registry.storage.root)  # type: ignore[attr-defined]
    return Registry(folder), folder


def test_only_the_change_is_stored_and_sent(
    published: Registry,
    family: Family,
    project: Project,
    store: Store,
    interface: RouterInterface,
) -> None:
    first, second, third = published.versions("german")
    whole = body_of(first)
    assert not whole.deltas
    assert [published.has_blob(body_of(r).digest) for r in (first, second, third)] == [
        True, False, False,
    ]  # fmt: skip
    assert [len(body_of(r).deltas) for r in (second, third)] == [1, 2]
    assert body_of(second).deltas[0].size < 0.05 * whole.size

    source, folder = counted(published)
    project = install(project, "german@1.1.0", store, interface, source)
    assert read_installed(project) == (family.folders[1] / BODY).read_bytes()
    folder.sent.clear()
    project = install(project, "german@1.2.0", store, interface, source)
    assert read_installed(project) == (family.folders[2] / BODY).read_bytes()
    delta = body_of(third).deltas[0]
    bodies = {path: n for path, n in folder.sent.items() if n > 2000}
    assert bodies == {blob_path(delta.digest): delta.size}, "an update is all that is downloaded"
    assert not project.environment.verify() and not store.verify()


def test_the_release_is_the_same_however_it_is_kept(
    published: Registry, family: Family, tmp_path: Path, interface: RouterInterface
) -> None:
    other = open_for_publishing(tmp_path / "whole")
    for folder, release in zip(family.folders, published.versions("german"), strict=True):
        assert other.publish(folder, interface=interface).digest == release.manifest
    # Publishing the same content again, either way, changes nothing.
    family.publish(published, Store(tmp_path / "again"))
    again = published.publish(family.folders[1], interface=interface)
    assert again.digest == published.versions("german")[1].manifest
    assert published.has_blob(body_of(published.versions("german")[1]).digest), "added whole"


def test_a_client_without_any_of_it_takes_the_file_where_the_registry_has_it(
    published: Registry, family: Family, project: Project, store: Store, interface: RouterInterface
) -> None:
    published.publish(family.folders[2], interface=interface)
    source, folder = counted(published)
    project = install(project, "german@1.2.0", store, interface, source)
    body = body_of(published.versions("german")[2])
    assert folder.sent[blob_path(body.digest)] == body.size
    assert blob_path(body.deltas[0].digest) not in folder.sent
    assert read_installed(project) == (family.folders[2] / BODY).read_bytes()


def test_a_yanked_parent_changes_nothing(
    published: Registry, family: Family, project: Project, store: Store, interface: RouterInterface
) -> None:
    for version in ("1.0.0", "1.1.0"):
        published.yank("german", Version(version))
    project = install(project, "german", store, interface, published)
    assert read_installed(project) == (family.folders[2] / BODY).read_bytes()


def test_a_parent_that_is_gone(
    published: Registry, family: Family, project: Project, store: Store, interface: RouterInterface
) -> None:
    """Nobody removes a file from a plain registry but its operator, by hand."""
    root = body_of(published.versions("german")[0])
    published.storage.remove(blob_path(root.digest))  # type: ignore[attr-defined]
    with pytest.raises(
        DeltaError, match=r"only as a change of another file, which is gone"
    ) as info:
        install(project, "german@1.2.0", store, interface, published)
    assert "composable publish DIR --whole" in str(info.value.hint)
    # What its publisher can do about it.
    published.publish(family.folders[2], interface=interface)
    project = install(project, "german@1.2.0", store, interface, published)
    assert read_installed(project) == (family.folders[2] / BODY).read_bytes()
    # The next release is sent whole where its parent cannot be made.
    published.storage.remove(blob_path(body_of(published.versions("german")[2]).digest))  # type: ignore[attr-defined]
    empty = Store(store.root.parent / "empty")
    _, prepared = publish_update(published, family.folders[1], interface, empty)
    assert not prepared.deltas and "no delta against german@1.0.0" in prepared.reasons[BODY]


@pytest.mark.parametrize("damage", ["base", "delta", "registry"])
def test_what_is_damaged_is_not_used(
    published: Registry,
    family: Family,
    project: Project,
    store: Store,
    interface: RouterInterface,
    damage: str,
) -> None:
    """Of a damaged base or delta in the store, or a delta of other content in the registry."""
    second = published.versions("german")[1]
    delta = body_of(second).deltas[0]
    project = install(project, "german@1.0.0", store, interface, published)
    published.publish(family.folders[1], interface=interface)  # whole as well
    path = store.path(delta.base)
    if damage != "base":
        download_file(published, store, as_file(delta.digest, delta.size), label="delta")
        path = store.path(delta.digest)
    if damage == "registry":
        path.unlink()
        path = published.storage.root / blob_path(delta.digest)  # type: ignore[attr-defined]
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    project = install(project, "german@1.1.0", store, interface, published)
    assert read_installed(project) == (family.folders[1] / BODY).read_bytes()
    assert store.verify() == []


def as_file(digest: str, size: int) -> object:
    from composable.packaging.manifests.manifest import PackageFile

    return PackageFile(name="x", size=size, digest=digest)


def test_chains_are_cut(
    registry: Registry, tmp_path: Path, interface: RouterInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas_module, "MAX_CHAIN", 3)
    family = Family(tmp_path / "experts", interface, 9)
    family.publish(registry, Store(tmp_path / "publisher"))
    bodies = [body_of(release) for release in registry.versions("german")]
    assert [len(body.deltas) for body in bodies] == [0, 1, 2, 3, 1, 1, 2, 3, 1]
    assert [registry.has_blob(body.digest) for body in bodies] == [
        True, False, False, False, True, False, False, False, True,
    ]  # fmt: skip
    for folder, body in zip(family.folders, bodies, strict=True):
        store = Store(tmp_path / "stores" / folder.name)
        download_file(registry, store, body, label="body")
        assert store.path(body.digest).read_bytes() == (folder / BODY).read_bytes()
    assert MAX_CHAIN == 8


def test_chains_are_cut_at_a_size(
    registry: Registry, tmp_path: Path, interface: RouterInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas_module, "_MAX_CHAIN_SHARE", 0.05)
    family = Family(tmp_path / "experts", interface, 4)
    family.publish(registry, Store(tmp_path / "publisher"))
    bodies = [body_of(release) for release in registry.versions("german")]
    assert [registry.has_blob(body.digest) for body in bodies] == [True, False, True, False]


def test_an_expert_may_derive_from_another(
    registry: Registry, family: Family, tmp_path: Path, interface: RouterInterface
) -> None:
    publish_update(registry, family.folders[0], interface, Store(tmp_path / "a"))
    child = family.folders[1]
    text = (child / "expert.toml").read_text().replace('"german"', '"bavarian"')
    derived = text.replace("[interface]", 'derives-from = "german@1.0.0"\n[interface]')
    (child / "expert.toml").write_text(derived)
    _, prepared = publish_update(registry, child, interface, Store(tmp_path / "a"))
    assert prepared.parent == "german@1.0.0" and BODY in prepared.deltas
    # In a registry without the parent, it is whole, and the reason is given.
    other = open_for_publishing(tmp_path / "other")
    _, prepared = publish_update(other, child, interface, Store(tmp_path / "a"))
    assert prepared.reasons[BODY] == f"{other.location} does not have german@1.0.0"
    assert other.has_blob(body_of(other.versions("bavarian")[0]).digest)


@pytest.mark.parametrize("selection", [Selection(), Selection(is_latest=True)])
def test_mirrors_have_all_that_is_needed(
    published: Registry,
    family: Family,
    project: Project,
    store: Store,
    interface: RouterInterface,
    tmp_path: Path,
    selection: Selection,
) -> None:
    """Also one that leaves the parents out."""
    target = open_for_publishing(tmp_path / "mirror")
    mirror_registry(published, target, selection)
    project = install(project, "german@1.2.0", store, interface, target)
    assert read_installed(project) == (family.folders[2] / BODY).read_bytes()
    assert len(target.versions("german")) == (1 if selection.is_latest else 3)
    assert not mirror_registry(published, target, selection, is_checking=True).releases
    # Where the source has the file whole, no other is needed.
    published.publish(family.folders[2], interface=interface)
    whole = open_for_publishing(tmp_path / "whole")
    mirror_registry(published, whole, Selection(is_latest=True))
    (newest,) = whole.versions("german")
    assert whole.has_blob(body_of(newest).digest)
    assert whole.has_blob(body_of(newest).deltas[0].digest), "for clients that have its base"
    assert not whole.has_blob(body_of(newest).deltas[-1].base)


def test_a_mirror_of_what_cannot_be_made(published: Registry, tmp_path: Path) -> None:
    root = body_of(published.versions("german")[0])
    published.storage.remove(blob_path(root.digest))  # type: ignore[attr-defined]
    with pytest.raises(DeltaError, match="which is gone"):
        target = open_for_publishing(tmp_path / "mirror")
        mirror_registry(published, target, Selection(is_latest=True))


def test_an_export_is_whole(
    published: Registry,
    family: Family,
    project: Project,
    store: Store,
    interface: RouterInterface,
    tmp_path: Path,
) -> None:
    project = install(project, "german@1.2.0", store, interface, published)
    lock = lock_project(project, interface)
    for target in (tmp_path / "export", tmp_path / "export.tar"):
        export_project(project, lock, target, interface=interface)
        exported = open_registry(target)
        (release,) = exported.versions("german")
        assert not release.deltas and exported.has_blob(body_of(release).digest)
        with pytest.raises(MissingFileError):
            next(exported.stream("sha256:" + "0" * 64))


def test_an_older_client_is_told_that_the_file_is_not_there(
    published: Registry, store: Store
) -> None:
    """It ignores what it does not know of in the index, and asks for the whole file."""
    body = body_of(published.versions("german")[2])
    with pytest.raises(MissingFileError, match="has no such file"):
        download_file(published, store, dataclasses.replace(body, deltas=()), label="body")


def test_two_installs_at_once(published: Registry, family: Family, tmp_path: Path) -> None:
    body = body_of(published.versions("german")[2])
    store, errors = Store(tmp_path / "store"), []

    def work() -> None:
        try:
            download_file(Registry(published.storage), store, body, label="body")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.read(body.digest) == (family.folders[2] / BODY).read_bytes()
    assert store.verify() == []


SLOW = """
import sys, time
from pathlib import Path
from composable.packaging import Store, open_registry
from composable.packaging.install import download
apply = download.apply_delta
def slowly(*args):
    for number, data in enumerate(apply(*args)):
        yield data
        if number == 2:
            print("midway", flush=True)
            time.sleep(60)
download.apply_delta = slowly
release = open_registry(sys.argv[1]).versions("german")[1]
body = next(f for f in release.files if f.name == "body.safetensors")
download.download_file(open_registry(sys.argv[1]), Store(sys.argv[2]), body, label="body")
"""


def test_a_kill_in_the_middle_of_a_rebuild(
    published: Registry, family: Family, tmp_path: Path
) -> None:
    body, store = body_of(published.versions("german")[1]), Store(tmp_path / "store")
    command = [sys.executable, "-c", textwrap.dedent(SLOW), published.location, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "midway\n"
        process.send_signal(signal.SIGKILL)
    assert not store.has(body.digest) and len(store.partials(body.digest)) == 1
    download_file(published, store, body, label="body")
    assert store.read(body.digest) == (family.folders[1] / BODY).read_bytes()
    assert not store.partials(body.digest)


def test_pruning_keeps_what_is_installed_and_drops_deltas(
    published: Registry, project: Project, store: Store, interface: RouterInterface
) -> None:
    project = install(project, "german@1.2.0", store, interface, published)
    lock = lock_project(project, interface)
    late = time.time() - 7200
    for digest in store.digests():
        os.utime(store.path(digest), (late, late))
    pruned = store.prune(lock.digests())
    body = body_of(published.versions("german")[2])
    assert set(store.digests()) == set(lock.digests())
    assert {delta.digest for delta in body.deltas} <= set(pruned.digests)
    assert not project.environment.verify()


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:" + "1" * 63}, {"size": -1}, {"base": "../x"}, {"base-size": "9"}, {},
    ],
)  # fmt: skip
def test_an_index_with_malformed_deltas_is_refused(
    published: Registry, change: dict[str, object]
) -> None:
    row = published.versions("german")[1].to_row()
    (entry,) = (file for file in row["files"] if "deltas" in file)
    Release.from_row(row, "german")
    entry["deltas"] = [{**entry["deltas"][0], **change}] if change else entry["deltas"] * 9
    with pytest.raises(Exception, match="deltas") as info:
        Release.from_row(row, "german")
    assert type(info.value).__name__ == "RegistryError"
