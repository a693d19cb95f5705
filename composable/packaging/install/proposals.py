"""Read the files of a proposal: whole, or rebuilt from what its proposer sent in their place.

A proposal says what is sent and what that makes; whatever arrives is verified against both. A delta
starts from the file of the release that the proposal changes, which the store has or downloads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from composable.errors import (
    DeltaError,
    IntegrityError,
    MissingFileError,
    PackagingError,
    ProposalError,
    UnknownExpertError,
)
from composable.files import atomic
from composable.files.delta import apply_delta
from composable.files.reading import read_bytes
from composable.packaging.install.download import download_file
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.toml import MAX_TOML_BYTES
from composable.packaging.registry.inbox import (
    FOLDER,
    SHOWN_DIGITS,
    Inbox,
    Received,
    check_base,
    check_deltas,
    check_sizes,
)
from composable.packaging.registry.registry import parse_manifest
from composable.packaging.registry.release import Release
from composable.packaging.trust.proposal import Proposal
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress

_AGAIN: Final = "nothing of it was used; ask its proposer to propose it again"


def fetch_proposal(
    inbox: Inbox,
    received: Received,
    folder: Path,
    *,
    store: Store | None = None,
    progress: ByteProgress | None = None,
) -> Manifest:
    """Write the files of a proposal into a folder, each verified, and return its manifest.

    The deltas that it was sent as are left beside the files that they make.

    Args:
        inbox: Where it is.
        received: The proposal.
        folder: An empty folder.
        store: Where the files of the release that it changes are kept; by default the user's.
        progress: Called with a file's name, bytes done and total bytes.

    Raises:
        ProposalError: When a file is missing, or was changed since it was proposed; or when what
            a delta starts from is gone, or it makes another file.
        ManifestError: When its manifest is invalid, or not that of a change of its base.
        UnknownExpertError: When a proposal of whole files is a change of a release that is gone.
    """
    proposal = received.proposal
    assert proposal is not None
    check_sizes(proposal)
    base = _find_base(inbox, proposal)
    check_deltas(proposal, base)
    home = f"{inbox.registry.location}/{FOLDER}/{received.id[:SHOWN_DIGITS]}…"
    for file in proposal.sent:
        try:
            with atomic.Sink(folder / file.name, digest=file.digest, size=file.size) as sink:
                for data in inbox.stream(received.id, file.name):
                    sink.write(data)
                    if progress is not None:
                        progress(file.name, sink.size, file.size)
        except PackagingError as error:
            raise ProposalError(
                f"is not the file that was proposed: {error.message}",
                where=f"{home}/{file.name}",
                hint=_AGAIN,
            ) from error
    for name in proposal.deltas:
        _rebuild(inbox, proposal, base, name, folder, store or Store(), progress)
    manifest = parse_manifest(read_bytes(folder / EXPERT_FILE, MAX_TOML_BYTES), EXPERT_FILE)
    listed = {file.name: file.digest for file in manifest.files}
    if listed != {k: v for k, v in proposal.digests.items() if k != EXPERT_FILE}:
        raise ProposalError("has a manifest that lists other files", where=received.id)
    check_base(manifest, base)
    return manifest


def _find_base(inbox: Inbox, proposal: Proposal) -> Release:
    """Return the release that a proposal changes.

    Raises:
        ProposalError: When it is gone, and the proposal consists of changes of its files.
    """
    try:
        return inbox.find_base(proposal.name, Version(proposal.base))
    except UnknownExpertError as error:
        if not proposal.deltas:
            raise
        raise _refuse_gone(inbox, proposal, error) from error


def _rebuild(
    inbox: Inbox,
    proposal: Proposal,
    base: Release,
    name: str,
    folder: Path,
    store: Store,
    progress: ByteProgress | None,
) -> None:
    """Make a file of a proposal from its delta and the base's file, and verify it."""
    (old,) = (file for file in base.files if file.name == name)
    label = f"{base.name} {base.version} {name}"
    delta = proposal.deltas[name].as_file(name)
    digest, size = proposal.digests[name], proposal.sizes[name]
    for is_last in (False, True):
        try:
            download_file(inbox.registry, store, old, label=label, progress=progress)
        except (MissingFileError, DeltaError) as error:
            raise _refuse_gone(inbox, proposal, error) from error
        try:
            with atomic.Sink(folder / name, digest=digest, size=size) as sink:
                for data in apply_delta(folder / delta.name, store.path(old.digest), size):
                    sink.write(data)
            return
        except IntegrityError as error:
            # What is damaged in the store is not used again.
            if is_last or store.check(old.digest):
                raise ProposalError(
                    f"does not make the file that was proposed from that of "
                    f"{proposal.base_release}: {error.message}",
                    where=delta.name,
                    hint=_AGAIN,
                ) from error


def _refuse_gone(inbox: Inbox, proposal: Proposal, error: PackagingError) -> ProposalError:
    return ProposalError(
        f"is sent as a change of {proposal.base_release}, which is gone: {error.message}",
        where=inbox.registry.location,
        hint="ask its proposer to propose it again, as a change of a release that is there, or "
        "with `composable propose DIR --whole`",
    )
