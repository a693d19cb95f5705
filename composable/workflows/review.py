"""Review a proposal: everything it claims is measured again, here, on the maintainer's own text.

The verdict is a record without times and without paths: the same proposal, registry and text give
the same bytes. It names all that it was made from, so that a later change of any of it shows.
Nothing is decided here; that is in `accept.py`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.assembly.load import install_experts
from composable.corpora.documents import read_documents
from composable.errors import InterfaceError, ManifestError, MergeError, ProposalError, TextError
from composable.files import atomic
from composable.files.reading import read_bytes
from composable.files.records import format_record, parse_record
from composable.interface import RouterInterface, digest_bytes
from composable.merging.methods import METHODS
from composable.packaging.install.proposals import fetch_proposal
from composable.packaging.manifests.licenses import covers_license
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    STATISTICS_FILE,
    Manifest,
    Training,
)
from composable.packaging.registry.compatibility import Bump, Change, next_version
from composable.packaging.registry.inbox import Inbox, Received
from composable.packaging.registry.registry import Registry
from composable.packaging.trust.proposal import Proposal
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version
from composable.progress import CountProgress
from composable.vetting.card import Check, tensor_digests
from composable.vetting.checks import Verdict, figure
from composable.vetting.evaluation import Score
from composable.vetting.evidence import vetted_texts
from composable.vetting.probes import vet_triggers
from composable.vetting.statistics import ratio_interval
from composable.workflows.merge import merge_experts
from composable.workflows.peer_units import PeerWorker, make_job
from composable.workflows.references import (
    ALL,
    PeerRelease,
    PreviousRelease,
    compare_releases,
    find_newest,
    find_previous,
    list_peers,
)
from composable.workflows.vet import VetPeers, check_expert
from composable.workflows.worker_pool import compute_units, vet_in_units

VERDICT_FILE: Final = "verdict.json"
# What a proposal was merged to, beside the verdict on it.
MERGED: Final = "merged"
SCHEMA: Final = 1
# The folder of what is merged, while it is.
_SIDES: Final = ".sides"
# The check that nothing is worse than in the newest release.
AGAINST: Final = "against"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a verdict was made from.

    Args:
        backbone: Name of the backbone.
        interface: Digest of its router interface.
        releases: The published releases that it was compared with: of the expert itself the
            newest one, and of every peer; by name, as `VERSION MANIFEST-DIGEST`.
        texts: Digests of the texts that were scored, by name: `own`, `anchor`, and peers'.
    """

    backbone: str
    interface: str
    releases: dict[str, str]
    texts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DocumentBits:
    """Bits per byte of one document of the maintainer's text.

    Args:
        backbone: With the backbone alone.
        base: With the base in mix mode.
        proposed: With the proposed expert in mix mode.
    """

    backbone: float | None
    base: float | None
    proposed: float | None


@dataclass(frozen=True, kw_only=True)
class ReviewVerdict:
    """The outcome of a review.

    Args:
        schema: Version of this record.
        proposal: The proposal's id.
        name: The expert.
        base: The release that it is a change of, `NAME@VERSION`.
        base_manifest: Digest of that release's manifest.
        onto: The newest release. If it is another one than the base, what was vetted is the merge
            of both.
        manifest: Digest of the manifest that was vetted.
        proposer: The public key that signed it; empty if unsigned.
        passed: Whether every check passed.
        summary: The outcome in words.
        checks: The checks.
        warnings: What is suspicious but fails no check, in words.
        needs: The version bump that the changes need.
        version: The lowest version after the base that permits them.
        changes: The changes that dependents can notice.
        regressions: What is worse than in the base beyond noise, in words.
        tensors: Digests of the tensor files that were vetted.
        measured: The figures behind the checks.
        documents: The figures of each document of the maintainer's text.
        inputs: What it was made from.
    """

    schema: int = SCHEMA
    proposal: str
    name: str
    base: str
    base_manifest: str
    onto: str
    manifest: str
    proposer: str
    passed: bool
    summary: str
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    needs: Bump
    version: str
    changes: tuple[Change, ...]
    regressions: tuple[str, ...]
    tensors: dict[str, str]
    measured: dict[str, Any]
    documents: tuple[DocumentBits, ...]
    inputs: Inputs

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if not check.passed]


