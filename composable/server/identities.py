"""Trusted publishing: a CI job exchanges its OpenID Connect identity for a short-lived token.

An owner names the issuer, the subject and claims that may publish a package. No secret is stored in
the CI. Each identity token is accepted once, by its `jti`, for as long as it is valid.

References:
    OpenID Connect Core 1.0, section 3.1.3.7; RFC 7519.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import threading
import time
import urllib.parse
import urllib.request
from typing import Any, Final, cast

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, KeySetSerialization
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from composable.server import audit
from composable.server.accounts import Caller, create_token
from composable.server.database import Database, now
from composable.server.refusal import RefusedError, missing
from composable.server.releases import find_owned
from composable.server.settings import Settings
from composable.server.tables import Publisher, SpentIdentity

ALGORITHMS: Final = ["RS256", "ES256", "EdDSA"]
MAX_IDENTITY_BYTES: Final = 16 << 10
MAX_KEYS_BYTES: Final = 1 << 20
TOKEN_HOURS: Final = 0.25
LEEWAY_SECONDS: Final = 60
# An issuer that publishes new keys is asked again, but not more often than this.
KEYS_SECONDS: Final = 300.0


class Identities:
    """Verifies identity tokens of the issuers that the settings name.

    Args:
        settings: The issuers, and the audience.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys: dict[str, tuple[float, KeySet]] = {}
        self._lock = threading.Lock()

    def exchange(self, database: Database, identity: str, package: str) -> str:
        """Return a token to publish a package, for an identity that may.

        Args:
            database: The database.
            identity: The identity token, a signed JWT.
            package: The package to publish.

        Raises:
            RefusedError: 401 for an identity token that is not valid, or was used before; 403
                when it is not that of a trusted publisher of the package.
        """
        claims = self._verify(identity)
        try:
            with database.write() as session:
                session.execute(delete(SpentIdentity).where(SpentIdentity.expires < now()))
                until = time.gmtime(claims["exp"] + LEEWAY_SECONDS)
                session.add(
                    SpentIdentity(
                        issuer=claims["iss"],
                        jti=claims["jti"],
                        expires=time.strftime("%Y-%m-%dT%H:%M:%SZ", until),
                    )
                )
                session.flush()
                publisher = _find_publisher(session, claims, package)
                _, token = create_token(
                    session,
                    publisher.account,
                    ["publish", "read"],
                    label=f"{claims['iss']} {claims['sub']}",
                    packages=[package],
                    hours=TOKEN_HOURS,
                    by=f"oidc:{claims['sub'][:200]}",
                )
        except IntegrityError as error:
            raise RefusedError(401, "the identity token was used before", where="jti") from error
        return token

    def _verify(self, identity: str) -> dict[str, Any]:
        if len(identity) > MAX_IDENTITY_BYTES:
            raise RefusedError(401, "the identity token is too long", where="identity")
        issuer = _read_issuer(identity)
        if issuer not in self._settings.issuers:
            raise RefusedError(401, f"{issuer[:200]!r} is not a trusted issuer", where="iss")
        registry = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": self._settings.audience},
            exp={"essential": True},
            sub={"essential": True},
            jti={"essential": True},
        )
        try:
            try:
                token = jwt.decode(identity, self._find_keys(issuer), algorithms=ALGORITHMS)
            except (JoseError, ValueError):
                keys = self._find_keys(issuer, is_new=True)  # it may have changed its keys
                token = jwt.decode(identity, keys, algorithms=ALGORITHMS)
            registry.validate(token.claims)
        except (JoseError, ValueError) as error:
            raise RefusedError(401, f"not a valid identity token: {error}"[:300]) from error
        claims = dict(token.claims)
        texts = (claims["jti"], claims["sub"])
        if not all(isinstance(text, str) and 0 < len(text) <= 255 for text in texts):
            raise RefusedError(401, "expected texts of up to 255 characters", where="jti, sub")
        return claims

    def _find_keys(self, issuer: str, *, is_new: bool = False) -> KeySet:
        """Return an issuer's public keys, from its discovery document."""
        with self._lock:
            at, keys = self._keys.get(issuer, (float("-inf"), None))
            if (
                keys is None
                or (is_new and time.monotonic() - at > 1.0)
                or (time.monotonic() - at > KEYS_SECONDS)
            ):
                found = _fetch(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
                keys = KeySet.import_key_set(
                    cast(KeySetSerialization, _fetch(str(found.get("jwks_uri", ""))))
                )
                self._keys[issuer] = (time.monotonic(), keys)
            return keys


def add_publisher(
    database: Database,
    caller: Caller,
    package_name: str,
    issuer: str,
    subject: str,
    claims: dict[str, Any],
) -> int:
    """Trust a CI identity to publish a package, in the name of the caller.

    Args:
        database: The database.
        caller: An owner.
        package_name: The package.
        issuer: The issuer.
        subject: The subject; `*` in it stands for any text.
        claims: Claims that the identity must have, by name.

    Returns:
        The id of the trusted publisher.

    Raises:
        RefusedError: When the caller may not, or the subject would match anybody.
    """
    if not subject.strip("*?[]") or len(subject) > 255 or len(json.dumps(claims)) > 4000:
        raise RefusedError(422, "expected a subject of at most 255 characters", where="subject")
    with database.write() as session:
        package = find_owned(session, caller, package_name, "account")
        publisher = Publisher(
            package_id=package.id,
            account_id=caller.require("account"),
            issuer=issuer,
            subject=subject,
            claims=claims,
        )
        session.add(publisher)
        session.flush()
        detail = {"issuer": issuer, "subject": subject, "claims": claims}
        audit.record(session, caller.name, "publisher.add", package_name, detail)
        return publisher.id


def remove_publisher(
    database: Database, caller: Caller, package_name: str, publisher_id: int
) -> None:
    """Trust a CI identity no longer.

    Raises:
        RefusedError: When the caller may not, or there is no such trusted publisher.
    """
    with database.write() as session:
        package = find_owned(session, caller, package_name, "account")
        publisher = session.get(Publisher, publisher_id)
        if publisher is None or publisher.package_id != package.id:
            raise missing("such trusted publisher")
        session.delete(publisher)
        detail = {"publisher": publisher_id}
        audit.record(session, caller.name, "publisher.remove", package_name, detail)


def _find_publisher(session: Session, claims: dict[str, Any], package: str) -> Publisher:
    for publisher in session.scalars(select(Publisher).where(Publisher.issuer == claims["iss"])):
        has_claims = all(claims.get(key) == value for key, value in publisher.claims.items())
        is_subject = fnmatch.fnmatchcase(claims["sub"], publisher.subject)
        if publisher.package.name == package and is_subject and has_claims:
            return publisher
    raise RefusedError(
        403,
        f"{claims['sub'][:200]!r} is not a trusted publisher of {package[:64]!r}",
        hint="an owner adds it with PUT /api/v1/packages/NAME/publishers",
    )


def _read_issuer(identity: str) -> str:
    """Return the issuer that a token states, not verified."""
    try:
        payload = identity.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return str(claims["iss"])
    except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(401, "not a signed identity token", where="identity") from error


def _fetch(url: str) -> dict[str, Any]:
    parts = urllib.parse.urlsplit(url)
    is_local = parts.hostname in ("127.0.0.1", "localhost")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_local):
        raise RefusedError(401, "the issuer's keys are not at an https URL", where="jwks_uri")
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            data = json.loads(response.read(MAX_KEYS_BYTES))
    except (OSError, ValueError) as error:
        raise RefusedError(
            503, f"the issuer's keys cannot be read: {error}"[:300], where=url[:200]
        ) from error
    if not isinstance(data, dict):
        raise RefusedError(503, "the issuer's keys cannot be read", where=url[:200])
    return data
