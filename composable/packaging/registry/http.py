"""Registries on web servers. Any static host works for reading; `served.py` publishes with `send`.

A document costs one conditional GET; interrupted blobs are resumed with range requests. Every call
here is one attempt: `remote.py` retries. The caller verifies blobs.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import json
import math
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from composable.errors import RegistryError, UnreachableError
from composable.files.atomic import CHUNK
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.compression import decompress
from composable.packaging.registry.credentials import LOOPBACK
from composable.packaging.registry.proxy import Proxy, find_proxy
from composable.packaging.registry.remote import Answer, DeniedError, RemoteStorage

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

CONNECT_SECONDS: Final = 10.0
MAX_REDIRECTS: Final = 5
MAX_CONNECTIONS: Final = 8
_RETRYABLE_STATUSES: Final = (408, 425, 429, 500, 502, 503, 504)
# What servers compress responses with, even if they were asked not to.
_ENCODINGS: Final = ("gzip", "x-gzip", "deflate", "identity")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A response that was read to its end.

    Args:
        status: HTTP status.
        reason: Its name.
        headers: Headers; their names are compared without case.
        data: The body.
    """

    status: int
    reason: str | None
    headers: Mapping[str, str]
    data: bytes


class WebStorage(RemoteStorage):
    """A static web server.

    Args:
        url: The `http:` or `https:` URL of the folder that holds `config.json`.
        token: A bearer token. It is sent to this server only, and never unencrypted except to
            this machine, without a proxy.
        budget: Limits of waiting; by default those of the command, or else new ones.

    Raises:
        RegistryError: When the URL contains a user name, a password or a query, or when the token
            would be sent unencrypted.
    """

    _token_hint = "set its token: see docs/guides/use.md"

    def __init__(
        self, url: str, token: str | None = None, *, budget: TimeBudget | None = None
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password:
            bare = parts.hostname or ""
            raise RegistryError(
                "the location of a registry must not contain a user name or a password",
                where=f"{parts.scheme}://{bare}{parts.path}",
                hint="set the token in the environment or keyring: see docs/guides/use.md",
            )
        if not parts.hostname or parts.query or parts.fragment:
            raise RegistryError(
                "is not the URL of a folder on a server",
                where=f"{parts.scheme}://{parts.netloc}{parts.path}",
                hint="expected for example https://example.org/registry",
            )
        if token is not None and parts.scheme != "https" and parts.hostname not in LOOPBACK:
            raise RegistryError(
                "the token would be sent unencrypted",
                where=url,
                hint="use https, or unset the token",
            )
        super().__init__(url, budget)
        self._base = self._url  # what paths are appended to
        self._token = token
        is_direct = token is not None and parts.scheme != "https"
        self._proxy = None if is_direct else find_proxy(self._url)
        self._pool: PoolManager | None = None

    def _open_document(self, path: str, tag: str | None) -> Answer | None:
        headers = {"Accept-Encoding": "gzip"}
        if tag is not None:
            headers["If-None-Match"] = tag
        response = self._request(path, headers, 200, *([] if tag is None else [304]))
        if response is None:
            return None
        if response.status == 304:
            release_connection(response)
            return Answer(iter(()), tag, is_unchanged=True)
        # Without a length, a response that is cut off looks complete.
        is_length_known = "Content-Length" in response.headers or "chunked" in (
            response.headers.get("Transfer-Encoding", "").lower()
        )
        tag = response.headers.get("ETag")
        return Answer(self._pieces(response, path), tag, is_length_known=is_length_known)

    def _open_file(self, path: str, start: int) -> Answer | None:
        headers = {"Accept-Encoding": "identity"}
        if not start:
            response = self._request(path, headers, 200)
            return None if response is None else Answer(self._pieces(response, path))
        response = self._request(path, {**headers, "Range": f"bytes={start}-"}, 200, 206, 416)
        if response is not None and (
            response.status == 416 or (response.status == 206 and _is_compressed(response))
        ):
            # The range may be one of the compressed bytes, which cannot be decompressed.
            release_connection(response)
            response = self._request(path, headers, 200)
        if response is None:
            return None
        if response.status == 206:
            self._check_range(response, path, start)
            return Answer(self._pieces(response, path))
        # A server without range requests sends the whole file.
        return Answer(self._pieces(response, path, skip=start))

    def send(self, method: str, path: str, body: bytes, kind: str, seconds: float = 0.0) -> bytes:
        """Send a request that changes something and may be repeated; return the response.

        Args:
            method: HTTP method.
            path: Path below the URL.
            body: The body.
            kind: Its content type.
            seconds: How much longer than a document the response may take.

        Raises:
            RegistryError: When the server refuses it, in its words.
            UnreachableError: When it cannot be reached.
        """
        headers = {"Content-Type": kind, **self._login_headers()}

        def ask() -> bytes:
            with translate_errors(self._at(path), self._proxy):
                response = self._open_pool().request(
                    method,
                    self._url_of(path),
                    body=body,
                    headers=headers,
                    redirect=False,
                    timeout=CONNECT_SECONDS + self._budget.silent_seconds + seconds,
                )
            if response.status in (200, 201, 204):
                return bytes(response.data)
            refusal = _read_refusal(response)
            if refusal is None and response.status in (404, 405, 501):
                raise RegistryError(
                    f"is read only: HTTP status {response.status} {response.reason}",
                    where=self.location,
                    hint="publish to the folder or the bucket behind the web server, or to a "
                    "server that `composable registry serve` runs",
                )
            raise refusal or self._make_error(response, path)

        return self._call_again(path, ask, seconds)

    def _pieces(self, response: BaseHTTPResponse, path: str, skip: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a response, decompressed, without the first `skip`."""
        with translate_errors(self._at(path), self._proxy):
            try:
                pieces: Iterator[bytes] = iter(
                    lambda: response.read1(CHUNK, decode_content=False), b""
                )
                for encoding in reversed(_encodings_of(response)):
                    if encoding != "identity":
                        pieces = decompress(pieces, self._at(path))
                for piece in pieces:
                    if skip < len(piece):
                        yield piece[skip:] if skip else piece
                    skip = max(skip - len(piece), 0)
            finally:
                release_connection(response)

    def _request(
        self, path: str, headers: Mapping[str, str], *expected: int
    ) -> BaseHTTPResponse | None:
        """Return the response if its status is one of those expected; None if there is no file."""
        with translate_errors(self._at(path), self._proxy):
            for _ in range(2):
                response = self._open_pool().request(
                    "GET",
                    self._url_of(path),
                    headers={**headers, **self._login_headers()},
                    preload_content=False,
                )
                if response.status != 401:
                    break
                release_connection(response)  # what it asks for is in its headers
                if not self._log_in(response):
                    break
            if response.status in expected:
                _check_encoding(response, self._at(path))
                return response
            release_connection(response)
            if response.status in (404, 410):
                return None
            raise self._make_error(response, path)

    def _url_of(self, path: str) -> str:
        return f"{self._base}/{urllib.parse.quote(path, safe='/:')}"

    def _login_headers(self) -> dict[str, str]:
        """Return the headers that show who asks."""
        return {} if self._token is None else {"Authorization": f"Bearer {self._token}"}

    def _log_in(self, response: BaseHTTPResponse) -> bool:
        """Answer a request to log in; return whether the same request can be made again."""
        return False

    def _open_pool(self) -> PoolManager:
        if self._pool is None:
            self._pool = _make_pool(self._proxy, self._budget.silent_seconds)
        return self._pool

    def _make_error(self, response: BaseHTTPResponse | Reply, path: str) -> RegistryError:
        """Return the error for a status that was not expected."""
        status, where = response.status, self._at(path)
        message = f"HTTP status {status} {response.reason}"
        if status in _RETRYABLE_STATUSES:
            pause = parse_retry_after(response.headers.get("Retry-After"))
            return UnreachableError(message, where=where, retry_after=pause)
        if status == 407 and self._proxy is not None:
            return self._proxy.refuse()
        hint = None
        if status in (401, 403):
            hint = "the token in use does not give access" if self._token else self._token_hint
        if status == 403:
            hint = f"{hint}; or check the URL: some servers send 403 for files that do not exist"
            return DeniedError(message, where=where, hint=hint)
        return RegistryError(message, where=where, hint=hint)

    def _check_range(self, response: BaseHTTPResponse, path: str, start: int) -> None:
        found = response.headers.get("Content-Range", "")
        if not found.startswith(f"bytes {start}-"):
            release_connection(response)
            raise UnreachableError(
                f"sent the range {found[:60]!r}, expected one from byte {start}",
                where=self._at(path),
            )


def read_reply(response: BaseHTTPResponse, limit: int, where: str) -> Reply:
    """Read a response to its end.

    Args:
        response: The response.
        limit: The greatest number of bytes.
        where: Its location, for the error.

    Raises:
        RegistryError: When it has more.
    """
    data = bytearray()
    try:
        while piece := response.read1(CHUNK):
            data += piece
            if len(data) > limit:
                raise RegistryError(f"sent more than {limit:,} bytes", where=where)
    finally:
        release_connection(response)
    return Reply(
        status=response.status, reason=response.reason, headers=response.headers, data=bytes(data)
    )


def parse_retry_after(text: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks to wait; None if it is malformed.

    References:
        RFC 9110, section 10.2.3: a number of seconds, or a date.

    Example:
        >>> parse_retry_after("120")
        120.0
        >>> parse_retry_after("9" * 400)
        inf
        >>> parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT")
        0.0
        >>> parse_retry_after("soon")
    """
    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        return float(text) if len(text) < 10 else math.inf
    try:
        date = email.utils.parsedate_to_datetime(text)
        now = datetime.datetime.now(datetime.UTC if date.tzinfo else None)
        return max((date - now).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _read_refusal(response: BaseHTTPResponse) -> RegistryError | None:
    """Return the error that a server explains; None if it does not, or a retry may help."""
    if response.status in _RETRYABLE_STATUSES:
        return None
    try:
        error = json.loads(response.data)["error"]
        texts = {key: error[key] for key in ("message", "where", "hint")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(texts.pop("message"), str):
        return None
    if not all(text is None or isinstance(text, str) for text in texts.values()):
        return None
    return RegistryError(error["message"], **texts)


def _check_encoding(response: BaseHTTPResponse, where: str) -> None:
    """Raise an error for a response whose compression is not supported."""
    for encoding in _encodings_of(response):
        if encoding not in _ENCODINGS:
            release_connection(response)
            raise RegistryError(
                f"is compressed with {encoding[:40]!r}, which was not requested",
                where=where,
                hint="the server must be configured not to compress the files of the registry",
            )


def _encodings_of(response: BaseHTTPResponse) -> list[str]:
    header = response.headers.get("Content-Encoding", "")
    return [name for text in header.lower().split(",") if (name := text.strip())]


def _is_compressed(response: BaseHTTPResponse) -> bool:
    return any(encoding != "identity" for encoding in _encodings_of(response))


@contextlib.contextmanager
def translate_errors(where: str, proxy: Proxy | None) -> Iterator[None]:
    """Raise our own errors instead of those of the HTTP library."""
    from urllib3.exceptions import HTTPError, ProxyError

    try:
        yield
    except HTTPError as error:
        reason = getattr(error, "reason", None) or error
        message = "cannot be reached, or the connection was lost"
        if proxy is not None and isinstance(reason, ProxyError):
            reason = reason.original_error
            if " 407 " in f"{reason} ":
                raise proxy.refuse() from error
            message = f"cannot be reached through the proxy {proxy.url} ({proxy.variable})"
        raise UnreachableError(f"{message}: {str(reason)[:300]}", where=where) from error


def _make_pool(proxy: Proxy | None, silent_seconds: float) -> PoolManager:
    """Return a connection pool that follows redirects and does not retry."""
    import urllib3

    retries = urllib3.Retry(
        total=None,
        connect=0,
        read=0,
        status=0,
        other=0,
        redirect=MAX_REDIRECTS,
        respect_retry_after_header=False,
    )
    # Slightly more than the limit of an attempt, so that its thread ends too.
    timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=silent_seconds + 5)
    settings: dict[str, Any] = {"retries": retries, "timeout": timeout, "maxsize": MAX_CONNECTIONS}
    if proxy is not None:
        return proxy.make_pool(**settings)
    return urllib3.PoolManager(**settings)


def release_connection(response: BaseHTTPResponse) -> None:
    """Return the connection to the pool if the response was read to its end, or else close it."""
    if getattr(response, "length_remaining", None) == 0:
        response.drain_conn()  # closes the socket where the server does
        response.release_conn()
    else:
        response.close()
