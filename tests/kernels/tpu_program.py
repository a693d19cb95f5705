"""Compile for TPUs and print as JSON what the tests compare; in a process of its own.

libtpu can be loaded once in a process, and prints to the terminal.
"""

import json
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.kernels import count_blocks, count_splash_flops, grouped_swiglu, make_dispatch
from composable.model import mix as mix_mode
from composable.model.backbone import Backbone
from composable.model.causal_attention import causal_attention
from composable.model.composed import specs_of_parts
from composable.model.config import BackboneConfig
from composable.parallel import BATCH_SPEC
from composable.parallel.mesh import AXES
from composable.parallel.program import measure_program
from composable.training import layer_loop
from composable.training.config import TrainConfig
from composable.training.loop import lower_step
from composable.training.objectives import backbone_objective
from composable.training.optimizers import adamw
from tests.support.compiled import collectives_in, shapes_on, tpu_mesh
from tests.support.tiny import Tiny

TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4"}
TOKENS, CHOICES, EXPERTS, BLOCK = 4096, 2, 8, 64
# Width, hidden units, and products of forward and backward; None for the body forward alone. Three
# matrices of 1536 by 8192 are 75 MB in bfloat16. XLA lays out a down matrix of 1536 by 576 by
# columns. The value of the forward pass is not used, so in pieces its last product is left out: 8,
# not 9.
BODIES = {
    "fused": (256, 512, 9),
    "in pieces": (1536, 8192, 8),
    "forward": (1536, 8192, None),
    "by columns": (576, 1536, None),
}


LAYERS = BackboneConfig(
    vocab_size=256,
    context=1024,
    d_model=128,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=64,
    d_ff=256,
    tap=1,
    scout_width=16,
    is_tied=False,
    dtype="BF16",
)


def compile_body(mesh, width, hidden, products):
    """Return kernels and FLOPs, over those needed, of a trained body forward and backward.

    With no number of products, those of the body forward alone.
    """

    def run(x_PD, weights, dispatch):
        return grouped_swiglu(x_PD, *weights, dispatch)

    def loss(*arguments):
        return run(*arguments).astype(jnp.float32).sum()

    experts_MJ = jax.ShapeDtypeStruct((TOKENS, CHOICES), jnp.int32)
    dispatch = jax.eval_shape(lambda e: make_dispatch(e, EXPERTS, BLOCK), experts_MJ)
    n_rows = count_blocks(TOKENS * CHOICES, EXPERTS, BLOCK) * BLOCK
    shapes = ((EXPERTS, width, hidden), (EXPERTS, width, hidden), (EXPERTS, hidden, width))
    arguments = (
        jax.ShapeDtypeStruct((n_rows, width), jnp.bfloat16),
        tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
    )
    program = jax.jit(jax.grad(loss, argnums=(0, 1)) if products else run)
    compiled = program.lower(*shapes_on(mesh, (*arguments, dispatch))).compile()
    needed = (products or 3) * 2 * TOKENS * CHOICES * width * hidden
    text = compiled.as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "flops": compiled.cost_analysis()["flops"] / needed,
        "copies": len(re.findall(rf"= bf16\[{EXPERTS},.* copy\(", text)),
    }


def compile_mix(data, expert):
    """Return the operations between devices in mix mode on four chips: count and bytes by kind."""
    tiny = Tiny()
    mesh = tpu_mesh(TOPOLOGIES["v5e"], (data, 1, 1, expert), AXES)
    parts = tiny.model(tiny.expert("a")).parts
    tokens_BT = jnp.asarray(tiny.tokens(batch=4, length=8))

    def run(parts, tokens_BT):
        return mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, len(tokens_BT)))[0]

    with jax.set_mesh(mesh):
        placed = jax.tree.map(partial(shapes_on, mesh), parts, specs_of_parts(parts))
        arguments = placed, shapes_on(mesh, tokens_BT, BATCH_SPEC)
        found = collectives_in(jax.jit(run).lower(*arguments).compile())
    return {kind: [operations.count, operations.bytes] for kind, operations in found.items()}


def compile_step():
    """Return kernels, arrays like scores and FLOPs in kernels of training three layers in loops."""
    layer_loop._MOST_BYTES = 0  # small as it is, it runs like a large one
    backbone = nnx.eval_shape(lambda: Backbone(LAYERS, np.arange(256), 256, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(backbone, nnx.Param, ...)
    training = TrainConfig(steps=2, batch_size=2, window=LAYERS.context, learning_rate=1e-3)
    compiled = lower_step(
        backbone_objective(graph),
        params,
        rest,
        jax.ShapeDtypeStruct((training.batch_size, training.window + 1), jnp.int32),
        optimizer=adamw(training),
        mesh=tpu_mesh(TOPOLOGIES["v5e"], (1, 2, 2, 1), AXES),
    ).compile()
    text, with_kernels = compiled.as_text(), measure_program(compiled, count_splash_flops)
    return {
        "kernels": sorted(re.findall(r"%splash_mha_([a-z]+)\S* = .* custom-call\(", text)),
        "scores": count_scores(text),
        "flops": with_kernels.flops - measure_program(compiled).flops,
    }


def compile_portable():
    """Return how many arrays like scores the portable attention has with its gradient."""
    q, k = (
        jax.ShapeDtypeStruct((1, LAYERS.context, n, LAYERS.d_head), jnp.bfloat16)
        for n in (LAYERS.n_heads, LAYERS.n_kv_heads)
    )
    gradient = jax.jit(jax.grad(lambda *x: causal_attention(*x).astype(jnp.float32).sum()))
    arguments = shapes_on(tpu_mesh(TOPOLOGIES["v5e"]), (q, k, k))
    return count_scores(gradient.lower(*arguments).compile().as_text())


def count_scores(text):
    """Return how many shapes of a program have two dimensions of a block of positions, or all."""
    long = {str(LAYERS.context), str(LAYERS.context // 2)}
    shapes = set(re.findall(r"\[([\d,]+)\]", text))
    return sum(sum(size in long for size in shape.split(",")) > 1 for shape in shapes)


def main():
    seen = {}
    for chip, topology in TOPOLOGIES.items():
        mesh = tpu_mesh(topology)
        seen[chip] = {name: compile_body(mesh, *sizes) for name, sizes in BODIES.items()}
    seen["v5e"]["mix on four"] = compile_mix(data=4, expert=1)
    seen["v5e"]["shared bank"] = compile_mix(data=2, expert=2)
    seen["v5e"]["splash"] = compile_step()
    seen["v5e"]["scores"] = compile_portable()
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
