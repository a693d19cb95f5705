"""Signing keys: ed25519, each in a file that a pass phrase encrypts.

A key file is JSON with the public key, which is read without the pass phrase, and the private key
as encrypted PKCS #8. The public key alone is one line of text, `ed25519:` and 64 hexadecimal
digits, to send to the operator of a registry.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from composable.errors import KeyFileError
from composable.files import atomic
from composable.files.reading import read_bytes
from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging.versions.names import check_package_name

SUFFIX: Final = ".key"
KEYS_VARIABLE: Final = "COMPOSABLE_KEYS"
PASSPHRASE_VARIABLE: Final = "COMPOSABLE_PASSPHRASE"
# Of an identity in the place of a key, as `packaging.trust.identities` reads it.
IDENTITY_TYPE: Final = "sigstore-oidc"
IDENTITY_PREFIX: Final = "sigstore:"
_KIND: Final = "composable-key"
_PREFIX: Final = "ed25519:"
_PUBLIC: Final = re.compile(r"ed25519:[0-9a-f]{64}", re.ASCII)
_MAX_FILE_BYTES: Final = 10_000


def default_keys() -> Path:
    """Return the folder of the user's keys: `$COMPOSABLE_KEYS`, or else `keys` of the settings."""
    named = os.environ.get(KEYS_VARIABLE)
    if named:
        return Path(named).absolute()
    import platformdirs  # late: not needed if the variable is set

    return Path(platformdirs.user_config_dir("composable", appauthor=False)) / "keys"


def parse_public_key(text: str) -> Key:
    """Return the public key that a line of text states.

    Raises:
        KeyFileError: For text of another form.

    Example:
        >>> format_public_key(parse_public_key("ed25519:" + "0" * 64))[:12]
        'ed25519:0000'
    """
    if _PUBLIC.fullmatch(text.strip()) is None:
        raise KeyFileError(
            f"{text.strip()[:80]!r} is not a public key",
            hint="expected ed25519: and 64 hexadecimal digits, as `composable registry key` prints",
        )
    return _make_key(text.strip().removeprefix(_PREFIX))


def format_public_key(key: Key) -> str:
    """Return a public key, or the identity in its place, as one line of text."""
    if key.keytype == IDENTITY_TYPE:
        return f"{IDENTITY_PREFIX}{key.keyval['issuer']}#{key.keyval['identity']}"
    return f"{key.scheme}:{key.keyval['public']}"


def shorten_key(text: str) -> str:
    """Return the start of a public key, or the subject of an identity, for messages.

    Example:
        >>> shorten_key("ed25519:" + "0123456789abcdef" * 4)
        'ed25519:0123456789ab…'
        >>> shorten_key("sigstore:https://accounts.google.com#alice@example.org")
        'alice@example.org'
    """
    return text.partition("#")[2] if text.startswith(IDENTITY_PREFIX) else f"{text[:20]}…"


@dataclass(frozen=True)
class KeyFile:
    """A key in a file, not yet decrypted.

    Args:
        path: The file.
        public: Its public key.
        private: Its private key as PKCS #8 in PEM, encrypted or not.
    """

    path: Path
    public: Key
    private: str

    @property
    def name(self) -> str:
        """The name of the file without its suffix."""
        return self.path.name.removesuffix(SUFFIX)

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """Read a key file.

        Raises:
            KeyFileError: When it is missing or no key file.
        """
        try:
            fields: Any = json.loads(read_bytes(path, _MAX_FILE_BYTES))
            if fields["kind"] != _KIND:
                raise ValueError("another kind of file")
            return cls(path, parse_public_key(fields["public"]), str(fields["private"]))
        except FileNotFoundError as error:
            raise KeyFileError("no such key file", where=str(path)) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise KeyFileError(
                "is not a key file", where=str(path), hint="restore it from a backup"
            ) from error

    def unlock(self) -> CryptoSigner:
        """Return the signer of this key; asks for the pass phrase if it needs one.

        Raises:
            KeyFileError: When the pass phrase is missing or wrong, or the file is damaged.
        """
        is_encrypted = "ENCRYPTED" in self.private
        phrase = read_passphrase(self.path) if is_encrypted else None
        try:
            private = serialization.load_pem_private_key(
                self.private.encode(), phrase.encode() if phrase is not None else None
            )
            if not isinstance(private, Ed25519PrivateKey):
                raise TypeError("another kind of key")
        except (ValueError, TypeError) as error:
            raise KeyFileError(
                "wrong pass phrase, or the file is damaged" if is_encrypted else "is damaged",
                where=str(self.path),
                hint=f"give the pass phrase that it was made with, at the prompt or in "
                f"{PASSPHRASE_VARIABLE}"
                if is_encrypted
                else "restore it from a backup",
            ) from error
        signer = CryptoSigner(private, cast(SSlibKey, self.public))
        return signer


def create_key(folder: Path, name: str, passphrase: str | None) -> KeyFile:
    """Create a key in a file of its own, which only its owner can read.

    Args:
        folder: The folder of keys.
        name: The name of the file without its suffix.
        passphrase: Encrypts the private key; None stores it as it is.

    Raises:
        KeyFileError: When the file exists already: a key is never overwritten.
    """
    private = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    ).decode()
    public = private.public_key().public_bytes_raw().hex()
    fields = {"kind": _KIND, "public": f"{_PREFIX}{public}", "private": pem}
    path = folder / f"{check_package_name(name)}{SUFFIX}"
    if not folder.exists():
        atomic.make_directory(folder)
        folder.chmod(0o700)
    if not atomic.create_bytes(path, canonical_json(fields) + b"\n"):
        raise KeyFileError(
            "already exists",
            where=str(path),
            hint="choose another name, or another folder in COMPOSABLE_KEYS",
        )
    with contextlib.suppress(OSError, NotImplementedError):
        path.chmod(0o600)
    return KeyFile(path, _make_key(public), pem)


def read_passphrase(path: Path) -> str:
    """Return the pass phrase of a key file: from the environment, or else from the terminal.

    Raises:
        KeyFileError: When there is neither.
    """
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given
    if not sys.stdin.isatty():
        raise KeyFileError(
            "needs its pass phrase",
            where=str(path),
            hint=f"set {PASSPHRASE_VARIABLE}, or run this in a terminal",
        )
    import getpass  # late: only a terminal needs it

    return getpass.getpass(f"Pass phrase of {path}: ")


def fingerprint(keys: Iterable[Key]) -> str:
    """Return one short text for a set of keys, to compare by eye or by telephone."""
    digest = digest_bytes("\n".join(sorted(map(format_public_key, keys))).encode())[7:39]
    return "-".join(digest[start : start + 4] for start in range(0, 32, 4))


def _make_key(public: str) -> SSlibKey:
    """Return a public key of securesystemslib; its identifier follows from its content."""
    content = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": public}}
    keyid = digest_bytes(canonical_json(content))[7:]
    return SSlibKey(keyid, "ed25519", "ed25519", {"public": public})
