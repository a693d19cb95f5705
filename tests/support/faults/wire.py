"""Downloads from a server that cuts connections, lies and recovers.

The server is a real one, on loopback. A trick spoils its answers for one file, once or always:

1. The command exits with 0 and what is in use is right, or with 1 and an error of ours, and nothing
   is in use.
2. Once the server is honest, the next command works. After a cut it asks only for what is missing,
   to the chunk.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composable.packaging.manifests.manifest import CHUNK_BYTES
from composable.packaging.registry import budget
from tests.support.faults.processes import Ending, run_forked
from tests.support.faults.scenarios import Scenario, publish
from tests.support.faults.worlds import CorruptionError, Inputs, State, World, inspect

LARGE_BYTES = 2 * CHUNK_BYTES + CHUNK_BYTES // 2


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server sends.

    Args:
        status: Its code.
        headers: Its headers.
        body: Its body.
        stop: Bytes of head and body after which the connection is cut; None for none.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    stop: int | None = None


# Spoils an answer; told the whole file and the offset that was asked for.
Spoil = Callable[[Answer, bytes, int], Answer]


@dataclass(frozen=True, kw_only=True)
class Trick:
    """A way to spoil answers.

    Args:
        name: What it is called in reports.
        spoil: Makes the bad answer of the good one.
        times: How many answers are spoilt; None for all.
        kept: Bytes of the file that arrive before it breaks; None where that cannot be said.
    """

    name: str
    spoil: Spoil
    times: int | None = 1
    kept: int | None = None


@dataclass(kw_only=True)
class Wiring:
    """What came of playing tricks.

    Args:
        tries: Tricks played.
        survived: Commands that succeeded in spite of the trick.
        refused: Commands that ended with an error of ours.
        resumed: Second commands that fetched less than the whole.
        failures: What went wrong.
    """

    tries: int = 0
    survived: int = 0
    refused: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)


class TrickyServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A static server of a folder that plays a trick on one file.

    Args:
        root: The folder.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.trick: Trick | None = None
        self.target = ""
        self.sent = 0
        self._left = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def play(self, trick: Trick | None, target: str) -> None:
        """Play a trick on a file from now on, and count what is sent of that file anew."""
        with self._lock:
            self.trick, self.target = trick, target
            self._left = -1 if trick is None or trick.times is None else trick.times
            self.sent = 0

    def spoil(self, path: str, answer: Answer, whole: bytes, start: int) -> Answer:
        """Return the answer to send."""
        with self._lock:
            if path != self.target:
                return answer
            if self.trick is not None and self._left != 0:
                self._left -= 1
                answer = self.trick.spoil(answer, whole, start)
            sent = len(answer.body) if answer.stop is None else min(answer.stop, len(answer.body))
            self.sent += max(sent, 0)
            return answer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: TrickyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        file = self.server.root / path
        if not file.is_file():
            self._send(Answer(status=404, headers={"Content-Length": "0"}, body=b""))
            return
        whole = file.read_bytes()
        start = 0
        headers = {"ETag": f'"{len(whole)}"'}
        if found := self.headers.get("Range"):
            start = int(found.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        body = whole[start:]
        headers["Content-Length"] = str(len(body))
        status = 206 if start else 200
        answer = Answer(status=status, headers=headers, body=body)
        self._send(self.server.spoil(path, answer, whole, start))

    def _send(self, answer: Answer) -> None:
        head = f"HTTP/1.1 {answer.status} Some\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        data = head.encode() + b"\r\n" + answer.body
        # Stops count from the first byte of the body; negative ones cut the head.
        stop = None if answer.stop is None else len(head) + 2 + answer.stop
        with contextlib.suppress(OSError):
            self.wfile.write(data[:stop])
            self.wfile.flush()
            if answer.stop is not None or "Content-Length" not in answer.headers:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _cut(stop: int) -> Spoil:
    """Cut the connection before byte `stop` of the file."""

    def spoil(answer: Answer, whole: bytes, start: int) -> Answer:
        return Answer(
            status=answer.status,
            headers=answer.headers,
            body=answer.body,
            stop=max(stop - start, 0) if stop >= 0 else stop,
        )

    return spoil


def _with(change: Callable[[Answer, bytes, int], dict[str, Any]]) -> Spoil:
    """Change some fields of an answer."""

    def spoil(answer: Answer, whole: bytes, start: int) -> Answer:
        fields = {"status": answer.status, "headers": dict(answer.headers), "body": answer.body}
        return Answer(**{**fields, **change(answer, whole, start)})

    return spoil


def _flip(body: bytes, position: int) -> bytes:
    if not body:
        return body
    bad = bytearray(body)
    bad[position % len(bad)] ^= 0x10
    return bytes(bad)


def tricks(size: int) -> Iterator[Trick]:
    """Yield tricks on a file of this size: cuts at every interesting byte, then lies."""
    chunk = CHUNK_BYTES
    near = {b + d for b in range(0, size + 1, chunk) for d in (-1, 0, 1)} | {size - 1, size // 3}
    for stop in sorted(byte for byte in near if 0 <= byte < size):
        yield Trick(name=f"cut at byte {stop:,}", spoil=_cut(stop), kept=stop)
        yield Trick(name=f"always cut at byte {stop:,}", spoil=_cut(stop), times=None, kept=stop)
    for stop in (-1, -2, -20, -1000):
        yield Trick(name=f"cut {-stop} bytes before the end of the head", spoil=_cut(stop))
    no_length = {"Connection": "close"}
    lies: dict[str, Callable[[Answer, bytes, int], dict[str, Any]]] = {
        "no length, and the half": lambda a, w, s: {
            "headers": no_length, "body": a.body[: len(a.body) // 2]
        },
        "a length too long": lambda a, w, s: {
            "headers": {**a.headers, "Content-Length": str(len(a.body) + 10)},
            "stop": len(a.body),
        },
        "a length too short": lambda a, w, s: {
            "headers": {**a.headers, "Content-Length": str(max(len(a.body) - 10, 0))},
        },
        "a length that is none": lambda a, w, s: {
            "headers": {**a.headers, "Content-Length": "many"}, "stop": len(a.body)
        },
        "bytes after the end": lambda a, w, s: {
            "headers": {**a.headers, "Content-Length": str(len(a.body) + 3)},
            "body": a.body + b"???",
        },
        "nothing at all": lambda a, w, s: {
            "headers": {"Content-Length": "0"}, "body": b""
        },
        "a wrong first byte": lambda a, w, s: {"body": _flip(a.body, 0)},
        "a wrong middle byte": lambda a, w, s: {"body": _flip(a.body, len(a.body) // 2)},
        "a wrong last byte": lambda a, w, s: {"body": _flip(a.body, -1)},
        "another file": lambda a, w, s: {"body": bytes(len(a.body))},
        "503": lambda a, w, s: {
            "status": 503, "headers": {"Content-Length": "0"}, "body": b""
        },
        "500 with a page": lambda a, w, s: {
            "status": 500, "headers": {"Content-Length": "4"}, "body": b"oops"
        },
        "404": lambda a, w, s: {
            "status": 404, "headers": {"Content-Length": "0"}, "body": b""
        },
        "304 unasked": lambda a, w, s: {
            "status": 304, "headers": {"Content-Length": "0"}, "body": b""
        },
        "416": lambda a, w, s: {
            "status": 416, "headers": {"Content-Length": "0"}, "body": b""
        },
        "a redirect to itself": lambda a, w, s: {
            "status": 302, "headers": {"Content-Length": "0", "Location": "?again"}, "body": b""
        },
        "packed, though nobody asked": lambda a, w, s: (lambda packed: {
            "headers": {"Content-Encoding": "gzip", "Content-Length": str(len(packed))},
            "body": packed,
        })(gzip.compress(a.body)),
    }  # fmt: skip
    for name, lie in lies.items():
        yield Trick(name=name, spoil=_with(lie))
        yield Trick(name=f"always {name}", spoil=_with(lie), times=None)

    # What matters only to a client that resumes: the first answer is cut, the next one lies.
    def then(second: Callable[[Answer, bytes, int], dict[str, Any]]) -> Spoil:
        def spoil(answer: Answer, whole: bytes, start: int) -> Answer:
            first = _cut(size // 2)
            return _with(second)(answer, whole, start) if start else first(answer, whole, start)

        return spoil

    resumed: dict[str, Callable[[Answer, bytes, int], dict[str, Any]]] = {
        "the range ignored": lambda a, w, s: {
            "status": 200, "headers": {"Content-Length": str(len(w))}, "body": w
        },
        "another range": lambda a, w, s: {
            "headers": {**a.headers, "Content-Range": f"bytes 0-{len(w) - 1}/{len(w)}"}
        },
        "a range that lies": lambda a, w, s: {"body": w[: len(a.body)]},
        "no range named": lambda a, w, s: {
            "headers": {"Content-Length": str(len(a.body))}
        },
        "the rest damaged": lambda a, w, s: {"body": _flip(a.body, 7)},
    }  # fmt: skip
    for name, second in resumed.items():
        yield Trick(name=f"cut, then {name}", spoil=then(second), times=2)
        yield Trick(name=f"cut, then always {name}", spoil=then(second), times=None)


def play_tricks(
    inputs: Inputs, scratch: Path, *, size: int = LARGE_BYTES, every: int = 1, offset: int = 0
) -> Wiring:
    """Play tricks on the download of one large file.

    Args:
        inputs: What commands read.
        scratch: An empty folder to work in.
        size: Of the file, roughly.
        every: Take only each n-th trick.
        offset: Of those, begin with this one.
    """
    wiring = Wiring()
    scenario = Scenario(name="", before=(publish("german", "1.0.0", size=size),), steps=())
    world = scenario.prepare(scratch / "world", inputs)
    with serve(world.root / "registry") as server:
        release = world.registry.versions("german")[0]
        file = max(release.files, key=lambda file: file.size)
        target = f"blobs/{file.digest[7:9]}/{file.digest[7:]}"
        project = world.project / "composable.toml"
        project.write_text(project.read_text().replace("../registry", server.url))
        clean = _run(world, "install", "german", "--quiet")
        if clean.code != 0:
            raise RuntimeError(str(clean))
        wanted = inspect(world)
        for trick in list(tricks(file.size))[offset::every]:
            wiring.tries += 1
            try:
                _play(world, server, trick, target, file.size, wanted, wiring)
            except CorruptionError as error:
                wiring.failures.append(f"{trick.name}: {error}")
    return wiring


@contextlib.contextmanager
def serve(root: Path) -> Iterator[TrickyServer]:
    """Serve a folder for the block."""
    server = TrickyServer(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _run(world: World, *arguments: str) -> Ending:
    def run() -> int:
        budget.FIRST_PAUSE_SECONDS = 0.001  # type: ignore[misc]
        return world.run(*arguments)

    return run_forked(run)


def _play(
    world: World,
    server: TrickyServer,
    trick: Trick,
    target: str,
    size: int,
    wanted: State,
    wiring: Wiring,
) -> None:
    import shutil

    for folder in (world.root / "store", world.project / ".composable"):
        shutil.rmtree(folder, ignore_errors=True)
    server.play(trick, target)
    ending = _run(world, "sync", "--frozen", "--quiet")
    state = inspect(world)
    if ending.code == 0:
        wiring.survived += 1
        if state.installed != wanted.installed:
            raise CorruptionError("exit 0, but another thing is in use")
    elif ending.code == 1 and "error: " in ending.output and "Traceback" not in ending.output:
        wiring.refused += 1
        if state.installed is not None:
            raise CorruptionError("an error, but something is in use")
    else:
        raise CorruptionError(str(ending))
    server.play(None, target)
    again = _run(world, "sync", "--frozen", "--quiet")
    if again.code != 0:
        raise CorruptionError(f"with an honest server: {again}")
    if inspect(world).installed != wanted.installed:
        raise CorruptionError("with an honest server, another thing is in use")
    if ending.code == 0 and server.sent:
        raise CorruptionError("fetched twice")
    if ending.code == 1 and trick.kept is not None:
        whole_chunks = trick.kept // CHUNK_BYTES * CHUNK_BYTES
        if server.sent > size - whole_chunks:
            raise CorruptionError(f"fetched {server.sent:,} bytes again, had {whole_chunks:,}")
        wiring.resumed += whole_chunks > 0
    if left := list((world.root / "store" / "partial").glob("*")):
        raise CorruptionError(f"left over: {left}")
