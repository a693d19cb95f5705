"""Registries in a model repository of the Hugging Face Hub: `hf://OWNER/REPOSITORY[@COMMIT]`.

The layout is that of a folder, so the repository can be cloned and served as one. Reads are of one
commit: the one that the location names, or the newest when the registry is opened. Changes are
collected and made by one commit on that one; if somebody else was first, they are made again on
theirs. So a release, its index and the card of the repository appear together or not at all.

Files are sent by `huggingface_hub`, which continues with what the Hub lacks, and read as from any
web server, see `http.py`.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from composable.errors import IntegrityError, RegistryError, UnreachableError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.files.reading import read_bytes
from composable.interface.digest import digest_bytes
from composable.packaging.manifests.manifest import Manifest, PackageFile
from composable.packaging.registry.advisories import Advisory
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.credentials import web_url
from composable.packaging.registry.http import WebStorage, translate_errors
from composable.packaging.registry.hub_card import CARD_FILE, format_card, is_written_here
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.release import PreparedDelta
from composable.packaging.registry.remote import Answer
from composable.packaging.registry.storage import Document, LocalFile, ReadFrom
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    from composable.interface.contract import RouterInterface
    from composable.packaging.registry.signature_settings import SignatureSettings

BRANCH: Final = "main"
MAX_COMMITS: Final = 10
_LOCATION: Final = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([0-9a-f]{40}))?", re.ASCII)
# The Hub keeps larger files outside of git.
_LARGE_BYTES: Final = 10_000_000
T = TypeVar("T")


class HubStorage(WebStorage):
    """A repository of the Hub. It can be published to, unless the location names a commit.

    Args:
        location: `hf://OWNER/REPOSITORY` or `hf://OWNER/REPOSITORY@COMMIT`.
        token: Access token; by default that of `HF_TOKEN` or of `hf auth login`. It is sent to the
            Hub only, which is `https://huggingface.co` or `HF_ENDPOINT`.
        budget: Limits of waiting; by default those of the command, or else new ones.

    Attributes:
        commit: The commit that is read; None before the first read, or without a repository.

    Raises:
        RegistryError: When `huggingface_hub` is not installed, or for another location.
    """

    _token_hint = "set HF_TOKEN, or run `hf auth login`"

    def __init__(
        self, location: str, token: str | None = None, *, budget: TimeBudget | None = None
    ) -> None:
        found = _LOCATION.fullmatch(location)
        if found is None or ".." in location:
            raise RegistryError(
                "is not a repository of the Hub",
                where=location[:200],
                hint="expected hf://OWNER/REPOSITORY, or the same and @ and 40 digits of a commit",
            )
        try:
            from huggingface_hub import HfApi, get_token
        except ImportError as error:
            raise RegistryError(
                "the Hub needs the package huggingface_hub",
                where=location,
                hint="pip install 'composable[hub]'",
            ) from error
        token = token or get_token()
        url = web_url(f"hf://{found[1]}")
        super().__init__(url, token, budget=budget)
        self._url = location
        self._repository = found[1]
        self._home = self._base
        self._is_pinned = found[2] is not None
        self.commit: str | None = found[2]
        self._api: HfApi = HfApi(endpoint=url.removesuffix(f"/{found[1]}"), token=token or False)
        # Path -> what is to be committed; None for a file that is removed.
        self._staged: dict[str, bytes | CommitOperationAdd | None] | None = None
        self._lock = threading.RLock()

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document as it will be, or as it is in the commit that is read."""
        if self._staged is None or path not in self._staged:
            return super().read(path, known)
        data = _content_of(self._staged[path])
        if data is None or (known and known.data == data):
            return known if data is not None else None
        return Document(data, digest_bytes(data))

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from an offset on, also before a small one is committed."""
        if self._staged is None or path not in self._staged:
            yield from super().stream(path, start)
            return
        data = _content_of(self._staged[path])
        if data is None:
            raise RegistryError("is not committed yet", where=self._at(path))
        yield data[start:]

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""
        paths = self._list(folder, is_recursive=False)
        return sorted(p.rpartition("/")[2] for p in paths if p.rpartition("/")[0] == folder)

    def files_under(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder and its folders, sorted."""
        return sorted(self._list(folder, is_recursive=True))

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists."""
        return self.replace(path, data, None)

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if it has not changed since it was read as `seen`."""
        with self._transaction(f"Write {path}") as result:
            now = self.read(path)
            if (now.data if now else None) != (seen.data if seen else None):
                return False
            self._stage(path, data)
        return result[0]

    def upload(
        self, path: str, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Upload a blob unless it exists; the commit makes it visible."""
        with self._transaction(f"Add {path}") as result:
            if not self._exists(path):
                with tempfile.TemporaryDirectory(prefix="composable-") as folder:
                    local = _make_local(source, file, Path(folder), progress)
                    self._stage(path, self._send(path, local, file))
        if not result[0]:
            raise UnreachableError("somebody else changed it meanwhile", where=self._at(path))

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        with self._transaction(f"Remove {path}") as result:
            if self._exists(path):
                self._stage(path, None)
        if not result[0]:
            raise UnreachableError("somebody else changed it meanwhile", where=self._at(path))

    def settle(self, path: str) -> None:
        """Do nothing: what can be read from the Hub is durable."""

    def begin(self) -> None:
        """Begin to collect changes on the newest commit; create the repository if there is none.

        Raises:
            RegistryError: When the location names a commit.
        """
        if self._is_pinned:
            raise RegistryError(
                "is read only: it names a commit",
                where=self.location,
                hint="publish to the location without @ and what follows",
            )
        self.commit, self._staged = None, {}
        if not self._pin():
            self._ask(lambda: self._api.create_repo(self._repository, private=True, exist_ok=True))
            if not self._pin():
                raise RegistryError("the repository cannot be read", where=self.location)

    def finish(self, message: str) -> bool:
        """Commit what was collected, unless there is a newer commit; return whether it was."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        staged, before = self._staged or {}, self.commit
        operations: list[Any] = [
            CommitOperationDelete(path)
            if data is None
            else CommitOperationAdd(path, data)
            if isinstance(data, bytes)
            else data
            for path, data in staged.items()
        ]
        self.drop()
        if not operations:
            return True

        def commit() -> str | None:
            try:
                return self._api.create_commit(
                    self._repository,
                    operations,
                    commit_message=message,
                    revision=BRANCH,
                    parent_commit=before,
                ).oid
            except HfHubHTTPError as error:
                if error.response.status_code in (409, 412):
                    return None
                raise

        made = self._ask(commit)
        self.commit = None
        self._pin()
        return made is not None

    def drop(self) -> None:
        """Forget what was collected and not committed."""
        self._staged = None

    def _stage(self, path: str, data: bytes | CommitOperationAdd | None) -> None:
        assert self._staged is not None
        self._staged[path] = data

    @contextlib.contextmanager
    def _transaction(self, message: str) -> Iterator[list[bool]]:
        """Collect changes; commit them at the end if nobody else collects them."""
        result = [True]
        if self._staged is not None:
            yield result
            return
        self.begin()
        try:
            yield result
            result[0] = self.finish(message)
        finally:
            self.drop()

    def _send(self, path: str, local: Path, file: PackageFile) -> CommitOperationAdd:
        """Send a file to the Hub; return what adds it to a commit."""
        from huggingface_hub import CommitOperationAdd

        is_large = file.size >= _LARGE_BYTES
        change = CommitOperationAdd(path, str(local) if is_large else read_bytes(local))
        # What is kept outside of git is sent now, and its content let go; the rest with the commit.
        self._ask(
            lambda: self._api.preupload_lfs_files(self._repository, [change], revision=BRANCH)
        )
        if change.upload_info.sha256.hex() != file.digest.removeprefix("sha256:"):
            raise IntegrityError("changed while it was being published", where=file.name)
        return change

    def _exists(self, path: str) -> bool:
        if self._staged is not None and path in self._staged:
            return self._staged[path] is not None

        def ask() -> bool:
            with translate_errors(self._at(path), self._proxy):
                response = self._open_pool().request(
                    "HEAD", f"{self._base}/{path}", headers=self._login_headers(), redirect=False
                )
            if response.status not in (200, 302, 307, 308, 404):
                raise self._make_error(response, path)
            return response.status != 404

        return self._call_again(path, ask)

    def _list(self, folder: str, *, is_recursive: bool) -> set[str]:
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError

        def ask() -> set[str]:
            try:
                found = self._api.list_repo_tree(
                    self._repository, folder, recursive=is_recursive, revision=self.commit
                )
                return {entry.path for entry in found if isinstance(entry, RepoFile)}
            except EntryNotFoundError:
                return set()

        paths = self._ask(ask) if self._pin() else set()
        for path, data in (self._staged or {}).items():
            if path.startswith(f"{folder}/"):
                (paths.discard if data is None else paths.add)(path)
        return paths

    def _open_document(self, path: str, tag: str | None) -> Answer | None:
        return super()._open_document(path, tag) if self._pin() else None

    def _open_file(self, path: str, start: int) -> Answer | None:
        return super()._open_file(path, start) if self._pin() else None

    def _pin(self) -> bool:
        """Find the commit to read, once; return whether there is a repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._lock:
            if self.commit is None:
                try:
                    self.commit = self._ask(
                        lambda: self._api.model_info(self._repository, revision=BRANCH).sha
                    )
                except RepositoryNotFoundError as error:
                    if self._token is None:
                        raise RegistryError(
                            "no such repository, or a private one",
                            where=self.location,
                            hint=self._token_hint,
                        ) from error
                    return False
            self._base = f"{self._home}/resolve/{self.commit}"
            return self.commit is not None

    def _ask(self, call: Callable[[], T]) -> T:
        """Return what a call of the Hub's library returns, with our own errors."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            with _without_bars():
                return call()
        except RepositoryNotFoundError:
            raise
        except HfHubHTTPError as error:
            status = error.response.status_code
            message = f"the Hub refused it: HTTP status {status}: {error.server_message or ''}"
            if status in (408, 429, 500, 502, 503, 504):
                raise UnreachableError(message, where=self.location) from error
            hint = None
            if status in (401, 403):
                hint = "the token in use does not give access" if self._token else self._token_hint
            raise RegistryError(message[:300], where=self.location, hint=hint) from error
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise UnreachableError(
                f"the Hub cannot be reached, or the connection was lost: {str(error)[:300]}",
                where=self.location,
            ) from error


class HubRegistry(Registry):
    """A registry on the Hub, for publishing: every change is one commit, with the card.

    Args:
        storage: The repository.
        signatures: How signatures are treated; None ignores them.
    """

    def __init__(self, storage: HubStorage, *, signatures: SignatureSettings | None = None) -> None:
        super().__init__(storage, signatures=signatures)
        self._hub = storage
        self._is_changing = False

    def change(self, message: str, work: Callable[[], T]) -> T:
        """Make changes in one commit; again if somebody else's came first."""
        if self._is_changing:
            return work()
        self._is_changing = True
        try:
            for _ in range(MAX_COMMITS):
                self._hub.begin()
                result = work()
                self._write_card()
                if self._hub.finish(message):
                    return result
        finally:
            self._hub.drop()
            self._is_changing = False
        raise UnreachableError(
            f"others changed it {MAX_COMMITS} times meanwhile",
            where=self.location,
            hint="run the same command again",
        )

    def publish(
        self,
        directory: Path,
        *,
        interface: RouterInterface | None = None,
        deltas: Mapping[str, PreparedDelta] | None = None,
        progress: ByteProgress | None = None,
    ) -> Manifest:
        """Publish the expert in a directory, as `Registry.publish`, in one commit."""
        return self.change(
            f"Publish {directory.name}",
            lambda: super(HubRegistry, self).publish(
                directory, interface=interface, deltas=deltas, progress=progress
            ),
        )

    def yank(self, name: str, version: Version, reason: str = "") -> None:
        """Exclude a release from new resolutions, in one commit."""
        self.change(
            f"Yank {name} {version}" + (f": {reason}" if reason else ""),
            lambda: super(HubRegistry, self).yank(name, version, reason),
        )

    def unyank(self, name: str, version: Version) -> None:
        """Include a yanked release in new resolutions again, in one commit."""
        self.change(
            f"Undo the yank of {name} {version}",
            lambda: super(HubRegistry, self).unyank(name, version),
        )

    def advise(self, advisory: Advisory) -> None:
        """Add an advisory to the feed, or change the one of that name, in one commit."""
        self.change(
            f"Advise on {advisory.name}: {advisory.id}",
            lambda: super(HubRegistry, self).advise(advisory),
        )

    def _write_card(self) -> None:
        """Write the card of the repository, unless its owner has written one."""
        if not self.exists:
            return
        seen = self._hub.read(CARD_FILE)
        # The Hub makes a card of front matter alone for a new repository.
        if seen is None or not seen.data.strip() or is_written_here(seen.data):
            data = format_card(self, self._hub._repository).encode()
            if seen is None or seen.data != data:
                self._hub.replace(CARD_FILE, data, seen)


def _content_of(change: bytes | CommitOperationAdd | None) -> bytes | None:
    """Return the content of a file that is to be committed, if it is still in memory."""
    if change is None or isinstance(change, bytes):
        return change
    data = change.path_or_fileobj
    return data if isinstance(data, bytes) and len(data) == change.upload_info.size else None


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Let the Hub's library show no progress of its own."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _make_local(
    source: ReadFrom, file: PackageFile, folder: Path, progress: ByteProgress | None
) -> Path:
    """Return a verified local file with the bytes of a source, which may be one."""
    if isinstance(source, LocalFile):
        if digest_file(source.path) != file.digest:
            raise IntegrityError("changed while it was being published", where=str(source.path))
        return source.path
    path = folder / "file"
    with atomic.Sink(path, digest=file.digest, size=file.size) as sink:
        for data in source(0):
            sink.write(data)
            if progress is not None:
                progress(file.name, sink.size, file.size)
    return path