def review_proposal(
    loaded: LoadedBackbone,
    inbox: Inbox,
    received: Received,
    folder: Path,
    data: Sequence[Path],
    *,
    beside: Sequence[str] = (ALL,),
    texts: Mapping[str, Path] | None = None,
    registry: str,
    results: Path | None = None,
    n_jobs: int | None = None,
    progress: CountProgress | None = None,
) -> ReviewVerdict:
    """Vet a proposal with evidence that is measured here.

    Args:
        loaded: The backbone.
        inbox: Where the proposal is.
        received: The proposal.
        folder: An empty folder; the proposed expert is rebuilt in it.
        data: Text of the expert's domain that its proposer does not have.
        beside: Published experts to install it with: requirements, or `all`.
        texts: Held-out text of those, by name.
        registry: Location of the registry.
        results: Folder of what is measured with other experts; by default one in the user's cache.
        n_jobs: Processes that measure it; by default what cores and memory allow.
        progress: Called with the number of passes over text done and in all.

    Raises:
        ProposalError: If the proposal was changed since it was made, or cannot be rebuilt.
        ManifestError: If it is not a change of its base.
        TextError: If there is no text.
    """
    if not data:
        raise TextError(
            "there is no text to review on",
            where="--data",
            hint="give text of the expert's domain that its proposer does not have",
        )
    proposal = received.proposal
    assert proposal is not None
    source = inbox.registry
    manifest = _unpack(folder, fetch_proposal(inbox, received, folder))
    onto = _find_onto(source, loaded.interface, proposal)
    conflict = None
    if onto != proposal.base_release:
        conflict = merge_onto(loaded, folder, proposal, onto, data, registry=registry)
        manifest = Manifest.read(folder)
    compared = proposal.base_release if conflict else onto
    previous = find_previous(loaded, folder, compared, registry=registry)
    peers = _list_peers(loaded, manifest, beside, texts, registry)
    job = make_job(loaded, folder, peers, registry=registry, results=results)
    vet_peers = partial(vet_in_units, job, loaded, n_jobs) if peers else None
    vetted = _vet(loaded, folder, data, vet_peers, previous, progress)
    step = compare_releases(folder, loaded.interface, previous, vetted)
    checks = (
        _check_provenance(source, manifest, proposal),
        _check_license(previous.manifest, manifest),
        *vetted.checks,
        *_check_against(compared, vetted),
        _check_base(proposal.base_release, onto, conflict),
    )
    passed = all(check.passed for check in checks)
    warnings = (*_find_warnings(inbox, received), *vetted.warnings)
    return ReviewVerdict(
        proposal=received.id,
        name=manifest.name,
        base=proposal.base_release,
        base_manifest=proposal.base_manifest,
        proposer=proposal.key,
        passed=passed,
        onto=onto,
        manifest=manifest.digest,
        summary=_summarise(compared, step.needed, str(step.version), checks, vetted),
        checks=checks,
        warnings=warnings,
        needs=step.needed,
        version=str(step.version),
        changes=step.changes,
        regressions=vetted.regressions or (),
        tensors=tensor_digests(folder),
        measured=vetted.measured,
        documents=tuple(_list_documents(vetted)),
        inputs=Inputs(
            backbone=loaded.interface.name,
            interface=loaded.interface.digest,
            releases=list_releases(
                source, loaded.interface, [manifest.name, *(peer.name for peer in peers)]
            ),
            texts={
                "own": str(vetted.measured.get("documents", {}).get("own_digest", "")),
                "anchor": loaded.interface.anchor,
                **{peer.name: digest_bytes(b"\0".join(peer.texts)) for peer in peers if peer.texts},
            },
        ),
    )


