"""Held-out prompts of every domain, continued: does the text stay in its domain, and is it good?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.generation.texts import PUBLIC, Classifier, Text, cut_prompts, cut_tokens
from benchmarks.generation.writing import Written, to_texts, write_texts
from composable.model.decoding import Mode
from composable.model.model import Model
from composable.model.sampling import Sampling
from composable.vetting.evaluation import mix_scorer, score_documents

# How a cell writes: its experts composed in one of two modes, the same with written text taken as
# evidence, or the prompt's own expert alone, which is the reference.
METHODS: Final = ("mix", "alone", "evidence", "safe")
# Prompts whose recognition is measured: tokens, the start token included.
PROMPTS: Final = (16, 64, 256)
# Windows from this one on are compared: the first ones follow the prompt whatever the rule.
LATER: Final = 4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the tables, over all domains.

    Args:
        method: One of `METHODS`.
        temperature: Of the draws; 0 is greedy.
        top_p: Of the draws.
        prompt_tokens: Length of prompts, start token included.
        n_tokens: Tokens written after each.
        n_prompts: Prompts per domain, each continued once, with a seed of its own.
    """

    method: str
    temperature: float
    top_p: float = 1.0
    prompt_tokens: int = 64
    n_tokens: int = 512
    n_prompts: int = 24

    @property
    def key(self) -> str:
        """The cell's name among the finished ones."""
        drawn = "greedy" if not self.temperature else f"t{self.temperature:g} p{self.top_p:g}"
        return f"{self.method} {drawn} {self.prompt_tokens}+{self.n_tokens}"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cells share.

    Args:
        model: The backbone with all experts.
        alone: By domain, the backbone with that domain's expert in place of its own blocks.
        texts: By domain.
        classifier: Tells their texts apart.
    """

    model: Model
    alone: Mapping[str, Model]
    texts: Mapping[str, Text]
    classifier: Classifier

    def own_entry(self, domain: str) -> int:
        """Return the index of a domain's expert among the router weights."""
        return 0 if domain == PUBLIC else self.model.names.index(domain)


def measure_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Write all texts of a cell; return, by domain, weights, shares, bits and diversity."""
    n, tokenizer = cell.n_prompts, bench.model.tokenizer
    prompts = {
        domain: cut_prompts(text.heldout, n, cell.prompt_tokens - 1, tokenizer)
        for domain, text in bench.texts.items()
    }
    sampling = Sampling(temperature=cell.temperature, top_p=cell.top_p)
    if cell.method == "alone":
        return {
            domain: _describe(
                bench,
                domain,
                prompts_BT,
                write_texts(bench.alone[domain], prompts_BT, cell.n_tokens, sampling=sampling),
            )
            for domain, prompts_BT in prompts.items()
        }
    mode: Mode = "safe" if cell.method == "safe" else "mix"
    together = write_texts(
        bench.model,
        np.concatenate(list(prompts.values())),
        cell.n_tokens,
        sampling=sampling,
        mode=mode,
        is_evidence=cell.method == "evidence",
    )
    found = {}
    for i, (domain, prompts_BT) in enumerate(prompts.items()):
        rows = slice(i * n, (i + 1) * n)
        written = Written(together.tokens_BT[rows], together.weight_BTE[rows], None)
        found[domain] = _describe(bench, domain, prompts_BT, written)
        weight_BT = written.weight_BTE[..., bench.own_entry(domain)]
        windows = np.array_split(weight_BT.mean(0), len(found[domain]["share"]))
        found[domain]["weight"] = [float(window_T.mean()) for window_T in windows]
        # The second token: the first follows the filter, before anything was written.
        found[domain]["recognised"] = (weight_BT[:, 1] > 0.5).tolist()
    return found


def _describe(
    bench: Bench, domain: str, prompts_BT: np.ndarray, written: Written
) -> dict[str, Any]:
    tokenizer = bench.model.tokenizer
    texts = to_texts(written.tokens_BT, tokenizer)
    is_own = bench.classifier.find_own(texts, domain)
    starts = to_texts(prompts_BT[:, 1:], tokenizer)
    return {
        "share": is_own.mean(0).tolist(),
        "later": is_own[:, first_later(is_own.shape[1]) :].mean(1).tolist(),
        "bits": continuation_bits(bench.alone[domain], starts, texts),
        "compressed": float(np.mean([len(zlib.compress(text, 9)) / len(text) for text in texts])),
        "sample": (starts[0] + b"\xe2\x80\xba" + texts[0][:200]).decode(errors="replace"),
    }


def first_later(n_windows: int) -> int:
    """Return the window from which on texts are compared: at most half of them come before it."""
    return min(LATER, n_windows // 2)


def continuation_bits(model: Model, starts: Sequence[bytes], texts: Sequence[bytes]) -> float:
    """Return bits per byte of texts after their prompts, under a model.

    Texts longer than the model's context are scored in windows of it.
    """
    scorer = mix_scorer(model)
    whole = score_documents(
        scorer, [a + b for a, b in zip(starts, texts, strict=True)], context=model.context
    )
    before = score_documents(scorer, starts, context=model.context)
    nats = whole.nats_B.sum() - before.nats_B.sum()
    return float(nats / np.log(2) / sum(map(len, texts)))


def measure_recognition(bench: Bench, n_prompts: int) -> dict[str, dict[str, float]]:
    """Return which share of prompts is known for its domain's, by length and by who decides.

    The classifier, and the experts alone: under which of them a prompt is likeliest. Whatever reads
    only the prompt can hardly do better.
    """
    tokenizer, domains, found = bench.model.tokenizer, list(bench.texts), {}
    for n_tokens in PROMPTS:
        is_own: dict[str, list[np.ndarray]] = {"classifier": [], "experts alone": []}
        for i, domain in enumerate(domains):
            prompts_BT = cut_prompts(
                bench.texts[domain].heldout, n_prompts, n_tokens - 1, tokenizer
            )
            starts = to_texts(prompts_BT[:, 1:], tokenizer)
            is_own["classifier"].append(bench.classifier.find_own(starts, domain)[:, 0])
            nats_MB = [
                score_documents(mix_scorer(bench.alone[name]), starts, context=n_tokens).nats_B
                for name in domains
            ]
            is_own["experts alone"].append(np.argmin(nats_MB, axis=0) == i)
        found[str(n_tokens)] = {name: float(np.mean(rows)) for name, rows in is_own.items()}
    return found


def describe_real(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Return, by domain, share and bits of the documents' own continuations of the prompts."""
    found: dict[str, Any] = {}
    tokenizer, n_prompt = bench.model.tokenizer, cell.prompt_tokens
    for domain, text in bench.texts.items():
        rows = []
        for i in range(cell.n_prompts):
            document = text.heldout[i % len(text.heldout)]
            at = (len(document) - n_prompt + 1) // 2
            row_T = cut_tokens(document, at, n_prompt - 1 + cell.n_tokens, tokenizer)
            if len(row_T) == n_prompt + cell.n_tokens:
                rows.append(row_T)
        starts = to_texts(np.stack(rows)[:, 1:n_prompt], tokenizer)
        rests = to_texts(np.stack(rows)[:, n_prompt:], tokenizer)
        found[domain] = {
            "prompts": float(bench.classifier.find_own(starts, domain).mean()),
            "share": bench.classifier.find_own(rests, domain).mean(0).tolist(),
            "bits": continuation_bits(bench.alone[domain], starts, rests),
            "compressed": float(np.mean([len(zlib.compress(t, 9)) / len(t) for t in rests])),
        }
    return found
