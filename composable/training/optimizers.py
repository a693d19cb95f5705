"""Optimisers and their schedule: AdamW for backbones, Muon for experts.

Learning rates are arguments of an update, so that one compiled step serves runs of any length:
`update(gradients, state, params, rate=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from composable.kernels import native_orthogonalize, takes_native
from composable.parallel import map_parameters, platform_in_use
from composable.training.config import TrainConfig

# Odd polynomials of degree 5. Composed, they are as close to 1 on [0.003, 1] as four can be (Amsel
# et al. 2025, arXiv:2505.16932, algorithm 1), with a reserve of 1% for what rounding adds to 1.
MUON_COEFFICIENTS: Final = (
    (8.3007, -24.0375, 17.4661),
    (4.0034, -2.9228, 0.5419),
    (3.4709, -2.5494, 0.5002),
    (2.4901, -1.8343, 0.4368),
)
_MOMENTUM: Final = 0.95
# A large matrix is orthogonalized in blocks of its shorter side: so many at most ...
_BLOCKS: Final = 4
# ... of no fewer rows or columns (ADR 45).
_BLOCK_LENGTH: Final = 192
# Root mean square of an update's numbers where a matrix is one block, that of AdamW (Liu et al.
# 2025).
_RMS: Final = 0.2
# Keeps the norm of a matrix of zeros from dividing by zero.
_EPSILON: Final = 1e-8


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay.

    Args:
        cfg: The settings of the run.
        step: Steps done before it.

    Example:
        >>> cfg = TrainConfig(steps=100, batch_size=1, window=1, learning_rate=0.5)
        >>> [round(learning_rate(cfg, step), 2) for step in (0, 5, 100)]
        [0.0, 0.5, 0.05]
    """
    warmup = min(max(1, int(cfg.steps * cfg.warmup_fraction)), cfg.steps - 1)
    if step < warmup:
        return cfg.learning_rate * step / warmup
    done = min(1.0, (step - warmup) / (cfg.steps - warmup))
    share = cfg.final_fraction + (1 - cfg.final_fraction) * (1 + math.cos(math.pi * done)) / 2
    return cfg.learning_rate * share


def adamw(cfg: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Return AdamW with clipped gradients, for backbones.

    Args:
        cfg: The settings of the run.

    References:
        Loshchilov and Hutter 2019, "Decoupled weight decay regularization", arXiv:1711.05101.
    """
    return _make_adamw(cfg.clip_norm, cfg.weight_decay)


@lru_cache(maxsize=16)
def _make_adamw(clip_norm: float, weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """Return one optimiser for equal settings, so that what is compiled with it is used again."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            _full_rate,
            b1=0.9,
            b2=0.95,
            weight_decay=weight_decay,
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
        _scale_by_rate(),
    )


