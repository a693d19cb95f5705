"""Do experts that never met work together, and does anything get worse? Beside every known rival.

    python -m benchmarks.composition --preset smoke|cpu|gpu [--json FILE] [--docs FOLDER]

Every contributor is a confined process that sees its own text and the backbone (see
`composition_contributor`); every rival is in `composition_methods`. What was done is kept in a run
folder, cell by cell, so a run that was cut short goes on. Bits per byte on held-out documents; the
methods and what came out are in `docs/composition.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import composition_methods as methods
from benchmarks.composition_contributor import SCOUTS
from benchmarks.composition_methods import Rows
from benchmarks.composition_report import report, write_docs
from composable.assembly.backbones import BackboneRelease, load_backbone
from composable.assembly.contribution import expert_config
from composable.assembly.experts import load_expert, make_expert
from composable.interface.contract import RouterInterface
from composable.model.bank import Bank
from composable.model.body import MATRICES
from composable.model.model import Model, Pluggable
from composable.packaging.manifest import Manifest
from composable.training.data import batches, token_stream
from composable.training.documents import (
    Document,
    Spliced,
    read_documents,
    splice_documents,
    write_documents,
)
from composable.training.loop import fit, muon
from composable.training.recipe import load_recipe, make_texts, shipped_folder

PUBLIC: Final = "public"
NOVEL: Final = "novel"
SPLICED: Final = "spliced"
# Spliced texts: four stretches, of so many bytes each.
SEGMENT_BYTES: Final = (192, 256)
WINDOWS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How large a run is.

    Args:
        backbone: Name of a shipped backbone, or of an entry of `BACKBONES`, which is trained first.
        domains: Texts of first-party recipes, one contributor each.
        novel: A text that nobody trains on.
        seeds: Seeds of everything random in training.
        steps: Steps of every expert.
        scout_steps: Steps of the further scouts.
        documents: Held-out documents scored per domain.
        growth: Sizes of the growing community; none leaves the question out.
        is_full: Whether rivals and router are tried with many settings, and scouts of other kinds
            are trained, on the first seed.
    """

    backbone: str
    domains: tuple[str, ...]
    novel: str
    seeds: tuple[int, ...]
    steps: int
    scout_steps: int
    documents: int
    growth: tuple[int, ...]
    is_full: bool


PRESETS: Final[Mapping[str, Preset]] = {
    "smoke": Preset(
        backbone="tiny-bytes",
        domains=("python-code", "set-mm", "legal", "german"),
        novel="spanish",
        seeds=(0,),
        steps=60,
        scout_steps=150,
        documents=8,
        growth=(),
        is_full=False,
    ),
    "cpu": Preset(
        backbone="tiny-bytes",
        domains=("python-code", "set-mm", "legal", "german"),
        novel="spanish",
        seeds=(0, 1, 2),
        steps=150,
        scout_steps=300,
        documents=8,
        growth=(2, 4, 8),
        is_full=True,
    ),
}


