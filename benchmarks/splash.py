"""What does jax's splash attention save on TPUs, by their own compiler and interpreted here?

    pip install 'libtpu==0.0.42.*'       # the TPU compiler; no TPU is needed
    python -m benchmarks.splash [--json FILE]

Attention of one layer over one row of 2,048 tokens in bfloat16, with the heads of the 1B and the 7B
shape of `plans`: its memory beyond arguments and results, and the bytes that XLA reads and writes.
Inside a kernel XLA counts nothing; `by_hand` is what the kernel reads again there: keys and values,
or queries and the result's gradient, once for each block of 512 on the other side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import describe_environment
from composable.kernels import splash_attention
from composable.model.causal_attention import causal_attention
from composable.parallel.chips import tpu_devices
from composable.parallel.program import measure_program

N_TOKENS: Final = 2048
BLOCK: Final = 512
# Topology, and heads of queries, of keys, and their width.
CASES: Final = {
    "1B, v5e": ("v5e:2x2", 32, 4, 64),
    "7B, v5p": ("v5p:2x2x1", 32, 32, 128),
}


def compile_case(topology: str, n_heads: int, n_kv: int, width: int) -> dict[str, Any]:
    """Compile both for a chip, forward and with the gradient."""
    place = jax.sharding.SingleDeviceSharding(tpu_devices(topology)[0])
    q, k, v = (
        jax.ShapeDtypeStruct((1, N_TOKENS, n, width), jnp.bfloat16, sharding=place)
        for n in (n_heads, n_kv, n_kv)
    )
    # Half of the blocks are masked whole. There is one kernel each way, of two such reads.
    reads = (N_TOKENS // BLOCK + 1) / 2 * 2 * n_heads * N_TOKENS * width * 2
    found: dict[str, Any] = {}
    paths: dict[str, Callable[..., jax.Array]] = {
        "portable": causal_attention,
        "splash": splash_attention,
    }
    for name, fn in paths.items():
        gradient = jax.grad(lambda *x, fn=fn: fn(*x).astype(jnp.float32).sum(), (0, 1, 2))
        for kind, run, times in (("forward", fn, 1), ("with gradient", gradient, 2)):
            compiled = jax.jit(run).lower(q, k, v).compile()
            found[f"{name}, {kind}"] = {
                "temporary": measure_program(compiled).temporary,
                "bytes": int(compiled.cost_analysis()["bytes accessed"]),
                "by_hand": int(times * reads) if fn is splash_attention else 0,
            }
    return found


def compare(n_tokens: int = 384, n_heads: int = 2, width: int = 128) -> dict[str, float]:
    """Return the largest differences of the kernel, interpreted in float32, from ours."""
    rng = np.random.default_rng(0)
    q, k, v, w = (
        jnp.asarray(rng.normal(size=(1, n_tokens, n_heads, width)), jnp.float32) for _ in range(4)
    )

    def interpreted(*x: jax.Array) -> jax.Array:
        return splash_attention(*x, interpret=True)

    def gradients(fn: Callable[..., jax.Array]) -> Any:
        return jax.jit(jax.grad(lambda *x: (fn(*x) * w).sum(), (0, 1, 2)))(q, k, v)

    pairs = zip(
        (interpreted(q, k, v), *gradients(interpreted)),
        (causal_attention(q, k, v), *gradients(causal_attention)),
        strict=True,
    )
    names = ("result", "queries", "keys", "values")
    return {name: float(jnp.abs(a - b).max()) for name, (a, b) in zip(names, pairs, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    result: dict[str, Any] = {
        **describe_environment(),
        "differences": compare(),
        **{name: compile_case(*case) for name, case in CASES.items()},
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
