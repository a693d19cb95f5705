"""Run a composed model on four simulated devices, and print as JSON what the tests compare.

Run by the tests in a process of its own, since the number of devices is fixed when jax starts.
"""

import dataclasses
import json
import re
import sys
from functools import partial

import jax
import numpy as np
from flax import nnx

from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.body import Expert
from composable.model.causal_attention import causal_attention
from composable.parallel import BATCH_SPEC, make_mesh, shard_tree, split_heads
from composable.training.objectives import backbone_objective, expert_objective
from tests.support.tiny import Tiny

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Rows, and heads of keys: rows and heads divide among two devices, or one of them does not.
HEADS = ((2, 2), (2, 1), (3, 2))


def mix_and_state(parts, tokens_BT):
    return mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, len(tokens_BT)))


def mix(parts, tokens_BT):
    logits_BTV, state = mix_and_state(parts, tokens_BT)
    return logits_BTV, state.router


def safe(parts, tokens_BT):
    return safe_mode.safe(parts, tokens_BT, safe_mode.safe_state(parts, len(tokens_BT)))[0]


def slot_gradients(parts, tokens_BT):
    def loss(slots):
        bank = dataclasses.replace(parts.bank, slots=slots)
        logits_BTV, _ = mix(dataclasses.replace(parts, bank=bank), tokens_BT)
        return jax.nn.log_softmax(logits_BTV)[..., 0].mean()

    return jax.grad(loss)(parts.bank.slots)


def collectives_in(compiled):
    """Return the number of collective operations of each kind in a compiled program."""
    text = compiled.as_text()
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return {kind: n for kind, n in counts.items() if n}


def difference(one, other):
    """Return the largest difference of two trees, relative to the largest number of each array."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in pairs)


def to_host(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def compare(mesh, parts, tokens_BT):
    """Run every function on one device and on the mesh."""
    seen = {}
    whole, rows = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), BATCH_SPEC))
    placed, split_BT = jax.device_put(parts, whole), jax.device_put(tokens_BT, rows)
    for fn in (mix, safe, slot_gradients):
        # One function for each: what jit compiled for one mesh is not used on another.
        one = to_host(jax.jit(fn)(parts, tokens_BT))
        with jax.set_mesh(mesh):
            compiled = jax.jit(fn).lower(placed, split_BT).compile()
            many = to_host(compiled(placed, split_BT))
        seen[fn.__name__] = {
            "collectives": collectives_in(compiled),
            "difference": difference(one, many),
        }
    seen["unsplit"] = {
        "collectives": collectives_in(jax.jit(mix).lower(placed, split_BT).compile())
    }
    return seen


def isolation(tiny, mesh, tokens_BT):
    """Return whether results on the mesh depend on what else is installed, and the tally."""
    run = jax.jit(mix_and_state)
    model = tiny.model(tiny.expert("a"))
    with jax.set_mesh(mesh):
        logits_BTV, alone = run(model.parts, tokens_BT)
        model.install(tiny.expert("b"))
        _, beside = run(model.parts, tokens_BT)
        model.remove("b")
        restored_BTV, _ = run(model.parts, tokens_BT)
    tracks = [state.router.track_BE[:, 1] for state in (alone, beside)]
    return {
        "same_track": bool((tracks[0] == tracks[1]).all()),
        "restored": bool((logits_BTV == restored_BTV).all()),
        "made": beside.tally.made_E.tolist(),
    }


def training(tiny, mesh, tokens_BU):
    """Return the collectives in the gradient of a backbone and of an expert."""
    split_BU = jax.device_put(tokens_BU, jax.NamedSharding(mesh, BATCH_SPEC))
    backbone = shard_tree(tiny.backbone, mesh)
    graph, params, rest = nnx.split(backbone, nnx.Param, ...)
    expert = Expert(tiny.backbone, kind="lora", rank=2, scout_width=8, rngs=nnx.Rngs(0))
    expert_graph, expert_params = nnx.split(shard_tree(expert, mesh))
    jobs = {
        "backbone": (backbone_objective(graph), params, rest),
        "expert": (expert_objective(expert_graph), expert_params, backbone),
    }
    return {
        name: collectives_in(
            jax.jit(jax.grad(objective, has_aux=True)).lower(trained, frozen, split_BU).compile()
        )
        for name, (objective, trained, frozen) in jobs.items()
    }


def heads(n_rows, n_kv):
    """Return what attention and its gradient do on two by two devices, as `compare` does."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n_rows, 16, n, 8)).astype(np.float32) for n in (4, n_kv, n_kv, 4)]

    def run(attend, q_BTNH, k_BTKH, v_BTKH, dy_BTNH):
        y_BTNH, pull = jax.vjp(attend, q_BTNH, k_BTKH, v_BTKH)
        return y_BTNH, *pull(dy_BTNH)

    expected = to_host(jax.jit(partial(run, causal_attention))(*arrays))
    mesh = make_mesh(fsdp=2, tensor=2)
    rows, whole = "fsdp" if n_rows % 2 == 0 else None, n_kv % 2
    place = jax.NamedSharding(mesh, jax.P(rows, None, None if whole else "tensor"))
    with jax.set_mesh(mesh):
        attend = partial(split_heads, causal_attention)
        placed = jax.device_put(arrays, place)
        compiled = jax.jit(partial(run, attend)).lower(*placed).compile()
        found = to_host(compiled(*placed))
    return {
        "collectives": collectives_in(compiled),
        "difference": difference(expected, found),
        "on_a_device": compiled.output_shardings[0].shard_shape((n_rows, 16, 4, 8)),
    }


def main():
    tiny, mesh = Tiny(), make_mesh()
    model = tiny.model(tiny.expert("a"), tiny.expert("b"))
    tokens_BT = tiny.tokens(batch=8, length=16)
    seen = {
        **compare(mesh, model.parts, tokens_BT),
        "isolation": isolation(tiny, mesh, tokens_BT),
        "heads": {f"{n_rows} {n_kv}": heads(n_rows, n_kv) for n_rows, n_kv in HEADS},
        "training": training(tiny, mesh, tokens_BT),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
