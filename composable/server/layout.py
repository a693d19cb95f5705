"""The static layout over HTTP: `/config.json`, `/catalog.jsonl`, `/index` and `/blobs`.

Byte for byte what a folder of files on a static web server would send, with entity tags,
conditional requests and ranges, so every client of a static registry works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from composable.errors import RegistryError
from composable.files.atomic import CHUNK
from composable.files.blobs import blob_path
from composable.interface.digest import digest_bytes, is_digest
from composable.packaging.registry.inbox import FOLDER
from composable.packaging.registry.lines import CATALOG_FILE
from composable.packaging.registry.storage import CONFIG_FILE, Folder
from composable.packaging.versions.names import is_package_name
from composable.server.access import can_read_blob, can_see, is_blob_public
from composable.server.accounts import find_caller
from composable.server.documents import CONFIG
from composable.server.refusal import missing
from composable.server.services import Services
from composable.server.signatures import TIMESTAMP
from composable.server.tables import File, Package

_RANGE: Final = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
PUBLIC: Final = "public, no-cache"
PRIVATE: Final = "private, no-cache"
FOREVER: Final = "max-age=31536000, immutable"


class BlobResponse(FileResponse):
    """A blob from a folder, in pieces that keep a disk busy."""

    chunk_size = CHUNK


def get_config(request: Request) -> Response:
    """Return what kind of registry this is."""
    services: Services = request.app.state.services
    with services.database.read() as session:
        data = services.signing.read(session, CONFIG_FILE)
    return _send(request, data or CONFIG, "application/json", PUBLIC)


def get_signed(request: Request) -> Response:
    """Return metadata of a signed registry, or the statement on a release."""
    services: Services = request.app.state.services
    path = request.url.path.lstrip("/")
    with services.database.read() as session:
        data = services.signing.read(session, path)
    if data is None:
        raise missing("signature of that name")
    cache = PUBLIC if path == TIMESTAMP or path.startswith("statements/") else f"public, {FOREVER}"
    return _send(request, data, "application/json", cache)


def get_catalog(request: Request) -> Response:
    """Return one line for each package."""
    services: Services = request.app.state.services
    with services.database.read() as session:
        caller = find_caller(session, request.headers.get("authorization"))
        data = services.search.catalog(session, caller)
    if not data:
        raise missing(CATALOG_FILE)
    return _send(request, data, "application/jsonl", PUBLIC if caller.account is None else PRIVATE)


def get_index(request: Request) -> Response:
    """Return one line for each release of a package."""
    services: Services = request.app.state.services
    name = request.path_params["name"]
    if not is_package_name(name) or request.path_params["shard"] != name[:2]:
        raise missing("index of that name")
    with services.database.read() as session:
        caller = find_caller(session, request.headers.get("authorization"))
        row = session.execute(
            select(Package.index.label("data"), Package.index_digest, Package.is_private).where(
                Package.name == name, can_see(caller)
            )
        ).one_or_none()
    if row is None or not row.data:
        raise missing(f"index of {name!r}")
    cache = PRIVATE if row.is_private else PUBLIC
    return _send(request, row.data, "application/jsonl", cache, row.index_digest)


def get_blob(request: Request) -> Response:
    """Return the bytes of a digest, if a release that the caller may see has it."""
    services: Services = request.app.state.services
    digest = f"sha256:{request.path_params['hex']}"
    if not is_digest(digest) or request.path_params["shard"] != digest[7:9]:
        raise missing("blob of that digest")
    with services.database.read() as session:
        caller = find_caller(session, request.headers.get("authorization"))
        if not can_read_blob(session, caller, digest):
            signed = services.signing.read(session, blob_path(digest))
            if signed is None:
                raise missing("blob of that digest")
            kind = "application/octet-stream"
            return _send(request, signed, kind, f"public, {FOREVER}", digest)
        is_public = is_blob_public(session, digest)
        size = session.scalar(select(File.size).where(File.digest == digest).limit(1))
    headers = {
        "ETag": f'"{digest[7:]}"',
        "Cache-Control": f"{'public' if is_public else 'private'}, {FOREVER}",
        "Vary": "Authorization",
    }
    if _is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    path, storage = blob_path(digest), services.storage
    kind = "application/octet-stream"
    if isinstance(storage, Folder):
        file = storage.root / path
        if not file.is_file():
            raise missing("blob of that digest")
        return BlobResponse(file, headers=headers, media_type=kind)
    return _stream(request, storage, path, size or 0, headers, kind)


def get_proposed(request: Request) -> Response:
    """Return a file of a proposal that the caller made, or may decide on."""
    services: Services = request.app.state.services
    id_, name = request.path_params["id"], request.path_params["name"]
    with services.database.read() as session:
        caller = find_caller(session, request.headers.get("authorization"))
    caller.require("read")
    size, pieces = services.proposals.read_file(caller, id_, name)
    headers = {"Content-Length": str(size), "Cache-Control": "private, no-store"}
    return StreamingResponse(pieces, 200, headers, "application/octet-stream")


def _stream(
    request: Request, storage: Any, path: str, size: int, headers: dict[str, str], kind: str
) -> Response:
    """Return a blob from a bucket, or one range of it."""
    start, stop, status = 0, size, 200
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    if found and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        start = int(found[1])
        stop = min(int(found[2]) + 1, size) if found[2] else size
        if start >= stop:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers |= {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=kind)
    pieces = _first(storage.stream(path, start), stop - start)
    return StreamingResponse(pieces, status, headers, kind)


def _first(pieces: Iterator[bytes], n_bytes: int) -> Iterator[bytes]:
    for piece in pieces:
        yield piece[:n_bytes]
        n_bytes -= len(piece)
        if n_bytes <= 0:
            return
    if n_bytes:
        raise RegistryError(f"a blob in the storage lacks {n_bytes:,} bytes")


def _send(
    request: Request, data: bytes, kind: str, cache: str, digest: str | None = None
) -> Response:
    tag = f'"{(digest or digest_bytes(data))[7:39]}"'
    headers = {"ETag": tag, "Cache-Control": cache, "Vary": "Authorization"}
    if _is_known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=kind)


def _is_known(request: Request, tag: str) -> bool:
    """Return whether the client has this state already.

    References:
        RFC 9110, section 13.1.2.
    """
    known = [part.strip().removeprefix("W/") for part in _known_tags(request)]
    return tag in known or "*" in known


def _known_tags(request: Request) -> list[str]:
    return request.headers.get("if-none-match", "").split(",")


ROUTES: Final = (
    (f"/{CONFIG_FILE}", get_config),
    (f"/{CATALOG_FILE}", get_catalog),
    ("/trust/{file}", get_signed),
    ("/statements/{name}/{file}", get_signed),
    ("/index/{shard}/{name}.jsonl", get_index),
    ("/blobs/{shard}/{hex}", get_blob),
    (f"/{FOLDER}/{{id}}/{{name}}", get_proposed),
)
