"""Propose the expert of a folder to the maintainers of the one that it derives from, without JAX.

Nothing is measured or checked here beyond what an inbox refuses: a review does that anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from composable.interface import RouterInterface
from composable.packaging.install.deltas import prepare_deltas
from composable.packaging.install.store import Store
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.inbox import Inbox
from composable.packaging.trust.proposal import Proposal
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress
from composable.workflows.updates import read_factors


def propose_expert(
    folder: Path,
    base: tuple[str, Version],
    interface: RouterInterface,
    inbox: Inbox,
    *,
    message: str = "",
    key: str | None = None,
    store: Store | None = None,
    is_whole: bool = False,
    progress: ByteProgress | None = None,
) -> tuple[Proposal, Mapping[str, str]]:
    """Put the expert of a folder into an inbox, as what changed since the release of its base.

    Args:
        folder: The expert.
        base: Name and version of the release that it is a change of.
        interface: The router interface that it must fit.
        inbox: Where to propose it.
        message: Why.
        key: Name of the key to sign with; see `Inbox.propose`.
        store: Where the files of the base are kept; by default the user's store.
        is_whole: Whether to send all files whole.
        progress: Called with a file's name, and the bytes done and in all.

    Returns:
        The proposal, and why a tensor file was sent whole, by its name.

    Raises:
        PackagingError: See `Inbox.propose`.
    """
    propose = partial(inbox.propose, folder, base, interface=interface, message=message, key=key)
    if is_whole:
        return propose(progress=progress), {}
    with prepare_deltas(
        inbox.registry,
        folder,
        pack_expert(folder, interface=interface),
        store or Store(),
        factors=read_factors(folder),
        is_proposal=True,
        progress=progress,
    ) as prepared:
        return propose(deltas=prepared.deltas, progress=progress), prepared.reasons
