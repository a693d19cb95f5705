"""Does written text stay where its prompt put it? Trains experts, continues prompts, measures.

    python -m benchmarks.generation runs/generation --json benchmarks/results/generation.json

For every domain, 64 bytes of held-out text are continued in mix mode, in safe mode, and by the
domain's own expert alone, which is the reference. Reported are the weight of the prompt's own
expert by windows of 64 bytes, and the share of the later windows that a classifier of byte trigrams
gives to the prompt's domain. Interrupted, the same command resumes: experts and finished cells are
kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import read_documents
from composable.corpora.recipe import load_recipe, make_texts, shipped_folder
from composable.files import atomic
from composable.model.body import MATRICES
from composable.model.decoding import Mode, continue_tokens
from composable.model.model import Model, Pluggable
from composable.model.sampling import Sampling
from composable.packaging.manifests.template import create_expert
from composable.workflows.train import expert_config, train_expert

DOMAINS: Final = ("rust-code", "polish", "kernel-docs", "sql-docs")
PUBLIC: Final = "public"
WINDOW: Final = 64
# Windows from this one on are classified: the first ones follow the prompt whatever the rule.
FIRST_CLASSIFIED: Final = 4
TEMPERATURES: Final = (0.0, 0.7, 1.0)
_SMOOTHING: Final = 0.05
_TRIGRAMS: Final = 50_000  # that may occur, about


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text of one domain.

    Args:
        known: What the classifier learns from.
        heldout: Documents that prompts are cut from.
    """

    known: bytes
    heldout: Sequence[bytes]


class Classifier:
    """Naive Bayes over byte trigrams."""

    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self.counts = {name: Counter(_trigrams(text)) for name, text in texts.items()}
        self.totals = {name: counts.total() for name, counts in self.counts.items()}

    def classify_text(self, text: bytes) -> str:
        """Return the domain under which a text is likeliest."""

        def score(name: str) -> float:
            counts, total = self.counts[name], self.totals[name] + _SMOOTHING * _TRIGRAMS
            return sum(math.log((counts[t] + _SMOOTHING) / total) for t in _trigrams(text))

        return max(self.counts, key=score)


def _trigrams(text: bytes) -> Iterator[bytes]:
    return (text[i : i + 3] for i in range(len(text) - 2))


def train_experts(
    loaded: LoadedBackbone, work: Path, domains: Sequence[str], steps: int
) -> tuple[list[Pluggable], dict[str, Text]]:
    """Return an expert for every domain, trained as a contributor would, and the texts."""
    experts, texts = [], {}
    for name in domains:
        folder, data = work / "experts" / name, work / "text" / name
        if not (data / "heldout.jsonl").exists():
            make_texts(load_recipe(shipped_folder(name)), data)
        if not (folder / "body.safetensors").exists():
            if not folder.exists():
                create_expert(folder, name, "tiny-bytes", loaded.interface)
            print(f"training {name}", flush=True)
            train_expert(loaded, folder, [data / "train.jsonl"], expert_config(steps=steps, seed=0))
        experts.append(load_expert(loaded, folder))
        train, heldout = (
            [document.text.encode() for document in read_documents([data / f"{part}.jsonl"])]
            for part in ("train", "heldout")
        )
        texts[name] = Text(known=b"".join(train), heldout=heldout)
    anchor = [document.text.encode() for document in loaded.anchor]
    texts[PUBLIC] = Text(known=b"".join(anchor[::2]), heldout=anchor[1::2])
    return experts, texts


def merge_expert(loaded: LoadedBackbone, expert: Pluggable) -> Model:
    """Return the backbone with an expert's body in place of its own: the expert alone."""
    backbone = nnx.clone(loaded.backbone)
    for layer in loaded.interface.slots:
        matrices = expert.body.merged(loaded.backbone, layer)
        for name in MATRICES:
            getattr(backbone.layers[layer].ffn, name)[...] = matrices[name]
    return Model(backbone, loaded.interface, tokenizer=loaded.tokenizer)


def cut_prompts(text: Text, model: Model, n_prompts: int, n_bytes: int) -> list[np.ndarray]:
    """Return prompts from the middle of held-out documents, with the begin token."""
    prompts = []
    for i in range(n_prompts):
        document = text.heldout[i % len(text.heldout)]
        at = (len(document) - n_bytes) // 2 + n_bytes * (i // len(text.heldout))
        piece = document[at : at + n_bytes].decode(errors="ignore")
        prompts.append(np.asarray(model.encode(piece)))
    return prompts


