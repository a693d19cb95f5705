"""The inbox of a registry: proposals to change its experts, for its maintainers to review.

    inbox/<id>/proposal.json    the proposal, in its envelope; written last, created once
    inbox/<id>/<file>           the files of the proposed release, or
    inbox/<id>/<file>.delta     what makes one from that of the release which it changes
    inbox/<id>/outcome.json     what a maintainer decided; the files are removed then

Nothing else of a registry refers to these files: no index, no catalogue and no record, so no client
resolves, finds, mirrors or installs them. Whoever can write to a folder or a bucket can fill it;
what a maintainer reads of it is limited here, and a server limits what it accepts. An inbox says
what was proposed and what was decided, not whether it is any good: that is measured in
`workflows/review.py`. Reading the files of a proposal is in `install/proposals.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from securesystemslib.signer import Signer

from composable.errors import (
    KeyFileError,
    ManifestError,
    ProposalError,
    RegistryError,
    UnknownExpertError,
)
from composable.files.records import parse_record, to_plain
from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging.manifests.manifest import (
    EXPERT_FILE,
    Manifest,
    PackageFile,
)
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.registry import Registry, choose_deltas
from composable.packaging.registry.release import PreparedDelta, Release
from composable.packaging.registry.storage import LocalFile, WritableStorage
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import format_public_key, shorten_key
from composable.packaging.trust.proposal import (
    MAX_ENVELOPE_BYTES,
    Proposal,
    check_message,
    open_envelope,
    seal,
)
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

FOLDER: Final = "inbox"
PROPOSAL_FILE: Final = "proposal.json"
OUTCOME_FILE: Final = "outcome.json"
# Undecided proposals that an inbox takes, and bytes of one.
MAX_OPEN: Final = 100
MAX_BYTES: Final = 8 << 30
# Bytes of a manifest, a card or a README of one; tensors have the size of their interface.
MAX_TEXT_BYTES: Final = 1 << 20
# Proposals that are read of an inbox.
MAX_LISTED: Final = 1000
# Digits of an id that are shown, and how many have to be given at least.
SHOWN_DIGITS: Final = 12
_MIN_DIGITS: Final = 4
_HEX: Final = set("0123456789abcdef")
_ID_LENGTH: Final = 64


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a maintainer decided on a proposal.

    Args:
        state: The decision.
        reason: Why it was rejected, in the maintainer's words.
        release: What it was published as, `NAME@VERSION`.
        verdict: Digest of the verdict on which it was accepted.
    """

    state: Literal["accepted", "rejected"]
    reason: str = ""
    release: str = ""
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Received:
    """A proposal in an inbox.

    Args:
        id: Its id.
        proposal: What is proposed; None if it cannot be read.
        problem: Why it cannot be read.
        outcome: What was decided; None while it is open.
        account: The account of a server that sent it.
    """

    id: str
    proposal: Proposal | None = None
    problem: str = ""
    outcome: Outcome | None = None
    account: str = ""

    @property
    def state(self) -> str:
        """`open`, `accepted`, `rejected`, or `damaged`."""
        if self.proposal is None:
            return "damaged"
        return "open" if self.outcome is None else self.outcome.state


