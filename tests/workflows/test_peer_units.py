"""Vetting beside many experts in units: the same card whoever computes them, and nothing twice."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from composable.assembly.backbones import load_backbone, save_backbone
from composable.assembly.experts import save_expert
from composable.corpora.documents import Document, write_documents
from composable.errors import VettingError
from composable.packaging.manifests.manifest import Manifest
from composable.vetting.evaluation import measure_evidence, mix_scorer, score_documents
from composable.vetting.evidence import vetted_texts
from composable.vetting.peers import vet_with_peers
from composable.workflows import peer_units, worker_pool
from composable.workflows.peer_units import PeerWorker, list_units, make_job
from composable.workflows.ray_workers import compute_on_ray
from composable.workflows.references import find_peers, list_peers
from composable.workflows.worker_pool import compute_units, count_processes, vet_in_units
from tests.conftest import EXPERT_TOML
from tests.support.tiny import PRIVATE_WORDS, PUBLIC_WORDS, router_of

NAMES = ("logic", "sets", "proofs", "lemmas")


@pytest.fixture(scope="module")
def untrained(tiny, tmp_path_factory):
    """Return a tiny backbone with random weights, as a package on disk."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    save_backbone(
        folder,
        tiny.backbone,
        name="tiny",
        version="1.0.0",
        anchor=[Document(f"public/{i}", tiny.text(PUBLIC_WORDS, seed=i)) for i in range(2)],
        router=router_of(tiny.interface),
        output_bounds=tiny.interface.output_bounds,
        texts={"README.md": "A tiny backbone.\n"},
        description="For tests.",
        license_="Apache-2.0",
    )
    return load_backbone(str(folder))


@pytest.fixture(scope="module")
def write(tiny, untrained, tmp_path_factory):
    """Return a function that writes an expert, with text of its own if it is to have any."""
    parent = tmp_path_factory.mktemp("experts")

    def write_one(name, *, has_text=True, kind="ffn"):
        folder = parent / name
        if folder.exists():
            return folder
        folder.mkdir()
        text = EXPERT_TOML.format(name=name)
        if kind == "lora":
            text = text.replace('kind = "ffn"', 'kind = "lora"\nrank = 4')
        (folder / "expert.toml").write_text(text)
        rank = 4 if kind == "lora" else None
        save_expert(folder, tiny.expert(name, kind=kind, rank=rank), Manifest.read(folder))
        if has_text:
            (folder / "text").mkdir()
            documents = [
                Document(
                    f"{name}/{i}", tiny.text(PRIVATE_WORDS, seed=i + sum(name.encode()), length=90)
                )
                for i in range(2)
            ]
            write_documents(folder / "text" / "heldout.jsonl", documents)
        return folder

    return write_one


@pytest.fixture(scope="module")
def folders(write):
    return [
        str(write(name, has_text=name != "sets", kind="lora" if name == "lemmas" else "ffn"))
        for name in NAMES
    ]


@pytest.fixture(scope="module")
def newcomer(write):
    return write("newcomer")


@pytest.fixture
def make(untrained, folders, newcomer, tmp_path):
    """Return a function that makes a job; by default the newcomer's, in an empty folder."""

    def run(folder=newcomer, results=tmp_path / "results", wanted=folders, **fields):
        peers = list_peers(untrained, folder.name, wanted, {})
        return make_job(untrained, folder, peers, results=results, **fields)

    return run


@pytest.fixture(scope="module")
def straight(untrained, folders, newcomer):
    """Return checks and figures as one process measures them, without a folder of results."""
    peers = find_peers(untrained, "newcomer", folders, {})
    (own,) = find_peers(untrained, "any", [str(newcomer)], {})
    return vet_with_peers(
        untrained.backbone,
        untrained.interface,
        own.expert,
        peers,
        vetted_texts(untrained.anchor),
        tokenizer=untrained.tokenizer,
    )


def count(worker):
    return worker.results.count(unit.key for group in worker.groups for unit in group)


