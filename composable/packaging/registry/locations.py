"""From a location, as a user writes it, to a registry."""

from __future__ import annotations

from pathlib import Path

from composable.errors import RegistryError
from composable.files.blobs import default_store
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.storage import Folder, Storage


def open_registry(
    location: str | Path, base: Path | None = None, *, name: str = "", is_offline: bool = False
) -> Registry:
    """Return the registry at a location, to read from.

    What a remote one answers is kept in the store, and asked for again only if it changed.

    Args:
        location: A folder, absolute or relative to `base`, or an export in one file; a `file:`,
            `http:` or `https:` URL; or one of a bucket: `s3:`, `gs:` or `az:`.
        base: Directory that relative folders are counted from; by default the working directory.
        name: What the project calls it; its token is looked for under that name.
        is_offline: Whether to answer for a remote one from what is kept alone.

    Raises:
        RegistryError: For a kind of location that this release does not know.
    """
    storage = _open_storage(location, base or Path(), name)
    if storage.is_remote:
        from composable.packaging.registry.cache import CachedStorage

        storage = CachedStorage(storage, default_store() / "documents", is_offline=is_offline)
    return Registry(storage)


def open_for_publishing(location: str | Path) -> Registry:
    """Return the registry at a location, to publish to; a folder or a bucket.

    Raises:
        RegistryError: For a web server, or a kind of location that this release does not know.
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
        hint="give a folder, or a URL that begins with https://, s3://, gs:// or az://",
    )
