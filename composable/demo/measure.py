"""What the demo measures, and what it claims about the figures."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from composable.corpora.documents import Document, Spliced, truncate_utf8
from composable.demo.result import Bits, Claim, Measurements, Property, Recovery
from composable.model.model import Model
from composable.progress import StageProgress
from composable.vetting.checks import recovery
from composable.vetting.evaluation import (
    BATCH,
    Score,
    Scorer,
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
    slots_scorer,
)

PUBLIC: Final = "public"
SPLICED: Final = "spliced"
# Each held-out document is scored up to here.
SCORED_BYTES: Final = 1024
_RESAMPLES: Final = 2_000


# By text, then by method.
_Scores = Mapping[str, Mapping[str, Score]]


@dataclass(frozen=True, kw_only=True)
class HeldOutTexts:
    """The texts that the demo measures on; no expert was trained on them.

    Args:
        domains: Documents by domain; the expert of a domain has its name.
        public: Documents like those that the backbone was trained on.
        spliced: Texts that switch domain midway.
    """

    domains: Mapping[str, Sequence[Document]]
    public: Sequence[Document]
    spliced: Sequence[Spliced]


def measure(
    model: Model, texts: HeldOutTexts, *, progress: StageProgress | None = None
) -> Measurements:
    """Measure bits per byte of every text under every method, the recovery, and safe mode's bound.

    Args:
        model: The composed model.
        texts: The held-out texts.
        progress: Called after each scoring with what was scored, scorings done, and scorings in
            all.
    """
    groups = {name: _take(documents) for name, documents in texts.domains.items()}
    groups[PUBLIC] = _take(texts.public)
    groups[SPLICED] = [document.text for document in texts.spliced]
    scores = _score_texts(model, groups, list(texts.domains), progress)
    table = {
        group: Bits(**{method: round(score.bits_per_byte, 5) for method, score in row.items()})
        for group, row in scores.items()
    }
    domains = {name: table[name] for name in texts.domains}
    sizes = list(map(len, groups[PUBLIC]))
    return Measurements(
        safe_bound=_bound_safe_loss(model, table[PUBLIC].backbone, sizes),
        domains=domains,
        public=table[PUBLIC],
        spliced=table[SPLICED],
        recovery=mean_recovery(list(domains.values())),
        intervals=bound_figures(scores, list(domains)),
    )


def _score_texts(
    model: Model,
    groups: Mapping[str, Sequence[bytes]],
    domains: Sequence[str],
    progress: StageProgress | None,
) -> _Scores:
    """Score every text by every method, those of different compiled programs side by side."""
    paths = {"backbone": path_scorer(model), "average": slots_scorer(model, model.average_slots())}
    own = {name: path_scorer(model, name) for name in domains}
    programs: list[list[tuple[str, str, Scorer]]] = [
        [(group, "safe", safe_scorer(model)) for group in groups],
        [(group, "mix", mix_scorer(model)) for group in groups],
        [
            *((group, method, scorer) for group in groups for method, scorer in paths.items()),
            *((name, "own_expert", scorer) for name, scorer in own.items()),
        ],
    ]
    scores: dict[str, dict[str, Score]] = {group: {} for group in groups}
    total, done, lock = sum(map(len, programs)), itertools.count(1), threading.Lock()

    def run(scorings: Sequence[tuple[str, str, Scorer]]) -> None:
        for group, method, scorer in scorings:
            score = score_documents(scorer, groups[group], context=model.context)
            with lock:
                scores[group][method] = score
                if progress:
                    progress(f"{group}, {method}", next(done), total)

    with ThreadPoolExecutor(len(programs)) as pool:
        list(pool.map(run, programs))
    return scores


def mean_recovery(rows: Sequence[Bits]) -> Recovery:
    """Return the mean recovery of domains that have an expert of their own.

    Args:
        rows: Bits per byte of each domain, `own_expert` among them.

    Example:
        >>> mean_recovery([Bits(backbone=4.0, average=3.0, mix=3.0, safe=2.5, own_expert=2.0)])
        Recovery(mix=0.5, safe=0.75)
    """
    pairs = [(row, row.own_expert) for row in rows if row.own_expert is not None]
    mix = np.mean([recovery(row.backbone, own, row.mix) for row, own in pairs])
    safe = np.mean([recovery(row.backbone, own, row.safe) for row, own in pairs])
    return Recovery(mix=round(float(mix), 5), safe=round(float(safe), 5))


def bound_figures(scores: _Scores, domains: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """Return 95 % intervals of the claimed figures, for other documents of the same kinds.

    Args:
        scores: Scores of every text by every method.
        domains: The texts that have an expert of their own.

    References:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentiles).
    """
    rng = np.random.default_rng(0)
    bits: dict[str, dict[str, np.ndarray]] = {}
    for group, row in scores.items():
        n = len(next(iter(row.values())).nats_B)
        # The same documents for every method: differences between methods are paired.
        pick_RB = rng.integers(0, n, (_RESAMPLES, n))
        bits[group] = {
            method: score.nats_B[pick_RB].sum(1) / score.n_bytes_B[pick_RB].sum(1) / np.log(2)
            for method, score in row.items()
        }
    quantiles = (np.quantile(figure_R, (0.025, 0.975)) for figure_R in _claimed(bits, domains))
    return tuple((round(float(low), 5), round(float(high), 5)) for low, high in quantiles)


def _claimed(bits: Mapping[str, Mapping[str, Any]], domains: Sequence[str]) -> tuple[Any, ...]:
    """Return the figures that claims are about, in their order.

    Args:
        bits: Bits per byte by text and method, numbers or arrays of resamples.
        domains: The texts that have an expert of their own.
    """
    public, spliced = bits[PUBLIC], bits[SPLICED]

    def recover(method: str) -> Any:
        rows = [bits[name] for name in domains]
        shares = [
            (row["backbone"] - row[method]) / (row["backbone"] - row["own_expert"]) for row in rows
        ]
        return np.mean(shares, axis=0)

    return (
        recover("mix"),
        recover("safe"),
        public["mix"] / public["backbone"] - 1,
        public["safe"] / public["backbone"] - 1,
        spliced["mix"] / np.minimum(spliced["backbone"], spliced["average"]),
    )


def list_claims(measured: Measurements, properties: Sequence[Property]) -> tuple[Claim, ...]:
    """Check the figures against what composition promises.

    A figure must keep a claim for the documents measured, and with its whole interval.

    Args:
        measured: The figures.
        properties: The properties shown.

    Returns:
        The claims about the figures, then one for each property.
    """
    limits = (
        ("recovery in mix mode is at least 97 %", 0.97, math.inf),
        ("recovery in safe mode is at least 99 %", 0.99, math.inf),
        ("public text loses at most 1 % in mix mode", -math.inf, 0.01),
        (
            f"public text loses at most the proven {measured.safe_bound:.4%} in safe mode",
            -math.inf,
            measured.safe_bound,
        ),
        (
            "spliced text needs at most 0.9 times the bits of the backbone and of the average",
            -math.inf,
            0.9,
        ),
    )
    texts = {**measured.domains, PUBLIC: measured.public, SPLICED: measured.spliced}
    bits = {name: row.by_method() for name, row in texts.items()}
    figures = [round(float(found), 5) for found in _claimed(bits, list(measured.domains))]
    intervals = measured.intervals or (None,) * len(figures)
    return (
        *(
            Claim(
                claim=claim,
                found=found,
                holds=all(low <= value <= high for value in (found, *(interval or ()))),
                interval=interval,
            )
            for (claim, low, high), found, interval in zip(limits, figures, intervals, strict=True)
        ),
        *(Claim(claim=p.name, found=p.found, holds=p.passed) for p in properties),
    )


def truncate_documents(documents: Sequence[Document]) -> list[bytes]:
    """Return the start of each document as UTF-8, at most `SCORED_BYTES` of it.

    Args:
        documents: The documents; no character is split.

    Example:
        >>> [len(text) for text in truncate_documents([Document("a", "é" * 1000)])]
        [1024]
    """
    return [truncate_utf8(document.text.encode(), SCORED_BYTES) for document in documents]


def _take(documents: Sequence[Document]) -> list[bytes]:
    """Return the starts of as many documents as are scored at once."""
    return truncate_documents(documents[:BATCH])


def _bound_safe_loss(model: Model, backbone_bits: float, sizes: Sequence[int]) -> float:
    """Return the most that safe mode may add to texts, as a share of the backbone's bits."""
    bound = sum(map(model.interface.safe_bound, sizes)) / np.log(2)
    return float(bound / (backbone_bits * sum(sizes)))
