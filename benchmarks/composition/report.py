"""Figures of the composition benchmark, from the cells of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import jax
import numpy as np

from benchmarks.composition import ensembles
from benchmarks.composition.methods import Rows

if TYPE_CHECKING:
    from benchmarks.composition.run import Run

# Cells that are no methods of their own: parts of some, and answers to questions.
_PARTS: Final = (
    *("paths", "btm-scouts costs", "mix weights", "safe weights", "c-btm weights", "alone, "),
)
_ANSWERS: Final = (
    "router, ",
    "without ",
    "hostile, ",
    "unequal, ",
    "growth ",
    "second, ",
    "copies, ",
)
# From here on an expert is trusted.
TRUSTED: Final = 0.5

# Methods of which a setting must be chosen get the one that is best on what is reported: better
# than anybody could have chosen it. Prefix of the cells' names.
TUNED: Final = (
    "task_arithmetic",
    "ties",
    "flexolmo",
    "flexolmo-tuned",
    "lda",
    "qda",
    "dume",
    "c-btm",
    "btm",
    "btm-prior",
    "btm-scouts",
    "btm-scouts-prior",
    "dense",
)
# References that see everybody's text.
JOINT: Final = ("btx", "dense")
_DRAWS: Final = 2000

Nats = Mapping[str, np.ndarray]


def derived(run: Run, load: Callable[[str], Nats]) -> dict[str, Nats]:
    """Return the methods that are arithmetic on every path's costs."""
    paths = load("paths")
    n = next(iter(paths.values())).shape[-1]
    even_E = np.full(n, 1 / n)

    def total(cost: Callable[[str, np.ndarray], np.ndarray]) -> Nats:
        return {g: run.rows[g].total(cost(g, c)) for g, c in paths.items()}

    found, with_scouts = {}, load("btm-scouts costs")
    rules = ensembles.ensemble_rules(run.release.interface.backbone_prior)
    for index, (name, rule) in enumerate(rules.items()):
        prior_E = ensembles.ensemble_prior(n, rule)
        found[f"btm{name}"] = total(
            lambda _, c, d=rule.discount, p=prior_E: ensembles.ensemble(
                c, ensembles.posterior(c, d, p)
            )
        )
        found[f"btm-scouts{name}"] = {
            g: run.rows[g].total(cost[..., index]) for g, cost in with_scouts.items()
        }
    found["demix updating prior"] = total(
        lambda _, c: ensembles.ensemble(c, ensembles.demix_updating(c))
    )
    found["btm uniform"] = total(
        lambda _, c: ensembles.ensemble(c, np.log(np.broadcast_to(even_E, c.shape)))
    )
    for name in () if run.preset.is_short else ("0.01", "0.1"):
        weight = load(f"c-btm weights {name}")
        found[f"c-btm temperature {name}"] = total(
            lambda g, c, w=weight: ensembles.ensemble(c, np.log(np.maximum(w[g], 1e-30)))
        )
    found["best path per token (not causal)"] = total(lambda _, c: c.min(-1))
    return found


def oracle(run: Run, names: Sequence[str], paths: Nats) -> Nats:
    """Return each domain's own expert; on spliced texts that of every stretch; else nothing."""
    found = {name: paths[name][..., index] for index, name in enumerate(names, 1)}
    found["public"] = paths["public"][..., 0]
    spliced = np.array(paths["spliced"][..., 0])
    for i, document in enumerate(run.spliced):
        for segment in document.segments:
            index = 0 if segment.name == "public" else names.index(segment.name) + 1
            # Target t is byte t of the text: the begin token comes before the first.
            here = slice(segment.start, min(segment.end, spliced.shape[1]))
            spliced[i, here] = paths["spliced"][i, here, index]
    return {g: run.rows[g].total(x) for g, x in {**found, "spliced": spliced}.items()}


