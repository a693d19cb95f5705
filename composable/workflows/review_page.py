"""The page of a review: one HTML file without scripts that fetches nothing."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined

from composable.files import atomic
from composable.printable import printable
from composable.workflows.review import ReviewVerdict

PAGE_FILE: Final = "verdict.html"


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
