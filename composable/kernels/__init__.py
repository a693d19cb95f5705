"""Grouped matmul and dispatch: one reference, one fast path per kind of platform, same signatures.

Array letters are those of `composable.interface.dims`: M tokens, J choices per token, E experts,
P rows of the grouped, block-padded batch, D model width, F hidden width.
"""

from composable.kernels.changed_swiglu import changed_swiglu_of_few, grouped_changed_swiglu
from composable.kernels.dispatch import (
    Dispatch,
    combine_rows,
    count_blocks,
    count_up_to,
    default_block,
    gather_rows,
    group_blocks,
    make_dispatch,
    run_in_least_room,
)
from composable.kernels.grouped_matmul import grouped_matmul
from composable.kernels.grouped_swiglu import grouped_swiglu, swiglu_of_few
from composable.kernels.native import (
    KERNELS_VARIABLE,
    is_on_one_device,
    load_native,
    takes_native,
    wants_native,
)
from composable.kernels.native_attention import (
    native_attention,
    native_attention_gradient,
    native_cached_attention,
)
from composable.kernels.native_muon import native_orthogonalize
from composable.kernels.native_scout import native_scout_loss
from composable.kernels.native_swiglu import native_swiglu
from composable.kernels.quantized import (
    Matrix,
    Quantized,
    describe_products,
    multiply,
    multiply_transposed,
    quantize,
    quantize_like,
    take_rows,
    widen,
)
from composable.kernels.splash import (
    count_splash_flops,
    describe_attention,
    splash_attention,
    takes_splash,
)

__all__ = [
    "KERNELS_VARIABLE",
    "Dispatch",
    "Matrix",
    "Quantized",
    "changed_swiglu_of_few",
    "combine_rows",
    "count_blocks",
    "count_splash_flops",
    "count_up_to",
    "default_block",
    "describe_attention",
    "describe_products",
    "gather_rows",
    "group_blocks",
    "grouped_changed_swiglu",
    "grouped_matmul",
    "grouped_swiglu",
    "is_on_one_device",
    "load_native",
    "make_dispatch",
    "multiply",
    "multiply_transposed",
    "native_attention",
    "native_attention_gradient",
    "native_cached_attention",
    "native_orthogonalize",
    "native_scout_loss",
    "native_swiglu",
    "quantize",
    "quantize_like",
    "run_in_least_room",
    "splash_attention",
    "swiglu_of_few",
    "take_rows",
    "takes_native",
    "takes_splash",
    "wants_native",
    "widen",
]
