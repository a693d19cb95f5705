"""Accept a proposal: publish it as the next release, on the verdict of a review.

Only what was vetted is published, under the version that the evidence demands, with a card of the
maintainer's own figures and a manifest that names who proposed it and what it was accepted on.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from composable.errors import ProposalError
from composable.files import atomic
from composable.files.delta import find_products
from composable.interface import RouterInterface
from composable.packaging.install.proposals import fetch_proposal
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    STATISTICS_FILE,
    Manifest,
    Provenance,
)
from composable.packaging.registry.compatibility import next_version
from composable.packaging.registry.inbox import (
    SHOWN_DIGITS,
    Inbox,
    Outcome,
    Received,
    require_open,
)
from composable.packaging.registry.release import Release
from composable.progress import ByteProgress
from composable.training.record import TrainingRecord
from composable.vetting.card import Against, tensor_digests, write_card
from composable.workflows.publish import publish_expert
from composable.workflows.references import find_newest
from composable.workflows.review import list_releases
from composable.workflows.updates import write_factors
from composable.workflows.verdicts import AGAINST, ReviewVerdict


def accept_proposal(
    inbox: Inbox,
    received: Received,
    folder: Path,
    interface: RouterInterface,
    verdict: ReviewVerdict,
    digest: str,
    *,
    merged: Path | None = None,
    may_be_worse: bool = False,
    progress: ByteProgress | None = None,
) -> Manifest:
    """Publish a proposal that was reviewed. Running it again after an interruption finishes it.

    Args:
        inbox: Where the proposal is.
        received: The proposal.
        folder: An empty folder; the release is made in it.
        interface: The backbone's contract.
        verdict: The verdict of its review.
        digest: Digest of that verdict.
        merged: What the review merged the proposal to, if another release than its base was the
            newest; see `verdicts.MERGED`.
        may_be_worse: Accept what is worse than its base and fails no other check, as a major
            version.
        progress: Called with a file's name, and the bytes done and in all.

    Returns:
        The manifest as published.

    Raises:
        ProposalError: If the verdict does not allow it, does not hold any more, or is of another
            proposal; or if the proposal was changed.
        RegistryError: If the proposal was decided already, or the registry refuses the release.
        VettingError: If `composable publish` would refuse it.
    """
    newest = find_newest(inbox.registry, verdict.name, interface)
    manifest = _find_published(inbox, received, newest)
    if manifest is None:
        require_open(received, inbox.registry.location)
        require_verdict(inbox, received, interface, verdict, may_be_worse=may_be_worse)
        assert newest is not None  # the verdict holds
        fetch_proposal(inbox, received, folder)
        if verdict.onto != verdict.base:
            _take_merged(folder, merged, received)
        manifest = dataclasses.replace(Manifest.read(folder), files=())
        if tensor_digests(folder) != verdict.tensors or manifest.digest != verdict.manifest:
            raise _refuse("is of another expert than this", received)
        _write_release(folder, manifest, interface, verdict, digest, newest)
        if verdict.onto == verdict.base:  # what was merged is no longer the sum that was proposed
            _keep_factors(folder, received)
        published = publish_expert(folder, interface, inbox.registry, progress=progress)
        manifest = published.manifest
    assert manifest.provenance is not None
    outcome = Outcome(
        state="accepted",
        release=f"{manifest.name}@{manifest.version}",
        verdict=manifest.provenance.verdict,
    )
    inbox.decide(received, outcome)
    return manifest


def require_verdict(
    inbox: Inbox,
    received: Received,
    interface: RouterInterface,
    verdict: ReviewVerdict,
    *,
    may_be_worse: bool = False,
) -> None:
    """Refuse a verdict on which a proposal cannot be accepted now.

    Raises:
        ProposalError: If a check failed, it is of another proposal, or what it was made from
            changed.
    """
    if verdict.proposal != received.id:
        raise _refuse(f"is of another proposal, {verdict.proposal[:SHOWN_DIGITS]}", received)
    failed = [name for name in verdict.failed if not (may_be_worse and name == AGAINST)]
    if failed or not verdict.checks:
        hint = f"reject it: `composable reject {inbox.registry.location} ID --reason TEXT`"
        if verdict.failed == [AGAINST]:
            hint += "; or publish it as a major version with --allow-worse"
        raise ProposalError(
            f"checks failed: {', '.join(verdict.failed) or 'none ran'}",
            where=f"proposal {received.id[:SHOWN_DIGITS]}",
            hint=hint,
        )
    changes = list(_list_changes(inbox, interface, verdict))
    if changes:
        raise _refuse(f"no longer holds: {'; '.join(changes)}", received)


def _list_changes(
    inbox: Inbox, interface: RouterInterface, verdict: ReviewVerdict
) -> Iterator[str]:
    """Yield what changed since a verdict was made, in words."""
    if interface.digest != verdict.inputs.interface:
        yield f"it was made for another interface, {verdict.inputs.interface}"
    names = {verdict.name, *inbox.registry.names()}
    now = list_releases(inbox.registry, interface, sorted(names))
    before = verdict.inputs.releases
    for name in sorted(now.keys() | before.keys()):
        old, new = before.get(name, ""), now.get(name, "")
        if old and not new:
            yield f"{name} {old.split()[0]} is gone"
        elif new and not old:
            yield f"{name} {new.split()[0]} was not looked at"
        elif old != new:
            yield f"{name} was {old.split()[0]}, is {new.split()[0]}"


def _write_release(
    folder: Path,
    manifest: Manifest,
    interface: RouterInterface,
    verdict: ReviewVerdict,
    digest: str,
    newest: Release,
) -> None:
    """Write manifest and card of the release into the folder of a proposal."""
    release = dataclasses.replace(
        manifest,
        version=next_version(newest.version, verdict.needs),
        provenance=Provenance(
            proposal=f"sha256:{verdict.proposal}",
            proposer=verdict.proposer,
            base=verdict.base,
            verdict=digest,
        ),
        files=(),
    )
    atomic.write_text(folder / EXPERT_FILE, release.to_toml())
    tensors = {f.name: f.digest for f in newest.files if f.name in (BODY_FILE, SCOUT_FILE)}
    write_card(
        folder,
        release,
        interface,
        # The card records the comparison in a field of its own.
        [check for check in verdict.checks if check.name != AGAINST],
        verdict.measured,
        TrainingRecord(),
        Against(
            release=f"{newest.name}@{newest.version}",
            tensors=tensors,
            regressions=verdict.regressions,
        ),
    )


def _keep_factors(folder: Path, received: Received) -> None:
    """Let publishing find the factors of an update that was proposed as them."""
    assert received.proposal is not None
    write_factors(
        folder,
        {
            name: find_products(folder / delta.as_file(name).name, received.proposal.sizes[name])
            for name, delta in received.proposal.deltas.items()
        },
    )


def _take_merged(folder: Path, merged: Path | None, received: Received) -> None:
    """Put what the review merged in the place of what was proposed."""
    names = (EXPERT_FILE, BODY_FILE, SCOUT_FILE)
    if merged is None or not all((merged / name).is_file() for name in names):
        raise _refuse("is on a merge that is not beside it", received)
    (folder / STATISTICS_FILE).unlink(missing_ok=True)
    for name in names:
        shutil.copyfile(merged / name, folder / name)


def _find_published(inbox: Inbox, received: Received, newest: Release | None) -> Manifest | None:
    """Return the manifest of the newest release if it is this proposal, accepted before."""
    if newest is None:
        return None
    manifest = inbox.registry.read_manifest(newest)
    is_it = manifest.provenance and manifest.provenance.proposal == f"sha256:{received.id}"
    return manifest if is_it else None


def _refuse(what: str, received: Received) -> ProposalError:
    return ProposalError(
        f"the verdict {what}",
        where=f"proposal {received.id[:SHOWN_DIGITS]}",
        hint="review it again",
    )
