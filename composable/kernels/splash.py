"""Causal attention on TPUs, by jax's splash attention: scores never leave the chip.

This file decides which attention the kernel takes, calls it, and counts its operations, of which
XLA knows nothing. The portable path is `model.causal_attention`; how rows and heads are split
over devices is the matter of `parallel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import jax
import jax.numpy as jnp

from composable.kernels.native import load_native

# Positions of a block; the largest that divides a row.
_BLOCKS: Final = (512, 256, 128)
# Widths of a head that were compiled for TPUs.
_WIDTHS: Final = (64, 128)
# Blocks of a row, up to which all gradients come from one kernel. It writes that of queries once
# for each block of keys, to be added up: so many times their memory, while a layer is at work.
_MOST_PARTS: Final = 8
# Products of two matrices in each kernel: of the result, and of all gradients if one makes them;
# else of those of keys and values, and of that of queries, which make the scores each for itself.
_PRODUCTS: Final = {"mha_fwd": 2, "mha_dkv": 4, "mha_dq": 3}
_PRODUCTS_AT_ONCE: Final = {"mha_fwd": 2, "mha_dkv": 5}


def takes_splash(platform: str | None, q_BTNH: jax.Array) -> bool:
    """Return whether attention is computed by the kernel.

    Args:
        platform: That of the devices, as jax names it; None where it is not known.
        q_BTNH: Queries, of which only shape and dtype count.

    Example:
        >>> takes_splash("tpu", jnp.zeros((1, 256, 1, 64), jnp.bfloat16))
        True
        >>> takes_splash("cpu", jnp.zeros((1, 256, 1, 64), jnp.bfloat16))
        False
    """
    _, n_tokens, _, width = q_BTNH.shape
    fits = width in _WIDTHS and n_tokens % _BLOCKS[-1] == 0
    return platform == "tpu" and q_BTNH.dtype == jnp.bfloat16 and fits


def describe_attention(platform: str) -> str:
    """Return how a platform computes attention over whole rows, and why.

    Args:
        platform: As jax names it.

    Example:
        >>> describe_attention("gpu")
        'blocks of queries against the keys up to each, scores made again for the gradient'
    """
    blocks = "blocks of queries against the keys up to each, scores made again for the gradient"
    if platform == "cpu":
        native = load_native()
        kernel = "by native kernels where a gradient follows" if native.is_loaded else "portable"
        return f"{blocks}, {kernel}: {native.reason}"
    if platform != "tpu":
        return blocks
    return (
        f"splash attention, since scores never leave the chip: on a mesh, in bfloat16, heads of "
        f"{' or '.join(map(str, _WIDTHS))}, rows of a multiple of {_BLOCKS[-1]}; else blocks"
    )


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    kept: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend from every position to itself and all earlier ones.

    Args:
        q_BTNH: Queries; of the N heads, N / K in a row share a key head.
        k_BTKH: Keys.
        v_BTKH: Values.
        kept: Name of what the gradient needs of the forward pass, for policies that keep it.
        interpret: Whether to run the kernel's operations one by one, on any platform.

    Returns:
        The weighted values, shape BTNH.

    References:
        Dao et al. 2022, arXiv:2205.14135.

    Example:
        >>> q_BTNH, k_BTKH = (jnp.zeros((1, 256, n, 64), jnp.bfloat16) for n in (4, 2))
        >>> jax.eval_shape(splash_attention, q_BTNH, k_BTKH, k_BTKH).shape
        (1, 256, 4, 64)
    """
    # Here, since what runs without the kernel starts a tenth of a second earlier without Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n_tokens, n_heads, width = q_BTNH.shape[1:]
    block, at_once = _block_of(n_tokens), _is_one_kernel(n_tokens)
    run = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((n_tokens, n_tokens))] * n_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=None if at_once else block,
            block_kv_dq=None if at_once else block,
            use_fused_bwd_kernel=at_once,
        ),
        residual_checkpoint_name=kept,
        interpret=interpret,
    )
    heads_first = (x.swapaxes(1, 2) for x in (q_BTNH * width**-0.5, k_BTKH, v_BTKH))
    y_BTNH: jax.Array = jax.vmap(run)(*heads_first).swapaxes(1, 2)
    return y_BTNH


def count_splash_flops(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Return the operations of one of the kernels in a compiled program; 0 for any other.

    Blocks that are masked whole are not computed, and those on the diagonal are computed whole.

    Args:
        name: What the program calls it.
        shapes: Shapes of its operands; queries are the largest with heads, positions and width.

    Example:
        >>> count_splash_flops("splash_mha_fwd_residuals", [(1, 1, 1), (2, 256, 64)])
        33554432
    """
    kinds = [kind for kind in _PRODUCTS if f"splash_{kind}" in name]
    if not kinds:
        return 0
    *n_heads, n_tokens, width = max((s for s in shapes if len(s) > 2), key=math.prod)
    products = (_PRODUCTS_AT_ONCE if _is_one_kernel(n_tokens) else _PRODUCTS)[kinds[0]]
    pairs = n_tokens * (n_tokens + _block_of(n_tokens)) // 2
    return products * 2 * math.prod(n_heads) * pairs * width


def _is_one_kernel(n_tokens: int) -> bool:
    """Return whether one kernel makes all gradients, for rows of so many positions."""
    return n_tokens // _block_of(n_tokens) <= _MOST_PARTS


def _block_of(n_tokens: int) -> int:
    return next(block for block in _BLOCKS if n_tokens % block == 0)
