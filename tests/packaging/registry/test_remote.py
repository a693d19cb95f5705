"""Waiting: servers on loopback that say nothing, too little, or ask to be left alone."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from composable.errors import RegistryError, UnreachableError
from composable.packaging import Registry
from composable.packaging.registry.bucket import BucketStorage
from composable.packaging.registry.budget import TimeBudget, current_budget, share_budget
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.remote import BYTES_PER_SECOND
from composable.packaging.registry.storage import Document

pytestmark = pytest.mark.slow

# Far above what any of these may take, far below what they took without a budget.
SLACK_SECONDS = 3.0
Talk = Callable[[socket.socket, bytes], None]


@contextmanager
def serve(talk: Talk) -> Iterator[tuple[str, list[bytes]]]:
    """Serve connections, one request each; yield the URL and the requests that came."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []

    def answer(client: socket.socket) -> None:
        with client:
            request = client.recv(1 << 16)
            asked.append(request)
            with suppress(OSError):
                talk(client, request)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.close()


def reply(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def hurried(seconds: float = 0.4, **settings: float) -> TimeBudget:
    defaults = {"silent_seconds": seconds / 2, "notice_seconds": seconds / 8}
    return TimeBudget(seconds, first_pause_seconds=0.0, **{**defaults, **settings})  # type: ignore[arg-type]


def trickle(client: socket.socket, data: bytes) -> None:
    for byte in data:
        client.sendall(bytes([byte]))
        time.sleep(0.02)


HEAD = b"HTTP/1.1 200 OK\r\n"
TALKS: dict[str, Talk] = {
    "says nothing": lambda client, _: time.sleep(60),
    "stops in the head": lambda client, _: (client.sendall(HEAD[:9]), time.sleep(60)),
    "one byte of the head at a time": lambda client, _: trickle(client, HEAD + b"X: " + b"y" * 900),
    "stops in the body": lambda client, _: (
        client.sendall(HEAD + b"Content-Length: 9\r\n\r\nx"),
        time.sleep(60),
    ),
    "one byte of the body at a time": lambda client, _: (
        client.sendall(HEAD + b"Content-Length: 900\r\n\r\n"),
        trickle(client, b"x" * 900),
    ),
    "one byte of a chunk's size at a time": lambda client, _: (
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
        trickle(client, b"0" * 900),
    ),
    "packed bytes that never yield one": lambda client, _: (
        client.sendall(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 900\r\n\r\n"),
        trickle(client, b"\x1f\x8b\x08\x08\0\0\0\0\0\0" + b"n" * 890),
    ),
    "a redirect whose body does not come": lambda client, _: (
        client.sendall(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 9\r\n\r\n"),
        time.sleep(60),
    ),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("what", ["document", "file"])
def test_a_server_that_does_not_deliver_is_given_up(
    talk: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(TALKS[talk]) as (url, _):
        storage = WebStorage(url, budget=hurried())
        began = time.monotonic()
        with pytest.raises(UnreachableError, match=r"sent (nothing|only)") as caught:
            storage.read("index") if what == "document" else list(storage.stream("blob"))
        assert time.monotonic() - began < SLACK_SECONDS
    assert url in str(caught.value)
    assert "COMPOSABLE_MAX_WAIT" in str(caught.value)
    assert re.search(rf"waiting for {url}/\w+, until \d\d:\d\d:\d\d at the latest", caplog.text)


def test_a_bucket_that_does_not_answer_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("obstore")
    with serve(TALKS["says nothing"]) as (url, _):
        for name, value in {"ENDPOINT_URL": url, "ALLOW_HTTP": "true", "REGION": "x"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        for call in (
            lambda bucket: bucket.read("config.json"),
            lambda bucket: list(bucket.stream("blobs/x")),
            lambda bucket: bucket.create("config.json", b""),
            lambda bucket: bucket.names_in("records"),
        ):
            began = time.monotonic()
            with pytest.raises(UnreachableError, match="sent nothing"):
                call(BucketStorage("s3://bucket/registry", budget=hurried()))
            assert time.monotonic() - began < SLACK_SECONDS
    assert "waiting for s3://bucket/registry/config.json, until" in caplog.text


def test_a_slow_server_that_delivers_may_take_longer_than_the_budget() -> None:
    """What arrives at a fair rate is not waited for in vain."""
    body = b"x" * (BYTES_PER_SECOND // 10)

    def talk(client: socket.socket, _: bytes) -> None:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (20 * len(body)))
        for _ in range(20):
            client.sendall(body)
            time.sleep(0.05)

    with serve(talk) as (url, _):
        began = time.monotonic()
        document = WebStorage(url, budget=hurried()).read("index")
        assert time.monotonic() - began > 2 * hurried().request_seconds
    assert document is not None and document.data == 20 * body


@pytest.mark.parametrize(
    ("header", "asked"),
    [
        ("3600", "3,600 s, until"),
        ("9" * 400, "more than a day"),
        ("Fri, 31 Dec 2099 23:59:59 GMT", "more than a day"),
        ("Fri, 31 Dec 9999 23:59:59 -0000", "more than a day"),
    ],
)
@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_a_server_that_asks_to_wait_too_long_is_not_waited_for(
    header: str, asked: str, status: str
) -> None:
    with serve(lambda c, _: c.sendall(reply(status, Retry_After=header))) as (url, requests):
        for read in (lambda s: s.read("index"), lambda s: list(s.stream("blob"))):
            with pytest.raises(UnreachableError, match=asked) as caught:
                read(WebStorage(url, budget=hurried()))
            assert len(str(caught.value)) < 400
        assert len(requests) == 2, "asked once each"


@pytest.mark.parametrize("header", ["soon", "-5", "1.5", "0", "Thu, 01 Jan 1970 00:00:00 GMT", ""])
def test_a_server_that_names_no_time_is_asked_a_few_times(header: str) -> None:
    with serve(lambda c, _: c.sendall(reply("429 Busy", Retry_After=header))) as (url, requests):
        with pytest.raises(UnreachableError, match=r"HTTP status 429 Busy \(5 attempts"):
            WebStorage(url, budget=hurried(2.0)).read("index")
        assert len(requests) == 5


def test_the_hint_of_a_wait_that_is_too_long_cures_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    busy = [True]

    def talk(client: socket.socket, _: bytes) -> None:
        first, busy[0] = busy[0], False
        client.sendall(reply("429 Busy", Retry_After="1") if first else reply("200 OK", b"text"))

    with serve(talk) as (url, _):
        with pytest.raises(UnreachableError, match="asks to wait 1 s") as caught:
            WebStorage(url, budget=hurried(0.5)).read("index")
        (setting,) = re.findall(r"COMPOSABLE_MAX_WAIT=(\d+)", str(caught.value))
        monkeypatch.setenv("COMPOSABLE_MAX_WAIT", setting)
        busy[0] = True
        budget = TimeBudget(notice_seconds=0.5)
        assert WebStorage(url, budget=budget).read("index") == Document(b"text", None)
    assert re.search(r"HTTP status 429 Busy; asking again at \d\d:\d\d:\d\d", caplog.text)


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", "1e999"])
def test_a_setting_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("COMPOSABLE_MAX_WAIT", value)
    with pytest.raises(RegistryError, match="not a number of seconds"):
        TimeBudget()


def test_a_command_has_one_budget_for_all_its_requests() -> None:
    with serve(TALKS["says nothing"]) as (url, requests):
        budget = hurried()
        began = time.monotonic()
        for number in range(6):
            with pytest.raises(UnreachableError):
                Registry(WebStorage(url, budget=budget)).versions(f"package{number}")
        assert time.monotonic() - began < 2 * budget.request_seconds + SLACK_SECONDS / 2
        assert budget.left <= 0
    assert len(requests) <= 10


def test_storages_that_are_opened_for_a_command_share_its_budget() -> None:
    with share_budget():
        assert current_budget() is current_budget()
    assert current_budget() is not current_budget()


def test_time_that_threads_wait_together_counts_once() -> None:
    budget = TimeBudget(10)
    time.sleep(0.1)
    for _ in range(8):
        budget.charge(0.1)
    assert 0.05 < 20 - budget.left < 0.2


def test_a_small_blob_is_not_tried_by_two_layers() -> None:
    with serve(lambda c, _: c.sendall(reply("500 Oops"))) as (url, requests):
        with pytest.raises(UnreachableError, match=r"\(5 attempts"):
            Registry(WebStorage(url, budget=hurried(2.0))).read_blob(
                f"sha256:{'0' * 64}", "manifest", 100
            )
        assert len(requests) == 5


def test_what_breaks_off_is_resumed_and_a_byte_a_time_is_given_up() -> None:
    def talk(client: socket.socket, request: bytes) -> None:
        found = re.search(rb"bytes=(\d+)-", request)
        start = int(found[1]) if found else 0
        head = b"HTTP/1.1 %d Some\r\nContent-Range: bytes %d-8/9\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % (206 if start else 200, start, 9 - start))
        client.sendall(b"some text"[start : start + 1])

    with serve(talk) as (url, _):
        assert b"".join(WebStorage(url, budget=hurried(5.0)).stream("blob")) == b"some text"
        budget = TimeBudget(0.5, first_pause_seconds=0.1)
        with pytest.raises(UnreachableError, match="connection was lost"):
            list(WebStorage(url, budget=budget).stream("blob"))


def test_a_caller_that_wants_no_more_ends_the_attempt() -> None:
    with serve(lambda c, _: c.sendall(reply("200 OK", b"x" * (8 << 20)))) as (url, _):
        before = threading.active_count()
        pieces = WebStorage(url, budget=hurried(5.0)).stream("blob")
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    end = time.monotonic() + SLACK_SECONDS
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("head", "body", "is_known"),
    [
        (b"Content-Length: 4\r\n", b"text", True),
        (b"Transfer-Encoding: chunked\r\n", b"4\r\ntext\r\n0\r\n\r\n", True),
        (b"", b"text", False),
    ],
)
def test_whether_a_document_may_be_truncated(head: bytes, body: bytes, is_known: bool) -> None:
    with serve(lambda c, _: c.sendall(HEAD + head + b"\r\n" + body)) as (url, _):
        document = WebStorage(url, budget=hurried(5.0)).read("index")
    assert document is not None
    assert (document.data, document.is_length_known) == (b"text", is_known)


def test_a_command_that_has_waited_too_long_asks_no_more() -> None:
    budget = hurried(0.1)
    time.sleep(0.3)
    budget.charge(0.3)
    with serve(lambda c, _: c.sendall(reply("200 OK"))) as (url, requests):
        with pytest.raises(UnreachableError, match="waited too long"):
            WebStorage(url, budget=budget).read("index")
        assert requests == []


def test_a_quiet_logger_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="composable")
    TimeBudget().notify("text")
    assert caplog.text == ""


def _open_storage(
    kind: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> WebStorage | BucketStorage:
    if kind == "web":
        return WebStorage(url, budget=hurried())
    settings = {
        **{"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"},
        **{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return BucketStorage("s3://experts/registry", budget=hurried(5.0))


@pytest.mark.parametrize("kind", ["web", "bucket"])
@pytest.mark.parametrize("status", ["403 Forbidden", "401 Unauthorized"])
def test_a_refusal_means_missing_only_where_another_file_could_be_read(
    kind: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(client: socket.socket, request: bytes) -> None:
        if b"config.json" not in request.split(b"\r\n")[0] or is_closed:
            client.sendall(reply(status))
            return
        date = "Thu, 01 Jan 2026 00:00:00 GMT"
        client.sendall(reply("200 OK", b"{}", ETag='"1"', Last_Modified=date))

    is_closed = True
    with serve(talk) as (url, _):
        storage = _open_storage(kind, url, monkeypatch)
        for path in ("config.json", "index/ge/german.jsonl"):
            with pytest.raises(RegistryError, match=r"403|401|permission denied"):
                storage.read(path)
        is_closed = False
        assert storage.read("config.json") is not None
        if status.startswith("403"):
            assert storage.read("index/ge/german.jsonl") is None
        else:
            with pytest.raises(RegistryError, match=r"401|permission denied"):
                storage.read("index/ge/german.jsonl")
        with pytest.raises(RegistryError, match=r"403|401|permission denied"):
            list(storage.stream("blobs/aa/aa"))
