"""Review a proposal: everything it claims is measured again, here, on the maintainer's own text.

A proposal whose base is no longer the newest release is merged with that one first, and the merged
expert is what is vetted. Nothing is decided here; that is in `accept.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import read_documents
from composable.errors import InterfaceError, ManifestError, TextError
from composable.files import atomic
from composable.interface import RouterInterface, digest_bytes
from composable.packaging.install.proposals import fetch_proposal
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.registry.compatibility import Bump
from composable.packaging.registry.inbox import SHOWN_DIGITS, Inbox, Received
from composable.packaging.registry.registry import Registry
from composable.packaging.trust.proposal import Proposal
from composable.packaging.versions.version import Version
from composable.progress import CountProgress
from composable.vetting.card import Check, tensor_digests
from composable.vetting.checks import Verdict, figure
from composable.vetting.evidence import vetted_texts
from composable.vetting.probes import vet_triggers
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
from composable.workflows.review_checks import (
    check_against,
    check_base,
    check_license,
    check_provenance,
    describe_change,
    measure_change,
)
from composable.workflows.review_merge import merge_onto
from composable.workflows.verdicts import DocumentBits, Inputs, ReviewVerdict
from composable.workflows.vet import VetPeers, check_expert
from composable.workflows.worker_pool import compute_units, vet_in_units
from composable.workflows.workspace import HELDOUT_FILE, WORK


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
    prepared = _prepare(loaded, inbox, received, folder, data, registry)
    manifest, onto = prepared.manifest, prepared.onto
    compared = proposal.base_release if prepared.conflict else onto
    previous = find_previous(loaded, folder, compared, registry=registry)
    peers = _list_peers(loaded, manifest, beside, texts, registry)
    job = make_job(loaded, folder, peers, registry=registry, results=results)
    vet_peers = partial(vet_in_units, job, loaded, n_jobs) if peers else None
    vetted = _vet(loaded, folder, prepared.data, vet_peers, previous, progress)
    step = compare_releases(folder, loaded.interface, previous, vetted)
    checks = (
        check_provenance(source, manifest, proposal),
        check_license(previous.manifest, manifest),
        *vetted.checks,
        *check_against(compared, vetted),
        check_base(proposal.base_release, onto, prepared.conflict),
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
                **prepared.texts,
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
    data: Sequence[Path] = (),
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
        data: The maintainer's text, which the merge of a proposal is made on; not needed while its
            base is the newest release.
        beside: Published experts to install it with.
        texts: Held-out text of those, by name.
        registry: Location of the registry.
        results: Folder of the results.
        n_jobs: Processes.
        progress: Called with the number of experts done and in all.

    Raises:
        TextError: If the proposal has to be merged, and there is no text to merge it on.
    """
    prepared = _prepare(loaded, inbox, received, folder, data, registry)
    peers = _list_peers(loaded, prepared.manifest, beside, texts, registry)
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


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """An expert that was proposed, in its folder; or the merge of it.

    Args:
        manifest: Its manifest.
        onto: The newest release.
        conflict: Why it does not merge with that one; None if it does, or need not.
        data: Text to vet it on.
        texts: Digest of the text that it was merged on.
    """

    manifest: Manifest
    onto: str
    conflict: str | None
    data: Sequence[Path]
    texts: Mapping[str, str]


def _prepare(
    loaded: LoadedBackbone,
    inbox: Inbox,
    received: Received,
    folder: Path,
    data: Sequence[Path],
    registry: str,
) -> _Prepared:
    """Put what is to be vetted into a folder. It is the same whoever does it, to the bit."""
    proposal = received.proposal
    assert proposal is not None
    manifest = _unpack(folder, fetch_proposal(inbox, received, folder))
    onto = _find_onto(inbox.registry, loaded.interface, proposal)
    if onto == proposal.base_release:
        return _Prepared(manifest=manifest, onto=onto, conflict=None, data=data, texts={})
    if not data:
        raise TextError(
            f"{onto} was published since {proposal.base_release}, so the proposal is merged with "
            "it before anything is measured, which needs text",
            where=f"proposal {received.id[:SHOWN_DIGITS]}",
            hint="give the text of the review with --data, the same in every call",
        )
    documents = read_documents(data)
    conflict = merge_onto(loaded, folder, proposal, onto, documents, registry=registry)
    return _Prepared(
        manifest=Manifest.read(folder),
        onto=onto,
        conflict=conflict,
        # Documents that chose the method would make the merged expert look better than it is.
        data=data if conflict else [folder / WORK / HELDOUT_FILE],
        texts={"merge": digest_bytes(b"\0".join(d.text.encode() for d in documents))},
    )


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


def _summarise(
    base: str, needs: Bump, version: str, checks: Sequence[Check], vetted: Verdict
) -> str:
    """Return the outcome in a sentence or two."""
    failed = [check.name for check in checks if not check.passed]
    change = measure_change(vetted)
    effect = "" if change is None else f" It takes {describe_change(*change)}."
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