class Table:
    """Bits per byte by method, domain and seed, with intervals over documents and seeds."""

    def __init__(self, rows: Mapping[str, Rows], domains: Sequence[str]) -> None:
        self.rows, self.domains = rows, list(domains)
        self.nats: dict[str, list[Nats]] = {}

    def add(self, method: str, nats: Nats) -> None:
        """Add what a method cost on one seed."""
        self.nats.setdefault(method, []).append(nats)

    def bits(self, method: str, group: str, n_seeds: int | None = None) -> float | None:
        """Return the mean over seeds, or None where the method has no such column.

        Args:
            method: The method.
            group: The column.
            n_seeds: How many seeds, from the first; by default all that were scored.
        """
        some = self.nats[method][:n_seeds]
        values = [self.rows[group].bits(x[group]) for x in some if group in x]
        return float(np.mean(values)) if values else None

    def mean(self, method: str) -> float:
        """Return the mean over domains."""
        return float(np.mean([self.bits(method, name) for name in self.domains]))

    def recovery(self, method: str, name: str | None = None) -> float:
        """Return the share of the gaps to the domains' own experts that is closed, their mean."""
        names = self.domains if name is None else [name]
        shares = []
        for domain in names:
            n = len(self.nats[method])
            base, own = self.bits("backbone", domain, n), self.bits("oracle", domain, n)
            found = self.bits(method, domain)
            assert base is not None and own is not None and found is not None
            shares.append((base - found) / (base - own))
        return float(np.mean(shares))

    def interval(self, method: str, statistic: Callable[..., float]) -> list[float]:
        """Return the 95 % interval of a statistic, resampling seeds, and documents in each group.

        Args:
            method: The method.
            statistic: From bits per byte of backbone, oracle and method by domain to a number.
        """
        rng = np.random.default_rng(0)
        # What was scored on the first seeds only is held against those.
        n = len(self.nats[method])
        sums = {m: self._sums(m) for m in ("backbone", "oracle", method)}
        sums = {m: {g: x_SN[:n] for g, x_SN in by_group.items()} for m, by_group in sums.items()}
        draws = []
        for _ in range(_DRAWS):
            seeds = rng.integers(n, size=n)
            bits: dict[str, dict[str, float]] = {m: {} for m in sums}
            for group in self.domains:
                count_N = self.rows[group].n_targets
                picked = rng.integers(len(count_N), size=len(count_N))
                for m, by_group in sums.items():
                    total = by_group[group][seeds][:, picked].sum()
                    bits[m][group] = total / (len(seeds) * count_N[picked].sum()) / np.log(2)
            draws.append(statistic(bits["backbone"], bits["oracle"], bits[method]))
        return [round(float(x), 5) for x in np.quantile(draws, (0.025, 0.975))]

    def _sums(self, method: str) -> dict[str, np.ndarray]:
        return {g: np.stack([x[g] for x in self.nats[method]]) for g in self.domains}


def mean_recovery(
    backbone: Mapping[str, float], own: Mapping[str, float], found: Mapping[str, float]
) -> float:
    """Return the mean share of the gaps that is closed."""
    return float(np.mean([(backbone[n] - found[n]) / (backbone[n] - own[n]) for n in backbone]))


def best_settings(table: Table) -> dict[str, str]:
    """Return every method by the name to report it under, tuned ones with their best setting."""
    chosen: dict[str, str] = {}
    for name in table.nats:
        if name.startswith(("router, ", "without ", "own ", "best path")):
            continue
        family = next((prefix for prefix in TUNED if name.startswith(f"{prefix} ")), name)
        if family not in chosen or table.mean(name) < table.mean(chosen[family]):
            chosen[family] = name
    return chosen


def summarise(table: Table) -> dict[str, Any]:
    """Return the figures of every method as the JSON file holds them."""
    found = {}
    for family, name in best_settings(table).items():
        row = {d: _rounded(table.bits(name, d)) for d in table.domains}
        found[family] = {
            "isolated": family not in JOINT,
            "setting": name,
            "seeds": len(table.nats[name]),
            "domains": row,
            "mean": round(table.mean(name), 5),
            "public": _rounded(table.bits(name, "public")),
            "spliced": _rounded(table.bits(name, "spliced")),
            "novel": _rounded(table.bits(name, "novel")),
            "recovery": round(table.recovery(name), 5),
            "recovery_interval": table.interval(name, mean_recovery),
            "worst_domain_recovery": round(
                min(table.recovery(name, domain) for domain in table.domains), 5
            ),
        }
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def report(run: Run) -> dict[str, Any]:
    """Return every figure of a run whose methods are scored; of the questions, what is there."""
    domains, seeds = list(run.preset.domains), run.preset.seeds
    table = Table(run.rows, domains)
    for seed in seeds:
        load = partial(run.load, seed)
        table.add("oracle", oracle(run, domains, load("paths")))
        table.add("alone", {name: load(f"alone, {name}")[name] for name in domains})
        for name in run.cells(seed):
            if not name.startswith(_PARTS + _ANSWERS):
                table.add(name, load(name))
        for name, nats in derived(run, load).items():
            table.add(name, nats)
    first = Table(run.rows, domains)
    for name in ("oracle", "backbone", "mix", "safe"):
        first.add(name, table.nats[name][0])
    for name in run.cells(seeds[0]):
        if name.startswith((*_ANSWERS, "dense")) and not name.endswith(", paths"):
            first.add(name, run.load(seeds[0], name))
    return {
        "preset": dataclasses.asdict(run.preset),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}, "
        f"jax {jax.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(sum(run.seconds.values())),
        "methods": summarise(table),
        "best_path_per_token": round(table.mean("best path per token (not causal)"), 5),
        "ablations": ablations(first),
        "peers": peers(first),
        "switching": switching(run),
        "hostile": hostile(first, run),
        "adversarial": adversarial(run),
        "copies": copies(first),
        "unequal": unequal(first),
        "growth": growth(run, first),
        "cost": _growth_costs(run).get("all", {}),
        "generations": generations(first),
    }


