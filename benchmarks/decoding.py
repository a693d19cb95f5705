"""How fast is decoding on a CPU: beside the memory's limit, with experts, and beside others?

    .venv-parity/bin/python -m benchmarks.decoding --json FILE --docs docs/results

SmolLM2-135M, where `make smollm2` left its GGUF file or in the folder that SMOLLM2 names; float32,
one document, greedy. Peers are measured where they are installed: transformers with the same
weights in float32, and llama.cpp with the 4-bit file itself. Its package is built from source, for
minutes, so it is in no environment of the project; `--llama PATH` names a folder with it:

    pip install --no-deps --target PATH llama-cpp-python diskcache

The floor is the time to read as many bytes as the weights have in float32. The backbone alone is
measured with its matrices in float32, bfloat16 and int8, round by round in one process.

Every contender runs in a process of its own, in turns. Models with experts are compared with the
backbone alone in one process, round by round in turns, so that other load on the machine meets
both; ratios are medians over rounds, with the least and the largest. Experts are random changes of
the backbone's bodies: speed does not depend on values. What counts is how many bodies a token
mixes, and scouts are made so that the text belongs to one expert, or to two alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.demo_seeds import fill
from benchmarks.parity import PROMPT, Endless, find_gguf, save_smollm2
from composable.assembly.backbones import make_blank
from composable.interop.checkpoint import Checkpoint, open_source
from composable.interop.tokenizer import make_tokenizer
from composable.kernels import describe_products
from composable.model.bank import empty_bank, install, make_entry
from composable.model.body import Body
from composable.model.composed import Parts
from composable.model.decoding import Decoder, Mode
from composable.model.scout import Scout
from composable.model.tensors import from_tensors
from composable.workflows.import_backbone import load_checkpoint
from composable.workflows.quantize_backbone import quantize_tensors
from tests.support.parity import parts_of

N_DRAWN: Final = 24
N_READ: Final = 512
N_READS: Final = 3
LENGTH: Final = 1024
# How matrices are kept in fewer bytes.
QUANTIZED: Final = {"bf16": "BF16", "int8": "I8"}
RANK: Final = 16
# How much likelier a class of the prompt is to the scout that the text belongs to, in nats.
_ADVANTAGE: Final = 6.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with experts.

    Args:
        n_experts: Experts installed beside the backbone.
        kind: Kind of their bodies.
        n_alike: Experts that the text belongs to.
        mode: Mode of decoding.
    """

    n_experts: int
    kind: str
    n_alike: int = 1
    mode: Mode = "mix"

    @property
    def name(self) -> str:
        bodies = "FFN bodies" if self.kind == "ffn" else f"rank {RANK}"
        shared = ", text of two alike" if self.n_alike > 1 else ""
        return f"{self.mode}, {self.n_experts} experts, {bodies}{shared}"


CASES: Final = (
    Case(2, "lora"),
    Case(2, "ffn"),
    Case(8, "lora"),
    Case(8, "ffn"),
    Case(22, "lora"),
    Case(22, "ffn"),
    Case(2, "lora", 2),
    Case(2, "ffn", 2),
    Case(2, "lora", 1, "safe"),
    Case(2, "ffn", 1, "safe"),
    Case(22, "ffn", 1, "safe"),
)


def add_experts(parts: Parts, case: Case, tokens_T: np.ndarray) -> Parts:
    """Return the model with experts, the first of which predict the text's tokens well."""
    backbone, interface = parts.backbone, parts.interface
    n_classes = interface.n_classes
    rank = RANK if case.kind == "lora" else None
    body = Body(backbone, case.kind, rank, rngs=nnx.Rngs(0))
    scout = Scout(interface.d_model, 64, n_classes, rngs=nnx.Rngs(1))
    is_likely_C = np.isin(np.arange(n_classes), np.asarray(backbone.class_map[...])[tokens_T])
    capacity = case.n_experts + 1
    bank = empty_bank(backbone, interface, capacity, rank=rank or 0, has_full=rank is None)
    for index in range(1, case.n_experts + 1):
        advantage = _ADVANTAGE if index <= case.n_alike else 0.0
        scout.b_out[...] = jnp.asarray(advantage * is_likely_C, jnp.float32)
        entry = make_entry(backbone, interface, body, scout, index, rank=bank.rank)
        bank = install(bank, index, entry)
    return dataclasses.replace(parts, bank=bank)


