"""Downloads: resumed by chunk, verified whatever is left over, the same bytes in the end."""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from composable.errors import DiskError, IntegrityError, RegistryError, UnreachableError
from composable.packaging import Registry, Store
from composable.packaging.install import download
from composable.packaging.install.download import download_file, download_files, require_space
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry.budget import MAX_RETRIES, TimeBudget
from composable.packaging.registry.remote import Answer, RemoteStorage

CHUNK = 1000
# What an answer may bring before it is known that no more is wanted: three pieces.
READ_AHEAD = 900


class Wire(RemoteStorage):
    """A remote storage with one file, which breaks off and lies as it is told.

    Args:
        data: The file.
        cuts: Bytes that each further answer sends before it breaks off; then whole answers.
        spoil: Offsets that arrive changed in each further answer; then none do.
    """

    def __init__(self, data: bytes, cuts: list[int] | None = None, spoil: list[int] | None = None):
        super().__init__("wire://x", TimeBudget(first_pause_seconds=0.0))
        self.data = data
        self.cuts = cuts or []
        self.spoil = spoil or []
        self.sent = 0
        self.starts: list[int] = []

    def _open_document(self, path: str, tag: str | None) -> Answer | None:
        return None

    def _open_file(self, path: str, start: int) -> Answer | None:
        return Answer(self._send(start))

    def _send(self, start: int) -> Iterator[bytes]:
        self.starts.append(start)
        data = bytearray(self.data)
        if self.spoil:
            data[self.spoil.pop(0)] ^= 1
        stop = start + self.cuts.pop(0) if self.cuts else None
        for offset in range(start, len(data) if stop is None else min(stop, len(data)), 300):
            piece = bytes(data[offset : min(offset + 300, stop or len(data))])
            self.sent += len(piece)
            yield piece
        if stop is not None and stop < len(data):
            raise UnreachableError("cut", where=self.location)


def describe(data: bytes, *, is_chunked: bool = True) -> PackageFile:
    pieces = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    chunks = tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    chunks = chunks if is_chunked and len(chunks) > 1 else ()
    return PackageFile(name="body", size=len(data), digest=digest, chunks=chunks)


@pytest.fixture(autouse=True)
def small_chunks_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def data() -> bytes:
    return random.Random(0).randbytes(10 * CHUNK + 123)


def left_over(store: Store) -> list[Path]:
    return list(store.root.glob("partial/*"))


def fetch(wire: Wire, store: Store, file: PackageFile) -> bytes:
    assert download_file(Registry(wire), store, file, label="body")
    assert left_over(store) == []
    return store.path(file.digest).read_bytes()


def test_in_one_pass(store: Store, data: bytes) -> None:
    wire = Wire(data)
    seen: list[tuple[str, int, int]] = []
    file = describe(data)
    assert download_file(Registry(wire), store, file, label="x", progress=lambda *e: seen.append(e))
    assert seen[-1] == ("x", len(data), len(data))
    assert wire.sent == len(data)
    assert not download_file(Registry(wire), store, file, label="x"), "it is there already"
    assert wire.sent == len(data)


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_wire_that_breaks_is_asked_for_the_rest(
    store: Store, data: bytes, is_chunked: bool
) -> None:
    wire = Wire(data, cuts=[0, CHUNK - 1, CHUNK + 1, len(data) - 5000])
    assert fetch(wire, store, describe(data, is_chunked=is_chunked)) == data
    assert wire.sent == len(data), "nothing came twice"


def test_a_wire_that_sends_nothing_new_is_given_up_and_what_came_is_kept(
    store: Store, data: bytes
) -> None:
    file = describe(data)
    wire = Wire(data, cuts=[3 * CHUNK + 10] + [0] * (MAX_RETRIES + 1))
    with pytest.raises(UnreachableError):
        download_file(Registry(wire), store, file, label="body")
    (partial,) = left_over(store)
    assert partial.read_bytes() == data[: 3 * CHUNK + 10]
    again = Wire(data)
    assert fetch(again, store, file) == data
    assert again.starts == [3 * CHUNK], "whole chunks are kept, the broken one is asked for again"


