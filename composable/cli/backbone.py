"""Commands on backbones: import them from other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.options import (
    BeginToken,
    Checkpoint,
    ComputeDtype,
    Description,
    Json,
    License,
    OutFolder,
    PackageName,
    PackageVersion,
    PublicText,
    Quiet,
    ScoutTokens,
    StoredDtype,
    Tap,
)
from composable.cli.output import format_bytes, format_table, note, show

app = typer.Typer(rich_markup_mode=None)
backbone = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Import backbones from other formats."
)
app.add_typer(backbone, name="backbone")


@backbone.callback()
def _group() -> None:
    """Import backbones from other formats."""


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
