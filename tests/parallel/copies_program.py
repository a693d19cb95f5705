"""Update an FFN expert's matrices with Muon on a mesh, and print as JSON what the tests compare.

Run by the tests in a process of its own, since the number of devices is fixed when jax starts:

    python copies_program.py            # eight simulated devices, where it runs
    python copies_program.py v5e:2x4    # the TPU's compiler
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from composable.parallel import make_mesh, place_shapes, shard_tree, shardings_of
from composable.parallel.chips import tpu_devices
from composable.parallel.program import measure_program
from composable.training.config import TrainConfig
from composable.training.optimizers import muon

TRAIN = TrainConfig(steps=8, batch_size=8, window=8, learning_rate=1e-2)
WIDTH, HIDDEN, SLOTS = 64, 256, 4
MESHES = {
    "four copies": {"data": 2, "fsdp": 2, "expert": 2},
    "eight copies": {"data": 8},
}


def make_parameters(seed):
    """Return three matrices a slot, one matrix that is alone in its shape, and a vector."""
    rng = np.random.default_rng(seed)

    def make(dims, *shape):
        return nnx.Param(rng.normal(size=shape).astype(np.float32), dims=dims)

    slots = [
        {
            "w_gate": make("DF", WIDTH, HIDDEN),
            "w_up": make("DF", WIDTH, HIDDEN),
            "w_down": make("FD", HIDDEN, WIDTH),
        }
        for _ in range(SLOTS)
    ]
    return {"slots": slots, "w_in": make("DW", WIDTH, 16), "norm": make("D", WIDTH)}


def update(gradients, state, params):
    updates, state = muon(TRAIN).update(gradients, state, params, rate=np.float32(1e-2))
    return optax.apply_updates(params, updates), state


def run_steps(mesh):
    """Return the parameters after two updates."""
    params = shard_tree(make_parameters(0), mesh)
    state = jax.jit(muon(TRAIN).init)(params)
    with jax.set_mesh(mesh):
        for seed in (1, 2):
            params, state = jax.jit(update)(shard_tree(make_parameters(seed), mesh), state, params)
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def count(mesh):
    """Return the operations of an update on one device, and the bytes that it exchanges."""
    params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_parameters(0)))
    state = jax.eval_shape(muon(TRAIN).init, params)
    trees = [place_shapes(x, shardings_of(x, mesh)) for x in (params, state, params)]
    # A new function: what jit traced for one mesh is not used on another.
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(lambda *args: update(*args), donate_argnums=(1, 2)).lower(*trees).compile()
        )
    cost = measure_program(compiled)
    return {
        "flops": cost.flops,
        "exchanged": {kind: found.bytes for kind, found in cost.collectives.items()},
    }


def main(topology=None):
    devices = tpu_devices(topology) if topology else None
    one = run_steps(make_mesh(jax.devices()[:1]))
    seen = {}
    for name, sizes in MESHES.items():
        mesh = make_mesh(devices, **sizes)
        seen[name] = count(mesh)
        if devices is None:
            pairs = zip(run_steps(mesh), one, strict=True)
            seen[name]["difference"] = max(float(np.abs(a - b).max()) for a, b in pairs)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
