"""What do two experts that were trained alone add to a real pretrained backbone, and to each other?

    make smollm2-experts
    python -m benchmarks.real_backbone --json FILE --figure FILE --docs docs/results

Resolves, locks, installs and composes both experts from the folder registry that the first command
fills, and measures bits per byte on text that neither training nor the choice of a setting saw.
Every interval is a bootstrap over documents, 95 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from benchmarks.demo_seeds import fill
from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, Spliced, read_documents, splice_documents
from composable.files import atomic
from composable.model.model import BACKBONE, Model, generate
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sync import sync_project
from composable.packaging.versions.constraint import Requirement
from composable.vetting.checks import recovery
from composable.vetting.evaluation import (
    Score,
    Scorer,
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
    trace_routing,
)

# Domain -> the expert of it.
EXPERTS: Final = {"german": "smollm2-german", "set-mm": "smollm2-set-mm"}
PUBLIC: Final = "public"
# Documents per domain, how much of each is scored, and in windows of how many tokens.
DOCUMENTS: Final = 8
BYTES: Final = 512
WINDOW: Final = 256
# Spliced texts: pieces of so many bytes, so many pieces each.
SEGMENT_BYTES: Final = (128, 256)
SEGMENTS: Final = 4
# Router weights are traced further than text is scored, since it costs only the trunk.
TRACED_BYTES: Final = 1024
BUCKETS: Final = (0, 4, 16, 64, 256, 1024)
PROMPTS: Final = (
    "BEZEICHNUNG\nsortiere - gibt die Zeilen einer Datei",
    "The sum of two even numbers is even.  (Contributed by NM, ",
    "My fellow citizens, the state of our",
)
GENERATED: Final = 40
_DRAWS: Final = 2000


def install(
    loaded: LoadedBackbone, registry: Path, seconds: dict[str, float]
) -> tuple[Model, dict[str, Any]]:
    """Resolve, lock, install and compose, as a user in a new project."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        root.mkdir()
        project = Project.create(root, str(loaded.folder), {"local": str(registry.resolve())})
        for name in EXPERTS.values():
            project = project.add(Requirement.parse(f"{name}>=1.0,<2"))
        start = time.perf_counter()
        lock = lock_project(project, loaded.interface)
        seconds["resolve and lock"] = time.perf_counter() - start
        start = time.perf_counter()
        environment = sync_project(project, lock, interface=loaded.interface)
        seconds["install"] = time.perf_counter() - start
        start = time.perf_counter()
        folders = {expert.name: environment.expert_path(expert.name) for expert in lock.experts}
        plugged = [load_expert(loaded, path) for path in folders.values()]
        model = loaded.plug(plugged, capacity=4)
        seconds["compose"] = time.perf_counter() - start
        packages = {
            name: {
                "bytes": sum(file.stat().st_size for file in path.iterdir()),
                "card": json.loads((path / "card.json").read_text()),
            }
            for name, path in folders.items()
        }
    return model, packages


def score(
    model: Model,
    texts: Mapping[str, Sequence[bytes]],
    progress: Callable[[str], None],
) -> dict[str, dict[str, Score]]:
    """Return the score of every text under every method that is for it."""
    methods: dict[str, Scorer] = {
        "backbone": path_scorer(model),
        "mix": mix_scorer(model),
        "safe": safe_scorer(model),
    }
    scores: dict[str, dict[str, Score]] = {}
    for group, documents in texts.items():
        scorers = dict(methods)
        if group in EXPERTS:
            scorers["own_expert"] = path_scorer(model, EXPERTS[group])
        for method, scorer in scorers.items():
            start = time.perf_counter()
            found = score_documents(scorer, documents, context=WINDOW)
            scores.setdefault(group, {})[method] = found
            seconds = time.perf_counter() - start
            progress(f"{group}, {method}: {found.bits_per_byte:.4f} ({seconds:.0f} s)")
    return scores


