"""Long explanations made short: chains are told by their ends, lists by their first and last."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from composable.packaging.resolution.solver import Fact

MAX_CHAIN: Final = 5
MAX_LISTED: Final = 4


def fold_chains(facts: Iterable[Fact]) -> dict[tuple[str, str], str]:
    """Return one sentence for the middle of each long chain of needs.

    A link of a chain is a package that one package needs, that needs one package, and that nothing
    else is said about.

    Args:
        facts: What rules a problem out.

    Returns:
        The sentence that replaces each need between two links, by who needs and what is needed.

    Example:
        >>> from composable.packaging.resolution.solver import ChoiceSet
        >>> one = ChoiceSet(1)
        >>> needs = [Fact(kind="need", name=f"a{i}", choices=one, other=f"a{i + 1}", allowed=one)
        ...          for i in range(9)]
        >>> set(fold_chains(needs).values())
        {'From a1, a chain of 7 needs leads to a8.'}
    """
    needs: dict[str, set[str]] = {}
    needed_by: dict[str, set[str]] = {}
    ends: set[str] = set()
    for fact in facts:
        if fact.kind == "need":
            needs.setdefault(fact.name, set()).add(fact.other)
            needed_by.setdefault(fact.other, set()).add(fact.name)
        else:
            ends |= {fact.name, fact.other}

    def is_link(name: str) -> bool:
        is_single = len(needs.get(name, ())) == len(needed_by.get(name, ())) == 1
        return is_single and name not in ends

    folded: dict[tuple[str, str], str] = {}
    for start, others in needs.items():
        if is_link(start):
            continue
        for other in others:
            path = [start, other]
            while is_link(path[-1]):
                path += needs[path[-1]]
            if len(path) - 1 > MAX_CHAIN:
                middle = path[1:-1]
                pairs = list(itertools.pairwise(middle))
                text = f"From {middle[0]}, a chain of {len(pairs)} needs leads to {middle[-1]}."
                folded |= dict.fromkeys(pairs, text)
    return folded


def shorten_list(sentences: Mapping[str, bool]) -> Iterator[str]:
    """Yield the first and last of many sentences, those to keep, and how many are left out.

    Args:
        sentences: The sentences, and whether each must be kept.

    Example:
        >>> list(shorten_list({"a": False, "b": False, "c": False, "d": False, "e": False}))
        ['a', 'b', '(2 more like these)', 'e']
    """
    told = list(sentences)
    if len(told) <= MAX_LISTED:
        yield from told
        return
    kept = {*told[:2], told[-1], *(text for text, is_kept in sentences.items() if is_kept)}
    yield from (text for text in told[:-1] if text in kept)
    if len(kept) < len(told):
        yield f"({len(told) - len(kept)} more like these)"
    yield told[-1]
