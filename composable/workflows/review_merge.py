"""Merge a proposal with the release that was published since its base.

The method is chosen on a part of the maintainer's text, as `composable merge` does. The other part
judges the merged expert, there and in the review.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.load import install_experts
from composable.corpora.documents import Document
from composable.errors import MergeError
from composable.files import atomic
from composable.merging.methods import METHODS
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    STATISTICS_FILE,
    Manifest,
    Training,
)
from composable.packaging.registry.compatibility import next_version
from composable.packaging.trust.proposal import Proposal
from composable.packaging.versions.constraint import Requirement
from composable.workflows.merge import merge_experts
from composable.workflows.workspace import HELDOUT_FILE, WORK

# The folder of what is merged, while it is.
_SIDES: Final = ".sides"


def merge_onto(
    loaded: LoadedBackbone,
    folder: Path,
    proposal: Proposal,
    onto: str,
    documents: Sequence[Document],
    *,
    registry: str,
) -> str | None:
    """Merge a proposal with the release that was published since, in place.

    Args:
        loaded: The backbone.
        folder: The proposed expert, unpacked; the merged one takes its place.
        proposal: The proposal.
        onto: The newest release.
        documents: The maintainer's text. Those that the merged expert was judged on are put where
            vetting looks for held-out text.
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
            texts={"your text": documents},
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
    atomic.make_directory(folder / WORK)
    shutil.copyfile(out / WORK / HELDOUT_FILE, folder / WORK / HELDOUT_FILE)
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
