"""What does a step with eight experts cost over the backbone's own step?

    python -m benchmarks.eight_experts                        # times, on the device that is here
    python -m benchmarks.eight_experts --compile v5e:2x4 v6e:2x4 h100 [--json FILE]   # counts

*Reading* is a forward pass over documents of eight domains: of the backbone, and of mix mode with
an expert for each domain, whose scout prefers the tokens of its domain. So the router settles on
one expert after a few tokens, as it does on text; `rows` is how many experts a token was sent to,
on average. *Training* is the gradient of one expert, which needs no other one, over that of the
whole backbone. Weights are random. On a CPU the shape is that of `tiny-bytes`, elsewhere that of
SmolLM2-135M in bfloat16. The steps take turns; `ratio` is the median over the rounds.

With --compile nothing is run. Programs are compiled for chips that are not here, of 4 layers of
SmolLM2-135M's shape, 3 of them slots. FLOPs are those of products: the ones that the program has
outside kernels, the blocks that kernels multiply for such documents, and the scouts in use; the
ratio is that of all 30 layers, each as those compiled. Memory traffic is the arrays that each
operation reads and writes in the device's memory, outside of loops, in the branches that move
least: those of about one expert a token. The operands of kernels count whole, so rows that no
kernel reads are in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.environment import describe_environment
from benchmarks.router_cost import CFG
from composable import kernels
from composable.interface import RouterInterface
from composable.interface.settings import byte_router, subword_router
from composable.kernels import tpu
from composable.kernels.grouped_swiglu import _stream_body
from composable.model import mix as mix_mode
from composable.model.backbone import Backbone
from composable.model.bank import empty_bank
from composable.model.body import Expert
from composable.model.composed import Parts
from composable.model.config import BackboneConfig, tiny_bytes
from composable.model.model import Model, Pluggable
from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
from composable.parallel.program import count_operations
from composable.training.objectives import backbone_objective, expert_objective
from tests.support import cuda_compiler
from tests.support.compiled import count_traffic, shapes_on, tpu_mesh
from tests.support.gpu_work import Counted
from tests.support.kernel_transfers import count_rows

EXPERTS: Final = 8
SCOUT_WIDTH: Final = 64
# A step with eight experts over the backbone's step.
TARGET: Final = 1.15
H100: Final = "h100"
# Layers that are compiled, and the trunk's; the share of slots is that of all 30.
LAYERS, TAP = 4, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and how many documents of how many tokens a step reads."""

    cfg: BackboneConfig
    batch: int
    length: int

    @property
    def n_classes(self) -> int:
        """Classes that scouts predict."""
        return min(self.cfg.vocab_size, 1024)

    @property
    def n_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


def choose_case() -> Case:
    """Return the case that suits the device."""
    if jax.default_backend() == "cpu":
        return Case(cfg=tiny_bytes(), batch=8, length=256)
    return Case(cfg=dataclasses.replace(CFG, dtype="BF16"), batch=16, length=512)


def make_interface(case: Case) -> RouterInterface:
    """Return the contract of the case's backbone, with the settings for its kind of tokens."""
    cfg = case.cfg
    settings = byte_router() if cfg.vocab_size == 256 else subword_router()
    return dataclasses.replace(
        read_interface(find_backbone("tiny-bytes")),
        vocab_size=cfg.vocab_size,
        n_classes=case.n_classes,
        d_model=cfg.d_model,
        d_ff=cfg.d_ff,
        tap=cfg.tap,
        slots=tuple(cfg.slots),
        output_bounds=(1e3,) * len(cfg.slots),
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)},
    )


def make_backbone(case: Case) -> Backbone:
    """Return a backbone of random weights whose classes are ranges of its vocabulary."""
    class_V = np.arange(case.cfg.vocab_size) * case.n_classes // case.cfg.vocab_size
    return Backbone(case.cfg, class_V, case.n_classes, rngs=nnx.Rngs(0))


def make_model(case: Case) -> Parts:
    """Return a backbone with an expert for each eighth of its vocabulary."""
    backbone = make_backbone(case)
    model = Model(backbone, make_interface(case), capacity=1 << EXPERTS.bit_length())
    domain_C = np.arange(case.n_classes) * EXPERTS // case.n_classes
    for number in range(EXPERTS):
        expert = Expert(backbone, kind="ffn", scout_width=SCOUT_WIDTH, rngs=nnx.Rngs(number))
        expert.scout.b_out[...] = jnp.asarray(np.where(domain_C == number, 4.0, 0.0), jnp.float32)
        model.install(
            Pluggable(name=f"expert-{number}", body=expert.body, scout=expert.scout, key=number + 1)
        )
    return model.parts


