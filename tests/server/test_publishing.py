"""Publishing over HTTP: what arrives, what is refused, and what is served afterwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from composable.errors import RegistryError
from composable.interface import RouterInterface
from composable.packaging import (
    Project,
    Requirement,
    Store,
    Version,
    lock_project,
    open_registry,
    sync_project,
)
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry import registry as registry_module
from composable.server import tables
from composable.server.accounts import find_caller
from composable.server.publishing import Publishing
from tests.support.killed_registries import find_visible
from tests.support.registries import Served, fetch, run_server

if TYPE_CHECKING:
    from tests.server.conftest import MakeVetted


def list_files(folder: Path) -> dict[str, bytes]:
    """Return the files that clients read, by path."""
    parts = [folder / "config.json", folder / "catalog.jsonl"]
    parts += [*(folder / "index").rglob("*"), *(folder / "blobs").rglob("*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in parts if p.is_file()}


def test_serves_what_a_folder_holds_byte_for_byte(
    server: Served,
    make_vetted: MakeVetted,
    interface: RouterInterface,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mirror of a server is a copy of its files."""
    time = "2026-11-29T12:00:00Z"
    monkeypatch.setattr("composable.server.publishing.now", lambda: time)

    class Clock(registry_module.datetime.datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            return cls.fromisoformat(time)

    token = server.account("ann")
    folder = registry_module.Registry(open_registry(tmp_path / "folder").storage)
    experts = [
        make_vetted("german", "1.0.0"),
        make_vetted("german", "2.0.0", seed=1),
        make_vetted("set-mm", tail='[requires]\ngerman = "^1"\n', head='languages = ["en"]'),
    ]
    for expert in experts:
        with monkeypatch.context() as patch:
            patch.setattr(registry_module.datetime, "datetime", Clock)
            folder.publish(expert, interface=interface)
        server.registry(token).publish(expert, interface=interface)
    folder.yank("german", Version("1.0.0"))
    server.registry(token).yank("german", Version("1.0.0"), "wrong text")
    expected = list_files(tmp_path / "folder")
    assert len(expected) > 12
    for path, data in expected.items():
        assert fetch(f"{server.url}/{path}")[:2] == (200, data), path


def test_installs_from_a_server(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface, tmp_path: Path
) -> None:
    token = server.account("ann")
    server.registry(token).publish(make_vetted("european"), interface=interface)
    expert = make_vetted("german", tail='[requires]\neuropean = "^1"\n')
    server.registry(token).publish(expert, interface=interface)
    project = Project.create(tmp_path / "project", "tiny-bytes", {"team": server.url})
    project = project.add(Requirement.parse("german"))
    store = Store(tmp_path / "store")
    lock = lock_project(project, interface)
    sync_project(project, lock, store, interface=interface)
    installed = store.path(pack_expert(expert, interface=interface).files[0].digest)
    assert installed.read_bytes() == (expert / "README.md").read_bytes()
    assert list(lock.versions) == ["european", "german"]


def test_publishing_again_changes_nothing(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    registry = server.registry(server.account("ann"))
    expert = make_vetted()
    first = registry.publish(expert, interface=interface)
    before = fetch(f"{server.url}/index/ge/german.jsonl")
    assert registry.publish(expert, interface=interface) == first
    assert fetch(f"{server.url}/index/ge/german.jsonl") == before


def test_a_version_cannot_get_other_content(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    registry = server.registry(server.account("ann"))
    registry.publish(make_vetted(), interface=interface)
    with pytest.raises(RegistryError, match="already published with other content"):
        registry.publish(make_vetted(seed=1), interface=interface)


def test_a_name_belongs_to_its_owners(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    ann, bob = server.account("ann"), server.account("bob")
    server.registry(ann).publish(make_vetted(), interface=interface)
    later = make_vetted(version="2.0.0", seed=1)
    with pytest.raises(RegistryError, match="belongs to somebody else"):
        server.registry(bob).publish(later, interface=interface)
    assert server.api("PUT", "/packages/german/owners/bob", None, ann)[0] == 204
    server.registry(bob).publish(later, interface=interface)
    assert server.api("DELETE", "/packages/german/owners/ann", None, bob)[0] == 204
    assert server.api("DELETE", "/packages/german/owners/bob", None, bob)[0] == 409
    assert server.api("GET", "/packages/german")[1]["owners"] == ["bob"]


@pytest.mark.parametrize("name", ["gerrnan", "ger-man", "germany", "germna", "gorman"])
def test_names_that_look_like_others_are_refused(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface, name: str
) -> None:
    server.registry(server.account("ann")).publish(make_vetted(), interface=interface)
    bob = server.registry(server.account("bob"))
    with pytest.raises(RegistryError, match="looks like 'german'"):
        bob.publish(make_vetted(name), interface=interface)
    bob.publish(make_vetted("german-2"), interface=interface)


def test_a_small_version_step_is_refused(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    registry = server.registry(server.account("ann"))
    registry.publish(make_vetted(), interface=interface)
    with pytest.raises(RegistryError, match="too small a step"):
        registry.publish(make_vetted(version="1.0.1", seed=1), interface=interface)
    registry.publish(make_vetted(version="2.0.0", seed=1), interface=interface)


@pytest.mark.parametrize("text", ["", "MIT OR", "(MIT", "MIT Apache-2.0", "WITH MIT", "MIT AND OR"])
def test_a_licence_is_an_spdx_expression(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface, text: str
) -> None:
    registry = server.registry(server.account("ann"))
    with pytest.raises(RegistryError, match=r"SPDX|missing"):
        registry.publish(make_vetted(license=text), interface=interface)


def change_card(folder: Path, **changes: object) -> Path:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passed": False}, "checks failed"),
        ({"checks": []}, "checks failed"),
        ({"expert": "other@1.0.0"}, "is the card of"),
        ({"tensors": {}}, "changed since"),
        ({"checks": "many"}, "not a valid Card"),
        ({"interface": {"name": "tiny-bytes", "digest": "sha256:0"}}, "another interface"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(
    server: Served,
    make_vetted: MakeVetted,
    interface: RouterInterface,
    changes: dict[str, object],
    message: str,
) -> None:
    registry = server.registry(server.account("ann"))
    with pytest.raises(RegistryError, match=message):
        registry.publish(change_card(make_vetted(), **changes), interface=interface)
    assert not registry.versions("german")
    assert server.ask("GET", "/catalog.jsonl")[0] == 404


def test_bytes_that_do_not_match_are_refused(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    """A client that sends other bytes than its manifest lists cannot commit them."""
    token = server.account("ann")
    folder = make_vetted()
    manifest = pack_expert(folder, interface=interface)
    body = {"manifest": manifest.to_toml()}
    _, opened = server.api("POST", "/publications", body, token)
    home = f"/publications/{opened['id']}"
    status, answer = server.api("POST", f"{home}/commit", None, token)
    assert (status, answer["error"]["message"]) == (409, "0 of 1 chunks have arrived")
    for file in manifest.files:
        data = (folder / file.name).read_bytes()
        path = f"{home}/files/{file.digest}/0"
        changed = bytes([data[0] ^ 1]) + data[1:]
        assert server.api("PUT", path, changed, token)[0] == 422
        assert server.api("PUT", path, data[:-1], token)[0] == 422
        assert server.api("PUT", path, data, token)[0] == 204
        assert server.api("PUT", path, data, token)[0] == 204
        assert server.api("PUT", f"{home}/files/{file.digest}/1", data, token)[0] == 404
    other = server.account("bob")
    assert server.api("POST", f"{home}/commit", None, other)[0] == 404
    assert server.api("POST", f"{home}/commit", None, token)[0] == 200
    left = [
        p for p in (Path(server.services.storage.location) / "uploads").rglob("*") if p.is_file()
    ]
    assert left == []


def test_an_upload_resumes_where_it_stopped(
    server: Served,
    make_vetted: MakeVetted,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only chunks that have not arrived are sent again."""
    for place in ("manifests.packing", "manifests.manifest", "registry.served"):
        monkeypatch.setattr(f"composable.packaging.{place}.CHUNK_BYTES", 512)
    monkeypatch.setattr("composable.server.uploads.CHUNK_BYTES", 512)
    registry = server.registry(server.account("ann"))
    folder = make_vetted()
    sent: list[str] = []
    send = registry.storage.send  # type: ignore[attr-defined]

    def send_some(method: str, path: str, *args: object) -> bytes:
        if method == "PUT":
            sent.append(path)
            if len(sent) == 4:
                raise KeyboardInterrupt
        return send(method, path, *args)

    monkeypatch.setattr(registry.storage, "send", send_some)
    with pytest.raises(KeyboardInterrupt):
        registry.publish(folder, interface=interface)
    registry.publish(folder, interface=interface)
    assert len(sent) > 6
    again = [path for path in sent if sent.count(path) > 1]
    assert set(again) == {sent[3]}
    assert [str(r.version) for r in registry.versions("german")] == ["1.0.0"]


def test_tensors_are_checked_against_a_known_backbone(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    """An expert with tensors of other shapes passes its own checks, but not the backbone's."""
    from composable.server.tables import Backbone

    with server.services.database.write() as session:
        session.add(
            Backbone(
                name=interface.name,
                version=interface.version,
                interface=interface.to_json(),
                description="",
                license="",
                added="2026-11-29T12:00:00Z",
            )
        )
    wrong = dataclasses.replace(interface, d_model=6)
    folder = make_vetted(interface=wrong)
    change_card(folder, interface={"name": interface.name, "digest": interface.digest})
    text = (folder / "expert.toml").read_text()
    need = f'requires = "^1"\ndigest = "{interface.digest}"'
    (folder / "expert.toml").write_text(text.replace('requires = "^1"', need))
    registry = server.registry(server.account("ann"))
    with pytest.raises(RegistryError, match="shape"):
        registry.publish(folder)
    registry.publish(make_vetted(), interface=interface)


def test_a_static_server_is_read_only(
    make_vetted: MakeVetted, interface: RouterInterface, server: Served
) -> None:
    registry = server.registry(None)
    with pytest.raises(RegistryError, match="a token is needed"):
        registry.publish(make_vetted(), interface=interface)


def test_unfinished_publications_expire(
    tmp_path: Path, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    with run_server(tmp_path / "served") as server:
        token = server.account("ann")
        manifest = pack_expert(make_vetted(), interface=interface)
        for _ in range(2):
            _, opened = server.api("POST", "/publications", {"manifest": manifest.to_toml()}, token)
        assert server.services.publishing.drop_expired() == 0
        with server.services.database.write() as session:
            from composable.server.tables import Publication

            session.get_one(Publication, opened["id"]).created = "2020-01-01T00:00:00Z"
        assert server.services.publishing.drop_expired() == 1
        assert server.api("GET", f"/publications/{opened['id']}", None, token)[0] == 404


def test_a_publication_that_is_refused_is_dropped(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    """What can never be committed does not count as unfinished, and its chunks are removed."""
    from composable.server.tables import Publication

    registry = server.registry(server.account("ann"))
    for _ in range(2):
        with pytest.raises(RegistryError, match="checks failed"):
            registry.publish(change_card(make_vetted(), passed=False), interface=interface)
    with server.services.database.read() as session:
        assert session.query(Publication).count() == 0
    uploads = Path(server.services.storage.location) / "uploads"
    assert [path for path in uploads.rglob("*") if path.is_file()] == []


def list_blobs(server: Served) -> set[str]:
    """Return the names of all blobs that the storage has."""
    folder = Path(server.services.storage.location) / "blobs"
    return {path.name for path in folder.rglob("*") if path.is_file()}


def upload(server: Served, token: str, folder: Path, interface: RouterInterface) -> str:
    """Open a publication and send all of its small files; return its id."""
    manifest = pack_expert(folder, interface=interface)
    _, opened = server.api("POST", "/publications", {"manifest": manifest.to_toml()}, token)
    for file in manifest.files:
        path = f"/api/v1/publications/{opened['id']}/files/{file.digest}/0"
        assert server.ask("PUT", path, (folder / file.name).read_bytes(), token)[0] < 300
    return opened["id"]


def test_blobs_of_a_commit_that_was_killed_go_with_the_publication(
    server: Served,
    make_vetted: MakeVetted,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server dies when the bytes are durable; what a release or publication has stays."""
    token = server.account("ann")
    server.registry(token).publish(make_vetted("german"), interface=interface)
    before = list_blobs(server)
    publications = [upload(server, token, make_vetted(n), interface) for n in ("french", "dutch")]

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    with server.services.database.read() as session:
        caller = find_caller(session, f"Bearer {token}")
    with monkeypatch.context() as patch:
        patch.setattr(Publishing, "_insert", die)
        for publication in publications:
            with pytest.raises(RuntimeError, match="killed"):
                server.services.publishing.commit(caller, publication)
    assert list_blobs(server) > before
    server.services.publishing.cancel(caller, publications[0])
    server.services.publishing.commit(caller, publications[1])
    whole, half = find_visible(server.registry(None))
    assert (whole, half) == ({"german", "dutch"}, set())
    listed = {
        digest.removeprefix("sha256:")
        for release in (server.registry(None).versions(n)[0] for n in whole)
        for digest in (release.manifest, *(file.digest for file in release.files))
    }
    assert list_blobs(server) == listed


def test_a_publication_that_is_cancelled_while_it_is_committed_is_refused(
    server: Served,
    make_vetted: MakeVetted,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its blobs are removed, so no release may show them."""
    token = server.account("ann")
    publication = upload(server, token, make_vetted(), interface)
    insert = Publishing._insert

    def insert_after_cancel(self: Publishing, session: Any, *args: Any) -> Any:
        session.delete(session.get(tables.Publication, publication))
        session.flush()
        return insert(self, session, *args)

    monkeypatch.setattr(Publishing, "_insert", insert_after_cancel)
    status, answer = server.api("POST", f"/publications/{publication}/commit", None, token)
    assert status == 404 and "no such publication" in str(answer)
    assert not server.registry(None).versions("german")


def test_an_answer_that_is_lost_is_asked_for_again(
    server: Served,
    make_vetted: MakeVetted,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit succeeded and its answer was lost; sent again, it finds no publication."""
    registry = server.registry(server.account("ann"))
    send = registry.storage.send  # type: ignore[attr-defined]

    def send_twice(method: str, path: str, *args: object) -> bytes:
        if path.endswith("/commit"):
            send(method, path, *args)
        return send(method, path, *args)

    monkeypatch.setattr(registry.storage, "send", send_twice)
    expert = make_vetted()
    assert registry.publish(expert, interface=interface) == pack_expert(expert, interface=interface)
    assert registry.names() == ["german"]
