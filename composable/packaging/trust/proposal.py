"""A proposal to change an expert: an in-toto statement in a DSSE envelope, signed or not.

Its subjects are all files of the proposed release with their SHA-256, also where a delta was sent
in place of one. Its predicate says what it is a change of, why, what was sent, and whose key signed
it. The digest of the statement is the proposal's id, so nothing of a proposal can change under the
same id. The key is part of the statement: neither can a signature be taken off, nor another one put
in its place. Whether the key is that of a publisher is not decided here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Signer

from composable.errors import KeyFileError, PackagingError, ProposalError
from composable.files.records import convert_exactly, to_plain
from composable.interface.digest import canonical_json, digest_bytes, is_digest
from composable.packaging.manifests.manifest import (
    EXPERT_FILE,
    EXPERT_FILES,
    Delta,
    PackageFile,
)
from composable.packaging.manifests.packing import REQUIRED_FILES
from composable.packaging.trust.keys import parse_public_key
from composable.packaging.trust.statement import PAYLOAD_TYPE, STATEMENT_TYPE
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version

PREDICATE_TYPE: Final = "https://composable.invalid/proposal/v1"
MAX_ENVELOPE_BYTES: Final = 1 << 16
MAX_MESSAGE_LENGTH: Final = 4000
_HINT: Final = "nothing of it was used; ask its proposer to propose it again"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What is proposed.

    Args:
        name: The package that it changes.
        base: The version that it is a change of.
        base_manifest: Digest of that release's manifest.
        message: Why, in the proposer's words.
        key: The proposer's public key, `ed25519:` and 64 hexadecimal digits; empty if unsigned.
        digests: Digest of every file, by name, with that of the manifest.
        sizes: Bytes of every file, by name.
        deltas: What was sent in place of a file, by its name: a change of the base's file.

    Example:
        >>> digest = "sha256:" + "0" * 64
        >>> proposal = Proposal(
        ...     name="legal",
        ...     base="1.0.0",
        ...     base_manifest=digest,
        ...     message="more contracts",
        ...     key="",
        ...     digests={"expert.toml": digest},
        ...     sizes={"expert.toml": 200},
        ... )
        >>> open_envelope(seal(proposal), proposal.id) == proposal
        True
    """

    name: str
    base: str
    base_manifest: str
    message: str
    key: str
    digests: dict[str, str]
    sizes: dict[str, int]
    deltas: dict[str, Delta] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The 64 hexadecimal digits that identify it: the SHA-256 of its statement."""
        return digest_bytes(self.to_payload()).removeprefix("sha256:")

    @property
    def base_release(self) -> str:
        """The release that it is a change of, `NAME@VERSION`."""
        return f"{self.name}@{self.base}"

    @property
    def sent(self) -> list[PackageFile]:
        """The files that were sent: deltas, and files that are whole."""
        return [
            self.deltas[name].as_file(name)
            if name in self.deltas
            else PackageFile(name=name, size=self.sizes[name], digest=digest)
            for name, digest in self.digests.items()
        ]

    @property
    def n_bytes(self) -> int:
        """Bytes that were sent."""
        return sum(file.size for file in self.sent)

    def to_payload(self) -> bytes:
        """Return the in-toto statement; the same proposal gives the same bytes."""
        predicate = to_plain(self)
        if not self.deltas:
            del predicate["deltas"]  # as statements were before there were any
        subjects = [
            {"name": file, "digest": {"sha256": digest.removeprefix("sha256:")}}
            for file, digest in sorted(predicate.pop("digests").items())
        ]
        return canonical_json(
            {
                "_type": STATEMENT_TYPE,
                "subject": subjects,
                "predicateType": PREDICATE_TYPE,
                "predicate": predicate,
            }
        )

    @classmethod
    def from_payload(cls, payload: bytes) -> Proposal:
        """Read an in-toto statement.

        Raises:
            PackagingError: When it is not one on a proposal, or a field is not allowed.
        """
        try:
            fields: Any = json.loads(payload)
            kinds = fields["_type"], fields["predicateType"]
            digests = {
                str(subject["name"]): f"sha256:{subject['digest']['sha256']}"
                for subject in fields["subject"]
            }
            table = {**fields["predicate"], "digests": digests}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProposalError(f"lacks {error}") from error
        if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise ProposalError(f"is of type {str(kinds[1])[:80]!r}")
        proposal = convert_exactly(table, cls, "predicate", ProposalError)
        _check_fields(proposal)
        if proposal.to_payload() != payload:
            raise ProposalError("is not written in the one way in which statements are")
        return proposal


def _check_fields(proposal: Proposal) -> None:
    check_package_name(proposal.name, "name")
    Version(proposal.base)
    if proposal.key:
        parse_public_key(proposal.key)
    check_message(proposal.message)
    allowed = {EXPERT_FILE, *EXPERT_FILES}
    if not proposal.digests.keys() <= allowed or EXPERT_FILE not in proposal.digests:
        found = ", ".join(sorted(proposal.digests))[:200]
        raise ProposalError(f"has the files {found}; expected {', '.join(sorted(allowed))}")
    if not all(map(is_digest, (proposal.base_manifest, *proposal.digests.values()))):
        raise ProposalError("has a digest that is none")
    if proposal.sizes.keys() != proposal.digests.keys() or min(proposal.sizes.values()) < 0:
        raise ProposalError("does not state the size of every file")
    for name, delta in proposal.deltas.items():
        if name not in REQUIRED_FILES or name not in proposal.digests:
            raise ProposalError(f"has a delta of {name[:80]!r}, which is no tensor file of it")
        if not is_digest(delta.digest) or not is_digest(delta.base):
            raise ProposalError(f"has a delta of {name} with a digest that is none")
        if not 0 < delta.size < proposal.sizes[name] or delta.base_size < 0:
            raise ProposalError(f"has a delta of {name} that is no smaller than the file")


def check_message(text: str) -> str:
    """Return the message of a proposal if it is allowed.

    Raises:
        ProposalError: When it is too long.
    """
    if len(text) > MAX_MESSAGE_LENGTH:
        raise ProposalError(
            f"the message has {len(text):,} characters, at most {MAX_MESSAGE_LENGTH:,} are allowed"
        )
    return text


def seal(proposal: Proposal, signer: Signer | None = None) -> bytes:
    """Return a proposal in its envelope.

    Args:
        proposal: The proposal.
        signer: The proposer's key, if it names one.
    """
    assert bool(proposal.key) == (signer is not None)
    envelope = Envelope(proposal.to_payload(), PAYLOAD_TYPE, {})
    if signer is not None:
        envelope.sign(signer)
    return _format_envelope(envelope)


def open_envelope(data: bytes, id_: str | None = None, where: str = "") -> Proposal:
    """Return the proposal in an envelope, verified to the last byte.

    Args:
        data: The envelope.
        id_: The proposal's id; None for one that arrives, which may have any.
        where: Where the envelope comes from, for errors.

    Raises:
        ProposalError: When it is damaged, another proposal, or not signed by the key that it names.
    """
    where = where or f"proposal {id_[:12] if id_ else ''}".strip()
    try:
        envelope = Envelope.from_dict(json.loads(data))
        if envelope.payload_type != PAYLOAD_TYPE or _format_envelope(envelope) != data:
            raise ValueError("is not written in the one way in which envelopes are")
        proposal = Proposal.from_payload(envelope.payload)
    except PackagingError as error:
        raise _refuse(f"is no proposal: {error.message}", where) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refuse(f"is no proposal: {error}", where) from error
    if id_ is not None and proposal.id != id_:
        raise _refuse(f"was changed: its digest is {proposal.id}, expected {id_}", where)
    if len(envelope.signatures) != bool(proposal.key):
        raise _refuse(f"has {len(envelope.signatures)} signatures, expected one of its key", where)
    if proposal.key:
        try:
            envelope.verify([parse_public_key(proposal.key)], 1)
        except (VerificationError, KeyFileError) as error:
            raise _refuse(
                f"is not signed by the key that it names, {proposal.key}", where
            ) from error
    return proposal


def _refuse(message: str, where: str) -> ProposalError:
    return ProposalError(message, where=where, hint=_HINT)


def _format_envelope(envelope: Envelope) -> bytes:
    fields: Mapping[str, Any] = envelope.to_dict()
    return canonical_json(fields) + b"\n"