def make_documents(case: Case) -> jax.Array:
    """Return documents of random tokens, each of one eighth of the vocabulary."""
    rng = np.random.default_rng(0)
    eighth = case.cfg.vocab_size // EXPERTS
    domain_B1 = np.arange(case.batch)[:, None] % EXPERTS
    return jnp.asarray(
        domain_B1 * eighth + rng.integers(0, eighth, (case.batch, case.length)), jnp.int32
    )


def read_alone(parts: Parts, tokens_BT: jax.Array) -> jax.Array:
    """Run the backbone."""
    return parts.backbone(tokens_BT)


def read_mixed(parts: Parts, tokens_BT: jax.Array) -> jax.Array:
    """Run mix mode."""
    return mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, len(tokens_BT)))[0]


def count_choices(parts: Parts, tokens_BT: jax.Array) -> float:
    """Return how many experts a token is sent to, on average."""
    state = mix_mode.mix_state(parts, len(tokens_BT))
    weight_BTE, _ = jax.jit(mix_mode.route)(parts, tokens_BT, state)
    return float((weight_BTE > 0).sum(axis=-1).mean())


def make_steps(case: Case, parts: Parts) -> dict[str, tuple[Callable[[], Any], ...]]:
    """Return the backbone's step and the other one, of each kind."""
    tokens_BT = make_documents(case)
    backbone = parts.backbone
    expert = Expert(backbone, kind="ffn", scout_width=SCOUT_WIDTH, rngs=nnx.Rngs(0))

    def bind(fn: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        jitted = jax.jit(fn)
        return lambda: jitted(*arguments)

    whole, own, rest = nnx.split(backbone, nnx.Param, ...)
    graph, params = nnx.split(expert)
    return {
        "reading": (bind(read_alone, parts, tokens_BT), bind(read_mixed, parts, tokens_BT)),
        "training": (
            bind(jax.grad(backbone_objective(whole), has_aux=True), own, rest, tokens_BT),
            bind(jax.grad(expert_objective(graph), has_aux=True), params, backbone, tokens_BT),
        ),
    }


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Let the steps of each kind take turns, and compare them round by round."""
    parts = make_model(case)
    rows = []
    for kind, (alone, other) in make_steps(case, parts).items():
        seconds: dict[Callable[[], Any], list[float]] = {alone: [], other: []}
        for run in seconds:
            jax.block_until_ready(run())
        for _ in range(rounds):
            for run, own in seconds.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                own.append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(seconds[alone], seconds[other], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        row = {
            "step": kind,
            "backbone_ms": 1e3 * statistics.median(seconds[alone]),
            "ms": 1e3 * statistics.median(seconds[other]),
            "ratio": median,
            "spread": high - low,
            "target": TARGET,
        }
        if kind == "reading":
            row["rows"] = count_choices(parts, make_documents(case))
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> None:
    verdict = "met" if row["ratio"] <= row["target"] else "not met"
    rows = f", {row['rows']:.2f} experts a token" if "rows" in row else ""
    print(
        f"{row['step']:9} backbone {row['backbone_ms']:9.2f} ms   with experts {row['ms']:9.2f} ms"
        f"   ratio {row['ratio']:.2f} (spread {row['spread']:.2f}){rows};"
        f" target {row['target']}: {verdict}",
        flush=True,
    )


def count_expert_flops(case: Case, n_mixed: int, target: str) -> dict[str, float]:
    """Return the FLOPs of bodies and scouts, in steps where each token has so many experts.

    Args:
        case: The model and its tokens.
        n_mixed: Experts of each token.
        target: Chip that the kernels are those of.
    """
    cfg, n_slots = case.cfg, len(case.cfg.slots)
    domain_M = np.arange(case.n_tokens) // case.length % EXPERTS
    expert_MJ = 1 + (domain_M[:, None] + np.arange(n_mixed)) % EXPERTS
    block = kernels.default_block(case.n_tokens, make_interface(case).n_mixed)
    dispatch = kernels.make_dispatch(jnp.asarray(expert_MJ, jnp.int32), 2 * EXPERTS, block)
    x_PD = jnp.zeros((dispatch.choice_P.size, cfg.d_model), jnp.bfloat16)
    sizes = ((cfg.d_model, cfg.d_ff), (cfg.d_model, cfg.d_ff), (cfg.d_ff, cfg.d_model))
    bank = tuple(jnp.zeros((2 * EXPERTS, *size), jnp.bfloat16) for size in sizes)
    if target == H100:
        chip = Counted(cores=cuda_compiler.H100.cores, cache=cuda_compiler.H100.cache // 2)
        _stream_body(chip, (x_PD,), bank, dispatch)
        bodies = chip.flops
    else:
        n_rows = count_rows(_stream_body, tpu, (x_PD,), bank, dispatch)
        bodies = n_rows * 6 * cfg.d_model * cfg.d_ff
    scout = 2 * SCOUT_WIDTH * (cfg.d_model + case.n_classes)
    return {"bodies": n_slots * bodies, "scouts": (EXPERTS + 1) * scout * case.n_tokens}


def count(case: Case, mesh: jax.sharding.Mesh, target: str) -> dict[str, Any]:
    """Compile reading, alone and with eight experts, and count what both do."""
    backbone = nnx.eval_shape(lambda: make_backbone(case))
    interface = make_interface(case)

    def make(backbone: Backbone) -> Parts:
        bank = empty_bank(backbone, interface, 2 * EXPERTS)
        return Parts(backbone=backbone, bank=bank, interface=interface)

    parts = jax.eval_shape(make, backbone)
    tokens_BT = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    options = cuda_compiler.compile_options(cuda_compiler.FOLDER) if target == H100 else None
    row: dict[str, Any] = {"compiled for": target}
    for name, fn in (("backbone", read_alone), ("mixed", read_mixed)):
        start = time.perf_counter()
        lowered = jax.jit(fn).lower(*shapes_on(mesh, (parts, tokens_BT)))
        compiled = lowered.compile(compiler_options=options)
        text = compiled.as_text()
        row |= {
            f"{name}_flops": count_operations(text, choose=min)[0],
            f"{name}_bytes": count_traffic(text),
            f"{name}_temporary": compiled.memory_analysis().temp_size_in_bytes,
            f"{name}_compile_s": time.perf_counter() - start,
        }
    # Without bodies, mix mode has the products of the backbone; then with those of all 30 layers.
    cfg, n_slots = case.cfg, len(case.cfg.slots)
    head = 2 * case.n_tokens * cfg.d_model * cfg.vocab_size
    whole = head + CFG.n_layers / cfg.n_layers * (row["backbone_flops"] - head)
    body = (row["backbone_flops"] - row["mixed_flops"]) / n_slots
    for n_mixed in (1, 2):
        found = count_expert_flops(case, n_mixed, target)
        more = len(CFG.slots) * (found["bodies"] / n_slots - body) + found["scouts"]
        row[f"flops_ratio_{n_mixed}"] = 1 + more / whole
    row["bytes_ratio"] = row["mixed_bytes"] / row["backbone_bytes"]
    row["bytes_per_slot"] = (row["mixed_bytes"] - row["backbone_bytes"]) / n_slots
    return row


def show_count(row: dict[str, Any]) -> None:
    print(
        f"{row['compiled for']:9} FLOPs over the backbone's: {row['flops_ratio_1']:.2f} with one"
        f" expert a token, {row['flops_ratio_2']:.2f} with two;  memory traffic"
        f" {row['mixed_bytes'] / 1e9:.1f} GB over {row['backbone_bytes'] / 1e9:.1f} GB"
        f" ({row['bytes_ratio']:.2f}), {row['bytes_per_slot'] / 1e6:.0f} MB more for each slot;"
        f"  target {TARGET}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--compile",
        nargs="+",
        metavar="CHIP",
        help=f'topologies of TPUs as "v5e:2x4", or "{H100}": count there',
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.compile:
        jax.config.update("jax_platforms", "cpu")
    head = describe_environment()
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ")
    rows = []
    if arguments.compile:
        case = Case(
            cfg=dataclasses.replace(CFG, dtype="BF16", n_layers=LAYERS, tap=TAP),
            batch=16,
            length=512,
        )
        missing = cuda_compiler.find_missing(cuda_compiler.FOLDER)
        if H100 in arguments.compile and missing:
            parser.error(missing)
        # The plugin of a GPU first, before jax looks for devices.
        for target in sorted(arguments.compile, key=lambda target: target != H100):
            if target == H100:
                mesh = cuda_compiler.gpu_mesh(cuda_compiler.H100, cuda_compiler.FOLDER)
            else:
                mesh = tpu_mesh(target)
            rows.append(count(case, mesh, target))
            show_count(rows[-1])
    else:
        print(f"device {jax.devices()[0].device_kind}")
        for row in measure(choose_case(), arguments.rounds):
            rows.append(row)
            show(row)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": head, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