def measure_share(
    loaded: LoadedBackbone,
    inbox: Inbox,
    received: Received,
    folder: Path,
    *,
    share: tuple[int, int],
    beside: Sequence[str] = (ALL,),
    texts: Mapping[str, Path] | None = None,
    registry: str,
    results: Path,
    n_jobs: int | None = None,
    progress: CountProgress | None = None,
) -> PeerWorker:
    """Measure a part of what a review measures with other experts; arguments as there.

    Args:
        loaded: The backbone.
        inbox: Where the proposal is.
        received: The proposal.
        folder: An empty folder; the proposed expert is rebuilt in it.
        share: Which part of the experts, from 1, and of how many.
        beside: Published experts to install it with.
        texts: Held-out text of those, by name.
        registry: Location of the registry.
        results: Folder of the results.
        n_jobs: Processes.
        progress: Called with the number of experts done and in all.
    """
    manifest = _unpack(folder, fetch_proposal(inbox, received, folder))
    peers = _list_peers(loaded, manifest, beside, texts, registry)
    job = make_job(loaded, folder, peers, registry=registry, results=results, share=share)
    worker = PeerWorker(job, loaded)
    compute_units(worker, loaded, n_jobs=n_jobs, progress=progress)
    return worker


def list_releases(
    source: Registry, interface: RouterInterface, names: Sequence[str]
) -> dict[str, str]:
    """Return the newest fitting release of each expert, as a verdict records it.

    Args:
        source: The registry.
        interface: The backbone's contract.
        names: The experts; one that has no fitting release is left out.
    """
    newest = {name: find_newest(source, name, interface) for name in sorted(names)}
    return {
        name: f"{release.version} {release.manifest}"
        for name, release in newest.items()
        if release is not None
    }


def write_verdict(folder: Path, verdict: ReviewVerdict, expert: Path) -> Path:
    """Write a verdict into a folder, and the expert if it was merged; return the verdict's path.

    Args:
        folder: Where to write.
        verdict: The verdict.
        expert: Folder of the expert that was vetted.
    """
    if verdict.onto != verdict.base and verdict.passed:
        atomic.make_directory(folder / MERGED)
        for name in (EXPERT_FILE, BODY_FILE, SCOUT_FILE):
            shutil.copyfile(expert / name, folder / MERGED / name)
    path = folder / VERDICT_FILE
    atomic.write_text(path, format_record(verdict))
    return path


def read_verdict(path: Path) -> tuple[ReviewVerdict, str]:
    """Return a verdict and its digest.

    Args:
        path: The file, or the folder that `composable review` wrote.

    Raises:
        ProposalError: If there is none, or it is not one.
    """
    path = path / VERDICT_FILE if path.is_dir() else path
    try:
        data = read_bytes(path)
    except FileNotFoundError as error:
        raise ProposalError(
            "no verdict", where=str(path), hint="review the proposal first, or give --verdict DIR"
        ) from error
    return parse_record(ReviewVerdict, data, str(path), ProposalError), digest_bytes(data)


def _list_peers(
    loaded: LoadedBackbone,
    manifest: Manifest,
    beside: Sequence[str],
    texts: Mapping[str, Path] | None,
    registry: str,
) -> list[PeerRelease]:
    """Return the experts to install a proposed one with."""
    found = list_peers(
        loaded,
        manifest.name,
        beside,
        texts or {},
        derives_from=manifest.derives_from,
        registry=registry,
    )
    # The path of a text differs from one machine to another; its digest is in the inputs.
    return [dataclasses.replace(peer, source=Path(peer.source).name) for peer in found]


