"""How alike are scouts that were trained apart, and a scout and its copy? On public text.

    python -m benchmarks.scout_correlation [--experts python-code set-mm legal]

The figures behind `composable check --beside`'s *copied* (ADR 10): the likeness of two scouts by
what they say of the anchor, for rivals in one domain, copies with noise, and other domains.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Final

import jax
import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.corpora.documents import Document, read_documents
from composable.corpora.recipe import shipped_folder
from composable.model.body import Expert
from composable.model.model import BACKBONE, Model, Pluggable
from composable.model.scout import Scout
from composable.training.data import token_stream
from composable.training.scouts import SCOUT_ROWS, Features, train_scout
from composable.vetting.evaluation import measure_evidence
from composable.vetting.evidence import MAX_BYTES, vetted_texts
from composable.vetting.peers import correlate_scouts
from composable.workflows.trunk_cache import cut_rows, trunk_features

WIDTH: Final = 128
_WINDOW: Final = 256
_TOKENS: Final = 400_000
_PASSES: Final = 5
NOISES: Final = (0.05, 0.1, 0.2)


def read(loaded: LoadedBackbone, documents: Sequence[Document]) -> Features:
    """Return what scouts read of some documents."""
    stream_T = token_stream(documents, loaded.tokenizer)
    return trunk_features(loaded.backbone, cut_rows(stream_T, _WINDOW, _TOKENS))


def train(loaded: LoadedBackbone, features: Features, seed: int) -> Scout:
    """Return a scout trained as a contributor's is when it reads alone."""
    interface = loaded.interface
    scout = Scout(interface.d_model, WIDTH, interface.n_classes, rngs=nnx.Rngs(seed))
    return train_scout(
        scout,
        features,
        steps=_PASSES * len(features.classes_BT) // SCOUT_ROWS,
        seed=seed,
    ).scout


def noised(scout: Scout, amount: float, seed: int = 0) -> Scout:
    """Return a copy with noise on every tensor, as large as this share of its deviation."""
    graph, state = nnx.split(scout)
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graph, jax.tree.map(lambda x: x + amount * x.std() * rng.normal(size=x.shape), state)
    )


def likenesses(loaded: LoadedBackbone, scouts: Sequence[Scout]) -> np.ndarray:
    """Return how alike all scouts are on the anchor, by pairs."""
    backbone, interface = loaded.backbone, loaded.interface
    body = Expert(backbone, kind="lora", rank=1, scout_width=1, rngs=nnx.Rngs(0)).body
    experts = [
        Pluggable(name=f"scout-{i}", body=body, scout=scout, key=i + 1)
        for i, scout in enumerate(scouts)
    ]
    model = Model(backbone, interface, experts, tokenizer=loaded.tokenizer)
    evidence_EM = measure_evidence(model, vetted_texts(loaded.anchor), max_bytes=MAX_BYTES)
    said = {name: evidence_EM[i] for i, name in enumerate(model.names) if name is not None}
    return np.array(
        [
            [correlate_scouts(said[a.name], said[b.name], said[BACKBONE]) for b in experts]
            for a in experts
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scout_correlation", description=__doc__
    )
    parser.add_argument("--experts", nargs="+", default=["python-code", "set-mm", "legal"])
    names = parser.parse_args().experts
    loaded = load_backbone("tiny-bytes")
    scouts: list[Scout] = []
    pairs: dict[str, list[tuple[int, int]]] = {}
    for name in names:
        documents = read_documents([shipped_folder(name) / "text" / "train.jsonl"])
        halves = [read(loaded, documents[i::2]) for i in (0, 1)]
        first = len(scouts)
        scouts.append(train(loaded, halves[0], 0))
        others = {
            "its copy": scouts[first],
            **{
                f"its copy, {amount:.0%} of noise": noised(scouts[first], amount)
                for amount in NOISES
            },
            "the other half of the text, another seed": train(loaded, halves[1], 1),
            "the other half of the text, the same seed": train(loaded, halves[1], 0),
            "the same text, another seed": train(loaded, halves[0], 1),
        }
        for label, scout in others.items():
            pairs.setdefault(label, []).append((first, len(scouts)))
            scouts.append(scout)
        print(f"{name}: scouts trained", flush=True)
    size = len(scouts) // len(names)
    pairs["another domain"] = list(itertools.combinations(range(0, len(scouts), size), 2))
    alike = likenesses(loaded, scouts)
    print("| second scout | likeness to the first |\n|---|---|")
    for label, some in pairs.items():
        found = [alike[pair] for pair in some]
        print(f"| {label} | {min(found):.2f} to {max(found):.2f} |")


if __name__ == "__main__":
    main()
