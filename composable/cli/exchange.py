"""Commands that import adapters from PEFT and export models to Hugging Face."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.options import (
    Adapter,
    AdapterBackbone,
    AdapterBase,
    AdapterLicense,
    AdapterName,
    Alone,
    Backbone,
    Experts,
    ExpertsRegistry,
    Json,
    Layout,
    Merge,
    OutFolder,
    PackageVersion,
    Quiet,
    RouterText,
    Sample,
    ScoutTokens,
    StoredDtype,
)
from composable.cli.output import format_table, show

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Import adapters and export models."""


@app.command(name="import-peft")
def import_peft(
    source: Adapter,
    backbone: AdapterBackbone,
    sample: Sample,
    name: AdapterName = None,
    version: PackageVersion = "1.0.0",
    out: OutFolder = None,
    base: AdapterBase = None,
    scout_steps: Annotated[
        int, typer.Option(min=2, help="Number of training steps of the scout.")
    ] = 1000,
    scout_tokens: ScoutTokens = 200_000,
    seed: Annotated[int, typer.Option(help="Random seed for training the scout.")] = 0,
    license_: AdapterLicense = "",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Convert a PEFT adapter into an expert.

    The body computes exactly what the adapter does; the scout is trained on the sample. Adapters
    that cannot be converted exactly are rejected, naming the field or tensor.
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
    is_source = Path(name).resolve() == source.resolve()
    folder = out or Path(f"{name}-expert" if is_source else name)
    with bars.show_stages(is_quiet=is_quiet or as_json) as progress:
        record = import_adapter(
            load_backbone(backbone), source, folder, plan, read_documents(sample), progress=progress
        )
    show(
        f"{folder}\n{_adapter_table(record)}\nnext: composable check {shlex.quote(str(folder))}",
        {"folder": str(folder), **record},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command(name="export-hf")
def export_hf(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder.", show_default=False)],
    experts: Experts = None,
    backbone: Backbone = None,
    registry: ExpertsRegistry = None,
    is_alone: Alone = False,
    merge: Merge = None,
    layout: Layout = None,
    text: RouterText = None,
    fit_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens to fit the routers on.")
    ] = 8192,
    dtype: StoredDtype = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Write a model as a Hugging Face folder, and list what is lost.

    With --alone or --merge, the written model computes the same as this one. A mixture needs
    routers of another kind: they are fitted on text, and the loss in quality is measured.
    """
    if merge is not None and is_alone:
        raise typer.BadParameter("cannot be used with --alone", param_hint="--merge")
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
            f"{origin['base'] or 'unnamed'} ({'' if origin['is_verified'] else 'not '}verified)",
        ),
        ("body", f"rank {body['rank']}, {len(body['changed'])} of {body['matrices']} matrices"),
        ("scout", "too little text to measure" if scout is None else f"{scout:.2f} bits per class"),
        ("sample", f"{bits['backbone']:.3f} -> {bits['expert']:.3f} bits per byte, always on"),
    ]
    return format_table((), rows)
