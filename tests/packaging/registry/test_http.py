"""Registries on a web server: a real nginx on loopback, and a wire to it that breaks."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from composable.errors import IntegrityError, RegistryError, UnreachableError
from composable.interface import RouterInterface, body_signature
from composable.packaging import (
    Project,
    Registry,
    Requirement,
    Store,
    lock_project,
    open_registry,
    sync_project,
    write_tensors,
)
from composable.packaging.install import download
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.cache import CachedStorage
from composable.packaging.registry.credentials import find_token
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.index import index_path
from composable.packaging.registry.lines import format_document, format_line
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.registry.storage import Document
from tests.support.servers import BreakingWire, Nginx, free_port, run_nginx

if TYPE_CHECKING:
    from tests.packaging.conftest import MakeExpert

pytestmark = pytest.mark.slow

BIG_RANK = 4


@pytest.fixture
def nginx(registry: Registry, tmp_path: Path) -> Iterator[Nginx]:
    root = tmp_path / "registry"
    root.mkdir(exist_ok=True)
    with run_nginx(root, tmp_path / "nginx") as server:
        yield server


@pytest.fixture
def published(registry: Registry, make_expert: MakeExpert, interface: RouterInterface) -> None:
    registry.publish(make_expert("german", "1.0.0"), interface=interface)
    registry.publish(make_expert("german", "1.1.0", seed=1), interface=interface)
    registry.publish(
        make_expert("french", "1.0.0", requires={"german": "^1"}, seed=2), interface=interface
    )


@pytest.fixture
def remote(project: Project, nginx: Nginx, published: None) -> Project:
    """Return a project that asks for `french` from nginx."""
    project = dataclasses.replace(project, registries={"local": nginx.url})
    project.path.write_text(
        f'[project]\nbackbone = "tiny-bytes"\n[registries]\nlocal = "{nginx.url}"\n[experts]\n'
    )
    return Project.read(project.root).add(Requirement.parse("french"))


def test_a_web_server_tells_what_the_folder_tells(
    registry: Registry, nginx: Nginx, published: None
) -> None:
    remote = open_registry(nginx.url)
    assert remote.names() == registry.names() == ["french", "german"]
    assert remote.entries() == registry.entries()
    for name in remote.names():
        assert remote.versions(name) == registry.versions(name)
        for release in remote.versions(name):
            assert remote.read_manifest(release) == registry.read_manifest(release)
    assert remote.versions("nobody") == ()


def test_one_conditional_get_per_package(
    remote: Project, interface: RouterInterface, nginx: Nginx
) -> None:
    lock = lock_project(remote, interface)
    paths = sorted(entry.path for entry in nginx.asked())
    wanted = ["/config.json", f"/{index_path('french')}", f"/{index_path('german')}"]
    assert paths == sorted(wanted)
    nginx.forget()
    assert lock_project(remote, interface, upgrade=True) == lock
    assert sorted(entry.path for entry in nginx.asked()) == sorted(wanted)
    assert [entry.status for entry in nginx.asked()] == [304] * 3, "nothing is sent twice"


def test_install_and_sync_again(
    remote: Project, interface: RouterInterface, nginx: Nginx, store: Store
) -> None:
    lock = lock_project(remote, interface)
    sync_project(remote, lock, store, interface=interface)
    assert store.verify() == []
    nginx.forget()
    sync_project(remote, lock, store, interface=interface)
    assert nginx.asked() == [], "a synced project asks nobody"


def test_offline(remote: Project, interface: RouterInterface, nginx: Nginx, store: Store) -> None:
    offline = dataclasses.replace(remote, is_offline=True)
    with pytest.raises(UnreachableError, match="--offline"):
        lock_project(offline, interface)
    lock = lock_project(remote, interface)
    assert lock_project(offline, interface, upgrade=True) == lock
    with pytest.raises(UnreachableError, match="not in the store"):
        sync_project(offline, lock, store, interface=interface)
    sync_project(remote, lock, store, interface=interface)
    other = Project.create(remote.root.parent / "other", "tiny-bytes", {"local": nginx.url})
    other = dataclasses.replace(other.add(Requirement.parse("german")), is_offline=True)
    nginx.forget()
    lock = lock_project(other, interface)
    sync_project(other, lock, store, interface=interface)
    assert other.environment.holds(lock), "the store and what was asked before are enough"
    assert nginx.asked() == []


def test_a_damaged_cache_is_asked_for_again(remote: Project, interface: RouterInterface) -> None:
    lock = lock_project(remote, interface)
    entries = [path for path in (Store().root / "documents").iterdir() if path.is_file()]
    assert len(entries) == 3
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:20])
    assert lock_project(remote, interface, upgrade=True) == lock


@pytest.fixture
def big(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Publish an expert whose body has many chunks, and return the digest of that body."""
    from composable.packaging.manifests import manifest, packing

    for module in (manifest, packing, download):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 12)
    folder = make_expert("german", "2.0.0")
    wide = dataclasses.replace(interface, d_model=512, d_ff=1024, lora_max_rank=4)
    text = (folder / "expert.toml").read_text()
    (folder / "expert.toml").write_text(
        text.replace('requires = "^1"', f'requires = "^1"\ndigest = "{interface.digest}"')
    )
    rng = np.random.default_rng(0)
    specs = body_signature(wide, "lora", 2)
    tensors = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
    write_tensors(folder / "body.safetensors", tensors)
    packed = registry.publish(folder)
    (body,) = (file for file in packed.files if file.name == "body.safetensors")
    assert len(body.chunks) > 10
    return body.digest


