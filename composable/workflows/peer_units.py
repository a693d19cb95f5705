"""Vetting beside published experts, in units that any number of processes share.

Three kinds of unit are independent of each other, so any process may compute any of them:

    scout     what a scout predicts of public text: of the new expert, of each peer, of the backbone
    alone     the scores of a peer's own text and of public text, with the peer alone
    together  the same scores with the new expert installed as well

The first two depend on one expert each, so later vettings find them done. A unit is named by the
digest of all that decides its result: rules, versions, interface, tensors, texts. Results are kept
in a folder (`files/results.py`), and a card that is put together from them has the bits of one that
a single process measured.

Deliberately not here: how processes are started (`worker_pool.py`, `ray_workers.py`), and limits,
which are applied to the results.
"""

from __future__ import annotations

import base64
import os
import random
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import jax
import numpy as np
import platformdirs

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import key_of, load_expert
from composable.errors import VettingError
from composable.files.records import format_record, parse_record
from composable.files.results import LEASE_SECONDS, Results
from composable.interface import canonical_json, digest_bytes
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import SCOUT_FILE, Manifest
from composable.progress import CountProgress
from composable.vetting.card import Check, tensor_digests
from composable.vetting.evaluation import BATCH, Score
from composable.vetting.evidence import MAX_BYTES, vetted_texts
from composable.vetting.peers import Effect, Peer, PeerMeter, correlate_scouts, judge_effects
from composable.workflows.references import PeerRelease, load_peer
from composable.workflows.trunk_cache import StoredTrunk

# Raise it with every change that may change a bit of a result.
RULES: Final = 1
# Experts of a unit that are no peers.
NEWCOMER, BACKBONE = -1, -2
_TRUNK: Final = "trunk"
_POLL_SECONDS: Final = 0.2

