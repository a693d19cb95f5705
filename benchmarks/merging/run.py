"""The measurements of one seed: one merge of four contributors, and rounds of merging."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.merging.community import PARTS, Setting, cut_parts, heldout, train
from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document
from composable.files.folders import require_empty_folder
from composable.files.records import to_plain
from composable.merging.methods import METHODS, merge_candidates
from composable.merging.updates import Matrices
from composable.model.model import Model, Pluggable
from composable.packaging.manifests.manifest import EXPERT_FILE, STATISTICS_FILE, Manifest
from composable.vetting.evaluation import mix_scorer, score_documents
from composable.vetting.evidence import MAX_BYTES
from composable.workflows.expert_matrices import from_matrices, to_matrices
from composable.workflows.merge import Comparison, compare_methods
from composable.workflows.merge_choice import TextJudge
from composable.workflows.merge_report import GROUP, MergeReport
from composable.workflows.merge_report import PARTS as MERGED_PARTS
from composable.workflows.statistics import read_statistics, write_statistics

Log = Callable[[str], None]


def measure_one_merge(
    loaded: LoadedBackbone, setting: Setting, seed: int, work: Path, log: Log
) -> dict[str, Any]:
    """Return the figures of one merge of four contributors."""
    start = time.perf_counter()
    first, parts = cut_parts(setting, seed)
    tests = {f"part-{i}": part.test for i, part in enumerate(parts)}
    root = train(loaded, setting, work / "base", first.train, seed=seed)
    sides = [
        train(loaded, setting, work / f"part-{i}", part.train, parent=root, seed=seed + i)
        for i, part in enumerate(parts)
    ]
    log("trained base and contributors")
    for side in sides:
        if not (side / STATISTICS_FILE).exists():
            write_statistics(loaded, side, load_expert(loaded, side), heldout(side))
    everything = [document for part in parts for document in part.train]
    every = train(
        loaded,
        setting,
        work / "all-parts",
        everything,
        parent=root,
        steps=PARTS * setting.steps,
        seed=seed,
    )
    log("trained on all parts")
    table = _Table(loaded, tests)
    experts = [load_expert(loaded, side) for side in sides]
    singles = [table.score(loaded.plug([expert])) for expert in experts]
    best = min(range(PARTS), key=lambda i: _mean(singles[i]))
    rows = {
        "base": table.score(loaded.plug([load_expert(loaded, root)])),
        "best contributor": singles[best],
        "every part's own": {f"part-{i}": singles[i][f"part-{i}"] for i in range(PARTS)},
        "all four installed": table.score(loaded.plug(experts)),
        "trained on all parts": table.score(loaded.plug([load_expert(loaded, every)])),
    }
    dev = {f"part-{i}": [*heldout(side), *parts[i].kept] for i, side in enumerate(sides)}
    by_text = compare_methods(loaded, root, sides, texts=dev, methods=METHODS)
    log("compared methods by text")
    by_statistics = compare_methods(loaded, root, sides)
    log("compared methods by statistics")
    rows["merged, chosen by text"] = table.score(loaded.plug([by_text.expert]))
    rows["merged, chosen by statistics"] = table.score(loaded.plug([by_statistics.expert]))
    methods = _best_of_methods(loaded, root, sides, by_text.report)
    rows |= {f"merged, {name}": table.score(loaded.plug([e])) for name, e in methods.items()}
    log("scored methods")
    found = {
        "rows": {name: _round(row) for name, row in rows.items()},
        # The largest loss on a part, of each method with its best settings.
        "methods": {
            part: {
                method: round(next(t.worst for t in tried if t.method == method), 4)
                for method in METHODS
            }
            for part, tried in by_text.report.tried.items()
        },
        "chosen": {"text": by_text.report.chosen, "statistics": by_statistics.report.chosen},
        "refused_by_statistics": not by_statistics.report.is_good,
        "agreement": _agreement(by_text.report, by_statistics.report),
        "bytes": {
            "expert": sum(
                (sides[0] / f).stat().st_size for f in ("body.safetensors", "scout.safetensors")
            ),
            "statistics": (sides[0] / STATISTICS_FILE).stat().st_size,
        },
    }
    return {**found, "seconds": round(time.perf_counter() - start)}


class _Table:
    """Scores models on the test text of every part."""

    def __init__(self, loaded: LoadedBackbone, tests: Mapping[str, Sequence[Document]]) -> None:
        self._tests = {
            name: [document.text.encode() for document in documents]
            for name, documents in tests.items()
        }
        self._context = loaded.backbone.cfg.context

    def score(self, model: Model) -> dict[str, float]:
        """Return bits per byte in mix mode by part."""
        scorer = mix_scorer(model)
        return {
            name: score_documents(
                scorer, documents, context=self._context, max_bytes=MAX_BYTES
            ).bits_per_byte
            for name, documents in self._tests.items()
        }


def _best_of_methods(
    loaded: LoadedBackbone, root: Path, sides: Sequence[Path], report: MergeReport
) -> dict[str, Pluggable]:
    """Return the expert that each method gives with the settings that are best on held-out text."""
    base, *others = (to_matrices(loaded, load_expert(loaded, f)) for f in (root, *sides))
    statistics = [read_statistics(loaded, side) for side in sides]
    described = [found.matrices for found in statistics if found is not None]
    experts = {}
    for method in METHODS:
        matrices: Matrices = {}
        for part in MERGED_PARTS:
            chosen = next(tried for tried in report.tried[part] if tried.method == method)
            ((_, merged),) = merge_candidates(base, others, [chosen.candidate], described)
            matrices |= {name: w for name, w in merged.items() if name.startswith(part)}
        experts[method] = from_matrices(loaded, Manifest.read(root), matrices)
    return experts


def _agreement(by_text: MergeReport, by_statistics: MergeReport) -> dict[str, Any]:
    """Return how alike the two rank candidates, and what the statistics' choice loses on text."""
    found = {}
    for part in MERGED_PARTS:
        measured = {str(tried.candidate): tried.worst for tried in by_text.tried[part]}
        predicted = {str(tried.candidate): tried.worst for tried in by_statistics.tried[part]}
        names = sorted(measured)
        correlation = stats.spearmanr(
            [measured[name] for name in names], [predicted[name] for name in names]
        ).statistic
        chosen = by_statistics.chosen[part]
        found[part] = {
            "rank_correlation": round(float(correlation), 3),
            "best": round(min(measured.values()), 4),
            "of_statistics_choice": round(measured[chosen], 4),
            "predicted": round(predicted[chosen], 4),
            "median": round(float(np.median(list(measured.values()))), 4),
        }
    return found


