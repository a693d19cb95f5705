"""The audit of a lock against the advisories of its registries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from composable.errors import RegistryError, UnreachableError
from composable.interface import RouterInterface
from composable.packaging import (
    Project,
    Registry,
    Requirement,
    Version,
    lock_project,
    open_for_publishing,
)
from composable.packaging.project.audit import Audit, audit_lock
from composable.packaging.registry.advisories import Advisory
from composable.packaging.versions.constraint import Constraint
from tests.support.servers import run_nginx, run_s3

Publish = Callable[..., None]


def advise(registry: Registry, id_: str, name: str, affected: str, *fixed: str, **more) -> None:
    ranges = (Constraint(affected),) if affected else ()
    advisory = Advisory(
        id=id_,
        name=name,
        kind="poisoned",
        affected=ranges,
        fixed=tuple(map(Version, fixed)),
        text="It has a back door.",
        published="2026-11-24T12:00:00Z",
        **more,
    )
    registry.advise(advisory)


@pytest.fixture
def audit(
    registry: Registry,
    make_expert: Callable[..., Path],
    project: Project,
    interface: RouterInterface,
) -> Callable[..., Audit]:
    """Publish five releases and return a function that locks requirements and audits the lock."""
    for seed, version in enumerate(("1.0.0", "1.1.0", "1.2.0", "2.0.0")):
        registry.publish(make_expert("base", version, seed=seed), interface=interface)
    registry.publish(make_expert("german", requires={"base": "~1.0"}, seed=9), interface=interface)

    def audit(*texts: str) -> Audit:
        wanted = project
        for text in texts:
            wanted = wanted.add(Requirement.parse(text))
        return audit_lock(wanted, lock_project(wanted, interface, is_dry_run=True))

    return audit


def test_a_registry_without_a_feed_is_said(audit: Callable[..., Audit]) -> None:
    assert audit("german") == Audit(findings=(), feeds={"local": None}, without_registry=())


def test_what_is_affected_and_what_fixes_it(
    audit: Callable[..., Audit], registry: Registry
) -> None:
    advise(registry, "base-1", "base", "<1.1", "1.1.0", "2.0.0")
    assert audit("base@1.1.0").findings == ()
    (found,) = audit("base@1.0.0").findings
    assert (found.expert.name, found.advisory.id, str(found.fix)) == ("base", "base-1", "1.1.0")
    assert not found.is_fix_allowed, "the project pins 1.0.0"
    (found,) = audit("german").findings
    assert (str(found.fix), found.is_fix_allowed) == ("1.1.0", False), "german requires ~1.0"


def test_a_fix_that_is_affected_itself_is_none(
    audit: Callable[..., Audit], registry: Registry
) -> None:
    advise(registry, "base-1", "base", "<1.1", "1.1.0")
    advise(registry, "base-2", "base", "=1.1.0", "1.2.0")
    (found,) = audit("base@1.0.0").findings
    assert found.fix is None
    (found,) = audit("base@1.1.0").findings
    assert (found.advisory.id, str(found.fix)) == ("base-2", "1.2.0")
    advise(registry, "base-3", "base", ">=1.2,<2", "2.0.0", "1.0.0")
    (found,) = audit("base@1.2.0").findings
    assert str(found.fix) == "2.0.0", "newer rather than older"


def test_content_is_found_under_any_name(
    audit: Callable[..., Audit],
    registry: Registry,
    make_expert: Callable[..., Path],
    project: Project,
    interface: RouterInterface,
) -> None:
    """A copy of poisoned weights is affected, also from a folder, and has no replacement."""
    (base,) = (release for release in registry.versions("base") if str(release.version) == "1.0.0")
    body = next(file.digest for file in base.files if file.name == "body.safetensors")
    copy = make_expert("copy", "3.0.0")
    project = project.add(Requirement.parse("copy"), path=str(copy))
    project = project.add(Requirement.parse("base@2.0.0"))
    lock = lock_project(project, interface, is_dry_run=True)
    assert audit_lock(project, lock).without_registry == ("copy",)
    assert body in lock["copy"].digests.values()
    advise(registry, "base-1", "base", "", "2.0.0", digests=(body,))
    (found,) = audit_lock(project, lock).findings
    assert (found.expert.name, found.fix) == ("copy", None)


def test_a_registry_speaks_for_its_own_packages_alone(
    audit: Callable[..., Audit],
    registry: Registry,
    make_expert: Callable[..., Path],
    interface: RouterInterface,
    project: Project,
    tmp_path: Path,
) -> None:
    other = open_for_publishing(tmp_path / "other")
    for name in ("base", "french"):
        other.publish(make_expert(name, "1.0.0", seed=9), interface=interface)
    advise(other, "base-1", "base", "*")
    text = project.path.read_text().replace("[registries]", '[registries]\nother = "../other"')
    project.path.write_text(text.replace("[project]", '[project]\nregistry = "local"'))
    wanted = Project.read(project.root).add(Requirement.parse("base"))
    wanted = wanted.add(Requirement.parse("french"), registry="other")
    found = audit_lock(wanted, lock_project(wanted, interface, is_dry_run=True))
    assert found.findings == ()
    assert found.feeds == {"local": None, "other": 1}


def test_a_feed_that_cannot_be_read_is_an_error(
    audit: Callable[..., Audit], registry: Registry
) -> None:
    (registry.storage.root / "advisories.jsonl").write_text("{}\n")
    with pytest.raises(RegistryError, match="damaged"):
        audit("german")


@pytest.fixture
def served(registry: Registry, tmp_path: Path) -> Iterator[str]:
    with run_nginx(tmp_path / "registry", tmp_path / "nginx") as server:
        yield server.url


@pytest.mark.slow
def test_over_http(
    audit: Callable[..., Audit],
    served: str,
    registry: Registry,
    project: Project,
    interface: RouterInterface,
) -> None:
    project.path.write_text(project.path.read_text().replace("../registry", served))
    wanted = Project.read(project.root).add(Requirement.parse("base@1.0.0"))
    lock = lock_project(wanted, interface)
    assert audit_lock(wanted, lock).feeds == {"local": None}
    advise(registry, "base-1", "base", "<1.1", "1.1.0")
    (found,) = audit_lock(wanted, lock).findings
    assert str(found.fix) == "1.1.0"
    (registry.storage.root / "advisories.jsonl").write_text("<html>\n")
    with pytest.raises(UnreachableError, match="damaged"):
        audit_lock(wanted, lock)


@pytest.mark.slow
def test_in_a_bucket(
    make_expert: Callable[..., Path],
    project: Project,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with run_s3() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = "s3://experts/audit"
        bucket = open_for_publishing(url)
        for version in ("1.0.0", "1.1.0"):
            bucket.publish(make_expert("base", version), interface=interface)
        project.path.write_text(project.path.read_text().replace("../registry", url))
        wanted = Project.read(project.root).add(Requirement.parse("base@1.0.0"))
        lock = lock_project(wanted, interface)
        assert audit_lock(wanted, lock).feeds == {"local": None}
        advise(bucket, "base-1", "base", "<1.1", "1.1.0")
        (found,) = audit_lock(wanted, lock).findings
        assert str(found.fix) == "1.1.0"
