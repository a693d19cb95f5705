"""The checks that only a stranger's change of an expert needs, made of what was measured."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from composable.errors import ManifestError
from composable.packaging.manifests.licenses import covers_license
from composable.packaging.manifests.manifest import BODY_FILE, SCOUT_FILE, Manifest
from composable.packaging.registry.registry import Registry
from composable.packaging.trust.proposal import Proposal
from composable.vetting.card import Check
from composable.vetting.checks import Verdict
from composable.vetting.evaluation import Score
from composable.vetting.statistics import ratio_interval
from composable.workflows.verdicts import AGAINST


def check_provenance(source: Registry, manifest: Manifest, proposal: Proposal) -> Check:
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


def check_license(base: Manifest, manifest: Manifest) -> Check:
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


def check_against(base: str, vetted: Verdict) -> Iterator[Check]:
    """Yield the check that nothing is worse than in the base, if both could run."""
    if vetted.evidence is None:
        return
    change = measure_change(vetted)
    found = "the two could not be compared" if change is None else describe_change(*change)
    worse = vetted.regressions
    yield Check(
        name=AGAINST,
        passed=worse is not None and not worse,
        found="; ".join([found, *(worse or ())]),
        expected=f"nothing worse than in {base} beyond noise",
    )


def check_base(base: str, onto: str, conflict: str | None) -> Check:
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


def measure_change(vetted: Verdict) -> tuple[Score, Score] | None:
    """Return the scores of base and proposal on the maintainer's text, in mix mode."""
    if vetted.evidence is None or vetted.before is None:
        return None
    return vetted.before.scores["own_mix"], vetted.evidence.scores["own_mix"]


def describe_change(before: Score, after: Score) -> str:
    """Return what a proposal changes on the maintainer's text, in words."""
    low, high = ratio_interval(after.nats_B, before.nats_B)
    share = after.bits_per_byte / before.bits_per_byte - 1
    interval = f", 95% interval {low - 1:+.1%} to {high - 1:+.1%}" if np.isfinite(low) else ""
    return (
        f"{before.bits_per_byte:.3f} to {after.bits_per_byte:.3f} bits per byte on your text in "
        f"mix mode ({share:+.1%}{interval}, {len(after.nats_B)} documents)"
    )
