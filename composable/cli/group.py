"""What commands that train share: joining and leaving a group, plans, and reports of their time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
import typer

from composable.cli.options import PROCESS
from composable.cli.output import format_bytes, format_table, show, show_error
from composable.errors import PreemptedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from composable.workflows.step_plan import StepPlan


@contextmanager
def stop_on_request() -> Iterator[None]:
    """Let SIGTERM end a command with the documented exit code while no step is running.

    During the steps `training.preemption` has the signal. In a group of processes that trains, jax
    has it from the moment the group is joined.

    Raises:
        PreemptedError: On SIGTERM; only the main thread receives it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal is_asked
        is_asked = True
        raise _Stop

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        # The request can arrive in code that makes an error of its own of whatever is raised.
        if not is_asked:
            raise
        raise PreemptedError(
            "asked to stop (SIGTERM) while no step was running",
            hint="run again; it goes on from what was kept, such as the newest checkpoint",
        ) from None
    finally:
        signal.signal(signal.SIGTERM, earlier)


class _Stop(BaseException):
    """Ends a command wherever it is, like KeyboardInterrupt: no handler of errors keeps it."""


def join_group(
    coordinator: str | None,
    n_processes: int | None,
    process: int | None,
    init_timeout: float,
    *,
    has_steps: bool = True,
) -> bool:
    """Join the processes of this run; return whether this one prints for all.

    Args:
        coordinator: Address of process 0.
        n_processes: Number of processes.
        process: Index of this one.
        init_timeout: Seconds that all processes have to start.
        has_steps: Whether the command trains: all processes then stop after the same step. Any
            other ends on SIGTERM by `stop_on_request`, and the other processes with it.
    """
    from composable.parallel import current_process, is_first_process, start_processes

    ctx: typer.Context = click.get_current_context()  # type: ignore[assignment]  # it is one
    ctx.meta[PROCESS] = None  # until it has joined, perhaps on its own
    start_processes(
        coordinator,
        n_processes,
        process,
        init_timeout=init_timeout,
        report=lambda error: show_error(error, ctx),
    )
    if (index := current_process()) is not None:
        ctx.meta[PROCESS] = index
        _divert_output_of_libraries()
        if not has_steps and threading.current_thread() is threading.main_thread():
            # jax has put a handler of its own before the one that Python knows.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return is_first_process()


def report_to_group(error: BaseException, ctx: click.Context, code: int) -> None:
    """Let the other processes of a run, if this is part of one, end after an error of this one.

    Then it does not return, if they had met.
    """
    if PROCESS in ctx.meta:  # otherwise jax need not be there
        from composable.parallel import leave_group

        leave_group(error, code)


def _divert_output_of_libraries() -> None:
    """Send what libraries print themselves to standard error: standard output is for data."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def show_plan(plan: StepPlan, *, as_json: bool) -> None:
    """Print what a training step costs on a topology."""
    show(format_plan(plan), plan.to_dict(), as_json=as_json)


def format_plan(plan: StepPlan) -> str:
    """Return what a training step costs on a topology, as a table."""
    cost = plan.cost
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    room = plan.chip_memory - cost.peak
    fits = f"{format_bytes(abs(room))} {'free' if plan.fits else 'too much'}"
    rows = [
        ("topology", f"{plan.topology}, {plan.devices} chips: {axes or 'one device'}"),
        ("parameters", f"{plan.parameters:,}, {plan.trained:,} of them trained"),
        (
            "a step",
            f"{plan.rows:,} rows of {plan.window:,} tokens"
            + (f" in {plan.accumulate} parts" if plan.accumulate > 1 else ""),
        ),
        (
            "memory per chip",
            f"{format_bytes(cost.peak)} of {format_bytes(plan.chip_memory)}: {fits} "
            f"({format_bytes(cost.arguments)} weights and state, "
            f"{format_bytes(cost.temporary)} temporary)",
        ),
        (
            "FLOPs per token",
            f"{plan.flops_per_token / 1e9:,.2f} G, {plan.recomputation:.2f} times the model's "
            f"{plan.own_flops_per_token / 1e9:,.2f} G",
        ),
    ]
    for kind, operations in cost.collectives.items():
        rows.append((kind, f"{format_bytes(operations.bytes)} in {operations.count:,} operations"))
    rows.append(
        ("a step takes", f"at least {plan.least_seconds:.3f} s: {plan.share_of_peak:.0%} of peak")
    )
    rows.append(
        ("compiled in", f"{plan.compile_seconds:.0f} s ({plan.compile_cpu_seconds:.0f} s of CPU)")
    )
    return format_table((), rows)


def show_goodput(folder: Path, *, as_json: bool) -> None:
    """Print where the time of a training run went, and draw it as a page beside its ledger."""
    from composable.workflows.goodput import (
        KINDS,
        PAGE_FILE,
        find_ledger,
        read_goodput,
        write_page,
    )

    ledger = find_ledger(folder)
    goodput = read_goodput(ledger)
    page = ledger.with_name(PAGE_FILE)
    write_page(page, goodput, str(folder))
    wall = goodput.seconds.total
    rows = [
        (name, f"{goodput.seconds[kind]:,.1f} s", f"{goodput.seconds[kind] / wall:.1%}")
        for kind, name in KINDS.items()
    ]
    rows.append(("in all", f"{wall:,.1f} s", f"{len(goodput.starts)} starts"))
    show(
        f"{format_table((), rows)}\ndrawn in {page}",
        {**goodput.to_dict(), "page": str(page)},
        as_json=as_json,
    )
