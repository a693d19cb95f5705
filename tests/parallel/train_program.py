"""Train the tiny backbone for three steps on whatever devices there are, and write down the end.

Run by the tests in a process of its own, since the number of devices is fixed when jax starts:

    python train_program.py OUT.npz FSDP TENSOR

With COMPOSABLE_COORDINATOR and its companions set it is one process of many.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig
from composable.parallel import make_mesh, shard_tree, start_processes
from composable.training.config import TrainConfig
from composable.training.data import batches
from composable.training.loop import fit
from composable.training.objectives import backbone_objective

CFG = BackboneConfig(
    vocab_size=256,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=64,
    tap=1,
    context=32,
    scout_width=16,
)
TRAIN = TrainConfig(steps=3, batch_size=8, window=16, learning_rate=1e-2, log_every=1)


def initial_backbone():
    """Return the backbone with NumPy's random numbers, which are the same on every device."""
    backbone = nnx.eval_shape(lambda: Backbone(CFG, np.arange(256), 256, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(backbone, nnx.Param, ...)
    rng = np.random.default_rng(0)
    make = {
        True: lambda shape: rng.normal(size=shape).astype(np.float32) * shape[0] ** -0.5,
        False: lambda shape: np.ones(shape, np.float32),
    }
    params = jax.tree.map(lambda leaf: make[len(leaf.shape) > 1](leaf.shape), params)
    rest = jax.tree.map(lambda leaf: np.arange(256, dtype=np.int32), rest)
    return graph, params, rest


def train(fsdp, tensor):
    """Return losses, whole parameters by path, the shape of each one's shard, and frozen arrays."""
    mesh = make_mesh(fsdp=fsdp, tensor=tensor)
    graph, params, rest = initial_backbone()
    data = batches(
        np.random.default_rng(1).integers(0, 256, 2000),
        window=TRAIN.window,
        batch_size=TRAIN.batch_size,
        seed=0,
        process=jax.process_index(),
        n_processes=jax.process_count(),
    )
    fitted = fit(backbone_objective(graph), params, rest, data, TRAIN, mesh=mesh)
    flat = nnx.to_flat_state(fitted.trained)
    named = {".".join(map(str, path)): leaf[...] for path, leaf in flat}
    whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))
    n = jax.device_count()
    splits = [(f, t) for f in range(1, n + 1) for t in range(1, n + 1) if n % (f * t) == 0]
    return {
        "mesh": dict(mesh.shape),
        "meshes": [(f, t, dict(make_mesh(fsdp=f, tensor=t).shape)) for f, t in splits],
        "losses": [row["loss"] for row in fitted.history],
        "shards": {name: x.addressable_shards[0].data.shape for name, x in named.items()},
        "frozen": np.asarray(jax.tree.leaves(shard_tree(rest, mesh))[0]).tolist(),
    }, {name: np.asarray(whole(x).addressable_data(0)) for name, x in named.items()}


def main(out, fsdp, tensor):
    """Train, and write `OUT` with the parameters and, as JSON, what else was seen."""
    start_processes()
    seen, params = train(int(fsdp), int(tensor))
    np.savez(out, seen=json.dumps(seen), **params)


if __name__ == "__main__":
    main(*sys.argv[1:])
