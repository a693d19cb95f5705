"""Progress of commands, on standard error: bars on a terminal, plain lines elsewhere.

Each function is a context that gives the callback that the library calls, or None with --quiet. How
progress looks is in `composable.progress`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

from composable.progress import (
    ByteProgress,
    CountProgress,
    StageProgress,
    StepProgress,
    TrainingProgress,
    show_bars,
)

# Bars of the stages of training line up in this many columns.
_STAGE_WIDTH = 14
_BITS_PER_NAT = 1.4426950408889634
# What takes no longer than this is not shown.
_SOON_SECONDS = 0.3


@contextmanager
def show_wait(what: str, *, is_quiet: bool = False) -> Iterator[None]:
    """Show on a terminal what is waited for, in a line that disappears."""
    is_shown = not is_quiet and sys.stderr.isatty()
    if is_shown:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def await_kernels(*, is_quiet: bool = False) -> None:
    """Load native kernels, and show that they are compiled where no earlier command has done so.

    It takes ten seconds; the first program that calls them would wait for it silently.
    """
    from composable.kernels import load_native, wants_native

    if not wants_native():
        return
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_native)
        if wait([loading], timeout=_SOON_SECONDS).not_done:
            with show_wait("compiling kernels for this processor, once", is_quiet=is_quiet):
                wait([loading])


@contextmanager
def show_bytes(*, is_quiet: bool) -> Iterator[ByteProgress | None]:
    """Show a bar in bytes for each file while it is copied or fetched."""
    if is_quiet:
        yield None
        return
    with show_bars(counts_bytes=True) as update:

        def progress(label: str, done: int, total: int) -> None:
            if label != "install":  # counts experts, and takes no time: they are links
                update(label, done, total, is_visible=done < total)

        yield progress


@contextmanager
def show_steps(label: str, *, is_quiet: bool) -> Iterator[StepProgress | None]:
    """Show one bar of steps, with the newest bits per token."""
    if is_quiet:
        yield None
        return
    with show_bars(is_transient=False) as update:

        def progress(step: int, steps: int, row: Mapping[str, float]) -> None:
            note = f"{row['bits_per_token']:.2f} bits per token" if row else ""
            update(label, step, steps, note)

        yield progress


@contextmanager
def show_counts(label: str, *, is_quiet: bool) -> Iterator[CountProgress | None]:
    """Show one bar of units done and in all."""
    if is_quiet:
        yield None
        return
    with show_bars() as update:
        update(label, 0, None)
        yield lambda done, total: update(label, done, total)


@contextmanager
def show_stages(*, is_quiet: bool) -> Iterator[StageProgress | None]:
    """Show a bar for every stage of a long task, as they start."""
    if is_quiet:
        yield None
        return
    with show_bars() as update:
        yield lambda label, done, total: update(label, done, total)


@contextmanager
def show_training(*, is_quiet: bool) -> Iterator[TrainingProgress | None]:
    """Show a bar for every stage of training, with the newest figures."""
    if is_quiet:
        yield None
        return
    with show_bars() as update:

        def progress(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            note = format_figures(figures) or ("" if done else "compiling")
            update(stage.ljust(_STAGE_WIDTH), done, total, note)

        yield progress


def format_figures(figures: Mapping[str, float]) -> str:
    """Return what training logged in a line: loss of the body and of the scout, and speed.

    Example:
        >>> format_figures({"loss": 2.0, "bits_per_token": 2.9, "tokens_per_second": 1500.0})
        'training text 2.900 bits per token, 1,500 tokens/s'
    """
    if "loss" not in figures:
        return ""
    bits = figures.get("bits_per_token", figures["loss"] * _BITS_PER_NAT)
    scout = f", scout {figures['scout_bits']:.3f}" if "scout_bits" in figures else ""
    speed = f"{figures['tokens_per_second']:,.0f} tokens/s"
    return f"training text {bits:.3f} bits per token{scout}, {speed}"
