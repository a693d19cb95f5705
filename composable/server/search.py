"""Search over all packages that a caller may see: words, filters, ranking.

The index is in memory and follows the database: before each use, the packages that changed since
the last one are read again. Ten thousand packages take some megabytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from composable.server.access import can_see
from composable.server.accounts import Caller
from composable.server.documents import compile_catalog
from composable.server.tables import Head, Package

MAX_QUERY_LENGTH: Final = 200
MAX_WORDS: Final = 8
PAGE: Final = 20
MAX_PAGE: Final = 1000
# Answers that are kept until a package changes.
MAX_ANSWERS: Final = 1000
# What a word is worth, by where it is found.
WEIGHTS: Final = {"name": 6.0, "tags": 3.0, "description": 1.0}
FILTERS: Final = ("backbone", "language", "domain", "license", "signed")
_WORD: Final = re.compile(r"[^\W_]+")
_FIELDS: Final = {
    "backbone": "interface",
    "language": "languages",
    "domain": "domains",
    "license": "license",
    "signed": "signed",
}


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is searched for.

    Args:
        text: Words; all must be found, the last one may be the start of a word.
        filters: Values of `FILTERS` that a package must have.
        min_gain: The smallest gain on the expert's own held-out text, as a fraction.
        sort: `relevance`, `gain`, `newest` or `name`.
        page: From 1.
    """

    text: str = ""
    filters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    min_gain: float | None = None
    sort: str = "relevance"
    page: int = 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer to a query.

    Args:
        rows: Summaries of this page's packages, best first.
        total: How many packages were found.
        facets: For each filter, how many of them have each value, most first.
    """

    rows: list[dict[str, Any]]
    total: int
    facets: dict[str, list[tuple[str, int]]]


class SearchIndex:
    """An index of words over the summaries of packages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._revision = -1
        self._summaries: dict[str, dict[str, Any]] = {}
        self._private: set[str] = set()
        self._scores: dict[str, dict[str, float]] = {}  # word -> package -> score
        self._words: dict[str, set[str]] = {}  # package -> its words
        self._sorted_words: list[str] = []
        self._dependents: dict[str, set[str]] = {}
        self._answers: dict[tuple[Any, ...], Found] = {}  # of the public, at this revision
        self._catalog: tuple[int, bytes] = (-1, b"")

    def refresh(self, session: Session) -> int:
        """Read what changed since the last time; return the revision that the index is at."""
        revision = session.scalar(select(Head.entries)) or 0
        if revision <= self._revision:
            return self._revision
        with self._lock:
            if revision <= self._revision:
                return self._revision  # another thread has read it, or a later state
            rows = session.execute(
                select(Package.name, Package.summary, Package.is_private, Package.removal).where(
                    Package.revision > self._revision, Package.revision <= revision
                )
            ).all()
            for row in rows:
                self._remove(row.name)
                if row.summary and row.removal is None:
                    self._add(row.name, row.summary, row.is_private)
            if rows:
                self._sorted_words = sorted(self._scores)
            self._revision = revision
            self._answers.clear()
        return revision

    def catalog(self, session: Session, caller: Caller) -> bytes:
        """Return the catalogue of all packages that a caller may see; empty without any."""
        revision = self.refresh(session)
        with self._lock:
            hidden = self._hidden(session, caller)
            if hidden != self._private:
                shown = (row for name, row in self._summaries.items() if name not in hidden)
                return compile_catalog(list(shown))
            if self._catalog[0] != revision:
                shown = (row for name, row in self._summaries.items() if name not in hidden)
                self._catalog = (revision, compile_catalog(list(shown)))
            return self._catalog[1]

    def search(self, session: Session, caller: Caller, query: Query) -> Found:
        """Return the packages that a query finds."""
        self.refresh(session)
        with self._lock:
            hidden = self._hidden(session, caller)
            key = (
                query.text,
                *sorted(query.filters.items()),
                query.min_gain,
                query.sort,
                query.page,
            )
            if hidden == self._private and key in self._answers:
                return self._answers[key]
            scores = self._match(query.text[:MAX_QUERY_LENGTH])
            names = [
                name
                for name in scores
                if name not in hidden and self._passes(self._summaries[name], query)
            ]
            facets = self._count(names)
            names.sort(key=lambda name: self._rank(name, scores[name], query.sort))
            page = min(max(query.page, 1), MAX_PAGE)
            start = (page - 1) * PAGE
            rows = [self._describe(name) for name in names[start : start + PAGE]]
            found = Found(rows=rows, total=len(names), facets=facets)
            if hidden == self._private and len(self._answers) < MAX_ANSWERS:
                self._answers[key] = found
        return found

    def dependents(self, session: Session, caller: Caller, name: str) -> list[str]:
        """Return the packages whose newest release requires a package, sorted."""
        self.refresh(session)
        with self._lock:
            return sorted(self._dependents.get(name, set()) - self._hidden(session, caller))

    def summaries(self, session: Session, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return the summaries of packages that have a release, in the order of their names."""
        self.refresh(session)
        with self._lock:
            return [self._describe(name) for name in names if name in self._summaries]

    def _hidden(self, session: Session, caller: Caller) -> set[str]:
        if not self._private or caller.account is None:
            return self._private
        seen = session.scalars(
            select(Package.name).where(Package.is_private.is_(True), can_see(caller))
        )
        return self._private - set(seen)

    def _add(self, name: str, summary: dict[str, Any], is_private: bool) -> None:
        # Summaries of before there were signatures have no signer.
        summary = {**summary, "signed": "yes" if summary.get("signer") else "no"}
        self._summaries[name] = summary
        if is_private:
            self._private.add(name)
        texts = {
            "name": [name],
            "tags": [*summary["entry"]["tags"], summary["interface"]],
            "description": [summary["entry"]["description"]],
        }
        found: dict[str, float] = {}
        for field, weight in WEIGHTS.items():
            for word in split_words(" ".join(texts[field])):
                found[word] = max(found.get(word, 0.0), weight)
        for word, weight in found.items():
            self._scores.setdefault(word, {})[name] = weight
        self._words[name] = set(found)
        for other in summary["requires"]:
            self._dependents.setdefault(other, set()).add(name)

    def _remove(self, name: str) -> None:
        summary = self._summaries.pop(name, None)
        self._private.discard(name)
        for word in self._words.pop(name, ()):
            self._scores[word].pop(name, None)
            if not self._scores[word]:
                del self._scores[word]
        for other in summary["requires"] if summary else ():
            self._dependents[other].discard(name)

    def _match(self, text: str) -> dict[str, float]:
        """Return the packages that have all words, with their scores."""
        words = split_words(text)[:MAX_WORDS]
        if not words:
            return dict.fromkeys(self._summaries, 0.0)
        total: dict[str, float] | None = None
        for at, word in enumerate(words):
            scores = self._score_word(word, is_last=at == len(words) - 1)
            if total is None:
                total = scores
            else:
                total = {n: total[n] + score for n, score in scores.items() if n in total}
        return total or {}

    def _score_word(self, word: str, *, is_last: bool) -> dict[str, float]:
        n = len(self._summaries)
        candidates = self._completions(word) if is_last else [word]
        best: dict[str, float] = {}
        for candidate in candidates:
            holders = self._scores.get(candidate)
            if not holders:
                continue
            rarity = math.log(1 + n / len(holders))
            worth = rarity if candidate == word else rarity / 2
            for name, weight in holders.items():
                best[name] = max(best.get(name, 0.0), weight * worth)
        return best

    def _completions(self, start: str) -> Iterable[str]:
        at = bisect_left(self._sorted_words, start)
        for word in self._sorted_words[at : at + 50]:
            if not word.startswith(start):
                return
            yield word

    def _passes(self, summary: dict[str, Any], query: Query) -> bool:
        for key, wanted in query.filters.items():
            value = summary[_FIELDS[key]]
            if wanted != value and not (isinstance(value, list) and wanted in value):
                return False
        return query.min_gain is None or (summary["gain"] or 0.0) >= query.min_gain

    def _rank(self, name: str, score: float, sort: str) -> tuple[Any, ...]:
        summary = self._summaries[name]
        if sort == "name":
            return (name,)
        if sort == "newest":
            return (_descending(summary["published"]), name)
        gain = summary["gain"] or 0.0
        if sort == "gain":
            return (-gain, name)
        # Measured quality and use break ties between texts that fit alike.
        use = math.log1p(len(self._dependents.get(name, ())))
        return (summary["yanked"], -(score + gain + use), name)

    def _count(self, names: list[str]) -> dict[str, list[tuple[str, int]]]:
        counters: dict[str, Counter[str]] = {key: Counter() for key in FILTERS}
        for name in names:
            summary = self._summaries[name]
            for key, field in _FIELDS.items():
                value = summary[field]
                counters[key].update(value if isinstance(value, list) else [value])
        return {
            key: sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:20]
            for key, counter in counters.items()
        }

    def _describe(self, name: str) -> dict[str, Any]:
        dependents = len(self._dependents.get(name, ()))
        return {**self._summaries[name], "name": name, "dependents": dependents}


def split_words(text: str) -> list[str]:
    """Return the words of a text, in lower case.

    Example:
        >>> split_words("Set theory, in Metamath")
        ['set', 'theory', 'in', 'metamath']
    """
    return _WORD.findall(text.casefold())


def _descending(text: str) -> tuple[int, ...]:
    return tuple(-ord(letter) for letter in text)
