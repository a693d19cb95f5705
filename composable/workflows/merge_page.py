"""The page of a merge or a conflict: one HTML file without scripts that fetches nothing."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from composable.files import atomic
from composable.printable import printable
from composable.workflows.merge_report import MergeReport


def write_page(path: Path, report: MergeReport) -> None:
    """Write the page.

    Args:
        path: The file.
        report: What was tried and chosen.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_show, trim_blocks=True
    )
    source = resources.files("composable.workflows").joinpath("merge.html").read_text("utf-8")
    page = environment.from_string(source).render(
        report=report,
        limits={part: _limits(report, part) for part in report.tried},
        changes={c.name: max(c.losses.values(), default=0.0) for c in report.conflicts},
    )
    atomic.write_text(path, page)


def _limits(report: MergeReport, part: str) -> tuple[float, float]:
    """Return the range of a plot: all that is at most twice as bad as the median candidate."""
    worst = sorted(tried.worst for tried in report.tried[part])
    high = max(2 * worst[len(worst) // 2], worst[0], 0.01)
    low = min(min(tried.changes.values()) for tried in report.tried[part])
    return min(low, 0.0) - 0.05 * high, 1.05 * high


def _show(value: object) -> object:
    """Make text that others wrote safe to show."""
    return printable(value) if isinstance(value, str) else value
