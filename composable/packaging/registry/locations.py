"""Opens registries by their location: a folder, an export, a URL or a bucket."""

from __future__ import annotations

from pathlib import Path

from composable.errors import RegistryError
from composable.files.blobs import default_store
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.storage import Folder, Storage


def open_registry(
    location: str | Path, base: Path | None = None, *, name: str = "", is_offline: bool = False
) -> Registry:
    """Open a registry for reading.

    The documents of remote registries are cached in the store.

    Args:
        location: A folder, absolute or relative to `base`; an export in one file; or a URL with
            `file:`, `http:`, `https:`, or of a bucket with `s3:`, `gs:` or `az:`.
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
    """Open a registry in a folder or a bucket for publishing.

    Args:
        location: A folder, or the URL of a folder or a bucket.

    Returns:
        The registry. It is created by the first publication.

    Raises:
        RegistryError: When the location is a web server, or its kind is not supported.

    Example:
        >>> open_for_publishing("registry").location
        'registry'
    """
    registry = Registry(_open_storage(location, Path(), ""))
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
    from composable.packaging.registry.bucket import SCHEMES, BucketStorage

    if scheme in SCHEMES:
        return BucketStorage(location)
    raise RegistryError(
        f"{scheme!r} registries are not supported",
        where=location,
        hint="expected a folder, or a URL that starts with https://, s3://, gs:// or az://",
    )
