"""Proxies, and servers with habits: real ones on loopback."""

from __future__ import annotations

import base64
import gzip
import http.server
import re
import threading
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from composable.errors import RegistryError, UnreachableError
from composable.packaging import open_registry
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.proxy import find_proxy

FAR = "http://registry.test/r"
Answer = tuple[int, bytes, dict[str, str]]


class Server(http.server.ThreadingHTTPServer):
    """A server on loopback; as a proxy every host name is this machine."""

    daemon_threads = True

    def __init__(self, answer: Callable[[http.server.BaseHTTPRequestHandler], Answer]) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append((self.path, dict(self.headers)))
                status, body, headers = answer(self)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_CONNECT(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[http.server.BaseHTTPRequestHandler], Answer]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{kind}_proxy", raising=False)
        monkeypatch.delenv(f"{kind}_proxy".upper(), raising=False)


def relay(secret: str | None) -> Callable[[http.server.BaseHTTPRequestHandler], Answer]:
    """Answer what is asked for through a proxy that wants `NAME:PASSWORD`."""
    want = None if secret is None else "Basic " + base64.b64encode(secret.encode()).decode()

    def answer(request: http.server.BaseHTTPRequestHandler) -> Answer:
        if want is not None and request.headers.get("Proxy-Authorization") != want:
            return 407, b"", {"Proxy-Authenticate": 'Basic realm="office"'}
        return 200, urllib.parse.urlsplit(request.path).path.encode(), {}

    return answer


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", ""])
@pytest.mark.parametrize(
    ("written", "secret"),
    [
        ("", None),
        ("jane:secret@", "jane:secret"),
        ("jane:p%40s%3As@", "jane:p@s:s"),
        ("jane:p@ss@", "jane:p@ss"),
        ("jane@", "jane:"),
        ("j%C3%B6rg:%C3%BC@", "jörg:ü"),
    ],
)
def test_a_proxy_is_used_and_gets_its_password(
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    scheme: str,
    written: str,
    secret: str | None,
) -> None:
    proxy = serve(relay(secret))
    monkeypatch.setenv(variable, f"{scheme}{written}{proxy.host}/")
    document = WebStorage(FAR).read("index")
    assert document is not None and document.data == b"/r/index"
    assert b"".join(WebStorage(FAR).stream("blob")) == b"/r/blob"
    assert [path for path, _ in proxy.asked] == [f"{FAR}/index", f"{FAR}/blob"]
    assert not any("Authorization" in headers for _, headers in proxy.asked)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("written", ["", "jane:wrong@"])
def test_a_proxy_that_wants_a_password_is_named_and_the_hint_cures_it(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, scheme: str, written: str
) -> None:
    proxy = serve(relay("jane:right"))
    monkeypatch.setenv("ALL_PROXY", f"http://{written}{proxy.host}")
    with pytest.raises(RegistryError, match=f"the proxy {proxy.url} .*407") as caught:
        WebStorage(f"{scheme}://registry.test/r").read("index")
    assert not isinstance(caught.value, UnreachableError), "asking again would not help"
    assert len(proxy.asked) == 1
    assert "wrong" not in str(caught.value)
    found = re.search(r"set (\S+)=(\S+),", str(caught.value))
    assert found is not None
    monkeypatch.setenv(found[1], found[2].replace("NAME", "jane").replace("PASSWORD", "right"))
    assert WebStorage(FAR).read("index") is not None


def test_hosts_that_are_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "proxy.test:3128")
    monkeypatch.setenv("https_proxy", "http://other.test")
    monkeypatch.setenv("NO_PROXY", "near.test,.house.test")
    far, safe = find_proxy("http://far.test/r"), find_proxy("https://far.test/r")
    assert far is not None and (far.url, far.variable) == ("http://proxy.test:3128", "all_proxy")
    assert safe is not None and (safe.url, safe.variable) == ("http://other.test", "https_proxy")
    assert find_proxy("http://near.test:8080/r") is None
    assert find_proxy("https://a.house.test/r") is None


@pytest.mark.parametrize(
    "value", ["http://me:secret@h:port", "ftp://me:secret@h", "http://me:sec#ret@h", "http://"]
)
def test_what_is_no_proxy_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("http_proxy", value)
    with pytest.raises(RegistryError, match="http_proxy: is not the address of a proxy") as caught:
        WebStorage(FAR)
    assert "sec" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    with pytest.raises(
        UnreachableError, match=r"through the proxy http://127\.0\.0\.1:1"
    ) as caught:
        WebStorage(FAR, budget=TimeBudget(max_retries=0)).read("index")
    assert "secret" not in str(caught.value)


