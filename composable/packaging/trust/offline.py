"""Changes that need offline keys: who may publish what, and the keys of the registry itself.

A change needs the signatures of two root keys. Until it has them it waits in `trust-pending`, where
the holder of another key adds one.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from securesystemslib.signer import Key
from tuf.api import exceptions
from tuf.api.metadata import (
    Delegations,
    Metadata,
    Root,
    Signed,
    Targets,
)

from composable.errors import (
    KeyFileError,
    RegistryError,
)
from composable.packaging.trust.identities import IdentityKey, Sigstore
from composable.packaging.trust.keys import format_public_key, shorten_key
from composable.packaging.trust.ledger import (
    VERSIONED,
    Held,
    Ledger,
    keys_in,
    sign_metadata,
    verify_metadata,
)
from composable.packaging.trust.metadata import (
    ADVISORIES,
    ADVISORIES_ROLE,
    CATALOG,
    FOLDER,
    OFFLINE_DAYS,
    REGISTRY_ROLE,
    ROOT_KEYS,
    ROOT_THRESHOLD,
    SIGSTORE,
    Grant,
    delegate,
    expiry,
    has_bins,
    metadata_path,
    read_grants,
    read_sigstore,
    to_bytes,
)
from composable.packaging.versions.names import confusable_key

PENDING: Final = f"{FOLDER}-pending"
RENEW_DAYS: Final = 60
_TOP: Final = ("root", "targets", "snapshot", "timestamp")


@dataclass(kw_only=True)
class Outcome:
    """What a command on the keys of a registry did.

    Args:
        signed: What was signed.
        waiting: Changes that still lack signatures of offline keys, as sentences.
        missing: How many signatures they lack.
        is_visible: Whether clients see it; else the operator has yet to sign.
    """

    signed: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    missing: int = 0
    is_visible: bool = True


class Authority(Ledger):
    """Changes a signed registry with the offline keys of this machine."""

    def create(self, root_keys: Iterable[Key], online: Key, documents: Mapping[str, bytes]) -> None:
        """Make a registry a signed one.

        Args:
            root_keys: The three offline keys.
            online: The online key.
            documents: The catalogue and the feed of advisories, if they exist.

        Raises:
            RegistryError: When it is signed already.
            KeyFileError: When fewer than two of the offline keys, or not the online key, are here.
        """
        offline = list(root_keys)
        assert len(offline) == ROOT_KEYS
        root = Root(version=1, expires=expiry(self.now(), OFFLINE_DAYS))
        root.keys, root.roles["root"].threshold = {}, 1
        for role in _TOP:
            for key in [online] if role in ("snapshot", "timestamp") else offline:
                root.add_key(key, role)
        root.roles["root"].threshold = root.roles["targets"].threshold = ROOT_THRESHOLD
        operators = _operators(offline, online)
        delegations, _ = delegate({}, operators)
        targets = Targets(
            version=1, expires=expiry(self.now(), OFFLINE_DAYS), delegations=delegations
        )
        signed = {
            "root": self._sign_with(root, offline, ROOT_THRESHOLD, "the root"),
            "targets": self._sign_with(targets, offline, ROOT_THRESHOLD, "the root"),
        }
        if not self.files.create(metadata_path("root", 1), to_bytes(signed["root"])):
            raise RegistryError(
                "is signed already",
                where=self.location,
                hint="to change its keys, run `composable registry rotate`",
            )
        self.files.create(metadata_path("targets", 1), to_bytes(signed["targets"]))
        for role, path in ((REGISTRY_ROLE, CATALOG), (ADVISORIES_ROLE, ADVISORIES)):
            if path in documents:
                self.sign_targets(role, operators[role], {path: documents[path]}, None)

    def grant(self, publisher: str, names: Iterable[str], keys: Iterable[Key]) -> Outcome:
        """Let a publisher publish packages, or give it further names or keys.

        Raises:
            RegistryError: When a name belongs to another publisher, or looks like one that does.
            KeyFileError: When no offline key is here.
        """
        held = self.load()
        before = held.grants
        known = before.get(publisher) or Grant(publisher=publisher, keys=(), names=())
        wanted = tuple(sorted({*known.names, *names}))
        all_keys = {format_public_key(key): key for key in known.keys}
        for key in keys:
            all_keys.setdefault(format_public_key(key), self._date(key))
        if not wanted or not all_keys:
            lacks = "no name that it may publish" if not wanted else "no key"
            raise RegistryError(
                f"publisher {publisher!r} has {lacks}",
                where=self.location,
                hint=f"give it: `composable registry grant {self.location} {publisher} NAME "
                "--key ed25519:…`",
            )
        for other in before.values():
            if other.publisher != publisher:
                self._refuse_taken(other, wanted)
                self._refuse_shared_key(other, all_keys.keys())
        grant = Grant(publisher=publisher, keys=tuple(all_keys.values()), names=wanted)
        return self._commit(held, self._change_grants(held, {**before, publisher: grant}))

    def accept_sigstore(self, sigstore: Sigstore) -> Outcome:
        """Accept identities that a sigstore proves, and no other one any more.

        Raises:
            KeyFileError: When no offline key is here.
        """
        held = self.load()
        if sigstore.trusted_root == held.targets.unrecognized_fields.get(SIGSTORE):
            return Outcome()
        assert held.targets.delegations is not None
        return self._commit(
            held, {"targets": self._delegate("targets", held.targets.delegations, sigstore)}
        )

    def revoke(self, publisher: str, key: str | None = None) -> Outcome:
        """Take the keys of a publisher away; its names stay its own.

        Args:
            publisher: The publisher.
            key: The start of one public key; None for all of them.

        Raises:
            RegistryError: When there is no such publisher or key.
        """
        held = self.load()
        grant = self.find_grant(held, publisher)
        gone = [k for k in grant.keys if key is None or format_public_key(k).startswith(key)]
        if key is not None and len(gone) != 1:
            have = ", ".join(map(format_public_key, grant.keys)) or "none"
            raise RegistryError(
                f"{key[:80]!r} is not one key of publisher {publisher!r}",
                where=self.location,
                hint=f"its keys: {have}",
            )
        left = tuple(k for k in grant.keys if k not in gone)
        changed = Grant(publisher=publisher, keys=left, names=grant.names)
        return self._commit(held, self._change_grants(held, {**held.grants, publisher: changed}))

    def rotate_publisher(self, publisher: str, key: Key) -> Outcome:
        """Replace all keys and identities of a publisher by a new one."""
        held = self.load()
        grant = self.find_grant(held, publisher)
        for other in held.grants.values():
            if other.publisher != publisher:
                self._refuse_shared_key(other, {format_public_key(key)})
        changed = Grant(publisher=publisher, keys=(self._date(key),), names=grant.names)
        return self._commit(held, self._change_grants(held, {**held.grants, publisher: changed}))

    def rotate_root(self, old: str, new: Key) -> Outcome:
        """Replace one of the offline keys.

        Args:
            old: The start of its public key.
            new: The new public key.

        Raises:
            RegistryError: When there is no such key.
        """
        held = self.load()
        offline = keys_in(held.root, "root")
        gone = [key for key in offline if format_public_key(key).startswith(old)]
        if len(gone) != 1 or new.keyid in held.root.keys:
            raise RegistryError(
                f"{old[:80]!r} is not one of the root keys"
                if len(gone) != 1
                else "the new key is in use already",
                where=self.location,
                hint="its root keys: " + ", ".join(map(format_public_key, offline)),
            )
        kept = [new if key is gone[0] else key for key in offline]
        return self._replace_operators(held, kept, keys_in(held.root, "timestamp")[0])

    def rotate_online(self, new: Key) -> Outcome:
        """Replace the online key.

        Raises:
            KeyFileError: When the new key is not on this machine: nothing could be confirmed.
        """
        held = self.load()
        if not self.keyring.find([new.keyid]):
            raise KeyFileError(
                f"the new online key {shorten_key(format_public_key(new))} is not here",
                where=str(self.keyring.folder),
                hint="run this where the new key is: else nobody could confirm the registry",
            )
        return self._replace_operators(held, keys_in(held.root, "root"), new)

    def require_key(self) -> None:
        """Check that this machine has any key of the registry.

        Raises:
            KeyFileError: When it has none.
        """
        held = self.load()
        keys = [*held.root.keys.values(), *(k for g in held.grants.values() for k in g.keys)]
        self.open_keys(keys, "this registry")

    def approve(self) -> Outcome:
        """Add the signatures of this machine's offline keys to the change that waits for them.

        Raises:
            KeyFileError: When no offline key is here.
        """
        held = self.load()
        pending = self._read_pending(held)
        return self._commit(held, pending) if pending else Outcome()

    def discard(self) -> list[str]:
        """Remove the change that waits for signatures; return what it was."""
        held = self.load()
        lines = self.describe_pending(held)
        for name in self.files.names_in(PENDING):
            self.files.remove(f"{PENDING}/{name}")
        return lines

    def describe_pending(self, held: Held | None = None) -> list[str]:
        """Return what a change that waits for signatures would change, as sentences."""
        held = held or self.load()
        pending = self._read_pending(held)
        return _describe_change(held, {role: m.signed for role, m in pending.items()})

    def renew(self) -> Outcome:
        """Sign offline metadata again that expires soon; does nothing if none does."""
        held = self.load()
        soon = self.now() + datetime.timedelta(days=RENEW_DAYS)
        parts: dict[str, Signed] = {"root": held.root, "targets": held.targets, **held.bins}
        old = {role: signed for role, signed in parts.items() if signed.expires < soon}
        if not old:
            return Outcome()
        if not self.keyring.find(held.root.roles["root"].keyids):
            first = min(signed.expires for signed in old.values())
            text = f"the offline signatures hold until {first:%Y-%m-%d}; sign with a root key"
            return Outcome(waiting=[text])
        changes: dict[str, Metadata[Any]] = {}
        for role, signed in old.items():
            renewed = copy.deepcopy(signed)
            is_root = role == "root"
            renewed.version = signed.version + 1 if is_root else self.next_version(role)
            renewed.expires = expiry(self.now(), OFFLINE_DAYS)
            changes[role] = Metadata(renewed)
        return self._commit(held, changes)

    def _replace_operators(self, held: Held, offline: list[Key], online: Key) -> Outcome:
        """Change the root keys or the online key, and all that names them."""
        root = copy.deepcopy(held.root)
        root.version, root.expires = root.version + 1, expiry(self.now(), OFFLINE_DAYS)
        root.keys = {}
        for role in _TOP:
            root.roles[role].keyids = []
            for key in [online] if role in ("snapshot", "timestamp") else offline:
                root.add_key(key, role)
        delegations, bins = delegate(held.grants, _operators(offline, online))
        sigstore = read_sigstore(held.targets)
        changes = {
            role: self._delegate(role, wanted, sigstore if role == "targets" else None)
            for role, wanted in {"targets": delegations, **bins}.items()
        }
        return self._commit(held, {"root": Metadata(root), **changes})

    def _change_grants(self, held: Held, grants: Mapping[str, Grant]) -> dict[str, Metadata[Any]]:
        """Return the next version of every offline role that other grants change.

        Raises:
            RegistryError: When they have an identity, and nothing would prove it.
        """
        sigstore = read_sigstore(held.targets)
        identities = [
            key for grant in grants.values() for key in grant.keys if isinstance(key, IdentityKey)
        ]
        if identities and sigstore is None:
            raise RegistryError(
                f"accepts no sigstore yet, which would prove the identity {identities[0].subject}",
                where=self.location,
                hint=f"state it first: `composable registry sigstore {self.location}`",
            )
        operators = _operators(keys_in(held.root, "root"), keys_in(held.root, "timestamp")[0])
        delegations, bins = delegate(grants, operators)
        before = {"targets": held.targets, **held.bins}
        return {
            role: self._delegate(role, wanted, sigstore if role == "targets" else None)
            for role, wanted in {"targets": delegations, **bins}.items()
            if role not in before or before[role].delegations != wanted
        }

    def _delegate(
        self, role: str, delegations: Delegations, sigstore: Sigstore | None
    ) -> Metadata[Any]:
        """Return the next version of a role that says who may publish what."""
        until = expiry(self.now(), OFFLINE_DAYS)
        version = self.next_version(role)
        fields = {} if sigstore is None else {SIGSTORE: sigstore.trusted_root}
        return Metadata(
            Targets(
                version=version,
                expires=until,
                delegations=delegations,
                unrecognized_fields=fields,
            )
        )

    def _commit(self, held: Held, changes: Mapping[str, Metadata[Any]]) -> Outcome:
        """Sign a change of offline metadata; write it, or keep it until it has all signatures."""
        if not changes:
            return Outcome(signed=[])
        self._refuse_other_pending(held, changes)
        lines = _describe_change(held, {role: m.signed for role, m in changes.items()})
        root = cast(Root, changes["root"].signed) if "root" in changes else held.root
        usable = {**held.root.keys, **root.keys}
        wanted = {*held.root.roles["root"].keyids, *root.roles["root"].keyids}
        files = self.keyring.find(wanted)
        if not files:
            names = ", ".join(shorten_key(format_public_key(usable[keyid])) for keyid in wanted)
            raise KeyFileError(
                f"none of the root keys is here ({names})",
                where=str(self.keyring.folder),
                hint="copy the key file of a root key there, or set COMPOSABLE_KEYS to its folder",
            )
        signers = [self.keyring.unlock(file) for file in files]
        for metadata in changes.values():
            sign_metadata(metadata, signers)
        missing = max(_count_missing(held, root, role, m) for role, m in changes.items())
        if missing:
            for role, metadata in changes.items():
                path = metadata_path(role, metadata.signed.version, PENDING)
                seen = self.files.read(path)
                self.files.replace(path, to_bytes(metadata), seen)
            return Outcome(waiting=lines, missing=missing, is_visible=False)
        # Parts come before what names them.
        for role in sorted(changes, key=("targets", "root").__contains__):
            self._write_offline(held, role, changes[role])
        for name in self.files.names_in(PENDING):
            self.files.remove(f"{PENDING}/{name}")
        self._resign_advisories(held, root)
        return Outcome(signed=lines)

    def _write_offline(self, held: Held, role: str, metadata: Metadata[Any]) -> None:
        path, data = metadata_path(role, metadata.signed.version), to_bytes(metadata)
        if self.files.create(path, data):
            return
        seen = self.files.read(path)
        if role == "root" and seen is not None:
            try:
                verify_metadata(held.root, role, Metadata.from_bytes(seen.data))
            except (exceptions.RepositoryError, ValueError):
                # Root versions have no gaps, so a file that its keys did not sign must go.
                if self.files.replace(path, data, seen):
                    return
        raise RegistryError(
            "another change was signed at the same time",
            where=f"{self.location}/{path}",
            hint="run the same command again",
        )

    def _resign_advisories(self, held: Held, root: Root) -> None:
        """Sign the feed again with the new root keys, if they changed."""
        if root is held.root or root.roles["root"].keyids == held.root.roles["root"].keyids:
            return
        before = self.load_delegated(ADVISORIES_ROLE, held.targets)
        if before is not None:
            self.sign_targets(ADVISORIES_ROLE, tuple(keys_in(root, "root")), {}, before)

    def _refuse_other_pending(self, held: Held, changes: Mapping[str, Metadata[Any]]) -> None:
        pending = self._read_pending(held)
        if pending and {r: m.signed for r, m in pending.items()} != {
            role: metadata.signed for role, metadata in changes.items()
        }:
            lines = "; ".join(_describe_change(held, {r: m.signed for r, m in pending.items()}))
            raise RegistryError(
                f"another change still waits for signatures: {lines}",
                where=self.location,
                hint="add one with `composable registry sign --approve`, or drop that change with "
                "`composable registry sign --discard`",
            )

    def _read_pending(self, held: Held) -> dict[str, Metadata[Any]]:
        """Return the change that waits for signatures, if one of the root keys signed it."""
        found: dict[str, Metadata[Any]] = {}
        current = {"root": held.root, "targets": held.targets, **held.bins}
        for name in self.files.names_in(PENDING):
            match = VERSIONED.fullmatch(name)
            document = self.files.read(f"{PENDING}/{name}")
            if match is None or document is None:
                continue
            try:
                metadata: Metadata[Any] = Metadata.from_bytes(document.data)
            except (exceptions.RepositoryError, ValueError):
                continue
            role = match[2]
            is_next = role not in current or metadata.signed.version > current[role].version
            if is_next and metadata.signed.version == int(match[1]):
                data = metadata.signed_bytes
                result = held.root.get_verification_result("root", data, metadata.signatures)
                if result.signed:
                    found[role] = metadata
        return found

    def _sign_with(self, signed: Any, keys: list[Key], threshold: int, what: str) -> Metadata[Any]:
        signers = self.open_keys(keys, what)
        if len(signers) < threshold:
            raise KeyFileError(
                f"{len(signers)} key of {what} is here, {threshold} are needed",
                where=str(self.keyring.folder),
                hint="copy the key files there, or set COMPOSABLE_KEYS to their folder",
            )
        metadata = Metadata(signed)
        sign_metadata(metadata, signers)
        return metadata

    def _refuse_taken(self, other: Grant, names: Iterable[str]) -> None:
        """Refuse names that belong to another publisher, or look like those that do."""
        for name in names:
            for taken in other.names:
                is_same = _overlap(taken, name)
                if is_same or _look_alike(taken, name) or _look_alike(name, taken):
                    raise RegistryError(
                        f"{name!r} {'belongs to' if is_same else 'looks like a name of'} publisher "
                        f"{other.publisher!r}" + ("" if taken == name else f" ({taken!r})"),
                        where=self.location,
                        hint="choose a name that differs in more than look-alike letters or "
                        "hyphens",
                    )

    def _date(self, key: Key) -> Key:
        """Return a key as it is granted now."""
        return key.granted(self.now()) if isinstance(key, IdentityKey) else key

    def _refuse_shared_key(self, other: Grant, keys: Collection[str]) -> None:
        if any(format_public_key(key) in keys for key in other.keys):
            raise RegistryError(
                f"the key or identity belongs to publisher {other.publisher!r}",
                where=self.location,
                hint="every publisher needs one of its own: `composable registry key NAME`",
            )


def _operators(offline: list[Key], online: Key) -> dict[str, tuple[Key, ...]]:
    return {
        "root": tuple(offline),
        REGISTRY_ROLE: (online,),
        ADVISORIES_ROLE: tuple(offline),
    }


def _count_missing(held: Held, root: Root, role: str, metadata: Metadata[Any]) -> int:
    """Return how many signatures of offline keys a change lacks."""
    deciding = [held.root, root] if role == "root" else [root]
    data = metadata.signed_bytes
    counts = [
        len(each.get_verification_result("root", data, metadata.signatures).signed)
        for each in deciding
    ]
    return max(ROOT_THRESHOLD - min(counts), 0)


def _describe_change(held: Held, changes: Mapping[str, Any]) -> list[str]:
    """Return what a change of offline metadata changes, as sentences."""
    if not changes:
        return []
    lines = []
    if "root" in changes:
        root = cast(Root, changes["root"])
        for role, name in (("root", "root key"), ("timestamp", "online key")):
            before = {format_public_key(key) for key in keys_in(held.root, role)}
            after = {format_public_key(key) for key in keys_in(root, role)}
            lines += [f"{name} {key} is replaced" for key in sorted(before - after)]
            lines += [f"{name} {key} is new" for key in sorted(after - before)]
    parts = {**held.bins, **{r: s for r, s in changes.items() if r.startswith("bin-")}}
    targets = cast(Targets, changes.get("targets", held.targets))
    sigstore = read_sigstore(targets)
    if sigstore is not None and targets.unrecognized_fields[
        SIGSTORE
    ] != held.targets.unrecognized_fields.get(SIGSTORE):
        lines.append(f"identities are proven by {sigstore.describe()}")
    after_grants = read_grants(
        cast(Iterable[Targets], parts.values()) if has_bins(targets) else [targets]
    )
    before_grants = held.grants
    for publisher in sorted({*before_grants, *after_grants}):
        empty = Grant(publisher=publisher, keys=(), names=())
        old, new = (grants.get(publisher, empty) for grants in (before_grants, after_grants))
        old_keys, new_keys = ({format_public_key(k) for k in g.keys} for g in (old, new))
        lines += [f"{publisher} may publish {n}" for n in sorted({*new.names} - {*old.names})]
        lines += [f"{publisher} loses {n}" for n in sorted({*old.names} - {*new.names})]
        lines += [f"{publisher} signs with {key}" for key in sorted(new_keys - old_keys)]
        lines += [f"{publisher} no longer signs with {key}" for key in sorted(old_keys - new_keys)]
    return lines or ["the offline signatures hold for another year"]


def _overlap(one: str, other: str) -> bool:
    """Return whether two names or starts of names have a name in common."""
    starts = one.removesuffix("*"), other.removesuffix("*")
    if one.endswith("*") and other.endswith("*"):
        return starts[0].startswith(starts[1]) or starts[1].startswith(starts[0])
    if one.endswith("*"):
        return other.startswith(starts[0])
    return other.endswith("*") and one.startswith(starts[1])


def _look_alike(one: str, other: str) -> bool:
    """Return whether a name, or a part before a hyphen, looks like another name or its start."""
    start, is_start = one.removesuffix("*"), one.endswith("*")
    name = other.removesuffix("*")
    parts = [name]
    if is_start:
        parts += [name[: index + 1] for index, letter in enumerate(name) if letter == "-"]
    return any(part and confusable_key(part) == confusable_key(start) for part in parts)