class Contender:
    """A model of ours, ready to decode.

    Args:
        parts: The model.
        tokenizer: Its tokenizer.
        mode: Mode of decoding.
    """

    def __init__(self, parts: Parts, tokenizer: Any, mode: Mode = "mix") -> None:
        self.parts, self.tokenizer, self.mode = parts, Endless(tokenizer), mode
        self.bodies = 0.0

    def decode(self, tokens_T: np.ndarray) -> tuple[float, float]:
        """Return seconds per token drawn after a text, by the clock and of the processors."""
        decoder = self._decoder()
        decoder.feed(tokens_T)
        drawn, start, cpu = decoder.draw(N_DRAWN + 1), 0.0, 0.0
        counts = []
        for i, token in enumerate(drawn):
            counts.append(int((token.weight_E > 0).sum()))
            if i == 0:
                start, cpu = time.perf_counter(), time.process_time()
        self.bodies = statistics.mean(counts)
        return (time.perf_counter() - start) / N_DRAWN, (time.process_time() - cpu) / N_DRAWN

    def read(self, tokens_T: np.ndarray) -> tuple[float, float]:
        """Return the seconds that reading a text takes, to the first token, as `decode` does."""
        decoder = self._decoder()

        def run() -> None:
            decoder.feed(tokens_T)
            next(decoder.draw(1))

        return _seconds(run)

    def _decoder(self) -> Decoder:
        return Decoder(self.parts, self.tokenizer, length=LENGTH, mode=self.mode)


def load() -> tuple[Parts, Any, np.ndarray, np.ndarray]:
    """Return the model, its tokenizer, a prompt, and a text of `N_READ` tokens."""
    source = open_source(find_gguf())
    tokenizer = make_tokenizer(source)
    prompt_T = tokenizer.encode(PROMPT)
    text_T = np.resize(prompt_T, N_READ)
    return parts_of(load_checkpoint(Checkpoint(source))), tokenizer, prompt_T, text_T


def child_cases(indices: list[int], rounds: int, reads: int) -> list[dict[str, Any]]:
    """Compare models with experts and the backbone alone, round by round."""
    parts, tokenizer, prompt_T, text_T = load()
    alone, rows = Contender(parts, tokenizer), []
    for index in indices:
        case = CASES[index]
        composed = Contender(add_experts(parts, case, prompt_T), tokenizer, case.mode)
        both = (alone, composed)
        for contender in both:  # compiles
            contender.decode(prompt_T)
        pairs = [[contender.decode(prompt_T) for contender in both] for _ in range(rounds)]
        row = {
            "name": case.name,
            "bodies": round(composed.bodies, 2),
            "speed": _spread([a[0] / c[0] for a, c in pairs]),
            "speed_by_cpu": _spread([a[1] / c[1] for a, c in pairs]),
            "cpu_ms_per_token": [round(1e3 * min(x[i][1] for x in pairs), 1) for i in (0, 1)],
        }
        if reads:
            [contender.read(text_T) for contender in both]
            pairs_read = [[contender.read(text_T) for contender in both] for _ in range(reads)]
            row["read_speed"] = _spread([a[0] / c[0] for a, c in pairs_read])
            row["read_speed_by_cpu"] = _spread([a[1] / c[1] for a, c in pairs_read])
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def quantize(parts: Parts, dtype: str) -> Parts:
    """Return the backbone alone with matrices of "I8" or "BF16"."""
    cfg = dataclasses.replace(parts.backbone.cfg, matrix_dtype=dtype)
    blank = make_blank(cfg, parts.interface.n_classes)
    return parts_of(from_tensors(blank, quantize_tensors(parts.backbone, cfg)))


def child_ours(rounds: int) -> dict[str, Any]:
    """Measure the backbone alone as its matrices are kept, round by round in turns."""
    parts, tokenizer, prompt_T, text_T = load()
    print(describe_products("cpu"), file=sys.stderr)
    kept = {"ours": parts} | {f"ours_{name}": quantize(parts, d) for name, d in QUANTIZED.items()}
    contenders = {name: Contender(parts, tokenizer) for name, parts in kept.items()}
    for contender in contenders.values():  # compiles
        contender.decode(prompt_T), contender.read(text_T)
    times, reads = ({name: [] for name in contenders} for _ in range(2))
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(contender.decode(prompt_T))
    for _ in range(N_READS):
        for name, contender in contenders.items():
            reads[name].append(contender.read(text_T))
    rows = {name: _row(times[name], reads[name]) for name in contenders}
    for name, row in rows.items():
        pairs = zip(times["ours"], times[name], strict=True)
        row["speed"] = _spread([a[0] / b[0] for a, b in pairs])
    return rows