def ablations(table: Table) -> dict[str, Any]:
    """Return the router with one thing changed at a time, on the first seed."""
    names = ["mix", *(name for name in table.nats if name.startswith("router, "))]
    return {
        "as published" if name == "mix" else name.removeprefix("router, "): {
            "mean": round(table.mean(name), 5),
            "recovery": round(table.recovery(name), 5),
            "public": _rounded(table.bits(name, "public")),
            "spliced": _rounded(table.bits(name, "spliced")),
        }
        for name in names
    }


def peers(table: Table) -> dict[str, dict[str, float]]:
    """Return by how much every text's bits change when an expert comes, by expert."""
    found = {}
    for name in table.nats:
        if name.startswith("without "):
            changes = {}
            for group in table.rows:
                after, before = table.bits("mix", group), table.bits(name, group)
                if after is not None and before is not None:
                    changes[group] = round(after / before - 1, 5)
            found[name.removeprefix("without ")] = changes
    return found


def switching(run: Run) -> dict[str, Any]:
    """Return after how many bytes the right expert is trusted, by mode, over all seeds."""
    order = ["public", *sorted(run.preset.domains)]
    found = {}
    for mode in ("mix", "safe"):
        waits = []
        for seed in run.preset.seeds:
            weight_NTE = run.load(seed, f"{mode} weights")["spliced"]
            for document, weight_TE in zip(run.spliced, weight_NTE, strict=True):
                for segment in document.segments[1:]:
                    here_T = weight_TE[segment.start : segment.end, order.index(segment.name)]
                    trusted = np.flatnonzero(here_T >= TRUSTED)
                    waits.append(int(trusted[0]) if len(trusted) else len(here_T))
        quantiles = np.quantile(waits, (0.5, 0.9)) if waits else (np.nan, np.nan)
        found[mode] = {
            "median": float(quantiles[0]),
            "ninth_decile": float(quantiles[1]),
            "switches": len(waits),
            "waits": sorted(waits),
        }
    return found


def hostile(table: Table, run: Run) -> dict[str, Any]:
    """Return what each adversary took of the public text and how much worse anything became."""
    found: dict[str, Any] = {}
    groups = ["public", *table.domains]
    for name in table.nats:
        if not name.startswith("hostile, ") or name.startswith("hostile, weights, "):
            continue
        _, mode, adversary = name.split(", ", 2)
        if f"hostile, weights, {adversary}" not in run.cells(run.preset.seeds[0]):
            continue
        changes = {g: _change(table, name, mode, g) for g in groups}
        row = found.setdefault(adversary, {})
        row[mode] = {
            "public": changes["public"],
            "worst_domain": max(changes[g] for g in table.domains),
        }
        weight_NTE = run.load(run.preset.seeds[0], f"hostile, weights, {adversary}")["public"]
        index = sorted([*table.domains, "adversary"]).index("adversary") + 1
        mask_NT = run.rows["public"].mask_NT[: len(weight_NTE)]
        row["taken"] = round(float(weight_NTE[..., index][mask_NT].mean()), 6)
    return found


