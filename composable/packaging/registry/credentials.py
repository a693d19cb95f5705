"""Tokens of private registries, from the environment or the keyring. They are never written."""

from __future__ import annotations

import os
from typing import Final

from composable.errors import RegistryError

VARIABLE_PREFIX: Final = "COMPOSABLE_TOKEN_"
KEYRING_SERVICE: Final = "composable"


def variable_of(registry: str) -> str:
    """Return the environment variable for the token of a registry of that name.

    Example:
        >>> variable_of("my-team")
        'COMPOSABLE_TOKEN_MY_TEAM'
    """
    return VARIABLE_PREFIX + registry.upper().replace("-", "_")


def find_token(registry: str, location: str) -> str | None:
    """Return the token of a registry, or None if there is none.

    The environment comes first (`COMPOSABLE_TOKEN_TEAM` for a registry that the project calls
    `team`), then the keyring, if the package `keyring` is installed. The keyring's service is
    `composable` and the user name is the location.

    Args:
        registry: Its name in the project.
        location: Its URL.

    Raises:
        RegistryError: When the token contains characters that an HTTP header cannot hold.
    """
    token = os.environ.get(variable_of(registry)) or _read_keyring(location)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise RegistryError(
            f"the token in {variable_of(registry)} or the keyring is not one word of ASCII text",
            where=location,
        )
    return token


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
