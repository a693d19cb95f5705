"""Grouped matmul and dispatch: one reference, one fast path per kind of platform, same signatures.

Array letters are those of `composable.interface.dims`: M tokens, J choices per token, E experts,
P rows of the grouped, block-padded batch, D model width, F hidden width.
"""

from composable.kernels.dispatch import (
    Dispatch,
    combine_rows,
    count_blocks,
    default_block,
    gather_rows,
    make_dispatch,
)
from composable.kernels.grouped_matmul import grouped_matmul
from composable.kernels.grouped_swiglu import grouped_swiglu, swiglu_of_few

__all__ = [
    "Dispatch",
    "combine_rows",
    "count_blocks",
    "default_block",
    "gather_rows",
    "grouped_matmul",
    "grouped_swiglu",
    "make_dispatch",
    "swiglu_of_few",
]