def copies(table: Table) -> dict[str, Any]:
    """Return what copies of a scout cost the copied expert's text and public text, by mode."""
    found: dict[str, Any] = {}
    victim = table.domains[0]
    for name in table.nats:
        if name.startswith("copies, "):
            _, mode, count, kind = name.split(", ", 3)
            if count != "0":
                base = f"copies, {mode}, 0, the same"
                row = found.setdefault(kind, {}).setdefault(count, {})
                row[mode] = {g: _change(table, name, base, g) for g in (victim, "public")}
    return found


def adversarial(run: Run) -> dict[str, Any]:
    """Return how often safe mode cost more than its bound, and how near it came."""
    path = run.folder / f"seed-{run.preset.seeds[0]}" / "adversarial.npz"
    if not path.exists():
        return {}
    with np.load(path) as file:
        excess_N, bound = file["excess_N"], float(file["bound"])
    return {
        "inputs": len(excess_N),
        "beyond_bound": int((excess_N > bound + 1e-3).sum()),  # float32 sums over 128 targets
        "worst_nats": round(float(excess_N.max()), 6),
        "bound_nats": round(bound, 6),
        "better_than_backbone": round(float((excess_N < 0).mean()), 4),
    }


def _change(table: Table, name: str, base: str, group: str) -> float:
    after, before = table.bits(name, group), table.bits(base, group)
    assert after is not None and before is not None
    return round(after / before - 1, 6)


def unequal(table: Table) -> dict[str, Any]:
    """Return what a contributor with less got, and what it cost the others."""
    found = {}
    name = table.domains[0]
    for cell in table.nats:
        if cell.startswith("unequal, ") and not cell.startswith("unequal, own, "):
            how = cell.removeprefix("unequal, ")
            own = table.bits(f"unequal, own, {how}", name)
            mixed, base = table.bits(cell, name), table.bits("backbone", name)
            assert own is not None and mixed is not None and base is not None
            found[how] = {
                "own": round(own, 5),
                "mix": round(mixed, 5),
                "recovery": round((base - mixed) / (base - own), 5),
                "worst_other": max(
                    _change(table, cell, "mix", g) for g in (*table.domains[1:], "public")
                ),
            }
    return found


def growth(run: Run, table: Table) -> dict[str, Any]:
    """Return quality by size.

    Recovery is of the gap to the domain's best path, on domains of which a contributor is there.
    """
    found = {}
    seed, costs = run.preset.seeds[0], _growth_costs(run)
    for size in run.preset.growth:
        if f"growth {size}, paths" not in run.cells(seed):
            continue
        mixed, paths = run.load(seed, f"growth {size}"), run.load(seed, f"growth {size}, paths")
        bits = {g: round(run.rows[g].bits(mixed[g]), 5) for g in mixed}
        shares = []
        for group in table.domains[:size]:
            rows = run.rows[group]
            by_path = [
                rows.bits(rows.total(cost_NT)) for cost_NT in paths[group].transpose(2, 0, 1)
            ]
            shares.append((by_path[0] - bits[group]) / (by_path[0] - min(by_path)))
        found[str(size)] = {
            "recovery": round(float(np.mean(shares)), 5),
            "domains_known": len(shares),
            "bits": bits,
            **costs.get(str(size), {}),
        }
    return found


def _growth_costs(run: Run) -> dict[str, dict[str, float]]:
    """Return what a token costs by size of the growing community, and in that of all experts."""
    file = run.folder / f"seed-{run.preset.seeds[0]}" / "growth.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def generations(table: Table) -> dict[str, Any]:
    """Return the means over domains, public and spliced text, by generation."""
    if "second, mix" not in table.nats:
        return {}

    def best(prefix: str) -> str:
        names = [name for name in table.nats if name.startswith(f"{prefix}dense")]
        return min(names, key=table.mean)

    def row(prefix: str, own: Callable[[str], float | None]) -> dict[str, Any]:
        figures = {
            method: {
                "mean": round(table.mean(name), 5),
                "public": _rounded(table.bits(name, "public")),
                "spliced": _rounded(table.bits(name, "spliced")),
            }
            for method, name in {
                "mix": f"{prefix}mix",
                "safe": f"{prefix}safe",
                "dense": best(prefix),
            }.items()
        }
        return {"own": round(float(np.mean([own(d) for d in table.domains])), 5), **figures}

    return {
        "first": row("", lambda domain: table.bits("oracle", domain)),
        "second": row("second, ", lambda domain: table.bits(f"second, own, {domain}", domain)),
    }