class Inbox:
    """The inbox of a registry in a folder or a bucket.

    Args:
        registry: The registry, opened for publishing.
        keyring: The keys to sign with; by default those of the user.
    """

    def __init__(self, registry: Registry, keyring: Keyring | None = None) -> None:
        self.registry = registry
        self._keyring = keyring or Keyring()

    def propose(
        self,
        directory: Path,
        base: tuple[str, Version],
        *,
        interface: RouterInterface,
        message: str = "",
        key: str | None = None,
        deltas: Mapping[str, PreparedDelta] | None = None,
        progress: ByteProgress | None = None,
    ) -> Proposal:
        """Put the expert in a directory into the inbox, as a change of a release.

        Proposing the same content again succeeds and changes nothing.

        Args:
            directory: The expert, as for `Registry.publish`.
            base: Name and version of the release that it is a change of.
            interface: The router interface that it must fit.
            message: Why.
            key: Name of the key file to sign with; by default that of a publisher of the registry,
                or else the only one there is. Without any, the proposal is unsigned.
            deltas: What makes files from those of the release, by name; they are sent in place of
                these.
            progress: Called with a file's name, bytes done and total bytes.

        Raises:
            ManifestError: When it is not a change of that release, or a file is missing.
            TensorFileError: When a tensor file is unsafe or has the wrong tensors.
            InterfaceError: When it does not fit the interface.
            UnknownExpertError: When there is no such release.
            RegistryError: When the registry has no room.
            KeyFileError: When there is no such key, or its pass phrase is missing or wrong.
        """
        manifest = pack_expert(directory, interface=interface)
        release = self.find_base(*base)
        check_base(manifest, release)
        data = manifest.to_toml().encode()
        files = [*manifest.files, _describe_manifest(data)]
        fitting = choose_deltas(manifest, deltas or {})
        signer = self._find_signer(key)
        proposal = Proposal(
            name=manifest.name,
            base=str(release.version),
            base_manifest=release.manifest,
            message=check_message(message),
            key="" if signer is None else format_public_key(signer.public_key),
            digests={file.name: file.digest for file in files},
            sizes={file.name: file.size for file in files},
            deltas={name: delta.chain[0] for name, delta in fitting.items()},
        )
        check_sizes(proposal)
        check_deltas(proposal, release)
        sources = [
            (fitting[file.name].chain[0].as_file(file.name), fitting[file.name].path)
            if file.name in fitting
            else (file, directory / file.name)
            for file in manifest.files
        ]
        self._submit(proposal, seal(proposal, signer), manifest, sources, progress)
        return proposal

    def entries(self) -> list[Received]:
        """Return all proposals, sorted by package and id; those that are damaged come last.

        Raises:
            RegistryError: When there are too many.
        """
        ids = self._list_ids()
        if len(ids) > MAX_LISTED:
            raise RegistryError(
                f"the inbox has {len(ids):,} proposals, of which at most {MAX_LISTED:,} are read",
                where=self.registry.location,
                hint=f"remove those that nobody will review, the folders under {FOLDER}/",
            )
        found = [self._try_to_read(id_) for id_ in ids]
        return sorted(
            found,
            key=lambda one: (one.proposal is None, one.proposal and one.proposal.name, one.id),
        )

    def find(self, text: str) -> Received:
        """Return one proposal; see `complete`.

        Raises:
            RegistryError: When there is none, or several.
            ProposalError: When it was changed since it was made.
        """
        return self._read(self.complete(text))

    def complete(self, text: str) -> str:
        """Return the id of a proposal.

        Args:
            text: The first digits of its id; or the name of an expert with one open proposal.

        Raises:
            RegistryError: When there is none, or several.
        """
        known = self._list_ids()
        ids = [id_ for id_ in known if id_.startswith(text.lower())]
        if len(text) < _MIN_DIGITS or not ids:
            ids = [
                received.id
                for received in self.entries()
                if received.state == "open"
                and received.proposal is not None
                and received.proposal.name == text
            ]
        if len(ids) != 1:
            what = "no proposal" if not ids else f"{len(ids)} proposals"
            raise RegistryError(
                f"{what} of the id or the expert {text[:_ID_LENGTH]!r}",
                where=self.registry.location,
                hint=f"give the first digits, at least {_MIN_DIGITS}, of an id that `composable "
                f"review {self.registry.location}` lists",
            )
        return ids[0]

    def decide(self, received: Received, outcome: Outcome) -> None:
        """Record what was decided on a proposal, and remove its files.

        Raises:
            RegistryError: When something else was decided already.
        """
        data = canonical_json(to_plain(outcome)) + b"\n"
        if not self._storage.create(_path(received.id, OUTCOME_FILE), data):
            require_open(self._read(received.id), self.registry.location, allowed=outcome)
        assert received.proposal is not None
        for file in received.proposal.sent:
            self._storage.remove(_path(received.id, file.name))

    def discard(self, id_: str) -> None:
        """Remove all files of a proposal that cannot be read."""
        for path in self._storage.files_under(f"{FOLDER}/{id_}") or []:
            self._storage.remove(path)

    def find_base(self, name: str, version: Version) -> Release:
        """Return the release that a proposal changes.

        Raises:
            UnknownExpertError: When the registry has none.
        """
        releases = self.registry.versions(name) if self.registry.exists else ()
        for release in releases:
            if release.version == version:
                return release
        have = ", ".join(str(release.version) for release in releases)
        raise UnknownExpertError(
            f"no release {name} {version}, of which this is a change",
            where=self.registry.location,
            hint=f"available: {have}"
            if have
            else f"a new expert is published, not proposed: "
            f"`composable publish DIR --registry {self.registry.location}`",
        )

    def find_publisher(self, proposal: Proposal) -> str | None:
        """Return the publisher of this registry whose key signed a proposal; None if nobody's."""
        signatures = self.registry.find_signatures()
        if signatures is None or not proposal.key:
            return None
        for grant in signatures.documents.read_grants().values():
            if proposal.key in map(format_public_key, grant.keys):
                return grant.publisher
        return None

    def describe_proposer(self, received: Received) -> str:
        """Return who proposed something, in words: a publisher, a key, or an account."""
        proposal, by = received.proposal, f"{received.account}, " if received.account else ""
        if proposal is None:
            return received.account
        if not proposal.key:
            return f"{by}unsigned"
        publisher = self.find_publisher(proposal)
        if publisher is not None:
            return f"{by}{publisher}"
        is_signed = self.registry.find_signatures() is not None
        return f"{by}{'unknown key ' if is_signed else ''}{shorten_key(proposal.key)}"

    # What depends on where the inbox is.

    def _submit(
        self,
        proposal: Proposal,
        envelope: bytes,
        manifest: Manifest,
        sources: Sequence[tuple[PackageFile, Path]],
        progress: ByteProgress | None,
    ) -> None:
        """Write the files of a proposal, then the proposal."""
        storage = self._storage
        if storage.read(_path(proposal.id, PROPOSAL_FILE)) is not None:
            require_open(self._read(proposal.id), self.registry.location)
            return
        n_open = sum(received.outcome is None for received in self.entries())
        if n_open >= MAX_OPEN:
            raise RegistryError(
                f"the inbox has {n_open} open proposals, at most {MAX_OPEN} are taken",
                where=self.registry.location,
                hint="ask its maintainers to review some",
            )
        for file, path in sources:
            storage.upload(_path(proposal.id, file.name), LocalFile(path), file, progress)
        storage.create(_path(proposal.id, EXPERT_FILE), manifest.to_toml().encode())
        storage.create(_path(proposal.id, PROPOSAL_FILE), envelope)

    def _list_ids(self) -> list[str]:
        """Return the ids of all proposals, sorted."""
        paths = self._storage.files_under(FOLDER) or []
        parts = [path.split("/") for path in paths]
        return sorted(
            part[1]
            for part in parts
            if len(part) == 3 and part[2] == PROPOSAL_FILE and _is_id(part[1])
        )

    def _read(self, id_: str) -> Received:
        """Return a proposal, verified.

        Raises:
            ProposalError: When it was changed.
        """
        where = f"{self.registry.location}/{FOLDER}/{id_[:SHOWN_DIGITS]}…"
        document = self._storage.read(_path(id_, PROPOSAL_FILE))
        data = b"" if document is None else document.data
        if len(data) > MAX_ENVELOPE_BYTES:
            raise ProposalError(f"is no proposal: {len(data):,} bytes", where=where)
        proposal = open_envelope(data, id_, where)
        decided = self._storage.read(_path(id_, OUTCOME_FILE))
        outcome = None
        if decided is not None:
            outcome = parse_record(Outcome, decided.data, where, ProposalError)
        return Received(id=id_, proposal=proposal, outcome=outcome)

    def stream(self, id_: str, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file that was sent with a proposal; the caller verifies them."""
        return self._storage.stream(_path(id_, name))

    def _try_to_read(self, id_: str) -> Received:
        try:
            return self._read(id_)
        except ProposalError as error:
            return Received(id=id_, problem=error.message)

    @property
    def _storage(self) -> WritableStorage:
        return self.registry.writable_storage()

    def _find_signer(self, name: str | None) -> Signer | None:
        """Return the key to sign with; None if there is none."""
        files = self._keyring.files()
        if name is not None:
            named = [file for file in files if file.name == name]
            if not named:
                raise KeyFileError(
                    f"no key {name!r}",
                    where=str(self._keyring.folder),
                    hint=f"create one with `composable registry key {name}`",
                )
            return self._keyring.unlock(named[0])
        signatures = self.registry.find_signatures()
        if signatures is not None:
            grants = signatures.documents.read_grants().values()
            granted = self._keyring.find(key.keyid for grant in grants for key in grant.keys)
            files = granted or files
        return self._keyring.unlock(files[0]) if len(files) == 1 else None


def check_base(manifest: Manifest, base: Release) -> None:
    """Refuse a manifest that is not one of a change of a release.

    Raises:
        ManifestError: When it is of another expert, for another interface, or does not say that it
            derives from the release.
    """
    release = f"{base.name}@{base.version}"
    if manifest.name != base.name:
        raise ManifestError(
            f"{manifest.name!r} is another expert than {release}, the base of the proposal",
            where=f"{EXPERT_FILE}: expert.name",
            hint=f"propose it as a change of its own release, or name it {base.name!r}",
        )
    if manifest.interface.digest != base.interface.digest:
        raise ManifestError(
            f"was trained against another interface than {release}: {manifest.interface.digest}, "
            f"expected {base.interface.digest}",
            where=f"{EXPERT_FILE}: interface.digest",
            hint=f"train it for {base.interface.name} again, from {release}",
        )
    if manifest.derives_from != release:
        raise ManifestError(
            f"{manifest.derives_from or 'nothing'} is what it derives from, but {release} is the "
            "base of the proposal",
            where=f"{EXPERT_FILE}: expert.derives-from",
            hint=f'train it with derives-from = "{release}", or give the base that it was trained '
            "from",
        )
    if manifest.provenance is not None:
        raise ManifestError(
            "states the provenance of a release that was accepted",
            where=f"{EXPERT_FILE}: provenance",
            hint="remove the table: accepting a proposal writes it",
        )


def check_sizes(proposal: Proposal) -> None:
    """Refuse a proposal with more bytes than an inbox takes.

    Raises:
        ProposalError: When it has.
    """
    for name, size in proposal.sizes.items():
        limit = MAX_BYTES if name.endswith(".safetensors") else MAX_TEXT_BYTES
        if size > limit:
            raise ProposalError(f"{size:,} bytes, at most {limit:,} can be proposed", where=name)
    # Of whole files, which a maintainer makes of deltas.
    n_bytes = sum(proposal.sizes.values())
    if n_bytes > MAX_BYTES:
        raise ProposalError(f"{n_bytes:,} bytes, at most {MAX_BYTES:,} can be proposed")


def check_deltas(proposal: Proposal, base: Release) -> None:
    """Refuse deltas that start from other files than those of the base.

    Raises:
        ProposalError: When one does.
    """
    known = {file.name: (file.digest, file.size) for file in base.files}
    for name, delta in proposal.deltas.items():
        if known.get(name) != (delta.base, delta.base_size):
            raise ProposalError(
                f"is a change of {delta.base}, which is not {name} of {proposal.base_release}",
                where=delta.as_file(name).name,
                hint="ask its proposer to propose it again, with `composable propose DIR --whole`",
            )


def require_open(received: Received, location: str, allowed: Outcome | None = None) -> Received:
    """Return a proposal if nothing was decided on it yet.

    Args:
        received: The proposal.
        location: The registry, for errors.
        allowed: A decision that may have been made already.

    Raises:
        RegistryError: When something else was decided.
    """
    outcome = received.outcome
    if outcome is None or outcome == allowed:
        return received
    detail = f" as {outcome.release}" if outcome.release else f": {outcome.reason}"
    raise RegistryError(
        f"proposal {received.id[:SHOWN_DIGITS]} was {outcome.state} already{detail}", where=location
    )


def _describe_manifest(data: bytes) -> PackageFile:
    return PackageFile(name=EXPERT_FILE, size=len(data), digest=digest_bytes(data))


def _path(id_: str, name: str) -> str:
    return f"{FOLDER}/{id_}/{name}"


def _is_id(text: str) -> bool:
    return len(text) == _ID_LENGTH and set(text) <= _HEX
