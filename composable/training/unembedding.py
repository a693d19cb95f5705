"""The cross entropy of a large vocabulary, without all logits in memory at once.

A frozen matrix is read once, a part of the vocabulary at a time for all tokens. The gradient of a
trained one needs each token's probabilities, so there a part is of tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp

from composable.parallel import count_batch_shards, keep_batch_split, sum_shards

# Logits that are in memory at once on a device, in numbers: 32 MiB. Smaller parts of the tokens
# read the matrix more often.
_LOGITS: Final = 1 << 23
# Rows of a frozen matrix in a part at least, which holds their sums for each token beside the
# logits, and at most: these stay in a core's cache between the two products.
_FEWEST_ROWS: Final = 256
_MOST_ROWS: Final = 2048


def unembedded_loss(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, *, is_trained: bool = False
) -> jax.Array:
    """Return the mean cross entropy of the logits `x w`, without all logits in memory at once.

    The gradient with respect to a token's logits is `softmax - one_hot`, known as soon as they are.
    So the gradients are made in the forward pass: each part of the logits is dropped when its
    probabilities are multiplied back.

    Args:
        x_BTD: Output of the last norm.
        w_VD: The matrix that turns it into logits.
        targets_BT: The next token at each position.
        is_trained: Whether there is a gradient with respect to `w_VD`; without it, it is frozen.

    References:
        Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3 (online softmax).

    Example:
        >>> x_BTD, w_VD = jnp.zeros((2, 3, 5)), jnp.ones((4, 5))
        >>> round(float(unembedded_loss(x_BTD, w_VD, jnp.zeros((2, 3), int))), 4)  # ln 4
        1.3863
    """
    return _loss(x_BTD, w_VD, targets_BT, is_trained)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, is_trained: bool) -> jax.Array:
    return _loss_and_gradients(x_BTD, w_VD, targets_BT, is_trained)[0]


def _loss_and_gradients(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, is_trained: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """Return the loss and its gradients with respect to `x_BTD` and, if trained, `w_VD`."""
    if not is_trained:
        loss, slope_BTD = _frozen_loss_and_gradient(x_BTD, w_VD, targets_BT)
        return loss, (slope_BTD, None)
    n_rows, n_positions = targets_BT.shape
    n_shards = count_batch_shards(n_rows)
    n_logits = targets_BT.size * len(w_VD) // n_shards
    wanted = min(n_positions, -(-n_logits // _LOGITS))
    n_parts = next(n for n in range(wanted, n_positions + 1) if n_positions % n == 0)

    def run(sums: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        x_BTD, targets_BT = map(keep_batch_split, part)
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD).astype(jnp.float32)
        log_total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        is_target_BTV = jnp.arange(len(w_VD)) == targets_BT[..., None]
        nats_BT = log_total_BT - jnp.where(is_target_BTV, logits_BTV, 0.0).sum(-1)
        slope_BTV = jnp.exp(logits_BTV - log_total_BT[..., None]) - is_target_BTV
        slope_BTV = slope_BTV.astype(w_VD.dtype)
        sums = keep_batch_split(sums + _sum_products(slope_BTV, x_BTD, n_shards))
        return sums, (nats_BT, slope_BTV @ w_VD)

    # Every device sums over its own rows; the sums of all are added once, after the last part.
    sums = jnp.zeros((n_shards, *w_VD.shape), jnp.float32)
    # Parts are of positions, so that the rows stay on the devices that hold them.
    parts = _split(x_BTD, n_parts), _split(targets_BT, n_parts)
    sums, (nats, slope) = jax.lax.scan(run, sums, parts)
    slope_BTD = jnp.moveaxis(slope, 0, 1).reshape(x_BTD.shape) / targets_BT.size
    slope_VD = sum_shards(sums, "VD") / targets_BT.size
    return nats.mean(), (slope_BTD, slope_VD)


def _frozen_loss_and_gradient(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the loss and its gradient with respect to `x_BTD`.

    With `e = exp(logits - max)`, both follow from two sums over the vocabulary, of `e` and of
    `e w`. A part adds to them; what they are so far shrinks when it has a larger logit.
    """
    n_tokens = targets_BT.size // count_batch_shards(len(targets_BT))
    n_taken = min(max(_LOGITS // n_tokens, _FEWEST_ROWS), _MOST_ROWS, len(w_VD))

    def add(sums: tuple[jax.Array, ...], w_VD: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        largest_BT1, total_BT1, weighted_BTD = sums
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD).astype(jnp.float32)
        new_BT1 = jnp.maximum(largest_BT1, logits_BTV.max(-1, keepdims=True))
        e_BTV, shrink_BT1 = jnp.exp(logits_BTV - new_BT1), jnp.exp(largest_BT1 - new_BT1)
        total_BT1 = shrink_BT1 * total_BT1 + e_BTV.sum(-1, keepdims=True)
        part_BTD = jnp.einsum(
            "BTV,VD->BTD", e_BTV.astype(w_VD.dtype), w_VD, preferred_element_type=jnp.float32
        )
        return (new_BT1, total_BT1, shrink_BT1 * weighted_BTD + part_BTD), None

    least_BT1 = jnp.full_like(x_BTD[..., :1], -jnp.inf, jnp.float32)
    sums: Any = least_BT1, jnp.zeros_like(least_BT1), jnp.zeros_like(x_BTD, jnp.float32)
    n_parts = len(w_VD) // n_taken
    parts, rest = w_VD[: n_parts * n_taken], w_VD[n_parts * n_taken :]
    sums, _ = jax.lax.scan(add, sums, parts.reshape(n_parts, n_taken, -1))
    if len(rest):
        sums, _ = add(sums, rest)
    largest_BT1, total_BT1, weighted_BTD = sums
    target_BTD = w_VD[targets_BT].astype(jnp.float32)
    target_BT1 = (x_BTD * target_BTD).sum(-1, keepdims=True)
    loss = (jnp.log(total_BT1) + largest_BT1 - target_BT1).mean()
    slope_BTD = (weighted_BTD / total_BT1 - target_BTD) / targets_BT.size
    return loss, slope_BTD.astype(x_BTD.dtype)


def _sum_products(slope_BTV: jax.Array, x_BTD: jax.Array, n_shards: int) -> jax.Array:
    """Return the gradient with respect to the matrix, summed over the rows of each shard."""
    slope, x = (part.reshape(n_shards, -1, part.shape[-1]) for part in (slope_BTV, x_BTD))
    stack: jax.Array = jnp.matmul(slope.mT, x, preferred_element_type=jnp.float32)
    return stack


def _split(x_BT: jax.Array, n_parts: int) -> jax.Array:
    """Return an array whose first dimension is that of `n_parts` parts of the positions."""
    batch, n_positions, *rest = x_BT.shape
    parts = x_BT.reshape(batch, n_parts, n_positions // n_parts, *rest)
    return jnp.moveaxis(parts, 1, 0)


def _forward(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, is_trained: bool
) -> tuple[jax.Array, Any]:
    loss, (slope_BTD, slope_VD) = _loss_and_gradients(x_BTD, w_VD, targets_BT, is_trained)
    # An empty array carries the dtype that the gradient of the matrix has to have.
    return loss, (slope_BTD, slope_VD, jnp.zeros(0, w_VD.dtype))


def _scale_slopes(
    is_trained: bool, kept: Any, given: Any
) -> tuple[jax.Array, jax.Array | None, None]:
    """Return the gradients with respect to the arguments of `unembedded_loss`."""
    slope_BTD, slope_VD, like = kept
    scaled_BTD = (given * slope_BTD).astype(slope_BTD.dtype)
    return scaled_BTD, (given * slope_VD).astype(like.dtype) if is_trained else None, None


_loss.defvjp(_forward, _scale_slopes)
