"""Does an imported backbone compute what transformers computes, and at what cost?

python -m benchmarks.parity --json FILE --docs docs/results         # all three parts
python -m benchmarks.parity --json FILE --parts families    # of random weights; smollm2; costs

Of every family a small random model is made by transformers, saved and imported; SmolLM2-135M is
measured where `make smollm2` left its GGUF file, or in the folder that SMOLLM2 names.
`max_abs_logit_diff` and `kl` (nats per token, from theirs to ours) compare whole passes,
`cached_decode_max_diff` compares decoding token by token, each with its own cache. Both round at
every step: `their_rounding` and `our_rounding` are how far either is from transformers in float64,
the yardstick for the difference between the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demo_seeds import fill
from composable.corpora.documents import read_documents
from composable.corpora.recipe import load_recipe, make_texts, shipped_folder
from composable.interop.checkpoint import Checkpoint, open_source
from composable.interop.tokenizer import check_round_trips, make_tokenizer
from composable.model.bank import BankEntry, empty_bank, install
from composable.model.body import backbone_slot
from composable.model.composed import Parts
from composable.model.decoding import continue_tokens
from composable.model.sampling import Sampling
from composable.workflows.import_backbone import (
    load_checkpoint,
    read_public_text,
    write_weights,
)
from tests.support.parity import (
    DTYPES,
    FAMILIES,
    N_TOKENS,
    compare,
    compare_family,
    parts_of,
)

SMOLLM2 = Path("runs")
# Texts of recipes; those that are not shipped are made here.
TEXTS = Path("runs/text")
DOMAINS = (
    *("python-code", "set-mm", "legal", "german", "french", "spanish", "polish"),
    *("rust-code", "proofs", "kernel-docs", "sql-docs"),
)
PROMPT = "The president of the United States said to the Congress that"


def save_smollm2(gguf: Path, folder: Path) -> None:
    """Let transformers itself read the GGUF file: what is compared is its reading.

    It refuses to save what came from GGUF, so its tensors are written here.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = model.config.to_diff_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        config.pop(name, None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors.pop("lm_head.weight")  # tied
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def measure_round_trips(source: Any) -> dict[str, dict[str, int]]:
    """Return how many texts of every domain come back exactly from their tokens."""
    tokenizer = make_tokenizer(source)
    _, heldout = read_public_text()
    texts = {"public": [doc.text for doc in heldout]}
    for name in DOMAINS:
        shipped, made = shipped_folder(name) / "text", TEXTS / name
        if not shipped.exists() and not made.exists():
            make_texts(load_recipe(shipped_folder(name)), made)
        folder = shipped if shipped.exists() else made
        texts[name] = [doc.text for doc in read_documents([folder / "heldout.jsonl"])]
    return {name: check_round_trips(tokenizer, domain) for name, domain in texts.items()}


# Each of these runs in a process of its own, so that its peak memory is its own.


def child_load_theirs(folder: Path) -> dict[str, Any]:
    import torch
    import transformers

    before, start = _peak_bytes(), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    float(sum(p.sum() for p in model.parameters()))  # what is mapped is not loaded until it is read
    return _cost(before, start)


def child_load_ours(folder: Path) -> dict[str, Any]:
    before, start = _peak_bytes(), time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(load_checkpoint(Checkpoint(open_source(folder)))))
    return _cost(before, start)


def child_convert_ours(folder: Path) -> dict[str, Any]:
    before, start = _peak_bytes(), time.perf_counter()
    checkpoint = Checkpoint(open_source(folder))
    with tempfile.TemporaryDirectory() as out:
        write_weights(Path(out), checkpoint, {})
        cost = _cost(before, start)
    largest = max(int(np.prod(spec.shape)) for spec in checkpoint.specs.values()) * 4
    return {**cost, "largest_tensor_mb": round(largest / 1e6, 1)}


def child_decode_theirs(folder: Path, n_tokens: int = 64) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = make_tokenizer(open_source(find_gguf()))
    tokens = torch.from_numpy(tokenizer.encode(PROMPT)[None]).long()
    rates, cpu, made = [], [], []
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):
            cache = transformers.DynamicCache(config=model.config)
            token = model(tokens, cache=cache, logits_to_keep=1).logits.argmax(-1)
            made, times, start = [], [], time.process_time()
            for _ in range(n_tokens + 1):
                made.append(int(token))
                times.append(time.perf_counter())
                token = model(token, cache=cache).logits.argmax(-1)
            rates.append(n_tokens / (times[-1] - times[0]))
            cpu.append((time.process_time() - start) / (n_tokens + 1))
    return _rates(rates, cpu, made)


def child_decode_ours(folder: Path) -> dict[str, Any]:
    return _decode_ours(parts_of(load_checkpoint(Checkpoint(open_source(folder)))))


