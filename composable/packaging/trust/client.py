"""Reads a signed registry: verifies its TUF metadata, and every document against it.

The rules are those of python-tuf's `TrustedMetadataSet`; this file adds where metadata comes from
and where it is kept, and says of every failure what happened and what to do. The root keys are
pinned on first use, in a folder of this machine together with the newest metadata seen, so that
older states are refused afterwards. Nothing is written to the registry.
"""

from __future__ import annotations

import contextlib
import datetime
import shlex
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast
from urllib.parse import quote

from securesystemslib.signer import Key
from tuf.api import exceptions
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from composable.errors import SignatureError
from composable.files import atomic
from composable.files.blobs import blob_path
from composable.files.reading import read_bytes
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document, Storage
from composable.packaging.trust.identities import Sigstore, explain_refusal
from composable.packaging.trust.keys import fingerprint
from composable.packaging.trust.metadata import (
    BIN,
    FOLDER,
    ISSUED,
    PUBLISHER,
    Grant,
    accept_identities_of,
    keys_of,
    metadata_path,
    read_grants,
    read_sigstore,
    roles_for,
)

MAX_ROOT_CHANGES: Final = 256
MAX_DELEGATIONS: Final = 32
# Clocks of machines in use differ by seconds; a day leaves room for mistaken time zones.
CLOCK_TOLERANCE: Final = datetime.timedelta(days=1)
_ROOT, _TIMESTAMP, _SNAPSHOT, _TARGETS = "root", "timestamp", "snapshot", "targets"
_EARLIEST: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_ONLINE: Final = (_TIMESTAMP, _SNAPSHOT)
_ASK: Final = "nothing was used; ask the operator of the registry"

Clock = Callable[[], datetime.datetime]