Kind = Literal["scout", "alone", "together"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One measurement.

    Args:
        kind: What is measured.
        key: Digest of all that decides the result.
        expert: Whose it is: the index of a peer in the job, `NEWCOMER` or `BACKBONE`.
    """

    kind: Kind
    key: str
    expert: int


@dataclass(frozen=True, kw_only=True)
class UnitScore:
    """Scores of some documents, as `Score` has them.

    Args:
        nats: Negative log-likelihood of each document in nats, as `float.hex` writes it: every bit,
            and infinities.
        n_bytes: UTF-8 bytes of each document.
    """

    nats: tuple[str, ...]
    n_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """The result of a unit.

    Args:
        unit: Digest of the unit.
        kind: Its kind.
        scores: By kind of text, `own` and `anchor`; of a scout none.
        evidence: Of a scout: its log-probability of each token of public text in nats, as float32
            in base64.
        device: Where it was computed.
        seconds: How long that took.
    """

    unit: str
    kind: Kind
    scores: dict[str, UnitScore]
    evidence: str = ""
    device: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PeerJob:
    """An expert to vet beside others: all that a process needs to work on it.

    Args:
        backbone: Folder of the backbone.
        interface: Digest of its interface.
        folder: Folder of the new expert.
        tensors: Digests of its tensor files, by name.
        manifest: Digest of its manifest.
        peers: The published experts.
        registry: Registry to load them from; by default as for `load`.
        results: Folder of the results.
        lease_seconds: How long a process may be silent before others take over its unit.
        share: Which part of the peers to work on, and of how many; all of them by default.
    """

    backbone: str
    interface: str
    folder: str
    tensors: dict[str, str]
    manifest: str
    peers: tuple[PeerRelease, ...]
    registry: str | None
    results: str
    lease_seconds: float = LEASE_SECONDS
    share: tuple[int, int] = (1, 1)


def make_job(
    loaded: LoadedBackbone,
    folder: Path,
    peers: Sequence[PeerRelease],
    *,
    registry: str | None = None,
    results: Path | None = None,
    lease_seconds: float = LEASE_SECONDS,
    share: tuple[int, int] = (1, 1),
) -> PeerJob:
    """Return the job of vetting an expert beside others.

    Args:
        loaded: The backbone.
        folder: The expert, trained.
        peers: What `list_peers` returned.
        registry: The registry it was given.
        results: Folder of the results; by default one in the user's cache.
        lease_seconds: How long a process may be silent before others take over its unit.
        share: Which part of the peers to work on, from 1, and of how many.
    """
    manifest = Manifest.read(folder)
    return PeerJob(
        backbone=str(loaded.folder.absolute()),
        interface=loaded.interface.digest,
        folder=str(folder.absolute()),
        tensors=tensor_digests(folder),
        manifest=manifest.digest,
        peers=tuple(peers),
        registry=_anchor(registry),
        results=str((results or default_results()).absolute()),
        lease_seconds=lease_seconds,
        share=share,
    )


def _anchor(registry: str | None) -> str | None:
    """Return the location of a registry for processes in other folders."""
    if registry is None or "://" in registry:
        return registry
    return str(Path(registry).expanduser().absolute())


def default_results() -> Path:
    """Return the folder that results are kept in by default."""
    return Path(platformdirs.user_cache_dir("composable", appauthor=False)) / "vetting"


def list_units(job: PeerJob, anchor: Sequence[bytes], window: int) -> list[list[Unit]]:
    """Return the units of a job's share; those in one list need the same expert.

    Args:
        job: The job.
        anchor: Public text.
        window: Longest sequence of the model, in tokens.
    """
    part, n_parts = job.share
    common = {
        "rules": RULES,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "interface": job.interface,
        "scoring": {"max_bytes": MAX_BYTES, "batch": BATCH, "window": window},
        "anchor": [digest_bytes(text) for text in anchor],
    }

    def make(kind: Kind, expert: int, **what: Any) -> Unit:
        key = digest_bytes(canonical_json({**common, "kind": kind, **what}))
        return Unit(kind=kind, key=key, expert=expert)

    newcomer, groups = dict(job.tensors), []
    if part == 1:
        groups.append(
            [
                make("scout", BACKBONE, scout="backbone"),
                make("scout", NEWCOMER, scout=newcomer[SCOUT_FILE]),
            ]
        )
    for index in range(part - 1, len(job.peers), n_parts):
        peer = job.peers[index]
        alone = {"peer": dict(peer.tensors), "own": [digest_bytes(text) for text in peer.texts]}
        # Sums over experts run in the order of their keys.
        is_first = key_of(job.manifest) < key_of(peer.manifest)
        groups.append(
            [
                make("scout", index, scout=peer.tensors[SCOUT_FILE]),
                make("alone", index, **alone),
                make("together", index, **alone, newcomer=newcomer, is_newcomer_first=is_first),
            ]
        )
    return groups


class PeerWorker:
    """One process at work on a job; several may run at once, on any machines.

    Args:
        job: The job.
        loaded: The backbone, if it is in memory already.

    Raises:
        PackagingError: If the backbone cannot be loaded.
        VettingError: If the backbone is another one than the job's.
    """

    def __init__(self, job: PeerJob, loaded: LoadedBackbone | None = None) -> None:
        self.job = job
        self._loaded = loaded or load_backbone(job.backbone)
        if self._loaded.interface.digest != job.interface:
            raise VettingError("another backbone than the job's", where=job.backbone)
        anchor = vetted_texts(self._loaded.anchor)
        self.results = Results(Path(job.results), lease_seconds=job.lease_seconds)
        self.trunk = StoredTrunk(self._loaded, self.results.root / _TRUNK)
        self._meter = PeerMeter(
            self._loaded.backbone,
            self._loaded.interface,
            anchor,
            tokenizer=self._loaded.tokenizer,
            trunk=self.trunk,
        )
        self.groups = list_units(job, anchor, self._loaded.backbone.cfg.context)
        self._open = self.groups
        self._peer: tuple[int, Peer] | None = None

    def run(self, progress: CountProgress | None = None) -> int:
        """Compute what has no result yet, until every unit of the share has one.

        Args:
            progress: Called with the number of peers done and in all.

        Returns:
            The number of units that this process computed.

        Raises:
            PackagingError: If an expert cannot be installed or loaded.
            VettingError: If its tensors changed since the job was made.
        """
        # Processes that start together begin at different places.
        first = random.Random(os.urandom(8)).randrange(len(self.groups) or 1)
        left, n_computed = self.groups[first:] + self.groups[:first], 0
        while left:
            n_before, waiting = n_computed, []
            for number, group in enumerate(left, start=1):
                n_computed += sum(map(self._run_unit, group))
                if not self._is_done(group):
                    waiting.append(group)
                if progress:
                    done = len(self.groups) - len(left) + number - len(waiting)
                    progress(done, len(self.groups))
            left = waiting
            if left and n_computed == n_before:
                time.sleep(_POLL_SECONDS)  # others are at work on them
        return n_computed

    def count_done(self) -> int:
        """Return the number of groups of units that have all results."""
        self._open = [group for group in self._open if not self._is_done(group)]
        return len(self.groups) - len(self._open)

    def gather(self) -> tuple[list[Check], dict[str, Any]]:
        """Return the checks and figures of all peers, as `vet_with_peers`.

        Raises:
            VettingError: If a result is missing or damaged.
        """
        (backbone, newcomer), *groups = (list(map(self._read, group)) for group in self.groups)
        backbone_M, own_M = map(_decode_evidence, (backbone, newcomer))
        effects = [
            Effect(
                before=_decode_scores(alone),
                after=_decode_scores(together),
                correlation=correlate_scouts(own_M, _decode_evidence(scout), backbone_M),
            )
            for scout, alone, together in groups
        ]
        return judge_effects(self.job.peers, effects)

    @cached_property
    def _newcomer(self) -> Pluggable:
        folder = Path(self.job.folder)
        if tensor_digests(folder) != self.job.tensors:
            raise VettingError("the tensors changed while it was vetted", where=str(folder))
        return load_expert(self._loaded, folder)

    def _load_peer(self, index: int) -> Peer:
        if self._peer is None or self._peer[0] != index:
            self._peer = None  # its memory first
            job = self.job
            self._peer = index, load_peer(self._loaded, job.peers[index], registry=job.registry)
        return self._peer[1]

    def _is_done(self, group: Sequence[Unit]) -> bool:
        return all(self.results.has(unit.key) for unit in group)

    def _run_unit(self, unit: Unit) -> bool:
        """Compute a unit, unless it has a result or another process is at work on it."""
        if self.results.has(unit.key):
            return False
        with self.results.claim(unit.key) as claim:
            if claim is None:
                return False
            start = time.perf_counter()
            measured = self._measure(unit)
            record = UnitRecord(
                unit=unit.key,
                kind=unit.kind,
                device=jax.devices()[0].device_kind,
                seconds=round(time.perf_counter() - start, 3),
                **measured,
            )
            self.results.put(claim, format_record(record).encode())
        return True

    def _measure(self, unit: Unit) -> dict[str, Any]:
        """Return the fields of a unit's record that hold its result."""
        if unit.kind == "scout":
            if unit.expert == BACKBONE:
                scout = self._loaded.backbone.scout
            elif unit.expert == NEWCOMER:
                scout = self._newcomer.scout
            else:
                scout = self._load_peer(unit.expert).expert.scout
            evidence_M = self._meter.measure_scout(scout).astype("<f4")
            return {"scores": {}, "evidence": base64.b64encode(evidence_M.tobytes()).decode()}
        peer = self._load_peer(unit.expert)
        if unit.kind == "alone":
            scores = self._meter.score_alone(peer)
        else:
            scores = self._meter.score_together(peer, self._newcomer)
        return {
            "scores": {
                kind: UnitScore(
                    nats=tuple(float(x).hex() for x in score.nats_B),
                    n_bytes=tuple(map(int, score.n_bytes_B)),
                )
                for kind, score in scores.items()
            }
        }

    def _read(self, unit: Unit) -> UnitRecord:
        """Return the record of a unit."""
        data, where = self.results.read(unit.key), str(self.results.where(unit.key))
        hint = f"remove it and run the command again: rm {shlex.quote(where)}"
        if data is None:
            raise VettingError("the result is missing", where=where)
        try:
            record = parse_record(UnitRecord, data, where, VettingError)
        except VettingError as error:
            raise VettingError(error.message, where=where, hint=hint) from error
        if (record.unit, record.kind) != (unit.key, unit.kind):
            raise VettingError(f"the result of another unit, {record.unit}", where=where, hint=hint)
        return record


def _decode_evidence(record: UnitRecord) -> np.ndarray:
    evidence_M = np.frombuffer(base64.b64decode(record.evidence), "<f4")
    return evidence_M.astype(np.float64)


def _decode_scores(record: UnitRecord) -> dict[str, Score]:
    return {
        kind: Score(np.array([float.fromhex(text) for text in score.nats]), np.array(score.n_bytes))
        for kind, score in record.scores.items()
    }
