"""Exports whose headers were damaged or forged are refused, whatever the header says."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from composable.errors import RegistryError
from composable.packaging.registry.tar import TarFile

SIZE_FIELD = slice(124, 136)
CHECKSUM_FIELD = slice(148, 156)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Return a tar file with two members."""
    path = tmp_path / "export.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("config.json", b"{}"), ("blobs/" + "a" * 90, b"x" * 700)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def forge(path: Path, start: int, field: slice, value: bytes) -> None:
    """Change a field of the header at `start`, and its checksum to fit."""
    data = bytearray(path.read_bytes())
    header = data[start : start + 512]
    header[field] = value
    header[CHECKSUM_FIELD] = b" " * 8
    header[CHECKSUM_FIELD] = b"%06o\0 " % sum(header)
    data[start : start + 512] = header
    path.write_bytes(data)


def test_members_are_read_in_place(export: Path) -> None:
    tar = TarFile(export)
    document = tar.read("config.json")
    assert document is not None
    assert document.data == b"{}"
    assert b"".join(tar.stream("blobs/" + "a" * 90, 690)) == b"x" * 10


@pytest.mark.parametrize(
    "size",
    [
        b"\x80\0\0\0" + b"\x7f" + b"\xff" * 7,  # 2**63 - 1
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,  # -1
        b"\xff" * 10 + b"\xfe\0",  # -512
        b"\x80" + b"\0" * 3 + b"\x40" + b"\0" * 7,  # 2**62
        b"77777777777\0",
        b"00000010000\0",
        b"not a number",
    ],
)
@pytest.mark.parametrize("start", [0, 1024])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"S", b"5", b"Z"])
def test_sizes_that_cannot_be_true(export: Path, size: bytes, start: int, kind: bytes) -> None:
    forge(export, start, slice(156, 157), kind)
    forge(export, start, SIZE_FIELD, size)
    try:
        tar = TarFile(export)
    except RegistryError as error:
        assert "is not an export" in error.message
        return
    for name in ("config.json", "blobs/" + "a" * 90):  # what is left lies within the file
        document = tar.read(name)
        assert document is None or len(document.data) <= export.stat().st_size


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_other_programs_write(tmp_path: Path, kind: int) -> None:
    names = ["a/b", "records/" + "n" * 64 + "/" + "1." * 30 + "json", "ü", "empty"]
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 0 if name == "empty" else len(name)
            member.mtime = 1.5  # a record in a pax header
            tar.addfile(member, io.BytesIO(name.encode()))
    found = TarFile(tmp_path / "x.tar")
    for name in names:
        document = found.read(name)
        assert document is not None
        assert document.data == (b"" if name == "empty" else name.encode()[: len(name)])
    assert found.read("a") is None


def test_a_size_in_a_pax_header(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a")
        member.size = 9
        member.pax_headers = {"size": "9", "path": "b" * 200}
        tar.addfile(member, io.BytesIO(b"123456789"))
    document = TarFile(tmp_path / "x.tar").read("b" * 200)
    assert document is not None
    assert document.data == b"123456789"


@pytest.mark.parametrize("size", ["-1", "99999999999999999999", "9" * 17, "x"])
def test_a_false_size_in_a_pax_header(tmp_path: Path, size: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a")
        member.size = 9
        member.pax_headers = {"size": size}
        tar.addfile(member, io.BytesIO(b"123456789"))
    with pytest.raises(RegistryError, match="is not an export"):
        TarFile(tmp_path / "x.tar")


def test_an_export_cut_between_members(export: Path) -> None:
    export.write_bytes(export.read_bytes()[:1024])
    with pytest.raises(RegistryError, match="cut short"):
        TarFile(export)


def test_a_file_that_was_cut(export: Path) -> None:
    tar = TarFile(export)
    export.write_bytes(export.read_bytes()[:1600])
    with pytest.raises(RegistryError, match="cut short"):
        list(tar.stream("blobs/" + "a" * 90))
    with pytest.raises(RegistryError, match="is not an export"):
        TarFile(export)


def test_flipped_bytes_never_end_in_a_foreign_error(export: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = export.read_bytes()
    path = tmp_path / "flipped.tar"
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(2048)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            tar = TarFile(path)
            tar.read("config.json")
        except RegistryError:
            continue
