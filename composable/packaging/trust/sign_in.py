"""Signing as an identity: signs in, gets a certificate from sigstore, and has signatures logged.

The credential is that of the CI job, or else of a person at a terminal, who signs in with a
browser. It is sent only to the sigstore that this machine is told to use, the public one by
default: never to one that a registry names, since whoever has the credential can sign with it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from securesystemslib.signer import Key, SecretsHandler, Signature, Signer

from composable.errors import ComposableError, IdentityError
from composable.files.reading import read_bytes
from composable.packaging.trust.identities import (
    BUNDLE,
    IdentityKey,
    SignatureRefusedError,
    hex_signature,
    load_sigstore,
    read_certificate,
)
from composable.packaging.trust.keys import format_public_key

# A client trust configuration: the services and the trusted root of a sigstore.
SIGSTORE_VARIABLE: Final = "COMPOSABLE_SIGSTORE"
# The name that sigstore's own command line gives it.
TOKEN_VARIABLE: Final = "SIGSTORE_IDENTITY_TOKEN"
_MAX_CONFIG_BYTES: Final = 1 << 20
_NOTHING_LOST: Final = (
    "nothing was published that clients see, and nothing is lost: run the same command again"
)


def load_config(path: Path | None = None) -> Any:
    """Return the services and the trusted root of a sigstore: a `ClientTrustConfig`.

    Args:
        path: A client trust configuration; by default the one that `COMPOSABLE_SIGSTORE` names, or
            else the public sigstore, whose configuration is fetched and verified.

    Raises:
        IdentityError: When it cannot be read or fetched.
        SignatureError: When the library is missing.
    """
    load_sigstore()
    from sigstore.models import ClientTrustConfig

    named = os.environ.get(SIGSTORE_VARIABLE)
    path = path or (Path(named) if named else None)
    if path is None:
        with _explained(
            "the configuration of the public sigstore cannot be fetched",
            hint=f"this needs the network, or the file of a configuration in {SIGSTORE_VARIABLE}",
        ):
            return ClientTrustConfig.production()
    try:
        return ClientTrustConfig.from_json(read_bytes(path, _MAX_CONFIG_BYTES).decode())
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise IdentityError(
            "no such file" if is_missing else "is not the configuration of a sigstore",
            where=str(path),
            hint="expected a client trust configuration, as the operator of the sigstore gives it: "
            "JSON with trustedRoot and signingConfig",
        ) from error


def read_trusted_root(path: Path | None = None) -> dict[str, Any]:
    """Return the trusted root of a sigstore, as the metadata of a registry states it.

    Args:
        path: As for `load_config`.

    Raises:
        IdentityError: When it cannot be read or fetched.
        SignatureError: When the library is missing.
    """
    fields: dict[str, Any] = json.loads(load_config(path)._inner.trusted_root.to_json())
    return fields


class Session:
    """An identity that is signed in, with a certificate for some minutes.

    Raises:
        IdentityError: When there is no credential, or sigstore gives no certificate for it.
        SignatureError: When the library is missing.
    """

    def __init__(self) -> None:
        self._config = load_config()
        self._signer: Any = None
        # What names the identity; those that follow it during a long upload name the same.
        self.certificate: Any = None
        self._renew()

    def describe(self) -> str:
        """Return the identity as one line of text."""
        issuer, subjects = read_certificate(self.certificate)
        return f"{', '.join(subjects)} ({issuer})"

    def is_of(self, key: Key) -> bool:
        """Return whether it is of an identity."""
        return isinstance(key, IdentityKey) and key.is_named_by(self.certificate)

    def sign(self, data: bytes) -> Any:
        """Return a signature with its certificate and its log entry: JSON of a sigstore bundle.

        Raises:
            IdentityError: When it could not be logged.
        """
        from sigstore.oidc import ExpiredIdentity
        from sigstore.sign import ExpiredCertificate

        with _explained("sigstore has not logged the signature"):
            try:
                bundle = self._signer.sign_artifact(data)
            except (ExpiredCertificate, ExpiredIdentity):  # a long upload
                self._renew()
                bundle = self._signer.sign_artifact(data)
        return json.loads(bundle.to_json())

    def _renew(self) -> None:
        """Get a credential and a certificate for it."""
        from sigstore.sign import SigningContext

        token = _find_token(self._config)
        with _explained("sigstore gives no certificate"):
            context = SigningContext.from_trust_config(self._config)
            with context.signer(token) as signer:
                self._signer, self.certificate = signer, signer._signing_cert()


class IdentitySigner(Signer):
    """Signs as an identity that is signed in.

    Args:
        key: The identity.
        session: The session, of that identity.
    """

    def __init__(self, key: IdentityKey, session: Session) -> None:
        self._key = key
        self._session = session

    @property
    def public_key(self) -> Key:
        """The identity."""
        return self._key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> Signer:
        """Refuse: an identity has no private key to name."""
        raise NotImplementedError

    def sign(self, payload: bytes) -> Signature:
        """Sign, and verify the signature as clients of the registry will.

        Raises:
            IdentityError: When it could not be logged, or clients would refuse it.
        """
        bundle = self._session.sign(payload)
        signature = Signature(self._key.keyid, hex_signature(bundle) or "", {BUNDLE: bundle})
        try:
            self._key.verify_signature(signature, payload)
        except SignatureRefusedError as error:
            raise IdentityError(
                f"clients would refuse the signature of {format_public_key(self._key)}: {error}",
                hint=f"the registry accepts another sigstore than the one that this machine uses: "
                f"name its configuration in {SIGSTORE_VARIABLE}, or ask the operator to run "
                "`composable registry sigstore`",
            ) from error
        return signature


def _find_token(config: Any) -> Any:
    """Return a credential: given, of the CI job, or of a person at the terminal."""
    from sigstore.oidc import IdentityToken, Issuer, detect_credential

    given = os.environ.get(TOKEN_VARIABLE)
    with _explained(
        "the credential cannot be used",
        hint=f"check {TOKEN_VARIABLE}"
        if given
        else "in GitHub Actions, the job needs `permissions: id-token: write`",
    ):
        raw = given or detect_credential()
        if raw:
            return IdentityToken(raw)
    if not sys.stdin.isatty():
        raise IdentityError(
            "a publisher signs with an identity, and there is neither a credential nor a terminal",
            hint="run this in a terminal to sign in with a browser, in a CI job that may request "
            f"an identity token, or with a token in {TOKEN_VARIABLE}",
        )
    with _explained("signing in failed"):
        return Issuer(config.signing_config.get_oidc_url()).identity_token()


@contextmanager
def _explained(what: str, hint: str = _NOTHING_LOST) -> Iterator[None]:
    """Raise errors of the library, which are of many kinds, as one of ours."""
    try:
        yield
    except ComposableError:
        raise
    except Exception as error:
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            causes.append(str(cause) or type(cause).__name__)
            cause = cause.__cause__
        text = " ".join(": ".join(causes).split())
        raise IdentityError(f"{what}: {text[:400]}", hint=hint) from error