def child_transformers(folder: str, rounds: int) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _, _, prompt_T, text_T = load()

    def read(tokens_T: np.ndarray) -> Any:
        cache = transformers.DynamicCache(config=model.config)
        tokens = torch.from_numpy(tokens_T[None]).long()
        return model(tokens, cache=cache, logits_to_keep=1).logits.argmax(-1), cache

    def decode() -> tuple[float, float]:
        token, cache = read(prompt_T)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(N_DRAWN):
            token = model(token, cache=cache).logits.argmax(-1)
        return (time.perf_counter() - start) / N_DRAWN, (time.process_time() - cpu) / N_DRAWN

    with torch.inference_mode():
        decode()
        return {"transformers": _measure(decode, lambda: _seconds(lambda: read(text_T)), rounds)}


def child_llama_cpp(folder: str, rounds: int) -> dict[str, Any]:
    sys.path.append(folder)
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        str(find_gguf()),
        n_ctx=LENGTH,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=N_READ,
        verbose=False,
    )
    _, _, prompt_T, text_T = load()

    def read(tokens_T: np.ndarray) -> int:
        model.reset()
        model.eval(tokens_T.tolist())
        return model.sample(temp=0.0)

    def decode() -> tuple[float, float]:
        token = read(prompt_T)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(N_DRAWN):
            model.eval([token])
            token = model.sample(temp=0.0)
        return (time.perf_counter() - start) / N_DRAWN, (time.process_time() - cpu) / N_DRAWN

    decode()
    return {"llama_cpp": _measure(decode, lambda: _seconds(lambda: read(text_T)), rounds)}


def child_floor(rounds: int) -> dict[str, Any]:
    """Read as many bytes as the weights have, on as many threads as there are processors."""
    from concurrent.futures import ThreadPoolExecutor

    n_bytes = sum(x.nbytes for x in jax.tree.leaves(load()[0].backbone))
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(n_bytes // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = [
            _seconds(lambda: list(pool.map(lambda x: x.dot(x), parts)))[0]  # releases the GIL
            for _ in range(4 * rounds)
        ]
    row = {
        "megabytes": round(n_bytes / 1e6, 1),
        "gigabytes_per_second": round(n_bytes / min(seconds) / 1e9, 1),
        "tokens_per_second": _rate(seconds),
    }
    return {"floor": row}


def _measure(
    decode: Callable[[], tuple[float, float]],
    read: Callable[[], tuple[float, float]],
    rounds: int,
) -> dict[str, Any]:
    return _row([decode() for _ in range(rounds)], [read() for _ in range(N_READS)])


def _row(times: list[tuple[float, float]], reads: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "tokens_per_second": _rate([wall for wall, _ in times]),
        "cpu_ms_per_token": round(1e3 * min(cpu for _, cpu in times), 1),
        "tokens_per_second_read": round(N_READ / min(wall for wall, _ in reads), 1),
        "cpu_ms_per_token_read": round(1e3 * min(cpu for _, cpu in reads) / N_READ, 2),
    }


def _seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that something takes, by the clock and of the processors."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def _rate(seconds: list[float]) -> dict[str, float]:
    rates = sorted(1 / s for s in seconds)
    return {"best": round(rates[-1], 1), "median": round(statistics.median(rates), 1)}


def _spread(ratios: list[float]) -> dict[str, float]:
    values = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return {name: round(value, 3) for name, value in values.items()}


