"""The project file and the lock are the user's: commands edit them in place."""

import pytest

from composable.packaging.install.lock import Lock
from composable.packaging.project.project import Project
from composable.packaging.versions.constraint import Requirement

TEXT = """\
# my experts
[project]
backbone = "tiny-bytes"   # small

[registries]
team = "../registry"

[experts]
# the first
german = "^1"  # keep
"""
STYLES = {
    "plain": lambda text: text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "mark and CRLF": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_project_file_keeps_its_style(tmp_path, style, is_link):
    file = tmp_path / "composable.toml"
    if is_link:
        (tmp_path / "shared").mkdir()
        file.symlink_to("shared/composable.toml")
    file.write_bytes(STYLES[style](TEXT))
    project = Project.read(tmp_path)
    project = project.add(Requirement.parse("physics>=2"))
    assert file.read_bytes() == STYLES[style](TEXT + 'physics = ">=2"\n')
    project = project.add(Requirement.parse("german^2"))
    project = project.remove("physics")
    assert file.read_bytes() == STYLES[style](TEXT.replace('"^1"', '"^2"'))
    assert file.is_symlink() == is_link
    assert project.root == tmp_path


@pytest.mark.parametrize("style", STYLES)
def test_a_lock_keeps_its_style(tmp_path, style):
    (tmp_path / "shared").mkdir()
    path = tmp_path / "composable.lock"
    path.symlink_to("shared/composable.lock")
    path.write_bytes(STYLES[style](Lock(registries={"a": "../a"}).to_toml()))
    assert not Lock.read(path).write(path)
    other = Lock(registries={"b": "../b"})
    assert other.write(path)
    assert path.read_bytes() == STYLES[style](other.to_toml())
    assert path.is_symlink()
    assert Lock.read(path) == other
