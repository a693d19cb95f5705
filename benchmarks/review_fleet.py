"""Does vetting beside many experts survive killed workers, and what do its engines and units cost?

    python -m benchmarks.review_fleet --work DIR [--peers 1000] [--kills 50] [--json FILE]
    python -m benchmarks.review_fleet --units [--json FILE]

*Kills.* Random experts of a tiny backbone are published to a folder registry, with held-out text
each. New ones are vetted beside all of them by a pool: once undisturbed, then with a worker killed
(SIGKILL) each time that a share of the units is begun, always one that is computing. The cards are
compared byte by byte, and the ledger counts what was begun and finished.

*Engines.* The pool and Ray (`pip install ray`) in turn, on a part of the peers, into empty folders;
Ray's workers are killed as well, in a run of its own. Time is taken from the start of the engine's
workers, and from the first result, to the last one. Ray's node is started before.

*Units.* For tiny-bytes: seconds of one peer's units beside whole passes of the model, which is how
vetting worked before, and beside the time that their multiplications take at the speed of one large
product of matrices.

`--work` keeps what is done: a command that was interrupted goes on. Without it, everything is new.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone, load_backbone, save_backbone
from composable.assembly.experts import save_expert
from composable.corpora.documents import Document, write_documents
from composable.files.results import Ledger, Results
from composable.model.body import Expert
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.registry.locations import open_for_publishing
from composable.training.record import TrainingRecord
from composable.vetting.card import CARD_FILE, Check, write_card
from composable.vetting.evaluation import (
    WINDOW_TOKENS,
    measure_evidence,
    mix_scorer,
    score_documents,
)
from composable.vetting.evidence import MAX_BYTES, vetted_texts
from composable.vetting.peers import Peer, PeerMeter
from composable.workflows.peer_units import PeerJob, PeerWorker, make_job
from composable.workflows.publish import publish_expert
from composable.workflows.ray_workers import compute_on_ray
from composable.workflows.references import list_peers
from composable.workflows.vet import check_expert
from composable.workflows.worker_pool import compute_units
from tests.support.tiny import PRIVATE_WORDS, PUBLIC_WORDS, Tiny, router_of

MANIFEST = """[expert]
name = "{name}"
version = "1.0.0"
description = "A random change of a tiny backbone."
license = "Apache-2.0"
backbone = "tiny"

[interface]
name = "tiny"
requires = "^1.0"

[body]
kind = "lora"
rank = 2
dtype = "F32"