def test_a_file_of_one_chunk_starts_again(store: Store) -> None:
    data = b"x" * 500
    wire = Wire(data, cuts=[100] + [0] * (MAX_RETRIES + 1))
    with pytest.raises(UnreachableError):
        download_file(Registry(wire), store, describe(data), label="body")
    assert left_over(store) == []


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_left_over_is_verified(store: Store, data: bytes, seed: int) -> None:
    """Partials cut anywhere, with bits flipped anywhere, of several writers at once."""
    rng = random.Random(seed)
    file = describe(data)
    right = set()
    (store.root / "partial").mkdir(parents=True)
    for number in range(rng.randint(1, 3)):
        partial = bytearray(data[: rng.randint(0, len(data))])
        flipped = {rng.randrange(len(partial)) for _ in range(rng.randint(0, 2)) if partial}
        for position in flipped:
            partial[position] ^= 1 << rng.randrange(8)
        bad = {position // CHUNK for position in flipped}
        whole = len(partial) // CHUNK + (len(partial) == len(data))
        right |= set(range(whole)) - bad
        name = f"{file.digest.removeprefix('sha256:')}-{number}-x"
        (store.root / "partial" / name).write_bytes(partial)
    wire = Wire(data)
    assert fetch(wire, store, file) == data
    n_missing = sum(len(data[i * CHUNK : (i + 1) * CHUNK]) for i in range(11) if i not in right)
    assert wire.sent <= n_missing + READ_AHEAD * len(wire.starts), (
        "right chunks are not asked for again"
    )


def test_bytes_that_arrive_wrong_cost_one_chunk(store: Store, data: bytes) -> None:
    wire = Wire(data, spoil=[4 * CHUNK + 7])
    assert fetch(wire, store, describe(data)) == data
    assert wire.starts == [0, 4 * CHUNK]
    assert wire.sent <= len(data) + CHUNK + READ_AHEAD


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("damage", ["flip", "short", "long", "empty"])
def test_a_registry_that_lies_gets_nothing_in(
    store: Store, data: bytes, damage: str, is_chunked: bool
) -> None:
    bad = {
        "flip": data[:-1] + bytes([data[-1] ^ 1]),
        "short": data[:-1],
        "long": data + b"x",
        "empty": b"",
    }[damage]
    with pytest.raises(IntegrityError, match="body from wire"):
        download_file(
            Registry(Wire(bad)), store, describe(data, is_chunked=is_chunked), label="body"
        )
    assert store.digests() == []
    assert left_over(store) == []


def test_chunk_digests_that_lie_do_no_harm(store: Store, data: bytes) -> None:
    """A publisher may list nonsense; the digest of the whole decides, and partials are useless."""
    file = describe(data)
    liar = PackageFile(name="body", size=file.size, digest=file.digest, chunks=("0" * 64,) * 11)
    with pytest.raises(UnreachableError):
        download_file(
            Registry(Wire(data, cuts=[5000] + [0] * (MAX_RETRIES + 1))), store, liar, label="b"
        )
    assert fetch(Wire(data), store, liar) == data


def test_many_writers_of_one_file(store: Store, data: bytes) -> None:
    file, errors = describe(data), list[BaseException]()
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        cuts = [random.Random(seed).randrange(1, 3000) for _ in range(5)]
        start.wait()
        try:
            download_file(Registry(Wire(data, cuts)), store, file, label="body")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.path(file.digest).read_bytes() == data
    assert left_over(store) == []


def test_the_first_error_ends_all_and_what_came_is_kept(store: Store, data: bytes) -> None:
    slow = Wire(data)
    release = threading.Event()
    stream: Callable[[str, int], Iterator[bytes]] = slow.stream

    def wait_in_the_middle(path: str, start: int = 0) -> Iterator[bytes]:
        for number, piece in enumerate(stream(path, start)):
            yield piece
            if number == 10:
                release.wait(10)

    slow.stream = wait_in_the_middle  # type: ignore[method-assign]

    class Refusing(Wire):
        def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
            release.set()
            raise RegistryError("no such file")
            yield b""

    other = describe(b"y" * 5000)
    wanted = [(Registry(slow), describe(data), "slow"), (Registry(Refusing(b"")), other, "bad")]
    with pytest.raises(RegistryError, match="no such file"):
        download_files(wanted, store)
    sizes = [path.stat().st_size for path in left_over(store)]
    assert store.digests() == [] or store.has(describe(data).digest)
    assert all(size <= len(data) for size in sizes)


def test_an_interrupt_ends_downloads_that_wait_and_keeps_what_came(
    store: Store, data: bytes
) -> None:
    """Each server sends a part of its file and then nothing, for which 45 s would be waited."""

    class Silent(Wire):
        is_open = False

        def _send(self, start: int) -> Iterator[bytes]:
            for number, piece in enumerate(super()._send(start)):
                if number == 10 and not self.is_open:
                    arrived.release()
                    time.sleep(60)
                yield piece

    arrived = threading.Semaphore(0)
    wires = [Silent(bytes([i]) + data) for i in range(3)]
    wanted = [(Registry(w), describe(w.data), f"file {i}") for i, w in enumerate(wires)]

    def interrupt() -> None:
        for _ in wires:
            arrived.acquire()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    # Processes that a shell starts in the background ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            download_files(wanted, store)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 10
    assert len(left_over(store)) == 3
    for wire in wires:
        wire.is_open, wire.starts = True, []
    download_files(wanted, store)
    assert all(store.has(file.digest) for _, file, _ in wanted)
    assert all(min(wire.starts) >= CHUNK for wire in wires), "what came is not sent again"


def test_what_the_disk_cannot_hold_is_refused_before_it_is_fetched(store: Store) -> None:
    huge = PackageFile(name="body", size=1 << 60, digest="sha256:" + "0" * 64)
    with pytest.raises(DiskError, match=r"1,152,921,504,606,846,976 bytes are needed"):
        require_space(store, [huge])
