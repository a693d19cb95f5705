"""Commands that change a project: its requirements, its lock, its environment."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli import bars
from composable.cli.options import (
    DryRun,
    Editable,
    ExcludeNewer,
    Json,
    MaxStale,
    Offline,
    Quiet,
    RegistryName,
    Requirements,
    complete_names,
)
from composable.cli.output import note, show

if TYPE_CHECKING:
    from composable.interface import RouterInterface
    from composable.packaging.install.lock import Lock
    from composable.packaging.project.edits import VersionChange
    from composable.packaging.project.project import Project

app = typer.Typer(rich_markup_mode=None)


def open_project(
    is_offline: bool = False, max_stale_days: float = 0
) -> tuple[Project, RouterInterface]:
    """Return the project around the working directory and its backbone's router interface."""
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.project.project import Project

    project = dataclasses.replace(
        Project.find(), is_offline=is_offline, max_stale=datetime.timedelta(days=max_stale_days)
    )
    return project, read_interface(find_backbone(project.backbone, project.root))


@app.command()
def init(
    backbone: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Backbone to use.")
    ] = "tiny-bytes",
    registry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]LOCATION",
            help="Registry: a folder or a URL; repeatable. The first one is the default.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Create a project in the current directory."""
    from composable.packaging.manifests.backbone_folder import find_backbone
    from composable.packaging.project.project import Project

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
    is_editable: Editable = False,
    exclude_newer: ExcludeNewer = None,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Add experts to composable.toml."""
    from composable.packaging.project.edits import add_experts, read_wanted

    project, interface = open_project(is_offline, max_stale)
    wanted = read_wanted(project, requirements, registry=registry, is_editable=is_editable)
    cutoff = _read_cutoff(exclude_newer)
    add_experts(project, wanted, interface, exclude_newer=cutoff, is_dry_run=is_dry_run)
    if is_dry_run:
        note("dry run: nothing was written", is_quiet=is_quiet)
    added = {name: want.path or str(want.constraint) for name, want in wanted.items()}
    show(
        "\n".join(f"added {name}{f' {what}' * (what != '*')}" for name, what in added.items()),
        {"added": added},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def remove(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", autocompletion=complete_names, show_default=False),
    ],
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Remove experts from composable.toml."""
    from composable.packaging.project.project import Project

    project = Project.find()
    project.remove(*names)
    text = "\n".join(f"removed {name}" for name in names)
    show(text, {"removed": names}, as_json=as_json, is_quiet=is_quiet)


@app.command()
def lock(
    upgrade: Annotated[bool, typer.Option("--upgrade", help="Ignore the locked versions.")] = False,
    upgrade_package: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Ignore the locked version of this expert; repeatable.",
            show_default=False,
        ),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Ignore the locked version and digests of this expert; repeatable. Accepts other "
            "content for a locked release.",
            autocompletion=complete_names,
            show_default=False,
        ),
    ] = None,
    exclude_newer: ExcludeNewer = None,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Resolve versions and write composable.lock."""
    from composable.packaging.project.locking import lock_project

    project, interface = open_project(is_offline, max_stale)
    before = _read_lock(project)
    after = lock_project(
        project,
        interface,
        upgrade=upgrade or (upgrade_package or ()),
        forget=forget or (),
        exclude_newer=_read_cutoff(exclude_newer),
        is_dry_run=is_dry_run,
    )
    _note_signers(before, after, is_quiet=is_quiet or as_json)
    _report(before, after, is_dry_run, as_json=as_json, is_quiet=is_quiet)


@app.command()
def sync(
    is_frozen: Annotated[
        bool, typer.Option("--frozen", help="Fail if the lock is missing or out of date.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="EXPORT",
            help="Take files from the output of `composable export`.",
            show_default=False,
        ),
    ] = None,
    exclude_newer: ExcludeNewer = None,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Install the locked experts, updating the lock first if needed."""
    from composable.packaging.install.lock import Lock
    from composable.packaging.project.edits import refresh_lock
    from composable.packaging.project.locking import check_lock

    project, interface = open_project(is_offline, max_stale)
    if is_frozen:
        wanted = Lock.read(project.root)
        check_lock(project, wanted, interface)
    else:
        cutoff, before = _read_cutoff(exclude_newer), _read_lock(project)
        wanted = refresh_lock(project, interface, exclude_newer=cutoff, is_dry_run=is_dry_run)
        _note_signers(before, wanted, is_quiet=is_quiet or as_json)
    _install(
        project, wanted, interface, is_dry_run, source=source, as_json=as_json, is_quiet=is_quiet
    )


