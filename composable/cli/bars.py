"""Progress bars on standard error, if it is a terminal that somebody looks at.

Each function is a context that gives the callback that the library calls, or None where there is
nobody to show anything to. Rich is imported only where a bar is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from composable.progress import ByteProgress, CountProgress, StageProgress

if TYPE_CHECKING:
    from rich.progress import Progress

_BITS_PER_NAT = 1.4426950408889634


@contextmanager
def show_bytes(*, is_quiet: bool) -> Iterator[ByteProgress | None]:
    """Show a bar with bytes for each file while it is being copied or fetched."""
    if is_quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    bars = _bars(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    )
    tasks: dict[str, Any] = {}

    def progress(label: str, done: int, total: int) -> None:
        if label == "install":
            return  # counts experts, and takes no time: they are links
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total, visible=done < total)

    with bars:
        yield progress


@contextmanager
def show_counts(label: str, *, is_quiet: bool) -> Iterator[CountProgress | None]:
    """Show one bar of things done and in all."""
    if is_quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    bars = _bars(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    task = bars.add_task(label, total=None)
    with bars:
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def show_stages(*, is_quiet: bool) -> Iterator[StageProgress | None]:
    """Show a bar for every stage of a long piece of work, as they come."""
    if is_quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    bars = _bars(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
    tasks: dict[str, Any] = {}

    def progress(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)

    with bars:
        yield progress


@contextmanager
def show_training(
    *, is_quiet: bool
) -> Iterator[Callable[[int, int, Mapping[str, float]], None] | None]:
    """Show the steps of training with the newest figures."""
    if is_quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    bars = _bars(
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    task = bars.add_task("compiling", total=None)

    def progress(step: int, steps: int, figures: Mapping[str, float]) -> None:
        bars.update(task, completed=step, total=steps, description=format_figures(figures))

    with bars:
        yield progress


def format_figures(figures: Mapping[str, float]) -> str:
    """Return what training logged in a line: body, scout and speed."""
    if "loss" not in figures:
        return ""
    bits = figures.get("bits_per_token", figures["loss"] * _BITS_PER_NAT)
    scout = f", scout {figures['scout_bits']:.3f}" if "scout_bits" in figures else ""
    return f"{bits:.3f} bits per token{scout}, {figures['tokens_per_second']:,.0f} tokens/s"


def _bars(*columns: Any) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True)
