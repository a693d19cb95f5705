"""Registries in object stores: S3, Google Cloud Storage and Azure.

Writes that two publishers may race for are conditional: a record or a claim on a name is created
only if it does not exist, and an index is replaced only if it is still the one that was read.
Credentials are those of the platform (environment, profile, instance role) and are never stored.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from composable.errors import IntegrityError, RegistryError, UnreachableError
from composable.files.atomic import CHUNK
from composable.files.reading import open_file
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

MAX_RETRIES: Final = 4
RETRY_TIME: Final = datetime.timedelta(seconds=60)
SCHEMES: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")


class BucketStorage:
    """A bucket, or a folder in one. It can be published to.

    Args:
        url: For example `s3://bucket/registry`.

    Raises:
        RegistryError: When obstore is not installed, or the URL is not that of a bucket.
    """

    is_remote: Final = True

    def __init__(self, url: str) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise RegistryError(
                "object stores need the package obstore",
                where=url,
                hint="pip install 'composable[cloud]'",
            ) from error
        self._url = url.rstrip("/")
        try:
            self._store: ObjectStore = from_url(
                self._url,
                retry_config={"max_retries": MAX_RETRIES, "retry_timeout": RETRY_TIME},
            )
        except (BaseError, ValueError) as error:
            raise RegistryError(
                f"cannot be opened: {_shorten_error(error)}", where=self._url
            ) from error

    @property
    def location(self) -> str:
        """The URL."""
        return self._url

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document; `known` itself if it is unchanged; None if it does not exist."""
        import obstore
        from obstore.exceptions import NotModifiedError

        options: Any = {}
        if known is not None and known.tag is not None:
            options["if_none_match"] = known.tag.split("\n")[0]
        with _translate_errors(self._at(path)):
            try:
                found = obstore.get(self._store, path, options=options)
            except NotModifiedError:
                return known
            except FileNotFoundError:
                return None
            if found.meta["size"] > MAX_DOCUMENT_BYTES:
                raise RegistryError("is larger than 64 MiB", where=self._at(path))
            return Document(bytes(found.bytes()), _to_tag(found.meta))

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        import obstore

        with _translate_errors(self._at(path)):
            try:
                size = obstore.head(self._store, path)["size"] if start else None
                if size is not None and start >= size:
                    return
                options: Any = {"range": {"offset": start}} if start else {}
                response = obstore.get(self._store, path, options=options)
            except FileNotFoundError as error:
                raise RegistryError("has no such file", where=self._at(path)) from error
            for piece in response.stream(min_chunk_size=CHUNK):
                yield bytes(piece)

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""
        import obstore

        with _translate_errors(self._at(folder)):
            found = obstore.list_with_delimiter(self._store, f"{folder}/")
            return sorted(entry["path"].rpartition("/")[2] for entry in found["objects"])

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; of concurrent calls exactly one succeeds."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with _translate_errors(self._at(path)):
            try:
                obstore.put(self._store, path, data, mode="create")
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if it has not changed since it was read as `seen`."""
        import obstore
        from obstore.exceptions import PreconditionError

        if seen is None or seen.tag is None:
            return self.create(path, data)
        with _translate_errors(self._at(path)):
            try:
                obstore.put(self._store, path, data, mode=_to_version(seen.tag))
            except (PreconditionError, FileNotFoundError):
                return False
            return True

    def upload(
        self, path: str, source: Path, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Upload a blob unless it exists; it becomes visible when it is complete."""
        import obstore

        with _translate_errors(self._at(path)):
            try:
                if obstore.head(self._store, path)["size"] == file.size:
                    return
            except FileNotFoundError:
                pass
            obstore.put(self._store, path, _read_verified(source, file, progress))

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        import obstore

        with _translate_errors(self._at(path)):
            obstore.delete(self._store, path)

    def settle(self, path: str) -> None:
        """Do nothing: what can be read from a bucket is durable."""

    def _at(self, path: str) -> str:
        return f"{self._url}/{path}"


@contextlib.contextmanager
def _translate_errors(where: str) -> Iterator[None]:
    """Raise our own errors instead of those of the client library."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise RegistryError(
            "permission denied with the current credentials",
            where=where,
            hint="set the object store's credentials, for example AWS_PROFILE",
        ) from error
    except exceptions.BaseError as error:
        raise UnreachableError(
            f"cannot be reached, or the request was refused: {_shorten_error(error)}", where=where
        ) from error


def _read_verified(
    source: Path, file: PackageFile, progress: ByteProgress | None
) -> Iterator[bytes]:
    """Yield a file's bytes; raise at its end if their digest differs, which ends the upload."""
    import hashlib

    state, done = hashlib.sha256(), 0
    with open_file(source) as stream:
        while data := stream.read(CHUNK):
            state.update(data)
            done += len(data)
            yield data
            if progress is not None:
                progress(file.name, min(done, file.size), file.size)
    if f"sha256:{state.hexdigest()}" != file.digest:
        raise IntegrityError("changed while it was being published", where=str(source))


def _to_tag(meta: Any) -> str | None:
    """Return what identifies the state of a file: its entity tag and, if there is one, version."""
    if meta["e_tag"] is None:
        return None
    return "\n".join(filter(None, (meta["e_tag"], meta["version"])))


def _to_version(tag: str) -> UpdateVersion:
    e_tag, _, version = tag.partition("\n")
    return {"e_tag": e_tag, "version": version} if version else {"e_tag": e_tag}


def _shorten_error(error: BaseException) -> str:
    """Return the first line of an error message; the rest may quote whole responses."""
    return str(error).split("\n")[0][:300]
