"""The page of a comparison: one HTML file without scripts that fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from composable.files import atomic
from composable.printable import printable
from composable.workflows.diff import MatrixChange, TextChange


def write_page(
    path: Path,
    before: str,
    after: str,
    matrices: Sequence[MatrixChange],
    texts: Mapping[str, TextChange],
) -> None:
    """Write the page.

    Args:
        path: The file.
        before: What the first side is called.
        after: What the second is called.
        matrices: The tensors of two experts; none for two locks.
        texts: What the change means, by domain.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_show, trim_blocks=True
    )
    source = resources.files("composable.workflows").joinpath("diff.html").read_text("utf-8")
    sides = {name: _limits(text) for name, text in texts.items()}
    relative = [matrix.relative for matrix in matrices if matrix.relative is not None]
    page = environment.from_string(source).render(
        before=before,
        after=after,
        matrices=matrices,
        largest=max(relative, default=0.0) or 1.0,
        texts=texts,
        limits=sides,
    )
    atomic.write_text(path, page)


def _limits(text: TextChange) -> tuple[float, float]:
    """Return the range of the plot of a domain, in bits per byte."""
    bits = [value for document in text.documents for value in document.bits[1:]]
    low, high = min(bits), max(bits)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _show(value: object) -> object:
    """Make text that others wrote safe to show."""
    return printable(value) if isinstance(value, str) else value
