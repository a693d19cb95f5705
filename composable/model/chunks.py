"""Chunks: how a prompt is cut into pieces that few programs read, and padding that fills a piece.

Attention, scouts and filters are causal, so padding changes nothing that comes before it. What is
left is to take the state after the last token of the text, and to let padding choose no experts.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Tokens that one program reads at a time: few sizes, each compiled when a text first needs it. In
# larger chunks matrices are read less often, and their products have more rows; most of the gain is
# there with 128, and the rest of a text fills up one chunk.
CHUNKS: Final = (32, 128)
# A chunk takes at most as long as its size divided by this, in single tokens.
_TOKENS_OF_ONE: Final = 16
# Tokens of the text, all others being padding; None, which is known when compiling, if there is
# no padding.
Length = jax.Array | None


class Piece(NamedTuple):
    """Tokens that are read at once.

    Args:
        n_tokens: How many.
        size: Size of the chunk, filled with padding; 1 for a single token.
    """

    n_tokens: int
    size: int


def cut_prompt(n_tokens: int, room: int) -> list[Piece]:
    """Return the pieces that a text is read in.

    All chunks have one size, so that a text needs the programs for one: the largest that it fills
    at least once, or the smallest if it fills half of that. Its last tokens are single ones if they
    are few. Shorter texts are single tokens: in a process that has not read a chunk yet, those take
    less time than loading its programs.

    Args:
        n_tokens: Tokens of the text.
        room: Positions left in the caches, which padding takes as well; near the end of them
            chunks are smaller.

    Example:
        >>> [tuple(piece) for piece in cut_prompt(150, room=1024)]
        [(128, 128), (22, 128)]
        >>> [tuple(piece) for piece in cut_prompt(130, room=1024)]
        [(128, 128), (1, 1), (1, 1)]
        >>> [tuple(piece) for piece in cut_prompt(20, room=1024)]
        [(20, 32)]
        >>> cut_prompt(9, room=1024) == 9 * [Piece(1, 1)]
        True
    """
    filled = max(n_tokens, CHUNKS[0]) if 2 * n_tokens >= CHUNKS[0] else n_tokens
    sizes, pieces = [size for size in CHUNKS if size <= filled], []
    while n_tokens:
        size = max((size for size in sizes if size <= room), default=1)
        if not is_worth_a_chunk(n_tokens, size):
            size = 1
        piece = Piece(min(n_tokens, size), size)
        pieces.append(piece)
        n_tokens, room = n_tokens - piece.n_tokens, room - piece.n_tokens
    return pieces


def is_worth_a_chunk(n_tokens: int, size: int) -> bool:
    """Return whether a chunk with padding is faster than single tokens.

    Example:
        >>> is_worth_a_chunk(3, size=32), is_worth_a_chunk(3, size=128)
        (True, False)
    """
    return n_tokens * _TOKENS_OF_ONE >= size


def pad(tokens_T: np.ndarray, size: int) -> np.ndarray:
    """Return the tokens of a piece and padding, shape BT with one B.

    Example:
        >>> pad(np.array([5, 7]), 3).tolist()
        [[5, 7, 7]]
    """
    return np.pad(tokens_T, (0, size - len(tokens_T)), mode="edge")[None].astype(np.int32)


def take_last(x_BT: jax.Array, length: Length) -> jax.Array:
    """Return what an array has for the last token of the text, without T.

    Args:
        x_BT: Array whose second dimension is T.
        length: Tokens of the text.

    Example:
        >>> take_last(jnp.array([[1, 2, 3]]), jnp.int32(2)).tolist()
        [2]
    """
    if length is None:
        return x_BT[:, -1]
    last_B: jax.Array = jax.lax.dynamic_index_in_dim(x_BT, length - 1, axis=1, keepdims=False)
    return last_B


def is_text(n_tokens: int, length: Length) -> jax.Array:
    """Return which tokens are of the text, shape T.

    Args:
        n_tokens: Tokens, padding included (T).
        length: Tokens of the text.

    Example:
        >>> is_text(3, jnp.int32(2)).tolist()
        [True, True, False]
    """
    return jnp.arange(n_tokens) < (n_tokens if length is None else length)
