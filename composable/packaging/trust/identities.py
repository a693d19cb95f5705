"""Identities that sign instead of keys: an account of an OpenID provider, proven by sigstore.

An identity is an issuer and a subject, both exact: a person's e-mail address, or a workflow of a
repository. Sigstore's certificate authority writes it into a certificate that is valid for minutes,
for a key that is made for one signature or a few; its log proves when the signature was made. So
what is verified here is a certificate at that time, and needs no network.

Which authorities and logs are accepted is stated in the list of publishers, which two root keys of
the registry sign; nothing else of sigstore is pinned on this machine. A key without them verifies
nothing. To sign, see `packaging.trust.sign_in`.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Final

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import KEY_FOR_TYPE_AND_SCHEME, Key, Signature

from composable.errors import KeyFileError, SignatureError
from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging.trust.keys import IDENTITY_PREFIX, IDENTITY_TYPE, parse_public_key

INSTALL: Final = "pip install 'composable[sigstore]'"
# The field of a signature that has the certificate, the entry of the log and its proof.
BUNDLE: Final = "bundle"
_SCHEME: Final = "Fulcio"
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
# Seconds that a time can have in Python.
_LATEST: Final = 1 << 37
# Between the clocks of the operator, who grants, and of the certificate authority.
_CLOCK_TOLERANCE: Final = datetime.timedelta(minutes=1)
# Printable ASCII. Issuers have no fragment, by OpenID Connect Discovery 1.0, section 3.
_TEXT: Final = re.compile(r"sigstore:(https?://[!-\"$-~]{1,200})#([!-)+-~]{1,400})", re.ASCII)


class SignatureRefusedError(UnverifiedSignatureError):
    """A signature of an identity that is not valid.

    Args:
        message: Why, as the end of a sentence.
        kind: Which of `SIGNATURE_RULES` it breaks.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Sigstore:
    """A sigstore whose proofs of identities a registry accepts.

    Args:
        trusted_root: Its certificates and keys: JSON of a `TrustedRoot` of sigstore.
    """

    def __init__(self, trusted_root: Any) -> None:
        self.trusted_root = trusted_root

    @property
    def fingerprint(self) -> str:
        """One short text for the certificates and keys, to compare."""
        return digest_bytes(canonical_json(self.trusted_root))[7:23]

    def describe(self) -> str:
        """Return the names of its certificate authorities, and its fingerprint.

        Example:
            >>> subject = {"organization": "sigstore.dev", "commonName": "sigstore"}
            >>> Sigstore({"certificateAuthorities": [{"subject": subject}]}).describe()
            'sigstore of sigstore.dev (fed4b08120b6d497)'
        """
        try:
            subjects = [each["subject"] for each in self.trusted_root["certificateAuthorities"]]
            names = {
                f"{subject['commonName']} of {subject['organization']}" for subject in subjects
            }
        except (KeyError, TypeError):
            names = {"unreadable"}
        return f"{', '.join(sorted(names))} ({self.fingerprint})"

    @cached_property
    def _verifier(self) -> Any:
        load_sigstore()
        from sigstore.models import TrustedRoot
        from sigstore.verify import Verifier
        from sigstore_models.trustroot.v1 import TrustedRoot as Fields

        try:
            return Verifier(
                trusted_root=TrustedRoot(Fields.from_json(json.dumps(self.trusted_root)))
            )
        except Exception as error:  # errors of several libraries
            raise SignatureError(
                f"the sigstore that this registry accepts cannot be read: {_describe(error)}",
                kind="wrong-content",
                hint="its operator states it again with `composable registry sigstore`; a newer "
                f"version of the library may read it: {INSTALL}",
            ) from error

    def check(self) -> None:
        """Raise if it cannot be used: damaged, or the library is missing.

        Raises:
            SignatureError: When it is.
        """
        assert self._verifier is not None

    def verify(self, key: IdentityKey, bundle: Any, data: bytes) -> None:
        """Verify a signature of an identity.

        Args:
            key: The identity.
            bundle: The certificate, the signature and its log entry: JSON of a sigstore bundle.
            data: What was signed.

        Raises:
            SignatureRefusedError: When it is not valid.
            SignatureError: When the library is missing.
        """
        verifier = self._verifier
        from sigstore.errors import CertValidationError
        from sigstore.models import Bundle

        parsed = None
        try:
            parsed = Bundle.from_json(json.dumps(bundle))
            verifier.verify_artifact(data, parsed, _Exactly(key))
        except SignatureRefusedError:
            raise
        # A bundle is foreign data, and the libraries raise errors of many kinds for damage.
        except Exception as error:
            if parsed is None:
                raise SignatureRefusedError(
                    f"it lacks the certificate, the log entry or the proof that it is in the log: "
                    f"{_describe(error)}",
                    "unproven",
                ) from error
            if (reason := _find_time_problem(parsed)) is not None:
                raise SignatureRefusedError(reason, "expired") from error
            if isinstance(error, CertValidationError):
                raise SignatureRefusedError(
                    "its certificate is of an authority that this registry does not accept",
                    "wrong-signer",
                ) from error
            if not _is_about(bundle, data):
                raise SignatureRefusedError(
                    "it is a signature of other content", "wrong-content"
                ) from error
            raise SignatureRefusedError(_describe(error), "unproven") from error


