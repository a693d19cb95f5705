"""How long work reports its progress: one alias for each kind of callback, and what shows it.

On a terminal these are bars, elsewhere plain lines. Rich is imported only for bars. Whether
progress is shown at all is for the caller to decide.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from composable.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

# (what is worked on, bytes done, bytes in all)
ByteProgress = Callable[[str, int, int], None]
# (what is worked on, done, in all)
StageProgress = Callable[[str, int, int], None]
# (done, in all)
CountProgress = Callable[[int, int], None]
# (step, steps, figures of the step)
StepProgress = Callable[[int, int, Mapping[str, float]], None]
# (stage, done, in all, figures of the step), for work of several stages one after the other
TrainingProgress = Callable[[str, int, int, Mapping[str, float]], None]

# Without a terminal, at most one line for each label in this time: short work prints none.
_LINE_SECONDS: Final = 10.0


class UpdateBar(Protocol):
    """Callback that moves the bar of a label, which it adds the first time."""

    def __call__(
        self, label: str, done: int, total: int | None, note: str = "", *, is_visible: bool = True
    ) -> None:
        """Move a bar.

        Args:
            label: Which bar; shown before it.
            done: Units done.
            total: Units in all; None while unknown.
            note: Shown after the bar.
            is_visible: Whether the bar is shown at all.
        """


@contextmanager
def show_bars(
    *, counts_bytes: bool = False, is_transient: bool = True, console: Console | None = None
) -> Iterator[UpdateBar]:
    """Show one progress bar per label; yield the callback that moves them.

    Where there is no terminal, lines are printed instead: for each label one in ten seconds.

    Args:
        counts_bytes: Whether units are bytes, shown with their speed; otherwise with the time left.
        is_transient: Whether the bars disappear at the end.
        console: Where they are drawn; standard error by default.
    """
    if not (sys.stderr.isatty() if console is None else console.is_terminal):
        yield _PlainLines(sys.stderr if console is None else console.file, counts_bytes)
        return
    from rich import progress
    from rich.console import Console

    measures = (
        (progress.DownloadColumn(), progress.TransferSpeedColumn())
        if counts_bytes
        else (
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
    )
    bars = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        *measures,
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=console or Console(stderr=True),
        transient=is_transient,
    )
    tasks: dict[str, Any] = {}

    def update(
        label: str, done: int, total: int | None, note: str = "", *, is_visible: bool = True
    ) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(printable(label), total=total, note="")
        bars.update(
            tasks[label], completed=done, total=total, note=printable(note), visible=is_visible
        )

    with bars:
        yield update


class _PlainLines:
    """Prints progress as lines of text.

    Args:
        file: Where to print.
        counts_bytes: Whether units are bytes.
    """

    def __init__(self, file: IO[str], counts_bytes: bool) -> None:
        self._file, self._counts_bytes = file, counts_bytes
        self._last: dict[str, float] = {}  # time of a label's last line, or of its start
        self._open: set[str] = set()  # labels with a line, but not yet their last one

    def __call__(
        self, label: str, done: int, total: int | None, note: str = "", *, is_visible: bool = True
    ) -> None:
        now = time.monotonic()
        is_due = now - self._last.setdefault(label, now) >= _LINE_SECONDS
        is_end = total is not None and done >= total
        if not ((is_due and is_visible) or (is_end and label in self._open)):
            return
        self._last[label] = now
        (self._open.discard if is_end else self._open.add)(label)
        amounts = [
            f"{n / 1e6:.1f} MB" if self._counts_bytes else str(n) for n in (done, total or 0)
        ]
        amount = "/".join(amounts) if total else amounts[0]
        line = f"{label.rstrip()}: {amount}{f', {note}' if note else ''}"
        print(printable(line), file=self._file, flush=True)
