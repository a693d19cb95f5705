"""What the demo measures, and what it claims about the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from composable.corpora.documents import Document, Spliced, truncate_utf8
from composable.demo.result import Bits, Claim, Measurements, Property, Recovery
from composable.model.model import Model
from composable.progress import StageProgress
from composable.vetting.checks import recovery
from composable.vetting.evaluation import (
    Scorer,
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
    slots_scorer,
)

PUBLIC: Final = "public"
# Each held-out document is scored up to here.
SCORED_BYTES: Final = 1024


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
    methods: dict[str, Scorer] = {
        "backbone": path_scorer(model),
        "average": slots_scorer(model, model.average_slots()),
        "mix": mix_scorer(model),
        "safe": safe_scorer(model),
    }
    groups = {name: truncate_documents(documents) for name, documents in texts.domains.items()}
    groups[PUBLIC] = truncate_documents(texts.public)
    groups["spliced"] = [document.text for document in texts.spliced]
    table: dict[str, Bits] = {}
    total = len(groups) * len(methods) + len(texts.domains)
    done = 0
    for group, documents in groups.items():
        scorers = dict(methods)
        if group in texts.domains:
            scorers["own_expert"] = path_scorer(model, group)
        row = {}
        for method, scorer in scorers.items():
            score = score_documents(scorer, documents, context=model.context)
            row[method] = round(score.bits_per_byte, 5)
            done += 1
            if progress:
                progress(f"{group}, {method}", done, total)
        table[group] = Bits(**row)
    domains = {name: table[name] for name in texts.domains}
    sizes = list(map(len, groups[PUBLIC]))
    return Measurements(
        safe_bound=_bound_safe_loss(model, table[PUBLIC].backbone, sizes),
        domains=domains,
        public=table[PUBLIC],
        spliced=table["spliced"],
        recovery=mean_recovery(list(domains.values())),
    )


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


def list_claims(measured: Measurements, properties: Sequence[Property]) -> tuple[Claim, ...]:
    """Check the figures against what composition promises.

    Args:
        measured: The figures.
        properties: The properties shown.

    Returns:
        The claims about the figures, then one for each property.
    """
    public, spliced = measured.public, measured.spliced
    rival = min(spliced.backbone, spliced.average)
    minima = (
        ("recovery in mix mode is at least 97 %", measured.recovery.mix, 0.97),
        ("recovery in safe mode is at least 99 %", measured.recovery.safe, 0.99),
    )
    maxima = (
        ("public text loses at most 1 % in mix mode", public.mix / public.backbone - 1, 0.01),
        (
            f"public text loses at most the proven {measured.safe_bound:.4%} in safe mode",
            public.safe / public.backbone - 1,
            measured.safe_bound,
        ),
        (
            "spliced text needs at most 0.9 times the bits of the backbone and of the average",
            spliced.mix / rival,
            0.9,
        ),
    )
    return (
        *(Claim(claim=c, found=round(found, 5), holds=found >= low) for c, found, low in minima),
        *(Claim(claim=c, found=round(found, 5), holds=found <= high) for c, found, high in maxima),
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


def _bound_safe_loss(model: Model, backbone_bits: float, sizes: Sequence[int]) -> float:
    """Return the most that safe mode may add to texts, as a share of the backbone's bits."""
    bound = sum(map(model.interface.safe_bound, sizes)) / np.log(2)
    return float(bound / (backbone_bits * sum(sizes)))
