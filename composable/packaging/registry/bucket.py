"""A registry's files in an object store: S3, Google Cloud Storage or Azure.

Writes are conditional where the order of two publishers matters: a record or a claim on a name is
created only where there is none, and an index replaces only the state that it was made from.
Credentials are the platform's own (environment, profile, instance role); none is ours to keep.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from composable.errors import RegistryError, UnreachableError
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.remote import Answer, DeniedError, RemoteStorage
from composable.packaging.registry.storage import Document, ReadFrom, read_verified
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from obstore import GetResult, UpdateVersion
    from obstore.store import ObjectStore, RetryConfig

MAX_RETRIES: Final = 4
RETRY_TIME: Final = datetime.timedelta(seconds=60)
PIECE_BYTES: Final = 1 << 16
SCHEMES: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")


class BucketStorage(RemoteStorage):
    """A bucket, or a folder in one. It can be published to.

    Args:
        url: For example `s3://bucket/registry`.
        budget: Limits of waiting; by default those of the command, or else new ones.

    Raises:
        RegistryError: When obstore is not installed, or the URL is not that of a bucket.
    """

    def __init__(self, url: str, budget: TimeBudget | None = None) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise RegistryError(
                "object stores need the package obstore",
                where=url,
                hint="pip install 'composable[cloud]'",
            ) from error
        super().__init__(url, budget)
        # `RemoteStorage` retries reads; the library retries writes and the parts of uploads.
        once: RetryConfig = {"max_retries": 0, "retry_timeout": RETRY_TIME}
        again: RetryConfig = {"max_retries": MAX_RETRIES, "retry_timeout": RETRY_TIME}
        try:
            self._reading: ObjectStore = from_url(self._url, retry_config=once)
            self._store: ObjectStore = from_url(self._url, retry_config=again)
        except (BaseError, ValueError) as error:
            raise RegistryError(
                f"cannot be opened: {_shorten_error(error)}", where=self._url
            ) from error

    def _open_document(self, path: str, tag: str | None) -> Answer | None:
        import obstore
        from obstore.exceptions import NotModifiedError

        options: Any = {}
        if tag is not None:
            options["if_none_match"] = tag.split("\n")[0]
        with _translate_errors(self._at(path)):
            try:
                found = obstore.get(self._reading, path, options=options)
            except NotModifiedError:
                return Answer(iter(()), tag, is_unchanged=True)
            except FileNotFoundError:
                return None
        return Answer(self._pieces(found, path), _to_tag(found.meta))

    def _open_file(self, path: str, start: int) -> Answer | None:
        import obstore

        with _translate_errors(self._at(path)):
            try:
                size = obstore.head(self._reading, path)["size"] if start else None
                if size is not None and start >= size:
                    return Answer(iter(()))
                options: Any = {"range": {"offset": start}} if start else {}
                found = obstore.get(self._reading, path, options=options)
            except FileNotFoundError:
                return None
        return Answer(self._pieces(found, path))

    def _pieces(self, found: GetResult, path: str) -> Iterator[bytes]:
        with _translate_errors(self._at(path)):
            for piece in found.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""
        import obstore

        def ask() -> list[str]:
            with _translate_errors(self._at(folder)):
                found = obstore.list_with_delimiter(self._store, f"{folder}/")
                return sorted(entry["path"].rpartition("/")[2] for entry in found["objects"])

        return self._call(folder, ask)

    def files_under(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder and its folders, sorted."""
        import obstore

        def ask() -> list[str]:
            with _translate_errors(self._at(folder)):
                pages = obstore.list(self._store, f"{folder}/")
                return sorted(entry["path"] for page in pages for entry in page)

        return self._call(folder, ask)

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; of concurrent calls exactly one succeeds."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def ask() -> bool:
            with _translate_errors(self._at(path)):
                try:
                    obstore.put(self._store, path, data, mode="create")
                except (AlreadyExistsError, PreconditionError):
                    return False
                return True

        return self._call(path, ask)

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if it has not changed since it was read as `seen`."""
        import obstore
        from obstore.exceptions import PreconditionError

        if seen is None or seen.tag is None:
            return self.create(path, data)
        version = _to_version(seen.tag)

        def ask() -> bool:
            with _translate_errors(self._at(path)):
                try:
                    obstore.put(self._store, path, data, mode=version)
                except (PreconditionError, FileNotFoundError):
                    return False
                return True

        return self._call(path, ask)

    def upload(
        self, path: str, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Upload a blob unless it exists; it becomes visible when it is complete."""
        import obstore
        from obstore.exceptions import PermissionDeniedError

        with _translate_errors(self._at(path)):
            with contextlib.suppress(FileNotFoundError, PermissionDeniedError):
                if obstore.head(self._store, path)["size"] == file.size:
                    return
            obstore.put(self._store, path, read_verified(source, file, progress))

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        import obstore

        def ask() -> None:
            with _translate_errors(self._at(path)):
                obstore.delete(self._store, path)

        self._call(path, ask)

    def settle(self, path: str) -> None:
        """Do nothing: what can be read from a bucket is durable."""


@contextlib.contextmanager
def _translate_errors(where: str) -> Iterator[None]:
    """Raise our own errors instead of those of the client library."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        is_denied = isinstance(error, exceptions.PermissionDeniedError)
        raise (DeniedError if is_denied else RegistryError)(
            "permission denied with the current credentials",
            where=where,
            hint="set the object store's credentials, for example AWS_PROFILE; without permission "
            "to list the bucket, missing files are denied as well",
        ) from error
    except exceptions.BaseError as error:
        raise UnreachableError(
            f"cannot be reached, or the request was refused: {_shorten_error(error)}", where=where
        ) from error


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
