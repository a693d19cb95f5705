"""A run of the composition benchmark: its texts, its contributors, and the cells done so far."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.composition import methods as methods
from benchmarks.composition.contributor import PARENT
from benchmarks.composition.methods import Rows
from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import (
    Document,
    Spliced,
    read_documents,
    splice_documents,
    write_documents,
)
from composable.corpora.recipe import load_recipe, make_texts, shipped_folder
from composable.interface.contract import RouterInterface
from composable.model.bank import Bank
from composable.model.model import Model, Pluggable
from composable.packaging.manifests.manifest import (
    BACKBONE_FILE,
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
)
from composable.workflows.pretrain import PLANS, pack, pretrain
from composable.workflows.train import expert_config

# Several processes share an accelerator: none takes all of its memory at the start. And they run
# for seconds, less than choosing the fastest kernels by trial would take.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

PUBLIC: Final = "public"
NOVEL: Final = "novel"
SPLICED: Final = "spliced"
# The recipe of the public text.
PUBLIC_TEXT: Final = "tiny-bytes"
# Spliced texts: four stretches, of so many bytes each.
SEGMENT_BYTES: Final = (192, 256)
WINDOWS: Final = 2

Step = Callable[..., Any]
Make = Callable[[], Step]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How large a run is.

    Args:
        backbone: Name of a backbone; one that is not shipped is trained first.
        domains: Texts of first-party recipes, one contributor each.
        novel: A text that nobody trains on.
        seeds: Seeds of everything random in training.
        steps: Steps of every expert.
        rows: Rows of 256 tokens in each of them.
        documents: Held-out documents scored per domain.
        growth: Sizes of the growing community; none leaves the question out.
        adversarial: Inputs on which the bound of safe mode is tried.
        is_full: Whether rivals and router are tried with many settings, on the first seed.
        has_scouts: Whether scouts of other kinds are trained, too, on the first seed.
        workers: Contributors, or cells, that are worked on at a time.
        is_short: Whether only our modes and BTM's ensembles are scored, and copied scouts.
    """

    backbone: str
    domains: tuple[str, ...]
    novel: str
    seeds: tuple[int, ...]
    steps: int
    rows: int
    documents: int
    growth: tuple[int, ...]
    adversarial: int
    is_full: bool
    has_scouts: bool = False
    workers: int = 1
    is_short: bool = False


