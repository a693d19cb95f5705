"""The layout of an expert's folder after training, and the texts that vetting scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from composable.corpora.documents import Document, read_documents, truncate_utf8
from composable.vetting.evidence import MAX_BYTES

# Folder of what must not be published: held-out text, checkpoints, curves.
WORK: Final = ".work"
HELDOUT_FILE: Final = "heldout.jsonl"
TRAINING_FILE: Final = "training.json"
HELDOUT_FRACTION: Final = 0.1
# The record in the folder of an export to another format.
EXPORT_FILE: Final = "composable.json"
# Vetting scores at most this many documents of either text.
VETTED_DOCUMENTS: Final = 8


def vetted_texts(documents: Sequence[Document]) -> list[bytes]:
    """Return what vetting scores: the start of the first documents, as UTF-8.

    Args:
        documents: Documents of either text.

    Example:
        >>> vetted_texts([Document("greeting", "Good morning!")])
        [b'Good morning!']
    """
    return [truncate_utf8(doc.text.encode(), MAX_BYTES) for doc in documents[:VETTED_DOCUMENTS]]


def count_heldout(folder: Path) -> int:
    """Return the number of documents that training held out for vetting.

    Args:
        folder: The expert, trained.
    """
    return len(read_documents([folder / WORK / HELDOUT_FILE]))
