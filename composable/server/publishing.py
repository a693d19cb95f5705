"""Publishing: open a publication, upload its files, commit it.

A commit is one transaction of the database, after all bytes were verified and are durable in the
storage. A server that is killed before leaves blobs that nothing shows, which go when the
publication expires; after, the release is whole.
Every step can be repeated: the same publication is found again, chunks that arrived are kept, and
committing a release that exists with the same content succeeds.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from composable.errors import ComposableError, ManifestError
from composable.files import atomic
from composable.files.blobs import blob_path
from composable.files.reading import read_bytes
from composable.packaging.manifests.manifest import (
    CHUNK_BYTES,
    EXPERT_FILE,
    EXPERT_FILES,
    Delta,
    Manifest,
    PackageFile,
)
from composable.packaging.manifests.packing import REQUIRED_FILES
from composable.packaging.registry.registry import parse_manifest
from composable.packaging.registry.release import Release as Listed
from composable.packaging.registry.storage import LocalFile, WritableStorage
from composable.packaging.versions.names import confusable_key
from composable.server import audit, claims, documents, rules, uploads
from composable.server.access import can_read_blob, is_blob_public
from composable.server.accounts import Caller
from composable.server.blobs import drop_unlisted
from composable.server.database import Database, in_hours, now
from composable.server.deltas import (
    drop_offer,
    keep_offer,
    parse_offer,
    read_offer,
    rebuild,
)
from composable.server.refusal import RefusedError, missing, status_of
from composable.server.settings import Settings
from composable.server.signatures import SigningService
from composable.server.tables import (
    Account,
    File,
    Owner,
    Package,
    Publication,
    Release,
)

MAX_README_BYTES = 1 << 20


class Publishing:
    """The steps of publishing.

    Args:
        database: The database.
        storage: The storage of blobs and chunks.
        settings: Limits, and whether releases are quarantined.
        signing: Verifies the statements of publishers.
    """

    def __init__(
        self,
        database: Database,
        storage: WritableStorage,
        settings: Settings,
        signing: SigningService,
    ) -> None:
        self._database = database
        self._storage = storage
        self._settings = settings
        self._signing = signing

    def start(
        self,
        caller: Caller,
        text: str,
        *,
        is_private: bool = False,
        deltas: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Open a publication, or find the one that is open for the same manifest.

        Args:
            caller: Who publishes.
            text: The packed manifest, in its canonical text.
            is_private: Whether a new package is private. Ignored for one that exists.
            deltas: What the publisher can send in place of files, by their names.

        Returns:
            What is still to be uploaded: for each file its chunks, or those of its delta.

        Raises:
            ManifestError: For a manifest that is not packed, or not allowed.
            RefusedError: When the name or the version is not the caller's to publish.
        """
        manifest = self._read_manifest(text)
        offer = parse_offer(manifest, deltas or {}, self._settings.max_file_bytes)
        account = caller.require("publish", manifest.name)
        with self._database.read() as session:
            if is_private and self._signing.is_signed(session):
                raise RefusedError(
                    422,
                    "a signed registry has no private packages: its lists of names are public",
                    where="private",
                )
            published = claims.find_published(session, caller, manifest)
            if published is None:
                claims.check_claim(session, caller, manifest)
        if published is not None:
            return {"id": None, "is_published": True, "files": [], "chunk_bytes": CHUNK_BYTES}
        self.drop_expired()
        with self._database.write() as session:
            publication = session.scalar(
                select(Publication).where(
                    Publication.account_id == account,
                    Publication.manifest_digest == manifest.digest,
                )
            )
            if publication is None:
                self._check_room(session, account)
                publication = Publication(
                    id=secrets.token_hex(16),
                    account_id=account,
                    manifest_digest=manifest.digest,
                    manifest=text,
                    is_private=is_private,
                    created=now(),
                )
                session.add(publication)
        keep_offer(self._storage, publication.id, offer)
        return self.describe(caller, publication.id)

    def describe(self, caller: Caller, publication_id: str) -> dict[str, Any]:
        """Return what a publication still needs.

        Raises:
            RefusedError: 404 when there is no such publication of the caller.
        """
        with self._database.read() as session:
            _, manifest = self._find(session, caller, publication_id)
            known = self._find_known(session, caller, manifest)
            deltas = self._find_usable(session, caller, publication_id, manifest, known)
        files = []
        for file in manifest.files:
            is_here = file.digest in known or file.name in deltas
            files.append(self._describe_file(publication_id, file, is_here=is_here))
            if file.name in deltas:
                sent = deltas[file.name].as_file(file.name)
                files.append(self._describe_file(publication_id, sent, is_here=False))
        return {
            "id": publication_id,
            "is_published": False,
            "chunk_bytes": CHUNK_BYTES,
            "files": files,
        }

    def receive(
        self, caller: Caller, publication_id: str, digest: str, number: int, data: bytes
    ) -> None:
        """Keep a chunk of a file.

        Raises:
            RefusedError: 404 when there is no such publication, file or chunk.
            IntegrityError: When the bytes are not those of the manifest.
        """
        with self._database.read() as session:
            _, manifest = self._find(session, caller, publication_id)
        file = next((file for file in manifest.files if file.digest == digest), None)
        if file is None:
            offer = self._read_offer(publication_id, manifest)
            deltas = (delta.as_file(name) for name, delta in offer.items())
            file = next((delta for delta in deltas if delta.digest == digest), None)
        if file is None:
            raise missing("file of that digest in the manifest")
        uploads.store_chunk(self._storage, publication_id, file, number, data)

    def cancel(self, caller: Caller, publication_id: str) -> None:
        """Give up a publication and drop what was uploaded.

        Raises:
            RefusedError: 404 when there is no such publication of the caller.
        """
        with self._database.write() as session:
            publication, manifest = self._find(session, caller, publication_id)
            session.delete(publication)
        self._drop_bytes(publication_id, manifest)

    def commit(
        self, caller: Caller, publication_id: str, *, statement: bytes = b""
    ) -> dict[str, Any]:
        """Verify a publication and make it a release, at once and for good.

        Args:
            caller: Who publishes.
            publication_id: The publication.
            statement: The statement of the publisher, signed; only a signed registry needs it.

        Returns:
            The release: name, version, digest of the manifest, and its state.

        Raises:
            RefusedError: When files are missing, or somebody else took the name or version.
            PackagingError: When the files are not what the manifest states.
            VettingError: When the card does not allow publishing.
            SignatureError: When the registry is signed, and the statement not by the publisher.
        """
        with self._database.read() as session:
            publication, manifest = self._find(session, caller, publication_id)
            caller.require("publish", manifest.name)
            self._check_statement(session, manifest, statement)
            known = self._find_known(session, caller, manifest)
            deltas = self._find_usable(session, caller, publication_id, manifest, known)
        with _scratch_folder() as folder:
            for file in manifest.files:
                if file.name in deltas:
                    rebuild(self._storage, publication_id, file, deltas[file.name], folder)
                    continue
                target, is_known = folder / file.name, file.digest in known
                uploads.assemble(self._storage, publication_id, file, target, is_known=is_known)
            try:
                release = self._publish(caller, publication, manifest, deltas, folder, statement)
            except ComposableError as error:
                if status_of(error) < 500:  # sending the same again would not help
                    self.cancel(caller, publication_id)
                raise
        uploads.drop_chunks(self._storage, publication_id, manifest.files)
        drop_offer(self._storage, publication_id, deltas)
        return {
            "name": manifest.name,
            "version": str(manifest.version),
            "manifest": manifest.digest,
            "state": release.state,
        }

    def _publish(
        self,
        caller: Caller,
        publication: Publication,
        manifest: Manifest,
        deltas: Mapping[str, Delta],
        folder: Path,
        statement: bytes,
    ) -> Release:
        """Verify the files in a folder, make them durable, and insert the release."""
        with self._database.read() as session:
            claims.check_claim(session, caller, manifest)
            previous = claims.find_previous(session, manifest)
            interface = claims.find_interface(session, manifest)
            kept = {n: d for n, d in deltas.items() if is_blob_public(session, d.base)}
        atomic.write_text(folder / EXPERT_FILE, publication.manifest)
        card = rules.check_files(folder, manifest, interface)
        if previous is not None:
            rules.check_bump(rules.read_card(folder), previous, manifest)
        readme = _read_readme(folder)
        sent = (delta.as_file(name) for name, delta in kept.items())
        for file in (*manifest.files, *sent, _describe_manifest(manifest)):
            self._storage.upload(blob_path(file.digest), LocalFile(folder / file.name), file, None)
        with self._database.write() as session:
            # A base that was taken down meanwhile could be made from a delta again.
            kept = {n: d for n, d in kept.items() if is_blob_public(session, d.base)}
            release = self._insert(
                session, caller, manifest, publication, kept, card, readme, statement
            )
            session.execute(delete(Publication).where(Publication.id == publication.id))
        return release

    def _check_statement(self, session: Session, manifest: Manifest, statement: bytes) -> None:
        """Refuse, before files are put together, what its publisher has not signed."""
        if not self._signing.is_signed(session):
            return
        if not statement:
            raise RefusedError(
                422,
                f"{manifest.name} {manifest.version} is unsigned, and this registry is signed",
                hint="publish it with `composable publish`, where the key of its publisher is",
            )
        self._signing.check_statement(session, Listed.of(manifest, now()), statement)

    def drop_expired(self) -> int:
        """Remove publications that were left unfinished; return how many."""
        before = in_hours(-self._settings.publication_hours)
        expired = select(Publication).where(Publication.created < before)
        with self._database.read() as session:
            if session.scalar(expired.limit(1)) is None:
                return 0
        with self._database.write() as session:
            found = session.scalars(expired).all()
            for publication in found:
                session.delete(publication)
        for publication in found:
            manifest = parse_manifest(publication.manifest.encode(), EXPERT_FILE)
            self._drop_bytes(publication.id, manifest)
        return len(found)

    def _drop_bytes(self, publication_id: str, manifest: Manifest) -> None:
        """Remove the chunks of a publication that came to nothing, and blobs that only it has."""
        deltas = self._read_offer(publication_id, manifest)
        uploads.drop_chunks(self._storage, publication_id, manifest.files)
        drop_offer(self._storage, publication_id, deltas)
        sent = (delta.as_file(name) for name, delta in deltas.items())
        files = (*manifest.files, *sent, _describe_manifest(manifest))
        drop_unlisted(self._database, self._storage, (file.digest for file in files))

    def _read_manifest(self, text: str) -> Manifest:
        """Parse a manifest and check all that needs no other file."""
        manifest = parse_manifest(text.encode(), EXPERT_FILE)
        if not manifest.is_packed or manifest.to_toml() != text:
            raise ManifestError(
                "is not the canonical text of a packed manifest",
                where=EXPERT_FILE,
                hint="publish with `composable publish`, which packs it",
            )
        rules.check_license(manifest.license)
        names = {file.name for file in manifest.files}
        if not names.issuperset(REQUIRED_FILES) or not names.issubset(EXPERT_FILES):
            raise ManifestError(
                f"lists {', '.join(sorted(names))}; expected {', '.join(EXPERT_FILES)}",
                where=f"{EXPERT_FILE}: files",
            )
        rules.check_sizes([file.size for file in manifest.files], self._settings)
        Listed.from_line(Listed.of(manifest, now()).to_line(), manifest.name, EXPERT_FILE)
        return manifest

    def _find(
        self, session: Session, caller: Caller, publication_id: str
    ) -> tuple[Publication, Manifest]:
        publication = session.get(Publication, publication_id)
        if publication is None or publication.account_id != caller.account:
            raise missing("such publication")
        return publication, parse_manifest(publication.manifest.encode(), EXPERT_FILE)

    def _check_room(self, session: Session, account: int) -> None:
        is_theirs = Publication.account_id == account
        n = session.scalar(select(func.count()).select_from(Publication).where(is_theirs)) or 0
        if n >= self._settings.max_open_publications:
            raise RefusedError(
                409,
                f"{n} publications are unfinished",
                hint="finish or cancel some; each is dropped after "
                f"{self._settings.publication_hours:g} hours",
            )

    def _describe_file(
        self, publication_id: str, file: PackageFile, *, is_here: bool
    ) -> dict[str, Any]:
        """Return which chunks of a file have not arrived; none of one that need not be sent."""
        numbers = []
        if not is_here:
            here = uploads.list_chunks(self._storage, publication_id, file)
            numbers = sorted(set(range(len(uploads.chunk_sizes(file)))) - set(here))
        return {"name": file.name, "digest": file.digest, "size": file.size, "missing": numbers}

    def _read_offer(self, publication_id: str, manifest: Manifest) -> dict[str, Delta]:
        limit = self._settings.max_file_bytes
        return read_offer(self._storage, publication_id, manifest, limit)

    def _find_known(self, session: Session, caller: Caller, manifest: Manifest) -> set[str]:
        """Return the digests of the files that need not be sent."""
        return {f.digest for f in manifest.files if self._knows(session, caller, f.digest)}

    def _find_usable(
        self,
        session: Session,
        caller: Caller,
        publication_id: str,
        manifest: Manifest,
        known: Collection[str],
    ) -> dict[str, Delta]:
        """Return the deltas that are sent in place of files, by the names of these."""
        digests = {file.name: file.digest for file in manifest.files}
        return {
            name: delta
            for name, delta in self._read_offer(publication_id, manifest).items()
            if digests[name] not in known and self._knows(session, caller, delta.base)
        }

    def _knows(self, session: Session, caller: Caller, digest: str) -> bool:
        """Return whether the registry has a blob that the caller could download anyway."""
        return can_read_blob(session, caller, digest)

    def _insert(
        self,
        session: Session,
        caller: Caller,
        manifest: Manifest,
        publication: Publication,
        deltas: Mapping[str, Delta],
        card: str,
        readme: str,
        statement: bytes,
    ) -> Release:
        """Insert the release, unless it is there; check again, now that nobody else changes it."""
        if (release := claims.find_published(session, caller, manifest)) is not None:
            return release
        if session.get(Publication, publication.id) is None:  # cancelled, and its blobs removed
            raise missing("such publication")
        claims.check_claim(session, caller, manifest)
        package = session.scalar(select(Package).where(Package.name == manifest.name))
        if package is None:
            package = _create_package(session, caller, manifest.name, publication.is_private)
        published = now()
        state = documents.QUARANTINED if self._settings.is_quarantined else documents.PUBLISHED
        release = Release(
            package_id=package.id,
            version=str(manifest.version),
            stem=claims.stem_of(manifest.version),
            state=state,
            is_yanked=False,
            reason="",
            published=published,
            publisher=caller.name,
            row=Listed.of(manifest, published)
            .with_deltas({name: (delta,) for name, delta in deltas.items()})
            .to_row(),
            manifest=manifest.to_toml(),
            card=card,
            readme=readme,
        )
        sent = (delta.as_file(name) for name, delta in deltas.items())
        release.files = [
            File(name=file.name, size=file.size, digest=file.digest)
            for file in (*manifest.files, *sent, _describe_manifest(manifest))
        ]
        session.add(release)
        session.flush()
        if self._signing.is_signed(session):
            self._signing.store_statement(session, release, statement)
        subject = f"{manifest.name}@{manifest.version}"
        detail = {"manifest": manifest.digest, "state": state}
        number = audit.record(session, caller.name, "publish", subject, detail)
        documents.refresh_package(session, package, number)
        return release


def _create_package(session: Session, caller: Caller, name: str, is_private: bool) -> Package:
    package = Package(
        name=name,
        key=confusable_key(name),
        is_private=is_private,
        created=now(),
        removal=None,
        revision=0,
        index=b"",
        index_digest="",
        summary={},
    )
    session.add(package)
    session.flush()
    account = session.get_one(Account, caller.account)
    session.add(Owner(package_id=package.id, account_id=account.id, added=now()))
    audit.record(session, caller.name, "package.create", name, {"private": is_private})
    return package


def _describe_manifest(manifest: Manifest) -> PackageFile:
    """Return the manifest as a file of the release."""
    size = len(manifest.to_toml().encode())
    return PackageFile(name=EXPERT_FILE, size=size, digest=manifest.digest)


def _read_readme(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return read_bytes(folder / "README.md", MAX_README_BYTES).decode(errors="replace")
    return ""


@contextlib.contextmanager
def _scratch_folder() -> Any:
    with tempfile.TemporaryDirectory(prefix="composable-publish-") as name:
        yield Path(name)
