"""Results of units of work in a folder that many processes share, each computed once.

A unit is named by the digest of all that decides its result, so a result never changes and has no
owner. The folder may be on any file system on which a file can be created exclusively.

    records/<aa>/<sha256>      a result, complete or not there
    claims/<aa>/<sha256>.<n>   the n-th process that began to compute it, and whether it is alive
    repeats/<aa>/<sha256>.<n>  that process finished after another one had

Before a process computes a unit, it creates the next claim, which one of several that try can do.
While it computes, it changes the time of that file every few seconds. Others take a unit over if
its last claim has not changed for as long as a lease, by their own clocks, which need not agree; or
at once if the process was on their machine and is gone. A process that is merely slow and comes
back after that finishes what another one computed as well. The results are the same, the first
stays, and the ledger counts the repeat. Claims are never removed: they are the ledger.

Deliberately not here: what a unit is, and who works on which.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from composable.files import atomic
from composable.files.reading import read_bytes

# A claim that has not changed for this long belongs to a process that is gone. Network file systems
# show changes up to a minute late.
LEASE_SECONDS: Final = 180.0
_BEATS_PER_LEASE: Final = 6
# Time of change of a claim whose process failed and said so.
_GIVEN_UP: Final = 0
_RECORDS, _CLAIMS, _REPEATS = "records", "claims", "repeats"


@dataclass(frozen=True)
class Claim:
    """The right to compute a unit.

    Args:
        key: Digest of the unit.
        attempt: How many processes began before, successful or not.
    """

    key: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What happened to some units.

    Args:
        n_units: Units.
        n_recorded: Units with a result.
        n_begun: How often a process began to compute one.
        n_repeated: How often a process finished one that another had finished.
    """

    n_units: int
    n_recorded: int
    n_begun: int
    n_repeated: int

    @property
    def n_abandoned(self) -> int:
        """How often a process began one and did not finish it: killed, or still at work."""
        return self.n_begun - self.n_recorded - self.n_repeated


class Results:
    """A folder of results.

    Args:
        root: The folder; created when the first unit is claimed.
        lease_seconds: How long a claim may stay unchanged before others take the unit over.

    Example:
        >>> import tempfile
        >>> from composable.interface.digest import digest_bytes
        >>> key = digest_bytes(b"2 + 2")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = Results(Path(folder))
        ...     with results.claim(key) as claim:
        ...         results.put(claim, b"4")
        ...     results.read(key), results.count([key]).n_begun
        True
        (b'4', 1)
    """

    def __init__(self, root: Path, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.root = root
        self._lease = lease_seconds
        # Of claims of others: time of change, and since when this process has seen that.
        self._seen: dict[Path, tuple[int, float]] = {}

    def has(self, key: str) -> bool:
        """Return whether a unit has a result."""
        return self._path(_RECORDS, key).is_file()

    def read(self, key: str) -> bytes | None:
        """Return the result of a unit, or None if there is none."""
        try:
            return read_bytes(self._path(_RECORDS, key))
        except FileNotFoundError:
            return None

    def where(self, key: str) -> Path:
        """Return the path of a unit's result, whether or not it exists."""
        return self._path(_RECORDS, key)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[Claim | None]:
        """Hold the right to compute a unit for the block.

        Yields:
            The claim; None if the unit has a result, or another process is computing it.
        """
        attempt = self._find_free_attempt(key)
        path = self._path(_CLAIMS, key, attempt)
        if self.has(key) or attempt is None or not atomic.create_marker(path, _identify()):
            yield None
            return
        try:
            with self._keep_alive(path):
                yield Claim(key, attempt)
        except BaseException:
            with contextlib.suppress(OSError):
                os.utime(path, ns=(_GIVEN_UP, _GIVEN_UP))
            raise

    def put(self, claim: Claim, data: bytes) -> bool:
        """Write the result of a unit.

        Args:
            claim: The claim that it was computed under.
            data: The result; every process computes the same.

        Returns:
            Whether this is the first result of the unit.
        """
        if atomic.create_bytes(self._path(_RECORDS, claim.key), data):
            return True
        atomic.create_marker(self._path(_REPEATS, claim.key, claim.attempt), b"")
        return False

    def count(self, keys: Iterable[str]) -> Ledger:
        """Return what happened to some units."""
        units = set(keys)
        names = {_name(key): key for key in units}

        def count(kind: str) -> int:
            return sum(
                path.name.partition(".")[0] in names
                for folder in atomic.list_directory(self.root / kind)
                if folder.is_dir()
                for path in atomic.list_directory(folder)
            )

        return Ledger(
            n_units=len(units),
            n_recorded=sum(map(self.has, units)),
            n_begun=count(_CLAIMS),
            n_repeated=count(_REPEATS),
        )

    def _path(self, kind: str, key: str, attempt: int | None = None) -> Path:
        name = _name(key)
        suffix = "" if attempt is None else f".{attempt}"
        return self.root / kind / name[:2] / f"{name}{suffix}"

    def _find_free_attempt(self, key: str) -> int | None:
        """Return the number of the next claim; None while the last one is held."""
        attempt = 0
        while self._path(_CLAIMS, key, attempt).exists():
            attempt += 1
        is_free = attempt == 0 or self._is_abandoned(self._path(_CLAIMS, key, attempt - 1))
        return attempt if is_free else None

    def _is_abandoned(self, path: Path) -> bool:
        """Return whether the process of a claim is gone."""
        try:
            changed, owner = path.stat().st_mtime_ns, _parse_owner(read_bytes(path))
        except FileNotFoundError:
            return False  # removed by hand: the next look begins anew
        is_gone = owner.get("machine") == _machine() and not _is_running(owner)
        if is_gone or changed == _GIVEN_UP:
            return True
        now = time.monotonic()
        known, since = self._seen.setdefault(path, (changed, now))
        if known != changed:
            self._seen[path] = (changed, now)
            return False
        return now - since >= self._lease

    @contextlib.contextmanager
    def _keep_alive(self, path: Path) -> Iterator[None]:
        """Change the time of a claim every few seconds during the block."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._lease / _BEATS_PER_LEASE):
                with contextlib.suppress(OSError):
                    os.utime(path)

        thread = threading.Thread(target=beat, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _name(key: str) -> str:
    return key.removeprefix("sha256:")


def _identify() -> bytes:
    """Return what other processes need to see whether this one is alive."""
    pid = os.getpid()
    owner = {
        "machine": _machine(),
        "host": socket.gethostname(),
        "pid": pid,
        "started": _start_time(pid),
    }
    return json.dumps(owner).encode()


def _parse_owner(data: bytes) -> dict[str, Any]:
    """Return who made a claim; nothing if it was killed before it wrote that."""
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


@cache
def _machine() -> str | None:
    """Return what names this machine since it started, and this view of its processes."""
    try:
        boot = read_bytes(Path("/proc/sys/kernel/random/boot_id")).decode().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """Return when a process started, in the kernel's words; None if there is no such process."""
    try:
        text = read_bytes(Path(f"/proc/{pid}/stat")).decode(errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _is_running(owner: dict[str, Any]) -> bool:
    """Return whether the process of a claim on this machine still runs."""
    pid = owner.get("pid")
    if _machine() is None or not isinstance(pid, int):
        return True  # unknown, so the lease decides
    return _start_time(pid) == owner.get("started")
