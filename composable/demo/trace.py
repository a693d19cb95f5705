"""The router weights at each byte of a document: the record, as a strip and as coloured text.

A class of the page's style stands for each name; what colours they have is the report's business.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, takewhile
from typing import Final

import numpy as np

from composable.errors import ModelError

# Below this weight no expert dominates, and the text is tinted faintly.
_TRUSTED: Final = 0.6


@dataclass(frozen=True)
class Trace:
    """The router weights at each byte of a document.

    Args:
        text: The document.
        segments: Domain, start and end of each piece it was spliced from, in order and in bytes.
        names: Whose weights they are; the backbone first, an empty name for an empty place.
        weight_TE: Weights, (bytes, names), each row a distribution.

    Raises:
        ModelError: If the text is empty, or the weights are not of that shape.
    """

    text: bytes
    segments: tuple[tuple[str, int, int], ...]
    names: tuple[str, ...]
    weight_TE: np.ndarray

    def __post_init__(self) -> None:
        expected = (len(self.text), len(self.names))
        if not self.text or self.weight_TE.shape != expected:
            raise ModelError(
                f"weights of shape {self.weight_TE.shape} for {expected[0]} bytes and "
                f"{expected[1]} names; expected {expected}, and at least one byte"
            )

    def weight_on_truth(self) -> float:
        """Return the mean weight of the expert of the true domain.

        What no expert is for, such as public text, is the backbone's.
        """
        index = {name: e for e, name in enumerate(self.names)}
        true_E = np.zeros(len(self.names))
        for name, start, end in self.segments:
            e = index.get(name, 0)
            true_E[e] += self.weight_TE[start:end, e].sum()
        return float(true_E.sum() / sum(end - start for _, start, end in self.segments))


def thin_weights(weight_TE: np.ndarray, columns: int = 1_200) -> np.ndarray:
    """Return at most so many rows, each the mean of those it stands for: no strip shows more."""
    count = min(len(weight_TE), columns)
    starts = np.arange(count) * len(weight_TE) // count
    lengths = np.diff(starts, append=len(weight_TE))
    return np.add.reduceat(weight_TE, starts) / lengths[:, None]


def draw_strip(trace: Trace, class_of: Sequence[str]) -> str:
    """Return the weights as stacked layers, in SVG.

    Args:
        trace: The record.
        class_of: Class of each name's layer.
    """
    weight_TE = thin_weights(trace.weight_TE)
    depth_TE = np.round(100 * np.cumsum(weight_TE, axis=1)).astype(int)
    layers = ""
    # Each layer reaches up to the top; the one above it is painted over it.
    for e in reversed(np.flatnonzero(weight_TE.any(axis=0)).tolist()):
        line, x = "", 0
        for depth, run in groupby(depth_TE[:, e].tolist()):
            x += len(list(run))
            line += f"V{depth}H{x}"
        layers += f'<path class="{class_of[e]}" d="M0 0{line}V0Z"/>'
    return (
        f'<svg class="strip" viewBox="0 0 {len(weight_TE)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="weights of the experts over the document">{layers}</svg>'
    )


def colour_text(trace: Trace, class_of: Sequence[str], n_bytes: int) -> str:
    """Return the document as HTML, each character in a run of the class of the largest weight.

    The title of a run lists the weights. A mark stands where a segment begins.

    Args:
        trace: The record.
        class_of: Class of each name's runs; "torn" is added where no weight is large.
        n_bytes: How much of the document to return.
    """
    begins = {start: name for name, start, _ in trace.segments}

    def look(item: tuple[int, int, str]) -> tuple[int, str, str]:
        start, end, _ = item
        weight_E = trace.weight_TE[start:end].mean(axis=0)
        order = np.argsort(-weight_E, kind="stable").tolist()
        title = ", ".join(
            f"{trace.names[e]} {weight_E[e]:.0%}" for e in order if weight_E[e] > 0.005
        )
        torn = "" if weight_E[order[0]] >= _TRUSTED else " torn"
        segment = max((begin for begin in begins if begin <= start), default=-1)
        return segment, class_of[order[0]] + torn, title

    html, last = "", -1
    shown = takewhile(lambda item: item[0] < n_bytes, _characters(trace.text))
    for (segment, kind, title), run in groupby(shown, key=look):
        if segment != last:
            html += f"<q>{escape(begins[segment])}</q>"
            last = segment
        body = "".join(character for _, _, character in run)
        html += f'<b class="{kind}" title="{escape(title)}">{body}</b>'
    return html


def _characters(text: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and HTML of each character; what cannot be shown is shown by its code."""
    start = 0
    for character in text.decode(errors="surrogateescape"):
        end = start + len(character.encode(errors="surrogateescape"))
        if character == "\n":
            body = "<i>↵</i>\n"
        elif "\udc80" <= character <= "\udcff":
            body = f"<i>\\x{text[start]:02x}</i>"
        elif unicodedata.category(character).startswith("C") and character != "\t":
            body = f"<i>{character.encode('unicode_escape').decode()}</i>"
        else:
            body = escape(character)
        yield start, end, body
        start = end