class IdentityKey(Key):
    """The identity of a publisher, in the place of a public key.

    Of a registry's metadata, `accept_identities` states which sigstore proves it; before that,
    nothing is verified. The format is that of `securesystemslib.signer.SigstoreKey`, which accepts
    the public sigstore alone and verifies with the network, with one more field: since when it is
    granted. So an account that was stolen, revoked, recovered and granted again has not signed
    what the thief did.

    Args:
        keyid: Its identifier.
        keytype: `sigstore-oidc`.
        scheme: `Fulcio`.
        keyval: Its `issuer` and `identity`, and in a grant `since`, a time as RFC 3339 in UTC.
        unrecognized_fields: Further fields.
    """

    def __init__(
        self,
        keyid: str,
        keytype: str,
        scheme: str,
        keyval: dict[str, Any],
        unrecognized_fields: dict[str, Any] | None = None,
    ) -> None:
        text = f"{IDENTITY_PREFIX}{keyval.get('issuer')}#{keyval.get('identity')}"
        if _TEXT.fullmatch(text) is None:
            raise ValueError(f"{text[:200]!r} is not an identity")
        self.since = _parse_time(keyval["since"]) if "since" in keyval else None
        super().__init__(keyid, keytype, scheme, keyval, unrecognized_fields)
        self.sigstore: Sigstore | None = None

    @property
    def issuer(self) -> str:
        """The provider that knows the account."""
        return str(self.keyval["issuer"])

    @property
    def subject(self) -> str:
        """The account, as the certificate names it."""
        return str(self.keyval["identity"])

    @classmethod
    def of(cls, issuer: str, subject: str, since: datetime.datetime | None = None) -> IdentityKey:
        """Return the identity of an account; its identifier follows from its content.

        Args:
            issuer: The provider.
            subject: The account.
            since: Before which nothing that it signed is valid.
        """
        keyval = {"identity": subject, "issuer": issuer}
        if since is not None:
            keyval["since"] = since.strftime(_TIME)
        content = {"keytype": IDENTITY_TYPE, "scheme": _SCHEME, "keyval": keyval}
        return cls.from_dict(digest_bytes(canonical_json(content))[7:], content)

    def granted(self, now: datetime.datetime) -> IdentityKey:
        """Return the identity as it is granted now."""
        return self.of(self.issuer, self.subject, now)

    def is_named_by(self, certificate: Any) -> bool:
        """Return whether a certificate, an `x509.Certificate`, names this identity alone."""
        return read_certificate(certificate) == (self.issuer, [self.subject])

    @classmethod
    def from_dict(cls, keyid: str, key_dict: dict[str, Any]) -> IdentityKey:
        """Read an identity of metadata."""
        keytype, scheme, keyval = cls._from_dict(key_dict)
        return cls(keyid, keytype, scheme, keyval, key_dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as metadata has it."""
        fields: dict[str, Any] = self._to_dict()
        return fields

    def verify_signature(self, signature: Signature, data: bytes) -> None:
        """Verify a signature.

        Raises:
            SignatureRefusedError: When it is not valid.
            SignatureError: When the library is missing.
        """
        bundle = signature.unrecognized_fields.get(BUNDLE)
        if self.sigstore is None:
            raise SignatureRefusedError("the registry accepts no sigstore", "wrong-signer")
        if signature.signature != hex_signature(bundle):
            raise SignatureRefusedError("it is not the one that its log entry is of", "unproven")
        self.sigstore.verify(self, bundle, data)

    def check_certificate(self, certificate: Any) -> None:
        """Check that a certificate that was verified is of this identity, since it was granted.

        Args:
            certificate: An `x509.Certificate`.

        Raises:
            SignatureRefusedError: When it is not.
        """
        issuer, subjects = read_certificate(certificate)
        if issuer != self.issuer:
            raise SignatureRefusedError(
                f"it is of an account at {issuer[:200]!r}, expected {self.issuer!r}",
                "wrong-signer",
            )
        if subjects != [self.subject]:
            found = ", ".join(subjects)[:400] or "nobody"
            raise SignatureRefusedError(
                f"it is of {found}, expected {self.subject}", "wrong-signer"
            )
        moment = certificate.not_valid_before_utc
        if self.since is not None and moment < self.since - _CLOCK_TOLERANCE:
            raise SignatureRefusedError(
                f"it was made at {moment:%Y-%m-%d %H:%M} UTC, before this identity was granted at "
                f"{self.since:%Y-%m-%d %H:%M}",
                "revoked",
            )


KEY_FOR_TYPE_AND_SCHEME[(IDENTITY_TYPE, _SCHEME)] = IdentityKey


def parse_signer(text: str) -> Key:
    """Return the public key or the identity that a line of text states.

    Raises:
        KeyFileError: For text of another form.

    Example:
        >>> identity = parse_signer("sigstore:https://accounts.google.com#alice@example.org")
        >>> identity.subject
        'alice@example.org'
    """
    text = text.strip()
    if not text.startswith(IDENTITY_PREFIX):
        return parse_public_key(text)
    match = _TEXT.fullmatch(text)
    if match is None:
        raise KeyFileError(
            f"{text[:200]!r} is not an identity"
            + (": identities are exact, without wildcards" if "*" in text else ""),
            hint="expected sigstore:ISSUER#SUBJECT, such as "
            "'sigstore:https://accounts.google.com#alice@example.org'",
        )
    return IdentityKey.of(match[1], match[2])


def accept_identities(keys: Iterable[Key], sigstore: Sigstore | None) -> None:
    """Let the identities among keys be proven by a sigstore that the registry accepts."""
    for key in keys:
        if isinstance(key, IdentityKey):
            key.sigstore = sigstore


def explain_refusal(
    keys: Iterable[Key], signatures: Iterable[Signature], data: bytes
) -> SignatureRefusedError | None:
    """Return why a signature of an identity is not valid; None if none of the keys has one."""
    by_id = {signature.keyid: signature for signature in signatures}
    for key in keys:
        if isinstance(key, IdentityKey) and key.keyid in by_id:
            try:
                key.verify_signature(by_id[key.keyid], data)
            except SignatureRefusedError as error:
                return error
    return None


def load_sigstore() -> None:
    """Load the library.

    Raises:
        SignatureError: When it is not installed.
    """
    try:
        import sigstore.models
        import sigstore.verify  # noqa: F401
    except ImportError as error:
        raise SignatureError(
            "a publisher signs with a sigstore identity, and the library that verifies it is not "
            "installed",
            kind="unverifiable",
            hint=f"install it: {INSTALL}. Without it nothing of that publisher is used",
        ) from error


def hex_signature(bundle: Any) -> str | None:
    """Return the signature in a bundle, as metadata repeats it; None if it has none."""
    try:
        return base64.b64decode(bundle["messageSignature"]["signature"], validate=True).hex()
    except (KeyError, TypeError, ValueError):
        return None


def read_certificate(certificate: Any) -> tuple[str, list[str]]:
    """Return the issuer and the subjects that a certificate of sigstore names.

    References:
        The extensions 1.3.6.1.4.1.57264.1.8 and, before it, .1.1 of sigstore's `oid-info.md`.
    """
    from cryptography import x509
    from cryptography.hazmat import asn1

    def read(number: str) -> bytes | None:
        try:
            oid = x509.ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{number}")
            return bytes(certificate.extensions.get_extension_for_oid(oid).value.value)
        except x509.ExtensionNotFound:
            return None

    newer, older = read("8"), read("1")
    issuer = asn1.decode_der(str, newer) if newer is not None else (older or b"").decode()
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return issuer, [str(name.value) for name in names]


class _Exactly:
    """What sigstore's verifier asks whether a certificate is of the identity."""

    def __init__(self, key: IdentityKey) -> None:
        self._key = key

    def verify(self, cert: Any) -> None:
        """Check a certificate that was verified."""
        self._key.check_certificate(cert)


def _find_time_problem(bundle: Any) -> str | None:
    """Return what is wrong with the time of a signature; None if its certificate was valid then.

    The time is that of a timestamp authority, or else of the log; it may not be proven.
    """
    stamps = bundle.verification_material.timestamp_verification_data
    seconds = bundle.log_entry._inner.integrated_time
    if stamps is not None:
        moment = stamps.rfc3161_timestamps[0].tst_info.gen_time
    elif seconds is not None and seconds < _LATEST:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    else:
        return None
    certificate = bundle.signing_certificate
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if start <= moment <= end:
        return None
    return (
        f"it was made at {moment:%Y-%m-%d %H:%M:%S}, and its certificate was valid from "
        f"{start:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC"
    )


def _parse_time(text: Any) -> datetime.datetime:
    return datetime.datetime.strptime(str(text), _TIME).replace(tzinfo=datetime.UTC)


def _is_about(bundle: Any, data: bytes) -> bool:
    """Return whether a bundle states the digest of these bytes, or of none."""
    digest = base64.b64encode(bytes.fromhex(digest_bytes(data)[7:])).decode()
    stated = bundle["messageSignature"].get("messageDigest")
    return stated is None or stated.get("digest") == digest


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]
