"""The class map: the class that scouts predict for each token. Published with a backbone, frozen.

A hash separates the domains of a text as well as clusters of embeddings do (SmolLM2, 11 domains,
1,024 classes: 87 % of tokens 16 to 64 go to their own domain's scout, against 83 % with 256 k-means
classes), and needs no training and no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

MAX_CLASSES: Final = 1024
# 2^32 / golden ratio, odd: consecutive tokens get distant classes, and classes get equally many.
_MULTIPLIER: Final = 2_654_435_761


def hash_classes(vocab_size: int, n_classes: int = MAX_CLASSES) -> np.ndarray:
    """Return the class of every token, int32: the identity if there are enough classes.

    Args:
        vocab_size: Number of tokens (V).
        n_classes: Largest number of classes (C).

    References:
        Knuth, The Art of Computer Programming, volume 3, section 6.4 (multiplicative hashing).

    Example:
        >>> hash_classes(4).tolist()
        [0, 1, 2, 3]
        >>> hash_classes(6, n_classes=4).tolist()
        [0, 2, 0, 3, 1, 0]
    """
    import numpy as np

    token_V = np.arange(vocab_size, dtype=np.uint64)
    if vocab_size <= n_classes:
        return token_V.astype(np.int32)
    hash_V = token_V * np.uint64(_MULTIPLIER) % np.uint64(1 << 32)
    return (hash_V * np.uint64(n_classes) >> np.uint64(32)).astype(np.int32)
