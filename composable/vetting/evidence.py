"""What is measured of an expert, installed alone, on its own text and on public text.

Nothing is judged here; the limits are in `checks.py`, comparisons with a previous release in
`regression.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from composable.corpora.documents import Document, truncate_utf8
from composable.model.model import BACKBONE, Model
from composable.vetting.evaluation import (
    BATCH,
    Score,
    measure_class_evidence,
    measure_evidence,
    measure_norms,
    mix_scorer,
    path_scorer,
    score_documents,
    trace_routing,
)
from composable.vetting.statistics import ratio_interval, upper_mean

# Bytes of a document that are scored: enough to get past its first, uncertain ones.
MAX_BYTES: Final = 1024
# Documents of either text that are scored, at most.
VETTED_DOCUMENTS: Final = 8


@dataclass(frozen=True)
class Evidence:
    """The measurements of each document, from which checks and comparisons are made.

    Args:
        scores: By run: `own_backbone`, `own_expert`, `own_mix`, `anchor_backbone`, `anchor_mix`.
        routed_share_B: Share of the tokens of each anchor document that is routed to the expert.
    """

    scores: Mapping[str, Score]
    routed_share_B: np.ndarray

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Bits per byte, by run."""
        return {run: score.bits_per_byte for run, score in self.scores.items()}

    @property
    def gain(self) -> float:
        """Share of the backbone's bits per byte that the expert, always on, saves on its text."""
        bits = self.bits_per_byte
        return 1 - bits["own_expert"] / bits["own_backbone"]

    @property
    def gain_interval(self) -> tuple[float, float]:
        """The 95% interval of the gain, over texts like those that were measured."""
        expert, backbone = self.scores["own_expert"], self.scores["own_backbone"]
        low, high = ratio_interval(expert.nats_B, backbone.nats_B)
        return 1 - high, 1 - low

    @property
    def anchor_loss(self) -> float:
        """Share by which the bits per byte of public text are higher in mix mode."""
        bits = self.bits_per_byte
        return bits["anchor_mix"] / bits["anchor_backbone"] - 1

    @property
    def routed_share_bound(self) -> float:
        """Upper confidence bound on the share of public text that is routed to the expert."""
        return upper_mean(self.routed_share_B)


@dataclass(frozen=True, kw_only=True)
class BoundedNorms:
    """The outputs of a body, always on, compared with the bounds of their slots.

    Args:
        largest_L: Largest root mean square of each slot.
        largest_share: The largest of all, as a share of its slot's bound.
        zeroed: Share of the outputs that are beyond the bound or not finite, and count as zero.
        n_outputs: Number of outputs.
    """

    largest_L: np.ndarray
    largest_share: float
    zeroed: float
    n_outputs: int


@dataclass(frozen=True, kw_only=True)
class ClassBits:
    """Bits per byte that body and scout need for the classes of the same tokens.

    Args:
        body: The model with the body always on.
        scout: The scout alone.
    """

    body: float
    scout: float


def vetted_texts(documents: Sequence[Document]) -> list[bytes]:
    """Return what vetting scores: the start of the first documents, as UTF-8.

    Args:
        documents: Documents of either text.

    Example:
        >>> vetted_texts([Document("greeting", "Good morning!")])
        [b'Good morning!']
    """
    return [truncate_utf8(doc.text.encode(), MAX_BYTES) for doc in documents[:VETTED_DOCUMENTS]]


def gather_evidence(
    model: Model,
    name: str,
    heldout: Sequence[bytes],
    anchor: Sequence[bytes],
    *,
    tick: Callable[[], None] = lambda: None,
) -> Evidence:
    """Return the measurements of each document.

    Args:
        model: The backbone with this expert alone.
        name: The expert's name.
        heldout: Text of its own domain that it was not trained on.
        anchor: Public text.
        tick: Called after every pass over one of the texts.

    Raises:
        TextError: If either text is empty.
    """
    runs = {
        "own_backbone": (path_scorer(model, BACKBONE), heldout),
        "own_expert": (path_scorer(model, name), heldout),
        "own_mix": (mix_scorer(model), heldout),
        "anchor_backbone": (path_scorer(model, BACKBONE), anchor),
        "anchor_mix": (mix_scorer(model), anchor),
    }
    scores: dict[str, Score] = {}
    for run, (scorer, documents) in runs.items():
        scores[run] = score_documents(scorer, documents, context=model.context, max_bytes=MAX_BYTES)
        tick()
    index = model.names.index(name)
    traces = trace_routing(model, anchor, max_bytes=MAX_BYTES)
    tick()
    return Evidence(scores, np.array([weight_TE[:, index].mean() for weight_TE in traces]))


def measure_bounded_norms(
    model: Model, name: str, texts: Sequence[Sequence[bytes]]
) -> BoundedNorms:
    """Compare a body's outputs with the bounds that the router interface sets for their slots.

    Args:
        model: A model with the expert.
        name: The expert's name.
        texts: Lists of documents.
    """
    norm_LM = np.concatenate(
        [measure_norms(model, name, documents, max_bytes=MAX_BYTES) for documents in texts], axis=1
    )
    bound_L = np.array(model.interface.output_bounds)
    share_LM = norm_LM / bound_L[:, None]
    return BoundedNorms(
        largest_L=norm_LM.max(axis=1),
        largest_share=float(share_LM.max()),
        zeroed=float((~(share_LM <= 1)).mean()),
        n_outputs=share_LM.size,
    )


def count_changed_scores(model: Model, documents: Sequence[bytes], score: Score) -> int:
    """Score a batch of documents in mix mode again, and count those whose score differs in a bit.

    Args:
        model: A model.
        documents: Documents, one batch at most.
        score: The earlier score; it starts with these documents.
    """
    again = score_documents(
        mix_scorer(model), documents, context=model.context, max_bytes=MAX_BYTES
    )
    first_B, again_B = (nats_B[:BATCH].view(np.int64) for nats_B in (score.nats_B, again.nats_B))
    return int((again_B != first_B).sum())


def compare_body_and_scout(model: Model, name: str, heldout: Sequence[bytes]) -> ClassBits:
    """Return how well an expert's body and its scout predict the same text.

    A scout predicts the classes of tokens. For a body, the probabilities of a class's tokens are
    added up, so the two figures can be compared.

    Args:
        model: A model with the expert.
        name: The expert's name.
        heldout: Text that the expert was not trained on.
    """
    evidence_EM = measure_evidence(model, heldout, max_bytes=MAX_BYTES)
    scout_M = evidence_EM[model.names.index(name)]
    body_M = measure_class_evidence(model, name, heldout, max_bytes=MAX_BYTES)
    n_bytes = sum(len(truncate_utf8(document, MAX_BYTES)) for document in heldout)
    return ClassBits(
        body=float(-body_M.sum() / n_bytes / np.log(2)),
        scout=float(-scout_M.sum() / n_bytes / np.log(2)),
    )
