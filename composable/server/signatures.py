"""The signatures of a registry on a server: stored, verified on arrival, confirmed and served.

Publishers and operators sign on their own machines and send what they signed; `DatabaseFiles` is
the part of the layout that holds it, so the rules of signed registries in a folder hold here too.
The server has the online key at most. It confirms what publishers signed in the transaction that
stores it, so the versions of metadata increase with the state of the database, whichever replica
signs. Private keys are never in the database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Targets, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from composable.errors import IntegrityError, RegistryError
from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry.index import index_path, parse_index
from composable.packaging.registry.release import Release as Listed
from composable.packaging.registry.release import Signer
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.registry.signed import (
    Signatures,
    check_statement,
    make_statement,
    statement_path,
)
from composable.packaging.registry.storage import CONFIG_FILE, Document, ReadFrom
from composable.packaging.trust.client import read_clock
from composable.packaging.trust.keys import format_public_key
from composable.packaging.trust.ledger import Held, sample_of
from composable.packaging.trust.metadata import BIN, FOLDER, PUBLISHER, Grant, metadata_path
from composable.packaging.trust.offline import PENDING
from composable.packaging.versions.names import is_package_name
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress
from composable.server import audit, documents
from composable.server.accounts import SERVER, Caller, is_owner
from composable.server.database import Database
from composable.server.refusal import RefusedError, missing
from composable.server.tables import Package, Release, SignedFile

ROOT: Final = metadata_path("root", 1)
TIMESTAMP: Final = metadata_path("timestamp")
SIGNED_CONFIG: Final = canonical_json({**json.loads(documents.CONFIG), "signed": True}) + b"\n"
# A server is always there to confirm, so what it confirmed need not hold for long.
CONFIRMED_DAYS: Final = 7.0
# Clients that started a moment ago read the lists of that moment.
KEPT_VERSIONS: Final = 10
_METADATA: Final = re.compile(
    rf"({FOLDER}|{PENDING})/([1-9][0-9]{{0,11}})\.([a-z0-9-]{{1,80}})\.json", re.ASCII
)
_STATEMENT: Final = re.compile(r"statements/([a-z0-9-]{1,64})/([^/]{1,255})\.json", re.ASCII)
_BLOB: Final = re.compile(r"blobs/([0-9a-f]{2})/([0-9a-f]{64})", re.ASCII)


class DatabaseFiles:
    """What a registry's signatures are stored in: files by path, in a transaction.

    Args:
        session: The transaction; or one that only reads.
        location: The registry, for messages.
    """

    is_remote: Final = False

    def __init__(self, session: Session, location: str) -> None:
        self._session = session
        self._location = location

    @property
    def location(self) -> str:
        """The registry."""
        return self._location

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a file; None if it does not exist."""
        found = self._session.get(SignedFile, path)
        data = found.data if found is not None else None
        if data is None and path == CONFIG_FILE:
            data = documents.CONFIG
        return None if data is None else Document(data, digest_bytes(data))

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        found = self.read(path)
        if found is None:
            raise RegistryError("has no such file", where=f"{self.location}/{path}")
        yield found.data[start:]

    def files_under(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder and its folders, sorted."""
        under = SignedFile.path.startswith(f"{folder}/", autoescape=True)
        return sorted(self._session.scalars(select(SignedFile.path).where(under)))

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""
        names = (path.removeprefix(f"{folder}/") for path in self.files_under(folder))
        return [name for name in names if "/" not in name]

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; return whether this call did."""
        if self.read(path) is not None:
            return False
        self._session.add(SignedFile(path=path, data=data))
        self._session.flush()
        return True

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a file if it is as it was seen; return whether it was written."""
        now = self.read(path)
        if (now and now.data) != (seen and seen.data):
            return False
        self._session.merge(SignedFile(path=path, data=data))
        self._session.flush()
        return True

    def upload(
        self, path: str, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Refuse: only small documents are stored here.

        Raises:
            RegistryError: Always.
        """
        raise RegistryError("holds no files of releases", where=self.location)

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        found = self._session.get(SignedFile, path)
        if found is not None:
            self._session.delete(found)
            self._session.flush()

    def settle(self, path: str) -> None:
        """Do nothing: what is read in a transaction is durable when it ends."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of a file that was sent.

    Args:
        is_written: Whether it was stored; else it exists, or is another than was seen.
        is_confirmed: Whether the server has confirmed it, so that clients see it.
    """

    is_written: bool
    is_confirmed: bool = False


class SigningService:
    """Verifies and stores what others signed, and confirms it with the online key.

    Args:
        database: The database.
        keys: Folder of the online key; by default that of the user who runs the server.
        title: Name of the registry, for messages.
    """

    def __init__(self, database: Database, keys: Path | None = None, title: str = "") -> None:
        self._database = database
        self._keys = keys
        self.clock = read_clock
        self._title = title or "this registry"

    def is_signed(self, session: Session) -> bool:
        """Return whether the registry has root keys."""
        return session.scalar(select(SignedFile.path).where(SignedFile.path == ROOT)) is not None

    def read(self, session: Session, path: str) -> bytes | None:
        """Return a file of the signatures; None if there is none."""
        found = session.get(SignedFile, path)
        return None if found is None else found.data

    def list_names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder."""
        with self._database.read() as session:
            return DatabaseFiles(session, self._title).names_in(folder)

    def check_statement(self, session: Session, listed: Listed, data: bytes) -> Signer:
        """Verify a publisher's statement on a release that is to be published.

        Raises:
            SignatureError: When it is not signed by the publisher, or about other content.
            RefusedError: 403 when no publisher may publish the name.
        """
        with self._open(session) as signatures:
            held = signatures.authority().load()
        grant = next((each for each in held.grants.values() if each.covers(listed.name)), None)
        if grant is None:
            raise RefusedError(
                403,
                f"no publisher may publish {listed.name!r} in this signed registry",
                hint="ask its operator to run `composable registry grant`",
            )
        expected = dataclasses.asdict(make_statement(listed))
        where = statement_path(listed.name, listed.version)
        return check_statement(data, expected, grant.publisher, grant.keys, where)

    def store_statement(self, session: Session, release: Release, data: bytes) -> None:
        """Verify and store the statement on a release, in the transaction that publishes it."""
        listed = documents.to_listed(release)
        signer = self.check_statement(session, listed, data)
        path = statement_path(listed.name, listed.version)
        session.merge(SignedFile(path=path, data=data))
        release.signer, release.signer_key = signer.publisher, signer.key

    def put(self, caller: Caller, path: str, data: bytes | None, seen: str | None) -> Written:
        """Store a file that somebody signed, or remove one of a change that waits.

        Args:
            caller: Who sent it.
            path: Its path in the layout.
            data: Its content; None removes it.
            seen: The digest of what it replaces; None if it is new.

        Raises:
            RefusedError: When the caller may not, or it is not signed by the keys in charge.
            SignatureError: When it disagrees with what is signed already.
        """
        with self._database.write() as session:
            files = DatabaseFiles(session, self._title)
            if data is None:
                if not path.startswith(f"{PENDING}/"):
                    raise RefusedError(422, "cannot be removed", where=path)
                caller.require("admin")
                files.remove(path)
                return Written(is_written=True)
            now = files.read(path)
            if (now and digest_bytes(now.data)) != seen:
                return Written(is_written=False)
            names = self._check(session, files, caller, path, data)
            files.replace(path, data, now)
            if path.startswith("blobs/"):
                return Written(is_written=True)
            is_confirmed = names is not None and self._confirm(session)
            self._record(session, caller, path, data, names or [])
            return Written(is_written=True, is_confirmed=is_confirmed)

    def renew(self) -> bool:
        """Confirm the current state again if that will not hold for long; return whether it was.

        Of several replicas, the first one does it.
        """
        with self._database.read() as session:
            if not self._is_due(session):
                return False
        with self._database.write() as session:
            if not self._is_due(session):
                return False
            is_confirmed = self._confirm(session)
            if is_confirmed:
                audit.record(session, SERVER.name, "confirm", TIMESTAMP)
            return is_confirmed

    def _is_due(self, session: Session) -> bool:
        data = self.read(session, TIMESTAMP)
        if data is None:
            return False
        expires = Metadata[Timestamp].from_bytes(data).signed.expires
        soon = self.clock() + datetime.timedelta(days=CONFIRMED_DAYS / 2)
        return expires < soon

    @contextlib.contextmanager
    def _open(self, session: Session) -> Iterator[Signatures]:
        """Open the signatures as a transaction sees them, with no memory of another one.

        What a transaction saw may be rolled back, so nothing of it may be remembered.
        """
        with tempfile.TemporaryDirectory(prefix="composable-signatures-") as state:
            settings = SignatureSettings(state=Path(state), keys=self._keys, now=self.clock)
            yield Signatures(DatabaseFiles(session, self._title), settings)

    def _confirm(self, session: Session) -> bool:
        """Confirm the current state, if the online key is here."""
        with self._open(session) as signatures:
            is_confirmed = signatures.confirm(days=CONFIRMED_DAYS)
        if is_confirmed:
            self._drop_superseded(session)
        return is_confirmed

    def _drop_superseded(self, session: Session) -> None:
        """Remove lists that no client reads any more, so that their number stays small."""
        files, versions = DatabaseFiles(session, self._title), dict[str, list[int]]()
        for name in files.names_in(FOLDER):
            match = _METADATA.fullmatch(f"{FOLDER}/{name}")
            if match is not None and match[3] != "root":
                versions.setdefault(match[3], []).append(int(match[2]))
        for role, numbers in versions.items():
            for number in sorted(numbers)[:-KEPT_VERSIONS]:
                files.remove(metadata_path(role, number))

    def _check(
        self, session: Session, files: DatabaseFiles, caller: Caller, path: str, data: bytes
    ) -> list[str] | None:
        """Refuse a file that its keys did not sign, or that the caller may not store.

        Returns:
            The packages whose signed index it changes; None for a file that confirms nothing.
        """
        if path == CONFIG_FILE:
            caller.require("admin")
            if data != SIGNED_CONFIG or files.read(TIMESTAMP) is None:
                raise RefusedError(422, "is another configuration than a signed one", where=path)
            return None
        if path == TIMESTAMP:
            caller.require("admin")
            self._check_by_root(files, "timestamp", None, data)
            return None
        if match := _BLOB.fullmatch(path):
            self._check_blob(session, caller, match[1], match[2], data)
            return None
        if match := _STATEMENT.fullmatch(path):
            self._check_new_statement(session, caller, match[1], match[2], data)
            return None
        match = _METADATA.fullmatch(path)
        if match is None:
            raise RefusedError(422, "is no file of a registry's signatures", where=path[:200])
        number, role = int(match[2]), match[3]
        if match[1] == PENDING:
            caller.require("admin")
            self._check_pending(files, number, data)
            return None
        if role.startswith(PUBLISHER):
            return self._check_list(session, caller, role, number, data)
        caller.require("admin")
        self._check_operator(session, files, role, number, data)
        # What the online key signs, its holder confirms; the rest is for this server to confirm.
        return None if role in ("root", "registry", "snapshot") else []

    def _check_blob(
        self, session: Session, caller: Caller, shard: str, hex_digits: str, data: bytes
    ) -> None:
        """Check a document: the index of a package of the caller, or anything from an operator."""
        if digest_bytes(data) != f"sha256:{hex_digits}" or shard != hex_digits[:2]:
            raise IntegrityError("the bytes do not match the digest", where=hex_digits)
        if caller.allows("admin"):
            return
        caller.require("publish")
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
            name = str(json.loads(data.splitlines()[0])["name"])
            parse_index(data, name, index_path(name))
            self._find_owned(session, caller, name)
            return
        raise RefusedError(422, "is not the index of a package", where=hex_digits)

    def _check_new_statement(
        self, session: Session, caller: Caller, name: str, version: str, data: bytes
    ) -> None:
        """Check a statement on a release that is here, such as one with a new key."""
        caller.require("publish", name)
        package = self._find_owned(session, caller, name)
        release = _find_release(session, package, Version(version))
        if release is None or release.state == documents.REMOVED:
            raise missing(f"release {name} {version}")
        self.store_statement(session, release, data)

    def _check_list(
        self, session: Session, caller: Caller, role: str, number: int, data: bytes
    ) -> list[str]:
        """Check the list of a publisher against its keys, its grant, and the releases here."""
        caller.require("publish")
        publisher = role.removeprefix(PUBLISHER)
        with self._open(session) as signatures:
            signatory = signatures.signatory()
            held = signatory.load()
            grant = signatory.find_grant(held, publisher)
            delegator = held.delegator_of(sample_of(grant))
            signed: Targets = _read_signed(data, role, number, delegator)
            before = signatory.load_delegated(role, delegator)
            old = {} if before is None else before.targets
            if before is not None and number <= before.version:
                raise RefusedError(409, f"is older than version {before.version}", where=role)
            if gone := sorted(old.keys() - signed.targets.keys()):
                raise RefusedError(409, f"lacks {', '.join(gone)}, which it had before", where=role)
            changed = []
            for name, file in signed.targets.items():
                if name in old and old[name].hashes == file.hashes:
                    continue
                if not grant.covers(name):
                    raise RefusedError(403, f"{publisher!r} may not publish {name!r}", where=role)
                package = self._find_owned(session, caller, name)
                previous = signatory.read_document(old[name]) if name in old else b""
                index = signatory.read_document(file)
                self._check_index(session, package, grant, index, previous)
                changed.append(name)
        return changed

    def _check_index(
        self, session: Session, package: Package, grant: Grant, data: bytes, previous: bytes
    ) -> None:
        """Check that a signed index says of each changed release what the registry has."""
        name, where = package.name, index_path(package.name)
        listed, before = (parse_index(each, name, where) for each in (data, previous))
        if gone := before.keys() - listed.keys():
            raise RefusedError(
                409, f"lacks {name} {', '.join(map(str, gone))}, signed before", where=where
            )
        for version, release in listed.items():
            if before.get(version) == release:
                continue
            row = _find_release(session, package, version)
            if row is None or row.state != documents.PUBLISHED:
                raise RefusedError(409, f"{name} {version} is not published here", where=where)
            if release != documents.to_listed(row):
                raise RefusedError(
                    409,
                    f"{name} {version} is listed otherwise here",
                    where=where,
                    hint="run `composable registry sign` with the registry's URL, which reads it "
                    "again",
                )
            if row.signer != grant.publisher:
                raise RefusedError(
                    409, f"no statement of {grant.publisher!r} on {name} {version}", where=where
                )

    def _check_operator(
        self, session: Session, files: DatabaseFiles, role: str, number: int, data: bytes
    ) -> None:
        """Check metadata of the registry itself: who may sign what, and what is current."""
        if role == "root":
            self._check_root(files, number, data)
        elif role in ("targets", "snapshot") or role.startswith(BIN):
            # Bins have the keys and the threshold of the list that names them.
            self._check_by_root(files, "targets" if role.startswith(BIN) else role, number, data)
        elif role in ("registry", "advisories"):
            with self._open(session) as signatures:
                held = signatures.authority().load()
            _read_signed(data, role, number, held.targets)
        else:
            raise RefusedError(422, f"there is no role {role!r}", where=FOLDER)

    def _check_root(self, files: DatabaseFiles, number: int, data: bytes) -> None:
        known = files.read(ROOT)
        try:
            if known is None:
                trusted = TrustedMetadataSet(data, EnvelopeType.METADATA)
            else:
                trusted = self._follow_root(files)
                trusted.update_root(data)
        except exceptions.RepositoryError as error:
            raise _refuse(f"root: {error}") from error
        if trusted.root.version != number:
            raise _refuse(f"root: version {trusted.root.version} in the file of version {number}")

    def _check_by_root(
        self, files: DatabaseFiles, role: str, number: int | None, data: bytes
    ) -> None:
        _read_signed(data, role, number, self._follow_root(files).root)

    def _check_pending(self, files: DatabaseFiles, number: int, data: bytes) -> None:
        """Check that one of the root keys signed a change that waits for another."""
        root = self._follow_root(files).root
        try:
            metadata: Metadata[Any] = Metadata.from_bytes(data)
            result = root.get_verification_result(
                "root", metadata.signed_bytes, metadata.signatures
            )
        except (exceptions.RepositoryError, ValueError) as error:
            raise _refuse(f"a change that waits: {error}") from error
        if not result.signed or metadata.signed.version != number:
            raise _refuse("a change that waits")

    def _follow_root(self, files: DatabaseFiles) -> TrustedMetadataSet:
        first = files.read(ROOT)
        if first is None:
            raise RefusedError(
                409,
                "the registry is unsigned",
                hint="its operator signs it with `composable registry init URL --signed`",
            )
        trusted, version = TrustedMetadataSet(first.data, EnvelopeType.METADATA), 2
        while (newer := files.read(metadata_path("root", version))) is not None:
            trusted.update_root(newer.data)
            version += 1
        return trusted

    def _find_owned(self, session: Session, caller: Caller, name: str) -> Package:
        package = None
        if is_package_name(name):
            package = session.scalar(select(Package).where(Package.name == name))
        if package is None:
            raise missing(f"package {name[:64]!r}")
        if not caller.allows("admin") and not is_owner(session, caller.account, package):
            raise RefusedError(403, f"{name!r} belongs to somebody else")
        return package

    def _record(
        self, session: Session, caller: Caller, path: str, data: bytes, names: list[str]
    ) -> None:
        """Record a change in the audit log, and let pages and search follow it."""
        detail = {"digest": digest_bytes(data)}
        number = audit.record(session, caller.name, "sign", path, detail)
        match = _STATEMENT.fullmatch(path)
        changed = {*names, *([match[1]] if match else [])}
        if path.endswith(".targets.json") or f".{BIN}" in path:
            changed |= self._forget_revoked(session)
        for name in changed:
            package = session.scalar(select(Package).where(Package.name == name))
            if package is not None:
                documents.refresh_package(session, package, number)

    def _forget_revoked(self, session: Session) -> set[str]:
        """Take the signer from releases whose key is not that of their publisher any more."""
        with self._open(session) as signatures:
            held: Held = signatures.authority().load()
        keys = {name: set(map(format_public_key, g.keys)) for name, g in held.grants.items()}
        changed = set()
        for release in session.scalars(select(Release).where(Release.signer != "")):
            if release.signer_key not in keys.get(release.signer, ()):
                release.signer = release.signer_key = ""
                changed.add(release.package.name)
        session.flush()
        return changed


def _find_release(session: Session, package: Package, version: Version) -> Release | None:
    stem = str(version).partition("+")[0]
    return session.scalar(
        select(Release).where(Release.package_id == package.id, Release.stem == stem)
    )


def _read_signed(data: bytes, role: str, number: int | None, delegator: Root | Targets) -> Any:
    """Return metadata that its keys signed.

    Raises:
        RefusedError: 403 when they did not, or it is of another version than its name says.
    """
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (exceptions.RepositoryError, ValueError) as error:
        raise _refuse(f"{role}: {error}") from error
    if number is not None and metadata.signed.version != number:
        raise _refuse(f"{role}: version {metadata.signed.version} in the file of {number}")
    return metadata.signed


def _refuse(what: str) -> RefusedError:
    return RefusedError(
        403,
        f"is not signed by the keys in charge: {what[:300]}",
        hint="sign with the key that `composable registry signers` lists for it",
    )
