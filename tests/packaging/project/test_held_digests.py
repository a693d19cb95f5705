"""A locked release keeps its digests, whatever the registry lists now; and no release gets lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import IntegrityError
from composable.interface import RouterInterface
from composable.packaging import (
    Project,
    Registry,
    Requirement,
    Version,
    lock_project,
    open_for_publishing,
)
from composable.packaging.project.edits import add_experts, compare_locks, refresh_lock
from composable.packaging.project.queries import find_outdated

MakeExpert = Callable[..., Path]
Lock = Callable[[Project, RouterInterface], object]


@pytest.fixture
def world(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface, project: Project
) -> Project:
    """Return a locked project with `german`, which requires `french`; there is `dutch`, too."""
    fill(registry, make_expert, interface)
    project = project.add(Requirement.parse("german"))
    lock_project(project, interface)
    return project


def fill(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    *,
    seeds: dict[str, int] | None = None,
    german: tuple[str, ...] = ("1.0.0", "1.1.0"),
) -> None:
    """Publish the same releases; with `seeds`, those of some experts have other tensors."""
    seeds = seeds or {}
    for version in german:
        folder = make_expert(
            "german", version, requires={"french": "^1"}, seed=seeds.get("german", 0)
        )
        registry.publish(folder, interface=interface)
    for name in ("french", "dutch"):
        registry.publish(make_expert(name, seed=seeds.get(name, 0)), interface=interface)


def replace(project: Project, make_expert: MakeExpert, interface: RouterInterface, **how: object):
    """Make the registry anew, consistently, with other content."""
    root = project.root.parent / "registry"
    shutil.rmtree(root)
    fill(open_for_publishing(root), make_expert, interface, **how)


WAYS: dict[str, Lock] = {
    "lock": lock_project,
    "lock --upgrade": lambda p, i: lock_project(p, i, upgrade=True),
    "upgrade german": lambda p, i: lock_project(p, i, upgrade={"german"}),
    "upgrade french": lambda p, i: lock_project(p, i, upgrade={"french"}),
    "dry run": lambda p, i: lock_project(p, i, upgrade=True, is_dry_run=True),
    "add another": lambda p, i: add_experts(
        p, {"dutch": p.add(Requirement.parse("dutch")).experts["dutch"]}, i
    ),
    "sync after an edit": lambda p, i: refresh_lock(p.add(Requirement.parse("dutch")), i),
    "outdated": lambda p, i: find_outdated(p, p.lock, i),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["german", "french"])
def test_other_content_under_a_locked_version_is_refused(
    world: Project, make_expert: MakeExpert, interface: RouterInterface, name: str, way: str
) -> None:
    before = world.lock
    assert before is not None
    replace(world, make_expert, interface, seeds={name: 9})
    with pytest.raises(IntegrityError, match=f"{name} 1.*has other content") as caught:
        WAYS[way](world, interface)
    assert world.lock == before
    now = open_for_publishing(world.root.parent / "registry").versions(name)[-1]
    assert str(before[name].manifest) in caught.value.message
    assert now.manifest in caught.value.message
    assert caught.value.hint is not None
    assert f"`composable lock --forget {name}`" in caught.value.hint


def test_several_are_named_at_once_and_forgetting_them_cures(
    world: Project, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    before = world.lock
    replace(world, make_expert, interface, seeds={"german": 9, "french": 9})
    with pytest.raises(IntegrityError) as caught:
        lock_project(world, interface)
    assert "`composable lock --forget french --forget german`" in str(caught.value.hint)
    with pytest.raises(IntegrityError, match="french"):
        lock_project(world, interface, forget=["german"])
    after = lock_project(world, interface, forget=["german", "french"])
    assert after.versions == before.versions  # type: ignore[union-attr]
    changes = compare_locks(before, after)
    assert [change.name for change in changes] == ["french", "german"]
    assert all(change.digest_before != change.digest_after for change in changes)
    assert lock_project(world, interface) == after


def test_a_mirror_must_have_the_same_content(
    world: Project, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    """Another location under the same name is the same source; another name is another one."""
    before = world.lock
    assert before is not None
    shutil.copytree(world.root.parent / "registry", world.root.parent / "same")
    fill(
        open_for_publishing(world.root.parent / "other"),
        make_expert,
        interface,
        seeds={"german": 9},
    )
    text = world.path.read_text()
    world.path.write_text(text.replace("../registry", "../same"))
    assert lock_project(Project.read(world.root), interface).digests() == before.digests()
    world.path.write_text(text.replace("../registry", "../other"))
    with pytest.raises(IntegrityError, match="has other content"):
        lock_project(Project.read(world.root), interface)
    world.path.write_text(text.replace("local =", "mine ="))  # the same place by another name
    assert lock_project(Project.read(world.root), interface).digests() == before.digests()
    world.path.write_text(text.replace('local = "../registry"', 'else = "../other"'))
    lock = lock_project(Project.read(world.root), interface)
    assert compare_locks(before, lock)[0].name == "german"


def test_a_version_that_goes_up_may_have_any_content(
    world: Project, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    replace(world, make_expert, interface, german=("1.0.0", "1.1.0", "1.2.0"))
    lock = lock_project(world, interface, upgrade=True)
    assert str(lock.versions["german"]) == "1.2.0"


@pytest.mark.parametrize("is_upgrade", [False, True])
def test_a_registry_that_lost_a_locked_release_sets_nothing_back(
    world: Project, make_expert: MakeExpert, interface: RouterInterface, is_upgrade: bool
) -> None:
    before = world.lock
    replace(world, make_expert, interface, german=("1.0.0",))
    with pytest.raises(IntegrityError, match=r"german 1\.1\.0 is locked, but .* no longer lists"):
        lock_project(world, interface, upgrade=is_upgrade)
    assert world.lock == before
    asked_for = world.add(Requirement.parse("german<1.1"))
    assert str(lock_project(asked_for, interface, is_dry_run=True).versions["german"]) == "1.0.0"
    lock = lock_project(world, interface, forget=["german"])
    assert str(lock.versions["german"]) == "1.0.0"


def test_a_yank_is_no_loss(world: Project, registry: Registry, interface: RouterInterface) -> None:
    registry.yank("german", Version("1.1.0"))
    assert str(lock_project(world, interface).versions["german"]) == "1.1.0"
    assert str(lock_project(world, interface, upgrade=True).versions["german"]) == "1.0.0"


def test_a_folder_may_change(
    project: Project, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert()
    wanted = {"german": project.add(Requirement.parse("german"), path=str(folder))}
    project = wanted["german"]
    before = lock_project(project, interface)
    (folder / "README.md").write_text("other")
    after = lock_project(project, interface)
    (change,) = compare_locks(before, after)
    assert (change.before, change.after) == (Version("1.0.0"), Version("1.0.0"))
    assert change.digest_before != change.digest_after
