"""Tokens of private registries, from the environment or the keyring. They are never written.

A token belongs to a server, not to a name: the names of registries are those of the project file,
and a cloned project can give any server any name.
"""

from __future__ import annotations

import os
import urllib.parse
from typing import Final

from composable.errors import RegistryError

TOKEN_PREFIX: Final = "COMPOSABLE_TOKEN_"
ORIGIN_PREFIX: Final = "COMPOSABLE_ORIGIN_"
KEYRING_SERVICE: Final = "composable"
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
# Another Hub than the public one.
HUB_VARIABLE: Final = "HF_ENDPOINT"
_HUB: Final = "https://huggingface.co"
_PORTS: Final = {"http": 80, "https": 443}


def variable_of(registry: str, prefix: str = TOKEN_PREFIX) -> str:
    """Return the environment variable that holds the token, or the origin, of a registry.

    Example:
        >>> variable_of("our-team")
        'COMPOSABLE_TOKEN_OUR_TEAM'
    """
    return prefix + registry.upper().replace("-", "_")


def find_token(registry: str, location: str) -> str | None:
    """Return the token of a registry, or None where there is none for its server.

    The environment comes first: for a registry that the project calls `team`, the token in
    `COMPOSABLE_TOKEN_TEAM` if `COMPOSABLE_ORIGIN_TEAM` is the origin of the location. Then comes
    the keyring, if the package `keyring` is installed. The keyring's service is `composable` and
    the user name is the location.

    Args:
        registry: Its name in the project; empty for one that has none.
        location: Its URL.

    Raises:
        RegistryError: When the token contains characters that an HTTP header cannot hold, or when
            the environment does not say which server it is for.
    """
    token = _read_environment(registry, location) or _read_keyring(location)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise RegistryError(
            f"the token in {variable_of(registry)} or the keyring is not one word of ASCII text",
            where=location,
        )
    return token


def web_url(location: str) -> str:
    """Return the URL of the server that an `oci://` or `hf://` location names, or a URL as it is.

    Example:
        >>> web_url("oci://ghcr.io/team/experts"), web_url("oci://localhost:5000/experts")
        ('https://ghcr.io/team/experts', 'http://localhost:5000/experts')
    """
    scheme, _, rest = location.partition("://")
    if scheme == "hf":
        return f"{os.environ.get(HUB_VARIABLE) or _HUB}/{rest}"
    if scheme != "oci":
        return location
    try:
        host = urllib.parse.urlsplit(location).hostname
    except ValueError:
        host = None
    return f"{'http' if host in LOOPBACK else 'https'}://{rest}"


def origin_of(url: str) -> str | None:
    """Return the origin of a URL: scheme, host and port; None for what has none.

    References:
        RFC 6454, section 4.

    Example:
        >>> origin_of("https://Example.org:443/registry")
        'https://example.org'
        >>> origin_of("example.org")
    """
    try:
        parts = urllib.parse.urlsplit(web_url(url))
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not host:
        return None
    shown = f"[{host}]" if ":" in host else host
    is_default = port is None or port == _PORTS[parts.scheme]
    return f"{parts.scheme}://{shown}" + ("" if is_default else f":{port}")


def _read_environment(registry: str, location: str) -> str | None:
    """Return the token that the environment has for this name and this server, if any."""
    token = os.environ.get(variable_of(registry)) if registry else None
    if not token:
        return None
    variable = variable_of(registry, ORIGIN_PREFIX)
    stated = os.environ.get(variable, "").strip()
    if not stated:
        raise RegistryError(
            f"{variable_of(registry)} is set, but not the server that the token is for",
            where=location,
            hint=f"if it is for this server, set {variable}={origin_of(location)}; "
            f"if not, unset {variable_of(registry)}",
        )
    origin = origin_of(stated)
    if origin is None or urllib.parse.urlsplit(stated).path not in ("", "/") or "@" in stated:
        raise RegistryError(
            f"{stated.rpartition('@')[2][:200]!r} is not the origin of a server",
            where=variable,
            hint=f"write scheme and host, such as https://example.org; here {origin_of(location)}",
        )
    return token if origin == origin_of(location) else None


def _read_keyring(location: str) -> str | None:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return None
    try:
        token: str | None = keyring.get_password(KEYRING_SERVICE, location)
    except KeyringError:
        return None  # locked, or not available on this machine
    return token
