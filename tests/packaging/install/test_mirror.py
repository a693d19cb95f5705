"""Mirrors: what is copied, in which order, and what a copy refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from composable.errors import (
    DiskError,
    IntegrityError,
    ManifestError,
    RegistryError,
    UnknownExpertError,
)
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.packaging import (
    Constraint,
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
from composable.packaging.install import download
from composable.packaging.install.mirror import Mirrored, Selection, mirror_registry
from composable.packaging.project.export import export_project
from composable.packaging.registry.advisories import Advisory
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.lines import format_document
from composable.packaging.registry.storage import Folder
from tests.support.servers import run_nginx
from tests.support.signed_registries import build_world, serve_folder, use

if TYPE_CHECKING:
    from tests.packaging.conftest import MakeExpert

SIGNED = (
    "statements/german/1.0.0.json",
    "trust/1.root.json",
    "trust/2.publisher-ann.json",
    "trust/timestamp.json",
)


def all_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "locks" not in path.parts
    }


def selecting(*texts: str, **settings: Any) -> Selection:
    return Selection(requirements=tuple(map(Requirement.parse, texts)), **settings)


def listed(registry: Registry) -> dict[str, list[str]]:
    return {name: [str(r.version) for r in registry.versions(name)] for name in registry.names()}


@pytest.fixture
def source(registry: Registry, make_expert: MakeExpert, interface: RouterInterface) -> Registry:
    """Return a registry with four releases of three packages, a yank, and an advisory."""
    for seed, (name, version, needs) in enumerate(
        [
            ("german", "1.0.0", {"european": "^1"}),
            ("german", "1.1.0-rc.1", {"european": "^1"}),
            ("european", "1.0.0", {}),
            ("european", "1.2.0", {"elsewhere": "^2"}),
            ("zoology", "1.0.0", {}),
        ]
    ):
        registry.publish(make_expert(name, version, requires=needs, seed=seed), interface=interface)
    registry.yank("european", Version("1.0.0"))
    registry.advise(
        Advisory(
            id="zoology-1",
            name="zoology",
            kind="recalled",
            affected=(Constraint("*"),),
            text="Wrong.",
            published="2026-11-24T12:00:00Z",
        )
    )
    return registry


@pytest.fixture
def target(tmp_path: Path) -> Registry:
    return open_for_publishing(tmp_path / "target")


def root_of(registry: Registry) -> Path:
    assert isinstance(registry.storage, Folder)
    return registry.storage.root


def test_a_mirror_of_everything_is_the_same_to_the_byte(source: Registry, target: Registry) -> None:
    for path in SIGNED:
        source.storage.replace(path, f"signed {path}".encode(), None)  # type: ignore[attr-defined]
    done = mirror_registry(source, target)
    assert all_files(root_of(target)) == all_files(root_of(source))
    assert [f"{name} {version}" for name, version, _ in done.releases] == [
        "european 1.0.0",
        "european 1.2.0",
        "german 1.0.0",
        "german 1.1.0-rc.1",
        "zoology 1.0.0",
    ]
    assert done.yanked == (("european", Version("1.0.0")),)
    assert done.n_present == 0 and done.missing == ()
    releases = [release for name in source.names() for release in source.versions(name)]
    digests = [digest for release in releases for digest in release.digests]
    assert done.n_bytes == sum((root_of(source) / blob_path(d)).stat().st_size for d in digests)
    before = {path: path.stat().st_mtime_ns for path in root_of(target).rglob("*")}
    assert mirror_registry(source, target) == Mirrored(
        releases=(), n_present=5, yanked=(), unyanked=(), documents=()
    )
    assert before == {path: path.stat().st_mtime_ns for path in root_of(target).rglob("*")}


class Recorded(Folder):
    """A folder that records what is written, in order."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: list[str] = []

    def create(self, path: str, data: bytes) -> bool:
        self.written.append(path)
        return super().create(path, data)

    def replace(self, path: str, data: bytes, seen: Any) -> bool:
        self.written.append(path)
        return super().replace(path, data, seen)