@pytest.mark.parametrize("cut", [1, 200, 5000, 9000, 30000])
def test_downloads_that_break_off_resume_by_range(
    big: str, registry: Registry, nginx: Nginx, store: Store, cut: int
) -> None:
    manifest = registry.read_manifest(registry.versions("german")[0])
    (body,) = (file for file in manifest.files if file.digest == big)
    wire = BreakingWire(int(nginx.url.rpartition(":")[2]), [cut] * 3)
    try:
        remote = Registry(WebStorage(wire.url, budget=TimeBudget(first_pause_seconds=0.0)))
        download.download_file(remote, store, body, label="body")
    finally:
        wire.close()
    assert store.path(big).read_bytes() == b"".join(registry.stream(big))
    if cut > 1000:
        assert any(entry.range.startswith("bytes=") for entry in nginx.asked())
        assert {entry.status for entry in nginx.asked()} == {200, 206}


def test_what_came_before_a_failure_is_not_asked_for_again(
    big: str, registry: Registry, nginx: Nginx, store: Store
) -> None:
    manifest = registry.read_manifest(registry.versions("german")[0])
    (body,) = (file for file in manifest.files if file.digest == big)
    wire = BreakingWire(int(nginx.url.rpartition(":")[2]), [20_000] + [1] * 1000)
    hasty = TimeBudget(max_retries=0)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        download.download_file(
            Registry(WebStorage(wire.url, budget=hasty)), store, body, label="body"
        )
    wire.close()
    nginx.forget()
    download.download_file(Registry(WebStorage(nginx.url)), store, body, label="body")
    (entry,) = nginx.asked()
    assert entry.status == 206
    assert entry.sent < body.size - 12_000


def test_a_damaged_blob_is_refused_and_nothing_is_kept(
    remote: Project, registry: Registry, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(remote, interface)
    digest = lock["german"].files[1].digest
    path = registry.storage.root / "blobs" / digest[7:9] / digest[7:]  # type: ignore[attr-defined]
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"german 1\.1\.0 .* from http://127"):
        sync_project(remote, lock, store, interface=interface)
    assert not store.has(digest)
    assert remote.environment.current is None


