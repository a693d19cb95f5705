"""What the demo measures, and what it claims of the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from composable.corpora.documents import Document, Spliced, truncate_utf8
from composable.model.model import Model
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


def measure(
    model: Model,
    texts: Mapping[str, Sequence[Document]],
    public: Sequence[Document],
    spliced: Sequence[Spliced],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Return bits per byte of every text under every method, the recovery, and safe mode's bound.

    The bound is what safe mode may at most add to public text, as a share of the backbone's bits.

    Args:
        model: The composed model.
        texts: Held-out documents by domain; the expert of a domain bears its name.
        public: Held-out public documents.
        spliced: Texts that switch domain midway.
        progress: Called with scorings done, scorings in all, and what was scored.
    """
    methods: dict[str, Scorer] = {
        "backbone": path_scorer(model),
        "average": slots_scorer(model, model.average_slots()),
        "mix": mix_scorer(model),
        "safe": safe_scorer(model),
    }
    groups = {name: begins(documents) for name, documents in texts.items()}
    groups[PUBLIC] = begins(public)
    groups["spliced"] = [document.text for document in spliced]
    table: dict[str, dict[str, float]] = {}
    total = len(groups) * len(methods) + len(texts)
    done = 0
    for group, documents in groups.items():
        scorers = dict(methods)
        if group in texts:
            scorers["own_expert"] = path_scorer(model, group)
        for method, scorer in scorers.items():
            score = score_documents(scorer, documents, context=model.context)
            table.setdefault(group, {})[method] = round(score.bits_per_byte, 5)
            done += 1
            if progress:
                progress(done, total, f"{group}, {method}")
    domains = {name: table[name] for name in texts}
    recovered = {
        mode: [recovery(row["backbone"], row["own_expert"], row[mode]) for row in domains.values()]
        for mode in ("mix", "safe")
    }
    sizes = list(map(len, groups[PUBLIC]))
    bound = sum(map(model.interface.safe_bound, sizes)) / np.log(2)
    public_bits = table[PUBLIC]["backbone"] * sum(sizes)
    return {
        "safe_bound": float(bound / public_bits),
        "domains": domains,
        "public": table[PUBLIC],
        "spliced": table["spliced"],
        "recovery": {mode: round(float(np.mean(values)), 5) for mode, values in recovered.items()},
    }


def claims_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what composition promises.

    Args:
        result: Figures of `measure`, with the properties shown.

    Returns:
        For every claim what was found and whether it holds.
    """
    public, spliced = result["public"], result["spliced"]
    public_mix = public["mix"] / public["backbone"] - 1
    public_safe = public["safe"] / public["backbone"] - 1
    rival = min(spliced["backbone"], spliced["average"])
    claims = [
        ("recovery in mix mode is at least 97 %", result["recovery"]["mix"], 0.97, False),
        ("recovery in safe mode is at least 99 %", result["recovery"]["safe"], 0.99, False),
        ("public text loses at most 1 % in mix mode", public_mix, 0.01, True),
        (
            f"public text loses nothing in safe mode beyond the proven {result['safe_bound']:.4%}",
            public_safe,
            result["safe_bound"],
            True,
        ),
        (
            "spliced text takes at most 0.9 of what backbone or average need",
            spliced["mix"] / rival,
            0.9,
            True,
        ),
    ]
    return [
        {
            "claim": claim,
            "found": round(found, 5),
            "holds": bool(found <= limit if is_most else found >= limit),
        }
        for claim, found, limit, is_most in claims
    ] + [
        {"claim": item["name"], "found": item["found"], "holds": item["passed"]}
        for item in result["properties"]
    ]


def begins(documents: Sequence[Document]) -> list[bytes]:
    """Return the starts of documents, cut so that no character is split."""
    return [truncate_utf8(document.text.encode(), SCORED_BYTES) for document in documents]
