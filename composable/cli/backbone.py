"""Commands on backbones: import them from other formats, and train those of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.options import (
    BeginToken,
    Checkpoint,
    ComputeDtype,
    Coordinator,
    Description,
    InitTimeout,
    Json,
    License,
    MeshSizes,
    NumProcesses,
    OutFolder,
    PackageName,
    PackageVersion,
    PlanTopology,
    ProcessId,
    PublicText,
    Quiet,
    ScoutTokens,
    StoredDtype,
    Tap,
)
from composable.cli.output import format_bytes, format_table, note, show

app = typer.Typer(rich_markup_mode=None)
backbone = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Import and train backbones."
)
app.add_typer(backbone, name="backbone")


@backbone.callback()
def _group() -> None:
    """Import and train backbones."""


@backbone.command(name="import")
def import_(
    source: Checkpoint,
    name: PackageName,
    out: OutFolder = None,
    version: PackageVersion = "1.0.0",
    tap: Tap = None,
    public_text: PublicText = None,
    scout_tokens: ScoutTokens = 200_000,
    scout_steps: Annotated[
        int, typer.Option(min=0, help="Number of training steps of the scout.")
    ] = 1000,
    dtype: StoredDtype = None,
    compute_dtype: ComputeDtype = "F32",
    begin: BeginToken = None,
    description: Description = "",
    license_: License = "",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Convert a checkpoint into a backbone package.

    Supports the Llama (including SmolLM), Qwen3 and OLMo2 families. Checkpoints that cannot be
    computed exactly are rejected, naming the field or tensor.
    """
    from composable.packaging.versions.names import check_package_name
    from composable.workflows.import_backbone import ImportPlan, import_backbone, read_public_text

    plan = ImportPlan(
        name=check_package_name(name, "--name"),
        version=version,
        tap=tap,
        dtype=dtype,
        compute_dtype=compute_dtype,
        begin=begin,
        scout_tokens=scout_tokens,
        scout_steps=scout_steps,
        description=description,
        license=license_,
    )
    folder = out or Path(name)
    if public_text is None:
        note("fetching public text if it is not cached", is_quiet=is_quiet or as_json)
    train, heldout = read_public_text(public_text or ())
    with bars.show_stages(is_quiet=is_quiet or as_json) as progress:
        card = import_backbone(source, folder, plan, train, heldout, progress=progress)
    show(
        f"{folder}\n{_card_table(card)}",
        {"folder": str(folder), "card": card},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@backbone.command()
def train(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Which backbone, such as tiny-bytes.")
    ],
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="Folder of the data recipe.", show_default=False),
    ] = None,
    out: OutFolder = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of text, checkpoints and curves.", show_default=False
        ),
    ] = None,
    mesh: MeshSizes = None,
    plan: PlanTopology = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    init_timeout: InitTimeout = 300,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Train a backbone of this project from its recipe; run again to resume.

    On many processes, run the same command on each, as for `composable train`.
    """
    from composable.cli.group import join_group, show_plan
    from composable.parallel import make_mesh, parse_mesh
    from composable.workflows.pretrain import PLANS, train_backbone

    if name not in PLANS:
        raise typer.BadParameter(f"not one of {', '.join(PLANS)}", param_hint="NAME")
    if plan:
        from composable.workflows.step_plan import plan_backbone

        wanted = PLANS[name]
        sizes = parse_mesh(mesh or "fsdp=1")
        classes = wanted.shape.vocab_size
        show_plan(
            plan_backbone(wanted.shape, classes, wanted.training, plan, sizes), as_json=as_json
        )
        return
    if recipe is None:
        raise typer.BadParameter("the folder of a data recipe is needed", param_hint="RECIPE")
    is_first = join_group(coordinator, num_processes, process_id, init_timeout)
    devices = make_mesh(**parse_mesh(mesh)) if mesh else None
    folder = out or Path(name)
    with bars.show_steps(name, is_quiet=is_quiet or not is_first) as progress:
        card = train_backbone(PLANS[name], recipe, folder, work, mesh=devices, progress=progress)
    if is_first:
        rows = [("folder", str(folder)), *((key, str(value)) for key, value in card.items())]
        show(
            format_table((), rows),
            {"folder": str(folder), **card},
            as_json=as_json,
            is_quiet=is_quiet,
        )


def _card_table(card: dict[str, Any]) -> str:
    model, measured, scout = card["model"], card["measured"], card["scout"]
    trips, chat = card["tokenizer"]["round_trips"], card["tokenizer"]["chat"]
    bits = scout["heldout_bits_per_class"]
    rows = [
        ("backbone", card["backbone"]),
        ("interface", card["interface"]["digest"]),
        ("family", card["source"]["family"]),
        ("parameters", f"{model['parameters']:,}"),
        ("weights", f"{format_bytes(model['weights_bytes'])}, {model['stored_as']}"),
        ("layers", f"{model['layers']}, {model['tap']} of them the trunk"),
        ("vocabulary", f"{model['vocabulary']:,} tokens"),
        ("round trips", f"{trips['exact']} of {trips['texts']} exact"),
        ("chat", "markup recorded" if chat["is_recorded"] else f"no markup: {chat['reason']}"),
        (
            "anchor",
            f"{measured['bits_per_byte']:.3f} bits per byte, "
            f"{measured['bytes'] / measured['tokens']:.2f} bytes per token",
        ),
        (
            "scout",
            f"{bits:.2f} of {scout['uniform_bits_per_class']:.0f} bits per class"
            if bits is not None
            else "untrained",
        ),
    ]
    return format_table((), rows)
