"""The parts of a transformer layer that do not depend on experts: norm, RoPE, attention, SwiGLU.

Initial scales follow GPT-2 (residual outputs shrink with depth). Nothing here shards or
casts activations: they take the dtype of the weights, which the config names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import EllipsisType
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from composable.kernels import (
    Matrix,
    Quantized,
    is_on_one_device,
    multiply,
    native_cached_attention,
    native_swiglu,
    takes_native,
)
from composable.model.causal_attention import attend
from composable.model.config import (
    DTYPE_NAMES,
    MATRIX_DTYPE_NAMES,
    BackboneConfig,
    RopeScaling,
)
from composable.model.initial import draw
from composable.parallel import is_alone, platform_in_use

# Cached keys are read in blocks of this many positions, up to the last filled block.
CACHE_BLOCK: Final = 128
# Name of what the gradient of a feed-forward needs of its forward pass, for policies that keep it.
GATED: Final = "gated"


class KVCache(NamedTuple):
    """Keys and values of one layer for S positions, of which the first ones are filled.

    Heads come before positions, so that the positions of a head are contiguous, as attention reads
    them.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class QuantizedParam(nnx.Module):
    """A matrix of a backbone that is kept in fewer bytes; it has no values until it is loaded.

    Args:
        dims: Letters of its dimensions.
        inputs: Those that products sum over.
        shape: Size of each dimension.
        dtype: "I8" or "BF16".
    """

    def __init__(self, dims: str, inputs: str, shape: tuple[int, ...], dtype: str) -> None:
        values = jnp.zeros(shape, MATRIX_DTYPE_NAMES[dtype])
        self.values = nnx.Param(values, dims=dims)
        if dtype == "I8":
            sizes = [1 if d in inputs else n for d, n in zip(dims, shape, strict=True)]
            self.scale = nnx.Param(jnp.zeros(sizes, jnp.float32))

    def __getitem__(self, index: EllipsisType) -> Quantized:
        """Return the matrix; its index is `...`, as for a parameter that is an array."""
        scale = self.scale[...] if hasattr(self, "scale") else None
        return Quantized(values=self.values[...], scale=scale)


def normal(
    rngs: nnx.Rngs | None,
    dims: str,
    inputs: str,
    shape: tuple[int, ...],
    scale: float,
    cfg: BackboneConfig,
) -> nnx.Param[jax.Array] | QuantizedParam:
    """Return a matrix drawn from a normal distribution, or an empty one if it is quantized.

    Args:
        rngs: Source of the values; None where only shapes are needed.
        dims: Letters of the dimensions.
        inputs: Those that products sum over.
        shape: Size of each dimension.
        scale: Standard deviation.
        cfg: Names the dtype.
    """
    if cfg.matrix_dtype is not None:
        return QuantizedParam(dims, inputs, shape, cfg.matrix_dtype)
    drawn = draw(rngs, shape, scale)
    return nnx.Param(drawn.astype(DTYPE_NAMES[cfg.dtype]), dims=dims)


def ones(dims: str, shape: tuple[int, ...], cfg: BackboneConfig) -> nnx.Param[jax.Array]:
    """Return a parameter of ones, in the config's dtype."""
    return nnx.Param(jnp.ones(shape, DTYPE_NAMES[cfg.dtype]), dims=dims)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Scale to unit root mean square, computed in float32.

    Args:
        x_BTD: Array to normalise; other shapes work as well.
        scale_D: Scale; the mean runs over as many trailing axes as it has.
        eps: Added to the mean square.

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    axes = tuple(range(-scale_D.ndim, 0))
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axes, keepdims=True) + eps)
    return (x32_BTD * inverse_BT1).astype(x_BTD.dtype) * scale_D


class Positions(NamedTuple):
    """Where T tokens in a row are in their sequence, and how queries and keys turn there.

    Args:
        first: Position of the first of them.
        cos_T1I: Cosines of the angles by which pairs turn, one for each of the I pairs of a head.
        sin_T1I: Sines.
    """

    first: jax.Array | int
    cos_T1I: jax.Array
    sin_T1I: jax.Array


