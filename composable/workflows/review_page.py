"""What people read of a review: a page, one HTML file without scripts that fetches nothing.

A summary in Markdown is for the pull requests of a forge.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined

from composable.files import atomic
from composable.printable import printable
from composable.workflows.verdicts import ReviewVerdict

PAGE_FILE: Final = "verdict.html"
SUMMARY_FILE: Final = "verdict.md"
# What Markdown or HTML would read as more than text.
_MARKUP: Final = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]()<>|#!~&@"})


def write_page(folder: Path, verdict: ReviewVerdict) -> Path:
    """Write the page of a verdict, and return its path.

    Args:
        folder: Where to write it.
        verdict: The verdict.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_show, trim_blocks=True
    )
    source = resources.files("composable.workflows").joinpath("review.html").read_text("utf-8")
    bits = [
        value
        for document in verdict.documents
        for value in (document.base, document.proposed)
        if value is not None
    ]
    margin = 0.05 * (max(bits) - min(bits)) or 0.1 if bits else 0.0
    triggers = verdict.measured.get("triggers", {})
    peers = verdict.measured.get("beside", {})
    page = environment.from_string(source).render(
        verdict=verdict,
        low=min(bits) - margin if bits else 0.0,
        high=max(bits) + margin if bits else 1.0,
        points=[one for one in verdict.documents if None not in (one.base, one.proposed)],
        peers={name: _peer_changes(figures) for name, figures in peers.items()},
        triggers=[loss for loss in triggers.get("loss", []) if loss is not None],
    )
    path = folder / PAGE_FILE
    atomic.write_text(path, page)
    return path


def write_summary(folder: Path, verdict: ReviewVerdict) -> Path:
    """Write a verdict as Markdown, and return its path.

    Args:
        folder: Where to write it.
        verdict: The verdict.
    """
    rows = [
        f"| {_escape(check.name)} | {'ok' if check.passed else '**failed**'} "
        f"| {_escape(check.found)} | {_escape(check.expected)} |"
        for check in verdict.checks
    ]
    lines = [
        f"## Review of a change of {_escape(verdict.base)}",
        "",
        _escape(verdict.summary),
        "",
        *(f"**Warning:** {_escape(warning)}\n" for warning in verdict.warnings),
        "| check | outcome | found | expected |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Proposal `{verdict.proposal}`",
    ]
    path = folder / SUMMARY_FILE
    atomic.write_text(path, "\n".join(lines) + "\n")
    return path


def _escape(text: str) -> str:
    """Return text that others wrote as Markdown that shows it and nothing else."""
    return printable(text).translate(_MARKUP)


def _peer_changes(figures: dict[str, dict[str, float | None] | None]) -> dict[str, float]:
    """Return by which share each kind of a peer's text costs more, by kind."""
    changes = {}
    for kind in ("own", "anchor"):
        row = figures.get(kind)
        if row and row["with"] is not None and row["without"]:
            changes[kind] = row["with"] / row["without"] - 1
    return changes


def _show(value: object) -> object:
    """Make text that others wrote safe to show."""
    return printable(value) if isinstance(value, str) else value