def summarise(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    """Return bits per byte with intervals, change against the backbone, and recovery."""
    table: dict[str, Any] = {}
    for group, row in scores.items():
        base = row["backbone"]
        table[group] = {
            method: {
                "bits_per_byte": round(found.bits_per_byte, 4),
                "interval": bootstrap(lambda i, f=found: _bits(f, i), len(found.nats_B)),
                "change": round(found.bits_per_byte / base.bits_per_byte - 1, 4),
                "change_interval": bootstrap(
                    lambda i, f=found, b=base: _bits(f, i) / _bits(b, i) - 1, len(found.nats_B)
                ),
            }
            for method, found in row.items()
        }
        if "own_expert" in row:
            own = row["own_expert"]
            for mode in ("mix", "safe"):
                bits = [row[name].bits_per_byte for name in ("backbone", "own_expert", mode)]
                table[group][mode]["recovery"] = round(recovery(*bits), 4)
                table[group][mode]["recovery_interval"] = bootstrap(
                    lambda i, m=row[mode], b=base, o=own: recovery(
                        _bits(b, i), _bits(o, i), _bits(m, i)
                    ),
                    len(own.nats_B),
                )
    return table


def bootstrap(statistic: Callable[[np.ndarray], float], n: int) -> list[float]:
    """Return the 95 % interval of a statistic of documents, given as their indices."""
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(n, size=n)) for _ in range(_DRAWS)]
    return [round(float(x), 4) for x in np.quantile(draws, (0.025, 0.975))]


def _bits(found: Score, rows: np.ndarray) -> float:
    return float(found.nats_B[rows].sum() / found.n_bytes_B[rows].sum() / np.log(2))


def trust(model: Model, texts: Mapping[str, Sequence[bytes]]) -> dict[str, Any]:
    """Return the mean weight of everybody, by domain and by position in tokens."""
    table: dict[str, Any] = {}
    for group, documents in texts.items():
        traces = trace_routing(model, documents, max_bytes=TRACED_BYTES)
        rows = {}
        for low, high in pairwise(BUCKETS):
            weight_TE = np.concatenate([trace_TE[low:high] for trace_TE in traces])
            if len(weight_TE):
                mean_E = weight_TE.mean(axis=0)
                rows[f"{low}-{high}"] = {
                    "tokens": len(weight_TE),
                    **{n: round(float(mean_E[e]), 4) for e, n in enumerate(model.names) if n},
                }
        table[group] = rows
    return table


def spliced_trust(model: Model, spliced: Sequence[Spliced]) -> tuple[float, list[dict[str, Any]]]:
    """Return the share of router weight on the expert of the true domain, and traces by byte."""
    traces, right, total = [], 0.0, 0
    texts = [document.text for document in spliced]
    for document, weight_TE in zip(spliced, trace_routing(model, texts), strict=True):
        token_of = _token_of_bytes(model, document.text)
        weight_NE = weight_TE[np.minimum(token_of, len(weight_TE) - 1)]
        for segment in document.segments:
            e = model.names.index(EXPERTS.get(segment.name, BACKBONE))
            right += float(weight_NE[segment.start : segment.end, e].sum())
            total += segment.end - segment.start
        traces.append({"segments": document.segments, "weight_NE": weight_NE})
    return right / total, traces


def _token_of_bytes(model: Model, text: bytes) -> np.ndarray:
    """Return which token each byte of a text lies in, as near as decoding of prefixes can tell."""
    tokens_T = model.encode(text)[1:]
    ends = [len(model.tokenizer.decode(tokens_T[: i + 1]).encode()) for i in range(len(tokens_T))]
    return np.searchsorted(ends, np.arange(len(text)), side="right")