def place_tokens(cfg: BackboneConfig, n_tokens: int, first: jax.Array | int = 0) -> Positions:
    """Return the positions of tokens, for all layers of a model.

    Args:
        cfg: The model.
        n_tokens: Number of tokens (T).
        first: Position of the first of them.

    References:
        Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    position_T = (first + jnp.arange(n_tokens)).astype(jnp.float32)
    half = cfg.d_head // 2
    frequency_I = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if cfg.rope_scaling is not None:
        frequency_I = _stretch(frequency_I, cfg.rope_scaling)
    angle_TI = position_T[:, None] * frequency_I
    # In a loop, since XLA's CPU backend would fuse them into every use, and so make each sine again
    # for every layer, head and row; it fuses nothing into a loop or out of it.
    cos_TI, sin_TI = jax.lax.map(
        lambda is_cos: jnp.where(is_cos, jnp.cos(angle_TI), jnp.sin(angle_TI)),
        jnp.array([True, False]),
    )
    return Positions(first, cos_TI[:, None], sin_TI[:, None])


def rope(x_BTNH: jax.Array, positions: Positions) -> jax.Array:
    """Rotate pairs (i, i + H/2) of every head by angles that grow with position.

    Args:
        x_BTNH: Queries or keys.
        positions: Those of the T tokens.

    References:
        Su et al. 2021, arXiv:2104.09864, eq. 34, in the half-split layout of Llama checkpoints.
    """
    _, cos_T1I, sin_T1I = positions
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos_T1I - second * sin_T1I, first * sin_T1I + second * cos_T1I]
    return jnp.concatenate(turned, -1).astype(x_BTNH.dtype)


def _stretch(frequency_I: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Divide low frequencies by the factor, keep high ones, interpolate between."""
    turns = frequency_I * (scaling.original_context / (2 * math.pi))
    width = scaling.high_frequency - scaling.low_frequency
    kept = jnp.clip((turns - scaling.low_frequency) / width, 0, 1)
    return frequency_I * (kept + (1 - kept) / scaling.factor)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions.

    References:
        Ainslie et al. 2023, arXiv:2305.13245; for the normalisation of queries and keys Henry et
        al. 2020, arXiv:2010.04245, and Dehghani et al. 2023, arXiv:2302.05442, section 2.
    """

    def __init__(self, cfg: BackboneConfig, *, rngs: nnx.Rngs | None) -> None:
        d, n, k, h = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
        self.w_q = normal(rngs, "DNH", "D", (d, n, h), d**-0.5, cfg)
        self.w_k = normal(rngs, "DKH", "D", (d, k, h), d**-0.5, cfg)
        self.w_v = normal(rngs, "DKH", "D", (d, k, h), d**-0.5, cfg)
        residual = (n * h) ** -0.5 * (2 * cfg.n_layers) ** -0.5
        self.w_o = normal(rngs, "NHD", "NH", (n, h, d), residual, cfg)
        if cfg.qk_norm == "head":
            self.q_norm, self.k_norm = ones("H", (h,), cfg), ones("H", (h,), cfg)
        if cfg.qk_norm == "projection":
            self.q_norm, self.k_norm = ones("NH", (n, h), cfg), ones("KH", (k, h), cfg)
        self.cfg = cfg

    def __call__(
        self, x_BTD: jax.Array, positions: Positions, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend from T positions to themselves and all earlier ones.

        Args:
            x_BTD: Residual stream, normalised where the config says before.
            positions: Those of the T tokens.
            cache: Keys and values so far; None when the T positions are the whole sequence.

        Returns:
            The attention output, shape BTD, and the cache with these positions written.
        """
        # Text that is scored whole keeps the bits that it had in earlier versions.
        project = partial(_project, is_whole=cache is None)
        q_BTNH = project(x_BTD, self.w_q[...], "BTD,DNH->BTNH")
        k_BTKH = project(x_BTD, self.w_k[...], "BTD,DKH->BTKH")
        v_BTKH = project(x_BTD, self.w_v[...], "BTD,DKH->BTKH")
        if self.cfg.qk_norm != "none":
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], self.cfg.norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], self.cfg.norm_eps)
        q_BTNH, k_BTKH = rope(q_BTNH, positions), rope(k_BTKH, positions)
        if cache is None:
            y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
        else:
            at = (0, 0, positions.first, 0)
            cache = KVCache(
                jax.lax.dynamic_update_slice(cache.k_BKSH, k_BTKH.swapaxes(1, 2), at),
                jax.lax.dynamic_update_slice(cache.v_BKSH, v_BTKH.swapaxes(1, 2), at),
            )
            position_T = positions.first + jnp.arange(x_BTD.shape[1])
            y_BTNH = _cached_attention(q_BTNH, cache, position_T)
        return project(y_BTNH, self.w_o[...], "BTNH,NHD->BTD"), cache


def _project(x: jax.Array, w: Matrix, axes: str, *, is_whole: bool) -> jax.Array:
    """Return the einsum of `x` and `w`; except for whole texts, as a product of matrices.

    XLA's CPU backend copies the matrix for an einsum over three axes, and takes five times as long
    when there is one token.
    """
    contracted = x.ndim - 2
    rows = math.prod(w.shape[:contracted])
    if isinstance(w, Quantized):
        y = multiply(x.reshape(*x.shape[:2], rows), w.flatten(contracted))
    elif is_whole and x.shape[1] > 1:
        if platform_in_use() == "cpu" and is_alone():
            return _project_whole(x, w, axes)
        return jnp.einsum(axes, x, w)
    else:
        y = multiply(x.reshape(-1, rows), w.reshape(rows, -1))
    return y.reshape(*x.shape[:2], *w.shape[contracted:])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project_whole(x: jax.Array, w: jax.Array, axes: str) -> jax.Array:
    """Return the einsum, whose gradient is made of products of matrices, without copies of `w`."""
    return jnp.einsum(axes, x, w)


