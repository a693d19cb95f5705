"""Tokens of private registries: from the environment or the keyring, and never written anywhere."""

from __future__ import annotations

import os
from typing import Final

from composable.errors import RegistryError

VARIABLE_PREFIX: Final = "COMPOSABLE_TOKEN_"
KEYRING_SERVICE: Final = "composable"


def variable_of(registry: str) -> str:
    """Return the environment variable that holds the token of a registry of that name."""
    return VARIABLE_PREFIX + registry.upper().replace("-", "_")


def find_token(registry: str, location: str) -> str | None:
    """Return the token of a registry, or None where there is none.

    The environment goes first (`COMPOSABLE_TOKEN_TEAM` for a registry that the project calls
    `team`), then the keyring, if the package of that name is installed: service `composable`, user
    name the location.

    Args:
        registry: Its name in the project.
        location: Its URL.

    Raises:
        RegistryError: For a token that no header can hold.
    """
    token = os.environ.get(variable_of(registry)) or _ask_keyring(location)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise RegistryError(
            f"the token in {variable_of(registry)} or the keyring is not one line of plain text",
            where=location,
        )
    return token


def _ask_keyring(location: str) -> str | None:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return None
    try:
        token: str | None = keyring.get_password(KEYRING_SERVICE, location)
    except KeyringError:
        return None  # locked, or none on this machine: the environment is the other way
    return token