def merge_onto(
    loaded: LoadedBackbone,
    folder: Path,
    proposal: Proposal,
    onto: str,
    data: Sequence[Path],
    *,
    registry: str,
) -> str | None:
    """Merge a proposal with the release that was published since, in place.

    Args:
        loaded: The backbone.
        folder: The proposed expert, unpacked; the merged one takes its place.
        proposal: The proposal.
        onto: The newest release.
        data: The maintainer's text, on which methods are compared.
        registry: Location of the registry.

    Returns:
        Why they do not merge; None if they did.
    """
    sides = folder / _SIDES
    base, newest = (
        _copy_release(loaded, release, sides / name, registry)
        for release, name in ((proposal.base_release, "base"), (onto, "newest"))
    )
    proposed, out = sides / "proposed", sides / "merged"
    shutil.copytree(folder, proposed, ignore=shutil.ignore_patterns(_SIDES))
    manifest = Manifest.read(folder)
    # What was published between base and newest release is one change of the base here; and the
    # two sides need versions of their own.
    version = next_version(Manifest.read(newest).version, "patch")
    _edit(newest, derives_from=proposal.base_release)
    _edit(proposed, version=version)
    try:
        report = merge_experts(
            loaded,
            base,
            [newest, proposed],
            out,
            texts={"your text": read_documents(data)},
            methods=METHODS,
        )
    except MergeError as error:
        shutil.rmtree(sides)
        return error.message
    merged, old, newer = (Manifest.read(place) for place in (out, base, newest))
    is_described = manifest.description != old.description
    how = "; ".join(f"{part}: {choice}" for part, choice in report.chosen.items())
    for name in (BODY_FILE, SCOUT_FILE):
        shutil.copyfile(out / name, folder / name)
    (folder / STATISTICS_FILE).unlink(missing_ok=True)  # it was that of the proposal alone
    kept = dataclasses.replace(
        merged,
        version=manifest.version,
        description=manifest.description if is_described else newer.description,
        derives_from=onto,
        merges=(),
        training=Training(data=f"Merged from {onto} and a proposal ({how})."),
    )
    atomic.write_text(folder / EXPERT_FILE, kept.to_toml())
    shutil.rmtree(sides)
    return None


def _copy_release(loaded: LoadedBackbone, release: str, folder: Path, registry: str) -> Path:
    """Copy an installed release into a folder, where its manifest can be changed."""
    wanted = Requirement.parse(release)
    shutil.copytree(install_experts(loaded, [wanted], registry).expert_path(wanted.name), folder)
    _edit(folder)
    return folder


def _edit(folder: Path, **changes: Any) -> None:
    """Change the manifest in a folder, which lists no files any more."""
    manifest = dataclasses.replace(Manifest.read(folder), files=(), **changes)
    (folder / EXPERT_FILE).unlink()  # it may be read only
    atomic.write_text(folder / EXPERT_FILE, manifest.to_toml())


def _find_onto(source: Registry, interface: RouterInterface, proposal: Proposal) -> str:
    """Return the newest release of the expert that is proposed to be changed."""
    newest = find_newest(source, proposal.name, interface)
    return proposal.base_release if newest is None else f"{newest.name}@{newest.version}"


def _unpack(folder: Path, manifest: Manifest) -> Manifest:
    """Let the manifest in a folder list no files: vetting writes a card of its own."""
    unpacked = dataclasses.replace(manifest, files=())
    atomic.write_text(folder / EXPERT_FILE, unpacked.to_toml())
    return unpacked


def _vet(
    loaded: LoadedBackbone,
    folder: Path,
    data: Sequence[Path],
    vet_peers: VetPeers | None,
    previous: PreviousRelease,
    progress: CountProgress | None,
) -> Verdict:
    """Run all checks that run the expert; an expert that cannot run fails `format`."""
    try:
        verdict = check_expert(
            loaded, folder, data, vet_peers=vet_peers, previous=previous, progress=progress
        )
    except (InterfaceError, ManifestError) as error:
        failed = Check(
            name="format", passed=False, found=str(error), expected="an expert that fits"
        )
        return Verdict(checks=(failed,), measured={})
    checks = [
        dataclasses.replace(check, found=check.found.replace(f"{folder}/", ""))
        for check in verdict.checks
    ]
    measured = dict(verdict.measured)
    if verdict.evidence is not None:
        probe, measured["triggers"] = vet_triggers(
            loaded.backbone,
            loaded.interface,
            load_expert(loaded, folder),
            vetted_texts(loaded.anchor),
            tokenizer=loaded.tokenizer,
        )
        checks.append(probe)
    return dataclasses.replace(verdict, checks=tuple(checks), measured=measured)


def _check_provenance(source: Registry, manifest: Manifest, proposal: Proposal) -> Check:
    """Check that no tensor file that was proposed is that of a release of another package."""
    own = proposal.digests
    taken = [
        f"{file} is that of {release.name}@{release.version}"
        for name in source.names()
        if name != manifest.name
        for release in source.versions(name)
        for file in (BODY_FILE, SCOUT_FILE)
        if own[file] in {listed.digest for listed in release.files}
    ]
    authors = ", ".join(manifest.authors) or "none stated"
    return Check(
        name="provenance",
        passed=not taken,
        found="; ".join(taken)
        or f"derives from {manifest.derives_from}; no tensor file of another package; "
        f"authors: {authors}",
        expected="tensors of its own",
    )


