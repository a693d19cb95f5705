"""Opens registries by their location: a folder, an export, a web server, a bucket or others'."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import RegistryError
from composable.files.blobs import default_store
from composable.interface.digest import digest_bytes
from composable.packaging.registry.registry import ROOT_FILE, Registry
from composable.packaging.registry.release import Signer
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.registry.storage import Folder, Storage
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.packaging.registry.inbox import Inbox

# A publisher has no project whose name of the registry could be that of the token.
PUBLISH_NAME: Final = "publish"
HUB: Final = "hf://"
# Repositories of releases and of nothing else.
_WITHOUT_INBOX: Final = ("oci://", HUB)


def open_registry(
    location: str | Path,
    base: Path | None = None,
    *,
    name: str = "",
    is_offline: bool = False,
    must_be_signed: bool = False,
    max_stale: datetime.timedelta = datetime.timedelta(),
) -> Registry:
    """Open a registry for reading.

    The documents of remote registries are cached in the store.

    Args:
        location: A folder, absolute or relative to `base`; an export in one file; or a URL with
            `file:`, `http:`, `https:`, of a bucket with `s3:`, `gs:` or `az:`, of a repository in
            an OCI registry with `oci:`, or of one on the Hugging Face Hub with `hf:`.
        base: Directory that relative folders start from; by default the working directory.
        name: Its name in the project, under which its token is looked up.
        is_offline: Whether to read remote registries from the cache alone.
        must_be_signed: Whether an unsigned registry is refused.
        max_stale: How long after their end the signatures of a signed registry are accepted.

    Returns:
        The registry. Its existence is not checked before the first read.

    Raises:
        RegistryError: When the kind of location is not supported.

    Example:
        >>> open_registry("no-such-folder").exists
        False
    """
    files = storage = _open_storage(location, base or Path(), name)
    is_cached = storage.is_remote
    if is_cached:
        from composable.packaging.registry.cache import CachedStorage

        storage = CachedStorage(files, default_store() / "documents", is_offline=is_offline)
    settings = SignatureSettings(
        state=signatures_folder(files),
        is_required=must_be_signed,
        max_stale=max_stale,
        is_offline=is_offline and is_cached,
    )
    return Registry(storage, files=files, signatures=settings)


def open_for_publishing(location: str | Path, *, keys: Path | None = None) -> Registry:
    """Open a registry for publishing.

    A server gets the token in `COMPOSABLE_TOKEN_PUBLISH`, if `COMPOSABLE_ORIGIN_PUBLISH` is its
    origin, or the one in the keyring.

    Args:
        location: A folder, the URL of a folder, a bucket or a repository in an OCI registry or on
            the Hugging Face Hub, or that of a server which `composable registry serve` runs.
        keys: Folder of the keys for a signed registry; by default that of the user.

    Returns:
        The registry. In a folder or a bucket, it is created by the first publication.

    Raises:
        RegistryError: When the kind of location is not supported.

    Example:
        >>> open_for_publishing("registry").location
        'registry'
    """
    storage = _open_storage(location, Path(), PUBLISH_NAME)
    if storage.is_remote and not hasattr(storage, "create"):
        from composable.packaging.registry.credentials import find_token
        from composable.packaging.registry.http import WebStorage
        from composable.packaging.registry.served import ServedRegistry, ServedStorage

        if isinstance(storage, WebStorage):
            server = ServedStorage(str(location), find_token(PUBLISH_NAME, str(location)))
            settings = SignatureSettings(state=signatures_folder(server), keys=keys)
            return ServedRegistry(server, signatures=settings)
    settings = SignatureSettings(state=signatures_folder(storage), keys=keys)
    if str(location).startswith(HUB):
        from composable.packaging.registry.hub import HubRegistry, HubStorage

        if isinstance(storage, HubStorage):
            return HubRegistry(storage, signatures=settings)
    registry = Registry(storage, signatures=settings)
    registry.writable_storage()
    return registry


def open_inbox(location: str | Path, *, keys: Path | None = None) -> Inbox:
    """Open the inbox of a registry: proposals to change its experts.

    Args:
        location: A folder or the URL of one, of a bucket, or of a server.
        keys: Folder of the keys to sign with; by default that of the user.

    Returns:
        The inbox.

    Raises:
        RegistryError: When the registry can have none.
    """
    from composable.packaging.registry.inbox import Inbox
    from composable.packaging.trust.keyring import Keyring

    if str(location).startswith(_WITHOUT_INBOX):
        raise RegistryError(
            "has no inbox",
            where=str(location),
            hint="propose to a folder, a bucket or a server; `composable registry mirror` copies "
            "to this registry from there",
        )
    registry = open_for_publishing(location, keys=keys)
    if registry.storage.is_remote:
        from composable.packaging.registry.served import ServedRegistry
        from composable.packaging.registry.served_inbox import ServedInbox

        if isinstance(registry, ServedRegistry):
            return ServedInbox(registry, Keyring(keys))
    return Inbox(registry, Keyring(keys))


def verify_kept_statement(
    location: str, base: Path, name: str, version: Version, digests: Mapping[str, str]
) -> Signer | None:
    """Verify what this machine keeps of a publisher's statement, without reading the registry.

    Args:
        location: The registry.
        base: Directory that relative folders start from.
        name: The package.
        version: The release.
        digests: The digest of every file of it, by name.

    Returns:
        Who signed it; None if this machine has no keys for the registry.

    Raises:
        SignatureError: When the statement is missing, not signed by the publisher, or about other
            content; or when the publisher's keys were revoked.
    """
    storage = _open_storage(location, base, "")
    settings = SignatureSettings(state=signatures_folder(storage), is_offline=True)
    if not (settings.state / ROOT_FILE).is_file():
        return None
    signatures = Registry(storage, signatures=settings).open_signatures()
    return signatures.verify_kept(name, version, digests)


def signatures_folder(storage: Storage) -> Path:
    """Return the folder of this machine for the pinned root keys of a registry.

    A folder has one by its absolute path, so that every way to name it finds the same keys.
    """
    place = unpin(storage.location)
    if isinstance(storage, Folder):
        place = str(storage.root.absolute().resolve())
    return default_store() / "trust" / digest_bytes(place.encode())[7:39]


def forget_keys(location: str | Path) -> None:
    """Forget the pinned root keys of a registry, and what was verified with them.

    Args:
        location: As for `open_registry`.
    """
    folder = signatures_folder(_open_storage(location, Path(), ""))
    shutil.rmtree(folder, ignore_errors=True)


def pin(location: str, commit: str | None) -> str:
    """Return a location that names the commit that was read, if it is on the Hub and names none.

    Example:
        >>> pin("hf://team/experts", "0" * 40)[:20], pin("../registry", None)
        ('hf://team/experts@00', '../registry')
    """
    is_open = location.startswith(HUB) and "@" not in location
    return f"{location}@{commit}" if is_open and commit else location


def unpin(location: str) -> str:
    """Return a location on the Hub without its commit, and any other as it is."""
    return location.partition("@")[0] if location.startswith(HUB) else location


def _open_storage(location: str | Path, base: Path, name: str) -> Storage:
    scheme, found, rest = str(location).partition("://")
    if isinstance(location, Path) or not found or scheme == "file":
        path = base / Path(rest if found and scheme == "file" else location).expanduser()
        if path.suffix == ".tar" and path.is_file():
            from composable.packaging.registry.tar import TarFile

            return TarFile(path)
        return Folder(path)
    if scheme in ("http", "https"):
        from composable.packaging.registry.credentials import find_token
        from composable.packaging.registry.http import WebStorage

        return WebStorage(location, find_token(name, location))
    if scheme == "oci":
        from composable.packaging.registry.credentials import find_token
        from composable.packaging.registry.oci import OciStorage

        return OciStorage(location, find_token(name, location))
    if scheme == "hf":
        from composable.packaging.registry.credentials import find_token
        from composable.packaging.registry.hub import HubStorage

        return HubStorage(location, find_token(name, unpin(location)))
    from composable.packaging.registry.bucket import SCHEMES, BucketStorage

    if scheme in SCHEMES:
        return BucketStorage(location)
    raise RegistryError(
        f"{scheme!r} registries are not supported",
        where=location,
        hint="expected a folder, or a URL that starts with https://, s3://, gs://, az://, oci:// "
        "or hf://",
    )