def test_a_socks_proxy_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setenv("all_proxy", "socks5h://me:secret@proxy.test:1080")
    monkeypatch.setitem(sys.modules, "socks", None)
    with pytest.raises(RegistryError, match="needs the package PySocks") as caught:
        WebStorage(FAR).read("index")
    assert "secret" not in str(caught.value)


def test_a_token_for_this_machine_does_not_go_through_a_proxy(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(relay(None))
    registry = serve(lambda _: (200, b"text", {}))
    monkeypatch.setenv("http_proxy", proxy.url)
    assert WebStorage(registry.url, "token").read("index") is not None
    assert proxy.asked == []
    assert registry.asked[0][1]["Authorization"] == "Bearer token"


def folder(root: Path, missing: int) -> Callable[[http.server.BaseHTTPRequestHandler], Answer]:
    """Serve a folder; answer `missing` for what is not there."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> Answer:
        path = root / request.path.lstrip("/")
        return (200, path.read_bytes(), {}) if path.is_file() else (missing, b"", {})

    return answer


def test_a_server_that_answers_403_for_what_is_not_there(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """As buckets do behind a web server, unless they may be listed."""
    (tmp_path / "config.json").write_text('{"kind":"composable-registry","schema":1}')
    remote = open_registry(serve(folder(tmp_path, 403)).url)
    assert remote.versions("german") == ()
    assert remote.names() == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_shows_nothing_is_not_an_empty_one(
    serve: Callable[..., Server], tmp_path: Path, status: int
) -> None:
    with pytest.raises(RegistryError, match=f"HTTP status {status}") as caught:
        open_registry(serve(folder(tmp_path, status)).url).versions("german")
    assert "token" in str(caught.value)


def test_401_is_never_missing(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind":"composable-registry","schema":1}')
    with pytest.raises(RegistryError, match="HTTP status 401"):
        open_registry(serve(folder(tmp_path, 401)).url).versions("german")


TEXT = bytes(range(256)) * 400
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "gzip, gzip": lambda data: gzip.compress(gzip.compress(data)),
    "identity": lambda data: data,
}


@pytest.mark.parametrize("encoding", PACKINGS)
@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("start", [0, 1, 70_000, len(TEXT)])
def test_a_compressed_answer_that_nobody_asked_for_is_unpacked(
    serve: Callable[..., Server], encoding: str, has_ranges: bool, start: int
) -> None:
    data = PACKINGS[encoding](TEXT)

    def answer(request: http.server.BaseHTTPRequestHandler) -> Answer:
        headers = {"Content-Encoding": encoding}
        found = re.match(r"bytes=(\d+)-$", request.headers.get("Range") or "")
        if found is None or not has_ranges:
            return 200, data, headers
        first = int(found[1])
        if first >= len(data):
            return 416, b"", {}
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return 206, data[first:], headers

    storage = WebStorage(serve(answer).url)
    assert b"".join(storage.stream("blob", start)) == TEXT[start:]
    document = storage.read("index")
    assert document is not None and document.data == TEXT


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "aes128gcm", "x" * 500])
def test_a_compression_that_is_not_known_is_named(
    serve: Callable[..., Server], encoding: str
) -> None:
    server = serve(lambda _: (200, b"\x0b\x02\x80text\x03", {"Content-Encoding": encoding}))
    for read in (lambda s: s.read("index"), lambda s: list(s.stream("blob"))):
        with pytest.raises(RegistryError, match="is compressed with") as caught:
            read(WebStorage(server.url))
        assert encoding.rpartition(" ")[2][:40] in str(caught.value)
        assert len(str(caught.value)) < 400
    assert len(server.asked) == 2


def test_bytes_that_are_not_packed_as_they_claim(serve: Callable[..., Server]) -> None:
    server = serve(lambda _: (200, b"plain text", {"Content-Encoding": "gzip"}))
    with pytest.raises(UnreachableError, match="response is damaged"):
        WebStorage(server.url, budget=TimeBudget(max_retries=0)).read("index")
