"""What share of a forward pass is the router, at 8 and 64 experts, on the shape of SmolLM2-135M?

python -m benchmarks.router_cost --json FILE

Counted in the compiled programs, by FLOPs that XLA reports, and by wall time, with random weights.
The forward pass is the backbone's own; the router is what is added to it per token: every scout's
prediction, the track records and the choice. XLA counts the body of a loop once, so the scouts,
which run one after the other in a loop, are counted apart and multiplied.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig
from composable.model.router import (
    RouterState,
    ScoutBank,
    choose,
    empty_state,
    evidence,
    log_prior,
    track_record,
)

CFG = BackboneConfig(
    vocab_size=49_152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    d_head=64,
    d_ff=1536,
    tap=8,
    context=8192,
    scout_width=64,
    rope_theta=100_000.0,
)
N_CLASSES, WIDTH, TOP_K = 1024, 64, 2
N_EXPERTS = (8, 64)
# One token while decoding, and a window while reading.
SHAPES = {"decode": (1, 1), "window": (1, 256)}
# What is allowed, as a share of the forward pass.
TARGETS = {8: 0.03, 64: 0.10}


def make_scouts(n_experts: int) -> ScoutBank:
    """Return random scouts."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32) * 0.05)

    d, w, c = CFG.d_model, WIDTH, N_CLASSES
    return ScoutBank(
        normal(n_experts, d, w), normal(n_experts, w), normal(n_experts, w, c), normal(n_experts, c)
    )


@jax.jit
def route(
    scouts: ScoutBank, feature_BTD: jax.Array, classes_BT: jax.Array, state: RouterState
) -> tuple[jax.Array, jax.Array]:
    """Run the router alone."""
    evidence_BTE = evidence(scouts, feature_BTD, classes_BT, state)
    track_BTE = track_record(evidence_BTE, state.track_BE, 0.975)
    n_experts = scouts.b_in_EW.shape[0]
    alive_E = jnp.ones(n_experts, bool)
    choice = choose(log_prior(alive_E, 0.999) + track_BTE, jnp.arange(n_experts), TOP_K)
    return choice.expert_BTJ, choice.weight_BTJ


@jax.jit
def read(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    """Run the backbone over a window."""
    return backbone(tokens_BT)


@jax.jit
def decode(backbone: Backbone, tokens_BT: jax.Array, caches: Any, position: jax.Array) -> Any:
    """Run the backbone for one token."""
    x_BTD, _ = backbone.trunk(tokens_BT, position, caches[: CFG.tap])
    return backbone.upper(x_BTD, backbone.own_feed_forward, position, caches[CFG.tap :])[0]


def flops_of(program: Any, *arguments: Any) -> float:
    """Return the FLOPs that XLA counts in a compiled program."""
    analysis = program.lower(*arguments).compile().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float(analysis["flops"])


def best_ms(run: Callable[[], Any], n: int = 15) -> float:
    """Return the least of some wall times, in milliseconds, after a warm-up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(n):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def measure(backbone: Backbone, kind: str) -> dict[str, Any]:
    """Return FLOPs and time of the forward pass and of routers beside it."""
    batch, n_tokens = SHAPES[kind]
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(0, CFG.vocab_size, (batch, n_tokens)), jnp.int32)
    classes_BT = tokens_BT % N_CLASSES
    feature_BTD = jnp.asarray(rng.normal(size=(batch, n_tokens, CFG.d_model)), jnp.float32)
    if kind == "decode":
        caches = backbone.empty_caches(batch, 1024, range(CFG.n_layers))
        forward: tuple[Any, ...] = (decode, backbone, tokens_BT, caches, jnp.int32(255))
    else:
        forward = (read, backbone, tokens_BT)
    row: dict[str, Any] = {
        "forward_mflops": flops_of(*forward) / 1e6,
        "forward_ms": best_ms(lambda: forward[0](*forward[1:])),
    }
    per_scout = flops_of(*_router(1, feature_BTD, classes_BT))
    for n_experts in N_EXPERTS:
        router = _router(n_experts, feature_BTD, classes_BT)
        # The loop's body, one scout, is counted once whatever the number of experts.
        flops = flops_of(*router) + (n_experts - 1) * per_scout
        milliseconds = best_ms(lambda router=router: router[0](*router[1:]))
        row[str(n_experts)] = {
            "router_mflops": flops / 1e6,
            "router_ms": milliseconds,
            "flops_share": flops / 1e6 / row["forward_mflops"],
            "time_share": milliseconds / row["forward_ms"],
            "target": TARGETS[n_experts],
        }
    return row


def _router(n_experts: int, feature_BTD: jax.Array, classes_BT: jax.Array) -> tuple[Any, ...]:
    state = empty_state(feature_BTD.shape[0], n_experts, CFG.d_model)
    return route, make_scouts(n_experts), feature_BTD, classes_BT, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    backbone = Backbone(CFG, np.arange(CFG.vocab_size) % N_CLASSES, N_CLASSES, rngs=nnx.Rngs(0))
    result: dict[str, Any] = {
        "machine": {
            "date": datetime.date.today().isoformat(),
            "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
            "load": [round(x, 1) for x in os.getloadavg()],
            "jax": jax.__version__,
        }
    }
    for kind in SHAPES:
        row = result[kind] = measure(backbone, kind)
        print(f"{kind}: forward {row['forward_mflops']:,.0f} MFLOP, {row['forward_ms']:.1f} ms")
        for n_experts in N_EXPERTS:
            cost = row[str(n_experts)]
            print(
                f"  {n_experts} experts: {cost['router_mflops']:.1f} MFLOP "
                f"({cost['flops_share']:.2%}), {cost['router_ms']:.2f} ms "
                f"({cost['time_share']:.2%}); at most {cost['target']:.0%}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