[scout]
width = 8
"""
# Shorter than the default: no worker of a run on one machine is silent for long.
LEASE_SECONDS = 30.0
Compute = Callable[[PeerWorker], None]


class Bench:
    """A registry of random experts, and new ones to vet beside them.

    Args:
        work: Folder of everything.
        n_peers: Published experts.
        n_newcomers: New experts.
    """

    def __init__(self, work: Path, n_peers: int, n_newcomers: int) -> None:
        self.work, self.registry = work, work / "registry"
        self.tiny = Tiny()
        self.loaded = self._make_backbone()
        names = [f"peer-{index}" for index in range(n_peers)]
        self.texts = {name: self._write_text(name) for name in names}
        self._publish(names)
        self.newcomers = [self._write_expert(f"new-{index}") for index in range(n_newcomers)]

    def job(self, folder: Path, results: Path, n_peers: int | None = None) -> PeerJob:
        """Return the job of vetting a new expert beside the first peers, all by default."""
        peers = list_peers(
            self.loaded, folder.name, ["all"], self.texts, registry=str(self.registry)
        )
        return make_job(
            self.loaded,
            folder,
            sorted(peers, key=lambda peer: int(peer.name.partition("-")[2]))[:n_peers],
            registry=str(self.registry),
            results=results,
            lease_seconds=LEASE_SECONDS,
        )

    def vet(self, folder: Path, results: Path, compute: Compute) -> bytes:
        """Vet a new expert beside all peers, and return its card."""
        worker = PeerWorker(self.job(folder, results), self.loaded)

        def vet_peers(_: Any) -> Any:
            compute(worker)
            return worker.gather()

        check_expert(self.loaded, folder, [self.texts["peer-0"]], vet_peers=vet_peers)
        return (folder / CARD_FILE).read_bytes()

    def _make_backbone(self) -> LoadedBackbone:
        folder = self.work / "backbone" / "tiny"
        if not folder.exists():
            documents = [
                Document(f"public/{i}", self.tiny.text(PUBLIC_WORDS, seed=i)) for i in range(2)
            ]
            save_backbone(
                folder,
                self.tiny.backbone,
                name="tiny",
                version="1.0.0",
                anchor=documents,
                router=router_of(self.tiny.interface),
                output_bounds=self.tiny.interface.output_bounds,
                texts={"README.md": "A tiny backbone.\n"},
                description="Random.",
                license_="Apache-2.0",
            )
        return load_backbone(str(folder))

    def _write_text(self, name: str) -> Path:
        path = self.work / "texts" / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            seed = int(name.partition("-")[2])
            words = [self.tiny.text(PRIVATE_WORDS, seed=2 * seed + i, length=60) for i in range(2)]
            write_documents(path, [Document(f"{name}/{i}", text) for i, text in enumerate(words)])
        return path

    def _write_expert(self, name: str) -> Path:
        folder = self.work / "experts" / name
        if not (folder / CARD_FILE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "expert.toml").write_text(MANIFEST.format(name=name))
            (folder / "README.md").write_text("A random expert.\n")
            manifest = Manifest.read(folder)
            save_expert(folder, self.tiny.expert(name, kind="lora", rank=2, width=8), manifest)
            passed = Check(name="format", passed=True, found="", expected="")
            write_card(folder, manifest, self.loaded.interface, [passed], {}, TrainingRecord())
        return folder

    def _publish(self, names: Sequence[str]) -> None:
        """Publish what is not there yet."""
        target = open_for_publishing(self.registry)
        known = set(target.names()) if target.exists else set()
        for number, name in enumerate(names, start=1):
            if name not in known:
                publish_expert(self._write_expert(name), self.loaded.interface, target)
            if number % 100 == 0:
                print(f"{number} experts published", flush=True)


@contextlib.contextmanager
def killing(worker: PeerWorker, n_kills: int, seed: int) -> Iterator[list[int]]:
    """Kill processes that compute units of a job, spread over the run; yield their numbers."""
    keys = [unit.key for group in worker.groups for unit in group]
    missing = [key for key in keys if not worker.results.has(key)]
    rng, killed, ended = random.Random(seed), [], threading.Event()
    moments = sorted(rng.sample(range(len(missing)), min(n_kills, len(missing))))

    def kill() -> None:
        for moment in moments:
            while sum(map(worker.results.has, missing)) < moment:
                if ended.wait(0.05):
                    return
            while not ended.is_set():
                if (pid := find_busy(worker.results, missing)) is not None:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def find_busy(results: Results, keys: Sequence[str]) -> int | None:
    """Return the number of a process that is computing one of some units; None if none is."""
    claims = [path for folder in (results.root / "claims").glob("*") for path in folder.iterdir()]
    for path in sorted(claims, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:8]:
        key = f"sha256:{path.name.partition('.')[0]}"
        with contextlib.suppress(ValueError):
            pid = json.loads(path.read_text())["pid"]
            is_busy = key in keys and not results.has(key) and Path(f"/proc/{pid}").exists()
            if is_busy and pid != os.getpid():
                return int(pid)
    return None


def to_row(ledger: Ledger, n_killed: int, seconds: float) -> dict[str, Any]:
    return {
        "units": ledger.n_units,
        "finished": ledger.n_recorded,
        "finished_twice": ledger.n_repeated,
        "begun": ledger.n_begun,
        "begun_and_not_finished": ledger.n_abandoned,
        "killed": n_killed,
        "seconds": round(seconds, 1),
    }


def run_cards(bench: Bench, name: str, compute: Compute, n_kills: int) -> dict[str, Any]:
    """Vet every new expert beside all peers, and keep the cards; what is kept is not run again."""
    done = bench.work / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text())
    results, rows, keys = bench.work / f"results-{name}", [], set()
    for index, folder in enumerate(bench.newcomers):
        worker = PeerWorker(bench.job(folder, results), bench.loaded)
        share = n_kills // len(bench.newcomers) + (index < n_kills % len(bench.newcomers))
        start = time.perf_counter()
        with killing(worker, share, seed=index) as killed:
            card = bench.vet(folder, results, compute)
        keep = bench.work / f"cards-{name}"
        keep.mkdir(exist_ok=True)
        (keep / f"{folder.name}.json").write_bytes(card)
        keys |= {unit.key for group in worker.groups for unit in group}
        # Units of peers alone are those of earlier new experts, too.
        n_killed = len(killed) + (rows[-1]["killed"] if rows else 0)
        rows.append(to_row(worker.results.count(keys), n_killed, time.perf_counter() - start))
        print(f"{name}: up to {folder.name}: {rows[-1]}", flush=True)
    found = {"up to each new expert": rows}
    done.write_text(json.dumps(found))
    return found


def compare_cards(bench: Bench, name: str) -> int:
    """Return how many cards of a run have the bytes of the undisturbed run's."""
    return sum(
        (bench.work / f"cards-{name}" / f"{folder.name}.json").read_bytes()
        == (bench.work / "cards-undisturbed" / f"{folder.name}.json").read_bytes()
        for folder in bench.newcomers
    )