@pytest.mark.bits
def test_a_unit_has_the_bits_of_installing_both_in_one_model(untrained, folders, make, newcomer):
    """The scores of whole passes of the model, and every scout's log-probabilities."""
    (peer,) = find_peers(untrained, "newcomer", folders[:1], {})
    (own,) = find_peers(untrained, "any", [str(newcomer)], {})
    anchor = vetted_texts(untrained.anchor)
    model = untrained.plug(capacity=4)
    expected = {}
    for kind, added in (("alone", peer.expert), ("together", own.expert)):
        model.install(added)
        expected[kind] = {
            name: score_documents(mix_scorer(model), texts, context=model.context, max_bytes=1024)
            for name, texts in (("own", peer.texts), ("anchor", anchor))
        }
    evidence_EM = measure_evidence(model, anchor, max_bytes=1024)
    worker = PeerWorker(make(wanted=folders[:1]), untrained)
    worker.run()
    scouts, (scout, *scored) = worker.groups
    for unit in scored:
        found = peer_units._decode_scores(worker._read(unit))
        for name, score in expected[unit.kind].items():
            np.testing.assert_array_equal(
                found[name].nats_B.view(np.int64), score.nats_B.view(np.int64)
            )
    names = ("backbone", "newcomer", "logic")
    for unit, name in zip((*scouts, scout), names, strict=True):
        found_M = peer_units._decode_evidence(worker._read(unit))
        np.testing.assert_array_equal(found_M, evidence_EM[model.names.index(name)])


def test_units_make_the_card_that_one_process_makes(untrained, make, straight):
    assert vet_in_units(make(), untrained, n_jobs=1) == straight


def test_a_later_newcomer_finds_what_depends_on_its_peers_alone(untrained, make, write):
    first = PeerWorker(make(), untrained)
    n_peers = len(first.job.peers)
    assert first.run() == 2 + 3 * n_peers
    assert PeerWorker(make(), untrained).run() == 0
    second = PeerWorker(make(write("late")), untrained)
    assert second.run() == 1 + n_peers


