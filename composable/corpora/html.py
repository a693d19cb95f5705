"""HTML to plain text: paragraphs apart, code as it is laid out, nothing of the page around it.

For documentation that was written by a program: every element is closed. Not a browser: styles,
scripts and pictures say nothing here, and a table is its rows with a tab between two cells.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from html.parser import HTMLParser
from typing import Final

# Elements without an end, which therefore hold nothing.
_VOID: Final = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"]
)
_SKIPPED: Final = frozenset(["head", "script", "style"])
_HEADINGS: Final = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
_PARAGRAPHS: Final = _HEADINGS | frozenset(
    ["address", "blockquote", "div", "dl", "dt", "hr", "li", "ol", "p", "pre", "table", "ul"]
)
_LINES: Final = frozenset(["br", "dd", "tr"])
_CELLS: Final = frozenset(["td", "th"])


def strip_html(source: str, left_out: Collection[str] = ()) -> str:
    """Return the text of an HTML page.

    Args:
        source: The page as stored, decoded.
        left_out: An element of one of these classes is left out with all that it holds.
    """
    parser = _Text(frozenset(left_out))
    parser.feed(source)
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.pieces).replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


class _Text(HTMLParser):
    """Gathers pieces of text."""

    def __init__(self, left_out: frozenset[str]) -> None:
        super().__init__()
        self.pieces = list[str]()
        self._left_out = left_out
        self._depth_skipped = 0  # open elements, counted from the one that is left out
        self._depth_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if self._depth_skipped or tag in _SKIPPED or not self._left_out.isdisjoint(classes):
            self._depth_skipped += tag not in _VOID
            return
        self._depth_pre += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._depth_skipped:
            self._depth_skipped -= tag not in _VOID
            return
        self._depth_pre -= tag == "pre" and self._depth_pre > 0
        if tag in _CELLS:
            self.pieces.append("\t")
        elif tag not in _LINES:
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._depth_skipped:
            return
        if not self._depth_pre:
            data = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", data))
            if not self.pieces or self.pieces[-1].endswith(("\n", "\t")):
                data = data.lstrip()
        if data:
            self.pieces.append(data)

    def _break(self, tag: str) -> None:
        """End the paragraph or the line, if one has begun."""
        if tag in _PARAGRAPHS:
            self.pieces.append("\n\n")
        elif tag in _LINES and self.pieces and not self.pieces[-1].endswith("\n"):
            self.pieces.append("\n")