def _project_whole_forward(
    x: jax.Array, w: jax.Array, axes: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(x, w, axes, is_whole=False), (x, w)


def _project_whole_backward(
    axes: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows = math.prod(w.shape[: x.ndim - 2])
    dy_matrix, w_matrix = dy.reshape(-1, w.size // rows), w.reshape(rows, -1)
    dw = x.reshape(-1, rows).T @ dy_matrix
    return (dy_matrix @ w_matrix.T).reshape(x.shape), dw.reshape(w.shape)


_project_whole.defvjp(_project_whole_forward, _project_whole_backward)


# A program of its own where it is traced: once for all layers instead of for each.
@jax.jit
def _cached_attention(q_BTNH: jax.Array, cache: KVCache, position_T: jax.Array) -> jax.Array:
    """Attend to the cached positions up to each query; no gradient."""
    # Without a mesh the platform is known when the program is compiled.
    fits = takes_native(platform_in_use() or "cpu", q_BTNH.dtype, q_BTNH.shape[-1])
    if not (fits and is_on_one_device()):
        return _attend_by_blocks(q_BTNH, *cache, position_T)

    def attend_natively(
        q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, position_T: jax.Array
    ) -> jax.Array:
        return native_cached_attention(q_BTNH, k_BKSH, v_BKSH, position_T[0])

    y_BTNH: jax.Array = jax.lax.platform_dependent(
        *(q_BTNH, *cache, position_T), cpu=attend_natively, default=_attend_by_blocks
    )
    return y_BTNH


def _attend_by_blocks(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, position_T: jax.Array
) -> jax.Array:
    """Attend to the cached positions up to each query, block by block.

    The number of blocks is known only at run time, so one program serves every length, and a long
    cache costs no time until it is filled. The softmax is computed online: partial sums are
    rescaled when a larger score appears.

    References:
        Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3 (online softmax).
    """
    batch, n_tokens, n_heads, width = q_BTNH.shape
    n_kv = k_BKSH.shape[1]
    block = min(CACHE_BLOCK, k_BKSH.shape[2])
    rows = n_heads // n_kv * n_tokens
    # Query heads that share a key head, and the tokens, are the rows of one product per key head.
    q_BTKGH = (q_BTNH * width**-0.5).reshape(batch, n_tokens, n_kv, -1, width)
    q_BKQH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, n_kv, rows, width)
    position_Q1 = jnp.tile(position_T, n_heads // n_kv)[:, None]

    def add_block(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest_BKQ1, total_BKQ1, y_BKQH = sums
        k, v = (jax.lax.dynamic_slice_in_dim(x, i * block, block, 2) for x in (k_BKSH, v_BKSH))
        score_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k, preferred_element_type=jnp.float32)
        is_before_QS = i * block + jnp.arange(block) <= position_Q1
        score_BKQS = jnp.where(is_before_QS, score_BKQS, -jnp.inf)
        new_BKQ1 = jnp.maximum(largest_BKQ1, score_BKQS.max(-1, keepdims=True))
        weight_BKQS = jnp.exp(score_BKQS - new_BKQ1)
        shrink_BKQ1 = jnp.exp(largest_BKQ1 - new_BKQ1)
        total_BKQ1 = shrink_BKQ1 * total_BKQ1 + weight_BKQS.sum(-1, keepdims=True)
        part_BKQH = jnp.einsum(
            "BKQS,BKSH->BKQH",
            weight_BKQS.astype(v.dtype),
            v,
            preferred_element_type=jnp.float32,
        )
        return new_BKQ1, total_BKQ1, shrink_BKQ1 * y_BKQH + part_BKQH

    # Every row sees position 0, in the first block, so no largest score stays at minus infinity.
    shape = (batch, n_kv, rows)
    sums = (
        jnp.full((*shape, 1), -jnp.inf, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, width), jnp.float32),
    )
    n_blocks = position_T[-1] // block + 1
    _, total_BKQ1, y_BKQH = jax.lax.fori_loop(0, n_blocks, add_block, sums)
    y_BKGTH = (y_BKQH / total_BKQ1).reshape(batch, n_kv, -1, n_tokens, width)
    y_BTNH = y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
    output_BTNH: jax.Array = y_BTNH.astype(q_BTNH.dtype)
    return output_BTNH


class FeedForward(nnx.Module):
    """SwiGLU: `(silu(x w_gate) * (x w_up)) w_down`. A slot holds one; a full body replaces it.

    References:
        Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, cfg: BackboneConfig, *, rngs: nnx.Rngs | None) -> None:
        d, f = cfg.d_model, cfg.d_ff
        residual = f**-0.5 * (2 * cfg.n_layers) ** -0.5
        self.w_gate = normal(rngs, "DF", "D", (d, f), d**-0.5, cfg)
        self.w_up = normal(rngs, "DF", "D", (d, f), d**-0.5, cfg)
        self.w_down = normal(rngs, "FD", "F", (f, d), residual, cfg)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the block's output, shape BTD."""
        return swiglu(x_BTD, self.w_gate[...], self.w_up[...], self.w_down[...])


def swiglu(x_BTD: jax.Array, w_gate_DF: Matrix, w_up_DF: Matrix, w_down_FD: Matrix) -> jax.Array:
    """Return `(silu(x w_gate) * (x w_up)) w_down`, shape BTD."""
    if _is_native(x_BTD, w_gate_DF):
        matrices = {"w_gate": w_gate_DF, "w_up": w_up_DF, "w_down": w_down_FD}
        return native_swiglu(x_BTD, matrices, kept=GATED)
    hidden_BTF = jax.nn.silu(multiply(x_BTD, w_gate_DF)) * multiply(x_BTD, w_up_DF)
    return multiply(hidden_BTF, w_down_FD)


def changed_swiglu(
    x_BTD: jax.Array,
    matrices: Mapping[str, Matrix],
    changes: Mapping[str, tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Return `swiglu` with low-rank changes: `x w + (x a) b` for every `x w`.

    Args:
        x_BTD: Array of any shape; for a gradient, of two dimensions.
        matrices: "w_gate", "w_up" and "w_down"; they are frozen and have no gradient.
        changes: Factors `a` and `b` for each of them.
    """

    if _is_native(x_BTD, matrices["w_gate"]):
        return native_swiglu(x_BTD, matrices, changes, kept=GATED)

    def run(name: str, x: jax.Array) -> jax.Array:
        w, (a, b) = matrices[name], changes[name]
        if isinstance(w, Quantized):
            return multiply(x, w) + (x @ a) @ b
        x = _multiply_changed(x, jax.lax.stop_gradient(w), a, b)
        return x

    return run("w_down", jax.nn.silu(run("w_gate", x_BTD)) * run("w_up", x_BTD))


def _is_native(x_BTD: jax.Array, w_DF: Matrix) -> bool:
    """Return whether the gradient of a block is made by native kernels: on a single CPU."""
    is_kept_alike = not isinstance(w_DF, Quantized) and w_DF.dtype == x_BTD.dtype
    fits = takes_native(platform_in_use(), x_BTD.dtype, w_DF.shape[-1])
    return is_kept_alike and fits and is_alone()


@jax.custom_vjp
def _multiply_changed(
    x_MD: jax.Array, w_DF: jax.Array, a_DR: jax.Array, b_RF: jax.Array
) -> jax.Array:
    """Return `x w + (x a) b`; there is no gradient with respect to `w`."""
    return x_MD @ w_DF + (x_MD @ a_DR) @ b_RF


def _multiply_changed_forward(
    x_MD: jax.Array, w_DF: jax.Array, a_DR: jax.Array, b_RF: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the result as one product, and what the gradient needs.

    XLA adds two products where their sum is used. Until the backward pass it would keep both.
    """
    between_MR = x_MD @ a_DR
    left, right = jnp.concatenate([x_MD, between_MR], axis=1), jnp.concatenate([w_DF, b_RF])
    return left @ right, (x_MD, between_MR, w_DF, a_DR, b_RF)


def _multiply_changed_backward(
    kept: tuple[jax.Array, ...], dy_MF: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
    """Return the gradients, that of `x` after those of the factors.

    XLA's CPU backend would postpone the gradients of the factors of all layers to the end, and
    keep what they are made of. It drops barriers before it orders operations, so what makes it wait
    is a number that is computed from them, and is zero.
    """
    x_MD, between_MR, w_DF, a_DR, b_RF = kept
    dbetween_MR = dy_MF @ b_RF.T
    da_DR, db_RF = x_MD.T @ dbetween_MR, between_MR.T @ dy_MF
    zero = jnp.minimum(jnp.abs(da_DR[0, 0]) + jnp.abs(db_RF[0, 0]), 0)
    return dy_MF @ w_DF.T + dbetween_MR @ a_DR.T + zero, None, da_DR, db_RF


_multiply_changed.defvjp(_multiply_changed_forward, _multiply_changed_backward)
