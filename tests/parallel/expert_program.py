"""Run composed models whose bank is split over four simulated devices, and print what is compared.

Run by the tests in a process of its own, since the number of devices is fixed when jax starts.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from composable.model.model import Model
from composable.parallel import entries, make_mesh, parse_mesh
from tests.support.tiny import Tiny

MESHES = ("data=1,expert=4", "data=2,expert=2")


def experts_of(tiny, names):
    return [
        tiny.expert(name, kind="lora", rank=2) if name in "lm" else tiny.expert(name)
        for name in names
    ]


def difference(one, other):
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def compare(one, many, tokens_BT, modes):
    """Return how far a model on a mesh is from one on a single device."""
    return {
        mode: difference(getattr(one, mode)(tokens_BT), getattr(many, mode)(tokens_BT))
        for mode in modes
    }


def isolation(tiny, mesh, tokens_BT):
    """Return which results are the same to the bit whatever else is installed, and wherever."""
    a, b, c = experts_of(tiny, "abc")
    model = Model(tiny.backbone, tiny.interface, [a, b], capacity=8, mesh=mesh)
    before_BTV = np.asarray(model(tokens_BT))
    model.install(c)
    beside_BTV = np.asarray(model(tokens_BT))
    model.remove("c")
    moved = Model(tiny.backbone, tiny.interface, capacity=8, mesh=mesh)
    for expert in (c, b, a):
        moved.install(expert)
    moved.remove("c")
    return {
        "changed": bool((before_BTV != beside_BTV).any()),
        "restored": bool((np.asarray(model(tokens_BT)) == before_BTV).all()),
        "moved": bool((np.asarray(moved(tokens_BT)) == before_BTV).all()),
        "entries": [model.names[:4], moved.names[:4]],
    }


def held(model):
    """Return how many entries of each stack of bodies one device has."""
    bank = model.parts.bank
    return [x.addressable_shards[0].data.shape[0] for x in jax.tree.leaves(bank.slots)]


def simulated_parts(x, out, begin_X, size_X, place_X, received_X, *, axis_name):
    """Do what `jax.lax.ragged_all_to_all` documents, with what all devices send."""
    del received_X  # follows from what the others send
    sent = jax.lax.all_gather((x, begin_X, size_X, place_X), axis_name)
    here, row = jax.lax.axis_index(axis_name), jnp.arange(len(x))
    for source in range(len(begin_X)):
        begin, size, place = (table[source, here] for table in sent[1:])
        at = jnp.where((begin <= row) & (row < begin + size), place + row - begin, len(out))
        out = out.at[at].set(sent[0][source], mode="drop")
    return out


def uneven_parts(model, tokens_BT):
    """Return how far mix mode with the exchange of TPUs is from that with the one of CPUs."""
    expected_BTV = np.asarray(model(tokens_BT))
    jax.clear_caches()
    jax.lax.ragged_all_to_all = simulated_parts
    entries._exchange_equal_parts = entries._exchange_parts
    return difference(model(tokens_BT), expected_BTV)


def main():
    tiny = Tiny()
    tokens_BT = tiny.tokens(batch=4, length=16)
    four, two = (make_mesh(**parse_mesh(text)) for text in MESHES)
    make = partial(Model, tiny.backbone, tiny.interface, experts_of(tiny, "abcl"))
    one, many, pairs = make(), make(mesh=four), make(mesh=two, factor_rank=4)
    seen = {
        "full": compare(one, many, tokens_BT, ("__call__", "safe")),
        "both": compare(one, pairs, tokens_BT, ("__call__",)),
        "isolation": isolation(tiny, four, tokens_BT),
        "held": held(many),
    }
    for expert in experts_of(tiny, "defg"):
        many.install(expert)
    seen["grown"] = held(many)
    seen["uneven"] = uneven_parts(pairs, tokens_BT)
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
