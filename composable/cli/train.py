"""The command that trains experts: one, several, or the variants of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composable.cli import bars
from composable.cli.group import join_group, show_goodput, show_plan, stop_on_request
from composable.cli.options import (
    Accumulate,
    CheckpointHome,
    Coordinator,
    Data,
    ExpertBackbone,
    ExpertFolder,
    InitTimeout,
    Json,
    MeshSizes,
    MoreData,
    NumProcesses,
    ParentRegistry,
    PlanTopology,
    ProcessId,
    Quiet,
    Report,
)
from composable.cli.output import format_table, show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from composable.assembly.backbones import LoadedBackbone
    from composable.model.model import Pluggable
    from composable.packaging.manifests.manifest import Manifest
    from composable.training.config import TrainConfig

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def _commands() -> None:
    """Keep the command's name: an app of one command without this would have none."""


@app.command()
@stop_on_request()
def train(
    folder: ExpertFolder,
    more: MoreData = None,
    data: Data = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of optimiser steps.")] = 300,
    rows: Annotated[int, typer.Option(min=1, help="Sequences per step, on all devices.")] = 4,
    seed: Annotated[int, typer.Option(help="Random seed for initial weights and data order.")] = 0,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default: 0.01; less for full bodies of a wide backbone.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Train a variant per value of rank, seed or learning-rate, such as rank=4,16; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            metavar="rank=N",
            help="Change the release in derives-from by products of this rank only; such an update "
            "is small to publish and to install.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 256,
    mesh: MeshSizes = None,
    accumulate: Accumulate = 1,
    checkpoints: CheckpointHome = None,
    plan: PlanTopology = None,
    report: Report = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    init_timeout: InitTimeout = 300,
    registry: ParentRegistry = None,
    backbone: ExpertBackbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Train an expert on text; run again to resume.

    FILES are text files, .jsonl files with one document per line, or folders of them. One document
    in ten is held out for `composable check`. If expert.toml sets derives-from, training starts
    from that release.

    Folders of more experts may follow DIR: all are trained on the same text, or on their own, given
    as --data DIR=FILES, and compared on held-out text.

    With --sweep, all combinations of the values are trained on one pass of the backbone's lower
    layers, and the best one on held-out text is kept.

    With --update rank=30, the matrices of the release in derives-from are changed by products of
    that rank only, which takes a few percent of its bytes to publish.

    With --report, nothing is trained: a table shows where the time of the training in DIR went
    (start-up, compiling, waiting for data, steps, checkpoints, work lost to interruptions), and a
    page beside it draws it.

    On many processes, such as those of a TPU pod, run the same command on each. The group is
    detected on Cloud TPU, GKE, Slurm and Open MPI; elsewhere give --coordinator, --num-processes
    and --process-id, or COMPOSABLE_COORDINATOR, COMPOSABLE_PROCESSES and COMPOSABLE_PROCESS.
    """
    from composable.packaging.manifests.manifest import Manifest

    if report:
        show_goodput(folder, as_json=as_json)
        return
    if plan:
        planned = _plan_body(Manifest.read(folder), update)
        _show_expert_plan(planned, backbone, plan, mesh, rows, window, accumulate, as_json=as_json)
        return
    folders, texts = _assign_texts(folder, more or (), data or ())
    manifests = {folder: Manifest.read(folder) for folder in folders}
    homes = {backbone or manifest.backbone for manifest in manifests.values()}
    if len(homes) > 1:
        raise typer.BadParameter(
            f"experts for one backbone are trained together, found {', '.join(sorted(homes))}",
            param_hint="DIR",
        )
    if sweep and len(folders) > 1:
        raise typer.BadParameter("only one expert can be swept", param_hint="--sweep")
    if update and (sweep or len(folders) > 1):
        raise typer.BadParameter("for one expert, and without --sweep", param_hint="--update")
    from composable.assembly.backbones import load_backbone
    from composable.assembly.compile_memory import schedule_for_memory
    from composable.training.checkpoints import find_home
    from composable.workflows.references import find_parent
    from composable.workflows.train import expert_config, parse_update

    update_rank = parse_update(update) if update else None
    schedule_for_memory()
    if checkpoints:
        find_home(checkpoints)  # an address that cannot be used fails here, not after the trunk
    is_first = join_group(coordinator, num_processes, process_id, init_timeout)
    is_spread = bool(mesh or checkpoints or accumulate > 1 or not is_first)
    if is_spread and (sweep or len(folders) > 1):
        raise typer.BadParameter(
            "not on a mesh, in parts, with --checkpoints or on many processes",
            param_hint="--sweep" if sweep else "DIR",
        )
    loaded = load_backbone(homes.pop())
    parents = {
        folder: parent
        for folder, manifest in manifests.items()
        if (parent := find_parent(loaded, manifest, registry=registry))
    }
    bars.await_kernels(is_quiet=is_quiet or not is_first)
    cfgs = {
        folder: expert_config(
            steps,
            seed,
            rows=rows,
            window=window,
            backbone=loaded.backbone,
            kind=_plan_body(manifest, update).body.kind,
            learning_rate=learning_rate,
            accumulate=accumulate,
        )
        for folder, manifest in manifests.items()
    }
    cfg, parent, files = cfgs[folder], parents.get(folder), texts[folder]
    if len(folders) > 1:
        _train_several(loaded, texts, cfgs, parents, as_json, is_quiet)
    elif sweep:
        _train_variants(loaded, folder, files, cfg, sweep, parent, as_json, is_quiet)
    else:
        _train_one(
            loaded,
            folder,
            files,
            cfg,
            parent,
            update_rank,
            mesh,
            accumulate,
            checkpoints,
            is_first=is_first,
            as_json=as_json,
            is_quiet=is_quiet,
        )


def _plan_body(manifest: Manifest, update: str | None) -> Manifest:
    """Return a manifest with the kind of body that is trained: low-rank for an update."""
    import dataclasses

    from composable.packaging.manifests.manifest import BodySpec
    from composable.workflows.train import parse_update

    if update is None:
        return manifest
    return dataclasses.replace(manifest, body=BodySpec(kind="lora", rank=parse_update(update)))


def _assign_texts(
    folder: Path, more: Sequence[Path], data: Sequence[Path]
) -> tuple[list[Path], dict[Path, list[Path]]]:
    """Return the experts and the text of each, from `DIR [DIR ...] [FILES] --data [DIR=]FILES`.

    Raises:
        typer.BadParameter: If an expert is named twice or has no text.
    """
    from composable.packaging.manifests.manifest import EXPERT_FILE

    folders = [folder, *(path for path in more if (path / EXPERT_FILE).is_file())]
    if len(set(folders)) < len(folders):
        raise typer.BadParameter("an expert is named twice", param_hint="DIR")
    common = [path for path in more if path not in folders]
    texts: dict[Path, list[Path]] = {folder: [] for folder in folders}
    for path in data:
        name, equals, files = str(path).partition("=")
        if equals and Path(name) in texts:
            texts[Path(name)].append(Path(files))
        else:
            common.append(path)
    texts = {folder: [*files, *common] for folder, files in texts.items()}
    for expert, chosen in texts.items():
        if not chosen:
            of = f" for {expert}" if len(folders) > 1 else ""
            raise typer.BadParameter(f"no training text given{of}", param_hint="--data")
    return folders, texts


def _train_one(
    loaded: LoadedBackbone,
    folder: Path,
    files: Sequence[Path],
    cfg: TrainConfig,
    parent: Pluggable | None,
    update_rank: int | None,
    mesh: str | None,
    accumulate: int,
    checkpoints: str | None,
    *,
    is_first: bool,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Train one expert, and report its last figures in the first process of a group."""
    from composable.files.records import to_plain
    from composable.packaging.manifests.manifest import Manifest
    from composable.parallel import make_mesh, parse_mesh
    from composable.workflows.train import train_expert
    from composable.workflows.workspace import count_heldout

    devices = make_mesh(**parse_mesh(mesh)) if mesh else None
    with bars.show_training(is_quiet=is_quiet or not is_first) as progress:
        record = train_expert(
            loaded,
            folder,
            files,
            cfg,
            parent=parent,
            update_rank=update_rank,
            mesh=devices,
            accumulate=accumulate,
            checkpoints=checkpoints,
            progress=progress,
        )
    if not is_first:
        return
    figures = bars.format_figures(record.last or {}) or "training already complete"
    start = f"{folder} from {Manifest.read(folder).derives_from}" if parent else str(folder)
    n_heldout = count_heldout(folder)
    show(
        f"trained {start} in {record.seconds} s on {record.documents + n_heldout} documents, "
        f"{n_heldout} of them held out: {figures}",
        to_plain(record),
        as_json=as_json,
        is_quiet=is_quiet,
    )


def _train_several(
    loaded: LoadedBackbone,
    texts: Mapping[Path, Sequence[Path]],
    cfgs: Mapping[Path, TrainConfig],
    parents: Mapping[Path, Pluggable],
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Train several experts and report them, best first among those on the same text."""
    from composable.files.records import to_plain
    from composable.workflows.train_several import train_experts

    with bars.show_training(is_quiet=is_quiet) as progress:
        experts = train_experts(loaded, texts, cfgs, parents=parents, progress=progress)
    rows = [
        (
            str(expert.folder),
            " ".join(map(str, expert.data)),
            f"{expert.heldout.bits_per_token:.4f}",
            f"{expert.heldout.scout_bits:.4f}",
            f"{expert.record.seconds}",
        )
        for expert in experts
    ]
    head = ("expert", "text", "held-out bits per token", "scout bits", "seconds")
    show(
        format_table(head, rows),
        {
            "experts": [
                {
                    "folder": str(expert.folder),
                    "data": [str(path) for path in expert.data],
                    **to_plain(expert.heldout),
                    "training": to_plain(expert.record),
                }
                for expert in experts
            ]
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


def _show_expert_plan(
    manifest: Manifest,
    backbone: str | None,
    topology: str,
    mesh: str | None,
    rows: int,
    window: int,
    accumulate: int,
    *,
    as_json: bool,
) -> None:
    """Print what a step of an expert costs on TPUs that are not here."""
    from composable.assembly.backbones import read_config
    from composable.parallel import parse_mesh
    from composable.parallel.chips import tpu_devices
    from composable.workflows.step_plan import plan_expert
    from composable.workflows.train import expert_config

    cfg, interface = read_config(backbone or manifest.backbone)
    n_devices = len(tpu_devices(topology))
    training = expert_config(
        1, rows=rows, window=window, n_devices=n_devices, accumulate=accumulate
    )
    plan = plan_expert(
        cfg,
        interface.n_classes,
        (manifest.body.kind, manifest.body.rank),
        manifest.scout_width,
        training,
        topology,
        parse_mesh(mesh or "data=1,fsdp=-1"),
        accumulate,
    )
    show_plan(plan, as_json=as_json)


def _train_variants(
    loaded: LoadedBackbone,
    folder: Path,
    files: Sequence[Path],
    cfg: TrainConfig,
    sweep: Sequence[str],
    parent: Pluggable | None,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Train the variants of a sweep and report them, best first."""
    from composable.files.records import to_plain
    from composable.workflows.sweep import parse_sweep, train_variants

    with bars.show_training(is_quiet=is_quiet) as progress:
        variants = train_variants(
            loaded, folder, files, cfg, parse_sweep(sweep), parent=parent, progress=progress
        )
    rows = [
        (
            variant.name,
            f"{variant.heldout.bits_per_token:.4f}",
            f"{variant.heldout.scout_bits:.4f}",
            f"{variant.record.seconds}",
        )
        for variant in variants
    ]
    table = format_table(("variant", "held-out bits per token", "scout bits", "seconds"), rows)
    show(
        f"{table}\nkept {variants[0].name} as {folder}",
        {
            "kept": variants[0].name,
            "variants": [
                {
                    "name": variant.name,
                    **to_plain(variant.heldout),
                    "training": to_plain(variant.record),
                }
                for variant in variants
            ],
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )
