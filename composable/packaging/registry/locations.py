"""Opens registries by their location: a folder, an export, a web server, a bucket or others'."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from composable.errors import RegistryError
from composable.files.blobs import default_store
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.storage import Folder, Storage

# A publisher has no project whose name of the registry could be that of the token.
PUBLISH_NAME: Final = "publish"


def open_registry(
    location: str | Path, base: Path | None = None, *, name: str = "", is_offline: bool = False
) -> Registry:
    """Open a registry for reading.

    The documents of remote registries are cached in the store.

    Args:
        location: A folder, absolute or relative to `base`; an export in one file; or a URL with
            `file:`, `http:`, `https:`, of a bucket with `s3:`, `gs:` or `az:`, or of a repository
            in an OCI registry with `oci:`.
        base: Directory that relative folders start from; by default the working directory.
        name: Its name in the project, under which its token is looked up.
        is_offline: Whether to read remote registries from the cache alone.

    Returns:
        The registry. Its existence is not checked before the first read.

    Raises:
        RegistryError: When the kind of location is not supported.

    Example:
        >>> open_registry("no-such-folder").exists
        False
    """
    storage = _open_storage(location, base or Path(), name)
    if storage.is_remote:
        from composable.packaging.registry.cache import CachedStorage

        storage = CachedStorage(storage, default_store() / "documents", is_offline=is_offline)
    return Registry(storage)


def open_for_publishing(location: str | Path) -> Registry:
    """Open a registry for publishing.

    A server gets the token in `COMPOSABLE_TOKEN_PUBLISH`, if `COMPOSABLE_ORIGIN_PUBLISH` is its
    origin, or the one in the keyring.

    Args:
        location: A folder, the URL of a folder, a bucket or a repository in an OCI registry, or
            that of a server which `composable registry serve` runs.

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
        from composable.packaging.registry.http import WebStorage
        from composable.packaging.registry.served import ServedRegistry

        if isinstance(storage, WebStorage):
            return ServedRegistry(storage)
    registry = Registry(storage)
    registry.writable_storage()
    return registry


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
    from composable.packaging.registry.bucket import SCHEMES, BucketStorage

    if scheme in SCHEMES:
        return BucketStorage(location)
    raise RegistryError(
        f"{scheme!r} registries are not supported",
        where=location,
        hint="expected a folder, or a URL that starts with https://, s3://, gs://, az:// or oci://",
    )
