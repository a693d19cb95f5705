"""The command that reports what a run would use here: versions, devices, group, cache, kernels."""

from __future__ import annotations

import typer

from composable.cli.group import join_group, stop_on_request
from composable.cli.options import (
    Coordinator,
    InitTimeout,
    Json,
    MeshSizes,
    NumProcesses,
    ProcessId,
    Quiet,
)
from composable.cli.output import format_table, show

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keep the command a command of a group, though it is the only one here."""


@app.command()
@stop_on_request()
def doctor(
    mesh: MeshSizes = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    init_timeout: InitTimeout = 300,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Show versions, devices, processes, mesh, compile cache and kernels.

    In a run of many processes, run it in each: it joins the group as training does.
    """
    is_first = join_group(coordinator, num_processes, process_id, init_timeout, has_steps=False)
    from composable.parallel import parse_mesh
    from composable.workflows.doctor import describe_environment

    report = describe_environment(parse_mesh(mesh or "data=-1"))
    if is_first:
        rows = [(name, str(value)) for name, value in report.items()]
        show(format_table((), rows), report, as_json=as_json, is_quiet=is_quiet)