class Run:
    """One run: its folder, its texts, and the cells done so far."""

    def __init__(self, name: str, preset: Preset, folder: Path) -> None:
        self.name, self.preset, self.folder = name, preset, folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "preset.json"
        text = json.dumps({**dataclasses.asdict(preset), "seeds": "each has a folder"})
        if note.exists() and note.read_text() != text:
            sys.exit(f"{folder} holds a run of another preset; give another --run, or remove it")
        note.write_text(text)
        self.cache = self.folder / "compiled"
        self.cache.mkdir(exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(self.cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = {}
        if (done := folder / "seconds.json").exists():
            self.seconds = json.loads(done.read_text())
        self.release: LoadedBackbone = load_backbone(self._find_backbone())

    def note_seconds(self, name: str, seconds: float) -> None:
        """Remember how long something took."""
        with self._lock:
            self.seconds[name] = round(seconds, 1)
            (self.folder / "seconds.json").write_text(json.dumps(self.seconds))

    def say(self, text: str) -> None:
        """Tell the user."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def map(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Return what every call returns; as many at a time as the preset says."""
        with ThreadPoolExecutor(self.preset.workers) as pool:
            futures = [pool.submit(call) for call in calls]
            return [future.result() for future in futures]

    def text(self, name: str, part: str) -> list[Document]:
        """Return a text of a first-party recipe: shipped, or made from the recipe."""
        shipped = shipped_folder(name) / "text" / f"{part}.jsonl"
        return read_documents([shipped if shipped.exists() else self._make(name, part)])

    def _make(self, name: str, part: str) -> Path:
        made = self.folder / "text" / name
        if not (made / f"{part}.jsonl").exists():
            self.say(f"making the text of {name}")
            made.mkdir(parents=True, exist_ok=True)
            make_texts(load_recipe(shipped_folder(name)), made)
        return made / f"{part}.jsonl"

    def _find_backbone(self) -> str:
        """Return the backbone's name, or the folder of one that is trained for this run."""
        name, folder = self.preset.backbone, self.folder / "backbone"
        if name == PUBLIC_TEXT:
            return name
        if not (folder / BACKBONE_FILE).exists():
            plan, start = PLANS[name], time.perf_counter()
            texts = [read_documents([self._make(PUBLIC_TEXT, x)]) for x in ("train", "heldout")]
            self.say(f"training {name}, {plan.training.steps} steps")

            def show(step: int, steps: int, row: Mapping[str, float]) -> None:
                if step % 250 == 0:
                    self.say(f"{name}: step {step}, {row['bits_per_token']:.3f} bits per byte")

            backbone = pretrain(plan, texts[0], self.folder / "pretraining", progress=show)
            package = load_recipe(shipped_folder(PUBLIC_TEXT)).source.package
            pack(plan, backbone, texts[1], package, folder)
            self.note_seconds(f"train {name}", time.perf_counter() - start)
        return str(folder)

    @cached_property
    def heldout(self) -> dict[str, list[Document]]:
        """Held-out documents by domain; the public ones last."""
        found = {name: self.text(name, "heldout") for name in self.preset.domains}
        return {**found, PUBLIC: self.text(PUBLIC_TEXT, "heldout")}

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

    def fill(self, seed: int, cells: Mapping[str, Make], groups: Sequence[str] = ()) -> None:
        """Fill the cells that are not there yet.

        A cell holds what a step gives for every group: of costs their sums over each document, in
        nats, shape N; of anything else all of it, in half precision, shape NTE.

        Args:
            seed: Whose folder they go to.
            cells: What makes each cell's step.
            groups: Groups of `rows`; by default all.
        """
        missing = [name for name in cells if not self._path(seed, name).exists()]
        groups = list(groups or self.rows)
        self.map([partial(self._fill, seed, name, cells[name], groups) for name in missing])

    def _fill(self, seed: int, name: str, make: Make, groups: Sequence[str]) -> None:
        start, path = time.perf_counter(), self._path(seed, name)
        step, found = make(), dict[str, Any]()
        for group in groups:
            value = self.rows[group].run(step)
            is_cost = value.ndim == 2
            found[group] = self.rows[group].total(value) if is_cost else value.astype(np.float16)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, **found)
        part.rename(path)
        self.note_seconds(f"seed-{seed}/{name}", time.perf_counter() - start)
        if found[next(iter(found))].ndim == 1:
            bits = {g: round(self.rows[g].bits(x), 3) for g, x in found.items()}
            self.say(f"seed {seed} {name}: {bits}")

    def _path(self, seed: int, name: str) -> Path:
        return self.folder / f"seed-{seed}" / "cells" / f"{name}.npz"

    def load(self, seed: int, name: str) -> dict[str, np.ndarray]:
        """Return a cell that is there."""
        with np.load(self._path(seed, name)) as file:
            return {group: file[group].astype(np.float64) for group in file}

    def cells(self, seed: int) -> list[str]:
        """Return the names of the cells that are there, oldest first."""
        files = (self.folder / f"seed-{seed}" / "cells").glob("*.npz")
        return [p.stem for p in sorted(files, key=lambda p: p.stat().st_mtime_ns)]


_MANIFEST: Final = """[expert]
name = "{name}"
version = "1.0.0"
backbone = "{backbone}"
{derives}
[interface]
name = "{interface}"
requires = "^{major}"

[body]
kind = "{kind}"
{rank}
[scout]
width = 128
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
    parent: Path | None = None,
    **job: Any,
) -> Path:
    """Run one contributor, unless its work is there; return its folder.

    A parent is the folder of another one, whose expert this one starts from.
    """
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
        derives="" if parent is None else f'derives-from = "{parent.name}@1.0.0"\n',
    )
    if parent is not None:
        (folder / PARENT).mkdir()
        for file in (EXPERT_FILE, BODY_FILE, SCOUT_FILE):
            shutil.copy(parent / file, folder / PARENT)
    (folder / "expert.toml").write_text(text)
    (folder / "README.md").write_text(f"# {name}\n")
    full = {
        "is_public": False,
        "has_parent": parent is not None,
        "steps": run.preset.steps,
        "rows": run.preset.rows,
        "seed": seed,
        "learning_rate": expert_config(1).learning_rate,
        "extras": list(extras),
        **job,
    }
    (folder / "job.json").write_text(json.dumps(full))
    run.say(f"seed {seed}: contributor {name}")
    start = time.perf_counter()
    module = "benchmarks.composition.contributor"
    command = [sys.executable, "-m", module, folder, run.release.folder, run.cache]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
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
        self.is_first = seed == preset.seeds[0]
        self.is_full = preset.is_full and self.is_first
        self.has_scouts = preset.has_scouts and self.is_first
        # Rivals whose contributors must train something more are compared on the first seed.
        asked = ["pooled", "unigram"] + ["phatgoose", "flex"] * self.is_first
        asked += ["scouts"] * self.has_scouts
        asked *= not preset.is_short
        public = [part for part in asked if part in ("pooled", "unigram", "scouts")]
        jobs = {
            name: partial(contribute, run, seed, name, run.text(name, "train"), extras=asked)
            for name in preset.domains
        }
        if public:
            jobs[PUBLIC] = partial(
                contribute,
                run,
                seed,
                PUBLIC,
                run.text(PUBLIC_TEXT, "train"),
                extras=public,
                is_public=True,
            )
        self.folders = dict(zip(jobs, run.map(list(jobs.values())), strict=True))
        public_folders = [self.folders.pop(PUBLIC)] if public else []
        self.plugged = [load_expert(release, folder) for folder in self.folders.values()]
        self.names = list(self.folders)
        # The public contributor's first, where it was asked for anything.
        self.extras = [extras_of(folder) for folder in (*public_folders, *self.folders.values())]

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
        # Room for the backbone and some guests, the same for all models of a run.
        capacity = -(-(len(self.names) + 4) // 8) * 8
        return Model(backbone, interface, experts, capacity=capacity, tokenizer=tokenizer)

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
