"""The layout of an expert's folder after training."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from composable.corpora.documents import read_documents

# Folder of what must not be published: held-out text, checkpoints, curves.
WORK: Final = ".work"
HELDOUT_FILE: Final = "heldout.jsonl"
TRAINING_FILE: Final = "training.json"
HELDOUT_FRACTION: Final = 0.1
# The record in the folder of an export to another format.
EXPORT_FILE: Final = "composable.json"


def count_heldout(folder: Path) -> int:
    """Return the number of documents that training held out for vetting.

    Args:
        folder: The expert, trained.
    """
    return len(read_documents([folder / WORK / HELDOUT_FILE]))
