r"""Text that others wrote, made safe to print: the one function for terminals and pages.

Descriptions, names of files, answers of servers and generated text may hold escape sequences,
which move the cursor or retitle the window; marks that reverse the direction of the line; and
newlines that look like another row. They are shown as escapes, such as `\x1b`. JSON escapes them,
too, and is read as exactly what it was.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

# Control characters, line and paragraph separators, invisible marks (direction, zero width, byte
# order, tags) and half characters. Joiners and soft hyphens stay: scripts and emoji need them.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def printable(text: str, keep: str = "") -> str:
    r"""Return text with everything escaped that a terminal would act on or not show.

    Args:
        text: Any text.
        keep: Characters to leave as they are: newlines and tabs of text with several lines.

    Example:
        >>> print(printable("red \x1b[31m, left \u202e, two\nlines"))
        red \x1b[31m, left \u202e, two\nlines
    """
    return _UNSAFE.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        text,
    )


def printable_json(data: Any, indent: int | None = None) -> str:
    r"""Return data as JSON that is safe to print and is read as the same data.

    Example:
        >>> print(printable_json({"text": "ä\x9b\u202e"}))
        {"text": "ä\u009b\u202e"}
    """
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    # The newlines left are those of the indentation; inside a string they are escaped already.
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else _to_json(found[0]), text)


def _to_json(character: str) -> str:
    escaped = json.dumps(character)[1:-1]
    return escaped if escaped != character else f"\\u{ord(character):04x}"
