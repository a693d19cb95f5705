"""Signing what publishers publish, and confirming it with the online key.

A publisher signs the list of its own documents. Clients see it once the holder of the online key
has confirmed it: the timestamp is replaced if it is still the one that was read, so that concurrent
signers cannot lose each other's work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from securesystemslib.signer import Key, Signer
from tuf.api import exceptions
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from composable.errors import (
    SignatureError,
)
from composable.packaging.trust.keys import format_public_key
from composable.packaging.trust.ledger import (
    MAX_ATTEMPTS,
    Held,
    Ledger,
    describe_file,
    keys_in,
    sample_of,
    sign_metadata,
)
from composable.packaging.trust.metadata import (
    ADVISORIES,
    ADVISORIES_ROLE,
    CATALOG,
    ISSUED,
    ONLINE_DAYS,
    PUBLISHER,
    REGISTRY_ROLE,
    Grant,
    expiry,
    metadata_path,
    to_bytes,
)

# What a change of one publisher's documents makes of the previous one.
ChangeDocument = Callable[[bytes | None], bytes]
# The new catalogue, from the previous one and the indexes that changed, by package.
CompileCatalog = Callable[[bytes | None, Mapping[str, bytes]], bytes]


class Signatory(Ledger):
    """Signs the documents of a registry with the keys of this machine."""

    def find_publisher(self, name: str) -> tuple[str, list[Signer]]:
        """Return the publisher of a package, with the signers of this machine's keys for it.

        Raises:
            SignatureError: When nobody may publish that name, or its publisher has no keys.
            KeyFileError: When no key of the publisher is here.
            IdentityError: When its identity could not be signed in.
        """
        held = self.load()
        grant = next((grant for grant in held.grants.values() if grant.covers(name)), None)
        if grant is None:
            mine = self.keyring.files()
            key = format_public_key(mine[0].public) if len(mine) == 1 else "ed25519:…"
            raise SignatureError(
                f"no publisher may publish {name!r} in this signed registry",
                kind="wrong-publisher",
                where=self.location,
                hint=f"ask its operator to run `composable registry grant {self.location} "
                f"PUBLISHER {name} --key {key}`",
            )
        if not grant.keys:
            raise SignatureError(
                f"the keys of publisher {grant.publisher!r} were revoked",
                kind="revoked",
                where=self.location,
                hint="make a new key with `composable registry key`, or choose another identity, "
                "and send it to the operator",
            )
        return grant.publisher, self.open_keys(grant.keys, f"publisher {grant.publisher!r}")

    def find_advisories_signers(self) -> list[Signer]:
        """Return the signers of this machine's keys for the feed of advisories.

        Raises:
            KeyFileError: When there is none: a root key is needed.
        """
        return self.open_keys(keys_in(self.load().root, "root"), "the feed of advisories")

    def sign_document(self, target: str, change: ChangeDocument) -> bool:
        """Change a document of a publisher, or the feed of advisories, and sign it.

        Args:
            target: A package name, or the feed.
            change: Returns the new bytes, given those that were signed before.

        Returns:
            Whether it changed, or was not signed by a key of this machine before.
        """
        held = self.load()
        if target == ADVISORIES:
            role, keys = ADVISORIES_ROLE, tuple(keys_in(held.root, "root"))
        else:
            publisher, _ = self.find_publisher(target)
            role, keys = f"{PUBLISHER}{publisher}", held.grants[publisher].keys
        delegator = held.delegator_of(target)
        for _ in range(MAX_ATTEMPTS):
            number = self.next_version(role)
            before = self.load_delegated(role, delegator)
            previous = None if before is None else before.targets.get(target)
            data = None if previous is None else self.read_document(previous)
            wanted = change(data)
            if wanted == data and before is not None:
                return False
            if self.sign_targets(role, keys, {target: wanted}, before, number):
                return True
        raise self.report_contention()

    def resign(self, publisher: str) -> bool:
        """Sign the list of a publisher again, with the keys of this machine.

        Returns:
            Whether it had a valid list, by whichever of its keys.
        """
        held = self.load()
        grant = self.find_grant(held, publisher)
        role = f"{PUBLISHER}{publisher}"
        delegator = held.delegator_of(sample_of(grant))
        for _ in range(MAX_ATTEMPTS):
            number = self.next_version(role)
            before = self.load_delegated(role, delegator)
            if before is None:
                return False
            if self.sign_targets(role, grant.keys, {}, before, number):
                return True
        raise self.report_contention()

    def targets_of(self, publisher: str) -> dict[str, bytes]:
        """Return the documents that a publisher has signed, by package; none without a valid list.

        They may not be visible yet.
        """
        held = self.load()
        grant = self.find_grant(held, publisher)
        role = f"{PUBLISHER}{publisher}"
        found = self.load_delegated(role, held.delegator_of(sample_of(grant)))
        files = {} if found is None else found.targets
        return {name: self.read_document(file) for name, file in files.items()}

    def mine(self) -> list[str]:
        """Return the publishers of whom this machine has a key, or is signed in as an identity."""
        ids = {file.public.keyid for file in self.keyring.files()}
        return [
            grant.publisher
            for grant in self.load().grants.values()
            if any(key.keyid in ids or self.keyring.is_signed_in_as(key) for key in grant.keys)
        ]

    def has_online_key(self) -> bool:
        """Return whether this machine has the online key."""
        root = self.documents.load_root().root
        return bool(self.keyring.find(root.roles["timestamp"].keyids))

    def confirm(
        self,
        compile_catalog: CompileCatalog,
        *,
        days: float = ONLINE_DAYS,
    ) -> list[str]:
        """Make everything visible that its publishers signed, and confirm that it is current.

        Args:
            compile_catalog: Returns the new catalogue, given the previous one and the indexes that
                changed, by package.
            days: How long the confirmation holds.

        Returns:
            The publishers whose lists changed.

        Raises:
            KeyFileError: When the online key is not here.
            SignatureError: When the registry went back to an older state.
        """
        for _ in range(MAX_ATTEMPTS):
            changed = self._try_to_confirm(compile_catalog, days)
            if changed is not None:
                return changed
        raise self.report_contention()

    def _try_to_confirm(
        self,
        compile_catalog: CompileCatalog,
        days: float,
    ) -> list[str] | None:
        """Confirm once; None if another signer came first."""
        held = self.load()
        online = tuple(keys_in(held.root, "timestamp"))
        signers = self.open_keys(online, "the registry (the online key)")
        seen = self.files.read(metadata_path("timestamp"))
        versions = self.list_versions()
        previous = self.load_newest("snapshot", held.root, versions)
        old = {} if previous is None else dict(previous.meta)
        meta: dict[str, MetaFile] = dict(old)
        for name, listed in old.items():
            role = name.removesuffix(".json")
            if listed.version not in versions.get(role, []):
                raise SignatureError(
                    f"lacks {metadata_path(role, listed.version)}, which it lists",
                    kind="incomplete",
                    where=self.location,
                    hint="restore that file from a backup or a mirror; nothing was signed",
                )
        changed: list[str] = []
        indexes: dict[str, bytes] = {}
        self._add_meta(meta, "targets", held.targets.version)
        for name, part in held.bins.items():
            self._add_meta(meta, name, part.version)
        for grant in held.grants.values():
            role = f"{PUBLISHER}{grant.publisher}"
            known = old.get(f"{role}.json")
            newest = max(versions.get(role, [0]))
            if not grant.keys or newest <= (known.version if known is not None else 0):
                continue
            found = self.load_newest(role, held.delegator_of(sample_of(grant)), versions)
            if found is None or (known is not None and found.version <= known.version):
                continue
            self._add_meta(meta, role, found.version)
            indexes |= self._find_changed(grant, role, known, found)
            changed.append(grant.publisher)
        self._sign_catalog(held, online, compile_catalog, indexes)
        for role in (REGISTRY_ROLE, ADVISORIES_ROLE):
            listed = self.load_delegated(role, held.targets)
            if listed is not None:
                self._add_meta(meta, role, listed.version)
        # The same number for both: the timestamp is replaced, and the snapshots remember it.
        number = max([0, *versions.get("snapshot", []), self.find_known("snapshot")]) + 1
        until = expiry(self.now(), days)
        snapshot = Metadata(Snapshot(version=number, expires=until, meta=meta))
        sign_metadata(snapshot, signers)
        data = to_bytes(snapshot)
        if not self.files.create(metadata_path("snapshot", number), data):
            return None
        stamp = Timestamp(
            version=number,
            expires=until,
            snapshot_meta=describe_file(number, data),
            unrecognized_fields={ISSUED: self.now().replace(microsecond=0).isoformat()},
        )
        signed = Metadata(stamp)
        sign_metadata(signed, signers)
        if not self.files.replace(metadata_path("timestamp"), to_bytes(signed), seen):
            return None
        self.documents.refresh()
        return changed

    def _find_changed(
        self, grant: Grant, role: str, known: MetaFile | None, found: Targets
    ) -> dict[str, bytes]:
        """Return the documents of a publisher that changed since it was listed last."""
        before: dict[str, TargetFile] = {}
        if known is not None:
            document = self.files.read(metadata_path(role, known.version))
            with contextlib.suppress(exceptions.RepositoryError):
                if document is not None:
                    known.verify_length_and_hashes(document.data)
                    before = Metadata[Targets].from_bytes(document.data).signed.targets
        return {
            name: self.read_document(file)
            for name, file in found.targets.items()
            if grant.covers(name) and (name not in before or before[name].hashes != file.hashes)
        }

    def _sign_catalog(
        self,
        held: Held,
        online: tuple[Key, ...],
        compile_catalog: CompileCatalog,
        indexes: Mapping[str, bytes],
    ) -> None:
        """Sign the catalogue again if it changes, or if it is signed by another key."""
        for _ in range(MAX_ATTEMPTS):
            number = self.next_version(REGISTRY_ROLE)
            before = self.load_delegated(REGISTRY_ROLE, held.targets)
            file = None if before is None else before.targets.get(CATALOG)
            data = None if file is None else self.read_document(file)
            wanted = compile_catalog(data, indexes)
            if wanted == data:
                return
            if self.sign_targets(REGISTRY_ROLE, online, {CATALOG: wanted}, before, number):
                return
        raise self.report_contention()

    def _add_meta(self, meta: dict[str, MetaFile], role: str, version: int) -> None:
        """Add a role's file to the list of current versions, with its digest."""
        name = f"{role}.json"
        if name not in meta or meta[name].version != version:
            document = self.files.read(metadata_path(role, version))
            if document is not None:
                meta[name] = describe_file(version, document.data)
