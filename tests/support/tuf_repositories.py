"""A repository of TUF metadata in memory, to serve clients whatever a test wants."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from composable.errors import SignatureError
from composable.files.blobs import blob_path
from composable.interface.digest import digest_bytes
from composable.packaging.registry.storage import Document
from composable.packaging.trust.client import SignedDocuments
from composable.packaging.trust.ledger import describe_file

START = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC)
TOP = ("root", "timestamp", "snapshot", "targets")


class Memory:
    """A storage in memory that remembers what was asked for."""

    location = "memory"
    is_remote = False

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a file."""
        self.asked.append(path.removeprefix("trust/"))
        data = self.files.get(path)
        return None if data is None else Document(data, None)

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield a file."""
        yield self.files[path][start:]

    def files_under(self, folder: str) -> list[str] | None:
        """List nothing."""
        return None


class Repository:
    """A repository whose metadata a test changes and publishes.

    Args:
        has_digests: Whether metadata is listed with its length and digest.
    """

    def __init__(self, *, has_digests: bool = False) -> None:
        self.storage = Memory()
        self.now = START
        self.has_digests = has_digests
        until = START + datetime.timedelta(days=30)
        self.signed: dict[str, Any] = {
            "root": Root(expires=until),
            "timestamp": Timestamp(expires=until),
            "snapshot": Snapshot(expires=until),
            "targets": Targets(expires=until),
        }
        self.signers: dict[str, list[CryptoSigner]] = {}
        for role, signed in self.signed.items():
            signed.version = 0
            self.rotate(role)
        self.publish("root", "targets", "snapshot", "timestamp")

    def __getitem__(self, role: str) -> Any:
        return self.signed[role]

    def rotate(self, role: str) -> None:
        """Give a top-level role one new key."""
        root = self.signed["root"]
        for keyid in list(root.roles[role].keyids):
            root.revoke_key(keyid, role)
        self.signers[role] = []
        self.add_key(role)

    def add_key(self, role: str) -> CryptoSigner:
        """Give a top-level role a further key."""
        signer = CryptoSigner.generate_ed25519()
        self.signed["root"].add_key(signer.public_key, role)
        self.signers[role].append(signer)
        return signer

    def set_keys(
        self, role: str, keys: Iterable[CryptoSigner], threshold: int, sigs: Iterable[CryptoSigner]
    ) -> None:
        """Give a top-level role these keys, and sign with those."""
        root = self.signed["root"]
        for keyid in list(root.roles[role].keyids):
            root.revoke_key(keyid, role)
        for signer in keys:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = threshold
        self.signers[role] = list(sigs)

    def delegate(self, delegator: str, role: DelegatedRole) -> None:
        """Delegate to a role with a new key, besides those that it has."""
        if role.name not in self.signed:
            self.signed[role.name] = Targets(expires=START + datetime.timedelta(days=30))
            self.signed[role.name].version = 0
            self.signers[role.name] = []
        targets = self.signed[delegator]
        if targets.delegations is None:
            targets.delegations = Delegations({}, {})
        targets.delegations.roles[role.name] = role
        signer = CryptoSigner.generate_ed25519()
        targets.add_key(signer.public_key, role.name)
        self.signers[role.name].append(signer)

    def add_target(
        self, role: str, name: str, data: bytes, hashes: list[str] | None = None
    ) -> None:
        """List a document in a role, and store it."""
        self.signed[role].targets[name] = TargetFile.from_data(name, data, hashes or ["sha256"])
        self.storage.files[blob_path(digest_bytes(data))] = data

    def publish(self, *roles: str) -> None:
        """Publish the next version of roles, in this order."""
        for role in roles:
            signed = self.signed[role]
            signed.version += 1
            self.store(role, self.sign(role))

    def sign(self, role: str) -> Metadata[Any]:
        """Return the metadata of a role, signed."""
        metadata = Metadata(self.signed[role])
        for signer in self.signers[role]:
            metadata.sign(signer, append=True)
        return metadata

    def store(self, role: str, metadata: Metadata[Any], *, version: int | None = None) -> None:
        """Store metadata, and list it where it belongs."""
        data = metadata.to_bytes()
        number = version or self.signed[role].version
        self.storage.files[self.path(role, number)] = data
        listed = describe_file(number, data) if self.has_digests else MetaFile(number)
        if role == "snapshot":
            self.signed["timestamp"].snapshot_meta = listed
        elif role not in TOP or role == "targets":
            self.signed["snapshot"].meta[f"{role}.json"] = listed

    def path(self, role: str, version: int) -> str:
        """Return the path of the metadata of a role."""
        name = quote(role, "")
        return f"trust/{name if role == 'timestamp' else f'{version}.{name}'}.json"

    def forget(self, role: str) -> None:
        """Remove all versions of a role."""
        for path in list(self.storage.files):
            if path.startswith("trust/") and path.endswith(f"{quote(role, '')}.json"):
                del self.storage.files[path]


class Client:
    """A client of a repository on a machine of its own.

    Args:
        repository: The repository.
        state: Its folder.
    """

    def __init__(self, repository: Repository, state: Path) -> None:
        self.repository = repository
        self.state = state

    def open(self) -> SignedDocuments:
        """Return a client that has not asked yet."""
        repository = self.repository
        return SignedDocuments(repository.storage, self.state, now=lambda: repository.now)

    def refresh(self) -> str | None:
        """Refresh; return the rule that was broken, or None."""
        try:
            self.open().refresh()
        except SignatureError as error:
            return error.kind
        return None

    def read(self, *names: str) -> list[bytes | str | None]:
        """Read documents with one client; a broken rule stands for a document."""
        client, found = self.open(), []
        for name in names:
            try:
                document = client.read(name)
                found.append(None if document is None else document.data)
            except SignatureError as error:
                found.append(error.kind)
        return found

    def kept(self, role: str) -> bytes | None:
        """Return what it keeps of a role."""
        path = self.state / f"{quote(role, '')}.json"
        return path.read_bytes() if path.exists() else None

    def version(self, role: str) -> int | None:
        """Return the version that it keeps of a role."""
        data = self.kept(role)
        return None if data is None else Metadata.from_bytes(data).signed.version
