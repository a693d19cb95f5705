"""Registries on web servers: any static host works. Read only.

A document costs one conditional GET; interrupted blobs are resumed with range requests. The size of
documents is bounded here, and the caller verifies blobs.
"""

from __future__ import annotations

import contextlib
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from composable.errors import RegistryError, UnreachableError
from composable.files.atomic import CHUNK
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 30.0
MAX_RETRIES: Final = 4
MAX_CONNECTIONS: Final = 8
# The HTTP library retries failed requests; these attempts are for truncated responses.
DOCUMENT_ATTEMPTS: Final = 2
_RETRYABLE_STATUSES: Final = (429, 500, 502, 503, 504)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class WebStorage:
    """A static web server.

    Args:
        url: The `http:` or `https:` URL of the folder that holds `config.json`.
        token: A bearer token. It is sent to this server only, and never unencrypted except to
            this machine.

    Raises:
        RegistryError: When the URL contains a user name, a password or a query, or when the token
            would be sent unencrypted.
    """

    is_remote: Final = True

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password:
            bare = parts.hostname or ""
            raise RegistryError(
                "the location of a registry must not contain a user name or a password",
                where=f"{parts.scheme}://{bare}{parts.path}",
                hint="set the token in the environment or keyring: see docs/concepts/packaging.md",
            )
        if not parts.hostname or parts.query or parts.fragment:
            raise RegistryError(
                "is not the URL of a folder on a web server",
                where=f"{parts.scheme}://{parts.netloc}{parts.path}",
                hint="expected for example https://example.org/registry",
            )
        if token is not None and parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            raise RegistryError(
                "the token would be sent unencrypted",
                where=url,
                hint="use https, or unset the token",
            )
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._pool: PoolManager | None = None

    @property
    def location(self) -> str:
        """The URL."""
        return self._url

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document; `known` itself if it is unchanged; None if it does not exist."""
        for attempt in range(DOCUMENT_ATTEMPTS):
            try:
                return self._read_once(path, known)
            except UnreachableError:
                if attempt == DOCUMENT_ATTEMPTS - 1:
                    raise
        raise AssertionError  # the last attempt returns or raises

    def _read_once(self, path: str, known: Document | None) -> Document | None:
        headers = {"Accept-Encoding": "gzip"}
        if known is not None and known.tag is not None:
            headers["If-None-Match"] = known.tag
        with _translate_errors(self._at(path)):
            response = self._get(path, headers)
            try:
                if response.status == 304 and known is not None:
                    return known
                if response.status in (404, 410):
                    return None
                self._check_status(response, path, 200)
                data = bytearray()
                while piece := response.read(CHUNK, decode_content=True):
                    data += piece
                    if len(data) > MAX_DOCUMENT_BYTES:
                        raise RegistryError("is larger than 64 MiB", where=self._at(path))
                return Document(bytes(data), response.headers.get("ETag"))
            finally:
                _release_connection(response)

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with _translate_errors(self._at(path)):
            response = self._get(path, headers)
            try:
                if response.status in (404, 410):
                    raise RegistryError("has no such file", where=self._at(path))
                if response.status == 416:
                    return  # the offset is at the end of the file
                self._check_status(response, path, 200, 206)
                skip = 0
                if start and response.status == 206:
                    self._check_range(response, path, start)
                elif start:
                    skip = start  # a server without range requests sends the whole file
                while piece := response.read(CHUNK, decode_content=False):
                    if skip >= len(piece):
                        skip -= len(piece)
                        continue
                    yield piece[skip:] if skip else piece
                    skip = 0
            finally:
                _release_connection(response)

    def _get(self, path: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        if self._pool is None:
            self._pool = _make_pool(self._url)
        return self._pool.request(
            "GET",
            f"{self._url}/{urllib.parse.quote(path)}",
            headers={**headers, **self._headers},
            preload_content=False,
        )

    def _at(self, path: str) -> str:
        return f"{self._url}/{path}"

    def _check_status(self, response: BaseHTTPResponse, path: str, *expected: int) -> None:
        status = response.status
        if status in expected:
            return
        if status in _RETRYABLE_STATUSES:
            raise UnreachableError(f"HTTP status {status} {response.reason}", where=self._at(path))
        hint = None
        if status in (401, 403):
            hint = "set its token in the environment or the keyring: see docs/concepts/packaging.md"
            if self._headers:
                hint = "the token in use does not give access"
        raise RegistryError(
            f"HTTP status {status} {response.reason}", where=self._at(path), hint=hint
        )

    def _check_range(self, response: BaseHTTPResponse, path: str, start: int) -> None:
        found = response.headers.get("Content-Range", "")
        if not found.startswith(f"bytes {start}-"):
            raise UnreachableError(
                f"sent the range {found[:60]!r}, expected one from byte {start}",
                where=self._at(path),
            )


@contextlib.contextmanager
def _translate_errors(where: str) -> Iterator[None]:
    """Raise our own errors instead of those of the HTTP library."""
    from urllib3.exceptions import HTTPError

    try:
        yield
    except HTTPError as error:
        reason = getattr(error, "reason", None) or error
        raise UnreachableError(
            f"cannot be reached, or the connection was lost: {str(reason)[:300]}",
            where=where,
            hint="run the same command again; downloads are resumed",
        ) from error


def _make_pool(url: str) -> PoolManager:
    """Return a connection pool for a server, through a proxy if the environment sets one."""
    import urllib3

    parts = urllib.parse.urlsplit(url)
    retries = urllib3.Retry(
        total=MAX_RETRIES,
        backoff_factor=0.2,
        status_forcelist=_RETRYABLE_STATUSES,
        raise_on_status=False,
        respect_retry_after_header=True,
    )
    timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        return urllib3.ProxyManager(
            proxy, retries=retries, timeout=timeout, maxsize=MAX_CONNECTIONS
        )
    return urllib3.PoolManager(retries=retries, timeout=timeout, maxsize=MAX_CONNECTIONS)


def _release_connection(response: BaseHTTPResponse) -> None:
    """Return the connection to the pool if the response was read to its end, or else close it."""
    if getattr(response, "length_remaining", None) == 0:
        response.release_conn()
    else:
        response.close()
