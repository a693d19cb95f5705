"""The inbox of a server: proposals arrive in chunks, and wait for an owner of the package.

Whoever has an account may propose a change of a package that they can see. The proposal is seen by
its proposer, the owners of the package and administrators; no index, search or page knows of it.
Its files are under `inbox/` in the storage; where a delta was sent, the server makes the file to
verify it, and keeps the delta. How many proposals there may be, and how much may be sent, is
limited for every account, and for every package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import ColumnElement, func, or_, select, true
from sqlalchemy.orm import Session

from composable.errors import ManifestError, MissingFileError
from composable.files import atomic
from composable.interface.digest import digest_bytes
from composable.packaging.manifests.manifest import (
    CHUNK_BYTES,
    EXPERT_FILE,
    Delta,
    Manifest,
    PackageFile,
)
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.inbox import (
    FOLDER,
    MAX_OPEN,
    Outcome,
    check_base,
    check_deltas,
    check_sizes,
)
from composable.packaging.registry.registry import parse_manifest
from composable.packaging.registry.storage import LocalFile, WritableStorage
from composable.packaging.trust.proposal import Proposal as Statement
from composable.packaging.trust.proposal import open_envelope
from composable.server import audit, documents, releases, rules, uploads
from composable.server.access import find_package
from composable.server.accounts import Caller, is_owner
from composable.server.database import Database, in_hours, now
from composable.server.deltas import rebuild
from composable.server.refusal import RefusedError, missing
from composable.server.settings import Settings
from composable.server.tables import Owner, Package, Proposal

ARRIVING: Final = "arriving"
OPEN: Final = "open"


class Proposals:
    """The inbox.

    Args:
        database: The database.
        storage: The storage of files and chunks.
        settings: Limits.
    """

    def __init__(self, database: Database, storage: WritableStorage, settings: Settings) -> None:
        self._database = database
        self._storage = storage
        self._settings = settings

    def start(self, caller: Caller, envelope: str, text: str) -> dict[str, Any]:
        """Take in a proposal, or find the same one.

        Args:
            caller: Who proposes.
            envelope: The proposal in its envelope.
            text: The packed manifest, in its canonical text.

        Returns:
            What is still to be uploaded.

        Raises:
            ProposalError: When it is damaged or too large.
            ManifestError: When the manifest is not that of a change of the base.
            RefusedError: When there is no such base, or no room.
        """
        statement, manifest = self._read(envelope, text)
        account = caller.require("publish", statement.name)
        self.drop_expired()
        with self._database.write() as session:
            package = find_package(session, caller, statement.name)
            self._check_base(session, package, statement, manifest)
            proposal = session.get(Proposal, statement.id)
            if proposal is None:
                self._check_room(session, account, package)
                proposal = Proposal(
                    id=statement.id,
                    account_id=account,
                    package_id=package.id,
                    state=ARRIVING,
                    created=now(),
                    envelope=envelope,
                    manifest=text,
                    outcome={},
                )
                session.add(proposal)
            elif proposal.account_id != account:
                raise RefusedError(409, "somebody else has proposed exactly this")
            elif proposal.outcome:
                detail = proposal.outcome["release"] or proposal.outcome["reason"]
                raise RefusedError(409, f"this was {proposal.state} already: {detail}")
            is_arriving = proposal.state == ARRIVING
        return self._describe(statement, manifest, is_arriving=is_arriving)

    def receive(self, caller: Caller, id_: str, digest: str, number: int, data: bytes) -> None:
        """Keep a chunk of a file.

        Raises:
            RefusedError: 404 when there is no such proposal, file or chunk.
            IntegrityError: When the bytes are not those that are proposed.
        """
        found = self._find_own(caller, id_)
        if found is None:
            raise RefusedError(409, "all files of the proposal have arrived")
        file = next((file for file in _list_sent(*found) if file.digest == digest), None)
        if file is None:
            raise missing("file of that digest in the proposal")
        uploads.store_chunk(self._storage, id_, file, number, data)

    def commit(self, caller: Caller, id_: str) -> dict[str, Any]:
        """Verify the files of a proposal, and put it into the inbox.

        Raises:
            RefusedError: When files are missing.
            PackagingError: When the files are not what the manifest states.
        """
        found = self._find_own(caller, id_)
        if found is None:
            return {"id": id_}
        statement, manifest = found
        sent = _list_sent(*found)
        with tempfile.TemporaryDirectory(prefix="composable-propose-") as name:
            folder = Path(name)
            for file in manifest.files:
                delta = statement.deltas.get(file.name)
                if delta is None:
                    uploads.assemble(self._storage, id_, file, folder / file.name, is_known=False)
                else:
                    self._rebuild(statement, file, delta, folder)
            text = manifest.to_toml()
            atomic.write_text(folder / EXPERT_FILE, text)
            if pack_expert(folder).digest != manifest.digest:
                raise ManifestError("does not match the files", where=EXPERT_FILE)
            for file in statement.sent:
                path = f"{FOLDER}/{id_}/{file.name}"
                self._storage.upload(path, LocalFile(folder / file.name), file, None)
        with self._database.write() as session:
            proposal = session.get_one(Proposal, id_)
            if proposal.state == ARRIVING:
                proposal.state = OPEN
                package = proposal.package.name
                audit.record(session, caller.name, "proposal.arrive", package, {"id": id_})
        uploads.drop_chunks(self._storage, id_, sent)
        return {"id": id_}

    def _rebuild(self, statement: Statement, file: PackageFile, delta: Delta, folder: Path) -> None:
        """Make a file from its delta, which is left beside it."""
        try:
            rebuild(self._storage, statement.id, file, delta, folder)
        except MissingFileError as error:
            raise RefusedError(
                409,
                f"is sent as a change of {statement.base_release}, which is gone",
                where=file.name,
                hint="propose it as a change of a release that is there, or with `composable "
                "propose DIR --whole`",
            ) from error

    def list_all(self, caller: Caller) -> list[dict[str, Any]]:
        """Return the proposals that the caller made, or may decide on."""
        with self._database.read() as session:
            rows = session.scalars(
                select(Proposal)
                .where(Proposal.state != ARRIVING, _can_see(caller))
                .order_by(Proposal.id)
            )
            return [
                {
                    "id": row.id,
                    "account": row.account.name,
                    "envelope": row.envelope,
                    "outcome": row.outcome or None,
                    "created": row.created,
                }
                for row in rows
                if caller.allows("read", row.package.name)
            ]

    def read_file(self, caller: Caller, id_: str, name: str) -> tuple[int, Iterator[bytes]]:
        """Return the size of a file of a proposal, and its bytes.

        Raises:
            RefusedError: 404 when there is no such proposal or file that the caller may see.
        """
        with self._database.read() as session:
            proposal = self._find(session, caller, id_)
            statement = open_envelope(proposal.envelope.encode(), id_)
            is_there = proposal.state == OPEN
        sizes = {file.name: file.size for file in statement.sent}
        if not is_there or name not in sizes:
            raise missing("file of that proposal")
        return sizes[name], self._storage.stream(f"{FOLDER}/{id_}/{name}")

    def decide(self, caller: Caller, id_: str, outcome: Outcome) -> None:
        """Record what an owner of the package decided, and remove the files.

        Raises:
            RefusedError: When the caller does not own the package, something else was decided, or
                the release that it is said to be accepted as is not one of it.
        """
        fields = {
            "state": outcome.state,
            "reason": outcome.reason,
            "release": outcome.release,
            "verdict": outcome.verdict,
        }
        with self._database.write() as session:
            proposal = self._find(session, caller, id_)
            package = proposal.package
            caller.require("publish", package.name)
            if not is_owner(session, caller.account, package):
                raise RefusedError(403, f"{package.name!r} belongs to somebody else")
            if proposal.state == ARRIVING:
                raise missing("such proposal")
            if proposal.state == OPEN:
                if outcome.state == "accepted":
                    _check_accepted(session, package, id_, outcome)
                proposal.state, proposal.outcome = outcome.state, fields
                action = f"proposal.{'accept' if outcome.state == 'accepted' else 'reject'}"
                audit.record(session, caller.name, action, package.name, {"id": id_, **fields})
            elif proposal.outcome != fields:
                raise RefusedError(409, f"the proposal was {proposal.state} already")
            statement = open_envelope(proposal.envelope.encode(), id_)
        self._drop_files(statement)

    def drop_expired(self) -> int:
        """Remove proposals whose files did not arrive in time; return how many."""
        before = in_hours(-self._settings.publication_hours)
        expired = select(Proposal).where(Proposal.state == ARRIVING, Proposal.created < before)
        with self._database.read() as session:
            if session.scalar(expired.limit(1)) is None:
                return 0
        with self._database.write() as session:
            found = session.scalars(expired).all()
            for proposal in found:
                session.delete(proposal)
        for proposal in found:
            statement = open_envelope(proposal.envelope.encode(), proposal.id)
            uploads.drop_chunks(self._storage, proposal.id, statement.sent)
            self._drop_files(statement)
        return len(found)

    def _read(self, envelope: str, text: str) -> tuple[Statement, Manifest]:
        """Parse a proposal and its manifest, and check that they belong together."""
        statement = open_envelope(envelope.encode())
        check_sizes(statement)
        if statement.n_bytes > self._settings.max_proposal_bytes:
            raise RefusedError(
                413,
                f"{statement.n_bytes:,} bytes, at most {self._settings.max_proposal_bytes:,} can "
                "be proposed",
            )
        rules.check_sizes(statement.sizes.values(), self._settings)
        manifest = parse_manifest(text.encode(), EXPERT_FILE)
        if digest_bytes(text.encode()) != statement.digests[EXPERT_FILE]:
            raise ManifestError("is not the manifest that is proposed", where=EXPERT_FILE)
        listed = {file.name: (file.size, file.digest) for file in manifest.files}
        stated = {
            name: (statement.sizes[name], digest)
            for name, digest in statement.digests.items()
            if name != EXPERT_FILE
        }
        if listed != stated or manifest.to_toml() != text:
            raise ManifestError("is not the manifest of the files proposed", where=EXPERT_FILE)
        rules.check_license(manifest.license)
        return statement, manifest

    def _check_base(
        self, session: Session, package: Package, statement: Statement, manifest: Manifest
    ) -> None:
        """Refuse a proposal that is not a change of a published release."""
        base = releases.find_release(session, package, statement.base)
        listed = documents.to_listed(base)
        if base.state != documents.PUBLISHED or listed.manifest != statement.base_manifest:
            raise missing(f"release {statement.base_release} with that manifest")
        check_base(manifest, listed)
        check_deltas(statement, listed)

    def _check_room(self, session: Session, account: int, package: Package) -> None:
        """Refuse one more proposal of an account, or for a package, that has enough."""
        undecided = Proposal.state.in_([ARRIVING, OPEN])
        limits: list[tuple[str, ColumnElement[bool], int]] = [
            ("of yours", Proposal.account_id == account, self._settings.max_open_proposals),
            (f"for {package.name}", Proposal.package_id == package.id, MAX_OPEN),
        ]
        for whose, condition, limit in limits:
            count = select(func.count()).select_from(Proposal).where(condition, undecided)
            n = session.scalar(count) or 0
            if n >= limit:
                raise RefusedError(
                    409,
                    f"{n} proposals {whose} are undecided, at most {limit} may be",
                    hint="wait until the owners of the package have reviewed some",
                )

    def _describe(
        self, statement: Statement, manifest: Manifest, *, is_arriving: bool
    ) -> dict[str, Any]:
        files = [
            {
                "digest": file.digest,
                "missing": sorted(
                    set(range(len(uploads.chunk_sizes(file))))
                    - set(uploads.list_chunks(self._storage, statement.id, file))
                ),
            }
            for file in (_list_sent(statement, manifest) if is_arriving else ())
        ]
        return {
            "id": statement.id,
            "is_complete": not is_arriving,
            "files": files,
            "chunk_bytes": CHUNK_BYTES,
        }

    def _find_own(self, caller: Caller, id_: str) -> tuple[Statement, Manifest] | None:
        """Return a proposal of the caller and its manifest; None once all its files arrived."""
        with self._database.read() as session:
            proposal = session.get(Proposal, id_)
            if proposal is None or proposal.account_id != caller.account:
                raise missing("such proposal")
            if proposal.state != ARRIVING:
                return None
            statement = open_envelope(proposal.envelope.encode(), id_)
            return statement, parse_manifest(proposal.manifest.encode(), EXPERT_FILE)

    def _find(self, session: Session, caller: Caller, id_: str) -> Proposal:
        """Return a proposal that the caller may see."""
        proposal = session.scalar(select(Proposal).where(Proposal.id == id_, _can_see(caller)))
        if proposal is None or not caller.allows("read", proposal.package.name):
            raise missing("such proposal")
        return proposal

    def _drop_files(self, statement: Statement) -> None:
        for file in statement.sent:
            self._storage.remove(f"{FOLDER}/{statement.id}/{file.name}")


def _list_sent(statement: Statement, manifest: Manifest) -> list[PackageFile]:
    """Return the files that are uploaded, whole ones with the digests of their chunks."""
    return [
        statement.deltas[file.name].as_file(file.name) if file.name in statement.deltas else file
        for file in manifest.files
    ]


def _can_see(caller: Caller) -> ColumnElement[bool]:
    """Return the condition on proposals that the caller made, or may decide on."""
    if caller.allows("admin"):
        return true()
    theirs = select(Owner.package_id).where(Owner.account_id == caller.account)
    return or_(Proposal.account_id == caller.account, Proposal.package_id.in_(theirs))


def _check_accepted(session: Session, package: Package, id_: str, outcome: Outcome) -> None:
    """Refuse the claim that a release is a proposal, unless its manifest says so."""
    _, _, version = outcome.release.partition("@")
    release = releases.find_release(session, package, version)
    manifest = parse_manifest(release.manifest.encode(), EXPERT_FILE)
    if manifest.provenance is None or manifest.provenance.proposal != f"sha256:{id_}":
        raise RefusedError(409, f"{outcome.release} is not a release of this proposal")
