"""Verifying everything: each damage is found, each project that it concerns is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import StrayWarning
from composable.interface import RouterInterface
from composable.packaging import (
    Project,
    Registry,
    Requirement,
    Store,
    lock_project,
    sync_project,
)
from composable.packaging.project.edits import prune_store
from composable.packaging.project.verification import find_uses, verify_everything

MakeExpert = Callable[..., Path]


@pytest.fixture
def projects(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    project: Project,
    store: Store,
    tmp_path: Path,
) -> list[Project]:
    """Return three projects with one store; two of them have `german`."""
    for name in ("german", "french"):
        registry.publish(make_expert(name, seed=len(name)), interface=interface)
    made = []
    for folder, name in (("one", "german"), ("two", "german"), ("three", "french")):
        shutil.copytree(project.root, tmp_path / folder)
        made.append(Project.read(tmp_path / folder).add(Requirement.parse(name)))
        sync_project(made[-1], lock_project(made[-1], interface), store)
    return made


def flip(path: Path) -> None:
    """Flip a bit as a disk does: no time changes."""
    before = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def installed(project: Project, expert: str = "german") -> Path:
    return project.environment.expert_path(expert) / "body.safetensors"


def test_nothing_is_damaged(projects: list[Project], store: Store) -> None:
    damage = verify_everything(store)
    assert (damage.corrupt, damage.installed, damage.projects) == ((), {}, [])


def test_damage_in_the_store_names_every_project(projects: list[Project], store: Store) -> None:
    one, two, three = projects
    whole = installed(one).read_bytes()
    for digest in store.digests():
        if store.path(digest).stat().st_size == len(whole):
            flip(store.path(digest))
    damage = verify_everything(store)
    assert damage.projects == sorted(project.root for project in projects)
    files = {(use.project, use.file) for uses in damage.uses.values() for use in uses}
    assert (one.root, "german 1.0.0 body.safetensors") in files
    assert (two.root, "german 1.0.0 body.safetensors") in files
    assert (three.root, "french 1.0.0 body.safetensors") in files
    for project in projects:
        sync_project(project, store=store)
    assert installed(one).read_bytes() == whole
    assert verify_everything(store).projects == []


def test_damage_in_another_project_is_found_and_mended(
    projects: list[Project], store: Store
) -> None:
    other = projects[1]
    whole = installed(other).read_bytes()
    installed(other).unlink()
    installed(other).write_bytes(whole[::-1])
    damage = verify_everything(store, [projects[0].root])
    assert damage.corrupt == ()
    assert damage.projects == [other.root]
    assert [path.name for path in damage.installed[other.root]] == ["body.safetensors"]
    sync_project(other, store=store)
    assert installed(other).read_bytes() == whole


def test_a_project_that_cannot_be_read_does_not_hide_the_others(
    projects: list[Project], store: Store
) -> None:
    one, two, three = projects
    (one.environment.root / "current").write_text("99")
    shutil.rmtree(three.root)
    installed(two).unlink()
    damage = verify_everything(store)
    assert damage.projects == [two.root]
    assert list(damage.unverified) == [one.root]


@pytest.mark.parametrize(
    "stray",
    [
        "blobs/.DS_Store",
        "blobs/ab",
        "blobs/aa/._x",
        "projects/Thumbs.db",
        "partial/desktop.ini",
    ],
)
@pytest.mark.parametrize("content", [b"", b"x", None])
def test_strays_in_the_store_are_named(
    projects: list[Project], store: Store, stray: str, content: bytes | None
) -> None:
    path = store.root / stray
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    else:
        os.mkfifo(path)
    with pytest.warns(StrayWarning, match=path.name):
        assert verify_everything(store).projects == []
        assert prune_store(store, older_than_seconds=-1).digests == ()
        assert store.size() == sum(store.path(d).stat().st_size for d in store.digests())
    assert path.exists()


def test_a_copied_project_record_is_a_stray(projects: list[Project], store: Store) -> None:
    first = min((store.root / "projects").iterdir())
    shutil.copy(first, store.root / "projects" / ("0" * 32))
    with pytest.warns(StrayWarning, match="0" * 32):
        assert store.projects() == sorted(project.root for project in projects)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_blob_that_is_no_regular_file(
    projects: list[Project], store: Store, put: Callable[[Path], object]
) -> None:
    path = store.path(store.digests()[0])
    path.unlink()
    put(path)
    assert not store.has(store.digests()[0])
    damage = verify_everything(store)
    assert [blob.found for blob in damage.corrupt] == ["not a regular file"]
    assert damage.projects
    put(path)  # again: what is in quarantine is replaced
    assert len(verify_everything(store).corrupt) == 1
    assert verify_everything(store).corrupt == ()


def test_files_of_installed_generations_are_kept_without_links(
    projects: list[Project], store: Store
) -> None:
    """Where files are cloned, no link tells that a blob is in use."""
    for digest in store.digests():
        path = store.path(digest)
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert store.linked() == set()
    assert all(use.is_installed for uses in find_uses(store).values() for use in uses)
    assert prune_store(store, older_than_seconds=-1).digests == ()
