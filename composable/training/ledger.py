"""The ledger of a run: where its wall time goes, a line of `goodput.jsonl` at a time.

The first process writes it beside the curves. A line has the seconds since the line before, by
kind, and the last step that was done; the first line of every start has the time until its first
step. What was lost to an interruption shows in the next start, which begins at an earlier step.
Reading and drawing are in `composable.workflows.goodput`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, TextIO

import jax

LEDGER_FILE: Final = "goodput.jsonl"
# A line is due after a second, and after a thousandth of the run: long runs have short ledgers.
_LINE_SECONDS: Final = 1.0
_LINE_SHARE: Final = 1e-3


class Seconds(dict[str, float]):
    """Seconds by kind; those of a kind that is missing are 0.

    Example:
        >>> seconds = Seconds(step=2.0)
        >>> seconds.add({"step": 1.0, "data": 0.5})
        >>> seconds, seconds.total, seconds["lost"]
        ({'step': 3.0, 'data': 0.5}, 3.5, 0.0)
    """

    def __missing__(self, kind: str) -> float:
        return 0.0

    def add(self, other: Mapping[str, float]) -> None:
        """Add the seconds of each kind."""
        for kind, value in other.items():
            self[kind] += value

    @property
    def total(self) -> float:
        """Seconds of all kinds."""
        return sum(self.values())


class Ledger:
    """Where the wall time of a run goes; without a folder, and in other processes, nothing.

    Time that is charged to nothing else is that of steps. As a context manager, it charges what is
    left on the way out to the last checkpoint, which is then waited for.

    Args:
        directory: Folder of the curves.
    """

    # The end of the ledger before in this process, since which the next one starts.
    _ended: float | None = None

    def __init__(self, directory: Path | None) -> None:
        self._path = directory / LEDGER_FILE if directory and jax.process_index() == 0 else None
        self._file: TextIO | None = None
        self._seconds = Seconds()
        self._step = 0
        self._began = self._line_at = _find_begin(Ledger._ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        if self._file is not None:
            self._write(now, rest="checkpoint")
            self._file.close()
        Ledger._ended = now

    def start(self, step: int) -> None:
        """Write the first line: what it took until the first step could begin.

        Args:
            step: Steps done by earlier starts.
        """
        self._step = step
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_to_append(self._path)
        self._write(
            time.monotonic(),
            rest="startup",
            processes=jax.process_count(),
            devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        )

    @contextmanager
    def charge(self, kind: str) -> Iterator[None]:
        """Charge the time of the block to `compile`, `data` or `checkpoint`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[kind] += time.monotonic() - start

    def end_step(self, step: int, *, is_due: bool = False) -> None:
        """Note that a step was done, and write a line if it is time.

        Args:
            step: The step.
            is_due: Whether to write one in any case.
        """
        self._step = step
        now = time.monotonic()
        patience = max(_LINE_SECONDS, _LINE_SHARE * (now - self._began))
        if self._file is not None and (is_due or now - self._line_at >= patience):
            self._write(now)

    def _write(self, now: float, *, rest: str = "step", **about: Any) -> None:
        """Write a line; what was charged to nothing is charged to `rest`."""
        if self._file is None:
            return
        self._seconds[rest] += max(now - self._line_at - self._seconds.total, 0.0)
        seconds = {kind: round(value, 4) for kind, value in self._seconds.items()}
        line = {"at": round(time.time(), 3), "step": self._step, "seconds": seconds, **about}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._line_at = now
        self._seconds.clear()


def _find_begin(ended: float | None) -> float:
    """Return, on the monotonic clock, when this process began or the ledger before ended."""
    if ended is not None:
        return ended
    now = time.monotonic()
    try:  # Linux counts ticks since the machine started; elsewhere imports are left out
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return now
    return now - max(uptime - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


def _open_to_append(path: Path) -> TextIO:
    """Open a file of lines whose last one may have been cut by the end of a process."""
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
    return path.open("a", encoding="utf-8")
