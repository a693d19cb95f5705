"""The statement of a publisher on one release, signed: an in-toto statement in a DSSE envelope.

Its subjects are all files of the release with their SHA-256: the manifest, the parameters, the
card and every other file. Its predicate repeats what the manifest says of name, version, licence
and router interface. It can be verified without the registry that it was published in.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key, Signer

from composable.errors import SignatureError
from composable.interface.digest import canonical_json, is_digest
from composable.packaging.trust.identities import explain_refusal

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://composable.invalid/release/v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
MAX_STATEMENT_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a publisher states on one release.

    Args:
        name: The package.
        version: Its version.
        license: Its licence as the manifest states it; empty if it states none.
        interface: Digest of the router interface that it was trained against.
        digests: The digest of every file, by name, with that of the manifest.
    """

    name: str
    version: str
    license: str
    interface: str
    digests: Mapping[str, str]

    def to_payload(self) -> bytes:
        """Return the in-toto statement; the same release gives the same bytes."""
        subjects = [
            {"name": file, "digest": {"sha256": digest.removeprefix("sha256:")}}
            for file, digest in sorted(self.digests.items())
        ]
        predicate = {
            "name": self.name,
            "version": self.version,
            "license": self.license,
            "interface": self.interface,
        }
        return canonical_json(
            {
                "_type": STATEMENT_TYPE,
                "subject": subjects,
                "predicateType": PREDICATE_TYPE,
                "predicate": predicate,
            }
        )

    @classmethod
    def from_payload(cls, payload: bytes) -> Statement:
        """Read an in-toto statement.

        Raises:
            ValueError: When it is not one on a release.
        """
        fields: Any = json.loads(payload)
        if not isinstance(fields, dict) or fields.get("_type") != STATEMENT_TYPE:
            raise ValueError("is not an in-toto statement")
        if fields.get("predicateType") != PREDICATE_TYPE:
            raise ValueError("is not a statement on a release")
        try:
            predicate = fields["predicate"]
            digests = {
                str(subject["name"]): f"sha256:{subject['digest']['sha256']}"
                for subject in fields["subject"]
            }
            names = ("name", "version", "license", "interface")
            texts = {name: predicate[name] for name in names}
        except (KeyError, TypeError) as error:
            raise ValueError(f"lacks {error}") from error
        is_text = all(isinstance(text, str) for text in texts.values())
        if not is_text or not all(map(is_digest, digests.values())):
            raise ValueError("has a field of another type")
        if len(digests) != len(fields["subject"]):
            raise ValueError("lists a file twice")
        return cls(**texts, digests=digests)


def sign_statement(statement: Statement, signer: Signer) -> bytes:
    """Return a statement in an envelope, signed.

    Args:
        statement: The statement.
        signer: The key of the publisher.
    """
    envelope = Envelope(statement.to_payload(), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return canonical_json(envelope.to_dict()) + b"\n"


def verify_statement(data: bytes, keys: Collection[Key], where: str) -> tuple[Statement, Key]:
    """Return a statement, and the key that signed it.

    Args:
        data: The envelope.
        keys: The keys or identities of the publisher, of which one is enough.
        where: Where the envelope comes from, for errors.

    Raises:
        SignatureError: When it is damaged, or signed by none of the keys.
    """
    try:
        envelope = Envelope.from_dict(json.loads(data))
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ValueError(f"holds {envelope.payload_type!r}")
        accepted = envelope.verify(list(keys), 1)
        statement = Statement.from_payload(envelope.payload)
    except VerificationError as error:
        refusal = explain_refusal(keys, envelope.signatures.values(), envelope.pae())
        if refusal is not None:
            raise SignatureError(
                f"its signature is not valid: {refusal}",
                kind=refusal.kind,
                where=where,
                hint="do not use the release: somebody else put it there, or the publisher has to "
                "sign again after a change of identities, with `composable registry sign --vouch`",
            ) from error
        raise SignatureError(
            "is not signed by a key of its publisher",
            kind="wrong-signer",
            where=where,
            hint="do not use the release: somebody else put it there, or the publisher has to sign "
            "again after a change of keys, with `composable registry sign`",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SignatureError(
            f"is not a signed statement on a release: {error}",
            kind="wrong-content",
            where=where,
            hint="the registry is damaged or malicious; nothing of this release was used",
        ) from error
    return statement, next(iter(accepted.values()))
