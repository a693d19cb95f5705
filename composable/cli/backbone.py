"""Commands on backbones: import them from other formats, and train those of this project."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.group import join_group, show_goodput, show_plan, stop_on_request
from composable.cli.options import (
    Accumulate,
    BeginToken,
    Checkpoint,
    CheckpointHome,
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
    Report,
    ScoutTokens,
    StoredDtype,
    Tap,
)
from composable.cli.output import format_bytes, format_table, note, show


class Quantization(StrEnum):
    """How the matrices of a quantized backbone are kept."""

    int8 = "int8"
    bf16 = "bf16"


app = typer.Typer(rich_markup_mode=None)
backbone = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Import, train and quantize backbones."
)
app.add_typer(backbone, name="backbone")


@backbone.callback()
def _group() -> None:
    """Import, train and quantize backbones."""


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
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="BACKBONE", help="Name or folder of the backbone.")
    ],
    to: Annotated[
        Quantization, typer.Option(help="How its matrices are kept.")
    ] = Quantization.int8,
    out: OutFolder = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the new package; by default BACKBONE-int8.", show_default=False),
    ] = None,
    honour_experts: Annotated[
        bool,
        typer.Option("--honour-experts", help="Let experts of BACKBONE plug into the new package."),
    ] = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Write a backbone whose matrices take fewer bytes, for faster use on a CPU.

    The result is another backbone with its own digest. Experts are trained for the original; with
    --honour-experts they plug in here as well. Prints how far its predictions are from the
    original's.
    """
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.versions.names import check_package_name
    from composable.workflows.quantize_backbone import quantize_backbone

    if name is None:
        name = f"{read_interface(find_backbone(source)).name}-{to.value}"
    folder = out or Path(check_package_name(name, "--name"))
    with bars.show_stages(is_quiet=is_quiet or as_json) as progress:
        card = quantize_backbone(
            source,
            folder,
            dtype={"int8": "I8", "bf16": "BF16"}[to.value],
            name=name,
            is_honouring=honour_experts,
            progress=progress,
        )
    show(
        f"{folder}\n{_quantized_table(card)}",
        {"folder": str(folder), "card": card},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@backbone.command()
@stop_on_request()
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
    accumulate: Accumulate = 1,
    checkpoints: CheckpointHome = None,
    plan: PlanTopology = None,
    report: Report = False,
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
    from composable.parallel import make_mesh, parse_mesh
    from composable.training.checkpoints import find_home
    from composable.workflows.pretrain import PLANS, train_backbone

    if name not in PLANS:
        raise typer.BadParameter(f"not one of {', '.join(PLANS)}", param_hint="NAME")
    if plan:
        from composable.workflows.step_plan import plan_backbone

        wanted = PLANS[name]
        sizes = parse_mesh(mesh or "fsdp=1")
        classes = wanted.shape.vocab_size
        cost = plan_backbone(wanted.shape, classes, wanted.training, plan, sizes, accumulate)
        show_plan(cost, as_json=as_json)
        return
    if report:
        show_goodput(work or Path("runs") / name, as_json=as_json)
        return
    if recipe is None:
        raise typer.BadParameter("the folder of a data recipe is needed", param_hint="RECIPE")
    if checkpoints:
        find_home(checkpoints)
    is_first = join_group(coordinator, num_processes, process_id, init_timeout)
    devices = make_mesh(**parse_mesh(mesh)) if mesh else None
    folder = out or Path(name)
    with bars.show_steps(name, is_quiet=is_quiet or not is_first) as progress:
        card = train_backbone(
            PLANS[name],
            recipe,
            folder,
            work,
            mesh=devices,
            accumulate=accumulate,
            checkpoints=checkpoints,
            progress=progress,
        )
    if is_first:
        rows = [("folder", str(folder)), *((key, str(value)) for key, value in card.items())]
        show(
            format_table((), rows),
            {"folder": str(folder), **card},
            as_json=as_json,
            is_quiet=is_quiet,
        )


def _quantized_table(card: dict[str, Any]) -> str:
    model, measured, source = card["model"], card["measured"], card["source"]
    before, after = (format_bytes(model[key]) for key in ("source_bytes", "weights_bytes"))
    rows = [
        ("backbone", card["backbone"]),
        ("interface", card["interface"]["digest"]),
        ("made from", f"{source['backbone']}, {source['interface']}"),
        ("its experts", "plug in" if source["is_honoured"] else "do not plug in"),
        ("weights", f"{after} instead of {before}, matrices of {model['matrices']}"),
        ("divergence", f"{measured['kl']:.5f} nats per token, of {measured['tokens']:,}"),
        ("loss", f"{measured['loss']:.4f} nats per token, {measured['source_loss']:.4f} before"),
        (
            "scout",
            f"{measured['scout_loss']:.4f} nats per class, "
            f"{measured['source_scout_loss']:.4f} before",
        ),
    ]
    return format_table((), rows)


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
