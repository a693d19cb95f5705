"""What share of a forward pass is the router, at 8 and 64 experts, on the shape of SmolLM2-135M?

python -m benchmarks.router_cost --json benchmarks/results/router_cost.json --docs docs/results

By the FLOPs that XLA counts in compiled programs, and by wall time, with random weights. The
forward pass is the backbone's own; the router is what is added to it per token: every scout's
prediction, the track records and the choice. The bank is as a model makes it: the backbone's scout
beside the experts', entries up to the next power of two, scouts of width 64 stored at the
interface's bound. XLA counts the body of a loop once, so a scout is counted apart, as the program
that an entry in use runs, and multiplied by how many are in use.
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

from benchmarks.demo_seeds import fill
from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig
from composable.model.router import (
    RouterState,
    ScoutBank,
    choose,
    empty_state,
    evidence,
    log_prior,
    scout_evidence,
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
N_CLASSES, WIDTH, BOUND, TOP_K = 1024, 64, 128, 2
N_EXPERTS = (8, 64)
# One token while decoding, and a window while reading.
SHAPES = {"decode": (1, 1), "window": (1, 256)}
# What is allowed, as a share of the forward pass.
TARGETS = {8: 0.03, 64: 0.10}


def make_scouts(n_experts: int) -> tuple[ScoutBank, jax.Array]:
    """Return scouts as a bank holds them, the backbone's first, and how wide each is."""
    rng = np.random.default_rng(0)
    n_scouts = n_experts + 1
    capacity = 1 << (n_scouts - 1).bit_length()

    def normal(*used: int, stored: tuple[int, ...]) -> jax.Array:
        out = np.zeros((capacity, *stored), np.float32)
        out[tuple(map(slice, (n_scouts, *used)))] = rng.normal(size=(n_scouts, *used)) * 0.05
        return jnp.asarray(out)

    d, w, c = CFG.d_model, WIDTH, N_CLASSES
    scouts = ScoutBank(
        normal(d, w, stored=(d, BOUND)),
        normal(w, stored=(BOUND,)),
        normal(w, c, stored=(BOUND, c)),
        normal(c, stored=(c,)),
    )
    return scouts, jnp.where(jnp.arange(capacity) < n_scouts, w, 0)


def trust(evidence_BTE: jax.Array, state: RouterState, width_E: jax.Array) -> Any:
    """Return whom to mix, from what every scout said."""
    track_BTE = track_record(evidence_BTE, state.track_BE, 0.975)
    key_E = jnp.arange(width_E.shape[0])
    choice = choose(log_prior(width_E > 0, 0.999) + track_BTE, key_E, TOP_K)
    return choice.expert_BTJ, choice.weight_BTJ


@jax.jit
def route(
    scouts: ScoutBank,
    width_E: jax.Array,
    feature_BTD: jax.Array,
    classes_BT: jax.Array,
    state: RouterState,
) -> Any:
    """Run the router alone."""
    return trust(evidence(scouts, feature_BTD, classes_BT, state, width_E), state, width_E)


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
    scouts, _ = make_scouts(0)
    one = (scouts.w_in_EDW[0, :, :WIDTH], scouts.b_in_EW[0, :WIDTH])
    one += (scouts.w_out_EWC[0, :WIDTH], scouts.b_out_EC[0])
    per_scout = flops_of(jax.jit(scout_evidence), one, feature_BTD, classes_BT)
    for n_experts in N_EXPERTS:
        scouts, width_E = make_scouts(n_experts)
        state = empty_state(batch, len(width_E), CFG.d_model)
        evidence_BTE = jnp.zeros((batch, n_tokens, len(width_E)))
        flops = (n_experts + 1) * per_scout
        flops += flops_of(jax.jit(trust), evidence_BTE, state, width_E)
        router = (scouts, width_E, feature_BTD, classes_BT, state)
        milliseconds = best_ms(lambda router=router: route(*router))
        row[str(n_experts)] = {
            "entries": len(width_E),
            "router_mflops": flops / 1e6,
            "router_ms": milliseconds,
            "flops_share": flops / 1e6 / row["forward_mflops"],
            "time_share": milliseconds / row["forward_ms"],
            "target": TARGETS[n_experts],
        }
    return row


def table(result: dict[str, Any]) -> str:
    """Return all figures as Markdown."""
    text = "| experts | | forward | router | share | at most |\n|---|---|---|---|---|---|\n"
    what = {"decode": "a token", "window": f"{SHAPES['window'][1]} tokens"}
    for n_experts in N_EXPERTS:
        for kind in SHAPES:
            row, cost = result[kind], result[kind][str(n_experts)]
            cells = {
                "MFLOP": (row["forward_mflops"], cost["router_mflops"], cost["flops_share"]),
                "ms": (row["forward_ms"], cost["router_ms"], cost["time_share"]),
            }
            for unit, (forward, router, share) in cells.items():
                text += f"| {n_experts} | {what[kind]}, {unit} | {forward:,.1f} | {router:,.2f} "
                text += f"| {share:.1%} | {cost['target']:.0%} |\n"
    machine = result["machine"]
    return text + (
        f"\n*{machine['cpu']}, jax {machine['jax']}; load {machine['load'][0]}; "
        f"{machine['date']}.*\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--docs", type=Path, help="folder whose router-cost.md is filled in")
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
    if arguments.docs:
        fill(arguments.docs / "router-cost.md", {"router": table(result)})
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
