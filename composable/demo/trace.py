"""The router weights at each byte of a document, as a strip of layers and as runs of text.

Nothing is drawn here: the page's template makes HTML of it, and its style gives each expert a
colour.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Final

import numpy as np

from composable.errors import ModelError

# Below this weight no expert dominates, and the text is tinted faintly.
_DOMINANT: Final = 0.6


@dataclass(frozen=True)
class Trace:
    """The router weights at each byte of a document.

    Args:
        text: The document.
        segments: Domain, start and end of each piece it was spliced from, in order and in bytes.
        names: The bank's entries, the backbone first; an empty name for an empty entry.
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
        """Return the mean router weight of the expert of the true domain.

        Where no expert is for a text, such as public text, the weight of the backbone counts.

        Example:
            >>> weights = np.array([[1.0, 0.0], [0.5, 0.5]])
            >>> Trace(b"ab", (("german", 0, 2),), ("backbone", "german"), weights).weight_on_truth()
            0.25
        """
        index = {name: e for e, name in enumerate(self.names)}
        true_E = np.zeros(len(self.names))
        for name, start, end in self.segments:
            e = index.get(name, 0)
            true_E[e] += self.weight_TE[start:end, e].sum()
        return float(true_E.sum() / sum(end - start for _, start, end in self.segments))


def thin_weights(weight_TE: np.ndarray, columns: int = 1_200) -> np.ndarray:
    """Return at most `columns` rows, each the mean of neighbouring ones, since no strip shows more.

    Args:
        weight_TE: Weights, (bytes, names).
        columns: Largest number of rows.

    Example:
        >>> thin_weights(np.array([[1.0, 0.0], [0.0, 1.0]]), columns=1)
        array([[0.5, 0.5]])
    """
    count = min(len(weight_TE), columns)
    starts = np.arange(count) * len(weight_TE) // count
    lengths = np.diff(starts, append=len(weight_TE))
    return np.add.reduceat(weight_TE, starts) / lengths[:, None]


@dataclass(frozen=True)
class Layer:
    """A layer of a strip.

    Args:
        entry: Whose weights it shows: index into the trace's names.
        path: Its outline, as the `d` of an SVG path, from the top down to its lower edge.
    """

    entry: int
    path: str


@dataclass(frozen=True)
class Strip:
    """The router weights of a document as stacked layers.

    Args:
        width: Columns; the height is 100.
        layers: In the order to paint them: each later one covers the top of those before.
    """

    width: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Run:
    """Neighbouring characters with nearly the same router weights.

    Args:
        segment: Domain of the segment that starts with this run; None if none does.
        entry: Index of the largest weight in the trace's names.
        is_uncertain: Whether no weight is large.
        title: The weights, in words.
        characters: Each character, and whether a code or mark stands for it.
    """

    segment: str | None
    entry: int
    is_uncertain: bool
    title: str
    characters: tuple[tuple[str, bool], ...]


def stack_layers(trace: Trace) -> Strip:
    """Return the router weights of a document as stacked layers.

    Args:
        trace: The document and its weights.
    """
    weight_TE = thin_weights(trace.weight_TE)
    depth_TE = np.round(100 * np.cumsum(weight_TE, axis=1)).astype(int)
    layers = []
    # Each layer reaches up to the top; the one above it is painted over it.
    for e in reversed(np.flatnonzero(weight_TE.any(axis=0)).tolist()):
        line, x = "", 0
        for depth, run in groupby(depth_TE[:, e].tolist()):
            x += len(list(run))
            line += f"V{depth}H{x}"
        layers.append(Layer(e, f"M0 0{line}V0Z"))
    return Strip(len(weight_TE), tuple(layers))


def split_runs(trace: Trace, n_bytes: int) -> list[Run]:
    """Return the text of a document in runs of the same largest weight.

    Args:
        trace: The document and its weights.
        n_bytes: Length of the text to return.
    """
    starts = {start: name for name, start, _ in trace.segments}

    def describe(item: tuple[int, int, str, bool]) -> tuple[int, int, bool, str]:
        start, end, _, _ = item
        weight_E = trace.weight_TE[start:end].mean(axis=0)
        order = np.argsort(-weight_E, kind="stable").tolist()
        title = ", ".join(
            f"{trace.names[e]} {weight_E[e]:.0%}" for e in order if weight_E[e] > 0.005
        )
        is_uncertain = bool(weight_E[order[0]] < _DOMINANT)
        segment = max((other for other in starts if other <= start), default=-1)
        return segment, order[0], is_uncertain, title

    runs, last = [], -1
    shown = takewhile(lambda item: item[0] < n_bytes, _split_characters(trace.text))
    for (segment, entry, is_uncertain, title), run in groupby(shown, key=describe):
        characters = tuple((character, is_code) for _, _, character, is_code in run)
        name = starts[segment] if segment != last else None
        runs.append(Run(name, entry, is_uncertain, title, characters))
        last = segment
    return runs


def _split_characters(text: bytes) -> Iterator[tuple[int, int, str, bool]]:
    """Yield start and end of each character, how it is shown, and whether that is a code."""
    start = 0
    for character in text.decode(errors="surrogateescape"):
        end = start + len(character.encode(errors="surrogateescape"))
        if character == "\n":
            yield start, end, "↵", True
        elif "\udc80" <= character <= "\udcff":
            yield start, end, f"\\x{text[start]:02x}", True
        elif unicodedata.category(character).startswith("C") and character != "\t":
            yield start, end, character.encode("unicode_escape").decode(), True
        else:
            yield start, end, character, False
        start = end