def child_decode_composed(folder: Path) -> dict[str, Any]:
    """Decode with two experts installed, of full bodies: copies of the backbone's, so one text."""
    parts = parts_of(load_checkpoint(Checkpoint(open_source(folder))))
    backbone, bank = parts.backbone, empty_bank(parts.backbone, parts.interface, 4)
    slots = tuple(backbone_slot(backbone, layer) for layer in parts.interface.slots)
    for index in (1, 2):
        scout = jax.tree.map(lambda x: x[0], bank.scouts)
        width = bank.width_E[0]
        entry = BankEntry(slots=slots, scout=scout, width=width, key=jnp.uint32(index))
        bank = install(bank, index, entry)
    return _decode_ours(dataclasses.replace(parts, bank=bank))


def child_read_memory(folder: Path) -> dict[str, Any]:
    """Read as many bytes as the weights have, and nothing else: the least that a token can take."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    n_bytes = (folder / "model.safetensors").stat().st_size
    numbers = torch.ones(n_bytes // 4)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return {
        "weights_mb": round(n_bytes / 1e6, 1),
        "gb_per_second_best": round(n_bytes / min(seconds) / 1e9, 2),
        "tokens_per_second_best": round(1 / min(seconds), 1),
    }


def _decode_ours(parts: Parts, n_tokens: int = 64) -> dict[str, Any]:
    tokenizer = make_tokenizer(open_source(find_gguf()))
    tokens_T = tokenizer.encode(PROMPT)
    endless = Endless(tokenizer)
    rates, cpu, made = [], [], []
    for _ in range(_ROUNDS + 1):
        times, made = [], []
        for token, _ in continue_tokens(
            parts, endless, tokens_T, n_tokens + 1, sampling=Sampling()
        ):
            times.append(time.perf_counter())
            made.append(token)
            if len(times) == 1:
                start = time.process_time()
        rates.append(n_tokens / (times[-1] - times[0]))
        cpu.append((time.process_time() - start) / n_tokens)
    return _rates(rates, cpu, made)


class Endless:
    """A tokenizer whose texts have no end, so that every round makes as many tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ends = (tokenizer.begin,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


_ROUNDS, _TURNS = 6, 2


def _rates(rates: list[float], cpu: list[float], made: list[int]) -> dict[str, Any]:
    """Return speeds by the clock, and the processor time that a token took on all threads."""
    rates = sorted(rates[1:])  # the first compiles, or warms caches
    return {
        "tokens_per_second_best": round(rates[-1], 1),
        "tokens_per_second_median": round(rates[len(rates) // 2], 1),
        "cpu_ms_per_token_best": round(1e3 * min(cpu[1:]), 1),
        "threads": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "first_tokens": made[:16],
    }


def _peak_bytes() -> int:
    """Return the most memory that this program has held; what its parent held is not counted."""
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def _cost(before: int, start: float) -> dict[str, Any]:
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_mb": round(_peak_bytes() / 1e6),
        "peak_mb_before": round(before / 1e6),
    }


def run_child(name: str, folder: Path) -> dict[str, Any]:
    """Run one of the functions above in a process of its own."""
    # Threads that wait do not spin: on a shared machine that would measure the peers.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "benchmarks.parity", "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def find_gguf() -> Path:
    found = sorted(Path(os.environ.get("SMOLLM2", SMOLLM2)).glob("*.gguf"))
    if not found:
        sys.exit(f"no GGUF file in {SMOLLM2}; run `make smollm2`, or give its folder in SMOLLM2")
    return found[0]


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    packages = ("jax", "flax", "torch", "transformers", "tokenizers", "gguf")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def measure_families(scratch: Path) -> dict[str, Any]:
    """Return how far ours is from theirs for every family and dtype, random weights."""
    families = {}
    for name in FAMILIES:
        for dtype in DTYPES:
            key = _key(name, dtype)
            families[key] = compare_family(name, dtype, scratch / key)
            print(key, json.dumps(families[key]), flush=True)
    return {"families": families}


def measure_smollm2(scratch: Path) -> dict[str, Any]:
    """Return the same for the real model, and whether file and text come over exactly."""
    folder, source, families = scratch / "smollm2", open_source(find_gguf()), {}
    save_smollm2(find_gguf(), folder)
    text = read_public_text()[1][0].text
    tokens_BT = make_tokenizer(source).encode(text)[None, :N_TOKENS]
    for dtype in DTYPES:
        key = _key("smollm2-135m", dtype)
        families[key] = compare(folder, dtype, tokens_BT)
        print(key, json.dumps(families[key]), flush=True)
    return {
        "families": families,
        "gguf_is_read_alike": same_tensors(Checkpoint(source), folder),
        "round_trips": measure_round_trips(source),
    }


def measure_costs(scratch: Path) -> dict[str, Any]:
    """Return time and memory of loading, and speed of decoding, ours beside theirs, in turns."""
    folder = scratch / "smollm2"
    if not folder.exists():
        save_smollm2(find_gguf(), folder)
    load = {name: run_child(f"load_{name}", folder) for name in ("theirs", "ours")}
    convert = run_child("convert_ours", folder)
    decode: dict[str, Any] = {}
    for name in ("floor", "theirs", "ours", "composed") * _TURNS:
        row = run_child("read_memory" if name == "floor" else f"decode_{name}", folder)
        print(name, json.dumps(row), flush=True)
        kept = decode.get(name)
        if kept is None or row["tokens_per_second_best"] > kept["tokens_per_second_best"]:
            decode[name] = row
    return {"load": load, "convert": convert, "decode": decode}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return Markdown by marker, of the parts that were measured."""
    texts = {}
    heads = ("largest difference", "cached", "KL, nats", "same likeliest", "theirs", "ours")
    table = _row("model", "dtype", *heads) + _row(*["---"] * 8)
    for key, row in result["families"].items():
        fields = ("max_abs_logit_diff", "cached_decode_max_diff", "kl")
        cells = [f"{row[field]:.2g}" for field in fields]
        cells += [f"{row['same_likeliest']:.1%}"]
        cells += [f"{row[f'{who}_rounding']:.2g}" for who in ("their", "our")]
        table += _row(key.removesuffix("-bfloat16"), row["dtype"], *cells)
    texts["logits"] = table
    if "round_trips" in result:
        table = _row("text", "documents", "exactly back from their tokens") + _row(*["---"] * 3)
        for name, row in result["round_trips"].items():
            table += _row(name, row["texts"], row["exact"])
        texts["round-trips"] = table
    if "load" in result:
        table = _row("", "seconds", "peak memory, MB", "of it before loading")
        table += _row(*["---"] * 4)
        rows = {
            "transformers, `from_pretrained`": result["load"]["theirs"],
            "ours, `load_checkpoint`": result["load"]["ours"],
            "ours, written out as a package": result["convert"],
        }
        for name, row in rows.items():
            table += _row(name, row["seconds"], row["peak_mb"], row["peak_mb_before"])
        texts["load"] = table
        decode = result["decode"]
        floor = decode["floor"]["tokens_per_second_best"]
        table = _row("", "tokens/s, best", "median", "CPU ms per token", "of the floor")
        table += _row(*["---"] * 5)
        table += _row("floor: the weights are read once", floor, "", "", "")
        names = {
            "theirs": "transformers",
            "ours": "ours, backbone alone",
            "composed": "ours, two experts installed",
        }
        for key, name in ((k, n) for k, n in names.items() if k in decode):
            row = decode[key]
            best = row["tokens_per_second_best"]
            median, cpu = row["tokens_per_second_median"], row["cpu_ms_per_token_best"]
            table += _row(name, best, median, cpu, f"{best / floor:.0%}")
        texts["decode"] = table
    for part, found in result["machines"].items():
        versions = ", ".join(f"{n} {found[n]}" for n in ("jax", "torch", "transformers"))
        texts[f"{part}-machine"] = (
            f"*{found['cpu']}, Python {found['python']}, {versions}; load {found['load'][0]}; "
            f"{found['date']}.*\n"
        )
    return texts


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _key(name: str, dtype: str) -> str:
    return name if dtype == "float32" else f"{name}-{dtype}"


PARTS = {"families": measure_families, "smollm2": measure_smollm2, "costs": measure_costs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write figures there; parts not run are kept")
    parser.add_argument("--docs", type=Path, help="folder whose parity.md is filled in")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(globals()[f"child_{arguments.child}"](arguments.folder)))
        return
    result: dict[str, Any] = {"families": {}}
    if arguments.json and arguments.json.exists():
        result = json.loads(arguments.json.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for part in arguments.parts:
            measured = PARTS[part](Path(scratch))
            families = {**result["families"], **measured.pop("families", {})}
            machines = {**result.get("machines", {}), part: machine()}
            result = {**result, **measured, "families": families, "machines": machines}
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.docs:
        fill(arguments.docs / "parity.md", tables(result))
    print(json.dumps({k: v for k, v in result.items() if k != "families"}, indent=2))


def same_tensors(gguf: Checkpoint, folder: Path) -> bool:
    """Say whether our reading of the GGUF file and transformers' are the same, to the bit."""
    theirs = Checkpoint(open_source(folder))
    return all(np.array_equal(gguf[name], theirs[name]) for name in gguf)


if __name__ == "__main__":
    main()