class Run:
    """One run: its folder, its texts, and the cells done so far."""

    def __init__(self, name: str, preset: Preset, folder: Path) -> None:
        self.name, self.preset, self.folder = name, preset, folder
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "preset.json"
        text = json.dumps({**dataclasses.asdict(preset), "seeds": "each has a folder"})
        if note.exists() and note.read_text() != text:
            sys.exit(f"{folder} holds a run of another preset; give another --run, or remove it")
        note.write_text(text)
        self.cache = folder / "compiled"
        self.cache.mkdir(exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(self.cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        self.release: BackboneRelease = load_backbone(preset.backbone)
        self.seconds: dict[str, float] = {}
        if (done := folder / "seconds.json").exists():
            self.seconds = json.loads(done.read_text())

    def note_seconds(self, name: str, seconds: float) -> None:
        """Remember how long something took."""
        self.seconds[name] = round(seconds, 1)
        (self.folder / "seconds.json").write_text(json.dumps(self.seconds))

    def say(self, text: str) -> None:
        """Tell the user."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def text(self, name: str, part: str) -> list[Document]:
        """Return a text of a first-party recipe: shipped, or made from the recipe."""
        folder = shipped_folder(name)
        shipped = folder / "text" / f"{part}.jsonl"
        if shipped.exists():
            return read_documents([shipped])
        made = self.folder / "text" / name
        if not (made / f"{part}.jsonl").exists():
            self.say(f"making the text of {name}")
            made.mkdir(parents=True, exist_ok=True)
            make_texts(load_recipe(folder), made)
        return read_documents([made / f"{part}.jsonl"])

    @cached_property
    def heldout(self) -> dict[str, list[Document]]:
        """Held-out documents by domain; the public ones last."""
        found = {name: self.text(name, "heldout") for name in self.preset.domains}
        return {**found, PUBLIC: self.text(self.preset.backbone, "heldout")}

    @cached_property
    def spliced(self) -> list[Spliced]:
        """Texts that switch domain three times."""
        return splice_documents(self.heldout, self.preset.documents, 5, *SEGMENT_BYTES, 4)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """What is scored, by group."""
        n = self.preset.documents
        encode = self.release.tokenizer.encode
        texts = {name: [d.text.encode() for d in docs[:n]] for name, docs in self.heldout.items()}
        texts[SPLICED] = [document.text for document in self.spliced]
        novel = self.text(self.preset.novel, "heldout")[:n]
        texts[NOVEL] = [document.text.encode() for document in novel]
        return {name: Rows.of(documents, encode, WINDOWS) for name, documents in texts.items()}

    def cell(
        self,
        seed: int,
        name: str,
        make: Callable[[], Callable[..., Any]],
        groups: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return what a step gives for every group; computed once, then read."""
        path = self.folder / f"seed-{seed}" / "cells" / f"{name}.npz"
        if not path.exists():
            start = time.perf_counter()
            step = make()
            wanted = self.rows if groups is None else {g: self.rows[g] for g in groups}
            found = {group: rows.run(step) for group, rows in wanted.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez(part, **{g: x.astype(np.float32) for g, x in found.items()})
            part.rename(path)
            self.note_seconds(f"seed-{seed}/{name}", time.perf_counter() - start)
            if found[next(iter(found))].ndim == 2:
                bits = {g: round(self.bits(g, x), 3) for g, x in found.items()}
                self.say(f"seed {seed} {name}: {bits}")
        return self.load(seed, name)

    def load(self, seed: int, name: str) -> dict[str, np.ndarray]:
        """Return a cell that is there."""
        with np.load(self.folder / f"seed-{seed}" / "cells" / f"{name}.npz") as file:
            return dict(file)

    def cells(self, seed: int) -> list[str]:
        """Return the names of the cells that are there, oldest first."""
        files = (self.folder / f"seed-{seed}" / "cells").glob("*.npz")
        return [p.stem for p in sorted(files, key=lambda p: p.stat().st_mtime_ns)]

    def bits(self, group: str, nats_NT: np.ndarray) -> float:
        """Return bits per byte; for bytes, a target is a byte."""
        mask_NT = self.rows[group].mask_NT[: len(nats_NT)]
        return float((nats_NT * mask_NT).sum() / mask_NT.sum() / np.log(2))


# ---- contributions -----------------------------------------------------------------------------

_MANIFEST: Final = """[expert]
name = "{name}"
version = "1.0.0"
backbone = "{backbone}"

[interface]
name = "{interface}"
requires = "^{major}"

[body]
kind = "{kind}"
{rank}
[scout]
width = 64
"""


def contribute(
    run: Run,
    seed: int,
    name: str,
    documents: Sequence[Document],
    /,
    *,
    extras: Sequence[str] = (),
    kind: str = "ffn",
    rank: int | None = None,
    **job: Any,
) -> Path:
    """Run one contributor, unless its work is there; return its folder."""
    folder = run.folder / f"seed-{seed}" / "contributors" / name
    if (folder / "extras.npz").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "text").mkdir(parents=True)
    write_documents(folder / "text" / "train.jsonl", documents)
    interface = run.release.interface
    text = _MANIFEST.format(
        name=name,
        backbone=run.release.interface.name,
        interface=interface.name,
        major=str(interface.version).partition(".")[0] + ".0",
        kind=kind,
        rank="" if rank is None else f"rank = {rank}\n",
    )
    (folder / "expert.toml").write_text(text)
    (folder / "README.md").write_text(f"# {name}\n")
    full = {
        "is_public": False,
        "steps": run.preset.steps,
        "seed": seed,
        "learning_rate": expert_config(1).learning_rate,
        "extras": list(extras),
        "scouts": list(SCOUTS),
        "scout_steps": run.preset.scout_steps,
        **job,
    }
    (folder / "job.json").write_text(json.dumps(full))
    run.say(f"seed {seed}: contributor {name}")
    start = time.perf_counter()
    module = "benchmarks.composition_contributor"
    command = [sys.executable, "-m", module, folder, run.release.folder, run.cache]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode:
        sys.exit(f"contributor {name} failed:\n{done.stderr}")
    run.note_seconds(f"seed-{seed}/contributor {name}", time.perf_counter() - start)
    return folder


def extras_of(folder: Path) -> dict[str, np.ndarray]:
    """Return what a contributor gave for other methods."""
    with np.load(folder / "extras.npz") as file:
        return dict(file)


class Community:
    """The contributors of one seed, and everything that methods need of them."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed = run, seed
        preset, release = run.preset, run.release
        self.is_full = preset.is_full and seed == preset.seeds[0]
        asked = ["pooled", "unigram", "phatgoose", "flex"] + ["scouts"] * self.is_full
        self.folders = {
            name: contribute(run, seed, name, run.text(name, "train"), extras=asked)
            for name in preset.domains
        }
        public = [part for part in asked if part in ("pooled", "unigram", "scouts")]
        self.public = contribute(
            run, seed, PUBLIC, run.text(preset.backbone, "train"), extras=public, is_public=True
        )
        self.plugged = [load_expert(release, folder) for folder in self.folders.values()]
        self.names = list(self.folders)
        self.extras = [extras_of(self.public), *map(extras_of, self.folders.values())]

    @cached_property
    def model(self) -> Model:
        """The composed model, with room for guests."""
        return self.plug(self.plugged)

    def plug(self, experts: Sequence[Pluggable], **settings: Any) -> Model:
        """Return a model of some experts, if need be with other settings of the router."""
        interface: RouterInterface = self.run.release.interface
        if settings:
            interface = dataclasses.replace(interface, **settings)
        backbone, tokenizer = self.run.release.backbone, self.run.release.tokenizer
        return Model(backbone, interface, experts, capacity=8, tokenizer=tokenizer)

    @cached_property
    def order(self) -> list[int]:
        """Entries of the bank in the order backbone, then experts as the preset names them."""
        return [0, *(self.model.names.index(name) for name in self.names)]

    @cached_property
    def stack(self) -> methods.Slots:
        """Blocks of the backbone and of every expert."""
        bank: Bank = self.model.parts.bank
        order = np.array(self.order)
        return jax.tree.map(lambda w: w[order].astype(jnp.float32), bank.slots)

    @cached_property
    def scouts(self) -> methods.ScoutBank:
        """The published scouts, in the order of `stack`."""
        order = np.array(self.order)
        return methods.ScoutBank(*(x[order] for x in self.model.parts.bank.scouts))

    def variant_scouts(self, name: str) -> methods.ScoutBank:
        """Return scouts of another kind, the backbone's from public text among them."""
        parts = ("w_in", "b_in", "w_out", "b_out")
        return methods.stack_scouts(
            [{part: extra[f"scout_{name}_{part}"] for part in parts} for extra in self.extras]
        )

    def extra(self, name: str, skip_public: bool = False) -> np.ndarray:
        """Return one thing that every contributor gave, stacked."""
        return np.stack([extra[name] for extra in self.extras[skip_public:]])


# ---- the methods -------------------------------------------------------------------------------

Make = Callable[[], Callable[..., Any]]


def isolated_methods(community: Community) -> dict[str, Make]:
    """Return every method whose contributors never met, as cells that score every target."""
    c, release = community, community.run.release
    backbone, n = release.backbone, len(community.names) + 1
    flex_stack, is_full = _flex_stack(c), c.is_full
    made: dict[str, Make] = {
        "backbone": lambda: methods.path(backbone, methods.entry(c.stack, 0)),
        "random": lambda: methods.mixture(backbone, c.stack, methods.Random(jnp.ones(n))),
        "uniform": lambda: methods.mixture(backbone, c.stack, methods.Constant(jnp.full(n, 1 / n))),
        "average": lambda: methods.path(backbone, methods.average(c.stack)),
    }
    for scale in (0.3, 0.5, 1.0) if is_full else (0.5,):
        made[f"task_arithmetic {scale}"] = lambda scale=scale: methods.path(
            backbone, methods.task_arithmetic(c.stack, scale)
        )
        made[f"ties {scale}"] = lambda scale=scale: methods.path(
            backbone, methods.ties(c.stack, scale)
        )
    for bias in (0.0, -1.0) if is_full else (0.0,):
        for k in (1, 2, 4) if is_full else (2,):
            made[f"flexolmo top{k} bias {bias}"] = lambda k=k, bias=bias: methods.mixture(
                backbone, flex_stack, _flex_gate(c, k, bias)
            )
    gates = {"phatgoose": _phatgoose_gate(c), "arrow": _arrow_gate(c)}
    for temperature in (0.05, 1.0) if is_full else (0.05,):
        gates[f"lda temperature {temperature}"] = _discriminant(c, temperature, is_linear=True)
        gates[f"qda temperature {temperature}"] = _discriminant(c, temperature, is_linear=False)
    for temperature in (5.0, 20.0) if is_full else (20.0,):
        gates[f"dume temperature {temperature}"] = _ridge(c, temperature)
    for name, gate in gates.items():
        made[name] = lambda gate=gate: methods.mixture(backbone, c.stack, gate)
    made["mix"] = lambda: methods.shipped(c.model.parts, "mix")
    made["safe"] = lambda: methods.shipped(c.model.parts, "safe")
    return made


def _flex_stack(c: Community) -> methods.Slots:
    slots = range(len(c.stack))
    own = methods.entry(c.stack, 0)
    return tuple(
        {
            name: jnp.concatenate(
                [own[i][name][None], jnp.asarray(c.extra(f"flex_{name}_{i}", skip_public=True))]
            )
            for name in MATRICES
        }
        for i in slots
    )


def _flex_gate(c: Community, k: int, bias: float) -> methods.PerSlot:
    public_1LD = c.extras[1]["flex_public_LD"][None]
    rows_ELD = np.concatenate([public_1LD, c.extra("flex_row_LD", skip_public=True)])
    bias_E = jnp.full(len(rows_ELD), bias).at[0].set(0.0)
    return methods.PerSlot(jnp.asarray(rows_ELD.swapaxes(0, 1)), bias_E, "row", k)


def _phatgoose_gate(c: Community) -> methods.PerSlot:
    rows_ELD = c.extra("gate_LD", skip_public=True)
    rows_LED = jnp.asarray(rows_ELD.swapaxes(0, 1))
    return methods.PerSlot(rows_LED, jnp.zeros(len(rows_ELD)), "standard", 2)


def _arrow_gate(c: Community) -> methods.PerSlot:
    """Return the input direction along which each body changes most (its first singular vector)."""
    rows = []
    for slot in c.stack:
        change_EDF = np.concatenate(
            [np.asarray(slot[name][1:] - slot[name][:1]) for name in ("w_gate", "w_up")], axis=2
        )
        rows.append(np.linalg.svd(change_EDF, full_matrices=False)[0][:, :, 0])
    return methods.PerSlot(jnp.asarray(np.stack(rows)), jnp.zeros(len(c.names)), "arrow", 2)


def _moments(c: Community) -> tuple[np.ndarray, np.ndarray]:
    mean_ED = c.extra("pooled_mean_D")
    spread_EDD = c.extra("pooled_moment_DD") - mean_ED[:, :, None] * mean_ED[:, None]
    return mean_ED, spread_EDD


def _discriminant(c: Community, temperature: float, *, is_linear: bool) -> Any:
    """Return LDA, or QDA with covariances shrunk by 0.3 towards the shared one."""
    mean_ED, spread_EDD = _moments(c)
    shared_DD = spread_EDD.mean(0)
    width = len(shared_DD)
    ridge_DD = np.eye(width) * np.trace(shared_DD) / width * 1e-2
    if is_linear:
        precision_DD = np.linalg.inv(shared_DD + ridge_DD)
        w_DE = precision_DD @ mean_ED.T
        b_E = -0.5 * np.einsum("ed,de->e", mean_ED, w_DE)
        as_jax = (jnp.asarray(x, jnp.float32) for x in (w_DE, b_E, temperature))
        return methods.Linear(*as_jax, k=2)
    shrunk_EDD = 0.7 * spread_EDD + 0.3 * shared_DD + ridge_DD
    constant_E = -0.5 * np.linalg.slogdet(shrunk_EDD)[1]
    arrays = (mean_ED, np.linalg.inv(shrunk_EDD), constant_E, temperature)
    return methods.Quadratic(*(jnp.asarray(x, jnp.float32) for x in arrays), k=2)


def _ridge(c: Community, temperature: float) -> methods.Linear:
    """Return a ridge regression from pooled features to who wrote them, from summed moments."""
    mean_ED, moment_EDD = c.extra("pooled_mean_D"), c.extra("pooled_moment_DD")
    total_DD = moment_EDD.sum(0)
    ridge_DD = np.eye(len(total_DD)) * np.trace(total_DD) / len(total_DD) * 1e-3
    w_DE = np.linalg.solve(total_DD + ridge_DD, mean_ED.T)
    zeros_E = jnp.zeros(len(mean_ED))
    return methods.Linear(jnp.asarray(w_DE, jnp.float32), zeros_E, jnp.float32(temperature), k=2)


def _clusters(c: Community, temperature: float) -> methods.Quadratic:
    """Return c-BTM's weights: exp(-squared distance to a cluster's centre / temperature).

    Distances are per feature, between pooled trunk features and their mean over a contributor's
    text, where the paper takes tf-idf vectors and k-means.

    References:
        Gururangan et al. 2023, arXiv:2303.14177, equation 2.
    """
    mean_ED = c.extra("pooled_mean_D")
    n, width = mean_ED.shape
    same_EDD = np.broadcast_to(np.eye(width), (n, width, width))
    arrays = (mean_ED, same_EDD, np.zeros(n), 2.0 / (temperature * width))
    return methods.Quadratic(*(jnp.asarray(x, jnp.float32) for x in arrays), k=n)


CLUSTER_TEMPERATURES: Final = (0.01, 0.1)


def router_ablations(community: Community) -> dict[str, Make]:
    """Return the router with one thing changed at a time."""
    c = community
    interface = c.run.release.interface

    def number(value: float) -> jax.Array:
        return jnp.float32(value)

    base = methods.Scouts(
        scouts=c.scouts,
        prior=number(interface.mix_prior),
        discount=number(interface.discount),
        rate=number(interface.mix_switch_rate),
        power=number(interface.mix_power),
        filter="switch",
    )
    records = {"filter": "discount", "prior": number(interface.backbone_prior)}
    unigram_EC = c.extra("unigram_C")
    changes: dict[str, dict[str, Any]] = {
        "as published": {},
        "top 1": {"k": 1},
        "top 4": {"k": 4},
        "track records": records,
        "power 1": {"power": number(1)},
        "unigram scouts": {"scouts": methods.unigram_scouts(unigram_EC, interface.d_model)},
    }
    if c.is_full:
        for power in (0.2, 0.5):
            changes[f"power {power}"] = {"power": number(power)}
        for rate in (0.01, 0.001):
            changes[f"rate {rate}"] = {"rate": number(rate)}
        for prior in (0.5, 0.95):
            changes[f"prior {prior}"] = {"prior": number(prior)}
        for discount in (0.9, 0.95, 0.99, 1.0):
            changes[f"track records, discount {discount}"] = {
                **records,
                "discount": number(discount),
            }
        changes["track records, prior 0.5"] = {**records, "prior": number(0.5)}
        for name, (_, tap, _) in SCOUTS.items():
            changes[f"scouts {name}"] = {"scouts": c.variant_scouts(name), "tap": tap}
    backbone = c.run.release.backbone
    return {
        f"router, {name}": lambda change=change: methods.mixture(
            backbone, c.stack, dataclasses.replace(base, **change)
        )
        for name, change in changes.items()
    }


# ---- references that break the rules -----------------------------------------------------------


def train_btx(community: Community) -> Make:
    """Return BTX: experts and a learned router trained together on everybody's text.

    References:
        Sukhbaatar et al. 2024, arXiv:2403.07816: top-2 routing, load-balancing loss (their
        equation 3, weight 0.01). Attention and trunk stay frozen, as they are in every expert.
    """
    c = community
    backbone = c.run.release.backbone
    first, n = backbone.cfg.tap, len(c.names) + 1

    def mixed(trained: Any, backbone: Any, tokens_BT: jax.Array) -> Any:
        balance = 0.0
        shares = []

        def run(layer: int, x_BTD: jax.Array) -> jax.Array:
            logit_BTE = x_BTD @ trained["router"][str(layer)]
            top_BTJ, expert_BTJ = jax.lax.top_k(logit_BTE, 2)
            choice = expert_BTJ, jax.nn.softmax(top_BTJ, axis=-1)
            used_E = jax.nn.one_hot(expert_BTJ[..., 0], n).mean((0, 1))
            shares.append((used_E * jax.nn.softmax(logit_BTE).mean((0, 1))).sum())
            return methods.mix_blocks(trained["stack"][layer - first], x_BTD, *choice)

        x_BTD, _ = backbone.trunk(tokens_BT)
        logits_BTV, _ = backbone.upper(x_BTD, run)
        balance = n * sum(shares) / len(shares)
        return logits_BTV, balance

    def objective(trained: Any, backbone: Any, tokens_BT: jax.Array) -> Any:
        logits_BTV, balance = mixed(trained, backbone, tokens_BT[:, :-1])
        loss = methods.costs(logits_BTV, tokens_BT[:, 1:]).mean()
        return loss + 0.01 * balance, {}

    router = {str(layer): jnp.zeros((backbone.cfg.d_model, n)) for layer in backbone.cfg.slots}
    start = {"stack": c.stack, "router": router}
    # As many tokens as half of all contributors' training together, on top of it.
    steps = c.run.preset.steps * len(c.names) // 2
    trained = _train_jointly(c, "btx", objective, start, backbone, steps)
    return lambda: methods.whole(lambda tokens_BT: mixed(trained, backbone, tokens_BT)[0])


def train_dense(community: Community) -> Make:
    """Return one dense model: all weights, everybody's text, as many tokens as all experts."""
    c = community
    parts: Any = nnx.split(c.run.release.backbone, nnx.Param, ...)
    graph, params, rest = parts

    def objective(params: Any, rest: Any, tokens_BT: jax.Array) -> Any:
        logits_BTV = nnx.merge(graph, params, rest)(tokens_BT[:, :-1])
        return methods.costs(logits_BTV, tokens_BT[:, 1:]).mean(), {}

    steps = c.run.preset.steps * len(c.names)
    trained = _train_jointly(c, "dense", objective, params, rest, steps)
    return lambda: methods.whole(nnx.merge(graph, trained, rest))


def _train_jointly(
    c: Community, name: str, objective: Any, start: Any, frozen: Any, steps: int
) -> Any:
    """Train on all texts, the public one among them, an equal share of each."""
    path = c.run.folder / f"seed-{c.seed}" / f"{name}.npz"
    leaves, structure = jax.tree.flatten(start)
    if not path.exists():
        c.run.say(f"seed {c.seed}: training {name}, {steps} steps")
        began = time.perf_counter()
        preset, tokenizer = c.run.preset, c.run.release.tokenizer
        texts = [c.run.text(x, "train") for x in (*preset.domains, preset.backbone)]
        streams = [token_stream(documents, tokenizer) for documents in texts]
        shortest = min(map(len, streams))
        cfg = expert_config(steps, c.seed)
        stream = np.concatenate([stream[:shortest] for stream in streams])
        data = batches(stream, window=cfg.window, batch_size=cfg.batch_size, seed=cfg.seed)
        trained = fit(objective, start, frozen, data, cfg, optimizer=muon(cfg)).trained
        leaves = jax.tree.leaves(trained)
        part = path.with_suffix(".part.npz")
        np.savez(part, **{str(i): np.asarray(x) for i, x in enumerate(leaves)})
        part.rename(path)
        c.run.note_seconds(f"seed-{c.seed}/train {name}", time.perf_counter() - began)
    with np.load(path) as file:
        return jax.tree.unflatten(
            structure, [jnp.asarray(file[str(i)]) for i in range(len(leaves))]
        )


# ---- questions ---------------------------------------------------------------------------------


def neighbours(c: Community) -> None:
    """Fill the cells of mix mode without each expert: what its coming and going changes."""
    for name in c.names:
        rest = [expert for expert in c.plugged if expert.name != name]
        c.run.cell(
            c.seed, f"without {name}", lambda rest=rest: methods.shipped(c.plug(rest).parts, "mix")
        )


def unequal(c: Community) -> None:
    """Fill the cells of mix mode where the first contributor had less of something."""
    run, name = c.run, c.names[0]
    text = run.text(name, "train")
    steps, rate = run.preset.steps, expert_config(1).learning_rate
    weaker: dict[str, dict[str, Any]] = {
        "a tenth of the text": {"documents": text[: max(4, len(text) // 10)]},
        "a quarter of the steps": {"steps": max(1, steps // 4)},
        "rank 16": {"kind": "lora", "rank": 16},
        "another seed": {"seed": c.seed + 1000},
        "a third of the rate": {"learning_rate": rate / 3},
    }
    for how, job in weaker.items():
        documents = job.pop("documents", text)
        other = f"{name}-{how.replace(' ', '-')}"
        folder = contribute(run, c.seed, other, documents, **job)
        expert = load_expert(run.release, folder)
        rest = [expert for expert in c.plugged if expert.name != name]
        model = c.plug([*rest, expert])
        slots = model.parts.bank.slots
        index = model.names.index(other)
        own = jax.tree.map(lambda w, i=index: w[i].astype(jnp.float32), slots)
        alone = methods.path(run.release.backbone, own)
        run.cell(c.seed, f"unequal, own, {how}", lambda alone=alone: alone, [name])
        run.cell(c.seed, f"unequal, {how}", lambda m=model: methods.shipped(m.parts, "mix"))


def hostile_experts(c: Community) -> dict[str, Pluggable]:
    """Return guests that are broken or mean harm, each made of an honest contributor's parts."""
    honest, other = c.plugged[0], c.plugged[1]
    release = c.run.release
    noise = jax.random.key(7)

    def changed(module: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
        graph, state = nnx.split(module)
        return nnx.merge(graph, jax.tree.map(change, state))

    def harmful(scale: float) -> Any:
        return changed(honest.body, lambda x: scale * jax.random.normal(noise, x.shape, x.dtype))

    blank = load_untrained(release, c.folders[honest.name])
    sure = changed(honest.scout, lambda x: 30.0 * x)
    public_scout = release.backbone.scout
    guests = {
        "untrained scout, harmful body": (harmful(1.0), blank.scout),
        "overconfident scout, harmful body": (harmful(1.0), sure),
        "copy of a neighbour's scout, harmful body": (harmful(1.0), other.scout),
        "copy of the backbone's scout, harmful body": (harmful(1.0), public_scout),
        "copy of the backbone's scout, subtle body": (harmful(0.05), public_scout),
        "body of NaN": (changed(honest.body, lambda x: jnp.full_like(x, jnp.nan)), other.scout),
        "scout of NaN": (
            honest.body,
            changed(honest.scout, lambda x: jnp.full_like(x, jnp.nan)),
        ),
        "huge norms": (harmful(1e4), other.scout),
    }
    return {
        name: Pluggable(name="guest", body=body, scout=scout, key=99)
        for name, (body, scout) in guests.items()
    }


def load_untrained(release: BackboneRelease, folder: Path) -> Any:
    """Return the expert of a folder as it was before training."""
    return make_expert(release, Manifest.read(folder), seed=3)


def hostile(c: Community) -> None:
    """Fill the cells of both modes with each guest plugged in."""
    for name, guest in hostile_experts(c).items():
        model = c.plug([*c.plugged, guest])
        for mode in ("mix", "safe"):
            c.run.cell(
                c.seed,
                f"hostile, {mode}, {name}",
                lambda m=model, mode=mode: methods.shipped(m.parts, mode),
            )
        c.run.cell(
            c.seed,
            f"hostile, weights, {name}",
            lambda m=model: methods.trusted(m.parts, "mix"),
            [PUBLIC],
        )


def growth(c: Community) -> None:
    """Fill the cells of communities of growing size: parts of domains, rivals and near-copies."""
    run, sizes = c.run, c.run.preset.growth
    if not sizes:
        return
    parts = max(sizes) // len(c.names)
    small: list[list[Pluggable]] = []
    for part in range(parts):
        row = []
        for name in c.names:
            documents = run.text(name, "train")[part::parts]
            folder = contribute(
                run, c.seed, f"{name}-part-{part}", documents, steps=run.preset.steps // 2
            )
            row.append(load_expert(run.release, folder))
        small.append(row)
    ordered = [expert for row in small for expert in row]
    for size in sizes:
        model = Model(
            run.release.backbone,
            run.release.interface,
            ordered[:size],
            tokenizer=run.release.tokenizer,
        )
        run.cell(c.seed, f"growth {size}", lambda m=model: methods.shipped(m.parts, "mix"))
        run.cell(
            c.seed,
            f"growth {size}, paths",
            lambda m=model, n=size: methods.all_paths(
                run.release.backbone, methods.stack_of(m.parts, n + 1)
            ),
        )


# ---- running -----------------------------------------------------------------------------------


def score_everything(run: Run, seed: int) -> None:
    """Fill the cells of one seed."""
    c = Community(run, seed)
    backbone, n = run.release.backbone, len(c.names) + 1
    for name, make in isolated_methods(c).items():
        run.cell(seed, name, make)
    run.cell(seed, "paths", lambda: methods.all_paths(backbone, c.stack))
    for temperature in CLUSTER_TEMPERATURES:
        gate = _clusters(c, temperature)
        run.cell(
            seed,
            f"c-btm weights {temperature}",
            lambda gate=gate: methods.weights(backbone, gate, n),
        )
    if seed == run.preset.seeds[0]:
        for name, make in router_ablations(c).items():
            run.cell(seed, name, make)
    run.cell(seed, "btx", lambda: train_btx(c)())
    run.cell(seed, "dense", lambda: train_dense(c)())
    for mode in ("mix", "safe"):
        run.cell(seed, f"{mode} weights", lambda m=mode: methods.trusted(c.model.parts, m))
    if seed == run.preset.seeds[0]:
        neighbours(c)
        hostile(c)
        if run.preset.is_full:
            unequal(c)
            growth(c)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.composition", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the preset's, only these")
    parser.add_argument("--run", type=Path, help="folder to work in and to go on from")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="folder of composition.md and its figures")
    arguments = parser.parse_args()
    folder = arguments.run or Path("runs") / "composition" / arguments.preset
    preset = PRESETS[arguments.preset]
    if arguments.seeds:
        preset = dataclasses.replace(preset, seeds=tuple(arguments.seeds))
    run = Run(arguments.preset, preset, folder)
    for seed in run.preset.seeds:
        score_everything(run, seed)
    result = report(run)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.docs:
        write_docs(run, result, arguments.docs)


if __name__ == "__main__":
    main()
