"""Registries in an OCI registry, such as Harbor, GHCR, ECR or Docker's: `oci://HOST/REPOSITORY`.

All of it is in one repository: files are blobs, and every release and document is a tagged
manifest, see `oci_manifests.py`. Blobs are sent in chunks and received as a stream that the reader
verifies, so memory does not grow with them.

OCI has no conditional write. A tag is read, written and read again, so of two publishers the one
whose content is gone notices, except if the other one's write was on its way meanwhile. Indexes
follow from the tags of releases and are written until they do, as in a folder, so none is lost from
them. Registries can forbid that tags change; then of two publishers of a version exactly one
succeeds. Tags of documents begin with `_` and have to be allowed to change.

Registries that cannot delete are common, so nothing is deleted: a file that was removed has a
manifest that says so.

References:
    OCI distribution specification 1.1.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from composable.errors import IntegrityError, RegistryError, UnreachableError
from composable.files.blobs import blob_path
from composable.interface.digest import digest_bytes
from composable.packaging.manifests.manifest import CHUNK_BYTES, PackageFile
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.credentials import origin_of, web_url
from composable.packaging.registry.http import (
    CONNECT_SECONDS,
    Reply,
    WebStorage,
    read_reply,
    release_connection,
    translate_errors,
)
from composable.packaging.registry.oci_login import (
    check_realm,
    format_basic,
    make_token_url,
    parse_challenge,
    read_token,
)
from composable.packaging.registry.oci_manifests import (
    EMPTY,
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    Artifact,
    make_document,
    make_release,
    make_removed,
    parse_artifact,
    path_of,
    tag_of,
)
from composable.packaging.registry.release import Release
from composable.packaging.registry.remote import Answer
from composable.packaging.registry.storage import (
    MAX_DOCUMENT_BYTES,
    Document,
    ReadFrom,
    read_verified,
)
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")
_BLOB: Final = re.compile(r"blobs/[0-9a-f]{2}/([0-9a-f]{64})")
_NEXT: Final = re.compile(r'<([^>]+)>\s*;\s*rel="?next"?')
_READ, _WRITE = "pull", "pull,push"
# At least this fast, a chunk is not late, and the digest of a whole blob is checked.
_SENT_BYTES_PER_SECOND: Final = 64 << 10
_CHECKED_BYTES_PER_SECOND: Final = 20 << 20
_MAX_RESTARTS: Final = 3
_TAGS_PER_PAGE: Final = 1000
_MAX_PAGES: Final = 10_000
_OCTETS: Final = "application/octet-stream"


class _RestartError(Exception):
    """An upload that the server has forgotten."""


class OciStorage(WebStorage):
    """One repository of an OCI registry. It can be published to.

    Args:
        location: `oci://HOST/REPOSITORY`. Only a registry on this machine is asked unencrypted.
        token: `NAME:PASSWORD`, or a token. It is sent to the registry and to the server of tokens
            that it names, if that is of the same domain.
        budget: Limits of waiting; by default those of the command, or else new ones.

    Raises:
        RegistryError: When the location is not that of a repository.
    """

    _token_hint = "set its token, or NAME:PASSWORD: see docs/guides/registries-you-have.md"

    def __init__(
        self, location: str, token: str | None = None, *, budget: TimeBudget | None = None
    ) -> None:
        parts = urllib.parse.urlsplit(web_url(location))
        self._repository = parts.path.strip("/")
        if not _REPOSITORY.fullmatch(self._repository) or parts.query or parts.fragment:
            raise RegistryError(
                f"{self._repository[:200]!r} is not the name of a repository",
                where=location.rpartition("@")[2][:200],
                hint="expected for example oci://ghcr.io/team/experts, in lower case and without a "
                "tag",
            )
        base = f"{parts.scheme}://{parts.netloc}/v2/{self._repository}"
        super().__init__(base, token, budget=budget)
        self._url = f"oci://{parts.netloc}/{self._repository}"
        self._logins: dict[str, str] = {}  # header by actions

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""
        paths = [p for p in self._list_paths() if p.rpartition("/")[0] == folder]
        kept = [
            path
            for path in paths
            # Of what can be removed, only yanks have to be known from the list alone: for a name
            # that was given back, there is nothing to read.
            if not path.endswith(".yanked") or self.read(path) is not None
        ]
        return sorted(path.rpartition("/")[2] for path in kept)

    def files_under(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder and its folders, sorted."""
        return sorted(path for path in self._list_paths() if path.startswith(f"{folder}/"))

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; of two calls at once, see the module, one succeeds."""
        seen = self._find(path)
        if seen is not None and not seen.is_removed:
            return False
        return self._put(path, data, None if seen is None else seen.digest)

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if it has not changed since it was read as `seen`."""
        if _BLOB.fullmatch(path):
            self._upload_bytes(data)
            return True
        now = self._find(path)
        is_there = now is not None and not now.is_removed
        if (seen.tag if seen is not None else None) != (now.digest if now and is_there else None):
            return False
        return self._put(path, data, None if now is None else now.digest)

    def upload(
        self, path: str, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Upload a blob unless it exists; it becomes visible when it is complete.

        Raises:
            IntegrityError: When the bytes do not match `file`, or the registry received others.
        """
        if blob_path(file.digest) != path:
            raise IntegrityError(f"{file.name} has another digest than its path", where=path)
        size = self._find_blob(file.digest)
        if size == file.size:
            return
        for is_last in [False] * (_MAX_RESTARTS - 1) + [True]:
            try:
                self._send_blob(source, file, progress)
                return
            except _RestartError as error:
                if is_last:
                    raise UnreachableError(
                        "forgot an upload before it was complete, several times",
                        where=self._at(path),
                    ) from error

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        seen = self._find(path)
        if seen is not None and not seen.is_removed:
            self._upload_bytes(EMPTY)
            self._put_manifest(path, make_removed(path))

    def settle(self, path: str) -> None:
        """Do nothing: what can be read from a registry is durable."""

    def _open_document(self, path: str, tag: str | None) -> Answer | None:
        if found := _BLOB.fullmatch(path):
            return self._open_file(found[0], 0)
        headers = {} if tag is None else {"If-None-Match": f'"{tag}"'}
        artifact = self._open_artifact(path, headers)
        if artifact is None or artifact.is_removed:
            return None
        if artifact.digest == tag:
            return Answer(iter(()), tag, is_unchanged=True)
        if artifact.record is not None:
            return Answer(iter((artifact.record,)), artifact.digest)
        (layer,) = artifact.layers
        if layer.size > MAX_DOCUMENT_BYTES:
            raise RegistryError("is larger than 64 MiB", where=self._at(path))
        answer = self._open_file(blob_path(layer.digest), 0)
        if answer is None:
            raise RegistryError("has a manifest without its blob", where=self._at(path))
        pieces = answer.pieces
        return Answer(read_verified(lambda _: pieces, layer), artifact.digest)

    def _open_file(self, path: str, start: int) -> Answer | None:
        found = _BLOB.fullmatch(path)
        if found is not None:
            return super()._open_file(f"blobs/sha256:{found[1]}", start)
        answer = self._open_document(path, None)
        if answer is None:
            return None
        return Answer(iter((b"".join(answer.pieces)[start:],)))

    def _open_artifact(self, path: str, headers: dict[str, str]) -> Artifact | None:
        """Ask once for the manifest of a file; None if there is none."""
        tag = tag_of(path)
        response = self._request(f"manifests/{tag}", {"Accept": MANIFEST_TYPE, **headers}, 200, 304)
        if response is None:
            return None
        if response.status == 304:
            release_connection(response)
            unchanged = headers["If-None-Match"].strip('"') if headers else ""
            return Artifact(digest=unchanged, layers=())
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        data = self._read_all(response, path, MAX_MANIFEST_BYTES)
        stated = response.headers.get("Docker-Content-Digest")
        if stated not in (None, digest_bytes(data)):
            raise UnreachableError(
                f"sent a manifest that does not match its digest {str(stated)[:80]}",
                where=self._at(path),
            )
        if kind != MANIFEST_TYPE:
            raise RegistryError(
                f"the tag {tag} holds {kind[:80]!r}, expected {MANIFEST_TYPE!r}",
                where=self._at(path),
                hint="another program has written this tag",
            )
        return parse_artifact(data, path, self._at(path))

    def _find(self, path: str) -> Artifact | None:
        return self._call_again(path, lambda: self._open_artifact(path, {}))

    def _find_blob(self, digest: str) -> int | None:
        """Return the size of a blob; None if there is none."""

        def ask() -> int | None:
            response = self._send("HEAD", f"{self._base}/blobs/{digest}", expected=(200, 404))
            if response.status == 404:
                return None
            length = response.headers.get("Content-Length", "")
            return int(length) if length.isdigit() else None

        return self._call_again(digest, ask)

    def _put(self, path: str, data: bytes, before: str | None) -> bool:
        """Write a file if its manifest is still `before`; return whether it holds then."""
        if path.startswith("records/") and path.endswith(".json"):
            release = Release.from_line(data, path.split("/")[1], self._at(path))
            size = self._find_blob(release.manifest)
            if size is None:
                raise RegistryError("its expert.toml was not uploaded", where=self._at(path))
            lacking = {
                file.digest
                for file in release.files
                if file.deltas and self._find_blob(file.digest) is None
            }
            manifest, config = make_release(data, release, size, lacking)
            self._upload_bytes(config)
        else:
            manifest = make_document(path, data)
            self._upload_bytes(data)
            self._upload_bytes(EMPTY)
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise RegistryError(
                f"has a manifest of {len(manifest):,} bytes, of which OCI registries allow "
                f"{MAX_MANIFEST_BYTES:,}",
                where=self._at(path),
            )
        now = self._find(path)
        if (None if now is None else now.digest) != before:
            return False
        self._put_manifest(path, manifest)
        now = self._find(path)
        return now is not None and now.digest == digest_bytes(manifest)

    def _put_manifest(self, path: str, manifest: bytes) -> None:
        """Write a manifest; one whose tag may not change stays, which the caller notices."""

        def ask() -> None:
            response = self._send(
                "PUT",
                f"{self._base}/manifests/{tag_of(path)}",
                body=manifest,
                headers={"Content-Type": MANIFEST_TYPE},
                expected=(200, 201, 202, 400, 403, 409, 412),
            )
            if response.status >= 400 and self._open_artifact(path, {}) is None:
                error = self._explain(response, path)
                if b"DIGEST_INVALID" in response.data:
                    # The request has no digest of its own. Docker's registry answers so when it
                    # reads its link to a blob while another publisher writes the same one.
                    raise UnreachableError(error.message, where=self._at(path))
                raise error

        self._call_again(path, ask)

    def _upload_bytes(self, data: bytes) -> None:
        file = PackageFile(name="document", size=len(data), digest=digest_bytes(data))
        self.upload(blob_path(file.digest), lambda start: iter((data[start:],)), file, None)

    def _send_blob(
        self, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Send a blob in chunks, verified; one that was interrupted goes on where it stopped."""
        where = f"blobs/{file.digest}"
        upload = _Upload(self, where, self._call_again(where, self._begin_upload))
        for chunk in _cut(read_verified(source, file, progress)):
            upload.send(chunk)
        seconds = file.size / _CHECKED_BYTES_PER_SECOND

        def finish() -> None:
            response = self._send(
                "PUT",
                f"{upload.url}{'&' if '?' in upload.url else '?'}digest={file.digest}",
                headers={"Content-Type": _OCTETS},
                body=b"",
                expected=(201, 202, 204, 400, 404, 416),
                seconds=seconds,
            )
            if response.status >= 400 and self._find_blob(file.digest) != file.size:
                # An answer that was lost may have been that it is complete.
                if response.status == 404:
                    raise _RestartError
                raise self._explain(response, where)

        self._call_again(where, finish, seconds)

    def _begin_upload(self) -> str:
        response = self._send("POST", f"{self._base}/blobs/uploads/", body=b"", expected=(202,))
        return self._follow(response)

    def _follow(self, response: Reply) -> str:
        """Return where an upload goes on; never another server, which would get the token."""
        url = urllib.parse.urljoin(f"{self._base}/", response.headers.get("Location", ""))
        if origin_of(url) != origin_of(self._base):
            raise RegistryError(
                f"asks to upload to another server, {str(origin_of(url))[:200]}",
                where=self.location,
                hint="nothing was sent; behind a proxy, the registry has to know its own URL",
            )
        return url

    def _list_paths(self) -> list[str]:
        """Return the paths of all files that have a tag."""
        url: str | None = f"{self._base}/tags/list?n={_TAGS_PER_PAGE}"
        tags: dict[str, None] = {}
        for _ in range(_MAX_PAGES):
            if url is None:
                return [path for tag in tags if (path := path_of(tag)) is not None]
            found, url = self._call_again("tags/list", lambda at=url: self._list_page(at))  # type: ignore[misc]
            tags |= dict.fromkeys(found)
        raise RegistryError("its list of tags has no end", where=self.location)

    def _list_page(self, url: str) -> tuple[list[str], str | None]:
        response = self._send("GET", url, expected=(200, 404), limit=MAX_DOCUMENT_BYTES)
        if response.status == 404:
            return [], None  # a repository without tags, or none at all
        try:
            tags = json.loads(response.data)["tags"] or []
            if not all(isinstance(tag, str) for tag in tags):
                raise ValueError("a tag is not text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RegistryError("is not a list of tags", where=url) from error
        link = _NEXT.search(response.headers.get("Link", ""))
        after = urllib.parse.urljoin(url, link[1]) if link else None
        if after is not None and origin_of(after) != origin_of(self._base):
            raise RegistryError("its list of tags continues on another server", where=url)
        return tags, after

    def _send(
        self,
        method: str,
        url: str,
        *,
        expected: tuple[int, ...],
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        seconds: float = 0.0,
        limit: int = MAX_MANIFEST_BYTES,
    ) -> Reply:
        """Send a request to the registry, logged in; redirects are not followed."""
        actions = _READ if method in ("GET", "HEAD") else _WRITE
        with translate_errors(url, self._proxy):
            for is_last in (False, True):
                response = self._open_pool().request(
                    method,
                    url,
                    body=body,
                    headers={**(headers or {}), **self._login_headers(actions)},
                    redirect=False,
                    preload_content=False,
                    timeout=CONNECT_SECONDS + self._budget.silent_seconds + seconds,
                )
                reply = read_reply(response, limit, url)
                if reply.status != 401 or is_last or not self._log_in(response, actions):
                    break
        if reply.status in expected:
            return reply
        raise self._explain(reply, url.removeprefix(f"{self._base}/").partition("?")[0])

    def _read_all(self, response: BaseHTTPResponse, path: str, limit: int) -> bytes:
        with translate_errors(self._at(path), self._proxy):
            return read_reply(response, limit, self._at(path)).data

    def _login_headers(self, actions: str = _READ) -> dict[str, str]:
        login = self._logins.get(_WRITE) or self._logins.get(actions)
        if actions == _WRITE:
            login = self._logins.get(_WRITE)
        return {} if login is None else {"Authorization": login}

    def _log_in(self, response: BaseHTTPResponse, actions: str = _READ) -> bool:
        """Answer the challenge of a response; return whether a request can be made again."""
        if origin_of(response.geturl() or self._base) not in (None, origin_of(self._base)):
            return False  # only the registry is answered, never a server that it redirects to
        challenge = parse_challenge(response.headers.get("WWW-Authenticate", ""))
        if challenge is None:
            return False
        if challenge.is_basic or not challenge.realm:
            if self._token is None:
                return False
            header = format_basic(self._token) if challenge.is_basic else f"Bearer {self._token}"
            self._logins = dict.fromkeys((_READ, _WRITE), header)
            return True
        has_token = self._token is not None
        check_realm(challenge, self._base, self.location, has_token=has_token)
        answer = self._open_pool().request(
            "GET",
            make_token_url(challenge, self._repository, actions),
            headers={"Authorization": format_basic(self._token)} if self._token else {},
            redirect=False,
            preload_content=False,
        )
        reply = read_reply(answer, MAX_MANIFEST_BYTES, challenge.realm)
        if reply.status != 200:
            raise RegistryError(
                f"the server of tokens {origin_of(challenge.realm)} refused access: HTTP status "
                f"{reply.status}",
                where=self.location,
                hint="the token in use does not give access" if has_token else self._token_hint,
            )
        self._logins[actions] = f"Bearer {read_token(reply.data, self.location)}"
        return True

    def _explain(self, response: Reply, path: str) -> RegistryError:
        """Return the error of a response, in the registry's words."""
        error = self._make_error(response, path)
        try:
            first = json.loads(response.data)["errors"][0]
            said = f"{first['code']}: {first.get('message', '')}"[:300]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return error
        error.message = f"{error.message} ({said})"
        return error


class _Upload:
    """An upload in chunks.

    Args:
        storage: The repository.
        where: What is sent, for errors.
        url: Where it is sent to.
    """

    def __init__(self, storage: OciStorage, where: str, url: str) -> None:
        self._storage = storage
        self._where = where
        self.url = url
        self._sent = 0
        self._is_unsure = False

    def send(self, chunk: bytes) -> None:
        """Send the next chunk; after an interruption, what of it has not arrived."""
        start = self._sent

        def ask() -> None:
            if self._is_unsure:
                self._find_offset(start, start + len(chunk))
            if self._sent == start + len(chunk):
                return
            self._is_unsure = True
            rest = chunk[self._sent - start :]
            response = self._storage._send(
                "PATCH",
                self.url,
                body=rest,
                headers={
                    "Content-Type": _OCTETS,
                    "Content-Range": f"{self._sent}-{start + len(chunk) - 1}",
                },
                expected=(202, 204, 404, 416),
                seconds=len(rest) / _SENT_BYTES_PER_SECOND,
            )
            if response.status == 404:
                raise _RestartError
            if response.status == 416:
                raise UnreachableError("expected another part of the file", where=self._where)
            self.url = self._storage._follow(response)
            self._sent, self._is_unsure = start + len(chunk), False

        self._storage._call_again(self._where, ask, len(chunk) / _SENT_BYTES_PER_SECOND)

    def _find_offset(self, start: int, stop: int) -> None:
        """Ask how much has arrived; it must be within the chunk that is being sent."""
        response = self._storage._send("GET", self.url, expected=(204, 202, 404))
        found = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
        if response.status == 404:
            raise _RestartError
        last = int(found[1]) if found else 0
        # A server says 0-0 for one byte and for none.
        self._sent = last + 1 if last else start
        if not start <= self._sent <= stop:
            raise _RestartError
        if response.headers.get("Location"):
            self.url = self._storage._follow(response)


def _cut(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield pieces joined to chunks of 8 MiB."""
    chunk = bytearray()
    for piece in pieces:
        chunk += piece
        if len(chunk) >= CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)
