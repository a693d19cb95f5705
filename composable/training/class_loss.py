"""The loss of a scout's classes with its gradient, a part of the tokens at a time.

The gradient with respect to a token's logits is `softmax - one_hot`. Neither is formed: with
`e = exp(logits - max)` and `z` its sum, both products of the backward pass take `e` itself and
divide their small results by `z`, and the one-hot part is a row of a small matrix for each token.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp

# Logits of a part, in numbers: 1 MiB, which stays in a core's cache over all that reads it.
_LOGITS: Final = 1 << 18


@jax.custom_vjp
def class_loss(hidden_BTW: jax.Array, w_WC: jax.Array, classes_BT: jax.Array) -> jax.Array:
    """Return the mean cross entropy of the logits `hidden w`, in nats.

    Args:
        hidden_BTW: Hidden units; for a bias, one that is always on.
        w_WC: Weights.
        classes_BT: Class of each token.

    Example:
        >>> classes_BT = jnp.zeros((2, 3), int)
        >>> loss = class_loss(jnp.zeros((2, 3, 5)), jnp.ones((5, 4)), classes_BT)
        >>> round(float(loss), 4)  # ln 4
        1.3863
    """

    def run(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_MW, classes_M = map(_flatten, part)
        return _unnormalised(hidden_MW @ w_WC, classes_M)[0]

    n_parts = _count_parts(classes_BT, w_WC)
    nats = jax.lax.map(run, (_split(hidden_BTW, n_parts), _split(classes_BT, n_parts)))
    return jnp.mean(nats)


def _loss_and_gradient(
    hidden_BTW: jax.Array, w_WC: jax.Array, classes_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the loss and its gradient with respect to hidden units and weights."""
    n_tokens, n_parts = classes_BT.size, _count_parts(classes_BT, w_WC)

    def run(
        to_w_WC: jax.Array, part: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden_MW, classes_M = map(_flatten, part)
        nats_M, e_MC, total_M1 = _unnormalised(hidden_MW @ w_WC, classes_M)
        to_hidden_MW = (e_MC @ w_WC.T) / total_M1 - w_WC.T[classes_M]
        target_CW = jnp.zeros_like(w_WC.T).at[classes_M].add(hidden_MW)
        to_w_WC = to_w_WC + (hidden_MW / total_M1).T @ e_MC - target_CW.T
        return to_w_WC, (nats_M, to_hidden_MW.reshape(part[0].shape))

    parts = _split(hidden_BTW, n_parts), _split(classes_BT, n_parts)
    to_w_WC, (nats, to_hidden) = jax.lax.scan(run, jnp.zeros_like(w_WC), parts)
    to_hidden_BTW = jnp.moveaxis(to_hidden, 0, 1).reshape(hidden_BTW.shape)
    return nats.mean(), (to_hidden_BTW / n_tokens, to_w_WC / n_tokens)


def _scale_gradient(
    gradient: tuple[jax.Array, jax.Array], given: Any
) -> tuple[jax.Array, jax.Array, None]:
    """Return the gradients with respect to the arguments of `class_loss`."""
    to_hidden_BTW, to_w_WC = gradient
    return given * to_hidden_BTW, given * to_w_WC, None


class_loss.defvjp(_loss_and_gradient, _scale_gradient)


def _unnormalised(
    logit_MC: jax.Array, classes_M: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return nats per token, probabilities up to a factor for each token, and their sum."""
    largest_M1 = logit_MC.max(-1, keepdims=True)
    e_MC = jnp.exp(logit_MC - largest_M1)
    total_M1 = e_MC.sum(-1, keepdims=True)
    target_M1 = jnp.take_along_axis(logit_MC, classes_M[:, None], axis=-1)
    return (jnp.log(total_M1) + largest_M1 - target_M1)[:, 0], e_MC, total_M1


def _count_parts(classes_BT: jax.Array, w_WC: jax.Array) -> int:
    """Return how many parts of equal length the positions are processed in."""
    n_positions = classes_BT.shape[1]
    wanted = min(n_positions, -(-classes_BT.size * w_WC.shape[1] // _LOGITS))
    return next(n for n in range(wanted, n_positions + 1) if n_positions % n == 0)


def _split(x_BT: jax.Array, n_parts: int) -> jax.Array:
    """Return an array whose first dimension is that of `n_parts` parts of the positions."""
    batch, n_positions, *rest = x_BT.shape
    parts = x_BT.reshape(batch, n_parts, n_positions // n_parts, *rest)
    return jnp.moveaxis(parts, 1, 0)


def _flatten(x_BT: jax.Array) -> jax.Array:
    """Return the tokens of all rows as one dimension."""
    return x_BT.reshape(-1, *x_BT.shape[2:])
