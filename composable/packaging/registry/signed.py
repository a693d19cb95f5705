"""The signatures of a registry: verifies what is read from it, and signs what is published to it.

    statements/<name>/<version>.json    the publisher's statement on one release

The metadata itself is in `packaging.trust`. This file says which documents of the layout are
signed, what a release's statement must agree with, and who signs what when. Whatever is not signed
is never read from a signed registry: not the indexes, only the signed copies of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from securesystemslib.signer import Key

from composable.errors import (
    PackagingError,
    RegistryError,
    SignatureError,
    UnknownExpertError,
)
from composable.files import atomic
from composable.files.reading import read_bytes
from composable.interface.digest import canonical_json
from composable.packaging.manifests.manifest import EXPERT_FILE
from composable.packaging.registry.advisories import Advisory, compile_feed
from composable.packaging.registry.index import (
    change_index,
    describe_newest,
    format_catalog,
    index_path,
    list_records,
    parse_entry,
    parse_index,
    read_record,
    record_path,
)
from composable.packaging.registry.lines import ADVISORIES_FILE, CATALOG_FILE
from composable.packaging.registry.release import Release, Signer, choose_newest
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.registry.storage import (
    CONFIG_FILE,
    Document,
    Storage,
    WritableStorage,
)
from composable.packaging.trust.client import SignedDocuments, read_clock
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import create_key, format_public_key
from composable.packaging.trust.metadata import (
    ONLINE_DAYS,
    ROOT_KEYS,
    Grant,
    metadata_path,
)
from composable.packaging.trust.offline import Authority, Outcome
from composable.packaging.trust.signing import Signatory
from composable.packaging.trust.statement import (
    MAX_STATEMENT_BYTES,
    Statement,
    sign_statement,
    verify_statement,
)
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version

ROOT_NAMES: Final = tuple(f"root-{number}" for number in range(1, ROOT_KEYS + 1))
ONLINE_NAME: Final = "online"


class Signatures:
    """The signatures of one registry.

    Args:
        files: Its storage.
        settings: Where the keys and the verified state of this machine are, and the time.
    """

    def __init__(self, files: Storage, settings: SignatureSettings) -> None:
        self._files = files
        self._now = settings.now or read_clock
        self.state = settings.state
        self.documents = SignedDocuments(
            files,
            settings.state,
            now=self._now,
            max_stale=settings.max_stale,
            is_offline=settings.is_offline,
        )
        self.keyring = Keyring(settings.keys)
        # Whether what was published waits for the operator, for the command to say so.
        self.awaits_operator = False
        # Whether a server lists it only once vetting has passed, for its publisher to sign it then.
        self.awaits_vetting = False
        # A statement that is signed and not stored yet.
        self._prepared: tuple[Statement, bytes] | None = None

    def read_index(self, name: str) -> Document | None:
        """Return the signed index of a package; None if the registry has none of that name.

        Raises:
            SignatureError: When the registry is not as its keys signed it, or has releases of that
                name that nobody who may publish them has signed.
        """
        owner = self.documents.find_role(name)
        found = self.documents.read(name) if owner is not None and owner.is_listed else None
        if found is None and not self.documents.is_offline and self._files.read(index_path(name)):
            raise SignatureError(
                f"{name!r} is in this registry, but "
                + (
                    "no publisher may publish it"
                    if owner is None
                    else f"its publisher {owner.publisher!r} has not signed it"
                ),
                kind="wrong-publisher",
                where=f"{self.documents.location}/{index_path(name)}",
                hint="do not use it: somebody put it there without permission, or it is older than "
                "the signatures and its publisher has to run `composable registry sign --vouch "
                f"{name}`",
            )
        return found

    def read(self, path: str) -> Document | None:
        """Return the signed catalogue or feed of advisories; None if there is none, or it is empty.

        Raises:
            SignatureError: When the registry is not as its keys signed it.
        """
        owner = self.documents.find_role(path)
        found = self.documents.read(path) if owner is not None and owner.is_listed else None
        return found if found is not None and found.data else None

    def verify_release(self, release: Release) -> Signer:
        """Verify the statement on a release, keep it for offline use, and return who signed it.

        Raises:
            SignatureError: When it is missing, not signed by the publisher, or about other content.
        """
        path = statement_path(release.name, release.version)
        if not self.documents.is_offline:
            document = self._files.read(path)
            if document is None or len(document.data) > MAX_STATEMENT_BYTES:
                raise self._refuse_statement(release)
            self._check_statement(document.data, make_statement(release))
            if _read_kept(self.state / path) != document.data:
                atomic.write_bytes(self.state / path, document.data)
        return self.verify_kept(release.name, release.version, make_statement(release).digests)

    def verify_kept(self, name: str, version: Version, digests: Mapping[str, str]) -> Signer:
        """Verify the statement on a release that this machine keeps, and return who signed it.

        Args:
            name: The package.
            version: The release.
            digests: The digest of every file of it, by name.

        Raises:
            SignatureError: When it is missing, not signed by the publisher, or about other content.
        """
        data = _read_kept(self.state / statement_path(name, version))
        if data is None:
            raise SignatureError(
                f"this machine keeps no statement on {name} {version}",
                kind="incomplete",
                where=self.documents.location,
                hint="run `composable lock`, which fetches it",
            )
        stated = {"name": name, "version": str(version), "digests": dict(digests)}
        return self._check_statement(data, stated)

    def _check_statement(self, data: bytes, expected: Statement | Mapping[str, object]) -> Signer:
        """Check that a statement is signed by its publisher and states what is expected."""
        if isinstance(expected, Statement):
            expected = dataclasses.asdict(expected)
        name = str(expected["name"])
        where = (
            f"{self.documents.location}/{statement_path(name, Version(str(expected['version'])))}"
        )
        role = self.documents.find_role(name)
        if role is None or not role.keys:
            raise SignatureError(
                f"no publisher may publish {name!r}"
                if role is None
                else f"the keys of publisher {role.publisher!r} were revoked",
                kind="wrong-publisher" if role is None else "revoked",
                where=where,
                hint=f"do not use it: `composable remove {name}`, or wait until its publisher has "
                "signed it with a new key",
            )
        return check_statement(data, expected, role.publisher, role.keys, where)

    def _refuse_statement(self, release: Release) -> SignatureError:
        path = statement_path(release.name, release.version)
        return SignatureError(
            f"the publisher of {release.name} has not signed {release.version}",
            kind="unsigned",
            where=f"{self.documents.location}/{path}",
            hint="do not use it; its publisher signs it, if it is genuine, with `composable "
            f"registry sign --vouch {release.name}@{release.version}`",
        )

    # Publishing.

    def check_publisher(self, name: str) -> None:
        """Check, before anything is uploaded, that this machine can sign a package.

        Raises:
            SignatureError: When nobody may publish that name, or its publisher has no keys.
            KeyFileError: When the key is not here, or its pass phrase is missing or wrong.
        """
        self.signatory().find_publisher(name)

    def sign_release(self, release: Release) -> bytes:
        """Return the statement on a release, signed with the key of its publisher.

        Raises:
            SignatureError: When nobody may publish that name, or its publisher has no keys.
            KeyFileError: When the key is not here, or its pass phrase is missing or wrong.
            IdentityError: When its identity could not be signed in, or the signature not logged.
        """
        _, keys = self.signatory().find_publisher(release.name)
        return sign_statement(make_statement(release), keys[0])

    def prepare(self, release: Release) -> None:
        """Sign the statement on a release, unless the registry has it; `publish` stores it.

        Signing may need the network, so this comes before anything is uploaded.

        Raises:
            SignatureError: When nobody may publish that name, or its publisher has no keys.
            KeyFileError: When the key is not here, or its pass phrase is missing or wrong.
            IdentityError: When its identity could not be signed in, or the signature not logged.
        """
        seen = self._files.read(statement_path(release.name, release.version))
        if seen is None or not self._is_stated_here(release, seen.data):
            self._prepared = make_statement(release), self.sign_release(release)

    def publish(self, release: Release) -> None:
        """Sign a release that was published, and make it visible if the online key is here."""
        self._state_release(release)
        self.sign_index(release.name, [release])

    def sign_index(self, name: str, releases: Iterable[Release]) -> None:
        """Add releases to the signed index of a package, or change whether they are yanked."""
        changed = list(releases)
        self.signatory().sign_document(name, lambda seen: change_index(seen, name, changed))
        self._confirm_if_possible()

    def advise(self, advisory: Advisory) -> None:
        """Sign an advisory.

        Raises:
            KeyFileError: When no root key is here.
        """

        def change(seen: bytes | None) -> bytes:
            return compile_feed(advisory, None if seen is None else Document(seen, None))

        self.signatory().sign_document(ADVISORIES_FILE, change)
        self._confirm_if_possible()

    def check_advisor(self) -> None:
        """Check, before anything is written, that this machine can sign advisories.

        Raises:
            KeyFileError: When no root key is here.
        """
        self.signatory().find_advisories_signers()

    # Commands on keys.

    def create(self, passphrase: str | None) -> list[str]:
        """Make the registry a signed one, with new keys in the folder of keys.

        Running it again continues where it was interrupted.

        Returns:
            The public keys: three of the root and the online key.

        Raises:
            RegistryError: When it is signed already.
            KeyFileError: When the folder has other keys of these names.
        """
        storage = self._writable()
        if storage.read(metadata_path("root", 1)) is None:
            files = [
                create_key(self.keyring.folder, name, passphrase)
                for name in (*ROOT_NAMES, ONLINE_NAME)
            ]
            *root, online = [file.public for file in files]
            feed = storage.read(ADVISORIES_FILE)
            self.authority().create(
                root, online, {} if feed is None else {ADVISORIES_FILE: feed.data}
            )
        elif _is_marked(storage):
            raise RegistryError(
                "is signed already",
                where=self.documents.location,
                hint="to change its keys, run `composable registry rotate`",
            )
        self.signatory().confirm(_compile_catalog)
        seen = storage.read(CONFIG_FILE)
        config = {} if seen is None else json.loads(seen.data)
        data = canonical_json({**config, "signed": True}) + b"\n"
        if not storage.replace(CONFIG_FILE, data, seen):
            raise RegistryError(
                "was changed by another process",
                where=f"{self.documents.location}/{CONFIG_FILE}",
                hint="run the same command again",
            )
        held = self.authority().load()
        keys = [held.root.keys[keyid] for keyid in held.root.roles["root"].keyids]
        keys += [held.root.keys[keyid] for keyid in held.root.roles["timestamp"].keyids]
        return [format_public_key(key) for key in keys]

    def change(self, outcome: Outcome) -> Outcome:
        """Confirm a change of grants or keys, if it is complete and the online key is here."""
        if outcome.missing == 0 and outcome.signed:
            outcome.is_visible = self._confirm_if_possible()
        return outcome

    def sign(
        self,
        vouch: Iterable[Requirement] = (),
        *,
        days: float = ONLINE_DAYS,
        as_identity: bool = False,
    ) -> Outcome:
        """Sign whatever this machine has keys for, and confirm it if it has the online key.

        Lists of its publishers that are signed by other keys of theirs are signed again, and
        offline metadata that expires soon is renewed.

        Args:
            vouch: Releases to sign though they have no valid statement: published before the
                registry was signed, or signed with a key that is revoked.
            days: How long the confirmation holds.
            as_identity: Whether to sign in, and sign what that identity may.

        Raises:
            KeyFileError: When no key of this registry is here.
            IdentityError: When no identity could be signed in.
        """
        outcome = Outcome()
        if as_identity:
            self.keyring.open_session()
        signatory = self.signatory()
        for requirement in vouch:
            outcome.signed += self._vouch(requirement)
        for publisher in signatory.mine():
            outcome.signed += self._sign_again(publisher)
            outcome.signed += self._sign_unlisted(publisher)
        if signatory.has_online_key():
            renewed = self.authority().renew()
            outcome.signed += renewed.signed
            outcome.waiting += renewed.waiting
            changed = signatory.confirm(_compile_catalog, days=days)
            outcome.signed += [f"releases of {publisher}" for publisher in changed]
            outcome.signed.append(f"the current state, for {days:g} days")
        else:
            outcome.is_visible = bool(outcome.signed) and self._is_confirmed_there()
            if not outcome.signed and not signatory.mine():
                self.authority().require_key()
        return outcome

    def authority(self) -> Authority:
        """Return what changes grants and keys."""
        return Authority(self._writable(), self.documents, self.keyring, now=self._now)

    def _vouch(self, requirement: Requirement) -> list[str]:
        """Sign the recorded releases of a package that a range contains."""
        storage, name = self._writable(), requirement.name
        self.check_publisher(name)
        releases = [
            release
            for release in _list_recorded(storage, name)
            if requirement.constraint.contains(release.version)
        ]
        if not releases:
            raise UnknownExpertError(f"no release {requirement}", where=self.documents.location)
        for release in releases:
            self._state_release(release)
        signatory = self.signatory()
        signatory.sign_document(name, lambda seen: change_index(seen, name, releases))
        return [f"{release.name} {release.version}" for release in releases]

    def _sign_again(self, publisher: str) -> list[str]:
        """Sign what a publisher signed with another of its keys, with the key that is here."""
        signatory = self.signatory()
        signed = [
            f"{name} {release.version}"
            for name, data in signatory.targets_of(publisher).items()
            for release in parse_index(data, name, index_path(name)).values()
            if self._state_release(release, only_if_signed_by_others=True)
        ]
        if signed:
            signatory.resign(publisher)
        return signed

    def _sign_unlisted(self, publisher: str) -> list[str]:
        """List releases that were published with a valid statement, and are in no signed index.

        An interrupted publication leaves such, and vetting on a server that passed later.
        """
        storage, signatory = self._writable(), self.signatory()
        grant = self.authority().load().grants[publisher]
        listed = signatory.targets_of(publisher)
        catalog = storage.read(CATALOG_FILE)
        names = {name for name in grant.names if not name.endswith("*")}
        for number, line in enumerate(catalog.data.splitlines() if catalog else (), 1):
            names.add(parse_entry(line, f"{CATALOG_FILE}:{number}").name)
        signed = []
        for name in sorted(filter(grant.covers, names)):
            known = parse_index(listed.get(name, b""), name, index_path(name))
            added = [
                release
                for release in _list_recorded(storage, name)
                if release.version not in known and self._has_statement(release, grant)
            ]
            if added:
                self.sign_index(name, added)
                signed += [f"{name} {release.version}" for release in added]
        return signed

    def _has_statement(self, release: Release, grant: Grant) -> bool:
        """Return whether a release has a statement by a key that its publisher has now."""
        path = statement_path(release.name, release.version)
        found = self._files.read(path)
        with contextlib.suppress(PackagingError):
            if found is not None and grant.keys:
                expected = dataclasses.asdict(make_statement(release))
                check_statement(found.data, expected, grant.publisher, grant.keys, path)
                return True
        return False

    def _is_stated_here(self, release: Release, data: bytes) -> bool:
        """Return whether a statement on a release is valid, and by a key of this machine."""
        publisher, keys = self.signatory().find_publisher(release.name)
        path = statement_path(release.name, release.version)
        expected = dataclasses.asdict(make_statement(release))
        with contextlib.suppress(PackagingError):
            check_statement(data, expected, publisher, [key.public_key for key in keys], path)
            return True
        return False

    def _state_release(self, release: Release, *, only_if_signed_by_others: bool = False) -> bool:
        """Write the statement on a release, signed; return whether there was none like it."""
        storage = self._writable()
        path = statement_path(release.name, release.version)
        seen = storage.read(path)
        if seen is not None and self._is_stated_here(release, seen.data):
            return False
        if only_if_signed_by_others:
            publisher, _ = self.signatory().find_publisher(release.name)
            all_keys = self.authority().load().grants[publisher].keys
            expected = dataclasses.asdict(make_statement(release))
            try:
                check_statement(seen.data if seen else b"", expected, publisher, all_keys, path)
            except SignatureError:
                return False  # nobody vouches for it
        statement, data = self._prepared or (None, b"")
        if statement != make_statement(release):
            data = self.sign_release(release)
        while not storage.replace(path, data, seen):
            seen = storage.read(path)
        return True

    def confirm(self, *, days: float = ONLINE_DAYS) -> bool:
        """Confirm the current state if the online key is here; return whether it is."""
        signatory = self.signatory()
        if not signatory.has_online_key():
            return False
        signatory.confirm(_compile_catalog, days=days)
        return True

    def _confirm_if_possible(self) -> bool:
        is_confirmed = self.confirm() or self._is_confirmed_there()
        self.awaits_operator = not is_confirmed
        return is_confirmed

    def _is_confirmed_there(self) -> bool:
        """Return whether a server with the online key confirmed what was sent to it last."""
        return bool(getattr(self._files, "has_confirmed", False))

    def signatory(self) -> Signatory:
        """Return what signs with the keys of this machine."""
        return Signatory(self._writable(), self.documents, self.keyring, now=self._now)

    def _writable(self) -> WritableStorage:
        if not isinstance(self._files, WritableStorage):
            raise RegistryError(
                "is read only",
                where=self.documents.location,
                hint="sign the folder or the bucket that it serves",
            )
        return self._files


def describe_signers(signatures: Signatures) -> list[dict[str, str]]:
    """Return the keys of a registry: whose each is, and what for, in the order of their power."""
    root, grants = signatures.documents.root, signatures.documents.read_grants()
    until = f"until {root.expires:%Y-%m-%d}"
    rows = []
    for role, what in (("root", f"who may sign ({until})"), ("timestamp", "what is current")):
        for keyid in root.roles[role].keyids:
            name = "root" if role == "root" else "online"
            key = format_public_key(root.keys[keyid])
            rows.append({"signer": name, "key": key, "for": what})
    sigstore = signatures.documents.sigstore
    if sigstore is not None:
        rows.append({"signer": "sigstore", "key": sigstore.describe(), "for": "who identities are"})
    for grant in grants.values():
        texts = [format_public_key(key) for key in grant.keys] or ["revoked"]
        rows += [
            {"signer": grant.publisher, "key": text, "for": " ".join(grant.names)} for text in texts
        ]
    return rows


def statement_path(name: str, version: Version) -> str:
    """Return the path of the statement on a release."""
    return record_path(name, version).replace("records/", "statements/", 1)


def make_statement(release: Release) -> Statement:
    """Return what the publisher of a release states on it."""
    return Statement(
        name=release.name,
        version=str(release.version),
        license=release.license or "",
        interface=release.interface.digest or "",
        digests={
            EXPERT_FILE: release.manifest,
            **{file.name: file.digest for file in release.files},
        },
    )


def check_statement(
    data: bytes, expected: Mapping[str, object], publisher: str, keys: Iterable[Key], where: str
) -> Signer:
    """Check that a statement is signed by a publisher and states what is expected.

    Raises:
        SignatureError: When it is not.
    """
    statement, key = verify_statement(data, list(keys), where)
    for field, listed in expected.items():
        stated = getattr(statement, field)
        if stated != listed:
            raise SignatureError(
                f"states another {field} than the index lists: {str(stated)[:200]}, expected "
                f"{str(listed)[:200]}",
                kind="wrong-content",
                where=where,
                hint="the release was replaced: do not use it, and tell its publisher",
            )
    return Signer(publisher=publisher, key=format_public_key(key))


def _compile_catalog(previous: bytes | None, indexes: Mapping[str, bytes]) -> bytes:
    """Return the catalogue with the newest releases of the indexes that changed."""
    entries = {}
    for number, line in enumerate((previous or b"").splitlines(), 1):
        entry = parse_entry(line, f"{CATALOG_FILE}:{number}")
        entries[entry.name] = entry
    for name, data in indexes.items():
        releases = parse_index(data, name, index_path(name))
        if releases:
            entries[name] = describe_newest(choose_newest(releases.values()))
    return format_catalog(entries.values())


def _is_marked(storage: Storage) -> bool:
    document = storage.read(CONFIG_FILE)
    return document is not None and json.loads(document.data).get("signed") is True


def _list_recorded(storage: WritableStorage, name: str) -> list[Release]:
    """Return the releases of a package, signed or not; a server has them only in its index."""
    if records := list_records(storage, name):
        found = ((read_record(storage, name, v), is_yanked) for v, is_yanked in records.items())
        releases = [record.with_yank(is_yanked) for record, is_yanked in found if record]
    else:
        index = storage.read(index_path(name))
        data = b"" if index is None else index.data
        releases = list(parse_index(data, name, index_path(name)).values())
    return sorted(releases, key=lambda release: release.version)


def _read_kept(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return read_bytes(path, MAX_STATEMENT_BYTES)
    return None
