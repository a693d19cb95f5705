"""The command that merges experts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composable.cli import bars
from composable.cli.options import Backbone, Json, LookupRegistry, Quiet
from composable.cli.output import format_table, note, show

if TYPE_CHECKING:
    from composable.corpora.documents import Document
    from composable.workflows.merge_report import Conflict, Judgement, MergeReport, Tried

app = typer.Typer(rich_markup_mode=None)

_SHOWN = 5  # candidates of each part, and matrices


@app.callback()
def _commands() -> None:
    """Keep the command's name: an app of one command without this would have none."""


@app.command()
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", show_default=False)],
    ours: Annotated[str, typer.Argument(metavar="OURS", show_default=False)],
    theirs: Annotated[list[str], typer.Argument(metavar="THEIRS...", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILES",
            help="Held-out text, named after the expert that it is from; repeatable.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            help="Try only linear, ties, dare, low-rank, fisher, regmean or group; repeatable.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the merged expert. Default: that of BASE.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page with plots, of a conflict too.",
            show_default=False,
        ),
    ] = None,
    registry: LookupRegistry = None,
    backbone: Backbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Merge experts that derive from one release into one.

    BASE is the release that OURS and THEIRS derive from; each is NAME@V or the folder of an expert.
    Several methods are tried, for the body and for the scout. The one is kept that loses least on
    the text of any side: the text of --data, or else what the statistics that every side published
    predict.

    The merged expert is written if it is shown to be not worse than any side on any text: the upper
    95% confidence bound of the change in bits per byte is below 1%. Every fourth document of a text
    chooses the method and the others judge it, 15 at least. Otherwise nothing is written and a
    conflict is reported, with exit code 1. The method group keeps all sides: the release that it
    writes requires them. It is tried last where there is text, by the same rule, and can be asked
    for without.
    """
    from composable.assembly.backbones import load_backbone
    from composable.assembly.load import default_backbone
    from composable.cli.diff import find_expert
    from composable.errors import MergeConflictError
    from composable.files.records import to_plain
    from composable.workflows.merge import merge_experts
    from composable.workflows.merge_sides import require_published_base

    texts = _read_texts(data or ())
    loaded = load_backbone(backbone or default_backbone())
    root, *sides = (find_expert(side, loaded, registry) for side in (base, ours, *theirs))
    require_published_base(root, registry)
    conflict: MergeConflictError | None = None
    try:
        with bars.show_counts("methods", is_quiet=is_quiet) as progress:
            report = merge_experts(
                loaded, root, sides, out, texts=texts, methods=method, name=name, progress=progress
            )
    except MergeConflictError as error:
        conflict, report = error, error.report
    if html is not None:
        from composable.workflows.merge_page import write_page

        write_page(html, report)
        note(f"wrote {html}", is_quiet=is_quiet)
    parts = list(_describe(report))
    if conflict is None:
        parts.append(f"wrote {report.release} to {out}; next:\n{_list_next(out, report)}")
    plain = {"is_good": conflict is None, **to_plain(report)}
    show("\n\n".join(parts), plain, as_json=as_json, is_quiet=is_quiet and conflict is None)
    if conflict is not None:
        if not as_json:
            note(f"error: {conflict}")
        raise typer.Exit(1)


def _read_texts(data: Sequence[str]) -> dict[str, list[Document]]:
    """Return the documents of `NAME=FILES`, by name."""
    from composable.corpora.documents import read_documents

    files: dict[str, list[Path]] = {}
    for pair in data:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{pair!r}: expected NAME=FILES", param_hint="--data")
        files.setdefault(name, []).append(Path(path))
    return {name: read_documents(paths) for name, paths in files.items()}


def _describe(report: MergeReport) -> Iterator[str]:
    """Yield the tables of a report."""
    what = "measured" if report.evidence == "text" else "predicted"
    for part, tried in report.tried.items():
        texts = list(tried[0].changes)
        yield format_table(
            (part.upper(), *(f"ON {text}" for text in texts)),
            [_tried_row(row) for row in _best_of_methods(tried)],
        )
    if report.tried:
        yield f"{what}: change of the loss against the best side on each text; less is better"
    yield "\n".join(f"{part}: {choice}" for part, choice in report.chosen.items())
    unit = "BITS PER BYTE" if report.evidence == "text" else "NATS PER TOKEN"
    for what, judgements in (("MERGED", report.declined), ("CHOSEN", report.judgements)):
        if judgements:
            yield format_table(
                (unit, "SIDE", "OF THE SIDE", what, "95% BOUNDS", "DOCUMENTS", ""),
                [_judgement_row(judgement) for judgement in judgements],
            )
    if not report.is_good:
        worst = sorted(report.conflicts, key=_rank_conflict)[:_SHOWN]
        yield format_table(
            ("TENSORS IN CONFLICT", "COSINE", "OPPOSED", "PREDICTED LOSS"),
            [_conflict_row(conflict) for conflict in worst],
        )


def _best_of_methods(tried: Sequence[Tried]) -> list[Tried]:
    """Return the best candidate of every method, best first."""
    best: dict[str, Tried] = {}
    for row in tried:
        best.setdefault(row.method, row)
    return list(best.values())


def _tried_row(row: Tried) -> tuple[str, ...]:
    return (str(row.candidate), *(f"{change:+.2%}" for change in row.changes.values()))


def _judgement_row(judgement: Judgement) -> tuple[str, ...]:
    bounds = ""
    if judgement.low is not None and judgement.high is not None:
        bounds = f"{judgement.low:+.1%} to {judgement.high:+.1%}"
    needed = f", about {judgement.needed} documents needed" if judgement.needed else ""
    return (
        *(judgement.text, judgement.side),
        *(f"{judgement.before:.3f}", f"{judgement.after:.3f}"),
        *(bounds, str(judgement.documents or ""), f"{judgement.outcome}{needed}"),
    )


def _rank_conflict(conflict: Conflict) -> tuple[float, float]:
    return -max(conflict.losses.values(), default=0.0), -conflict.opposed


def _conflict_row(conflict: Conflict) -> tuple[str, ...]:
    losses = ", ".join(f"{side} {loss:+.4f}" for side, loss in conflict.losses.items())
    return (
        *(conflict.name, f"{conflict.cosine:+.2f}", f"{conflict.opposed:.0%}"),
        losses or "no statistics",
    )


def _list_next(out: Path, report: MergeReport) -> str:
    """Return the commands that check and publish the result."""
    folder = shlex.quote(str(out))
    data = "" if report.evidence == "text" else " --data FILES"
    return (
        f"  composable check {folder}{data} --against {report.base}\n  composable publish {folder}"
    )
