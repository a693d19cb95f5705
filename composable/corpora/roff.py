"""Manual pages to plain text: the part of roff that pages written with the `man` macros use.

Not a typesetter: fonts, indents and tables are dropped, paragraphs and headings are kept. A page in
the other macro language, mdoc, is not read at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

# Requests whose arguments are text.
_TEXT: Final = frozenset(["B", "I", "SB", "SM", "BI", "BR", "IB", "IR", "RB", "RI", "UR", "MT"])
# ... and those of them that set their arguments side by side.
_JOINED: Final = frozenset(["BI", "BR", "IB", "IR", "RB", "RI"])
_HEADINGS: Final = frozenset(["SH", "SS"])
_BREAKS: Final = frozenset(["PP", "LP", "P", "HP", "TP", "sp"])
# Requests that begin what is not text, and the lines that end it.
_SKIPPED: Final[Mapping[str, str]] = {"de": "..", "ig": "..", "TS": ".TE"}
_MDOC: Final = re.compile(r"^\.Dd\b", re.MULTILINE)
_REQUEST: Final = re.compile(r"[.'][ \t]*(?P<name>[A-Za-z]*)[ \t]*(?P<rest>.*)")
_ARGUMENT: Final = re.compile(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)')
_ESCAPE: Final = re.compile(
    r"\\(?:"
    r"(?P<comment>[\"#].*)"
    r"|f(?:\[[^]]*\]|\(..|.)"
    r"|s[-+]?(?:\(..|\d{1,2})"
    r"|[hvwlLoDN](?P<quote>['\"]).*?(?P=quote)"
    r"|[*nmMFk][-+]?(?:\[[^]]*\]|\(..|.)"
    r"|\[(?P<long>[^]]*)\]"
    r"|\((?P<short>..)"
    r"|(?P<one>.)"
    r")"
)
# Special characters by their roff names; what is not here is dropped.
_CHARACTERS: Final[Mapping[str, str]] = {
    "aq": "'", "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "dq": '"', "Fo": "«", "Fc": "»",
    "bu": "•", "em": "—", "en": "–", "hy": "-", "mi": "-", "ha": "^", "ti": "~", "rs": "\\",
    "co": "©", "rg": "®", "tm": "™", "ga": "`", "aa": "´", "->": "→", "<-": "←", ">=": "≥",
    "<=": "≤", "!=": "≠", "+-": "±", "mu": "×", "la": "⟨", "ra": "⟩", "sc": "§", "de": "°",
    "at": "@", "sh": "#", "Do": "$", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "ba": "|",
    "ss": "ß", ":a": "ä", ":o": "ö", ":u": "ü", ":A": "Ä", ":O": "Ö", ":U": "Ü", "eu": "€",
}  # fmt: skip
_ONE: Final[Mapping[str, str]] = {"-": "-", "e": "\\", "\\": "\\", "~": " ", " ": " ", "0": " "}


def strip_roff(source: str) -> str:
    """Return the text of a manual page, paragraphs apart; empty for one that is not `man` roff.

    Args:
        source: The page as stored, decoded.
    """
    if _MDOC.search(source):
        return ""
    text = "\n".join(_lines(iter(source.split("\n"))))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip("\n")


def _lines(source: Iterator[str]) -> Iterator[str]:
    for line in source:
        request = _REQUEST.fullmatch(line)
        if request is None:
            yield _unescape(line)
            continue
        name, rest = request["name"], request["rest"]
        if name in _SKIPPED:
            _skip(source, lambda inner, end=_SKIPPED[name]: inner.startswith(end))  # type: ignore[misc]
        elif name in ("if", "ie", "el"):
            _skip_block(source, rest)
        elif name in _HEADINGS:
            yield f"\n{_join(name, rest)}"
        elif name == "IP":
            yield f"\n{_join(name, rest, most=1)}"
        elif name in _BREAKS:
            yield ""
        elif name in _TEXT:
            yield _join(name, rest)


def _skip(source: Iterator[str], ends: Callable[[str], bool]) -> None:
    """Read up to the line that ends."""
    for line in source:
        if ends(line):
            return


def _skip_block(source: Iterator[str], rest: str) -> None:
    """Read to the end of a conditional: its line, or the braces that it opens."""
    depth = rest.count(r"\{") - rest.count(r"\}")
    while depth > 0 and (line := next(source, None)) is not None:
        depth += line.count(r"\{") - line.count(r"\}")


def _join(name: str, rest: str, most: int | None = None) -> str:
    """Return a request's arguments as text."""
    found = [quoted.replace('""', '"') or plain for quoted, plain in _ARGUMENT.findall(rest)]
    return _unescape(("" if name in _JOINED else " ").join(found[:most]))


def _unescape(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if name := match["long"] or match["short"]:
            return _CHARACTERS.get(name, "")
        return _ONE.get(match["one"] or "", "")

    return _ESCAPE.sub(replace, text)
