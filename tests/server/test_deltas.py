"""Publishing deltas to a server: what is sent, made, kept and served, and what goes with a base."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from composable.errors import RegistryError
from composable.interface import RouterInterface
from composable.packaging import (
    Project,
    Requirement,
    Store,
    lock_project,
    open_for_publishing,
    open_registry,
    sync_project,
)
from composable.packaging.install.deltas import prepare_deltas
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.served import ServedRegistry, ServedStorage
from composable.server.accounts import find_caller
from composable.server.importing import import_registry
from tests.packaging.conftest import make_interface
from tests.support.registries import Served
from tests.support.updates import BODY, LARGE, Family, publish_update, vet


class CountedServer(ServedStorage):
    """A server; `sent` has the bytes of the chunks that were sent to it, by digest."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self.sent: dict[str, int] = {}

    def send(self, method: str, path: str, body: bytes, kind: str, seconds: float = 0.0) -> bytes:
        if method == "PUT":
            digest = path.split("/files/")[1].split("/")[0]
            self.sent[digest] = self.sent.get(digest, 0) + len(body)
        return super().send(method, path, body, kind, seconds)


@pytest.fixture
def interface() -> RouterInterface:
    return make_interface(**LARGE)


@pytest.fixture
def family(tmp_path: Path, interface: RouterInterface) -> Family:
    family = Family(tmp_path / "generations", interface, version="{}.0.0")
    for folder in family.folders:
        vet(folder, interface)
    return family


def body_in(url: str, number: int) -> object:
    release = open_registry(url).versions("german")[number]
    return next(file for file in release.files if file.name == BODY)


def find_blobs(server: Served) -> dict[str, bytes]:
    home = server.services.storage.root  # type: ignore[attr-defined]
    return {path.name: path.read_bytes() for path in (home / "blobs").rglob("*") if path.is_file()}


def test_a_delta_is_sent_and_the_file_is_served(
    server: Served, family: Family, interface: RouterInterface, tmp_path: Path
) -> None:
    storage = CountedServer(server.url, server.account("ann"))
    family.publish(ServedRegistry(storage), Store(tmp_path / "publisher"), range(2))
    first, second = body_in(server.url, 0), body_in(server.url, 1)
    (delta,) = second.deltas
    assert storage.sent[first.digest] == first.size
    assert second.digest not in storage.sent and storage.sent[delta.digest] == delta.size
    blobs = find_blobs(server)
    assert blobs[second.digest[7:]] == (family.folders[1] / BODY).read_bytes(), "made, and whole"
    assert {delta.digest[7:]} <= blobs.keys()
    assert not list((server.services.storage.root / "uploads").rglob("*.json"))  # type: ignore[attr-defined]

    store = Store(tmp_path / "store")
    project = Project.create(tmp_path / "project", "tiny-bytes", {"team": server.url})
    for version in ("0.0.0", "1.0.0"):
        project = project.add(Requirement.parse(f"german@{version}"))
        sync_project(project, lock_project(project, interface), store, interface=interface)
    installed = project.environment.expert_path("german") / BODY
    assert installed.read_bytes() == (family.folders[1] / BODY).read_bytes()
    assert store.has(delta.digest), "it was enough"


def test_a_base_that_the_publisher_cannot_read_does_not_count(
    server: Served, family: Family, interface: RouterInterface, tmp_path: Path
) -> None:
    """Or its bytes could be had by publishing a delta against them."""
    ann, eve = server.account("ann"), server.account("eve")
    family.publish(server.registry(ann), Store(tmp_path / "publisher"), range(1))
    assert server.api("PATCH", "/packages/german", {"private": True}, ann)[0] == 204
    manifest = (family.folders[1] / "expert.toml").read_text().replace('"german"', '"bavarian"')
    (family.folders[1] / "expert.toml").write_text(manifest)
    card = (family.folders[1] / "card.json").read_text().replace("german@", "bavarian@")
    (family.folders[1] / "card.json").write_text(card)
    # Eve has the files of the base from elsewhere, and says that the server has it.
    elsewhere = open_for_publishing(tmp_path / "folder")
    elsewhere.publish(family.folders[0], interface=interface)
    text = (family.folders[1] / "expert.toml").read_text()
    derived = text.replace("description", 'derives-from = "german@0.0.0"\ndescription')
    (family.folders[1] / "expert.toml").write_text(derived)
    packed = pack_expert(family.folders[1], interface=interface)
    storage = CountedServer(server.url, eve)
    with prepare_deltas(elsewhere, family.folders[1], packed, Store(tmp_path / "s")) as prepared:
        assert BODY in prepared.deltas
        ServedRegistry(storage).publish(
            family.folders[1], interface=interface, deltas=prepared.deltas
        )
    whole = next(file for file in packed.files if file.name == BODY)
    assert storage.sent[whole.digest] == whole.size
    assert prepared.deltas[BODY].file.digest not in storage.sent
    (release,) = open_registry(server.url).versions("bavarian")
    assert not release.deltas


