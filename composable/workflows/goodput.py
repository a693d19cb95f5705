"""Read the ledger of a training run, add up where its time went, and draw it as a page.

The page is one HTML file without scripts that fetches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from composable.errors import TrainingError
from composable.files import atomic
from composable.files.reading import read_bytes
from composable.training.ledger import LEDGER_FILE, Seconds
from composable.workflows.workspace import WORK

PAGE_FILE: Final = "goodput.html"
# What time went into, in the order in which it is drawn.
KINDS: Final = {
    "step": "steps",
    "lost": "lost work",
    "data": "waiting for data",
    "checkpoint": "checkpoints",
    "compile": "compiling",
    "startup": "start-up",
    "down": "not running",
}
# Pieces of a start in the plot.
_MAX_PIECES: Final = 40


@dataclass(kw_only=True)
class Line:
    """A line of a ledger: what happened until a moment.

    Args:
        at: The moment, in seconds of Unix time.
        step: Steps done by then.
        seconds: Wall time since the line before, by kind.
    """

    at: float
    step: int
    seconds: Seconds

    @property
    def began(self) -> float:
        """When the time of this line began."""
        return self.at - self.seconds.total


@dataclass(kw_only=True)
class Start:
    """One start of a run, from its process's begin to its last line.

    Args:
        first_step: Steps done before it.
        processes: Number of processes.
        devices: Number and kind of devices.
        lines: Its lines; the first ends when the first step could begin.
    """

    first_step: int
    processes: int
    devices: str
    lines: list[Line] = field(default_factory=list)

    @property
    def seconds(self) -> Seconds:
        """Wall time by kind."""
        return _add_up(self.lines)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Where the wall time of a run went.

    Args:
        seconds: By kind, over all starts and the time between them.
        starts: The starts, in their order.
    """

    seconds: Seconds
    starts: list[Start]

    @property
    def share(self) -> float:
        """Share of the time that went into steps that were not lost."""
        return self.seconds["step"] / max(self.seconds.total, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "goodput": round(self.share, 4),
            "wall_seconds": round(self.seconds.total, 3),
            "seconds": {kind: round(self.seconds[kind], 3) for kind in KINDS},
            "starts": [
                {
                    "at": start.lines[0].began,
                    "first_step": start.first_step,
                    "last_step": start.lines[-1].step,
                    "processes": start.processes,
                    "devices": start.devices,
                    "seconds": {k: round(v, 3) for k, v in start.seconds.items()},
                }
                for start in self.starts
            ],
        }


def find_ledger(folder: Path) -> Path:
    """Return the ledger of an expert, or of a folder that a backbone was trained in.

    Args:
        folder: The expert, or the folder of checkpoints and curves.

    Raises:
        TrainingError: If there is none.
    """
    for home in (folder / WORK, folder):
        if (home / LEDGER_FILE).is_file():
            return home / LEDGER_FILE
    raise TrainingError(
        f"no {LEDGER_FILE} here nor in {WORK}",
        where=str(folder),
        hint="give the folder of an expert that was trained, or the one for checkpoints and curves",
    )


def read_goodput(path: Path) -> Goodput:
    """Return where the time of a run went.

    Steps that a later start did again are lost work. A line that a killed process left unfinished
    is ignored; it holds about a second of steps.

    Args:
        path: The ledger.

    Raises:
        TrainingError: If it has no line.
    """
    starts = list(_split_starts(_read_lines(path)))
    if not starts:
        raise TrainingError("the ledger has no start", where=str(path))
    total = Seconds()
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        if following is not None:
            _mark_lost(start, following.first_step)
            total["down"] += max(following.lines[0].began - start.lines[-1].at, 0.0)
        total.add(start.seconds)
    return Goodput(seconds=total, starts=starts)


def write_page(path: Path, goodput: Goodput, title: str) -> None:
    """Write the page.

    Args:
        path: The file.
        goodput: What it shows.
        title: What the run is called.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = resources.files("composable.workflows").joinpath("goodput.html").read_text("utf-8")
    began = goodput.starts[0].lines[0].began
    wall = max(goodput.starts[-1].lines[-1].at - began, 1e-9)
    page = environment.from_string(source).render(
        title=title,
        kinds=KINDS,
        goodput=goodput,
        wall=wall,
        rows=[(start, list(_pieces(start, began, wall))) for start in goodput.starts],
    )
    atomic.write_text(path, page)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a ledger."""
    for text in read_bytes(path).decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["seconds"] = Seconds({str(k): float(v) for k, v in line["seconds"].items()})
            line["at"], line["step"] = float(line["at"]), int(line["step"])
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # cut by the end of a process
        yield line


def _split_starts(lines: Iterator[dict[str, Any]]) -> Iterator[Start]:
    """Yield the starts of a run."""
    start = None
    for line in lines:
        if "startup" in line["seconds"]:
            if start is not None:
                yield start
            start = Start(
                first_step=line["step"],
                processes=int(line.get("processes", 1)),
                devices=str(line.get("devices", "")),
            )
        if start is not None:
            start.lines.append(Line(at=line["at"], step=line["step"], seconds=line["seconds"]))
    if start is not None:
        yield start


def _add_up(lines: Sequence[Line]) -> Seconds:
    """Return the seconds of lines by kind."""
    seconds = Seconds()
    for line in lines:
        seconds.add(line.seconds)
    return seconds


def _mark_lost(start: Start, resumed: int) -> None:
    """Charge steps, and the data for them, that the next start did again to lost work."""
    before = start.first_step
    for line in start.lines:
        n_lost = line.step - max(resumed, before)
        if n_lost > 0:
            share = n_lost / (line.step - before)
            for kind in ("step", "data"):
                lost = share * line.seconds[kind]
                line.seconds[kind] -= lost
                line.seconds["lost"] += lost
        before = line.step


def _pieces(start: Start, began: float, wall: float) -> Iterator[tuple[str, float, float]]:
    """Yield (kind, left, width), both as shares of the run, of what a start is drawn with."""
    first, *others = start.lines
    size = -(-len(others) // _MAX_PIECES) or 1
    groups: list[Sequence[Line]] = [[first]]
    groups += [others[i : i + size] for i in range(0, len(others), size)]
    for group in groups:
        at = group[0].began
        seconds = _add_up(group)
        for kind in ("startup", "compile", "data", "step", "lost", "checkpoint"):
            if seconds[kind] > 0:
                yield kind, (at - began) / wall, seconds[kind] / wall
                at += seconds[kind]
