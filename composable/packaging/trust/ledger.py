"""The signed metadata of a registry as its signers see it: what exists, and what is signed validly.

Every file with a version in its name is created once and never changed. Metadata that its keys did
not sign is treated as absent: whoever can write to the storage can add files, and no authority.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from securesystemslib.signer import Key, Signer
from tuf.api import exceptions
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    TargetFile,
    Targets,
)

from composable.errors import (
    ComposableError,
    KeyFileError,
    PackagingError,
    RegistryError,
    SignatureError,
    did_you_mean,
)
from composable.files.blobs import blob_path
from composable.interface.digest import digest_bytes
from composable.packaging.registry.storage import WritableStorage, put_blob
from composable.packaging.trust.client import Clock, SignedDocuments, read_clock
from composable.packaging.trust.identities import IdentityKey
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import format_public_key, shorten_key
from composable.packaging.trust.metadata import (
    FOLDER,
    PUBLISHER_DAYS,
    Grant,
    accept_identities_of,
    expiry,
    has_bins,
    metadata_path,
    read_grants,
    read_sigstore,
    roles_for,
    to_bytes,
)

MAX_ATTEMPTS: Final = 20
VERSIONED: Final = re.compile(r"([1-9][0-9]{0,11})\.([a-z0-9-]+)\.json", re.ASCII)
Versions = Mapping[str, list[int]]


@dataclass(kw_only=True)
class Held:
    """The offline metadata of a registry, verified.

    Args:
        root: The keys of all roles.
        targets: Who may publish what.
        bins: The same, in parts; empty for few publishers.
    """

    root: Root
    targets: Targets
    bins: dict[str, Targets]

    @property
    def grants(self) -> dict[str, Grant]:
        """Who may publish what, by publisher."""
        return read_grants(self.bins.values() if self.bins else [self.targets])

    def delegator_of(self, target: str) -> Targets:
        """Return the list that says who may publish a target: all publishers, or those of a bin."""
        assert self.targets.delegations is not None
        role = next((name for name, _ in roles_for(self.targets.delegations, target)), "")
        return self.bins.get(role, self.targets)


class Ledger:
    """The signed metadata of a registry, and the keys of this machine.

    Args:
        files: The storage of the registry.
        documents: The same registry as this machine has verified it before.
        keyring: The keys.
        now: The time.
    """

    def __init__(
        self,
        files: WritableStorage,
        documents: SignedDocuments,
        keyring: Keyring,
        *,
        now: Clock = read_clock,
    ) -> None:
        self.files = files
        self.documents = documents
        self.keyring = keyring
        self.now = now

    @property
    def location(self) -> str:
        """The location of the registry."""
        return self.files.location

    def load(self) -> Held:
        """Return the offline metadata, verified from the pinned root keys on.

        Raises:
            SignatureError: When some of it is missing, not signed, or older than seen before.
        """
        root = self.documents.load_root().root
        versions = self.list_versions()
        if not versions:
            raise SignatureError(
                "the registry was signed when this machine used it before, and is no longer",
                kind="unsigned",
                where=f"{self.location}/{FOLDER}",
                hint="somebody removed its signatures: restore the folder from a backup or a "
                "mirror; nothing was changed",
            )
        targets = self.load_newest("targets", root, versions)
        if targets is None:
            raise SignatureError(
                "has no list of publishers that its offline keys signed",
                kind="incomplete",
                where=f"{self.location}/{FOLDER}",
                hint="restore the folder from a backup or a mirror; nothing was changed",
            )
        sigstore, bins = read_sigstore(targets), {}
        accept_identities_of(targets, sigstore)
        if has_bins(targets):
            for name in _bins_of(targets):
                found = self.load_newest(name, targets, versions)
                if found is None:
                    raise SignatureError(
                        f"lacks {name}, one part of its list of publishers",
                        kind="incomplete",
                        where=f"{self.location}/{FOLDER}",
                        hint="restore the folder from a backup or a mirror; nothing was changed",
                    )
                accept_identities_of(found, sigstore)
                bins[name] = found
        return Held(root=root, targets=targets, bins=bins)

    def find_grant(self, held: Held, publisher: str) -> Grant:
        """Return what a publisher may publish.

        Raises:
            RegistryError: When there is no such publisher.
        """
        grants = held.grants
        if publisher not in grants:
            raise RegistryError(
                f"no publisher {publisher!r}",
                where=self.location,
                hint=did_you_mean(publisher, grants),
            )
        return grants[publisher]

    def load_newest(self, role: str, delegator: Root | Targets, versions: Versions) -> Any:
        """Return the newest version of a role that its keys signed; None if there is none.

        None, too, if its keys signed an old one alone, and the newest that this machine has seen is
        still there: other keys signed that, and were replaced since.

        Raises:
            SignatureError: When this machine has seen a newer one listed that is gone.
        """
        for version in sorted(versions.get(role, []), reverse=True):
            document = self.files.read(metadata_path(role, version))
            if document is None:
                continue
            try:
                metadata: Metadata[Any] = Metadata.from_bytes(document.data)
                verify_metadata(delegator, role, metadata)
            except (exceptions.RepositoryError, ValueError):
                continue
            if metadata.signed.version == version:
                known = self.find_known(role)
                if version < known:
                    if self._has_known(role):
                        return None
                    raise SignatureError(
                        f"has only version {version} of {role!r}, and this machine has seen "
                        f"version {known}",
                        kind="rollback",
                        where=f"{self.location}/{FOLDER}",
                        hint="files were removed, or the registry was restored from an old copy: "
                        "restore the newer files from a backup or a mirror; nothing was signed",
                    )
                return metadata.signed
        return None

    def load_delegated(self, role: str, delegator: Targets) -> Targets | None:
        """Return the newest version of a delegated role that its keys signed; None for none."""
        found: Targets | None = self.load_newest(role, delegator, self.list_versions())
        return found

    def find_known(self, role: str) -> int:
        """Return the newest version of a role that this machine has seen listed; 0 for none."""
        known = self.documents.known_files().get(role)
        return 0 if known is None else known.version

    def _has_known(self, role: str) -> bool:
        """Return whether the registry still has the newest file of a role that was seen listed."""
        known = self.documents.known_files()[role]
        document = self.files.read(metadata_path(role, known.version))
        if document is None or not known.hashes:
            return False
        try:
            known.verify_length_and_hashes(document.data)
        except exceptions.LengthOrHashMismatchError:
            return False
        return True

    def list_versions(self) -> dict[str, list[int]]:
        """Return the versions of every role that have a file, signed or not."""
        found: dict[str, list[int]] = {}
        for name in self.files.names_in(FOLDER):
            match = VERSIONED.fullmatch(name)
            if match is not None:
                found.setdefault(match[2], []).append(int(match[1]))
        return found

    def next_version(self, role: str) -> int:
        """Return a number that no file of a role has, signed or not."""
        return max([0, *self.list_versions().get(role, []), self.find_known(role)]) + 1

    def read_document(self, file: TargetFile) -> bytes:
        """Return the bytes of a signed document, verified."""
        path = blob_path(f"sha256:{file.hashes['sha256']}")
        document = self.files.read(path)
        try:
            if document is None:
                raise exceptions.LengthOrHashMismatchError("missing")
            file.verify_length_and_hashes(document.data)
        except exceptions.LengthOrHashMismatchError as error:
            raise SignatureError(
                f"what was signed of {file.path} is missing or damaged",
                kind="wrong-content",
                where=f"{self.location}/{path}",
                hint="restore that file from a backup or a mirror; nothing was signed",
            ) from error
        return document.data

    def open_keys(self, keys: Iterable[Key], what: str) -> list[Signer]:
        """Return the signers of those keys that are on this machine, or of an identity.

        Raises:
            KeyFileError: When none of the keys is here, and there are no identities.
            IdentityError: When none of the keys is here, and no identity could be signed in.
        """
        keys = list(keys)
        files = self.keyring.find(key.keyid for key in keys)
        if not files and (identities := [key for key in keys if isinstance(key, IdentityKey)]):
            return [self.keyring.sign_in(identities, what)]
        if not files:
            names = ", ".join(shorten_key(format_public_key(key)) for key in keys)
            raise KeyFileError(
                f"no key of {what} is here ({names})",
                where=str(self.keyring.folder),
                hint="copy the key file there, or set COMPOSABLE_KEYS to its folder",
            )
        return [self.keyring.unlock(file) for file in files]

    def sign_targets(
        self,
        role: str,
        keys: tuple[Key, ...],
        changes: Mapping[str, bytes],
        before: Targets | None,
        number: int | None = None,
    ) -> bool:
        """Create the next version of a delegated role; return False if another signer did.

        `number` is what `next_version` returned before `before` was read: a version that another
        signer created since then has that number.
        """
        signers = self.open_keys(keys, role)
        for data in changes.values():
            put_blob(self.files, digest_bytes(data), data)
        files = dict(before.targets) if before is not None else {}
        for name, data in changes.items():
            files[name] = TargetFile.from_data(name, data, ["sha256"])
        number = number or self.next_version(role)
        until = expiry(self.now(), PUBLISHER_DAYS)
        signed = Metadata(Targets(version=number, expires=until, targets=files))
        sign_metadata(signed, signers)
        return self.files.create(metadata_path(role, number), to_bytes(signed))

    def report_contention(self) -> PackagingError:
        """Return the error for other signers that always came first."""
        return RegistryError(
            f"other signers changed it {MAX_ATTEMPTS} times meanwhile",
            where=self.location,
            hint="run the same command again",
        )


def keys_in(root: Root, role: str) -> list[Key]:
    """Return the keys of a role of the root."""
    return [root.keys[keyid] for keyid in root.roles[role].keyids]


def sample_of(grant: Grant) -> str:
    """Return a target that a grant contains, to find what delegates it."""
    return grant.names[0].replace("*", "x")


def verify_metadata(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> None:
    """Raise if metadata is not signed by enough keys of its role."""
    delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)


def sign_metadata(metadata: Metadata[Any], signers: Iterable[Signer]) -> None:
    """Add signatures to metadata.

    Raises:
        IdentityError: When the identity could not sign.
    """
    for signer in signers:
        try:
            metadata.sign(signer, append=True)
        except exceptions.UnsignedMetadataError as error:
            raise (
                error.__cause__ if isinstance(error.__cause__, ComposableError) else error
            ) from None


def describe_file(version: int, data: bytes) -> MetaFile:
    """Return the version, length and digest of a file of metadata."""
    digest = digest_bytes(data).removeprefix("sha256:")
    return MetaFile(version=version, length=len(data), hashes={"sha256": digest})


def _bins_of(targets: Targets) -> list[str]:
    assert targets.delegations is not None
    return [name for name in targets.delegations.roles or {} if name.startswith("bin-")]
