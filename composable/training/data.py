"""From documents to batches: shuffled rows of tokens from a grain pipeline that resumes exactly.

Reading documents is in `composable.corpora.documents`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import grain
import numpy as np

from composable.corpora.documents import Document
from composable.errors import TextError, TrainingError
from composable.model.tokenizer import Tokenizer

# Practically endless; the length of grain's own endless repeat overflows an index.
_EPOCHS: Final = 1 << 31
# Batches that wait for their step. By default there are 500, which take as much as a small model.
_READ_AHEAD: Final = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class TappedRows(NamedTuple):
    """Rows of text with the trunk's output for them.

    Args:
        tokens_BU: Rows of `window` + 1 tokens, int32.
        x_BTD: Residual stream at the tap, at the first `window` positions of each row.
    """

    tokens_BU: Any
    x_BTD: Any


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of all documents, one after the other, as one array of shape M.

    Each document starts with the begin-of-document token.

    Args:
        documents: The documents.
        tokenizer: Their tokenizer.

    Raises:
        TextError: If there are no documents, or one of them is not text.

    Example:
        >>> from composable.model.tokenizer import ByteTokenizer
        >>> token_stream([Document("a", "hi"), Document("b", "!")], ByteTokenizer()).tolist()
        [0, 104, 105, 0, 33]
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
        process: Index of this process among those with rows of their own; see `batch_share`.
        n_processes: Number of such processes.

    Returns:
        Batches of int32 tokens, shape BU: `batch_size` / `n_processes` rows of `window` + 1.

    Raises:
        TextError: If the stream is shorter than one row.
        TrainingError: If the rows do not divide among the processes.

    Example:
        >>> data = batches(np.arange(100), window=8, batch_size=2, seed=0)
        >>> next(data).shape
        (2, 9)
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
    return iter(rows.batch(batch_size // n_processes).to_iter_dataset(_READ_AHEAD))


def tapped_batches(
    rows: TappedRows, *, batch_size: int, seed: int, process: int = 0, n_processes: int = 1
) -> grain.DatasetIterator:
    """Return an endless iterator over batches of fixed rows, with a state that can be saved.

    Each epoch has every row once, in a new order. Only the rows of the current batch are read from
    disk.

    Args:
        rows: All rows; the residual stream may be memory-mapped.
        batch_size: Rows over all processes; a multiple of `n_processes`.
        seed: Seed of the order.
        process: Index of this process among those with rows of their own; see `batch_share`.
        n_processes: Number of such processes.

    Raises:
        TrainingError: If the rows do not divide among the processes.
    """
    _require_divisible(batch_size, n_processes)

    def read(index: int) -> TappedRows:
        return TappedRows(rows.tokens_BU[index], np.array(rows.x_BTD[index]))

    epoch = grain.MapDataset.range(len(rows.tokens_BU)).seed(seed).shuffle()
    mine = epoch.repeat(_EPOCHS).map(read)[process::n_processes]
    return iter(mine.batch(batch_size // n_processes).to_iter_dataset(_READ_AHEAD))


def _require_divisible(batch_size: int, n_processes: int) -> None:
    if batch_size % n_processes:
        raise TrainingError(
            f"{batch_size} rows do not divide among {n_processes} processes",
            where="training.batch_size",
        )
