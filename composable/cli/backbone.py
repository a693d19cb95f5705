"""Commands on backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.output import Json, Quiet, format_bytes, format_table, note, show

app = typer.Typer(rich_markup_mode=None)
backbone = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Take over other people's backbones."
)
app.add_typer(backbone, name="backbone")


@backbone.callback()
def _group() -> None:
    """Take over other people's backbones."""


@backbone.command(name="import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the package.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to; by default its name.", show_default=False),
    ] = None,
    version: Annotated[str, typer.Option(help="Its version.")] = "1.0.0",
    tap: Annotated[
        int | None,
        typer.Option(min=1, help="Layers of the trunk; by default a quarter.", show_default=False),
    ] = None,
    public_text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Public text for scout and anchor; by default speeches, fetched with npm.",
            show_default=False,
        ),
    ] = None,
    scout_tokens: Annotated[
        int, typer.Option(min=1, help="Public text that the scout learns from, in tokens.")
    ] = 200_000,
    scout_steps: Annotated[int, typer.Option(min=0, help="Steps of its training.")] = 1000,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="F32|BF16",
            help="What weights are stored in; by default what is exact.",
            show_default=False,
        ),
    ] = None,
    compute_dtype: Annotated[
        str, typer.Option(metavar="F32|BF16", help="What weights are computed in.")
    ] = "F32",
    begin: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Token that begins a document; by default what the source says.",
            show_default=False,
        ),
    ] = None,
    description: Annotated[str, typer.Option(help="One line.", show_default=False)] = "",
    license_: Annotated[
        str,
        typer.Option(
            "--license", help="SPDX; by default what the source says.", show_default=False
        ),
    ] = "",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Make a backbone package of a checkpoint.

    The families Llama (SmolLM included), Qwen3 and OLMo2 are known. What would not be computed
    exactly is refused with the name of the field or tensor.
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
        note("fetching public text, unless it is cached", is_quiet=is_quiet or as_json)
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
    trips = card["tokenizer"]["round_trips"]
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
