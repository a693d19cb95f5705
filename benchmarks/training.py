"""What does training an expert cost, beside PEFT, PyTorch and our own full fine-tuning?

    make smollm2 parity
    .venv-parity/bin/python -m benchmarks.training --json FILE --docs docs/results

Every way to train runs in a process of its own, in turns, on the same tokens of the same backbone:
the upper layers' feed-forward blocks by `train_expert` (low-rank and full bodies), by PEFT's LoRA
and by PyTorch, and all weights by `fit` and by PyTorch. Counted is the whole run: for ours
compiling, the trunk, body and scout; for the others every step, as they have nothing to compile.
Processor seconds are of all threads, so they depend less on the load of the machine than time does.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import jaxprs_in_params

from benchmarks.demo_seeds import fill
from benchmarks.first_token import COUNT
from benchmarks.plan_memory import read_memory
from composable.assembly.backbones import load_backbone
from composable.assembly.compile_memory import schedule_for_memory
from composable.assembly.huge_pages import ask_for_huge_pages
from composable.corpora.documents import read_documents
from composable.corpora.recipe import shipped_folder
from composable.interface import BodyKind
from composable.model.body import Expert
from composable.model.scout import Scout
from composable.packaging.manifests.manifest import BodySpec, InterfaceNeed, Manifest
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version
from composable.parallel import make_mesh
from composable.training.data import TappedRows, batches, token_stream
from composable.training.loop import fit
from composable.training.objectives import backbone_objective, scout_loss, tapped_objective
from composable.training.optimizers import muon
from composable.workflows.train import expert_config, train_expert
from composable.workflows.trunk_cache import cut_rows
from composable.workflows.workspace import TRAINING_FILE, WORK

RANK: Final = 16
ROWS: Final = 2
WINDOW: Final = 256
# Experts that are trained by one command.
N_TOGETHER: Final = 4
TEXT: Final = shipped_folder("legal") / "text" / "train.jsonl"
# Ours and what it is compared with; every pair gives a ratio of time and one of memory.
PAIRS: Final = (
    ("ours-lora", "peft-lora"),
    ("ours-ffn", "torch-ffn"),
    ("ours-lora", "ours-full"),
    ("ours-ffn", "ours-full"),
)
LABELS: Final = {
    "ours-lora": "`composable train`, rank 16",
    "peft-lora": "PEFT's LoRA, rank 16, the same layers",
    "ours-ffn": "`composable train`, full bodies",
    "torch-ffn": "PyTorch, the same feed-forward blocks",
    "ours-full": "ours, all weights (`fit`, AdamW)",
    "torch-full": "PyTorch, all weights (AdamW)",
}


class Clock:
    """Time and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def report(self, n_tokens: int, **more: Any) -> dict[str, Any]:
        """Return what so many tokens took, and the most memory that this process held."""
        seconds = time.perf_counter() - self._wall
        cpu = time.process_time() - self._cpu
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "tokens_per_second": round(n_tokens / seconds, 1),
            "cpu_ms_per_token": round(1e3 * cpu / n_tokens, 3),
            # Not by `getrusage`, whose peak begins with that of the process that started this one.
            "peak_mb": round(read_memory("VmHWM") / 1e6),
            **more,
        }