def time_engine(bench: Bench, compute: Compute, n_peers: int) -> dict[str, float]:
    """Return peers per second of an engine, with and without its start."""
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        job = bench.job(bench.newcomers[0], Path(folder), n_peers)
        worker = PeerWorker(job, bench.loaded)
        start = time.time()
        compute(worker)
        end = time.time()
        times = sorted(
            worker.results.where(unit.key).stat().st_mtime
            for group in worker.groups
            for unit in group
        )
    # From the tenth result on, every worker is at work.
    steady = (len(times) - 10) / 3 / (times[-1] - times[9])
    return {"whole": n_peers / (end - start), "steady": steady}


def run_engines(
    bench: Bench, engines: dict[str, Compute], n_peers: int, rounds: int
) -> list[dict[str, Any]]:
    """Time engines in turn; rounds that are done are not run again."""
    done = bench.work / "engines.json"
    rows = json.loads(done.read_text()) if done.exists() else []
    time_engine(bench, engines["pool"], n_peers)  # installs the peers, for all
    for number in range(len(rows), rounds):
        order = list(engines) if number % 2 == 0 else list(engines)[::-1]
        rows.append({name: time_engine(bench, engines[name], n_peers) for name in order})
        done.write_text(json.dumps(rows))
        print(f"round {number + 1}: {rows[-1]}", flush=True)
    return rows


