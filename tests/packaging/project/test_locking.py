"""From project to lock to environment: preferences, yanks, digests, bindings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import IntegrityError, LockError, ResolutionError, UnknownExpertError
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.packaging import (
    Lock,
    Project,
    Registry,
    Requirement,
    Store,
    Version,
    lock_project,
    open_for_publishing,
    sync_project,
)
from composable.packaging.project.sources import find_expert

MakeExpert = Callable[..., Path]


@pytest.fixture
def publish(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> Callable[..., None]:
    def publish(name: str, *versions: str, **options: object) -> None:
        for version in versions:
            registry.publish(make_expert(name, version, **options), interface=interface)

    return publish


def test_a_lock_is_kept_until_upgraded(
    publish: Callable[..., None], project: Project, interface: RouterInterface
) -> None:
    publish("german", "1.0.0")
    publish("french", "1.0.0")
    project = project.add(Requirement.parse("german^1")).add(Requirement.parse("french^1"))
    first = lock_project(project, interface)
    before = project.lock_path.read_bytes()
    publish("german", "1.1.0")
    publish("french", "1.1.0")
    assert lock_project(project, interface) == first
    assert project.lock_path.read_bytes() == before
    assert lock_project(project, interface, upgrade=True, is_dry_run=True) != first
    assert project.lock_path.read_bytes() == before
    one = lock_project(project, interface, upgrade={"german"})
    assert {n: str(v) for n, v in one.versions.items()} == {"french": "1.0.0", "german": "1.1.0"}
    both = lock_project(project, interface, upgrade=True)
    assert {str(version) for version in both.versions.values()} == {"1.1.0"}


def test_the_same_inputs_give_the_same_bytes(
    publish: Callable[..., None], project: Project, interface: RouterInterface, tmp_path: Path
) -> None:
    publish("base", "1.0.0")
    publish("german", "1.0.0", requires={"base": "^1"})
    project = project.add(Requirement.parse("german"))
    text = lock_project(project, interface).to_toml()
    project.lock_path.unlink()
    assert lock_project(Project.read(project.root), interface).to_toml() == text
    assert str(tmp_path) not in text, "nothing of this machine is in a lock"
    lock = Lock.read(project.root)
    assert lock["german"].wanted_by == ("composable.toml: *",)
    assert lock["base"].wanted_by == ("german 1.0.0: ^1",)
    assert lock["base"].interface == interface.digest
    assert lock.registries == {"local": "../registry"}


def test_yanked_only_when_locked_or_pinned(
    publish: Callable[..., None],
    project: Project,
    interface: RouterInterface,
    registry: Registry,
) -> None:
    publish("german", "1.0.0", "1.1.0")
    project = project.add(Requirement.parse("german"))
    lock = lock_project(project, interface)
    registry.yank("german", Version("1.1.0"))
    assert lock_project(project, interface) == lock, "what is locked stays"
    assert str(lock_project(project, interface, upgrade=True)["german"].version) == "1.0.0"
    project = project.add(Requirement.parse("german@1.1.0"))
    assert str(lock_project(project, interface)["german"].version) == "1.1.0"
    project.lock_path.unlink()
    project = project.add(Requirement.parse("german>1.0.0"))
    with pytest.raises(ResolutionError, match=r"german 1\.1\.0 was yanked") as caught:
        lock_project(project, interface)
    assert "german==1.1.0" in str(caught.value)


def test_a_digest_that_is_not_honoured_is_refused(
    publish: Callable[..., None], project: Project, interface: RouterInterface, store: Store
) -> None:
    publish("german", "1.0.0")
    project = project.add(Requirement.parse("german"))
    lock = lock_project(project, interface)
    changed = dataclasses.replace(interface, version="1.3.0", discount=0.5)
    with pytest.raises(ResolutionError, match=r"was trained against router interface sha256:"):
        lock_project(project, changed)
    with pytest.raises(LockError, match="does not honour"):
        sync_project(project, lock, store, interface=changed)
    honouring = dataclasses.replace(changed, honours=(interface.digest,))
    assert lock_project(project, honouring)["german"].interface == interface.digest


def test_an_interface_out_of_range_is_refused(
    publish: Callable[..., None], project: Project, interface: RouterInterface
) -> None:
    publish("german", "1.0.0")
    project = project.add(Requirement.parse("german"))
    other = dataclasses.replace(interface, version="2.0.0", honours=(interface.digest,))
    with pytest.raises(ResolutionError) as caught:
        lock_project(project, other)
    story = str(caught.value)
    assert "Your backbone's router interface is tiny-bytes 2.0.0." in story
    assert "german 1.0.0 needs router interface tiny-bytes ^1." in story
    assert "use a backbone whose router interface is tiny-bytes ^1" in story
    unchecked = lock_project(project, None)
    assert unchecked.interface is None


def test_exclude_newer(
    publish: Callable[..., None], project: Project, interface: RouterInterface
) -> None:
    publish("german", "1.0.0")
    project = project.add(Requirement.parse("german"))
    assert lock_project(project, interface, exclude_newer="2999-01-01T00:00:00Z")
    with pytest.raises(ResolutionError, match="was published at"):
        lock_project(project, interface, exclude_newer="2000-01-01T00:00:00Z")


def test_a_name_comes_from_one_registry_only(
    publish: Callable[..., None],
    make_expert: MakeExpert,
    project: Project,
    interface: RouterInterface,
    tmp_path: Path,
) -> None:
    """A higher version in another registry is never taken: no dependency confusion."""
    publish("german", "1.0.0")
    open_for_publishing(tmp_path / "team").publish(
        make_expert("german", "9.0.0"), interface=interface
    )
    project.path.write_text(
        '[project]\nbackbone = "tiny-bytes"\nregistry = "local"\n'
        '[registries]\nlocal = "../registry"\nteam = "../team"\n[experts]\ngerman = "*"\n'
    )
    project = Project.read(project.root)
    assert str(lock_project(project, interface)["german"].version) == "1.0.0"
    project = project.add(Requirement.parse("german"), registry="team")
    lock = lock_project(project, interface)
    assert (str(lock["german"].version), lock["german"].registry) == ("9.0.0", "team")
    assert lock.registries == {"team": "../team"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p.add(Requirement.parse("french")), "french is required but not locked"),
        (lambda p: p.add(Requirement.parse("german^2")), r"german \^2 is required, but 1.0.0"),
    ],
)
def test_a_stale_lock_is_refused(
    publish: Callable[..., None],
    project: Project,
    interface: RouterInterface,
    store: Store,
    edit: Callable[[Project], Project],
    message: str,
) -> None:
    publish("german", "1.0.0")
    project = project.add(Requirement.parse("german"))
    lock_project(project, interface)
    with pytest.raises(LockError, match=message) as caught:
        sync_project(edit(project), store=store)
    assert caught.value.hint == "run `composable lock`"


def test_a_lock_that_is_not_closed_is_refused(
    publish: Callable[..., None], project: Project, interface: RouterInterface, store: Store
) -> None:
    publish("base", "1.0.0")
    publish("german", "1.0.0", requires={"base": "^1"})
    project = project.add(Requirement.parse("german"))
    lock = lock_project(project, interface)
    without = dataclasses.replace(lock, experts=(lock["german"],))
    with pytest.raises(LockError, match=r"german 1\.0\.0 requires base \^1"):
        sync_project(project, without, store)
    elsewhere = dataclasses.replace(lock, registries={"local": "/elsewhere"})
    with pytest.raises(LockError, match="no longer at"):
        sync_project(project, elsewhere, store)


@pytest.mark.parametrize("file", ["body.safetensors", "README.md", "expert.toml"])
def test_bytes_that_were_not_promised_never_get_in(
    publish: Callable[..., None],
    project: Project,
    interface: RouterInterface,
    registry: Registry,
    store: Store,
    file: str,
) -> None:
    publish("german", "1.0.0")
    project = project.add(Requirement.parse("german"))
    lock = lock_project(project, interface)
    digests = {entry.name: entry.digest for entry in lock["german"].files}
    path = registry.storage.root / blob_path(digests.get(file, lock["german"].manifest))
    good = path.read_bytes()
    path.chmod(0o644)
    for bad in (good[:-1], good + b"x", good[:-1] + bytes([good[-1] ^ 1]), b""):
        path.write_bytes(bad)
        with pytest.raises(IntegrityError, match=f"german 1.0.0 {file} from"):
            sync_project(project, lock, store)
        assert project.environment.current is None
    path.write_bytes(good)
    assert sync_project(project, lock, store).holds(lock)


def test_files_are_fetched_once_for_all_projects(
    publish: Callable[..., None],
    project: Project,
    interface: RouterInterface,
    store: Store,
    registry: Registry,
    tmp_path: Path,
) -> None:
    publish("german", "1.0.0")
    lock = lock_project(project.add(Requirement.parse("german")), interface)
    sync_project(Project.read(project.root), lock, store)
    second = Project.create(tmp_path / "second", "tiny-bytes", {"local": "../registry"})
    second = second.add(Requirement.parse("german"))
    lock = lock_project(second, interface)
    for blob in registry.storage.root.glob("blobs/*/*"):
        blob.unlink()
    assert sync_project(second, lock, store).holds(lock)


def test_progress_reports_bytes_and_experts(
    publish: Callable[..., None], project: Project, interface: RouterInterface, store: Store
) -> None:
    publish("german", "1.0.0")
    project = project.add(Requirement.parse("german"))
    events: list[tuple[str, int, int]] = []
    lock = lock_project(project, interface)
    sync_project(project, lock, store, progress=lambda *event: events.append(event))
    body = next(f for f in lock["german"].files if f.name == "body.safetensors")
    assert ("german 1.0.0 body.safetensors", body.size, body.size) in events
    assert events[-1] == ("install", 1, 1)


def test_find_expert(publish: Callable[..., None], project: Project) -> None:
    publish("german", "1.0.0", "1.1.0")
    assert [str(r.version) for r in find_expert(project, "german")] == ["1.0.0", "1.1.0"]
    with pytest.raises(UnknownExpertError) as caught:
        find_expert(project, "germn")
    assert caught.value.hint == "did you mean 'german'?"