def run_child(name: str, *arguments: Any) -> Any:
    """Run one of the functions above in a process of its own; None if a package is missing."""
    # Threads that wait do not spin: on a shared machine that would measure the peers.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.decoding", "--child", name]
    command += ["--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "ModuleNotFoundError" in done.stderr:
        print(f"{name}: not installed", flush=True)
        return None
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    print(name, *arguments, json.dumps(result), flush=True)
    return result


def measure(
    cases: list[int], rounds: int, turns: int, reads: int, llama: Path | None
) -> dict[str, Any]:
    """Return all figures: contenders in turns, then each case."""
    contenders: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "smollm2"
        if turns:
            try:
                save_smollm2(find_gguf(), folder)
            except ModuleNotFoundError:
                print("transformers: not installed", flush=True)
        for _ in range(turns):
            for name in ("floor", "ours", "transformers", "llama_cpp"):
                given = {"transformers": (str(folder),), "llama_cpp": (str(llama),)}.get(name, ())
                if given and not Path(given[0]).exists():
                    continue
                for key, row in (run_child(name, *given, rounds) or {}).items():
                    best = contenders.get(key)
                    speed = row["tokens_per_second"]["best"]
                    if best is None or speed > best["tokens_per_second"]["best"]:
                        contenders[key] = row
    return {
        "contenders": contenders,
        "cases": run_child("cases", cases, rounds, reads) if cases else [],
        "machine": {
            "date": datetime.date.today().isoformat(),
            "cpu": f"{os.cpu_count()} cores, {platform.machine()}, virtual machine",
            "python": platform.python_version(),
            "jax": jax.__version__,
            "load": [round(x, 1) for x in os.getloadavg()],
        },
    }


NAMES: Final = {
    "floor": "floor: the weights are read once",
    "ours": "ours, backbone alone, float32",
    "ours_bf16": "ours, matrices of bfloat16",
    "ours_int8": "ours, matrices of int8",
    "transformers": "transformers, float32",
    "llama_cpp": "llama.cpp, the 4-bit file",
}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return Markdown by marker, of what was measured."""
    texts, rows = {}, result["contenders"]
    floor = rows["floor"]["tokens_per_second"]["best"] if rows else 0.0
    alone = "| | tokens/s, best | median | of the floor | of float32 | CPU ms per token | "
    alone += f"{N_READ} tokens read, tokens/s | CPU ms per token read |\n" + "|---" * 8 + "|\n"
    for key, name in NAMES.items():
        if key not in rows:
            continue
        row = rows[key]
        speed = row["tokens_per_second"]
        cells = [name, speed["best"], speed["median"], f"{speed['best'] / floor:.0%}"]
        cells.append(_cell(row["speed"]) if "speed" in row else "–")
        keys = ("cpu_ms_per_token", "tokens_per_second_read", "cpu_ms_per_token_read")
        cells += [row.get(key, "–") for key in keys]
        alone += "| " + " | ".join(map(str, cells)) + " |\n"
    columns = {"speed": "speed, of the backbone alone", "speed_by_cpu": "by CPU time"}
    if any("read_speed" in row for row in result["cases"]):
        columns["read_speed"] = f"{N_READ} tokens read, of the backbone alone"
        columns["read_speed_by_cpu"] = "by CPU time, read"
    heads = ["", "bodies or paths per token", *columns.values()]
    cases = "| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|\n"
    for row in result["cases"]:
        cells = [row["name"], row["bodies"], *(_cell(row[key]) for key in columns)]
        cases += "| " + " | ".join(map(str, cells)) + " |\n"
    if rows:
        texts["alone"] = alone
    if result["cases"]:
        texts["experts"] = cases
    machine = result["machine"]
    line = f"*{machine['cpu']}, Python {machine['python']}, jax {machine['jax']}; "
    line += f"load {machine['load'][0]}; {machine['date']}.*\n"
    return {**texts, "machine": line}


def _cell(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} [{spread['least']:.2f}, {spread['largest']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--docs", type=Path, help="folder whose decoding.md is filled in")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2, help="of the contenders; 0 skips them")
    parser.add_argument("--reads", type=int, default=2, help="rounds of reading; 0 skips it")
    parser.add_argument("--llama", type=Path, help="folder with the package llama-cpp-python")
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run = globals()[f"child_{arguments.child}"]
        print(json.dumps(run(*json.loads(arguments.arguments))))
        return
    result = measure(
        *(arguments.cases, arguments.rounds, arguments.turns, arguments.reads, arguments.llama)
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.docs:
        fill(arguments.docs / "decoding.md", tables(result))
    print("\n".join(tables(result).values()))


if __name__ == "__main__":
    main()
