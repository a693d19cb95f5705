"""Commands that change a project: what it asks for, what is locked, what is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli import bars
from composable.cli.output import DryRun, Json, Quiet, note, show

if TYPE_CHECKING:
    from composable.interface import RouterInterface
    from composable.packaging.change import Change
    from composable.packaging.lock import Lock
    from composable.packaging.project import Project

app = typer.Typer(rich_markup_mode=None)

Requirements = Annotated[
    list[str],
    typer.Argument(
        metavar="REQ...", help="NAME, 'NAME>=1.2,<2' or NAME@1.2.0.", show_default=False
    ),
]
RegistryName = Annotated[
    str | None,
    typer.Option("--registry", metavar="NAME", help="Registry of the project to bind them to."),
]


def open_project() -> tuple[Project, RouterInterface]:
    """Return the project around the working directory and its backbone's router interface."""
    from composable.packaging.backbones import find_backbone, read_interface
    from composable.packaging.project import Project

    project = Project.find()
    return project, read_interface(find_backbone(project.backbone, project.root))


@app.command()
def init(
    backbone: Annotated[str, typer.Option(metavar="NAME|DIR", help="The backbone.")] = "tiny-bytes",
    registry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A registry; the first one is the default.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Make this directory a project."""
    from composable.packaging.backbones import find_backbone
    from composable.packaging.project import Project

    find_backbone(backbone)
    project = Project.create(Path.cwd(), backbone, _name_registries(registry or ()))
    show(
        f"created {project.path.name} for backbone {backbone}",
        {"project": str(project.path), "backbone": backbone, "registries": project.registries},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def add(
    requirements: Requirements,
    registry: RegistryName = None,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Ask for experts in composable.toml."""
    from composable.packaging.change import add_experts
    from composable.packaging.constraint import Requirement

    project, interface = open_project()
    wanted = [Requirement.parse(text) for text in requirements]
    add_experts(project, wanted, interface, registry=registry, is_dry_run=is_dry_run)
    if is_dry_run:
        note("dry run: nothing is written", is_quiet=is_quiet)
    show(
        "\n".join(f"added {requirement}" for requirement in wanted),
        {"added": {requirement.name: str(requirement.constraint) for requirement in wanted}},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)],
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Stop asking for experts in composable.toml."""
    from composable.packaging.project import Project

    project = Project.find()
    for name in names:
        project = project.remove(name)
    text = "\n".join(f"removed {name}" for name in names)
    show(text, {"removed": names}, as_json=as_json, is_quiet=is_quiet)


@app.command()
def lock(
    upgrade: Annotated[bool, typer.Option("--upgrade", help="Forget what was locked.")] = False,
    upgrade_package: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Forget what was locked of one.", show_default=False),
    ] = None,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Choose versions and write composable.lock."""
    from composable.packaging.locking import lock_project

    project, interface = open_project()
    before = _lock_of(project)
    after = lock_project(
        project, interface, upgrade=upgrade or (upgrade_package or ()), is_dry_run=is_dry_run
    )
    _report(before, after, is_dry_run, as_json=as_json, is_quiet=is_quiet)


@app.command()
def sync(
    is_frozen: Annotated[
        bool, typer.Option("--frozen", help="Refuse where the lock is missing or stale.")
    ] = False,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Install what is locked, locking first where that is needed."""
    from composable.packaging.change import refresh_lock
    from composable.packaging.lock import Lock
    from composable.packaging.locking import check_lock

    project, interface = open_project()
    if is_frozen:
        wanted = Lock.read(project.root)
        check_lock(project, wanted, interface)
    else:
        wanted = refresh_lock(project, interface, is_dry_run=is_dry_run)
    _install(project, wanted, interface, is_dry_run, as_json=as_json, is_quiet=is_quiet)


@app.command()
def install(
    requirements: Requirements,
    registry: RegistryName = None,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Add experts, lock and sync."""
    from composable.packaging.change import add_experts
    from composable.packaging.constraint import Requirement

    project, interface = open_project()
    wanted = [Requirement.parse(text) for text in requirements]
    project, chosen = add_experts(
        project, wanted, interface, registry=registry, is_dry_run=is_dry_run
    )
    if not is_dry_run:
        chosen.write(project.lock_path)
    _install(project, chosen, interface, is_dry_run, as_json=as_json, is_quiet=is_quiet)


@app.command()
def upgrade(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Only these.", show_default=False),
    ] = None,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Lock the newest versions that fit, and sync."""
    from composable.packaging.locking import lock_project

    project, interface = open_project()
    chosen = lock_project(project, interface, upgrade=names or True, is_dry_run=is_dry_run)
    _install(project, chosen, interface, is_dry_run, as_json=as_json, is_quiet=is_quiet)


@app.command()
def rollback(as_json: Json = False, is_quiet: Quiet = False) -> None:
    """Go back to what was installed before."""
    from composable.errors import LockError
    from composable.packaging.change import roll_back
    from composable.packaging.locking import check_lock

    project, interface = open_project()
    before = project.environment.lock
    after = roll_back(project).lock
    _report(before, after, as_json=as_json, is_quiet=is_quiet)
    try:
        check_lock(project, after, interface)
    except LockError as error:
        note(f"note: composable.toml still asks for something else: {error.message}")


def _install(
    project: Project,
    lock: Lock,
    interface: RouterInterface,
    is_dry_run: bool,
    *,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Install a lock and say what that changed."""
    from composable.errors import PackagingError
    from composable.packaging.locking import sync_project

    try:
        before = project.environment.lock
    except PackagingError:
        before = None  # damaged; installing mends it
    if not is_dry_run:
        with bars.show_bytes(is_quiet=is_quiet) as progress:
            sync_project(project, lock, interface=interface, progress=progress)
    _report(before, lock, is_dry_run, as_json=as_json, is_quiet=is_quiet)


def _report(
    before: Lock | None,
    after: Lock,
    is_dry_run: bool = False,
    *,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Say what differs between two locks."""
    from composable.packaging.change import compare_locks

    if is_dry_run:
        note("dry run: nothing is written", is_quiet=is_quiet)
    changes = compare_locks(before, after)
    n = len(after.experts)
    text = "\n".join(map(_tell, changes)) or f"nothing to change: {n} expert{'s' * (n != 1)}"
    versions = {name: str(version) for name, version in after.versions.items()}
    data: dict[str, Any] = {"packages": versions, "changes": [_describe(c) for c in changes]}
    show(text, data, as_json=as_json, is_quiet=is_quiet)


def _tell(change: Change) -> str:
    if change.before is None:
        return f"+ {change.name} {change.after}"
    if change.after is None:
        return f"- {change.name} {change.before}"
    return f"~ {change.name} {change.before} -> {change.after}"


def _describe(change: Change) -> dict[str, str | None]:
    return {
        "name": change.name,
        "before": str(change.before) if change.before else None,
        "after": str(change.after) if change.after else None,
    }


def _lock_of(project: Project) -> Lock | None:
    """Return the project's lock; None for one that is missing or that locking anew will mend."""
    from composable.errors import LockError

    try:
        return project.lock
    except LockError:
        return None


def _name_registries(options: Sequence[str]) -> dict[str, str]:
    """Read `NAME=DIR` or `DIR`, which is called `default`."""
    registries: dict[str, str] = {}
    for option in options:
        name, separator, location = option.partition("=")
        if not separator:
            name, location = "default", option
        if name in registries or not location:
            raise typer.BadParameter(
                f"{option!r}: give each registry a name of its own, as NAME=DIR",
                param_hint="--registry",
            )
        registries[name] = location
    return registries
