"""Claims of package names: of names that look alike, only the first can be published.

A claim is a file `names/KEY`, whose key is the same for all names that look alike, and which holds
the name. Creating it is atomic, so of two publishers exactly one is first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from composable.errors import RegistryError
from composable.files.strays import warn_about_stray
from composable.packaging.registry.storage import WritableStorage
from composable.packaging.versions.names import confusable_key, is_package_name


def check_name(storage: WritableStorage, name: str) -> None:
    """Refuse a name that looks like the name of another package."""
    key = confusable_key(name)
    owner = read_owner(storage, key)
    if owner in (None, name):
        return
    if storage.names_in(f"records/{owner}"):
        raise RegistryError(
            f"{name!r} looks like {owner!r}, which is already published",
            where=storage.location,
            hint="choose a name that differs in more than look-alike letters or hyphens",
        )
    raise RegistryError(
        f"{name!r} looks like {owner!r}, which is being published, or whose publication was "
        "interrupted",
        where=storage.location,
        hint=f"choose another name; if nobody publishes {owner}, remove names/{key} there",
    )


@contextlib.contextmanager
def claim_name(storage: WritableStorage, name: str) -> Iterator[None]:
    """Reserve a name for the block, which creates a record; release it if the block fails."""
    path = f"names/{confusable_key(name)}"
    is_new = storage.create(path, name.encode())
    if not is_new:
        check_name(storage, name)
        claimed = storage.read(path)
        if claimed is None or claimed.data != name.encode():  # a stray file is replaced
            is_new = storage.replace(path, name.encode(), claimed)
            check_name(storage, name)
    try:
        yield
    except BaseException:
        if is_new and not storage.names_in(f"records/{name}"):
            storage.remove(path)
        raise


def read_owner(storage: WritableStorage, key: str) -> str | None:
    """Return the name that has claimed a key; None if there is none, or for a stray file."""
    claimed = storage.read(f"names/{key}")
    if claimed is None:
        return None
    owner = claimed.data.decode(errors="replace")
    if is_package_name(owner) and confusable_key(owner) == key:
        return owner
    warn_about_stray(key, f"{storage.location}/names", "the claim of a package name")
    return None
