"""Families: documents so alike that they must be held out together or not at all.

A held-out text measures nothing if a near copy of it was trained on: licences come in versions,
chapters quote one another. A family is what a pattern on the ids names, joined with every document
that shares most of its text with one of them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise

from composable.corpora.documents import Document

# Words per shingle: long enough that the grammar of a domain is not yet an overlap.
_SHINGLE_WORDS = 5


def find_families(
    documents: Sequence[Document], pattern: str = "", max_overlap: float = 0.5
) -> dict[str, str]:
    """Group documents into families.

    Two documents are of one family if `pattern` finds the same text in both ids, if their overlap
    is above `max_overlap`, or if a chain of such pairs joins them. A family is named by the first
    of its ids in sorted order.

    Args:
        documents: The documents, each id once.
        pattern: A regular expression that is searched in the lower-case id. An id in which it
            finds nothing, or the empty string, is in no family by name.
        max_overlap: The greatest overlap that two families may have, in [0, 1].

    Returns:
        Document id to family name, for every document.

    References:
        Broder 1997, "On the resemblance and containment of documents" (the overlap here is the
        containment of the smaller in the larger).
    """
    texts = {document.id: document.text for document in sorted(documents, key=lambda d: d.id)}
    family = {name: name for name in texts}

    def family_of(name: str) -> str:
        while family[name] != name:
            family[name] = name = family[family[name]]
        return name

    for a, b in _alike_by_name(list(texts), pattern) + _alike_by_text(texts, max_overlap):
        first, second = sorted((family_of(a), family_of(b)))
        family[second] = first
    return {name: family_of(name) for name in texts}


def _alike_by_name(ids: Sequence[str], pattern: str) -> list[tuple[str, str]]:
    """Return pairs that chain the ids in which `pattern` finds the same text."""
    groups = defaultdict[str, list[str]](list)
    for name in ids:
        if (found := re.search(pattern, name.lower())) and found[0]:
            groups[found[0]].append(name)
    return [pair for group in groups.values() for pair in pairwise(group)]


def _alike_by_text(texts: dict[str, str], max_overlap: float) -> list[tuple[str, str]]:
    """Return the pairs of ids whose texts overlap by more than `max_overlap`."""
    sizes, holders = dict[str, int](), defaultdict[str, list[str]](list)
    for name, text in texts.items():
        shingles = _shingles(text)
        sizes[name] = len(shingles)
        for shingle in shingles:
            holders[shingle].append(name)
    # Count by the set of holders: boilerplate shared by many is one step per set, not per shingle.
    n_shared = Counter[tuple[str, str]]()
    for names, n in Counter(tuple(names) for names in holders.values() if len(names) > 1).items():
        for pair in combinations(names, 2):
            n_shared[pair] += n
    return [(a, b) for (a, b), n in n_shared.items() if n > max_overlap * min(sizes[a], sizes[b])]


def _shingles(text: str) -> set[str]:
    """Return every run of words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    n = min(_SHINGLE_WORDS, len(words))
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)} if words else set()
