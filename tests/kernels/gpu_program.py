"""Compile for an H100 and print as JSON what the test compares; in a process of its own.

A plugin can be registered once in a process, before jax looks for devices.
"""

import json
import sys

import jax
import jax.numpy as jnp

from composable.kernels import count_blocks, grouped_swiglu, make_dispatch
from tests.support.compiled import shapes_on
from tests.support.cuda_compiler import FOLDER, H100, compile_options, gpu_mesh

TOKENS, CHOICES, EXPERTS, BLOCK, WIDTH, HIDDEN = 512, 2, 4, 64, 192, 480


def main():
    """Compile a trained body, forward and backward."""

    def train(x_PD, weights, dispatch):
        y_PD, pull = jax.vjp(lambda x, w: grouped_swiglu(x, *w, dispatch), x_PD, weights)
        return y_PD, pull(y_PD)

    mesh = gpu_mesh(H100, FOLDER)
    experts_MJ = jax.ShapeDtypeStruct((TOKENS, CHOICES), jnp.int32)
    dispatch = jax.eval_shape(lambda e: make_dispatch(e, EXPERTS, BLOCK), experts_MJ)
    n_blocks = count_blocks(TOKENS * CHOICES, EXPERTS, BLOCK)
    sizes = ((n_blocks * BLOCK, WIDTH), *[(EXPERTS, WIDTH, HIDDEN)] * 2, (EXPERTS, HIDDEN, WIDTH))
    x_PD, *bank = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes)
    arguments = shapes_on(mesh, (x_PD, tuple(bank), dispatch))
    compiled = jax.jit(train).lower(*arguments).compile(compiler_options=compile_options(FOLDER))
    text = compiled.as_text()
    seen = {
        "kernels": text.count('custom_call_target="__gpu$xla.gpu.triton"'),
        "copies": [f"{n_blocks},{d},{f}" in text for _, d, f in sizes[1:]],
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "hidden": n_blocks * BLOCK * HIDDEN * 2,
        "sums": sum(4 * e * d * f for e, d, f in sizes[1:]),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