def measure_decisions(
    loaded: LoadedBackbone, setting: Setting, seed: int, work: Path, log: Log
) -> dict[str, Any]:
    """Return what `composable merge` decides of four contributors and of two, and whether it holds.

    It decides on what each contributor keeps aside; the trainings are those of `measure_one_merge`.
    """
    start = time.perf_counter()
    _, parts = cut_parts(setting, seed)
    dev = [[*heldout(work / f"part-{i}"), *part.kept] for i, part in enumerate(parts)]
    rows = []
    for numbers in (range(PARTS), *list(combinations(range(PARTS), 2))[:: PARTS + 1]):
        sides = [work / f"part-{i}" for i in numbers]
        texts = {f"part-{i}": dev[i] for i in numbers}
        decided = compare_methods(loaded, work / "base", sides, texts=texts)
        is_group = GROUP in decided.report.chosen.values()
        outcome = "grouped" if is_group else "merged"
        tests = {side.name: parts[i].unseen for side, i in zip(sides, numbers, strict=True)}
        experts = [load_expert(loaded, side) for side in sides]
        unseen = TextJudge(
            {side.name: loaded.plug([e]) for side, e in zip(sides, experts, strict=True)},
            {name: [d.text.encode() for d in documents] for name, documents in tests.items()},
        )
        kept = [decided.expert, *(experts if is_group else [])]
        rows.append(
            {
                "sides": [side.name for side in sides],
                "outcome": outcome if decided.report.is_good else "refused",
                "chosen": decided.report.chosen,
                # Of the best merged expert, whether it was written or not.
                "merged": to_plain(decided.report.declined or decided.report.judgements),
                "unseen": to_plain(list(unseen.judge(loaded.plug(kept)))),
            }
        )
        log(f"decided on {', '.join(rows[-1]['sides'])}: {rows[-1]['outcome']}")
    return {"decisions": rows, "decisions_seconds": round(time.perf_counter() - start)}


def measure_rounds(
    loaded: LoadedBackbone, setting: Setting, seed: int, work: Path, log: Log
) -> dict[str, Any]:
    """Return figures of rounds: all contributors train from one base, and are merged into the next.

    Beside it one contributor that trains alone for as many rounds. A merge that would be refused is
    counted, and is the next base all the same.
    """
    start = time.perf_counter()
    _, parts = cut_parts(setting, seed)
    table = _Table(loaded, {f"part-{i}": part.test for i, part in enumerate(parts)})
    base = work / "base"
    first = table.score(loaded.plug([load_expert(loaded, base)]))
    rows: list[dict[str, Any]] = [{"bits": _round(first), "refused": False}]
    for number in range(1, setting.rounds + 1):
        place = work if number == 1 else work / f"round-{number}"
        sides = [
            train(
                loaded,
                setting,
                place / f"part-{i}",
                part.train,
                parent=base,
                seed=seed + i + PARTS * (number - 1),
            )
            for i, part in enumerate(parts)
        ]
        dev = {side.name: [*heldout(side), *parts[i].kept] for i, side in enumerate(sides)}
        merged = compare_methods(loaded, base, sides, texts=dev, methods=("linear", "low-rank"))
        base = _write_once(merged, work / "merged" / str(number))
        rows.append(
            {
                "bits": _round(table.score(loaded.plug([load_expert(loaded, base)]))),
                "refused": not merged.report.is_good,
                "chosen": merged.report.chosen,
            }
        )
        log(f"round {number}: {_mean(rows[-1]['bits']):.4f} bits per byte")
    alone = train(
        loaded,
        setting,
        work / "alone",
        parts[0].train,
        parent=work / "base",
        steps=setting.rounds * setting.steps,
        seed=seed,
    )
    log("trained one alone")
    return {
        "rounds": rows,
        "rounds_seconds": round(time.perf_counter() - start),
        "alone": _round(table.score(loaded.plug([load_expert(loaded, alone)]))),
    }


def _write_once(merged: Comparison, folder: Path) -> Path:
    if not (folder / EXPERT_FILE).exists():
        require_empty_folder(folder)
        folder.parent.mkdir(exist_ok=True)
        dataclasses.replace(merged, texts={}).write(folder)
    return folder


def _mean(row: Mapping[str, float]) -> float:
    return float(np.mean(list(row.values())))


def _round(row: Mapping[str, float]) -> dict[str, float]:
    return {name: round(bits, 4) for name, bits in row.items()}
