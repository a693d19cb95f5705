"""Text marked with the expert of largest router weight: colours on a terminal, labels elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final, Protocol

# Foreground colours that are distinct on dark and light grounds; the backbone has none.
_COLOURS: Final = (36, 33, 35, 32, 34, 31, 96, 93, 95, 92, 94, 91)
_RESET: Final = "\x1b[0m"


class PieceFormat(Protocol):
    """Format of generated text."""

    def piece(self, text: str, weight_E: Any) -> str:
        """Return a piece of text as it is printed, given its router weights."""

    def end(self) -> str:
        """Return the text printed after the last piece."""


class _Plain:
    def piece(self, text: str, weight_E: Any) -> str:
        return text

    def end(self) -> str:
        return ""


class _Routed:
    """Names of the experts, and which of them had the largest weight so far."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self._names = names
        self._seen: list[int] = []

    def _find_heaviest(self, weight_E: Any) -> int:
        index = int(max(range(len(weight_E)), key=lambda e: weight_E[e]))
        if index not in self._seen:
            self._seen.append(index)
        return index


class Coloured(_Routed):
    """Text in the colour of the expert with the largest weight, and a legend at the end."""

    def piece(self, text: str, weight_E: Any) -> str:
        """Return a piece in its colour."""
        return self._paint(text, self._find_heaviest(weight_E))

    def end(self) -> str:
        """Return the legend of the colours that were used."""
        legend = [self._paint(str(self._names[e]), e) for e in sorted(self._seen)]
        self._seen = []
        return "\n" + "  ".join(legend)

    def _paint(self, text: str, index: int) -> str:
        if index == 0:
            return text
        return f"\x1b[{_COLOURS[(index - 1) % len(_COLOURS)]}m{text}{_RESET}"


class Marked(_Routed):
    """Text with the expert's name in brackets wherever the expert of largest weight changes."""

    def __init__(self, names: Sequence[str | None]) -> None:
        super().__init__(names)
        self._last: int | None = None

    def piece(self, text: str, weight_E: Any) -> str:
        """Return a piece, with a label before it where the expert changes."""
        index = self._find_heaviest(weight_E)
        mark = "" if index == self._last else f"[{self._names[index]}]"
        self._last = index
        return mark + text

    def end(self) -> str:
        """Return an empty string: the labels need no legend."""
        self._last = None
        return ""


def choose_format(names: Sequence[str | None], *, is_wanted: bool) -> PieceFormat:
    """Return the format of text: plain, coloured on a terminal with colours, or labelled."""
    if not is_wanted:
        return _Plain()
    has_colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return Coloured(names) if has_colours else Marked(names)
