"""The static layout over HTTP: entity tags, conditional requests, ranges, unknown paths."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from tests.support.registries import Served, fetch

if TYPE_CHECKING:
    from tests.server.conftest import MakeVetted


@pytest.fixture
def blob(server: Served, make_vetted: MakeVetted, interface: RouterInterface) -> tuple[str, bytes]:
    """Return the URL of a published file, and its bytes."""
    folder = make_vetted()
    manifest = server.registry(server.account("ann")).publish(folder, interface=interface)
    file = next(file for file in manifest.files if file.name == "body.safetensors")
    return f"{server.url}/{blob_path(file.digest)}", (folder / file.name).read_bytes()


def head_of(url: str, **headers: str) -> tuple[int, dict[str, str]]:
    request = urllib.request.Request(
        url, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    with urllib.request.urlopen(request) as response:
        return response.status, {k.lower(): v for k, v in response.headers.items()}


@pytest.mark.parametrize("path", ["config.json", "catalog.jsonl", "index/ge/german.jsonl"])
def test_unchanged_documents_are_not_sent_again(
    server: Served, blob: tuple[str, bytes], path: str
) -> None:
    url = f"{server.url}/{path}"
    _, headers = head_of(url)
    for tag in (headers["etag"], f'"x", {headers["etag"]}', f"W/{headers['etag']}", "*"):
        assert fetch(url, If_None_Match=tag)[:2] == (304, b""), tag
    assert fetch(url, If_None_Match='"x"')[0] == 200


def test_blobs_have_ranges(blob: tuple[str, bytes]) -> None:
    url, data = blob
    _, headers = head_of(url)
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert fetch(url, Range="bytes=100-")[:2] == (206, data[100:])
    assert fetch(url, Range="bytes=100-199")[:2] == (206, data[100:200])
    assert fetch(url, Range=f"bytes={len(data)}-")[0] == 416
    assert fetch(url, Range="bytes=100-", If_Range=headers["etag"])[:2] == (206, data[100:])
    assert fetch(url, Range="bytes=100-", If_Range='"x"')[:2] == (200, data)
    assert fetch(url, If_None_Match=headers["etag"])[:2] == (304, b"")


def test_what_clients_send_does_not_reach_the_file_system(
    server: Served, blob: tuple[str, bytes]
) -> None:
    for path in (
        "/blobs/..%2f..%2fregistry.sqlite/x",
        "/blobs/aa/..%2f..%2fregistry.sqlite",
        "/blobs/00/" + "0" * 64,
        "/blobs/zz/" + "z" * 64,
        "/index/ge/..%2fgerman.jsonl",
        "/index/xx/german.jsonl",
        "/index/ge/gerbil.jsonl",
        "/records/german/1.0.0.json",
        "/registry.sqlite",
        "/uploads/x",
    ):
        assert fetch(server.url + path)[0] == 404, path
    assert (Path(server.services.storage.location) / "registry.sqlite").exists()
