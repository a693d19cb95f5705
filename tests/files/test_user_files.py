"""Edits of the user's files: links, permissions, line endings and byte order marks stay."""

import stat

import pytest

from composable.errors import DiskError
from composable.files.user_files import match_style, replace_text


def test_a_link_is_followed(tmp_path):
    (tmp_path / "shared").mkdir()
    target = tmp_path / "shared/a.toml"
    target.write_text("old\n")
    (tmp_path / "middle").symlink_to("shared/a.toml")
    link = tmp_path / "a.toml"
    link.symlink_to(tmp_path / "middle")
    assert replace_text(link, "new\n")
    assert link.is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert target.read_text() == "new\n"
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["a.toml"]


def test_a_link_to_a_file_that_does_not_exist_yet(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "a.lock").symlink_to("shared/a.lock")
    assert replace_text(tmp_path / "a.lock", "new\n")
    assert (tmp_path / "shared/a.lock").read_text() == "new\n"
    assert not (tmp_path / "shared/a.lock").is_symlink()


@pytest.mark.parametrize("leads_to", ["a.toml", "no/such/folder/a.toml"])
def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path, leads_to):
    (tmp_path / "a.toml").symlink_to(leads_to)
    with pytest.raises(DiskError, match="link that leads nowhere"):
        replace_text(tmp_path / "a.toml", "new\n")
    assert str((tmp_path / "a.toml").readlink()) == leads_to
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_permissions_stay(tmp_path, mode):
    path = tmp_path / "a.toml"
    path.write_text("old\n")
    path.chmod(mode)
    replace_text(path, "new\n")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new\n"


@pytest.mark.parametrize(
    "before",
    [b"a\n", b"a\r\nb\r\n", b"\xef\xbb\xbfa\n", b"\xef\xbb\xbfa\r\n", b"", b"a", b"\xff\r\n"],
)
def test_the_same_text_is_not_written_again(tmp_path, before):
    path = tmp_path / "a.toml"
    path.write_bytes(before)
    replace_text(path, "x = 1\ny = 2\n")
    written = path.read_bytes()
    assert written.startswith(b"\xef\xbb\xbf") == before.startswith(b"\xef\xbb\xbf")
    assert (b"\r\n" in written) == (b"\r\n" in before)
    inode = path.stat().st_ino
    assert not replace_text(path, "x = 1\ny = 2\n")
    assert path.stat().st_ino == inode


def test_mixed_line_endings_are_left_to_the_text():
    assert match_style("a\r\nb\n", "x\r\ny\n") == "a\r\nb\n"