def _check_license(base: Manifest, manifest: Manifest) -> Check:
    """Check that whoever may use the base may use the proposed expert."""
    try:
        passed = covers_license(base.license, manifest.license)
        found = f"{base.license or 'none'} to {manifest.license or 'none'}"
    except ManifestError as error:
        passed, found = False, error.message
    return Check(
        name="license",
        passed=passed,
        found=found,
        expected="an SPDX expression that permits all that the base's permits",
    )


def _check_against(base: str, vetted: Verdict) -> Iterator[Check]:
    """Yield the check that nothing is worse than in the base, if both could run."""
    if vetted.evidence is None:
        return
    change = _measure_change(vetted)
    found = "the two could not be compared" if change is None else _describe_change(*change)
    worse = vetted.regressions
    yield Check(
        name=AGAINST,
        passed=worse is not None and not worse,
        found="; ".join([found, *(worse or ())]),
        expected=f"nothing worse than in {base} beyond noise",
    )


def _check_base(base: str, onto: str, conflict: str | None) -> Check:
    """Check that the base is the newest release, or that the change merges with that one."""
    if base == onto:
        found = "it is the newest release"
    elif conflict is None:
        found = f"{onto} was published since; the change merges with it, and that was vetted"
    else:
        found = f"{onto} was published since, and the change does not merge with it: {conflict}"
    return Check(
        name="base",
        passed=conflict is None,
        found=found,
        expected=f"a change of {onto}, or one that merges with it",
    )


def _measure_change(vetted: Verdict) -> tuple[Score, Score] | None:
    """Return the scores of base and proposal on the maintainer's text, in mix mode."""
    if vetted.evidence is None or vetted.before is None:
        return None
    return vetted.before.scores["own_mix"], vetted.evidence.scores["own_mix"]


def _describe_change(before: Score, after: Score) -> str:
    """Return what a proposal changes on the maintainer's text, in words."""
    low, high = ratio_interval(after.nats_B, before.nats_B)
    share = after.bits_per_byte / before.bits_per_byte - 1
    interval = f", 95% interval {low - 1:+.1%} to {high - 1:+.1%}" if np.isfinite(low) else ""
    return (
        f"{before.bits_per_byte:.3f} to {after.bits_per_byte:.3f} bits per byte on your text in "
        f"mix mode ({share:+.1%}{interval}, {len(after.nats_B)} documents)"
    )


def _summarise(
    base: str, needs: Bump, version: str, checks: Sequence[Check], vetted: Verdict
) -> str:
    """Return the outcome in a sentence or two."""
    failed = [check.name for check in checks if not check.passed]
    change = _measure_change(vetted)
    effect = "" if change is None else f" It takes {_describe_change(*change)}."
    if failed:
        return f"Do not accept this change of {base}: {', '.join(failed)} failed.{effect}"
    return (
        f"This change of {base} can be accepted: all {len(checks)} checks passed.{effect} "
        f"It is a {needs} change, so at least version {Version(version)}."
    )


def _find_warnings(inbox: Inbox, received: Received) -> Iterator[str]:
    """Yield what is suspicious about who proposed it."""
    proposal = received.proposal
    assert proposal is not None
    if not proposal.key:
        yield "the proposal is unsigned: anybody may have made it"
    elif inbox.registry.find_signatures() is not None and inbox.find_publisher(proposal) is None:
        yield f"no publisher of this signed registry has the key {proposal.key}"


def _list_documents(vetted: Verdict) -> Iterator[DocumentBits]:
    if vetted.evidence is None or vetted.before is None:
        return
    runs = (
        vetted.evidence.scores["own_backbone"],
        vetted.before.scores["own_mix"],
        vetted.evidence.scores["own_mix"],
    )
    for index in range(len(runs[0].nats_B)):
        backbone, base, proposed = (
            figure(float(run.nats_B[index] / run.n_bytes_B[index] / np.log(2))) for run in runs
        )
        yield DocumentBits(backbone=backbone, base=base, proposed=proposed)
