"""A policy for licences: resolved like versions, held by locks, installs and verification."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import LockError, ManifestError, ResolutionError
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
from composable.packaging.project.edits import refresh_lock
from composable.packaging.project.locking import check_lock
from composable.packaging.project.verification import verify_everything
from composable.packaging.registry.lines import format_document, parse_line

Publish = Callable[..., None]


@pytest.fixture
def publish(registry: Registry, make_expert: Callable[..., Path], interface: RouterInterface):
    def publish(name: str, version: str, license_: str | None, **options: object) -> None:
        folder = make_expert(name, version, license_=license_, **options)
        registry.publish(folder, interface=interface)

    return publish


def allow(project: Project, *licenses: str) -> Project:
    """Write a policy into the project file."""
    text = project.path.read_text().partition("\n[policy]")[0]
    project.path.write_text(f"{text}\n[policy]\nlicenses = {json.dumps(licenses)}\n")
    return Project.read(project.root)


def require(project: Project, *texts: str) -> Project:
    for text in texts:
        project = project.add(Requirement.parse(text))
    return project


def forget_licenses(registry: Registry, name: str) -> None:
    """Write an index as it was written before 0.3."""
    path = registry.storage.root / "index" / name[:2] / f"{name}.jsonl"
    rows = [parse_line(line, "") for line in path.read_bytes().splitlines()]
    for row in rows:
        del row["license"], row["whole"]
    path.write_bytes(format_document(rows))


def test_a_refused_licence_is_no_candidate(
    publish: Publish, project: Project, interface: RouterInterface
) -> None:
    publish("german", "1.0.0", "MIT OR GPL-3.0-only")
    publish("german", "1.1.0", "GPL-3.0-only")
    project = require(project, "german")
    assert str(lock_project(project, interface, is_dry_run=True)["german"].version) == "1.1.0"
    lock = lock_project(allow(project, "MIT", "Apache-2.0"), interface)
    assert str(lock["german"].version) == "1.0.0"
    assert lock["german"].license == "MIT OR GPL-3.0-only"
    assert Lock.read(project.root) == lock


def test_what_is_left_is_explained(
    publish: Publish, project: Project, interface: RouterInterface
) -> None:
    publish("german", "1.0.0", "MIT")
    publish("german", "2.0.0", "GPL-3.0-only AND CC-BY-4.0")
    project = allow(require(project, "german^2"), "MIT", "Apache-2.0", "CC-BY-4.0")
    with pytest.raises(ResolutionError) as caught:
        lock_project(project, interface)
    story, _, changes = str(caught.value).partition("would solve it")
    assert "german 2.0.0 has the licence GPL-3.0-only AND CC-BY-4.0" in story
    assert "[policy] in composable.toml does not allow" in story
    assert "allow GPL-3.0-only under [policy] in composable.toml" in changes
    assert "require german 1.0.0 instead of ^2" in changes
    allowed = allow(project, "MIT", "Apache-2.0", "CC-BY-4.0", "GPL-3.0-only")
    assert str(lock_project(allowed, interface)["german"].version) == "2.0.0"


def test_dependencies_count_and_all_their_licences_are_named(
    publish: Publish, project: Project, interface: RouterInterface
) -> None:
    publish("base", "1.0.0", "CC-BY-NC-4.0")
    publish("german", "1.0.0", "GPL-3.0-only", requires={"base": "^1"})
    project = allow(require(project, "german"), "MIT", "Apache-2.0")
    with pytest.raises(ResolutionError) as caught:
        lock_project(project, interface)
    changes = str(caught.value).partition("would solve it")[2]
    assert "allow GPL-3.0-only under" in changes
    assert "allow CC-BY-NC-4.0 under" in changes
    allowed = allow(project, "Apache-2.0", "GPL-3.0-only", "CC-BY-NC-4.0")
    assert lock_project(allowed, interface).versions.keys() == {"base", "german"}


def test_another_expert_on_the_same_subject_is_suggested(
    publish: Publish, project: Project, interface: RouterInterface, registry: Registry
) -> None:
    """Only one that fits the policy, and that shares a tag in the catalogue."""
    publish("german", "1.0.0", "GPL-3.0-only", domains=("law", "german"))
    publish("deutsch", "1.3.0", "MIT", domains=("german",))
    publish("juris", "1.0.0", "CC-BY-NC-4.0", domains=("law", "german"))
    publish("french", "1.0.0", "MIT", domains=("french",))
    project = allow(require(project, "german^1"), "MIT", "Apache-2.0")
    with pytest.raises(ResolutionError) as caught:
        lock_project(project, interface)
    changes = str(caught.value).partition("would solve it")[2]
    assert "allow GPL-3.0-only under" in changes
    assert "require deutsch 1.3.0 instead of german: both are about german" in changes
    assert "juris" not in changes, "its licence is refused too"
    assert "french" not in changes


@pytest.mark.parametrize(
    ("license_", "said"),
    [(None, "states no licence"), ("choose a licence", "which is not an SPDX expression")],
)
def test_a_missing_or_unknown_licence_is_refused_and_never_defaulted(
    publish: Publish,
    project: Project,
    interface: RouterInterface,
    license_: str | None,
    said: str,
) -> None:
    publish("german", "1.0.0", license_)
    project = require(project, "german")
    lock_project(project, interface)
    with pytest.raises(ResolutionError, match=said):
        lock_project(allow(project, "MIT", "Apache-2.0"), interface)


def test_a_locked_release_is_held_against_the_policy(
    publish: Publish, project: Project, interface: RouterInterface, store: Store
) -> None:
    publish("german", "1.0.0", "MIT")
    publish("german", "1.1.0", "GPL-3.0-only")
    project = require(project, "german")
    lock = lock_project(project, interface)
    sync_project(project, lock, store, interface=interface)
    assert verify_everything(store).refused == {}
    strict = allow(project, "MIT", "Apache-2.0")
    for act in (
        lambda: check_lock(strict, lock, interface),
        lambda: sync_project(strict, lock, store, interface=interface),
    ):
        with pytest.raises(LockError, match=r"german 1\.1\.0 has the licence GPL-3\.0-only"):
            act()
    (told,) = verify_everything(store).refused[project.root]
    assert "german 1.1.0 has the licence GPL-3.0-only" in told
    fitting = refresh_lock(strict, interface)
    assert str(fitting["german"].version) == "1.0.0"
    sync_project(strict, fitting, store, interface=interface)
    assert verify_everything(store).refused == {}


def test_the_backbone_counts(
    publish: Publish, project: Project, interface: RouterInterface
) -> None:
    publish("german", "1.0.0", "MIT")
    project = require(project, "german")
    lock = lock_project(project, interface)
    strict = allow(project, "MIT")
    said = r"the backbone tiny-bytes .* has the licence Apache-2\.0"
    with pytest.raises(LockError, match=said):
        check_lock(strict, lock, interface)
    with pytest.raises(ResolutionError, match=said):
        lock_project(strict, interface)


def test_registries_and_locks_without_licences(
    publish: Publish,
    project: Project,
    registry: Registry,
    interface: RouterInterface,
    store: Store,
) -> None:
    """Indexes of before 0.3 do not repeat the licence; then the manifest has it."""
    publish("german", "1.0.0", "MIT")
    publish("german", "1.1.0", "GPL-3.0-only")
    forget_licenses(registry, "german")
    project = require(project, "german")
    lock = lock_project(project, interface)
    assert lock["german"].license is None
    assert "license" not in lock.to_toml()
    sync_project(project, lock, store, interface=interface)
    strict = allow(project, "GPL-3.0-only", "Apache-2.0")
    with pytest.raises(LockError, match="states no licence"):
        check_lock(strict, lock, interface)
    again = refresh_lock(strict, interface)
    assert (str(again["german"].version), again["german"].license) == ("1.1.0", "GPL-3.0-only")
    only_mit = lock_project(allow(project, "MIT", "Apache-2.0"), interface, is_dry_run=True)
    assert str(only_mit["german"].version) == "1.0.0"


def test_a_lock_whose_licence_was_edited_is_not_installed(
    publish: Publish, project: Project, interface: RouterInterface, store: Store
) -> None:
    publish("german", "1.0.0", "GPL-3.0-only")
    project = require(project, "german")
    text = lock_project(project, interface).to_toml()
    assert 'license = "GPL-3.0-only"' in text
    edited = Lock.loads(text.replace("GPL-3.0-only", "MIT"))
    with pytest.raises(LockError, match="license is MIT in the lock"):
        sync_project(allow(project, "MIT", "Apache-2.0"), edited, store, interface=interface)


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ('licenses = ["MIT", "Apache"]', "policy.licenses[1]", "'Apache' is not an SPDX"),
        ('licenses = ["MIT OR ISC"]', "policy.licenses[0]", "has several licences"),
        ("licenses = []", "policy.licenses", "at least one"),
        ('licences = ["MIT"]', "policy.licences", "unknown field"),
        ('licenses = "MIT"', "policy.licenses", "is not a list of text"),
    ],
)
def test_a_bad_policy(project: Project, text: str, where: str, said: str) -> None:
    project.path.write_text(f"{project.path.read_text()}\n[policy]\n{text}\n")
    with pytest.raises(ManifestError, match=said) as caught:
        Project.read(project.root)
    assert caught.value.where == f"composable.toml: {where}"
