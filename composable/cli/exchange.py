"""Commands that bring experts in from other projects, and take models out to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.output import Json, Quiet, format_table, show

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Bring experts in from other projects, and take models out to them."""


@app.command(name="import-peft")
def import_peft(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="The adapter: adapter_config.json and adapter_model.safetensors.",
            show_default=False,
        ),
    ],
    backbone: Annotated[
        str,
        typer.Option(
            metavar="NAME|DIR", help="The backbone that it was made for.", show_default=False
        ),
    ],
    sample: Annotated[
        list[Path],
        typer.Option(
            metavar="TEXT",
            help="Text of the kind that it is for: a file, .jsonl or folder.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the expert; by default the folder's.", show_default=False),
    ] = None,
    version: Annotated[str, typer.Option(help="Its version.")] = "1.0.0",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to; by default its name.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[@REVISION]",
            help="Model that it must have been made for, in its own words.",
            show_default=False,
        ),
    ] = None,
    scout_steps: Annotated[int, typer.Option(min=2, help="Steps of the scout's training.")] = 1000,
    scout_tokens: Annotated[
        int, typer.Option(min=1, help="Text that the scout learns from, in tokens.")
    ] = 200_000,
    seed: Annotated[int, typer.Option(help="Seed of the scout.")] = 0,
    license_: Annotated[str, typer.Option("--license", help="SPDX.", show_default=False)] = "",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Make an expert of a PEFT adapter.

    The body is the adapter's, exactly; the scout is trained on the sample. What cannot be carried
    exactly is refused with the name of the field or tensor.
    """
    from composable.packaging.versions.names import check_package_name

    name = check_package_name(name or source.resolve().name, "--name")
    from composable.assembly.backbones import load_backbone
    from composable.corpora.documents import read_documents
    from composable.workflows.import_peft import AdapterPlan, import_adapter

    plan = AdapterPlan(
        name=name,
        version=version,
        base=base,
        scout_steps=scout_steps,
        scout_tokens=scout_tokens,
        seed=seed,
        license=license_,
    )
    is_taken = Path(name).resolve() == source.resolve()
    folder = out or Path(f"{name}-expert" if is_taken else name)
    with bars.show_stages(is_quiet=is_quiet or as_json) as progress:
        record = import_adapter(
            load_backbone(backbone), source, folder, plan, read_documents(sample), progress=progress
        )
    show(
        f"{folder}\n{_adapter_table(record)}\nnext: composable check {folder}",
        {"folder": str(folder), **record},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command(name="export-hf")
def export_hf(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.", show_default=False)],
    experts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQ",
            help="An expert; by default what the project has installed.",
            show_default=False,
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="By default the project's.")
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(metavar="DIR|URL", help="Where --experts come from; as for `generate`."),
    ] = None,
    is_alone: Annotated[
        bool, typer.Option("--alone", help="The backbone alone; no project is needed.")
    ] = False,
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The expert that is to be always on; by default all are mixed.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="mixtral|qwen3_moe|flex_olmo",
            help="Layout of a mixture; by default the one that fits.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TEXT",
            help="Text that routers are fitted on, of all kinds; by default the anchor.",
            show_default=False,
        ),
    ] = None,
    fit_tokens: Annotated[int, typer.Option(min=1, help="Tokens of it, at most.")] = 8192,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="F32|BF16",
            help="What weights are written in; by default what is exact.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Write a model as a Hugging Face folder, and say what is lost.

    The backbone alone and one expert always on compute the same there as here. A mixture needs
    routers of another kind: they are fitted on text, and what that costs is measured.
    """
    if merge is not None and is_alone:
        raise typer.BadParameter("there is nothing to merge with --alone", param_hint="--merge")
    from composable.assembly.load import gather
    from composable.corpora.documents import read_documents
    from composable.workflows.export_hf import ExportPlan, export_model

    loaded, folders = gather(backbone, [] if is_alone else experts, registry=registry)
    plan = ExportPlan(merge=merge, layout=layout, dtype=dtype, fit_tokens=fit_tokens)
    with bars.show_stages(is_quiet=is_quiet or as_json) as progress:
        record = export_model(
            loaded, folders, out, plan, read_documents(text) if text else (), progress=progress
        )
    lost = "".join(f"\n  - {line}" for line in record["lost"]) or " nothing"
    names = [record["backbone"]["name"], *(expert["name"] for expert in record["experts"])]
    show(
        f"wrote {out}: {' + '.join(names)}, {record['layout']}, {record['dtype']}\nlost:{lost}",
        {"folder": str(out), **record},
        as_json=as_json,
        is_quiet=is_quiet,
    )


def _adapter_table(record: dict[str, Any]) -> str:
    origin, body, bits = record["origin"], record["body"], record["measured"]["bits_per_byte"]
    scout = record["scout"]["heldout_bits_per_class"]
    rows = [
        ("expert", f"{record['name']} {record['version']} for {record['backbone']}"),
        (
            "made for",
            f"{origin['base'] or 'unnamed'} ({'compared' if origin['is_verified'] else 'unseen'})",
        ),
        ("body", f"rank {body['rank']}, {len(body['changed'])} of {body['matrices']} matrices"),
        ("scout", "too little text to measure" if scout is None else f"{scout:.2f} bits per class"),
        ("sample", f"{bits['backbone']:.3f} -> {bits['expert']:.3f} bits per byte, always on"),
    ]
    return format_table((), rows)