def muon(cfg: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Return Muon for matrices and Adam for vectors, with clipped gradients, for experts.

    After 400 steps on Python source the expert reached 2.41 bits per byte and its scout 2.72; with
    AdamW 2.48 and 2.95.

    Args:
        cfg: The settings of the run.

    References:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
        polynomials are of Amsel et al. 2025, arXiv:2505.16932; the update's scale follows Liu et
        al. 2025, arXiv:2502.16982, section 2.2; blocks are those of Khaled et al. 2025,
        arXiv:2510.16981, without their steps of whole matrices.
    """
    return _make_muon(cfg.clip_norm, cfg.weight_decay)


@lru_cache(maxsize=16)
def _make_muon(clip_norm: float, weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """Return one optimiser for equal settings, as `_make_adamw`."""
    matrices = optax.chain(
        _scale_by_muon(),
        optax.stateless_with_tree_map(lambda x, _: _update_scale(x.shape) * x),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(_full_rate),
    )
    vectors = optax.nadamw(_full_rate, weight_decay=0.0)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.partition({"muon": matrices, "adam": vectors}, _choose_part),
        _scale_by_rate(),
    )


def _choose_part(params: Any) -> Any:
    """Return the name of the part of Muon that updates each parameter."""
    return jax.tree.map(lambda x: "muon" if x.ndim == 2 else "adam", params)


def _scale_by_muon() -> optax.GradientTransformation:
    """Return Muon's momentum and orthogonalization, as of `optax.contrib.scale_by_muon`.

    It takes fewer operations for the same polynomials, and of a large matrix each block is
    orthogonalized by itself. On a mesh each matrix is orthogonalized in one of the groups that hold
    it, not in all of them.
    """

    def init(params: Any) -> optax.contrib.MuonState:
        return optax.contrib.MuonState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            ns_coeffs=jnp.asarray(MUON_COEFFICIENTS),
        )

    def update(
        updates: Any, state: optax.contrib.MuonState, params: Any = None
    ) -> tuple[Any, optax.contrib.MuonState]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, _MOMENTUM, 1)
        count = optax.safe_increment(state.count)
        # Nesterov's momentum, as Dozat 2016 corrects its bias.
        ahead = optax.tree.bias_correction(mu, _MOMENTUM, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, _MOMENTUM, count)
        ahead = jax.tree.map(lambda m, g: _MOMENTUM * m + (1 - _MOMENTUM) * g, ahead, now)
        coefficients_PC = state.ns_coeffs
        is_native = takes_native(platform_in_use(), coefficients_PC.dtype)
        updates = map_parameters(
            partial(_orthogonalize, coefficients_PC=coefficients_PC),
            ahead,
            partial(_orthogonalize_natively, coefficients_PC=coefficients_PC)
            if is_native
            else None,
        )
        return updates, optax.contrib.MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def count_blocks(shape: tuple[int, ...]) -> int:
    """Return how many blocks a matrix is orthogonalized in.

    Args:
        shape: Shape of the matrix.

    Example:
        >>> [count_blocks(shape) for shape in ((192, 480), (1536, 576), (4096, 14336))]
        [1, 3, 4]
    """
    length = min(shape)
    fitting = (n for n in range(_BLOCKS, 0, -1) if length % n == 0)
    return next((n for n in fitting if length // n >= _BLOCK_LENGTH), 1)


def _update_scale(shape: tuple[int, ...]) -> jax.Array:
    """Return what an orthogonalized matrix is multiplied with.

    A whole matrix gets numbers of one root mean square, whatever its shape. With those of the same
    size, n blocks would have up to the root of n times its largest singular value; with the same
    largest singular value, numbers that are smaller by as much. Rates carry over halfway.
    """
    return jnp.sqrt(max(shape) / math.sqrt(count_blocks(shape))) * _RMS


def _orthogonalize_natively(
    matrices: Sequence[jax.Array], coefficients_PC: jax.Array
) -> list[jax.Array]:
    """Return what `_orthogonalize` makes of each matrix, by one native kernel."""
    blocks = [count_blocks(x.shape) for x in matrices]
    return native_orthogonalize(matrices, coefficients_PC, blocks)


def _orthogonalize(x: jax.Array, coefficients_PC: jax.Array) -> jax.Array:
    """Return a matrix whose blocks have their singular vectors and singular values near 1."""
    if x.shape[0] > x.shape[1]:
        return _orthogonalize(x.T, coefficients_PC).T
    n_blocks = count_blocks(x.shape)
    if n_blocks == 1:
        return _orthogonalize_block(x, coefficients_PC)
    blocks = x.reshape(n_blocks, -1, x.shape[1])
    return jax.vmap(_orthogonalize_block, (0, None))(blocks, coefficients_PC).reshape(x.shape)


def _orthogonalize_block(x: jax.Array, coefficients_PC: jax.Array) -> jax.Array:
    """Return a matrix, no taller than wide, with its singular vectors and singular values near 1.

    Two polynomials at a time are made of the Gram matrix, which is smaller than `x`. The next two
    get a new one, so that rounding in bfloat16, as TPUs multiply, cannot grow over all four.
    """
    eye = jnp.eye(x.shape[0], dtype=x.dtype)

    def multiply(x: jax.Array, of_pair: Any) -> tuple[jax.Array, None]:
        is_first, ((a, b, c), (d, e, f)) = of_pair
        gram = x @ x.T
        # The largest singular value is at most the root of the norm of the Gram matrix.
        bound = jnp.where(is_first, jnp.linalg.norm(gram) + _EPSILON, 1.0)
        gram /= bound
        first = a * eye + b * gram + c * gram @ gram
        gram = gram @ first @ first
        second = d * eye + e * gram + f * gram @ gram
        return second @ first @ x / jnp.sqrt(bound), None

    pairs = (jnp.array([True, False]), coefficients_PC.reshape(2, 2, 3))
    y: jax.Array = jax.lax.scan(multiply, x / (jnp.linalg.norm(x) + _EPSILON), pairs)[0]
    return y


def _full_rate(step: Any) -> jax.Array:
    """Return 1: a schedule, as checkpoints of earlier versions count its steps."""
    return jnp.ones_like(step, jnp.float32)


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Return the part of an optimiser that multiplies updates with the argument `rate`."""

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None, *, rate: Any, **_: Any
    ) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(lambda x: rate * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