def test_the_trunk_runs_once_for_a_text(untrained, make):
    """Of public text for the tap and for the features, whoever asks; of own text once per peer."""
    first = PeerWorker(make(), untrained)
    first.run()
    n_windows = 3  # of 128 tokens, in 300 bytes
    assert first.trunk.n_passes == 2 * n_windows
    longest = [max(map(len, peer.texts), default=0) for peer in first.job.peers]
    assert first._meter.own_trunk.n_passes == sum(-(-n_bytes // 128) for n_bytes in longest)
    other = PeerWorker(make(), untrained)
    shutil.rmtree(other.results.root / "records")
    shutil.rmtree(other.results.root / "claims")
    other.run()
    assert other.trunk.n_passes == 0, "it was on disk"


def test_parts_and_then_the_rest(untrained, make, straight):
    """Each part computes its own; the whole finds them, and computes what a part left."""
    shares = [make(share=(part, 3)) for part in (1, 2, 3)]
    computed = [PeerWorker(job, untrained).run() for job in shares[:2]]
    assert computed == [2 + 3 * 2, 3]
    whole = PeerWorker(make(), untrained)
    assert whole.count_done() == 4
    compute_units(whole, untrained, n_jobs=1)
    assert whole.gather() == straight
    assert PeerWorker(shares[2], untrained).run() == 0
    ledger = count(whole)
    assert ledger.n_begun == ledger.n_recorded == ledger.n_units


CHANGES = {
    "interface": lambda job: {"interface": "sha256:1"},
    "the newcomer's tensors": lambda job: {"tensors": {**job.tensors, "body.safetensors": "x"}},
    "the peer's tensors": lambda job: {
        "peers": (
            dataclasses.replace(
                job.peers[0], tensors={**job.peers[0].tensors, "body.safetensors": "x"}
            ),
        )
    },
    "the peer's text": lambda job: {"peers": (dataclasses.replace(job.peers[0], texts=(b"x",)),)},
    "the order of their keys": lambda job: {
        "peers": (
            dataclasses.replace(
                job.peers[0],
                manifest="sha256:" + ("0" if job.manifest < job.peers[0].manifest else "f") * 64,
            ),
        )
    },
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_unit_is_named_by_all_that_decides_it(make, folders, what):
    job = make(wanted=folders[:1])
    changed = dataclasses.replace(job, **CHANGES[what](job))

    def key(job, anchor=(b"public",), window=128):
        return list_units(job, anchor, window)[-1][-1].key

    assert key(job) == key(dataclasses.replace(job, results="elsewhere", folder="elsewhere"))
    assert key(job) != key(changed)
    assert key(job) != key(job, anchor=(b"other",))
    assert key(job) != key(job, window=64)


def test_a_rule_that_changes_renames_every_unit(make, monkeypatch):
    def keys():
        return {unit.key for group in list_units(make(), [b"public"], 128) for unit in group}

    before = keys()
    monkeypatch.setattr(peer_units, "RULES", peer_units.RULES + 1)
    assert not before & keys()


def test_tensors_that_change_meanwhile_are_refused(untrained, make, write, newcomer, tmp_path):
    moved = shutil.copytree(newcomer, tmp_path / "newcomer")
    peer = shutil.copytree(write("logic"), tmp_path / "logic")
    jobs = [make(moved, wanted=[str(peer)]) for _ in range(2)]
    shutil.copy(write("sets") / "body.safetensors", peer)
    with pytest.raises(VettingError, match="changed while the expert was vetted with"):
        PeerWorker(jobs[0], untrained).run()
    shutil.copy(write("logic") / "body.safetensors", peer)
    shutil.copy(write("sets") / "body.safetensors", moved)
    with pytest.raises(VettingError, match="changed while it was vetted"):
        PeerWorker(jobs[1], untrained).run()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not a valid UnitRecord"),
        (b'{"unit": "sha256:1", "kind": "alone", "scores": {}}', "of another unit, sha256:1"),
    ],
)
def test_a_damaged_result_is_named(untrained, make, data, message):
    worker = PeerWorker(make(), untrained)
    worker.run()
    path = worker.results.where(worker.groups[1][1].key)
    path.chmod(0o600)
    path.write_bytes(data)
    with pytest.raises(VettingError, match=message) as error:
        worker.gather()
    assert error.value.where == str(path)
    assert str(path) in error.value.hint


def test_scores_of_an_expert_that_breaks_the_model_are_kept(make):
    nats = peer_units._decode_scores(
        peer_units.UnitRecord(
            unit="",
            kind="alone",
            scores={
                "own": peer_units.UnitScore(nats=("nan", "inf", (0.1).hex()), n_bytes=(1, 2, 3))
            },
        )
    )["own"].nats_B
    np.testing.assert_array_equal(nats, [np.nan, np.inf, 0.1])


def test_no_more_processes_than_cores_memory_and_peers(untrained, monkeypatch):
    monkeypatch.setattr(worker_pool, "_count_cores", lambda: 64)
    monkeypatch.setattr(worker_pool, "available_memory", lambda: 8 << 30)
    assert count_processes(untrained, 1000) in range(5, 12)
    assert count_processes(untrained, 3) == 3
    monkeypatch.setattr(worker_pool, "available_memory", lambda: 1 << 20)
    assert count_processes(untrained, 1000) == 1


def test_a_pool_of_which_one_is_killed_makes_the_same_card(untrained, make, straight):
    """No unit is finished twice; what the killed process had begun is begun again."""
    worker, killed = PeerWorker(make(), untrained), []

    def kill_one():
        while count(worker).n_begun == 0:
            time.sleep(0.01)
        killed.extend(it.pid for it in multiprocessing.active_children()[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    compute_units(worker, untrained, n_jobs=2)
    killer.join()
    assert worker.gather() == straight
    ledger = count(worker)
    assert (ledger.n_recorded, ledger.n_repeated) == (ledger.n_units, 0)
    assert ledger.n_abandoned <= len(killed) == 1


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_of_which_a_worker_is_killed_makes_the_same_card(
    untrained, make, straight, monkeypatch
):
    """On a node on this machine; not a part of CI, whose environment has no Ray."""
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    ray = pytest.importorskip("ray")
    worker, killed = PeerWorker(make(), untrained), []

    def kill_one():
        while not killed:
            for path in (worker.results.root / "claims").rglob("*.0"):
                if text := path.read_text():
                    killed.append(json.loads(text)["pid"])
                    break
            time.sleep(0.01)
        os.kill(killed[0], signal.SIGKILL)

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        compute_on_ray(worker, 2)
        broken = PeerWorker(make(results=worker.results.root / "other"), untrained)
        broken.job = dataclasses.replace(broken.job, interface="sha256:1")
        with pytest.raises(VettingError, match="another backbone than the job's"):
            compute_on_ray(broken, 1)
    finally:
        killer.join()
        ray.shutdown()
    assert worker.gather() == straight
    ledger = count(worker)
    assert (ledger.n_recorded, ledger.n_repeated) == (ledger.n_units, 0)
    assert ledger.n_abandoned <= len(killed) == 1


def test_an_error_of_a_process_is_raised_where_it_was_started(make, newcomer, tmp_path):
    job = dataclasses.replace(make(), interface="sha256:1")
    process = worker_pool._Process(job, 1)
    process.process.join()
    assert process.process.exitcode == 1
    with pytest.raises(VettingError, match="another backbone than the job's"):
        process.raise_error()
