"""An expert's folder as training leaves it: file names, and the texts that vetting scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from composable.corpora.documents import Document, truncate_utf8
from composable.vetting.evidence import MAX_BYTES

# What must not be published lies in this folder: held-out text, checkpoints, curves.
WORK: Final = ".work"
HELDOUT_FILE: Final = "heldout.jsonl"
TRAINING_FILE: Final = "training.json"
HELDOUT_FRACTION: Final = 0.1
# Vetting scores at most this many documents of either text.
VETTED_DOCUMENTS: Final = 8


def vetted_texts(documents: Sequence[Document]) -> list[bytes]:
    """Return the start of the first documents, as UTF-8: what vetting scores."""
    return [truncate_utf8(doc.text.encode(), MAX_BYTES) for doc in documents[:VETTED_DOCUMENTS]]
