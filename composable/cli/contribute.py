"""Commands of a contributor: from an empty folder to a published expert, and back out of one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.output import Json, Quiet, format_table, show

app = typer.Typer(rich_markup_mode=None)

ExpertFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The expert's folder.", show_default=False)
]
# An option takes one value, so `--data *.txt` leaves the other files to be arguments.
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="FILES", help="Text: files or folders.", show_default=False),
]
MoreData = Annotated[
    list[Path] | None,
    typer.Argument(metavar="FILES", help="More text, as of --data.", show_default=False),
]
Backbone = Annotated[
    str | None,
    typer.Option(metavar="NAME|DIR", help="The backbone; by default the one of expert.toml."),
]
RegistryLocation = Annotated[
    str,
    typer.Option(
        metavar="LOCATION",
        help="The registry: a folder or a bucket.",
        envvar="COMPOSABLE_REGISTRY",
        show_default=False,
    ),
]
Release = Annotated[str, typer.Argument(metavar="NAME@VERSION", show_default=False)]


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    backbone: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="The backbone to train for.")
    ] = "tiny-bytes",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Start an expert from the template.

    Makes a folder NAME in the working directory.
    """
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.manifests.manifest import BackbonePackage
    from composable.packaging.manifests.template import create_expert

    home = find_backbone(backbone)
    package = BackbonePackage.read(home)
    folder = Path(name)
    create_expert(folder, name, package.name, read_interface(home))
    show(
        f"created {folder}/: describe the expert in {folder / 'expert.toml'}, then\n"
        f"  composable train {folder} --data FILES",
        {"created": str(folder), "backbone": package.name},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def train(
    folder: ExpertFolder,
    more: MoreData = None,
    data: Data = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    rows: Annotated[int, typer.Option(min=1, help="Rows of 256 tokens in a step.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    registry: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION",
            help="Where the release is that it derives from; by default the project's registries.",
            show_default=False,
        ),
    ] = None,
    backbone: Backbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Train an expert on your text; run again to resume.

    FILES are text files, .jsonl files with one document per line, or folders of them. One document
    in ten is held out for `composable check`. Training starts from the release that expert.toml
    names as derives-from, if it names one.
    """
    files = [*(data or ()), *(more or ())]
    if not files:
        raise typer.BadParameter("give the text to train on", param_hint="--data")
    from composable.packaging.manifests.manifest import Manifest

    manifest = Manifest.read(folder)
    from composable.assembly.backbones import load_backbone
    from composable.workflows.references import find_parent
    from composable.workflows.train import expert_config, train_expert

    loaded = load_backbone(backbone or manifest.backbone)
    parent = find_parent(loaded, manifest, registry=registry)
    with bars.show_training(is_quiet=is_quiet) as progress:
        cfg = expert_config(steps, seed, rows=rows, backbone=loaded.backbone)
        record = train_expert(loaded, folder, files, cfg, parent=parent, progress=progress)
    figures = bars.format_figures(record["last"]) or "all steps were done before"
    start = f"{folder} from {manifest.derives_from}" if parent else str(folder)
    show(
        f"trained {start} on {record['documents']} documents in {record['seconds']} s: {figures}",
        record,
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def check(
    folder: ExpertFolder,
    more: MoreData = None,
    data: Data = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQ|DIR|all",
            help="Also vet what it does to this published expert, or to all of them.",
            show_default=False,
        ),
    ] = None,
    beside_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="Held-out text of an expert of --beside.", show_default=False
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[@V]|DIR",
            help="Also say which version bump it needs after this release.",
            show_default=False,
        ),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION",
            help="Where those are; by default the project's registries.",
            show_default=False,
        ),
    ] = None,
    backbone: Backbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Vet an expert and write its card.

    Without --data, on the text that training held out. Exits with 1 if a check failed, or if the
    version in expert.toml is a smaller bump than --against finds is needed.
    """
    texts = dict(_read_pair(pair) for pair in beside_data or ())
    from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest

    manifest = Manifest.read(folder)
    from composable.assembly.backbones import load_backbone
    from composable.workflows.references import compare_releases, find_peers, find_previous
    from composable.workflows.vet import check_expert

    files = [*(data or ()), *(more or ())]
    loaded = load_backbone(backbone or manifest.backbone)
    name = manifest.name
    peers = find_peers(
        loaded,
        name,
        beside or (),
        texts,
        derives_from=manifest.derives_from,
        registry=registry,
    )
    older = find_previous(loaded, folder, against, registry=registry) if against else None
    with bars.show_counts("check", is_quiet=is_quiet) as progress:
        verdict = check_expert(loaded, folder, files, peers=peers, older=older, progress=progress)
    rows = [
        (
            check.name,
            "ok" if check.passed else "FAILED",
            f"{check.found}; expected {check.expected}",
        )
        for check in verdict.checks
    ]
    outcome: dict[str, Any] = {
        "passed": verdict.passed,
        "checks": [dataclasses.asdict(check) for check in verdict.checks],
        "measured": verdict.measured,
    }
    is_fine = verdict.passed
    if older is not None:
        step = compare_releases(folder, loaded.interface, older, verdict)
        is_fine = is_fine and step.is_enough
        outcome["against"] = {
            "release": f"{name}@{step.old}",
            "needs": step.needed,
            "version": str(step.new),
            "enough": step.is_enough,
            "write": None if step.is_enough else str(step.version),
            "changes": [dataclasses.asdict(change) for change in step.changes],
        }
        found = "; ".join(step.reasons) or "nothing changed"
        cure = "" if step.is_enough else f'; write version = "{step.version}" in {EXPERT_FILE}'
        rows.append(
            (
                "version",
                "ok" if step.is_enough else "FAILED",
                f"{step.old} to {step.new}: a {step.needed} change ({found}){cure}",
            )
        )
    show(format_table((), rows), outcome, as_json=as_json, is_quiet=is_quiet and is_fine)
    if not is_fine:
        raise typer.Exit(1)


@app.command()
def publish(
    folder: ExpertFolder,
    registry: RegistryLocation,
    backbone: Backbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Publish a vetted expert to a registry.

    A release never changes: publishing the same content again changes nothing.
    """
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.manifests.manifest import Manifest
    from composable.packaging.registry.locations import open_for_publishing
    from composable.workflows.publish import publish_vetted

    home = find_backbone(backbone or Manifest.read(folder).backbone)
    with bars.show_bytes(is_quiet=is_quiet) as progress:
        manifest = publish_vetted(
            folder, read_interface(home), open_for_publishing(registry), progress=progress
        )
    show(
        f"published {manifest.name} {manifest.version} to {registry}",
        {
            "name": manifest.name,
            "version": str(manifest.version),
            "manifest": manifest.digest,
            "registry": registry,
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def yank(
    release: Release, registry: RegistryLocation, as_json: Json = False, is_quiet: Quiet = False
) -> None:
    """Withdraw a release from new resolutions.

    Locks that have it keep working.
    """
    name, version = _read_release(release)
    from composable.packaging.registry.locations import open_for_publishing

    open_for_publishing(registry).yank(name, version)
    show(f"yanked {name} {version}", {"yanked": release}, as_json=as_json, is_quiet=is_quiet)


@app.command()
def unyank(
    release: Release, registry: RegistryLocation, as_json: Json = False, is_quiet: Quiet = False
) -> None:
    """Take back a yank."""
    name, version = _read_release(release)
    from composable.packaging.registry.locations import open_for_publishing

    open_for_publishing(registry).unyank(name, version)
    show(f"unyanked {name} {version}", {"unyanked": release}, as_json=as_json, is_quiet=is_quiet)


def _read_pair(text: str) -> tuple[str, Path]:
    """Read `NAME=FILE`."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise typer.BadParameter(f"{text!r} is not NAME=FILE", param_hint="--beside-data")
    return name, Path(file)


def _read_release(text: str) -> tuple[str, Any]:
    """Read `NAME@VERSION`."""
    from composable.packaging.versions.constraint import Requirement

    wanted = Requirement.parse(text)
    if wanted.constraint.pinned is None:
        raise typer.BadParameter(f"{text!r} is not one release", param_hint="NAME@VERSION")
    return wanted.name, wanted.constraint.pinned
