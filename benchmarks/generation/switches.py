"""Switches: a user's turn in another domain after written text, and text that turns by itself."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any, Final

import numpy as np

from benchmarks.generation.continuations import Bench
from benchmarks.generation.texts import PUBLIC, cut_prompts
from benchmarks.generation.writing import read_given, read_turn, to_texts, write_texts
from composable.model.sampling import Sampling

# A conversation: given bytes, written bytes, and a turn of another domain.
GIVEN: Final = 128
WRITTEN: Final = 128
TURN: Final = 128
# A document that turns: public text, a blank line, and so many bytes of the other domain.
LEADS: Final = (0, 8, 16, 32, 64)
AFTER: Final = 256


def measure_turns(bench: Bench, n_prompts: int) -> dict[str, Any]:
    """Return after how many bytes of a turn its domain's expert has the largest weight.

    Once after text that the model wrote, and once after the same number of given bytes.
    """
    tokenizer = bench.model.tokenizer
    waits: dict[str, list[int]] = {"written": [], "given": []}
    for before, after in permutations(bench.texts, 2):
        first_BT = cut_prompts(bench.texts[before].heldout, n_prompts, GIVEN + WRITTEN, tokenizer)
        turn_BT = cut_prompts(bench.texts[after].heldout, n_prompts, TURN, tokenizer)[:, 1:]
        written = write_texts(
            bench.model, first_BT[:, : GIVEN + 1], WRITTEN, sampling=Sampling(temperature=0.7)
        )
        weights = {
            "written": read_turn(bench.model, written, turn_BT),
            "given": read_given(bench.model, np.concatenate([first_BT, turn_BT], 1))[:, -TURN:],
        }
        for name, weight_BTE in weights.items():
            is_ahead_BT = weight_BTE.argmax(-1) == bench.own_entry(after)
            is_ahead_BT = np.pad(is_ahead_BT, ((0, 0), (0, 1)), constant_values=True)
            waits[name] += (is_ahead_BT.argmax(1) + 1).tolist()
    return {
        name: {
            "turns": len(found),
            "median": float(np.median(found)),
            "ninth_decile": float(np.quantile(found, 0.9)),
            "within_32": float(np.mean(np.array(found) <= 32)),
        }
        for name, found in waits.items()
    }


def measure_leads(bench: Bench, n_prompts: int) -> Mapping[str, Any]:
    """Return how much written text follows a lead into another domain, after public text.

    By number of bytes in the lead: the share of windows in the domain and its expert's mean weight,
    composed and for the expert alone.
    """
    tokenizer, found = bench.model.tokenizer, {}
    domains = [domain for domain in bench.texts if domain != PUBLIC]
    public_BT = cut_prompts(bench.texts[PUBLIC].heldout, n_prompts, 126, tokenizer)
    breaks_BT = np.full((n_prompts, 2), ord("\n"), np.int32)
    for n_lead in LEADS:
        rows: dict[str, list[float]] = {"composed": [], "alone": [], "weight": []}
        for domain in domains:
            lead_BT = cut_prompts(bench.texts[domain].heldout, n_prompts, 64, tokenizer)
            prompts_BT = np.concatenate([public_BT, breaks_BT, lead_BT[:, 1 : 1 + n_lead]], 1)
            for name, model in (("composed", bench.model), ("alone", bench.alone[domain])):
                written = write_texts(model, prompts_BT, AFTER, sampling=Sampling(temperature=0.7))
                rows[name].append(
                    bench.classifier.find_own(to_texts(written.tokens_BT, tokenizer), domain).mean()
                )
                if name == "composed":
                    own = bench.own_entry(domain)
                    rows["weight"].append(float(written.weight_BTE[..., own].mean()))
        found[str(n_lead)] = {name: float(np.mean(values)) for name, values in rows.items()}
    return found
