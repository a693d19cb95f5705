"""The key of dimension letters: the only place they are defined.

Array names end in these letters (`x_BTD`), einsum and einops use them, `Param(dims="DF")` carries
them, and `parallel.sharding` maps them to mesh axes.
"""

from __future__ import annotations

from typing import Final

DIMS: Final[dict[str, str]] = {
    "B": "batch: sequences, documents, windows, rows of text",
    "T": "time: positions of a sequence",
    "U": "positions of a sequence and the one before the first (T + 1)",
    "S": "source: positions that attention reads (cache length when decoding)",
    "V": "vocabulary: tokens",
    "D": "model width",
    "N": "query heads",
    "K": "key and value heads",
    "G": "query heads that share a key and value head (N / K)",
    "Q": "queries that share a key and value head: G heads at T positions",
    "H": "width of one head",
    "I": "pairs of a head's width that rotate together (H / 2)",
    "F": "hidden width of a feed-forward body",
    "R": "rank of a low-rank body",
    "W": "hidden width of a scout",
    "C": "classes that scouts predict",
    "E": "experts in the bank, the backbone first",
    "O": "experts in the bank, where an array has them twice",
    "A": "awake: the paths that run, of all installed",
    "L": "slots: upper layers where bodies plug in",
    "J": "choices: experts chosen per token (top k)",
    "M": "tokens of a flat batch (B times T) or of a stream",
    "X": "devices that share a bank",
    "P": "rows of a dispatched, block-padded batch",
    "Y": "blocks of a dispatched batch (P divided by the rows of a block)",
    "Z": "spans of a dispatched batch: runs of blocks of one expert",
}


def shape_of(dims: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape that dimension letters stand for.

    Args:
        dims: Dimension letters, for example "DF".
        sizes: Size of each letter.

    Returns:
        One size per letter.

    Raises:
        KeyError: For a letter that is not in the key or has no size.
    """
    return tuple(sizes[letter] for letter in dims if DIMS[letter])
