"""Match the regular expressions of other people, of which some would take forever.

Python's `re` backtracks: `(a+)+b` takes time that doubles with every letter. Expressions that can
do so are matched in a process with limits; those that show that they cannot are matched here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from composable.interop.limited_process import run_limited

# Characters and classes, each repeated or not, and groups that are not: what repeats is never
# inside of something that repeats.
_FLAT: Final = re.compile(
    r"(?:(?:\\[.wWdDsS-]|\[[\w.^-]+\]|[\w .-])(?:[*+?]\??)?|[\^$|)]|\((?!\?))*"
)
# How often a flat one may repeat and branch: a name of 100 characters then takes a moment at worst.
_MAX_REPEATS: Final = 3
_MAX_BRANCHES: Final = 6
# And all expressions of a job together.
_MAX_TOTAL: Final = 12
Groups = dict[str, str | None]


def match_patterns(
    patterns: Sequence[str], names: Sequence[str], within: str = "{}"
) -> list[dict[str, Groups]]:
    """Match names, whole, against regular expressions.

    Args:
        patterns: The expressions.
        names: The names, short ones.
        within: An expression of our own that has each of them in place of `{}`.

    Returns:
        For every expression, the names that match it, each with its named groups.

    Raises:
        StoppedError: If it takes too long, or too much memory.
        ValueError: For what is not a regular expression.

    Example:
        >>> match_patterns([r"layers\\.(?P<index>\\d+)"], ["layers.1", "embed"])
        [{'layers.1': {'index': '1'}}]
        >>> match_patterns(["(a+)+b"], ["a" * 60])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        composable.interop.limited_process.StoppedError: stopped (exit status ...); it may use 3 s \
of processor time and 512 MiB of memory
    """
    whole = [within.replace("{}", pattern) for pattern in patterns]
    job = {"patterns": whole, "names": list(names)}
    n_total = sum(sum(map(pattern.count, "*+?|")) for pattern in patterns)
    is_quick = n_total <= _MAX_TOTAL and all(map(_is_quick, patterns))
    found = match_all(job) if is_quick else run_limited(match_all, job)
    if isinstance(found, str):
        raise ValueError(found)
    matches: list[dict[str, Groups]] = found
    return matches


def _is_quick(pattern: str) -> bool:
    """Return whether an expression shows that matching a short name with it is quick."""
    return (
        _FLAT.fullmatch(pattern) is not None
        and sum(map(pattern.count, "*+?")) <= _MAX_REPEATS
        and pattern.count("|") <= _MAX_BRANCHES
    )


def match_all(job: dict[str, Any]) -> list[dict[str, Groups]] | str:
    """Return the matches of every pattern; as text, what is wrong with the first malformed one."""
    found = []
    for pattern in job["patterns"]:
        try:
            expression = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{pattern[:200]!r} is not a regular expression: {error}"
        matches = {name: expression.fullmatch(name) for name in job["names"]}
        found.append({name: m.groupdict() for name, m in matches.items() if m is not None})
    return found