def measure_units() -> dict[str, Any]:
    """Return seconds of a peer's units of tiny-bytes, of whole passes, and of their products."""
    loaded = load_backbone("tiny-bytes")
    anchor = vetted_texts(loaded.anchor)
    experts = [make_random(loaded, f"random-{seed}", seed) for seed in (1, 2)]
    peer = Peer(expert=experts[0], release="random-1@1.0.0", texts=tuple(anchor[::-1]))
    newcomer = experts[1]

    def run_whole() -> None:
        model = loaded.plug(capacity=4)
        for expert in (peer.expert, newcomer):
            model.install(expert)
            for texts in (peer.texts, anchor):
                score_documents(
                    mix_scorer(model), texts, context=model.context, max_bytes=MAX_BYTES
                )
        measure_evidence(model, anchor, max_bytes=MAX_BYTES)

    meter = PeerMeter(loaded.backbone, loaded.interface, anchor, tokenizer=loaded.tokenizer)

    def run_first() -> None:
        meter.own_trunk._outputs.clear()
        meter.measure_scout(peer.expert.scout)
        meter.score_alone(peer)
        meter.score_together(peer, newcomer)

    def run_later() -> None:
        meter.own_trunk._outputs.clear()
        meter.score_together(peer, newcomer)

    runs = {"whole passes": run_whole, "first newcomer": run_first, "later newcomer": run_later}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(4):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    tokens = sum(-(-max(map(len, texts)) // 512) for texts in (peer.texts, anchor)) * WINDOW_TOKENS
    work = count_flops(loaded, tokens)
    speed = measure_speed()
    return {
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "spread": {name: [min(found), max(found)] for name, found in seconds.items()},
        "tokens_per_pass_over_both_texts": tokens,
        "gflop": work / 1e9,
        "gflop_per_second": speed / 1e9,
        "floor_seconds": work / speed,
    }


def make_random(loaded: LoadedBackbone, name: str, seed: int) -> Pluggable:
    """Return an expert with a random change of the backbone's bodies."""
    expert = Expert(loaded.backbone, kind="ffn", rank=None, scout_width=64, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = nnx.state(expert)
    for _, leaf in nnx.to_flat_state(state):
        leaf[...] = leaf[...] + 0.02 * rng.normal(size=leaf[...].shape).astype(np.float32)
    nnx.update(expert, state)
    return Pluggable(name=name, body=expert.body, scout=expert.scout, key=seed)


def count_flops(loaded: LoadedBackbone, tokens: int) -> float:
    """Return what the unit `together` multiplies and adds at least: one body for each token.

    Layers above the tap, logits, and three scouts, on own text and public text; of own text the
    trunk is run as well.
    """
    cfg, interface = loaded.backbone.cfg, loaded.interface
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + cfg.n_kv_heads)
    scores = cfg.n_heads * cfg.d_head * min(cfg.context, 512)  # causal: half of the pairs, twice
    layer = attention + scores + 3 * cfg.d_model * cfg.d_ff
    scout = 64 * (cfg.d_model + interface.n_classes)
    upper = layer * len(cfg.slots) + cfg.vocab_size * cfg.d_model + 3 * scout
    return 2.0 * tokens * upper + 2.0 * tokens / 2 * layer * cfg.tap


def measure_speed() -> float:
    """Return floating-point operations per second of a large product of float32 matrices."""
    n = 2048
    x, multiply = jnp.ones((n, n), jnp.float32), jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def describe_machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def start_ray(n_workers: int) -> None:
    """Start a Ray node on this machine; on a busy one that takes minutes."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: others would run first
    import ray

    ray.init(
        num_cpus=n_workers,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
    )


def run_fleet(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    os.environ["COMPOSABLE_STORE"] = str(work / "store")
    bench, jobs = Bench(work, arguments.peers, arguments.newcomers), arguments.jobs

    def pool(worker: PeerWorker) -> None:
        compute_units(worker, bench.loaded, n_jobs=jobs)

    found: dict[str, Any] = {"peers": arguments.peers, "newcomers": arguments.newcomers}
    found["undisturbed"] = run_cards(bench, "undisturbed", pool, 0)
    found["killed"] = run_cards(bench, "killed", pool, arguments.kills)
    found["killed"]["identical_cards"] = compare_cards(bench, "killed")
    if "ray" in arguments.engines:
        start_ray(jobs)

        def on_ray(worker: PeerWorker) -> None:
            compute_on_ray(worker, jobs)

        found["ray_killed"] = run_cards(bench, "ray", on_ray, arguments.ray_kills)
        found["ray_killed"]["identical_cards"] = compare_cards(bench, "ray")
        engines = {"pool": pool, "ray": on_ray}
        n_timed = min(arguments.timed_peers, arguments.peers)
        rows = run_engines(bench, engines, n_timed, arguments.rounds)
        found["engines"] = {"peers": n_timed, "rounds": rows}
        for kind in ("steady", "whole"):
            ratios = [row["ray"][kind] / row["pool"][kind] for row in rows]
            found["engines"][f"ray_over_pool_{kind}"] = {
                "median": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder to keep what is done in")
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--newcomers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ray-kills", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="workers at once")
    parser.add_argument("--engines", nargs="+", default=["pool", "ray"], choices=["pool", "ray"])
    parser.add_argument("--timed-peers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--units", action="store_true", help="only the cost of units")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {"machine": describe_machine()}
    work = arguments.work or Path(tempfile.mkdtemp(prefix="review-fleet-"))
    try:
        found |= {"units": measure_units()} if arguments.units else run_fleet(arguments, work)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
