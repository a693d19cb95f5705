"""The one way to read: regular files of bounded size, without waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.corpora.documents import read_documents
from composable.errors import ComposableError, DiskError
from composable.files.blobs import digest_file
from composable.files.reading import is_regular, open_file, read_bytes
from composable.files.safetensors import read_header
from composable.interop.tables import read_json
from composable.packaging import Lock, Manifest, Project, Store
from composable.packaging.manifests.packing import describe_file
from composable.packaging.registry.storage import Folder
from composable.packaging.registry.tar import TarFile
from composable.vetting.card import tensor_digests


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link to a pipe": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
    "link to itself": lambda path: path.symlink_to(path),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "socket": make_socket,
}
READERS: dict[str, Callable[[Path], object]] = {
    "open_file": open_file,
    "read_bytes": read_bytes,
    "digest_file": digest_file,
    "describe_file": describe_file,
    "read_header": read_header,
    "read_json": read_json,
    "tar": TarFile,
    "document": lambda path: Folder(path.parent).read(path.name),
    "blob": lambda path: list(Folder(path.parent).stream(path.name)),
    "text": lambda path: list(read_documents([path])),
    "text in a folder": lambda path: list(read_documents([path.parent])),
    "body": lambda path: tensor_digests(path.parent),
    "manifest": lambda path: Manifest.read(path.parent),
    "lock": lambda path: Lock.read(path.parent),
    "project": lambda path: Project.read(path.parent),
    "source of a blob": lambda path: Store(path.parent / "store").add(path, "sha256:" + "0" * 64),
}
NAMES = {
    "body": "body.safetensors",
    "manifest": "expert.toml",
    "lock": "composable.lock",
    "project": "composable.toml",
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, reader: str, special: str
) -> None:
    path = tmp_path / NAMES.get(reader, "entry")
    SPECIAL[special](path)
    if (reader, special) == ("text in a folder", "folder"):
        path = path / "pipe"
        os.mkfifo(path)
    with pytest.raises(ComposableError):
        READERS[reader](path)


def test_links_to_regular_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"text"
    assert is_regular(tmp_path / "file")
    assert not is_regular(tmp_path / "link")
    assert not is_regular(tmp_path / "nothing")


def test_what_does_not_exist_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing")


@pytest.mark.parametrize(("size", "limit"), [(0, 0), (10, 10), (1 << 20, 1 << 20), (3, 5)])
def test_up_to_the_limit(tmp_path: Path, size: int, limit: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert len(read_bytes(tmp_path / "file", limit)) == size


@pytest.mark.parametrize(("size", "limit"), [(1, 0), (11, 10), ((1 << 20) + 1, 1 << 20)])
def test_not_beyond_the_limit(tmp_path: Path, size: int, limit: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    with pytest.raises(DiskError, match="larger than"):
        read_bytes(tmp_path / "file", limit)


def test_a_size_that_the_file_system_does_not_state() -> None:
    assert read_bytes(Path("/proc/self/status")).startswith(b"Name:")
    with pytest.raises(DiskError, match="larger than 10 bytes"):
        read_bytes(Path("/proc/self/status"), 10)
