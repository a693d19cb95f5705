"""The command that reports what a run would use here: versions, devices, group, cache, kernels."""

from __future__ import annotations

from typing import Any

import typer

from composable.cli.group import join_group
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


_PACKAGES = ("composable", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")


@app.command()
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
    is_first = join_group(coordinator, num_processes, process_id, init_timeout)
    report = _describe(mesh)
    if is_first:
        rows = [(name, str(value)) for name, value in report.items()]
        show(format_table((), rows), report, as_json=as_json, is_quiet=is_quiet)


def _describe(mesh: str | None) -> dict[str, Any]:
    """Return what a run would use here."""
    import platform

    import jax

    from composable.assembly.compile_cache import use_compile_cache
    from composable.kernels.blocks import describe_implementation
    from composable.parallel import make_mesh, parse_mesh

    devices = jax.devices()
    sizes = make_mesh(**parse_mesh(mesh or "data=-1")).shape
    folder = use_compile_cache()
    return {
        "python": f"{platform.python_version()}, {platform.machine()}",
        **{name: version for name in _PACKAGES if (version := _find_version(name))},
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": f"{jax.process_count()}, this is {jax.process_index()}",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in sizes.items()),
        "compiled programs": str(folder) if folder else "not kept",
        "expert bodies": describe_implementation(devices[0].platform),
    }


def _find_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