def test_a_delta_of_other_content_is_refused(
    server: Served, family: Family, interface: RouterInterface, tmp_path: Path
) -> None:
    registry = server.registry(server.account("ann"))
    store = Store(tmp_path / "publisher")
    family.publish(registry, store, range(1))
    packed = [pack_expert(folder, interface=interface) for folder in family.folders]
    with prepare_deltas(registry, family.folders[2], packed[2], store) as prepared:
        target = next(file for file in packed[1].files if file.name == BODY)
        wrong = dataclasses.replace(prepared.deltas[BODY], target=target.digest)
        with pytest.raises(RegistryError, match="have digest"):
            registry.publish(family.folders[1], interface=interface, deltas={BODY: wrong})
    assert len(open_registry(server.url).versions("german")) == 1
    # Nothing is left of it, and the same release can be published.
    publish_update(registry, family.folders[1], interface, store, family.factors[1])
    assert len(open_registry(server.url).versions("german")) == 2


def test_a_takedown_takes_the_deltas_that_would_give_it_back(
    server: Served, family: Family, interface: RouterInterface, tmp_path: Path
) -> None:
    admin = server.account("root", is_admin=True, scopes=["admin"])
    family.publish(server.registry(server.account("ann")), Store(tmp_path / "publisher"))
    base, second, third = (body_in(server.url, number) for number in range(3))
    before = find_blobs(server)
    assert {second.deltas[0].digest[7:], third.deltas[0].digest[7:]} <= before.keys()
    body = {"reason": "court order"}
    assert server.api("POST", "/packages/german/0.0.0/takedown", body, admin)[0] == 200
    after = find_blobs(server)
    assert base.digest[7:] not in after and second.deltas[0].digest[7:] not in after
    assert third.deltas[0].digest[7:] in after, "it starts from another file"
    assert not body_in(server.url, 1).deltas and body_in(server.url, 2).deltas
    project = Project.create(tmp_path / "project", "tiny-bytes", {"team": server.url})
    project = project.add(Requirement.parse("german@1.0.0"))
    store = Store(tmp_path / "store")
    sync_project(project, lock_project(project, interface), store, interface=interface)
    installed = project.environment.expert_path("german") / BODY
    assert installed.read_bytes() == (family.folders[1] / BODY).read_bytes()


def test_a_server_is_filled_from_a_registry_of_deltas(
    server: Served, family: Family, tmp_path: Path
) -> None:
    source = open_for_publishing(tmp_path / "folder")
    family.publish(source, Store(tmp_path / "publisher"))
    body = next(file for file in source.versions("german")[2].files if file.name == BODY)
    assert not source.has_blob(body.digest)
    token = server.account("ann")
    with server.services.database.read() as session:
        caller = find_caller(session, f"Bearer {token}")
    found = import_registry(server.services, caller, source)
    assert [release.problem for release in found] == [None, None, None]
    assert find_blobs(server)[body.digest[7:]] == (family.folders[2] / BODY).read_bytes()


def test_a_delta_against_a_private_file_is_not_kept(
    server: Served, family: Family, interface: RouterInterface, tmp_path: Path
) -> None:
    """With the file that it makes, it would give the private one away."""
    token = server.account("ann")
    storage, store = CountedServer(server.url, token), Store(tmp_path / "publisher")
    family.publish(ServedRegistry(storage), store, range(1))
    assert server.api("PATCH", "/packages/german", {"private": True}, token)[0] == 204
    packed = pack_expert(family.folders[1], interface=interface)
    with prepare_deltas(ServedRegistry(storage), family.folders[1], packed, store) as prepared:
        ServedRegistry(storage).publish(
            family.folders[1], interface=interface, deltas=prepared.deltas
        )
    digest = prepared.deltas[BODY].file.digest
    assert digest in storage.sent and digest[7:] not in find_blobs(server)
    (_, second) = ServedRegistry(storage).versions("german")
    assert not second.deltas and ServedRegistry(storage).has_blob(second.files[0].digest)
