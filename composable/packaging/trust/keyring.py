"""What this machine can sign with: the key files of a folder, and an identity that is signed in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from securesystemslib.signer import CryptoSigner, Key

from composable.errors import IdentityError, PackagingError
from composable.packaging.trust.identities import IdentityKey
from composable.packaging.trust.keys import SUFFIX, KeyFile, default_keys, format_public_key
from composable.packaging.trust.sign_in import IdentitySigner, Session


class Keyring:
    """The key files of a folder, and the identity of whoever signed in.

    Args:
        folder: The folder; by default that of the user. It need not exist.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_keys()
        self._signers: dict[Path, CryptoSigner] = {}
        self._session: Session | None = None

    def files(self) -> list[KeyFile]:
        """Return the keys of the folder, by name; files that are no key files are skipped."""
        found = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else ():
            with contextlib.suppress(PackagingError):
                found.append(KeyFile.read(path))
        return found

    def find(self, keys: Iterable[str]) -> list[KeyFile]:
        """Return the key files whose public key has one of these key identifiers."""
        wanted = set(keys)
        return [file for file in self.files() if file.public.keyid in wanted]

    def unlock(self, file: KeyFile) -> CryptoSigner:
        """Return the signer of a key file, which is decrypted once."""
        if file.path not in self._signers:
            self._signers[file.path] = file.unlock()
        return self._signers[file.path]

    def open_session(self) -> Session:
        """Return the identity that is signed in; sign in unless one is.

        Raises:
            IdentityError: When there is no credential, or sigstore gives no certificate for it.
            SignatureError: When the library is missing.
        """
        self._session = self._session or Session()
        return self._session

    def sign_in(self, identities: Iterable[IdentityKey], what: str) -> IdentitySigner:
        """Return the signer of one of these identities.

        Args:
            identities: Those that may sign.
            what: For what, for errors.

        Raises:
            IdentityError: When none of them could be signed in.
            SignatureError: When the library is missing.
        """
        identities, session = list(identities), self.open_session()
        for key in identities:
            if session.is_of(key):
                return IdentitySigner(key, session)
        expected = " or ".join(format_public_key(key) for key in identities)
        raise IdentityError(
            f"signed in as {session.describe()}, which may not sign for {what}",
            hint=f"sign in as {expected}, or ask the operator to grant this identity",
        )

    def is_signed_in_as(self, key: Key) -> bool:
        """Return whether somebody has signed in with an identity, and it is this one."""
        return self._session is not None and self._session.is_of(key)
