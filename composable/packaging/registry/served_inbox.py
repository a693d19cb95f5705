"""The inbox of a server that `composable registry serve` runs.

Proposals and what was decided on them come with the list; files are read like those of any web
server, and verified here like those of any inbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from composable.errors import ProposalError, RegistryError
from composable.files.records import convert, to_plain
from composable.packaging.manifests.manifest import Manifest, PackageFile
from composable.packaging.registry.inbox import FOLDER, Inbox, Outcome, Received
from composable.packaging.registry.served import VERIFIED_BYTES_PER_SECOND, ServedRegistry
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.proposal import Proposal, open_envelope
from composable.progress import ByteProgress


class ServedInbox(Inbox):
    """The inbox of a registry on a server.

    Args:
        registry: The registry.
        keyring: The keys to sign with; by default those of the user.
    """

    def __init__(self, registry: ServedRegistry, keyring: Keyring | None = None) -> None:
        super().__init__(registry, keyring)
        self._served = registry
        self._listed: dict[str, dict[str, Any]] | None = None

    def decide(self, received: Received, outcome: Outcome) -> None:
        """Record what was decided on a proposal; the server removes its files.

        Raises:
            RegistryError: When the server refuses it, as from anybody but an owner.
        """
        self._served.ask("POST", f"proposals/{received.id}/outcome", to_plain(outcome))
        self._listed = None

    def discard(self, id_: str) -> None:
        """Reject a proposal that cannot be read."""
        self.decide(Received(id=id_), Outcome(state="rejected", reason="damaged"))

    def _submit(
        self,
        proposal: Proposal,
        envelope: bytes,
        manifest: Manifest,
        sources: Sequence[tuple[PackageFile, Path]],
        progress: ByteProgress | None,
    ) -> None:
        request = {"envelope": envelope.decode(), "manifest": manifest.to_toml()}
        answer = self._served.ask("POST", "proposals", request)
        self._listed = None
        if answer["is_complete"]:
            return
        missing = {entry["digest"]: entry["missing"] for entry in answer["files"]}
        home = f"proposals/{proposal.id}"
        for file, path in sources:
            numbers = missing.get(file.digest, [])
            self._served.send_chunks(home, path, file, numbers, progress)
        seconds = sum(proposal.sizes.values()) / VERIFIED_BYTES_PER_SECOND
        self._served.ask("POST", f"{home}/commit", {}, seconds)

    def _list_ids(self) -> list[str]:
        return sorted(self._list())

    def _read(self, id_: str) -> Received:
        where = f"{self.registry.location}: proposal {id_[:12]}"
        try:
            row = self._list()[id_]
            outcome = convert(row["outcome"], Outcome | None, where, ProposalError)
            proposal = open_envelope(str(row["envelope"]).encode(), id_, where)
            account = str(row["account"])
        except KeyError as error:
            raise ProposalError(f"lacks {error}", where=where) from error
        return Received(id=id_, proposal=proposal, outcome=outcome, account=account)

    def stream(self, id_: str, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file that was sent with a proposal; the caller verifies them."""
        return self._served.server.stream(f"{FOLDER}/{id_}/{name}")

    def _list(self) -> dict[str, dict[str, Any]]:
        """Return what the server lists, by id."""
        if self._listed is None:
            answer = self._served.ask("GET", "proposals", None)
            rows = answer.get("proposals")
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise RegistryError("sent no list of proposals", where=self.registry.location)
            self._listed = {str(row.get("id")): row for row in rows}
        return self._listed