@app.command()
def install(
    requirements: Requirements,
    registry: RegistryName = None,
    is_editable: Editable = False,
    exclude_newer: ExcludeNewer = None,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Add experts to the project, lock and sync."""
    from composable.packaging.project.edits import add_experts, read_wanted

    project, interface = open_project(is_offline, max_stale)
    wanted = read_wanted(project, requirements, registry=registry, is_editable=is_editable)
    cutoff, before = _read_cutoff(exclude_newer), _read_lock(project)
    project, chosen = add_experts(
        project, wanted, interface, exclude_newer=cutoff, is_dry_run=is_dry_run
    )
    if not is_dry_run:
        chosen.write(project.lock_path)
    _note_signers(before, chosen, is_quiet=is_quiet or as_json)
    _install(project, chosen, interface, is_dry_run, as_json=as_json, is_quiet=is_quiet)


@app.command()
def upgrade(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...]",
            help="Upgrade only these experts.",
            autocompletion=complete_names,
            show_default=False,
        ),
    ] = None,
    exclude_newer: ExcludeNewer = None,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    is_dry_run: DryRun = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Lock the newest compatible versions and sync."""
    from composable.packaging.project.locking import lock_project

    project, interface = open_project(is_offline, max_stale)
    before = _read_lock(project)
    chosen = lock_project(
        project,
        interface,
        upgrade=names or True,
        exclude_newer=_read_cutoff(exclude_newer),
        is_dry_run=is_dry_run,
    )
    _note_signers(before, chosen, is_quiet=is_quiet or as_json)
    _install(project, chosen, interface, is_dry_run, as_json=as_json, is_quiet=is_quiet)


@app.command()
def rollback(as_json: Json = False, is_quiet: Quiet = False) -> None:
    """Restore the previous environment."""
    from composable.errors import LockError
    from composable.packaging.project.edits import roll_back_project
    from composable.packaging.project.locking import check_lock

    project, interface = open_project()
    before = project.environment.lock
    after = roll_back_project(project).lock
    _report(before, after, as_json=as_json, is_quiet=is_quiet)
    try:
        check_lock(project, after, interface)
    except LockError as error:
        note(f"note: composable.toml does not match the restored lock: {error.message}")


@app.command()
def export(
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Output folder or .tar file.", show_default=False),
    ],
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Write the locked experts to a folder, for offline use.

    OUT is a registry with these releases, together with composable.toml and composable.lock. On
    the other machine, in a folder with these two files, run `composable sync --from OUT`.
    """
    from composable.packaging.project.edits import refresh_lock
    from composable.packaging.project.export import export_project
    from composable.packaging.project.sync import sync_project

    project, interface = open_project(is_offline, max_stale)
    lock = refresh_lock(project, interface)
    with bars.show_bytes(is_quiet=is_quiet) as progress:
        sync_project(project, lock, interface=interface, progress=progress)
        export_project(project, lock, target, interface=interface, progress=progress)
    n = len(lock.experts)
    show(
        f"wrote {n} expert{'s' * (n != 1)} to {target}",
        {"written": str(target), "packages": {n: str(v) for n, v in lock.versions.items()}},
        as_json=as_json,
        is_quiet=is_quiet,
    )


def _install(
    project: Project,
    lock: Lock,
    interface: RouterInterface,
    is_dry_run: bool,
    *,
    source: Path | None = None,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Install a lock and print the changes."""
    from composable.errors import PackagingError
    from composable.packaging.project.sync import sync_project
    from composable.packaging.registry.locations import open_registry

    try:
        before, installed = project.environment.lock, project.environment.current
    except PackagingError:
        before, installed = None, None  # damaged; installing repairs it
    if not is_dry_run:
        export = open_registry(source) if source is not None else None
        with bars.show_bytes(is_quiet=is_quiet) as progress:
            sync_project(project, lock, interface=interface, source=export, progress=progress)
        if before == lock and installed != project.environment.current:
            note("damaged or missing files were installed again", is_quiet=is_quiet)
    _report(before, lock, is_dry_run, as_json=as_json, is_quiet=is_quiet)


def _report(
    before: Lock | None,
    after: Lock,
    is_dry_run: bool = False,
    *,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Print the differences between two locks."""
    from composable.packaging.project.edits import compare_locks

    if is_dry_run:
        note("dry run: nothing was written", is_quiet=is_quiet)
    changes = compare_locks(before, after)
    n = len(after.experts)
    text = (
        "\n".join(map(_format_change, changes)) or f"nothing to change: {n} expert{'s' * (n != 1)}"
    )
    versions = {name: str(version) for name, version in after.versions.items()}
    data: dict[str, Any] = {"packages": versions, "changes": [_change_to_dict(c) for c in changes]}
    show(text, data, as_json=as_json, is_quiet=is_quiet)


def _note_signers(before: Lock | None, after: Lock, *, is_quiet: bool) -> None:
    """Say which registries are unsigned, once each, and whose releases another signs now."""
    from composable.packaging.project.locking import describe_signers

    for line in describe_signers(before, after):
        note(f"note: {line}", is_quiet=is_quiet)


def _format_change(change: VersionChange) -> str:
    if change.before is None:
        return f"+ {change.name} {change.after}"
    if change.after is None:
        return f"- {change.name} {change.before}"
    if change.before == change.after:
        before, after = change.digest_before or "editable", change.digest_after or "editable"
        return f"~ {change.name} {change.after}, other content: {before} -> {after}"
    return f"~ {change.name} {change.before} -> {change.after}"


def _change_to_dict(change: VersionChange) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": change.name,
        "before": str(change.before) if change.before else None,
        "after": str(change.after) if change.after else None,
    }
    if change.before == change.after:
        fields["content"] = {"before": change.digest_before, "after": change.digest_after}
    return fields


def _read_lock(project: Project) -> Lock | None:
    """Return what the project's lock file holds before it is replaced; None if it has nothing."""
    from composable.errors import LockError
    from composable.packaging.install.salvage import read_lock_to_keep

    try:
        return read_lock_to_keep(project.lock_path)
    except LockError:
        return None


def _read_cutoff(text: str | None) -> str | None:
    from composable.packaging.registry.release import parse_cutoff

    return parse_cutoff(text) if text is not None else None


def _name_registries(options: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=LOCATION` or `LOCATION`, whose name is `default`."""
    registries: dict[str, str] = {}
    for option in options:
        name, separator, location = option.partition("=")
        if not separator or "/" in name:  # an equals sign may be part of a URL
            name, location = "default", option
        if name in registries or not location:
            raise typer.BadParameter(
                f"{option!r}: expected NAME=LOCATION, with a different name for each registry",
                param_hint="--registry",
            )
        registries[name] = location
    return registries