def measure_cell(
    model: Model,
    own: int,
    prompts: Sequence[np.ndarray],
    is_own: Any,
    *,
    n_bytes: int,
    temperature: float,
    mode: Mode,
) -> dict[str, Any]:
    """Continue prompts; return the own expert's weight and the share of own windows, by window."""
    weights, shares = [], []
    for seed, prompt in enumerate(prompts):
        drawn = list(
            continue_tokens(
                model.parts,
                model.tokenizer,
                prompt,
                n_bytes,
                sampling=Sampling(temperature=temperature, seed=seed),
                mode=mode,
            )
        )
        weight_T = np.array([token.weight_E[own] for token in drawn])
        text = bytes(token.token for token in drawn if token.token < 256)
        for k in range(len(drawn) // WINDOW):
            window = slice(k * WINDOW, (k + 1) * WINDOW)
            weights.append((k, float(weight_T[window].mean())))
            shares.append((k, is_own(text[window])))

    def by_window(values: Sequence[tuple[int, float]]) -> list[float]:
        n = max((k for k, _ in values), default=-1) + 1
        return [round(float(np.mean([v for k, v in values if k == i])), 4) for i in range(n)]

    return {"weight": by_window(weights), "own_windows": by_window(shares)}


def print_table(cells: Mapping[str, Mapping[str, Any]], domains: Sequence[str]) -> None:
    """Print, by method, weight in the first and last window and the share of later windows."""
    print("| method | " + " | ".join(domains) + " |\n" + "|---" * (len(domains) + 1) + "|")
    methods = list(dict.fromkeys(key.split("/")[1] for key in cells))
    for method in methods:
        row = []
        for domain in domains:
            cell = cells.get(f"{domain}/{method}")
            if cell is None or not cell["weight"]:
                row.append("–")
                continue
            share = np.mean(cell["own_windows"][FIRST_CLASSIFIED:])
            row.append(f"{cell['weight'][0]:.2f} → {cell['weight'][-1]:.2f}, {share:.2f}")
        print(f"| {method} | " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for texts, experts and finished cells")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--steps", type=int, default=300, help="training steps of an expert")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per domain")
    parser.add_argument("--prompt-bytes", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=512, help="bytes written after a prompt")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    loaded = load_backbone("tiny-bytes")
    experts, texts = train_experts(loaded, arguments.work, arguments.domains, arguments.steps)
    model = loaded.plug(experts)
    alone = {expert.name: merge_expert(loaded, expert) for expert in experts}
    alone[PUBLIC] = loaded.plug()
    classifier = Classifier({name: text.known for name, text in texts.items()})

    settings = f"{arguments.prompts}-{arguments.prompt_bytes}-{arguments.bytes}"
    finished = arguments.work / f"cells-{settings}.json"
    cells: dict[str, Any] = json.loads(finished.read_text()) if finished.exists() else {}
    for temperature in TEMPERATURES:
        for method in ("mix", "safe", "alone"):
            for domain in texts:
                key = f"{domain}/{method} {temperature}"
                if key in cells:
                    continue
                is_alone = method == "alone"
                own = 0 if is_alone or domain == PUBLIC else model.names.index(domain)
                start = time.perf_counter()
                cells[key] = measure_cell(
                    alone[domain] if is_alone else model,
                    own,
                    cut_prompts(texts[domain], model, arguments.prompts, arguments.prompt_bytes),
                    lambda text, domain=domain: classifier.classify_text(text) == domain,
                    n_bytes=arguments.bytes,
                    temperature=temperature,
                    mode="safe" if method == "safe" else "mix",
                )
                atomic.write_text(finished, json.dumps(cells, indent=1) + "\n")
                print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
    real = {
        domain: np.mean(
            [
                classifier.classify_text(document[i : i + WINDOW]) == domain
                for document in text.heldout
                for i in range(0, min(len(document), 2048) - WINDOW, WINDOW)
            ]
        )
        for domain, text in texts.items()
    }
    print_table(cells, list(texts))
    print("real text: " + ", ".join(f"{name} {share:.2f}" for name, share in real.items()))
    if arguments.json:
        result = {
            "machine": f"{platform.machine()}, {platform.python_version()}",
            "date": time.strftime("%Y-%m-%d"),
            "settings": {
                "prompts": arguments.prompts,
                "prompt_bytes": arguments.prompt_bytes,
                "bytes": arguments.bytes,
                "steps": arguments.steps,
            },
            "real": {name: round(float(share), 4) for name, share in real.items()},
            "cells": cells,
        }
        atomic.write_text(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
