"""How long work reports its progress: one alias for each kind of callback, and bars that show it.

Rich is imported only where bars are shown. Whether they are shown is for the caller to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

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

    Args:
        counts_bytes: Whether units are bytes, shown with their speed; otherwise with the time left.
        is_transient: Whether the bars disappear at the end.
        console: Where they are drawn; standard error by default.
    """
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
