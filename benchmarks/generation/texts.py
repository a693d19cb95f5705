"""The domains: their texts, an expert for each, prompts, and what tells one text from another."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import read_documents
from composable.corpora.recipe import load_recipe, make_texts, shipped_folder
from composable.files import atomic
from composable.model.body import MATRICES
from composable.model.model import Model, Pluggable
from composable.model.tokenizer import ByteTokenizer, Tokenizer
from composable.packaging.manifests.template import create_expert
from composable.training.config import TrainConfig
from composable.workflows.train import train_expert

# Settings of the interface were chosen on some of the first; none of the others was used for any
# choice about written text.
KNOWN: Final = ("python-code", "set-mm", "legal", "german")
UNSEEN: Final = ("rust-code", "polish", "kernel-docs", "sql-docs")
PUBLIC: Final = "public"
TINY: Final = "tiny-bytes"
# Bytes of text that the classifier decides on.
WINDOW: Final = 64
_SMOOTHING: Final = 0.05
_TRIGRAMS: Final = 50_000  # that may occur, about
# No prompt has more bytes per token.
_LONG_TOKEN: Final = 32


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

    def __init__(self, texts: Mapping[str, Text]) -> None:
        self.counts = {name: Counter(_trigrams(text.known)) for name, text in texts.items()}
        self.totals = {name: counts.total() for name, counts in self.counts.items()}

    def classify_text(self, text: bytes) -> str:
        """Return the domain under which a text is likeliest."""

        def score(name: str) -> float:
            counts, total = self.counts[name], self.totals[name] + _SMOOTHING * _TRIGRAMS
            return sum(math.log((counts[t] + _SMOOTHING) / total) for t in _trigrams(text))

        return max(self.counts, key=score)

    def find_own(self, texts: Sequence[bytes], domain: str) -> np.ndarray:
        """Return which windows of texts of one length are of a domain, shape (texts, windows)."""
        n_windows = max(1, min(map(len, texts)) // WINDOW)
        is_own = [
            [self.classify_text(text[i * WINDOW :][:WINDOW]) == domain for i in range(n_windows)]
            for text in texts
        ]
        return np.array(is_own)


def _trigrams(text: bytes) -> Iterator[bytes]:
    return (text[i : i + 3] for i in range(len(text) - 2))


def make_domain(name: str, work: Path) -> Text:
    """Return a domain's text, made by its recipe unless it exists."""
    folder = work / "text" / name
    if not (folder / "heldout.jsonl").exists():
        make_texts(load_recipe(shipped_folder(name)), folder)
    train, heldout = (
        [document.text.encode() for document in read_documents([folder / f"{part}.jsonl"])]
        for part in ("train", "heldout")
    )
    return Text(known=b"".join(train), heldout=heldout)


def public_text(loaded: LoadedBackbone) -> Text:
    """Return the backbone's public text: half for the classifier, half for prompts."""
    anchor = [document.text.encode() for document in loaded.anchor]
    return Text(known=b"".join(anchor[::2]), heldout=anchor[1::2])


def make_trained(
    loaded: LoadedBackbone, name: str, data: Sequence[Path], work: Path, config: TrainConfig
) -> Pluggable:
    """Return an expert trained as a contributor would; one that exists is loaded.

    The body is as in the template, or as in the expert that ships for this backbone and domain.
    """
    folder = work / "experts" / name
    if not (folder / "body.safetensors").exists():
        shipped = shipped_folder(".") / f"{loaded.interface.name}-{name}"
        if not folder.exists() and shipped.exists():
            atomic.make_directory(folder)
            atomic.write_text(folder / "expert.toml", (shipped / "expert.toml").read_text())
        elif not folder.exists():
            create_expert(folder, name, loaded.interface.name, loaded.interface)
        print(f"training {name}", flush=True)
        train_expert(loaded, folder, list(data), config)
    return load_expert(loaded, folder)


def merge_expert(loaded: LoadedBackbone, expert: Pluggable | None) -> Model:
    """Return the backbone with an expert's body in place of its own: the expert alone.

    No scouts are mixed into its output. None is the backbone itself.
    """
    backbone = nnx.clone(loaded.backbone)
    if expert is not None:
        for layer in loaded.interface.slots:
            matrices = expert.body.merged(loaded.backbone, layer)
            for name in MATRICES:
                getattr(backbone.layers[layer].ffn, name)[...] = matrices[name]
    interface = dataclasses.replace(loaded.interface, output_mixture=None)
    return Model(backbone, interface, tokenizer=loaded.tokenizer)


def cut_prompts(
    documents: Sequence[bytes], n_prompts: int, n_tokens: int, tokenizer: Tokenizer
) -> np.ndarray:
    """Return prompts from the middle of documents, the start token first, shape BT.

    Args:
        documents: What to cut from, each used again where there are too few.
        n_prompts: Number of prompts.
        n_tokens: Tokens of each, without the start token.
        tokenizer: Of the model.
    """
    prompts = []
    for i in range(n_prompts):
        document = documents[i % len(documents)]
        at = (len(document) - n_tokens) // 2 + n_tokens * (i // len(documents))
        prompts.append(cut_tokens(document, at, n_tokens, tokenizer))
    return np.stack(prompts)


def cut_tokens(document: bytes, at: int, n_tokens: int, tokenizer: Tokenizer) -> np.ndarray:
    """Return the start token and a document's tokens from a byte on, as many as there are."""
    text = document[at : at + _LONG_TOKEN * n_tokens]
    if not isinstance(tokenizer, ByteTokenizer):
        text = text.decode(errors="ignore").encode()  # it may start or end within a character
    return tokenizer.encode(text)[: 1 + n_tokens]