def continuations(loaded: LoadedBackbone, model: Model) -> list[dict[str, str]]:
    """Return what backbone and composed model make of the same prompts, most likely token first."""
    alone = loaded.plug(capacity=model.parts.bank.capacity)
    return [
        {
            "prompt": prompt,
            "backbone": generate(alone, prompt, GENERATED),
            "composed": generate(model, prompt, GENERATED),
        }
        for prompt in PROMPTS
    ]


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return Markdown by marker: bits, trust, training, continuations."""
    methods = ("backbone", "own_expert", "mix", "safe")

    def cell(row: Mapping[str, Any], method: str) -> str:
        if method not in row:
            return "–"
        found = row[method]
        low, high = found["interval"]
        text = f"{found['bits_per_byte']:.3f} [{low:.3f}, {high:.3f}]"
        return text if method == "backbone" else f"{text} {found['change']:+.1%}"

    bits = "| bits per byte | backbone | own expert | mix | safe |\n|---|---|---|---|---|\n"
    bits += "".join(
        f"| {group} | " + " | ".join(cell(row, method) for method in methods) + " |\n"
        for group, row in result["bits_per_byte"].items()
    )
    for mode in ("mix", "safe"):
        recovered = [
            f"{group} {row[mode]['recovery']:.1%} "
            f"[{row[mode]['recovery_interval'][0]:.1%}, {row[mode]['recovery_interval'][1]:.1%}]"
            for group, row in result["bits_per_byte"].items()
            if "recovery" in row[mode]
        ]
        bits += f"\nRecovery in {mode} mode: {', '.join(recovered)}.\n"

    buckets = [f"{low}-{high}" for low, high in pairwise(BUCKETS)]
    trusted = {**EXPERTS, PUBLIC: BACKBONE}
    head = "| share of weight on the right entry, by position in tokens | "
    trust_table = head + " | ".join(buckets) + " |\n|---" + "|---" * len(buckets) + "|\n"
    for group, rows in result["trust"].items():
        cells = [f"{rows[b][trusted[group]]:.1%}" if b in rows else "–" for b in buckets]
        trust_table += f"| {group}: {trusted[group]} | " + " | ".join(cells) + " |\n"
    share = result["spliced_trust_in_the_true_domain"]
    trust_table += (
        f"\nOn spliced documents {share:.1%} of the router weight is on the true domain.\n"
    )

    lines = [
        "| expert | package | text | tokens trained | trunk, body, scout: seconds "
        "| gain of the card | anchor |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, package in result["packages"].items():
        card = package["card"]
        record, measured = card["training"], card["measured"]
        seconds = ", ".join(f"{value:.0f}" for value in record["step_seconds"].values())
        lines.append(
            f"| [{name}](cards/{name}.json) | {package['bytes'] / 1e6:.1f} MB "
            f"| {record['documents']} documents, {record['text_bytes'] / 1e3:.0f} kB "
            f"| {record['tokens']:,} | {seconds} | {measured['gain']:.1%} "
            f"| {measured['anchor_loss']:+.2%} |"
        )
    training = "\n".join(lines) + "\n"

    texts = ""
    for item in result["continuations"]:
        texts += "```text\n"
        for name in ("prompt", "backbone", "composed"):
            texts += f"[{name}]\n{item[name]}\n"
        texts += "```\n\n"
    return {"bits": bits, "trust": trust_table, "training": training, "texts": texts}


def draw(
    path: Path,
    table: Mapping[str, Any],
    traces: Sequence[Mapping[str, Any]],
    names: Sequence[str | None],
) -> None:
    """Draw bits per byte by method, and router weights along two spliced documents."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = {"backbone": "#8a8f98", "own_expert": "#c9a227", "mix": "#2a6f97", "safe": "#468c5b"}
    trusted = {BACKBONE: "#8a8f98", "smollm2-german": "#b5523b", "smollm2-set-mm": "#5a5fa8"}
    shown = traces[:2]
    figure = Figure(figsize=(8, 3.2 + 1.5 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(shown), 1, height_ratios=[2.4] + [1.0] * len(shown))
    bars = axes[0]
    for g, row in enumerate(table.values()):
        methods = [method for method in colours if method in row]
        for m, method in enumerate(methods):
            cell = row[method]
            x = g + (m - (len(methods) - 1) / 2) * 0.2
            low, high = cell["interval"]
            value = cell["bits_per_byte"]
            bars.bar(x, value, 0.18, color=colours[method])
            bars.errorbar(
                x, value, [[max(0, value - low)], [max(0, high - value)]], color="#333", lw=1
            )
            bars.text(x, 0.03, f"{value:.2f}", ha="center", va="bottom", fontsize=7, color="white")
    bars.set_xticks(range(len(table)), list(table))
    bars.set_ylabel("bits per byte")
    bars.set_title("SmolLM2-135M: lower is better; lines are 95 % over documents", fontsize=10)
    known = [name for name in colours if any(name in row for row in table.values())]
    bars.legend(
        [Patch(color=colours[name]) for name in known],
        [name.replace("_", " ") for name in known],
        fontsize=8,
        frameon=False,
        ncols=len(known),
        loc="upper left",
    )
    bars.set_ylim(top=1.15 * bars.get_ylim()[1])
    for axis, trace in zip(axes[1:], shown, strict=True):
        weight_NE = trace["weight_NE"]
        shares = [(e, name) for e, name in enumerate(names) if name]
        axis.stackplot(
            np.arange(len(weight_NE)),
            [weight_NE[:, e] for e, _ in shares],
            colors=[trusted[name] for _, name in shares],
            labels=[name for _, name in shares],
        )
        for segment in trace["segments"]:
            axis.axvline(segment.start, color="black", lw=0.8)
            axis.text(segment.start + 4, 1.03, segment.name, fontsize=8)
        axis.set(xlim=(0, len(weight_NE) - 1), ylim=(0, 1), ylabel="router weight")
    axes[-1].set_xlabel("byte of a spliced document")
    axes[-1].legend(
        fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=3, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def begins(documents: Sequence[Document], most: int) -> list[bytes]:
    """Return the begins of the first documents, cut so that no character is split."""
    cut = [document.text.encode()[:most] for document in documents[:DOCUMENTS]]
    return [text.decode(errors="ignore").encode() for text in cut]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2-experts"))
    parser.add_argument("--backbone", default="runs/smollm2-135m")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--docs", type=Path, help="folder whose real-backbone.md is filled in")
    arguments = parser.parse_args()
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    loaded = load_backbone(arguments.backbone)
    model, packages = install(loaded, arguments.work / "registry", seconds)
    groups = {
        name: read_documents([arguments.work / "text" / name / "heldout.jsonl"]) for name in EXPERTS
    }
    groups[PUBLIC] = loaded.anchor
    pieces = {name: documents[:DOCUMENTS] for name, documents in groups.items()}
    spliced = splice_documents(pieces, DOCUMENTS, 0, *SEGMENT_BYTES, SEGMENTS)
    texts = {name: begins(documents, BYTES) for name, documents in groups.items()}
    texts["spliced"] = [document.text for document in spliced]

    traced = {name: begins(documents, TRACED_BYTES) for name, documents in groups.items()}
    share, traces = spliced_trust(model, spliced)
    result: dict[str, Any] = {
        "trust": trust(model, traced),
        "spliced_trust_in_the_true_domain": round(share, 4),
    }
    print(json.dumps(result, indent=1), flush=True)
    scores = score(model, texts, lambda line: print(line, flush=True))
    result["bits_per_byte"] = summarise(scores)
    result["continuations"] = continuations(loaded, model)
    result |= {
        "backbone": f"{loaded.interface.name} {loaded.interface.version}",
        "packages": packages,
        "documents": {
            name: {"documents": len(group), "bytes": sum(map(len, group))}
            for name, group in texts.items()
        },
        "window": WINDOW,
        "seconds": {name: round(value, 2) for name, value in seconds.items()}
        | {"all": round(time.perf_counter() - start, 1)},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, shared; "
        f"{jax.devices()[0].platform}, jax {jax.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    if arguments.figure:
        draw(arguments.figure, result["bits_per_byte"], traces, model.names)
    if arguments.docs:
        fill(arguments.docs / "real-backbone.md", tables(result))
        for name, package in packages.items():
            card = json.dumps(package["card"], indent=2, ensure_ascii=False) + "\n"
            atomic.write_text(arguments.docs / "cards" / f"{name}.json", card)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if arguments.json:
        atomic.write_text(arguments.json, text)
    print(text)


if __name__ == "__main__":
    main()