def read_clock() -> datetime.datetime:
    """Return the time of this machine, in UTC."""
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, kw_only=True)
class Role:
    """Who signs a document.

    Args:
        name: The role.
        keys: Its keys; none if they were revoked.
        is_listed: Whether the registry lists anything that it signed, valid or not.
    """

    name: str
    keys: tuple[Key, ...]
    is_listed: bool

    @property
    def publisher(self) -> str:
        """The name of the publisher, for the role of one."""
        return self.name.removeprefix(PUBLISHER)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A signed document.

    Args:
        file: Its length and digest.
        publisher: Whose it is; None if the registry itself signs it.
        keys: The keys that may sign it.
    """

    file: TargetFile
    publisher: str | None
    keys: tuple[Key, ...]

    @property
    def digest(self) -> str:
        """The digest of the document, by which it is stored.

        Raises:
            SignatureError: When it is listed with digests of other kinds alone.
        """
        if "sha256" not in self.file.hashes:
            raise SignatureError(
                f"{self.file.path} is listed without a SHA-256 digest",
                kind="wrong-content",
                hint="its publisher signs it again with `composable registry sign`",
            )
        return f"sha256:{self.file.hashes['sha256']}"


class SignedDocuments:
    """The documents of a signed registry.

    Args:
        files: The storage of the registry.
        state: A folder of this machine for what was verified; one for each registry.
        now: The time.
        max_stale: How long after their end signatures are still accepted.
        is_offline: Whether only what was verified before is used, however old.
        folder: The folder of the metadata in the storage.
    """

    def __init__(
        self,
        files: Storage,
        state: Path,
        *,
        now: Clock = read_clock,
        max_stale: datetime.timedelta = datetime.timedelta(),
        is_offline: bool = False,
        folder: str = FOLDER,
    ) -> None:
        self._files = files
        self._state = state
        self._now = now
        self._max_stale = max_stale
        self.is_offline = is_offline
        self._folder = folder
        self._guard = threading.Lock()
        self._trusted: TrustedMetadataSet | None = None

    @property
    def location(self) -> str:
        """The location of the registry."""
        return self._files.location

    @property
    def is_pinned(self) -> bool:
        """Whether this machine has pinned root keys for this registry."""
        return self._local(_ROOT).is_file()

    @property
    def root(self) -> Root:
        """The root metadata, verified."""
        return self._get_trusted().root

    @property
    def sigstore(self) -> Sigstore | None:
        """The sigstore that proves the identities of publishers; None if it accepts none."""
        return read_sigstore(self._get_trusted().targets)

    @property
    def root_fingerprint(self) -> str:
        """One short text for the root keys, to compare with that of the operator."""
        root = self.root
        return fingerprint(root.keys[keyid] for keyid in root.roles[_ROOT].keyids)

    def read_grants(self) -> dict[str, Grant]:
        """Return who may publish what, by publisher."""
        trusted = self._get_trusted()
        targets = trusted.targets
        roles = targets.delegations.roles if targets.delegations is not None else None
        bins = [name for name in roles or () if name.startswith(BIN)]
        with self._guard:
            parts = [self._load_targets(trusted, name, _TARGETS) for name in bins]
        return read_grants(parts or [targets])

    def refresh(self) -> None:
        """Read and verify the current state of the registry.

        Raises:
            SignatureError: When it is not as its keys signed it, or older than seen before.
            RegistryError: When the registry cannot be read.
        """
        with self._guard:
            self._refresh()

    def find(self, target: str) -> Found | None:
        """Return what the registry signs of a document; None if it signs none of that name.

        Args:
            target: Its name: a package for its index, or the catalogue or the feed.

        Raises:
            SignatureError: When it is not as its keys signed it.
        """
        with self._guard:
            trusted = self._refresh() if self._trusted is None else self._trusted
            return self._walk(trusted, target)

    def find_role(self, target: str) -> Role | None:
        """Return the role that signs a document, whether or not it has; None if none may.

        Raises:
            SignatureError: When the registry is not as its keys signed it.
        """
        with self._guard:
            trusted = self._refresh() if self._trusted is None else self._trusted
            delegator, targets = _TARGETS, self._load_targets(trusted, _TARGETS, _ROOT)
            while targets.delegations is not None:
                role = next((name for name, _ in roles_for(targets.delegations, target)), None)
                if role is None:
                    break
                if not role.startswith(BIN):
                    keys = keys_of(targets.delegations, role)
                    is_listed = f"{role}.json" in trusted.snapshot.meta
                    return Role(name=role, keys=keys, is_listed=is_listed)
                delegator, targets = role, self._load_targets(trusted, role, delegator)
        return None

    def read(self, target: str) -> Document | None:
        """Return a document, verified; None if the registry signs none of that name.

        Raises:
            SignatureError: When it is not as its keys signed it.
            RegistryError: When the registry cannot be read.
        """
        found = self.find(target)
        return None if found is None else Document(self.read_content(found, target), found.digest)

    def read_content(self, found: Found, label: str) -> bytes:
        """Return the bytes of a signed document, verified; those of remote registries are kept."""
        kept = self._state / "documents" / found.digest.removeprefix("sha256:")
        path = blob_path(found.digest)
        if self._files.is_remote or self.is_offline:
            with contextlib.suppress(OSError, exceptions.LengthOrHashMismatchError):
                data = read_bytes(kept, MAX_DOCUMENT_BYTES)
                found.file.verify_length_and_hashes(data)
                return data
        is_cut_off = self.is_offline and self._files.is_remote
        document = None if is_cut_off else self._files.read(path)
        if document is None:
            raise SignatureError(
                f"what was signed of {label} is missing",
                kind="incomplete",
                where=f"{self.location}/{path}",
                hint="run this once without --offline"
                if is_cut_off
                else "publishing was interrupted or the file was removed: let its publisher run "
                "`composable registry sign`",
            )
        try:
            found.file.verify_length_and_hashes(document.data)
        except exceptions.LengthOrHashMismatchError as error:
            raise SignatureError(
                f"{label} differs from what was signed",
                kind="wrong-content",
                where=f"{self.location}/{path}",
                hint=f"the registry is damaged or malicious: {_ASK}",
            ) from error
        if self._files.is_remote:
            atomic.write_bytes(kept, document.data)
        return document.data

    def known_files(self) -> dict[str, MetaFile]:
        """Return version and digest of the newest file of each role that this machine saw listed.

        Of the list itself, the snapshot, the version alone.
        """
        with contextlib.suppress(OSError, exceptions.RepositoryError, KeyError, ValueError):
            snapshot = Metadata[Snapshot].from_bytes(read_bytes(self._local(_SNAPSHOT))).signed
            files = {name.removesuffix(".json"): file for name, file in snapshot.meta.items()}
            return {**files, _SNAPSHOT: MetaFile(snapshot.version)}
        return {}

    def load_root(self) -> TrustedMetadataSet:
        """Return the root keys alone: the pinned ones, followed through every signed change.

        Raises:
            SignatureError: When the registry has no root, or one that its keys did not sign.
        """
        with atomic.advisory_lock(self._state / "lock"):
            return self._load_root()

    def _get_trusted(self) -> TrustedMetadataSet:
        with self._guard:
            return self._refresh() if self._trusted is None else self._trusted

    def _refresh(self) -> TrustedMetadataSet:
        with atomic.advisory_lock(self._state / "lock"):
            trusted = self._load_root()
            self._load_timestamp(trusted)
            self._load_snapshot(trusted)
            self._load_targets(trusted, _TARGETS, _ROOT)
        self._trusted = trusted
        return trusted

    def _load_root(self) -> TrustedMetadataSet:
        pinned = self._read_local(_ROOT)
        with self._explained(_ROOT, None):
            data = pinned if pinned is not None else self._fetch(_ROOT, 1)
            trusted = TrustedMetadataSet(data, EnvelopeType.METADATA)
            if pinned is None:
                self._keep(_ROOT, data)
            trusted.reference_time = _EARLIEST if self.is_offline else self._now() - self._max_stale
            for version in range(trusted.root.version + 1, trusted.root.version + MAX_ROOT_CHANGES):
                newer = None if self.is_offline else self._files.read(self._path(_ROOT, version))
                if newer is None:
                    break
                trusted.update_root(newer.data)
                self._keep(_ROOT, newer.data)
        return trusted

    def _load_timestamp(self, trusted: TrustedMetadataSet) -> None:
        local = self._read_local(_TIMESTAMP)
        if local is not None:
            with contextlib.suppress(exceptions.RepositoryError):
                trusted.update_timestamp(local)
        with self._explained(_TIMESTAMP, trusted):
            data = self._fetch(_TIMESTAMP, None)
            try:
                trusted.update_timestamp(data)
                self._keep(_TIMESTAMP, data)
            except exceptions.EqualVersionNumberError:
                pass  # the one that is kept already
        self._check_clock(trusted.timestamp)

    def _load_snapshot(self, trusted: TrustedMetadataSet) -> None:
        local = self._read_local(_SNAPSHOT)
        if local is not None:
            with contextlib.suppress(exceptions.RepositoryError):
                trusted.update_snapshot(local, trusted=True)
                return
        before = trusted.get(_SNAPSHOT)
        with self._explained(_SNAPSHOT, trusted, before):
            version = trusted.timestamp.snapshot_meta.version
            data = self._fetch(_SNAPSHOT, version if trusted.root.consistent_snapshot else None)
            trusted.update_snapshot(data)
            self._keep(_SNAPSHOT, data)

    def _load_targets(self, trusted: TrustedMetadataSet, role: str, delegator: str) -> Targets:
        if trusted.contains(role, delegator):
            return cast(Targets, trusted[role])
        targets = self._read_targets(trusted, role, delegator)
        accept_identities_of(targets, read_sigstore(trusted.targets))
        return targets

    def _read_targets(self, trusted: TrustedMetadataSet, role: str, delegator: str) -> Targets:
        local = self._read_local(role)
        if local is not None:
            with contextlib.suppress(exceptions.RepositoryError):
                return trusted.update_delegated_targets(local, role, delegator)
        meta = trusted.snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise SignatureError(
                f"{_describe_role(role)} may publish, but no list of what it has published is "
                "signed yet",
                kind="incomplete",
                where=self.location,
                hint="let the publisher publish or run `composable registry sign`, and then the "
                "operator of the registry run `composable registry sign`",
            )
        with self._explained(role, trusted, delegator=delegator):
            data = self._fetch(role, meta.version if trusted.root.consistent_snapshot else None)
            try:
                targets = trusted.update_delegated_targets(data, role, delegator)
            except exceptions.UnsignedMetadataError as error:
                raise self._refuse_signer(role, trusted, delegator, data) from error
            self._keep(role, data)
        return targets

    def _walk(self, trusted: TrustedMetadataSet, target: str) -> Found | None:
        """Search the delegations for a target in the order of the TUF specification, 5.6.7."""
        pending = [(_TARGETS, _ROOT)]
        visited: set[str] = set()
        while pending and len(visited) <= MAX_DELEGATIONS:
            role, delegator = pending.pop()
            if role in visited:
                continue
            targets = self._load_targets(trusted, role, delegator)
            file = targets.targets.get(target)
            if file is not None:
                return self._describe(trusted, file, role, delegator)
            visited.add(role)
            children = []
            for child, is_final in (
                roles_for(targets.delegations, target) if (targets.delegations) else ()
            ):
                children.append((child, role))
                if is_final:
                    pending = []
                    break
            pending.extend(reversed(children))
        return None

    def _describe(
        self, trusted: TrustedMetadataSet, file: TargetFile, role: str, delegator: str
    ) -> Found:
        keys: tuple[Key, ...] = ()
        if delegator != _ROOT:
            delegations = cast(Targets, trusted[delegator]).delegations
            keys = keys_of(delegations, role) if delegations is not None else ()
        publisher = role.removeprefix(PUBLISHER) if role.startswith(PUBLISHER) else None
        return Found(file=file, publisher=publisher, keys=keys)

    def _path(self, role: str, version: int | None) -> str:
        return metadata_path(quote(role, ""), version, self._folder)

    def _fetch(self, role: str, version: int | None) -> bytes:
        """Return metadata of the registry; offline, what is kept of it.

        Raises:
            SignatureError: When it is missing.
        """
        path = self._path(role, version)
        if self.is_offline:
            local = self._read_local(role)
            if local is not None:
                return local
        else:
            document = self._files.read(path)
            if document is not None:
                return document.data
        where = f"{self.location}/{path}"
        if self.is_offline:
            raise SignatureError(
                "was never verified on this machine, and --offline is set",
                kind="incomplete",
                where=where,
                hint="run this once without --offline",
            )
        if role == _TIMESTAMP and self.is_pinned:
            raise SignatureError(
                "the registry was signed when this machine used it before, and is no longer",
                kind="unsigned",
                where=where,
                hint=f"somebody removed its signatures: {_ASK}; if the operator confirms it, "
                f"forget the keys: rm -r {shlex.quote(str(self._state))}",
            )
        raise SignatureError(
            "is missing: the registry is only partly signed",
            kind="incomplete",
            where=where,
            hint="try again in a minute; if it persists, its operator has to run "
            "`composable registry sign`",
        )

    def _check_clock(self, timestamp: Timestamp) -> None:
        """Refuse a clock that is before the time of the registry's newest signature."""
        issued = timestamp.unrecognized_fields.get(ISSUED)
        with contextlib.suppress(TypeError, ValueError):
            signed = datetime.datetime.fromisoformat(str(issued))
            if self._now() < signed - CLOCK_TOLERANCE:
                raise SignatureError(
                    f"the clock of this machine is wrong: it says {self._now():%Y-%m-%d %H:%M} "
                    f"UTC, and the registry was signed at {signed:%Y-%m-%d %H:%M} UTC",
                    kind="clock",
                    where=self.location,
                    hint="set the clock; with a clock that is behind, old states would be accepted",
                )

    @contextlib.contextmanager
    def _explained(
        self,
        role: str,
        trusted: TrustedMetadataSet | None,
        before: object = None,
        *,
        delegator: str = _ROOT,
    ) -> Iterator[None]:
        """Raise errors that say what a failed check of TUF means for a registry."""
        try:
            yield
        except exceptions.ExpiredMetadataError as error:
            raise self._refuse_expired(role, trusted) from error
        except exceptions.UnsignedMetadataError as error:
            raise self._refuse_signer(role, trusted, delegator) from error
        except exceptions.RepositoryError as error:
            is_newer_refused = role == _SNAPSHOT and (
                trusted is not None and trusted.get(_SNAPSHOT) is before
            )
            is_mismatch = isinstance(error, exceptions.LengthOrHashMismatchError)
            is_version = isinstance(error, exceptions.BadVersionNumberError)
            if not is_mismatch and (
                (role == _TIMESTAMP and is_version) or (is_newer_refused and before is not None)
            ):
                raise SignatureError(
                    f"went back to an older state than this machine has seen: {error}",
                    kind="rollback",
                    where=f"{self.location}/{self._folder}/{role}",
                    hint="somebody replaced newer files by older ones, or restored the registry "
                    f"from a backup: {_ASK}, who signs a newer state with `composable registry "
                    "sign`",
                ) from error
            if is_mismatch or is_version:
                raise SignatureError(
                    f"{_describe_role(role)} is not of the state that the registry lists: {error}",
                    kind="mix-and-match",
                    where=f"{self.location}/{self._folder}/{role}",
                    hint="files of different states were mixed, or a copy of the registry was cut "
                    f"short: copy it again, or {_ASK.partition('; ')[2]}",
                ) from error
            raise SignatureError(
                f"{_describe_role(role)} is damaged: {error}",
                kind="wrong-content",
                where=f"{self.location}/{self._folder}/{role}",
                hint=f"the registry is damaged or malicious: {_ASK}",
            ) from error

    def _refuse_expired(self, role: str, trusted: TrustedMetadataSet | None) -> SignatureError:
        moment = f"the clock of this machine says {self._now():%Y-%m-%d %H:%M} UTC"
        if trusted is not None and trusted.root.is_expired(trusted.reference_time):
            role = _ROOT
        if role in _ONLINE:
            assert trusted is not None
            loaded = cast(Timestamp, trusted.get(role) or trusted.timestamp)
            until = f"{loaded.expires:%Y-%m-%d %H:%M}"
            return SignatureError(
                f"nobody has confirmed since {until} UTC that this is the newest state ({moment})",
                kind="freeze",
                where=f"{self.location}/{self._folder}/{role}",
                hint="somebody may be withholding newer releases; the operator confirms the state "
                "with `composable registry sign`. For a mirror that is updated rarely, allow it: "
                "--max-stale DAYS",
            )
        return SignatureError(
            f"the signature of {_describe_role(role)} has expired ({moment})",
            kind="expired",
            where=f"{self.location}/{self._folder}/{role}",
            hint="the operator signs it again with `composable registry sign`, where two root keys "
            "are; to use it until then: --max-stale DAYS",
        )

    def _refuse_signer(
        self, role: str, trusted: TrustedMetadataSet | None, delegator: str, data: bytes = b""
    ) -> SignatureError:
        where = f"{self.location}/{self._folder}/{role}"
        if role.startswith(PUBLISHER) and trusted is not None:
            delegations = cast(Targets, trusted[delegator]).delegations
            if delegations is not None and not keys_of(delegations, role):
                return SignatureError(
                    f"the keys of {_describe_role(role)} were revoked",
                    kind="revoked",
                    where=where,
                    hint="do not use its releases; once the operator has granted a new key, the "
                    "publisher signs those that are genuine with `composable registry sign`",
                )
            if delegations is not None:
                metadata: Metadata[Targets] = Metadata.from_bytes(data)
                refusal = explain_refusal(
                    keys_of(delegations, role), metadata.signatures.values(), metadata.signed_bytes
                )
                if refusal is not None:
                    return SignatureError(
                        f"the signature of {_describe_role(role)} is not valid: {refusal}",
                        kind=refusal.kind,
                        where=where,
                        hint=f"somebody else wrote it, or the registry is damaged: {_ASK}",
                    )
        return SignatureError(
            f"{_describe_role(role)} is not signed by the keys in charge of it",
            kind="wrong-signer",
            where=where,
            hint="somebody without those keys wrote it, or a change of keys is not complete: "
            f"{_ASK}; who holds the new keys runs `composable registry sign`",
        )

    def _local(self, role: str) -> Path:
        return self._state / f"{quote(role, '')}.json"

    def _read_local(self, role: str) -> bytes | None:
        try:
            return read_bytes(self._local(role), MAX_DOCUMENT_BYTES)
        except FileNotFoundError:
            return None

    def _keep(self, role: str, data: bytes) -> None:
        atomic.write_bytes(self._local(role), data)


def _describe_role(role: str) -> str:
    if role.startswith(PUBLISHER):
        return f"publisher {role.removeprefix(PUBLISHER)!r}"
    return {
        _ROOT: "the list of root keys",
        _TARGETS: "the list of publishers",
        _SNAPSHOT: "the list of current versions",
        _TIMESTAMP: "the timestamp",
    }.get(role, f"the list {role!r}")
