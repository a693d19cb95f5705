"""Documents to batches: shuffled windows of tokens from a grain pipeline that resumes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import grain
import numpy as np

from composable.corpora.documents import Document
from composable.errors import TextError, TrainingError
from composable.model.tokenizer import Tokenizer

# As good as endless; the length of grain's own endless repeat overflows an index.
_EPOCHS: Final = 1 << 31


class TappedRows(NamedTuple):
    """Rows of tokens, T + 1 each, and the residual stream at the tap before each target."""

    tokens_BT: Any
    x_BTD: Any


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Return all documents as one run of tokens, each after its begin-of-document token.

    Raises:
        TextError: If there are no documents, or one of them is not text.
    """
    if not documents:
        raise TextError("there are no documents to train on")
    return np.concatenate([tokenizer.encode(document.text) for document in documents])


def batches(
    stream_M: np.ndarray,
    *,
    window: int,
    batch_size: int,
    seed: int,
    process: int = 0,
    n_processes: int = 1,
) -> grain.DatasetIterator:
    """Return an endless iterator over batches of token windows, with a state that can be saved.

    Each epoch covers the stream in `window`-sized steps, in a new order and at new offsets.

    Args:
        stream_M: Tokens of all documents.
        window: Positions to predict; a row holds one token more.
        batch_size: Rows over all processes; a multiple of `n_processes`.
        seed: Seed of order and offsets.
        process: Index of this process.
        n_processes: Number of processes, each of which gets its own rows.

    Returns:
        Batches of int32 tokens, shape (batch_size / n_processes, window + 1).

    Raises:
        TextError: If the stream is shorter than one row.
        TrainingError: If the rows do not divide among the processes.
    """
    _require_divisible(batch_size, n_processes)
    if len(stream_M) < window + 1:
        raise TextError(
            f"{len(stream_M)} tokens of text, but one row takes {window + 1}",
            hint="give more text, or a shorter window",
        )
    last = len(stream_M) - window - 1

    def cut(index: int, rng: np.random.Generator) -> np.ndarray:
        start = min(index * window + int(rng.integers(window)), last)
        return stream_M[start : start + window + 1].astype(np.int32)

    epoch = grain.MapDataset.range(max(1, last // window)).seed(seed).shuffle()
    rows = epoch.repeat(_EPOCHS).random_map(cut)[process::n_processes]
    return iter(rows.batch(batch_size // n_processes).to_iter_dataset())


def tapped_batches(
    rows: TappedRows, *, batch_size: int, seed: int, process: int = 0, n_processes: int = 1
) -> grain.DatasetIterator:
    """Return an endless iterator over batches of fixed rows, with a state that can be saved.

    Each epoch has every row once, in a new order. Only the rows of a batch are read from disk.

    Args:
        rows: All rows; what the trunk gave may be memory-mapped.
        batch_size: Rows over all processes; a multiple of `n_processes`.
        seed: Seed of the order.
        process: Index of this process.
        n_processes: Number of processes, each of which gets its own rows.

    Raises:
        TrainingError: If the rows do not divide among the processes.
    """
    _require_divisible(batch_size, n_processes)

    def read(index: int) -> TappedRows:
        return TappedRows(rows.tokens_BT[index], np.array(rows.x_BTD[index]))

    epoch = grain.MapDataset.range(len(rows.tokens_BT)).seed(seed).shuffle()
    mine = epoch.repeat(_EPOCHS).map(read)[process::n_processes]
    return iter(mine.batch(batch_size // n_processes).to_iter_dataset())


def _require_divisible(batch_size: int, n_processes: int) -> None:
    if batch_size % n_processes:
        raise TrainingError(
            f"{batch_size} rows do not divide among {n_processes} processes",
            where="training.batch_size",
        )
