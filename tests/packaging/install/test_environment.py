"""Environments: generations, one pointer, rollback. Killed and crowded ones: see `faults/`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import IntegrityError, LockError, PackagingError
from composable.interface import RouterInterface
from composable.packaging import (
    Lock,
    Project,
    Registry,
    Requirement,
    Store,
    lock_project,
    sync_project,
)
from composable.packaging.install.environment import Environment
from composable.packaging.install.snapshot import SNAPSHOT_FILE
from composable.packaging.registry.lines import format_line

MakeExpert = Callable[..., Path]


@pytest.mark.parametrize("stale", [None, 7])
def test_a_switch_while_the_pointer_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: int | None
) -> None:
    """Another process makes the first generation, or removes an old one, at the worst moment."""
    environment = Environment(tmp_path)
    (tmp_path / "generations" / "8").mkdir(parents=True)
    (tmp_path / "current").write_text("8\n")
    answers = [stale]
    monkeypatch.setattr(environment, "_read_current", lambda: answers.pop() if answers else 8)
    current = environment.current
    assert current is not None and current.number == 8
    monkeypatch.undo()
    (tmp_path / "current").write_text("9\n")
    with pytest.raises(PackagingError, match="does not exist"):
        _ = environment.current


@pytest.fixture
def world(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface, project: Project
) -> Project:
    """Return a project that asks for `german` and `french` from a registry with two of each."""
    for name in ("german", "french"):
        for version in ("1.0.0", "1.1.0"):
            registry.publish(make_expert(name, version, seed=len(name)), interface=interface)
    return project.add(Requirement.parse("german")).add(Requirement.parse("french"))


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in root.rglob("*")
    }


def test_install_and_look(world: Project, interface: RouterInterface, store: Store) -> None:
    environment = world.environment
    assert environment.current is None
    assert environment.lock == Lock()
    assert environment.manifests() == []
    with pytest.raises(PackagingError, match="nothing is installed"):
        environment.expert_path("german")
    lock = lock_project(world, interface)
    sync_project(world, lock, store, interface=interface)
    assert environment.lock == lock
    assert [str(m.version) for m in environment.manifests()] == ["1.1.0", "1.1.0"]
    folder = environment.expert_path("german")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "body.safetensors",
        "expert.toml",
        "scout.safetensors",
    ]
    for file in lock["german"].files:
        assert (folder / file.name).samefile(store.path(file.digest))
    with pytest.raises(PackagingError, match="'dutch' is not installed"):
        environment.expert_path("dutch")


def test_a_second_sync_writes_nothing(
    world: Project, interface: RouterInterface, store: Store, registry: Registry
) -> None:
    lock = lock_project(world, interface)
    sync_project(world, lock, store)
    before = snapshot(world.root), snapshot(store.root)
    registry.storage.root.rename(
        registry.storage.root.parent / "gone"
    )  # and nothing is asked of the registry
    sync_project(world, lock, store)
    assert (snapshot(world.root), snapshot(store.root)) == before


def test_rollback(world: Project, interface: RouterInterface, store: Store) -> None:
    environment = world.environment
    with pytest.raises(PackagingError, match="no previous generation"):
        environment.rollback()
    first = lock_project(world, interface)
    sync_project(world, first, store)
    with pytest.raises(PackagingError, match="no previous generation"):
        environment.rollback()
    world = world.add(Requirement.parse("german<1.1"))
    second = lock_project(world, interface)
    sync_project(world, second, store)
    assert environment.lock == second
    assert environment.rollback().number == 1
    assert environment.lock == first
    assert environment.manifests()[1].version.minor == 1
    sync_project(world, second, store)
    assert environment.lock == second


def test_rollback_passes_over_what_was_never_in_use(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    """A process that was killed before it moved the pointer leaves a generation behind."""
    environment = world.environment
    first = lock_project(world, interface)
    sync_project(world, first, store)
    shutil.copytree(environment.root / "generations" / "1", environment.root / "generations" / "2")
    world = world.add(Requirement.parse("german<1.1"))
    sync_project(world, lock_project(world, interface), store)
    current = environment.current
    assert current is not None
    assert current.number == 3
    assert environment.rollback().number == 1


def test_rollback_to_what_was_damaged_meanwhile_is_refused(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    environment = sync_project(world, lock_project(world, interface), store)
    old = environment.expert_path("german") / "scout.safetensors"
    world = world.add(Requirement.parse("german<1.1"))
    second = lock_project(world, interface)
    sync_project(world, second, store)
    old.chmod(0o644)
    old.write_bytes(bytes(old.stat().st_size))
    with pytest.raises(IntegrityError, match="damaged or missing") as caught:
        environment.rollback()
    assert str(caught.value.where).endswith(old.name)
    assert environment.lock == second


def test_what_was_damaged_in_the_store_is_fetched_anew(
    world: Project, interface: RouterInterface, store: Store, tmp_path: Path
) -> None:
    lock = lock_project(world, interface)
    sync_project(world, lock, store)
    blob = store.path(lock["german"].files[1].digest)
    whole = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(bytes(len(whole)))
    shutil.copytree(world.root, tmp_path / "other", ignore=shutil.ignore_patterns(".composable"))
    other = Project.read(tmp_path / "other")
    environment = sync_project(other, store=store)
    assert (environment.expert_path("german") / "body.safetensors").read_bytes() == whole
    assert store.verify() == []


def test_a_file_that_went_missing_is_put_back(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    (environment.expert_path("german") / "body.safetensors").unlink()
    assert not environment.holds(lock)
    sync_project(world, lock, store)
    assert environment.holds(lock)


def test_a_damaged_pointer_is_mended(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    for text in ("", "99", "../../x", "1; rm"):
        (environment.root / "current").write_text(text)
        with pytest.raises(PackagingError, match="does not exist"):
            _ = environment.current
        sync_project(world, lock, store)
        assert environment.holds(lock)


def test_old_generations_are_forgotten_but_the_last_few(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    environment = world.environment
    for number in range(9):
        world = world.add(Requirement.parse("german<1.1" if number % 2 else "german"))
        sync_project(world, lock_project(world, interface, upgrade=True), store)
        for generation in environment.generations():
            os.utime(generation.path, (0, 0))
    assert [g.number for g in environment.generations()] == [5, 6, 7, 8, 9]


def test_a_store_that_lacks_a_file(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(world, interface)
    with pytest.raises(IntegrityError, match="the store has no") as caught:
        world.environment.install(lock, store)
    assert caught.value.hint == "run `composable sync`"
    assert world.environment.current is None
    assert list((world.environment.root / "generations").iterdir()) == []


def test_a_registry_whose_index_lies_about_a_manifest(
    world: Project, interface: RouterInterface, store: Store, registry: Registry
) -> None:
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for fields in lines:
        del fields["check"], fields["whole"]
        fields["requires"] = {"french": "^1"}
    index.write_bytes(b"\n".join(map(format_line, lines)))
    lock = lock_project(world, interface)
    with pytest.raises(LockError, match="does not match the registry"):
        sync_project(world, lock, store)
    assert world.environment.current is None


def edit_in_place(path: Path, *, keep_time: bool = False) -> None:
    """Flip a bit of a file, as an editor does, or as a disk does if it keeps the time."""
    before = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Put other bytes of the same size and time under a name."""
    before = path.stat()
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [edit_in_place, replace, put_pipe, put_folder, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["expert.toml", "README.md", "body.safetensors"])
def test_sync_notices_and_mends(
    world: Project,
    interface: RouterInterface,
    store: Store,
    name: str,
    damage: Callable[[Path], object],
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    whole = (environment.expert_path("german") / name).read_bytes()
    damage(environment.expert_path("german") / name)
    assert not environment.holds(lock)
    sync_project(world, lock, store)
    assert (environment.expert_path("german") / name).read_bytes() == whole
    assert environment.verify() == []
    assert store.verify() == []


def test_other_projects_notice_an_edit(
    world: Project, interface: RouterInterface, store: Store, tmp_path: Path
) -> None:
    lock = lock_project(world, interface)
    sync_project(world, lock, store)
    shutil.copytree(world.root, tmp_path / "other", ignore=shutil.ignore_patterns(".composable"))
    other = Project.read(tmp_path / "other")
    sync_project(other, store=store)
    path = other.environment.expert_path("german") / "body.safetensors"
    whole = path.read_bytes()
    edit_in_place(world.environment.expert_path("german") / "body.safetensors")
    sync_project(other, store=store)
    path = other.environment.expert_path("german") / "body.safetensors"
    assert path.read_bytes() == whole
    assert other.environment.verify() == []


def test_a_flipped_bit_is_found_before_a_load_and_the_hint_cures(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    edit_in_place(environment.expert_path("german") / "scout.safetensors", keep_time=True)
    assert environment.holds(lock)  # the cheap check cannot know
    with pytest.raises(IntegrityError, match="damaged or missing") as caught:
        environment.require_intact()
    assert "composable sync" in str(caught.value.hint)
    sync_project(world, lock, store)
    environment.require_intact()


def test_an_unchanged_file_is_not_read(
    world: Project, interface: RouterInterface, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    read: list[Path] = []
    current = environment.current
    assert current is not None
    found = current.inspect(find_digest=lambda path: (read.append(path), "")[1])
    assert read == []
    assert found.damaged == ()
    touched = environment.expert_path("german") / "README.md"
    os.utime(touched)  # another time, the same bytes: read once, then recorded again
    assert environment.holds(lock)
    current.inspect(find_digest=lambda path: (read.append(path), "")[1])
    assert read == []


def test_an_environment_of_an_older_version_has_no_snapshot(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    current = environment.current
    assert current is not None
    for content in (None, b"", b"[]", b'{"experts/german/README.md": 7}', b"\xff"):
        (current.path / SNAPSHOT_FILE).unlink()
        if content is not None:
            (current.path / SNAPSHOT_FILE).write_bytes(content)
        assert environment.holds(lock)
        assert json.loads((current.path / SNAPSHOT_FILE).read_bytes())


def test_what_is_installed_is_neither_read_nor_fetched_again(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    shutil.rmtree(store.root / "blobs")
    (environment.expert_path("french") / "README.md").unlink()
    sync_project(world, lock, store)
    assert environment.verify() == []
    french = lock["french"].digests
    assert store.digests() == sorted([french["README.md"], french["expert.toml"]])


def test_strays_among_the_generations(
    world: Project, interface: RouterInterface, store: Store
) -> None:
    lock = lock_project(world, interface)
    environment = sync_project(world, lock, store)
    folder = environment.root / "generations"
    (folder / "9").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    for name in ("007", "1 (copy)", "²"):
        (folder / name).mkdir()
    assert [generation.number for generation in environment.generations()] == [1]
    world = world.add(Requirement.parse("german<1.1"))
    sync_project(world, lock_project(world, interface), store)
    assert environment.verify() == []
