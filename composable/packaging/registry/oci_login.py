"""How OCI registries ask who is there: they name a server of tokens in a challenge.

A token is asked for one repository and for as little as is needed, without credentials where there
are none. Credentials go to the registry, or to a server of tokens of the same domain.

References:
    Distribution, "Token Authentication Specification"; RFC 6750, RFC 7235.
"""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any, Final

from composable.errors import RegistryError
from composable.packaging.registry.credentials import origin_of

# The name that goes with a token that has none.
_NO_NAME: Final = "token"
_SCHEME: Final = re.compile(r"\s*(basic|bearer)\b\s*", re.IGNORECASE)
_PARAMETER: Final = re.compile(r'([a-z_]+)="([^"]*)"\s*,?\s*', re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """What a registry asks for.

    Args:
        is_basic: Whether it wants a name and a password with every request.
        realm: URL of the server of tokens; empty if there is none.
        service: What that server calls the registry.
    """

    is_basic: bool
    realm: str = ""
    service: str = ""


def parse_challenge(header: str) -> Challenge | None:
    """Parse a `WWW-Authenticate` header; None for a kind that is not supported.

    Example:
        >>> parse_challenge('Bearer realm="https://example.org/token",service="example.org"')
        Challenge(is_basic=False, realm='https://example.org/token', service='example.org')
        >>> parse_challenge("Negotiate")
    """
    scheme = _SCHEME.match(header)
    if scheme is None:
        return None
    fields = {key.lower(): value for key, value in _PARAMETER.findall(header[scheme.end() :])}
    if scheme[1].lower() == "basic":
        return Challenge(is_basic=True)
    return Challenge(
        is_basic=False, realm=fields.get("realm", ""), service=fields.get("service", "")
    )


def format_basic(token: str) -> str:
    """Return the header for `NAME:PASSWORD`, or for a token without a name."""
    pair = token if ":" in token else f"{_NO_NAME}:{token}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def make_token_url(challenge: Challenge, repository: str, actions: str) -> str:
    """Return the URL that answers with a token for some actions on one repository."""
    fields = {"service": challenge.service, "scope": f"repository:{repository}:{actions}"}
    query = urllib.parse.urlencode({key: value for key, value in fields.items() if value})
    return f"{challenge.realm}{'&' if '?' in challenge.realm else '?'}{query}"


def check_realm(challenge: Challenge, url: str, where: str, *, has_token: bool) -> None:
    """Refuse a server of tokens that must not see what is sent to it.

    Args:
        challenge: The challenge.
        url: The URL of the registry.
        where: The registry, for errors.
        has_token: Whether credentials would be sent.

    Raises:
        RegistryError: When it is unencrypted and not on this machine, or of another domain than the
            registry.
    """
    origin, own = origin_of(challenge.realm), origin_of(url)
    if origin is None or (own or "").startswith("https") > origin.startswith("https"):
        raise RegistryError(
            f"asks to get a token from {challenge.realm[:200]!r}, which is not encrypted or not a "
            "URL",
            where=where,
            hint="the registry is configured wrongly; nothing was sent",
        )
    if has_token and not _is_same_domain(_host_of(challenge.realm), _host_of(url)):
        raise RegistryError(
            f"asks to send the credentials to another server, {origin}",
            where=where,
            hint="nothing was sent; only servers of the registry's own domain get credentials",
        )


def read_token(data: bytes, where: str) -> str:
    """Return the token in the answer of a server of tokens.

    Raises:
        RegistryError: When there is none.
    """
    try:
        fields: Any = json.loads(data)
        token = fields.get("token") or fields["access_token"]
        if not (isinstance(token, str) and token.isascii() and token.isprintable()):
            raise ValueError("not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RegistryError("the server of tokens sent none", where=where) from error
    return token


def _host_of(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or ""


def _is_same_domain(realm: str, registry: str) -> bool:
    """Return whether the hosts are equal, or one is the other's parent, or they have one parent.

    Example:
        >>> _is_same_domain("auth.docker.io", "registry-1.docker.io")
        True
        >>> _is_same_domain("gitlab.com", "registry.gitlab.com")
        True
        >>> _is_same_domain("example.com", "ghcr.io")
        False
    """
    if realm == registry:
        return True
    parent = registry.partition(".")[2]
    return "." in parent and (realm == parent or realm.endswith(f".{parent}"))