def test_tokens(nginx: Nginx, published: None, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{nginx.url}/private"
    with pytest.raises(RegistryError, match="HTTP status 401") as caught:
        open_registry(url, name="our-team").versions("german")
    assert "set its token" in str(caught.value)
    monkeypatch.setenv("COMPOSABLE_TOKEN_OUR_TEAM", "wrong")
    monkeypatch.setenv("COMPOSABLE_ORIGIN_OUR_TEAM", nginx.url)
    with pytest.raises(RegistryError, match="HTTP status 401") as caught:
        open_registry(url, name="our-team").versions("german")
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("COMPOSABLE_TOKEN_OUR_TEAM", "open-sesame")
    assert len(open_registry(url, name="our-team").versions("german")) == 2
    with pytest.raises(RegistryError, match="401"):
        open_registry(url, name="other").versions("german")
    kept = b"".join(path.read_bytes() for path in (Store().root / "documents").iterdir())
    assert b"open-sesame" not in kept


def test_a_token_does_not_follow_to_another_host(
    nginx: Nginx, published: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPOSABLE_TOKEN_TEAM", "open-sesame")
    monkeypatch.setenv("COMPOSABLE_ORIGIN_TEAM", nginx.url)
    with pytest.raises(RegistryError, match="HTTP status 401"):
        open_registry(f"{nginx.url}/moved", name="team").versions("german")


def test_tokens_from_the_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    import keyring
    from keyring.backend import KeyringBackend

    class Memory(KeyringBackend):
        priority = 1

        def get_password(self, service: str, username: str) -> str | None:
            return {("composable", "https://x.org/r"): "from-keyring"}.get((service, username))

        def set_password(self, service: str, username: str, password: str) -> None:
            raise NotImplementedError

        def delete_password(self, service: str, username: str) -> None:
            raise NotImplementedError

    before = keyring.get_keyring()
    keyring.set_keyring(Memory())
    try:
        assert find_token("team", "https://x.org/r") == "from-keyring"
        assert find_token("team", "https://y.org/r") is None
        monkeypatch.setenv("COMPOSABLE_TOKEN_TEAM", "from-environment")
        monkeypatch.setenv("COMPOSABLE_ORIGIN_TEAM", "https://x.org")
        assert find_token("team", "https://x.org/r") == "from-environment"
        monkeypatch.setenv("COMPOSABLE_TOKEN_TEAM", "two\nlines")
        with pytest.raises(RegistryError, match="one word of ASCII text") as caught:
            find_token("team", "https://x.org/r")
        assert "two" not in str(caught.value)
    finally:
        keyring.set_keyring(before)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:secret@example.org/r", "must not contain a user name or a password"),
        ("https://example.org/r?token=secret", "not the URL of a folder"),
        ("https:///r", "not the URL of a folder"),
    ],
)
def test_locations_that_hold_secrets_are_refused(url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        open_registry(url)
    assert "secret" not in str(caught.value)


def test_a_token_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSABLE_TOKEN_TEAM", "x")
    monkeypatch.setenv("COMPOSABLE_ORIGIN_TEAM", "http://example.org")
    with pytest.raises(RegistryError, match="sent unencrypted"):
        open_registry("http://example.org/r", name="team")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composable.packaging.registry.budget.MAX_RETRIES", 1)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        open_registry(f"http://127.0.0.1:{free_port()}/r").versions("german")


def test_a_server_that_stays_busy(nginx: Nginx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composable.packaging.registry.budget.MAX_RETRIES", 1)
    with pytest.raises(UnreachableError, match="HTTP status 503"):
        open_registry(f"{nginx.url}/busy").versions("german")


def test_a_static_web_server_cannot_be_published_to(
    nginx: Nginx, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    with pytest.raises(RegistryError, match="is read only: HTTP status 40"):
        open_for_publishing(nginx.url).publish(make_expert(), interface=interface)


def serve_once(answer: bytes, times: int) -> str:
    """Serve one canned answer to some connections, whatever is asked; return the URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(times):
            client, _ = listener.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(answer)
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_without_ranges_is_read_from_the_beginning() -> None:
    body = bytes(range(200))
    url = serve_once(b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + body, 1)
    assert b"".join(WebStorage(url).stream("x", 150)) == body[150:]


def test_a_server_that_sends_another_range_is_not_believed() -> None:
    head = b"HTTP/1.1 206 Partial\r\nContent-Length: 2\r\nContent-Range: bytes 0-1/200\r\n\r\nxx"
    with pytest.raises(UnreachableError, match="sent the range"):
        list(WebStorage(serve_once(head, 1), budget=TimeBudget(max_retries=0)).stream("x", 150))


def test_a_document_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small answer that unpacks to far more than a document may have."""
    import gzip

    monkeypatch.setattr("composable.packaging.registry.remote.MAX_DOCUMENT_BYTES", 1 << 20)
    bomb = gzip.compress(b"\0" * (32 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    with pytest.raises(RegistryError, match="larger than"):
        WebStorage(serve_once(head + bomb, 1)).read("index")


def test_a_half_document_is_asked_for_again() -> None:
    text = json.dumps({"a": 1}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + text
    with pytest.raises(UnreachableError, match="connection was lost"):
        WebStorage(serve_once(answer, 5), budget=TimeBudget(first_pause_seconds=0.0)).read("index")


def answer_of(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(("HTTP/1.1 200 OK", "Connection: close", *headers, "", "")).encode() + body


def compress_by_line(lines: list[bytes], n_sent: int) -> bytes:
    """Return what a server has sent of a response that it compresses line by line."""
    stream = zlib.compressobj(wbits=31)
    sent = [stream.compress(line) + stream.flush(zlib.Z_SYNC_FLUSH) for line in lines]
    return b"".join(sent[:n_sent])


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize("way", ["no length", "short length", "gzip without trailer"])
def test_an_index_cut_at_the_end_of_a_line_is_no_older_version(
    tmp_path: Path, is_older: bool, way: str
) -> None:
    """Indexes of before 0.3 do not state their extent; of these a short length goes unnoticed."""
    rows = [{"name": "german", "version": f"1.{minor}.0"} for minor in range(3)]
    data = format_document(rows)
    if is_older:
        data = b"".join(format_line(row) + b"\n" for row in rows)
    lines = data.splitlines(keepends=True)
    cut = b"".join(lines[:2])
    packed = compress_by_line(lines, 2)
    answer = {
        "no length": answer_of(cut),
        "short length": answer_of(cut, f"Content-Length: {len(cut)}"),
        "gzip without trailer": answer_of(
            packed, f"Content-Length: {len(packed)}", "Content-Encoding: gzip"
        ),
    }[way]
    storage = CachedStorage(
        WebStorage(serve_once(answer, 9), budget=TimeBudget(5, max_retries=1)), tmp_path / "cache"
    )
    if is_older and way == "short length":
        assert storage.read(index_path("german")) == Document(cut, None)
        return
    with pytest.raises(UnreachableError, match="truncated"):
        storage.read(index_path("german"))
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_a_whole_index_needs_no_length(tmp_path: Path) -> None:
    data = format_document([{"name": "german", "version": "1.0.0"}])
    storage = CachedStorage(WebStorage(serve_once(answer_of(data), 1)), tmp_path)
    document = storage.read(index_path("german"))
    assert document is not None and document.data == data