def test_what_a_reader_needs_first_is_written_first(source: Registry, tmp_path: Path) -> None:
    for path in SIGNED:
        source.storage.replace(path, b"{}", None)  # type: ignore[attr-defined]
    storage = Recorded(tmp_path / "target")
    target = Registry(storage)
    replace = storage.replace

    def check_blobs(path: str, data: bytes, seen: Any) -> bool:
        if path.startswith("index/"):
            for line in data.splitlines():
                release = source.versions(path.split("/")[2].removesuffix(".jsonl"))
                assert line and all(
                    (storage.root / blob_path(digest)).is_file()
                    for row in release
                    for digest in row.digests
                )
        return replace(path, data, seen)

    storage.replace = check_blobs  # type: ignore[method-assign]
    mirror_registry(source, target)
    order = [path for path in storage.written if not path.startswith("blobs/")]
    firsts = {path: order.index(path) for path in order}
    for name in source.names():
        index = firsts[f"index/{name[:2]}/{name}.jsonl"]
        assert all(firsts[p] < index for p in firsts if p.startswith(f"records/{name}/"))
        assert index < firsts["catalog.jsonl"]
    assert order[-5:] == ["advisories.jsonl", *SIGNED]


def test_yanks_advisories_and_new_releases_follow(
    source: Registry, target: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    mirror_registry(source, target)
    source.unyank("european", Version("1.0.0"))
    source.yank("zoology", Version("1.0.0"))
    source.publish(make_expert("german", "1.1.0", seed=9), interface=interface)
    advisory = source.advisory("zoology-1")
    source.advise(dataclasses.replace(advisory, is_withdrawn=True))
    done = mirror_registry(source, target)
    assert [(name, str(version)) for name, version, _ in done.releases] == [("german", "1.1.0")]
    assert done.yanked == (("zoology", Version("1.0.0")),)
    assert done.unyanked == (("european", Version("1.0.0")),)
    assert target.advisory("zoology-1").is_withdrawn
    assert all_files(root_of(target)) == all_files(root_of(source))


def test_what_the_target_has_besides_stays(
    source: Registry, target: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    target.publish(make_expert("house", seed=20), interface=interface)
    target.publish(make_expert("german", "2.0.0", seed=21), interface=interface)
    target.advise(dataclasses.replace(source.advisory("zoology-1"), id="house-1", name="house"))
    mirror_registry(source, target)
    assert listed(target) == {
        **listed(source),
        "german": ["1.0.0", "1.1.0-rc.1", "2.0.0"],
        "house": ["1.0.0"],
    }
    assert [advisory.id for advisory in target.advisories() or ()] == ["house-1", "zoology-1"]
    assert mirror_registry(source, target).documents == ()


def test_a_requirement_brings_what_it_requires(source: Registry, target: Registry) -> None:
    done = mirror_registry(source, target, selecting("german"))
    assert listed(target) == {"european": ["1.0.0", "1.2.0"], "german": ["1.0.0"]}
    assert [row.is_yanked for row in target.versions("european")] == [True, False]
    assert done.missing == ("elsewhere ^2",)
    assert target.advisories() is None
    mirror_registry(source, target, selecting("german@1.1.0-rc.1", "zoology"))
    assert listed(target) == listed(source)
    assert [advisory.id for advisory in target.advisories() or ()] == ["zoology-1"]


def test_the_newest_release_alone(source: Registry, target: Registry) -> None:
    mirror_registry(source, target, Selection(is_latest=True))
    assert listed(target) == {"european": ["1.2.0"], "german": ["1.0.0"], "zoology": ["1.0.0"]}
    assert mirror_registry(source, target, Selection(is_latest=True)).documents == ()


def test_releases_for_one_backbone(source: Registry, target: Registry) -> None:
    mirror_registry(source, target, Selection(interface="another"))
    assert target.names() == []
    mirror_registry(source, target, Selection(interface="tiny-bytes"))
    assert listed(target) == listed(source)
    with pytest.raises(UnknownExpertError, match="no release german for another"):
        mirror_registry(source, target, selecting("german", interface="another"))


def test_a_filtered_mirror_has_no_signatures(source: Registry, target: Registry) -> None:
    source.storage.replace(SIGNED[0], b"{}", None)  # type: ignore[attr-defined]
    mirror_registry(source, target, selecting("zoology"))
    assert target.storage.read(SIGNED[0]) is None


def test_a_registry_that_is_signed_meanwhile_is_read_again(
    source: Registry, target: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.storage.replace(SIGNED[3], b"1", None)  # type: ignore[attr-defined]
    states = iter([b"2", b"3"])
    copy = download.download_file

    def sign_again(*arguments: Any, **settings: Any) -> bool:
        path = root_of(source) / SIGNED[3]
        path.write_bytes(next(states, path.read_bytes()))
        return copy(*arguments, **settings)

    monkeypatch.setattr("composable.packaging.install.mirror.download_file", sign_again)
    mirror_registry(source, target)
    assert (root_of(target) / SIGNED[3]).read_bytes() == b"3"


def test_names_that_do_not_exist(source: Registry, target: Registry) -> None:
    with pytest.raises(UnknownExpertError, match="zoologie") as caught:
        mirror_registry(source, target, selecting("zoologie"))
    assert "did you mean" in str(caught.value)
    with pytest.raises(UnknownExpertError, match="no release zoology >=2"):
        mirror_registry(source, target, selecting("zoology>=2"))
    assert not target.exists, "nothing is created before it is known what to copy"
    with pytest.raises(RegistryError, match="both the source and the target"):
        mirror_registry(source, source)


def test_other_content_and_look_alikes_are_refused(
    source: Registry, target: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    target.publish(make_expert("zoology", seed=30), interface=interface)
    before = all_files(root_of(target))
    with pytest.raises(RegistryError, match="already published with other content"):
        mirror_registry(source, target, selecting("zoology"))
    assert all_files(root_of(target)) == before
    other = open_for_publishing(root_of(target).parent / "other")
    other.publish(make_expert("gerrnan", seed=32), interface=interface)
    with pytest.raises(RegistryError, match="looks like 'gerrnan'"):
        mirror_registry(source, other, selecting("german"))


def damage(registry: Registry, name: str, file: str) -> Path:
    """Flip a bit in a file of the first release of a package."""
    (blob,) = (f for f in registry.versions(name)[0].files if f.name == file)
    path = root_of(registry) / blob_path(blob.digest)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return path


def test_damage_is_not_copied(source: Registry, target: Registry) -> None:
    damage(source, "zoology", "body.safetensors")
    with pytest.raises(IntegrityError, match=r"zoology 1\.0\.0 body"):
        mirror_registry(source, target)
    assert target.versions("zoology") == ()
    assert "zoology" not in target.names()


def test_an_index_that_contradicts_a_manifest_is_not_copied(
    source: Registry, target: Registry
) -> None:
    release = source.versions("zoology")[0]
    forged = dataclasses.replace(release, description="Forged.")
    path = root_of(source) / "index" / "zo" / "zoology.jsonl"
    path.write_bytes(format_document([forged.to_row()]))
    with pytest.raises(ManifestError, match="does not match the index"):
        mirror_registry(source, target)
    assert target.versions("zoology") == ()


def test_damage_in_the_target_is_repaired_if_asked(source: Registry, target: Registry) -> None:
    mirror_registry(source, target)
    path = damage(target, "zoology", "body.safetensors")
    damaged = path.read_bytes()
    mirror_registry(source, target)
    assert path.read_bytes() == damaged
    done = mirror_registry(source, target, is_checking=True)
    assert all_files(root_of(target)) == all_files(root_of(source))
    assert done.releases == () and done.n_present == 5


def test_an_interrupted_mirror_continues_where_it_stopped(
    source: Registry, target: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks that arrived are not read again."""
    from composable.packaging.manifests import manifest

    release = source.versions("zoology")[0]
    (body,) = (f for f in release.files if f.name == "body.safetensors")
    read: list[int] = []
    stream = Folder.stream

    def break_off(self: Folder, path: str, start: int = 0) -> Iterator[bytes]:
        if path != blob_path(body.digest) or self.root != root_of(source):
            yield from stream(self, path, start)
            return
        data = b"".join(stream(self, path, start))
        read.append(start)
        for at in range(0, len(data), 64):
            if not start and at == 640:
                raise KeyboardInterrupt
            yield data[at : at + 64]

    chunk = 256
    assert body.size > 640
    for module in (manifest, download):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    whole = source.fetch_manifest

    def with_chunks(row: Any) -> Any:
        found, data = whole(row)

        def add_chunks(file: Any) -> Any:
            content = (root_of(source) / blob_path(file.digest)).read_bytes()
            pieces = [content[at : at + chunk] for at in range(0, len(content), chunk)]
            hashes = tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
            return dataclasses.replace(file, chunks=hashes)

        return dataclasses.replace(found, files=tuple(map(add_chunks, found.files))), data

    monkeypatch.setattr(source, "fetch_manifest", with_chunks)
    monkeypatch.setattr(Folder, "stream", break_off)
    with pytest.raises(KeyboardInterrupt):
        mirror_registry(source, target)
    assert target.versions("zoology") == ()
    mirror_registry(source, target)
    assert read == [0, 512]
    assert all_files(root_of(target)) == all_files(root_of(source))


def test_a_disk_without_room_is_noticed_first(
    source: Registry, target: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(DiskError, match="only 10 are free"):
        mirror_registry(source, target)
    assert not target.exists


@pytest.mark.slow
def test_from_a_web_server_to_a_disk_and_from_there(
    source: Registry, target: Registry, tmp_path: Path, interface: RouterInterface, store: Store
) -> None:
    """An air-gapped site: two commands, and then a project that knows only the copy."""
    with run_nginx(root_of(source), tmp_path / "nginx") as nginx:
        mirror_registry(open_registry(nginx.url), target)
        nginx.forget()
        assert mirror_registry(open_registry(nginx.url), target).releases == ()
        assert not [asked for asked in nginx.asked() if asked.path.startswith("/blobs")]
    assert all_files(root_of(target)) == all_files(root_of(source))
    inside = open_for_publishing(tmp_path / "inside")
    mirror_registry(open_registry(root_of(target)), inside)
    project = Project.create(tmp_path / "project", "tiny-bytes", {"inside": "../inside"})
    project = project.add(Requirement.parse("zoology"))
    sync_project(project, lock_project(project, interface), store, interface=interface)
    assert store.verify() == []


def test_from_an_export(
    source: Registry, target: Registry, tmp_path: Path, interface: RouterInterface, store: Store
) -> None:
    project = Project.create(tmp_path / "project", "tiny-bytes", {"local": "../registry"})
    project = project.add(Requirement.parse("zoology"))
    lock = lock_project(project, interface)
    sync_project(project, lock, store, interface=interface)
    export_project(project, lock, tmp_path / "carry.tar", interface=interface)
    mirror_registry(open_registry(tmp_path / "carry.tar"), target)
    assert listed(target) == {"zoology": ["1.0.0"]}


def test_a_signed_registry_stays_signed(tmp_path: Path, interface: RouterInterface) -> None:
    """Clients of the copy verify it with the same keys, and see each later state."""
    world = build_world(tmp_path / "world", interface)
    target = open_for_publishing(tmp_path / "target")
    world.restore("early")
    mirror_registry(world.open("carrier"), target)
    assert use(world.open("early-client", Folder(tmp_path / "target"))) == use(
        world.open("early-client")
    )
    shutil.rmtree(world.folder)
    shutil.copytree(world.saved("late"), world.folder)
    with serve_folder(world.folder) as url:  # which cannot list its files
        mirror_registry(world.open("carrier", WebStorage(url)), target)
    client = world.open("early-client", Folder(tmp_path / "target"))
    assert use(client) == use(world.open("new-client"))
    assert client.open_signatures() is not None
    listed_here = all_files(tmp_path / "target")
    signed = {p: d for p, d in all_files(world.folder).items() if p.startswith("trust/")}
    assert listed_here["trust/timestamp.json"] == signed["trust/timestamp.json"]
    assert listed_here["config.json"] == (world.folder / "config.json").read_bytes()
    again = mirror_registry(world.open("carrier"), target)
    assert (again.releases, again.documents) == ((), again.documents)
    assert mirror_registry(world.open("carrier"), target).documents == ()


def test_a_signed_registry_gets_no_releases_without_signatures(
    source: Registry, tmp_path: Path, interface: RouterInterface
) -> None:
    world = build_world(tmp_path / "world", interface)
    before = all_files(world.folder)
    with pytest.raises(RegistryError, match="is signed, and a mirror"):
        mirror_registry(source, world.open("operator"))
    assert all_files(world.folder) == before
    target = open_for_publishing(tmp_path / "target")
    mirror_registry(world.open("carrier"), target, selecting("german"))
    assert listed(target) == {"german": ["1.0.0", "1.1.0"]}
    assert target.storage.read("trust/timestamp.json") is None


def test_what_nobody_signed_is_not_copied(tmp_path: Path, interface: RouterInterface) -> None:
    """An index beside the signed one may list more, and its files may exist."""
    world = build_world(tmp_path / "world", interface)
    path = world.folder / "index" / "ge" / "german.jsonl"
    (signed, *_) = world.open("carrier").versions("german")
    forged = dataclasses.replace(signed, version=Version("9.0.0"))
    releases = [*world.open("carrier").versions("german"), forged]
    path.write_bytes(format_document([release.to_row() for release in releases]))
    target = open_for_publishing(tmp_path / "target")
    mirror_registry(world.open("carrier"), target)
    assert b"9.0.0" not in (tmp_path / "target" / "index" / "ge" / "german.jsonl").read_bytes()