def train_ours(kind: BodyKind, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train an expert, as `composable train` does."""
    # TensorBoard's writer would load PyTorch, which a contributor's environment does not have.
    sys.modules["torch"] = None  # type: ignore[assignment]
    schedule_for_memory()
    compiling = count_compiling()
    loaded = load_backbone(str(arguments.backbone))
    interface = loaded.interface
    manifest = Manifest(
        name="measured",
        version=Version("1.0.0"),
        backbone=interface.name,
        license="Apache-2.0",
        interface=InterfaceNeed(name=interface.name, requires=Constraint("*")),
        body=BodySpec(kind=kind, rank=RANK if kind == "lora" else None, dtype="F32"),
        scout_width=64,
    )
    cfg = expert_config(arguments.steps, rows=ROWS, backbone=loaded.backbone, kind=kind)
    ends: list[tuple[float, float]] = []

    def mark(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if stage == "body and scout" and done in (2, total):
            ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "expert.toml").write_text(manifest.to_toml())
        clock = Clock()
        record = train_expert(loaded, folder, [TEXT], cfg, progress=mark)
        (wall, cpu), (wall_end, cpu_end) = ends
        n_tokens = (cfg.steps - 2) * cfg.batch_size * cfg.window
        return clock.report(
            cfg.tokens,
            step_tokens_per_second=round(n_tokens / (wall_end - wall), 1),
            step_cpu_ms_per_token=round(1e3 * (cpu_end - cpu) / n_tokens, 3),
            stages=record.step_seconds,
            compile_seconds=round(sum(compiling), 1),
        )


def count_compiling() -> list[float]:
    """Return a list that gets the seconds of everything that is compiled from now on."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def train_ours_full(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train all weights of the backbone with `fit`."""
    schedule_for_memory()
    compiling = count_compiling()
    loaded = load_backbone(str(arguments.backbone))
    parts: Any = nnx.split(loaded.backbone, nnx.Param, ...)
    graph, params, rest = parts
    cfg = expert_config(arguments.steps, rows=ROWS, backbone=loaded.backbone)
    stream_M = token_stream(read_documents([TEXT]), loaded.tokenizer)
    data = batches(stream_M, window=cfg.window, batch_size=cfg.batch_size, seed=0)
    clock = Clock()
    fit(backbone_objective(graph), params, rest, data, cfg)
    return clock.report(cfg.tokens, compile_seconds=round(sum(compiling), 1))


def train_torch(which: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with PyTorch: PEFT's LoRA, the feed-forward blocks, or all weights."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.folder / "model", dtype=torch.float32
    )
    layers = range(arguments.tap, model.config.num_hidden_layers)
    if which == "peft-lora":
        import peft

        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=["gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(layers),
        )
        model = peft.get_peft_model(model, config)
    elif which == "torch-ffn":
        model.requires_grad_(False)
        for layer in layers:
            model.model.layers[layer].mlp.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    rows_BU = torch.from_numpy(np.load(arguments.folder / "rows.npy")).long()
    model.train()
    clock, ends = Clock(), []
    for step in range(arguments.steps):
        at = step * ROWS % (len(rows_BU) - ROWS + 1)
        tokens_BU = rows_BU[at : at + ROWS]
        logits = model(tokens_BU[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BU[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append((time.perf_counter(), time.process_time()))
    n_tokens = (arguments.steps - 2) * ROWS * WINDOW
    return clock.report(
        arguments.steps * ROWS * WINDOW,
        step_tokens_per_second=round(n_tokens / (ends[-1][0] - ends[1][0]), 1),
        step_cpu_ms_per_token=round(1e3 * (ends[-1][1] - ends[1][1]) / n_tokens, 3),
        loss=round(float(loss), 3),
    )


def measure_floor(_: argparse.Namespace) -> dict[str, Any]:
    """Return the best rate of the products of a step's feed-forward block, alone."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    n, d, f = ROWS * WINDOW, 576, 1536
    flops, rng = 2 * n * d * f, np.random.default_rng(0)
    x_MD, w_DF = (rng.normal(size=shape).astype(np.float32) for shape in ((n, d), (d, f)))
    multiply, x, w = jax.jit(jnp.matmul), jnp.asarray(x_MD), jnp.asarray(w_DF)
    tx, tw = torch.from_numpy(x_MD), torch.from_numpy(w_DF)
    runs: dict[str, Callable[[], Any]] = {
        "jax": lambda: jax.block_until_ready(multiply(x, w)),
        "torch": lambda: tx @ tw,
    }
    rates: dict[str, Any] = {}
    for name, run in runs.items():
        run()
        wall, cpu = [], []
        for _ in range(60):
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(4):
                run()
            wall.append((time.perf_counter() - start) / 4)
            cpu.append((time.process_time() - start_cpu) / 4)
        rates[f"{name}_gflops"] = round(flops / min(wall) / 1e9)
        rates[f"{name}_gflop_per_cpu_second"] = round(flops / statistics.median(cpu) / 1e9)
    return rates


def measure_memory(arguments: argparse.Namespace, *, is_for_memory: bool) -> dict[str, Any]:
    """Return the temporary memory that the compiled step of rank 16 asks for."""
    if is_for_memory:
        schedule_for_memory()
    backbone = load_backbone(str(arguments.backbone)).backbone
    expert = Expert(backbone, kind="lora", rank=RANK, scout_width=64, rngs=nnx.Rngs(0))
    graph, params = nnx.split(expert)
    optimizer = muon(expert_config(arguments.steps, rows=ROWS, backbone=backbone))
    objective = tapped_objective(graph)
    rows = TappedRows(
        jax.ShapeDtypeStruct((ROWS, WINDOW + 1), jnp.int32),
        jax.ShapeDtypeStruct((ROWS, WINDOW, backbone.cfg.d_model), jnp.float32),
    )

    def step(params: Any, state: Any, backbone: Any, rows: Any) -> Any:
        gradient, _ = jax.grad(objective, has_aux=True)(params, backbone, rows)
        updates, state = optimizer.update(gradient, state, params, rate=1e-2)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    # Within a mesh, as `fit` runs: native kernels are for a single CPU.
    with jax.set_mesh(make_mesh()):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, backbone, rows)
    found = lowered.compile().memory_analysis()
    return {"temporary_mb": round(found.temp_size_in_bytes / 1e6)}


def measure_scouts(_: argparse.Namespace) -> dict[str, Any]:
    """Return what the gradient of a scout's loss takes: plain, ours, and of eight in one program.

    The eight read the same rows, as those of one text could, and differ in their weights.
    """
    d_model, width, n_classes, n_rows, n_scouts = 576, 64, 1024, 16, 8
    rng = np.random.default_rng(0)
    feature_BTD = jnp.asarray(rng.normal(size=(n_rows, WINDOW, d_model)), jnp.float32)
    classes_BT = jnp.asarray(rng.integers(0, n_classes, (n_rows, WINDOW)), jnp.int32)

    def plain_loss(scout: Scout, feature_BTD: jax.Array, classes_BT: jax.Array) -> jax.Array:
        log_prob_BTC = scout(feature_BTD)
        return -jnp.take_along_axis(log_prob_BTC, classes_BT[..., None], axis=-1).mean()

    scouts = [Scout(d_model, width, n_classes, rngs=nnx.Rngs(seed)) for seed in range(n_scouts)]

    def losses(scouts: list[Scout], feature_BTD: jax.Array, classes_BT: jax.Array) -> Any:
        return sum(scout_loss(scout, feature_BTD, classes_BT) for scout in scouts)

    programs: dict[str, tuple[Any, Any, int]] = {
        "plain": (jax.jit(jax.grad(plain_loss)), scouts[0], 1),
        "ours": (jax.jit(jax.grad(scout_loss)), scouts[0], 1),
        "eight in one program": (jax.jit(jax.grad(losses)), scouts, n_scouts),
    }
    found: dict[str, Any] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for turn in range(9):
        for name, (run, weights, n) in programs.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            with jax.set_mesh(make_mesh()):  # as `fit` does, so that kernels are those of training
                jax.block_until_ready(run(weights, feature_BTD, classes_BT))
            taken = time.perf_counter() - start, time.process_time() - start_cpu
            if turn:  # the first one compiles
                times[name].append((taken[0] / n, taken[1] / n))
    for name, rows in times.items():
        wall, cpu = zip(*rows, strict=True)
        found[name] = {
            "ms": [round(1e3 * x, 1) for x in (statistics.median(wall), min(wall), max(wall))],
            "cpu_ms": [round(1e3 * x, 1) for x in (statistics.median(cpu), min(cpu), max(cpu))],
        }
    return found


def count_flops(run: Callable[..., Any], *arguments: Any) -> int:
    """Return the floating-point operations of all products of matrices in a traced program."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive is jax.lax.dot_general_p:
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                length = int(np.prod([left[axis] for axis in contracted]))
                total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * length
            inner = sum(count(part) for part in jaxprs_in_params(equation.params))
            total += inner * equation.params.get("length", 1)
        return total

    return count(jax.make_jaxpr(run)(*arguments).jaxpr)


def measure_work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the operations of a step per token, as compiled and as needed, in millions."""
    backbone = load_backbone(str(arguments.backbone)).backbone
    cfg, n_tokens = backbone.cfg, ROWS * WINDOW
    rows = TappedRows(
        jax.ShapeDtypeStruct((ROWS, WINDOW + 1), jnp.int32),
        jax.ShapeDtypeStruct((ROWS, WINDOW, cfg.d_model), jnp.float32),
    )
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + cfg.n_kv_heads)
    ffn, unembed = 3 * cfg.d_model * cfg.d_ff, cfg.vocab_size * cfg.d_model
    # Scores and values of the causal half, each a product over the width of a head.
    causal = 2 * cfg.n_heads * cfg.d_head * (WINDOW + 1) // 2
    frozen = len(cfg.slots) * (attention + ffn + causal) + unembed
    n_classes, width = backbone.scout.b_out[...].shape[0], 64
    scout = 3 * width * n_classes + 2 * width * cfg.d_model
    trained = {"lora": 3 * len(cfg.slots) * 3 * RANK * (cfg.d_model + cfg.d_ff)}
    trained["ffn"] = len(cfg.slots) * ffn
    found: dict[str, Any] = {}
    for kind in ("lora", "ffn"):
        rank = RANK if kind == "lora" else None
        expert = Expert(backbone, kind=kind, rank=rank, scout_width=width, rngs=nnx.Rngs(0))
        graph, params = nnx.split(expert)
        step = jax.value_and_grad(tapped_objective(graph), has_aux=True)
        flops = count_flops(step, params, backbone, rows) / n_tokens
        needed = 2 * (2 * frozen + trained[kind] + scout)
        found[kind] = {
            "step_mflop": round(flops / 1e6, 1),
            "needed_mflop": round(needed / 1e6, 1),
            "ratio": round(flops / needed, 3),
        }
    return found


def count_programs(_: argparse.Namespace) -> dict[str, Any]:
    """Return how many programs two runs of `composable train` need, and how many they compile.

    They share a cache of programs, which is empty at first. The second run is of another expert, on
    another text, for more steps and from another seed.
    """
    texts = [shipped_folder(name) / "text" / "train.jsonl" for name in ("legal", "python-code")]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
        for number, (name, text) in enumerate(zip(("first", "second"), texts, strict=True)):
            lines = text.read_text().splitlines()[: 30 + 10 * number]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
            train = ["train", name, f"{name}.jsonl", "--steps", str(12 + 8 * number)]
            for command in (
                ["-m", "composable.cli", "new", name],
                ["-c", COUNT, *train, "--seed", str(number)],
            ):
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                )
            programs, compiled = map(int, done.stderr.split()[-2:])
            found[name] = {"programs": programs, "compiled": compiled}
    return found


def measure_together(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of some experts of one text, trained by one command and by one each.

    Those share a cache of compiled programs, as a user's commands do. Stages are those of the
    experts' records, added up; `rest` is what no record has: starting, features of text, reading
    held-out text, writing.
    """
    seeds = range(N_TOGETHER)
    cli = [sys.executable, "-m", "composable.cli"]
    backbone = ["--backbone", str(arguments.backbone.resolve())]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
    found: dict[str, float] = {}
    stages: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def run(*command: str) -> None:
            subprocess.run(
                [*cli, *command], cwd=scratch, env=environment, check=True, capture_output=True
            )

        def train(name: str, *options: str) -> None:
            steps = ["--steps", str(arguments.steps), "--rows", str(ROWS)]
            run("train", name, "--data", str(TEXT), *backbone, *steps, *options)

        for way in ("apart", "together"):
            environment["XDG_CACHE_HOME"] = str(Path(scratch) / f"cache-{way}")
            names = [f"{way}-{seed}" for seed in seeds] if way == "apart" else [way]
            for name in names:
                run("new", name, *backbone)
                expert = Path(scratch) / name / "expert.toml"
                text, low_rank = expert.read_text(), f'kind = "lora"\nrank = {RANK}'
                assert text.count('kind = "ffn"') == 1
                expert.write_text(text.replace('kind = "ffn"', low_rank))
            start = time.perf_counter()
            if way == "apart":
                for seed, name in zip(seeds, names, strict=True):
                    train(name, "--seed", str(seed))
            else:
                train(way, "--sweep", "seed=" + ",".join(map(str, seeds)))
            found[way] = round(time.perf_counter() - start, 1)
            # The best of a sweep is copied to where a run of its own has its record.
            pattern = f"sweep/**/{TRAINING_FILE}" if way == "together" else TRAINING_FILE
            paths = [path for name in names for path in Path(scratch, name, WORK).glob(pattern)]
            parts = [json.loads(path.read_text())["step_seconds"] for path in paths]
            assert len(parts) == N_TOGETHER
            own = {stage: sum(part[stage] for part in parts) for stage in parts[0]}
            own["rest"] = found[way] - sum(own.values())
            stages[way] = {stage: round(seconds, 1) for stage, seconds in own.items()}
    speed = round(found["apart"] / found["together"], 2)
    return {"seconds": found, "stages": stages, "speed": speed}


CHILDREN: Final[Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "ours-lora": lambda arguments: train_ours("lora", arguments),
    "ours-ffn": lambda arguments: train_ours("ffn", arguments),
    "ours-full": train_ours_full,
    "peft-lora": lambda arguments: train_torch("peft-lora", arguments),
    "torch-ffn": lambda arguments: train_torch("torch-ffn", arguments),
    "torch-full": lambda arguments: train_torch("torch-full", arguments),
    "floor": measure_floor,
    "scouts": measure_scouts,
    "memory": partial(measure_memory, is_for_memory=True),
    "memory-plain": partial(measure_memory, is_for_memory=False),
    "work": measure_work,
    "programs": count_programs,
    "together": measure_together,
}


def run_child(name: str, arguments: argparse.Namespace, folder: Path, tap: int) -> dict[str, Any]:
    """Run one of the above in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--child", name]
    command += ["--backbone", str(arguments.backbone), "--steps", str(arguments.steps)]
    command += ["--folder", str(folder), "--tap", str(tap)]
    # Every run compiles, as the first one of a contributor does. Without TPUs, their library, which
    # the environment with PyTorch has for ahead-of-time compiling, is not loaded.
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    environment = {**os.environ, **settings}
    if name.startswith("ours"):
        environment |= ask_for_huge_pages(environment)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, json.dumps(row), flush=True)
    return row


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return ratios of every pair, round by round: speed, processor time and memory."""
    ratios = {}
    for ours, theirs in PAIRS:
        if runs.get(ours) and runs.get(theirs):
            pairs = list(zip(runs[ours], runs[theirs], strict=True))
            ratios[f"{ours} / {theirs}"] = {
                field: [round(a[field] / b[field], 3) for a, b in pairs]
                for field in ("tokens_per_second", "cpu_ms_per_token", "peak_mb")
            }
    return ratios


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return Markdown by marker."""

    def middle(rows: Sequence[Mapping[str, Any]], field: str) -> str:
        values = sorted(row[field] for row in rows if field in row)
        if not values:
            return "–"
        spread = f" ({values[0]:g}–{values[-1]:g})" if len(values) > 1 else ""
        return f"{statistics.median(values):g}{spread}"

    head = (
        "whole run, tokens/s",
        "CPU ms per token",
        "steps alone, tokens/s",
        "CPU ms per token",
        "peak memory, MB",
        "compiling, s",
    )
    fields = (
        "tokens_per_second",
        "cpu_ms_per_token",
        "step_tokens_per_second",
        "step_cpu_ms_per_token",
        "peak_mb",
        "compile_seconds",
    )
    runs = "| | " + " | ".join(head) + " |\n|---" + "|---" * len(head) + "|\n"
    for name, label in LABELS.items():
        if rows := result["runs"].get(name):
            runs += f"| {label} | " + " | ".join(middle(rows, field) for field in fields) + " |\n"
    ratios = "| ratio | speed | CPU time | peak memory |\n|---|---|---|---|\n"
    for pair, found in result["ratios"].items():
        cells = (", ".join(f"{value:.2f}" for value in values) for values in found.values())
        ratios += f"| {pair} | " + " | ".join(cells) + " |\n"
    work = "| body | products in a step, MFLOP per token | needed | ratio |\n|---|---|---|---|\n"
    for kind, row in result["work"].items():
        work += f"| {kind} | {row['step_mflop']} | {row['needed_mflop']} | {row['ratio']} |\n"
    scouts = "| gradient of a scout's loss | ms per scout | CPU ms per scout |\n|---|---|---|\n"
    for name, row in result["scouts"].items():
        cells = (f"{mid} ({least}–{most})" for mid, least, most in (row["ms"], row["cpu_ms"]))
        scouts += f"| {name} | " + " | ".join(cells) + " |\n"
    memory = "| order of operations | temporary memory of a step, MB |\n|---|---|\n"
    for name, order in (("memory-plain", "for parallelism"), ("memory", "for memory")):
        memory += f"| {order} | {result[name]['temporary_mb']} |\n"
    floor, found = result["floor"], result["machine"]
    return {
        "runs": runs,
        "ratios": ratios,
        "work": work,
        "memory": memory,
        "scouts": scouts,
        "machine": f"*{found['cpu']}, Python {found['python']}, jax {found['jax']}, torch "
        f"{found['torch']}, peft {found['peft']}; {result['steps']} steps of {ROWS} rows of "
        f"{WINDOW} tokens; float32 product of 512 × 576 × 1536: jax {floor['jax_gflops']}, torch "
        f"{floor['torch_gflops']} GFLOP/s at best, {floor['jax_gflop_per_cpu_second']} and "
        f"{floor['torch_gflop_per_cpu_second']} GFLOP per processor second; load "
        f"{found['load'][0]}; {found['date']}.*\n",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, default=Path("runs/smollm2-135m"))
    parser.add_argument("--steps", type=int, default=64, help="steps of every run, at least 3")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is run")
    parser.add_argument("--only", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--json", type=Path, help="where figures are written")
    parser.add_argument("--docs", type=Path, help="folder whose training.md is filled in")
    parser.add_argument("--child", choices=CHILDREN, help="only this, in this process")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tap", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments)))
        return
    from benchmarks.parity import save_smollm2

    gguf = sorted(arguments.backbone.parent.glob("*.gguf"))
    if not gguf or not (arguments.backbone / "config.json").is_file():
        sys.exit(f"{arguments.backbone} and its GGUF file are missing: run `make smollm2`")
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        loaded = load_backbone(str(arguments.backbone))
        stream_M = token_stream(read_documents([TEXT]), loaded.tokenizer)
        n_tokens = arguments.steps * ROWS * WINDOW
        np.save(folder / "rows.npy", cut_rows(stream_M, WINDOW, n_tokens))
        tap = loaded.backbone.cfg.tap
        save_smollm2(gguf[0], folder / "model")
        counted = {
            name: run_child(name, arguments, folder, tap)
            for name in ("floor", "work", "memory-plain", "memory", "scouts")
        }
        for _ in range(arguments.rounds):
            for name in arguments.only:
                runs.setdefault(name, []).append(run_child(name, arguments, folder, tap))
    packages = ("jax", "torch", "peft", "transformers")
    result = {
        "machine": {
            "date": datetime.date.today().isoformat(),
            "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
            "python": platform.python_version(),
            "load": [round(x, 1) for x in os.getloadavg()],
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "steps": arguments.steps,
        **counted,
        "runs": runs,
        "ratios": compare(runs),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.docs:
        fill(arguments.docs / "training.md", tables(result))
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()
