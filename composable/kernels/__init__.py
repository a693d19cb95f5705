"""Grouped matmul and dispatch: one reference, one fast path per kind of platform, same signatures.

Array letters are those of `composable.interface.dims`: M tokens, J choices per token, E experts,
P rows of the grouped, block-padded batch, D model width, F hidden width.
"""

from composable.kernels.changed_swiglu import changed_swiglu_of_few, grouped_changed_swiglu
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
    "changed_swiglu_of_few",
    "combine_rows",
    "count_blocks",
    "default_block",
    "gather_rows",
    "grouped_changed_swiglu",
    "grouped_matmul",
    "grouped_swiglu",
    "make_dispatch",
    "swiglu_of_few",
]
