"""Registries in shared folders: strays block nothing, claims end with a failed publication."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import PackagingError, RegistryError, StrayWarning
from composable.interface import RouterInterface
from composable.packaging import Registry, Version
from composable.packaging.manifests.toml import MAX_TOML_BYTES
from composable.packaging.versions.names import confusable_key

MakeExpert = Callable[..., Path]


@pytest.fixture
def root(registry: Registry, make_expert: MakeExpert, interface: RouterInterface) -> Path:
    """Return the folder of a registry with two releases of `german`."""
    for seed, version in enumerate(("1.0.0", "1.2.0")):
        registry.publish(make_expert(version=version, seed=seed), interface=interface)
    return Path(registry.location)


def versions(registry: Registry) -> list[str]:
    return [str(release.version) for release in registry.versions("german")]


@pytest.mark.parametrize(
    "stray",
    [
        "1.2.0 (conflicted copy).json",
        "1.2.0 (2).json",
        "1.2.0.json.bak",
        "1.2.json",
        "01.2.0.json",
        "1.2.0+copy.json",
        "._1.2.0.json",
        ".DS_Store",
        "Thumbs.db",
        "1.2.0 (conflicted copy).yanked",
        "\x1b[31m.json",
    ],
)
def test_a_stray_record_is_named_and_blocks_nothing(
    registry: Registry,
    root: Path,
    stray: str,
    make_expert: MakeExpert,
    interface: RouterInterface,
) -> None:
    folder = root / "records" / "german"
    shutil.copy(folder / "1.2.0.json", folder / stray)
    with pytest.warns(StrayWarning) as found:
        assert versions(registry) == ["1.0.0", "1.2.0"]
    assert {warning.message.name for warning in found} == {stray}
    with pytest.warns(StrayWarning):
        registry.yank("german", Version("1.0.0"))
        registry.publish(make_expert(version="1.3.0", seed=3), interface=interface)
        assert versions(registry) == ["1.0.0", "1.2.0", "1.3.0"]
        assert [release.is_yanked for release in registry.versions("german")] == [
            True,
            False,
            False,
        ]


def test_a_folder_among_the_records(registry: Registry, root: Path) -> None:
    (root / "records" / "german" / "1.4.0.json").mkdir()
    with pytest.warns(StrayWarning, match=r"1\.4\.0\.json"):
        assert versions(registry) == ["1.0.0", "1.2.0"]


def test_a_record_under_the_name_of_another_version(
    registry: Registry, root: Path, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = root / "records" / "german"
    shutil.copy(folder / "1.2.0.json", folder / "1.3.0.json")
    with pytest.warns(StrayWarning, match=r"1\.3\.0\.json"):
        assert versions(registry) == ["1.0.0", "1.2.0"]
    with pytest.warns(StrayWarning):  # what was copied there is replaced by the release itself
        registry.publish(make_expert(version="1.3.0", seed=3), interface=interface)
    assert versions(registry) == ["1.0.0", "1.2.0", "1.3.0"]


@pytest.mark.parametrize("content", [b"", b"\x00\x05\x16\x07", b"german", b"German!", b"a" * 100])
@pytest.mark.parametrize("name", ["zzz", "._german", ".DS_Store", "german (conflicted copy)"])
def test_a_stray_name_is_named_and_blocks_nothing(
    registry: Registry,
    root: Path,
    name: str,
    content: bytes,
    make_expert: MakeExpert,
    interface: RouterInterface,
) -> None:
    (root / "names" / name).write_bytes(content)
    with pytest.warns(StrayWarning) as found:
        registry.publish(make_expert("french"), interface=interface)
    assert {warning.message.name for warning in found} == {name}
    assert registry.names() == ["french", "german"]


def test_a_claim_that_a_crash_left_empty_is_replaced(
    registry: Registry, root: Path, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    claim = root / "names" / confusable_key("french")
    claim.write_bytes(b"")
    with pytest.warns(StrayWarning):
        registry.publish(make_expert("french"), interface=interface)
    assert claim.read_bytes() == b"french"


def break_folder(path: Path) -> None:
    """Put a file where a folder is expected."""
    if path.is_dir():
        shutil.move(path, path.with_name("aside"))
    path.write_bytes(b"")


def mend_folder(path: Path) -> None:
    path.unlink()
    if path.with_name("aside").is_dir():
        shutil.move(path.with_name("aside"), path)


@pytest.mark.parametrize("broken", ["blobs", "records/set-mm"])
def test_a_publication_that_fails_leaves_no_claim(
    registry: Registry,
    root: Path,
    broken: str,
    make_expert: MakeExpert,
    interface: RouterInterface,
) -> None:
    break_folder(root / broken)
    with pytest.raises(PackagingError):
        registry.publish(make_expert("set-mm"), interface=interface)
    mend_folder(root / broken)
    assert not (root / "names" / confusable_key("set-mm")).exists()
    registry.publish(make_expert("set-rnm"), interface=interface)
    assert registry.names() == ["german", "set-rnm"]


def test_a_claim_outlives_a_failure_after_the_record(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RegistryError("no room for the index")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "write_index", fail)
        with pytest.raises(RegistryError, match="no room"):
            registry.publish(make_expert("set-mm"), interface=interface)
    with pytest.raises(RegistryError, match="already published"):
        registry.publish(make_expert("set-rnm"), interface=interface)
    registry.publish(make_expert("set-mm"), interface=interface)
    assert registry.names() == ["set-mm"]


def test_the_claim_of_a_killed_publisher_is_told_apart(
    registry: Registry, root: Path, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    claim = root / "names" / confusable_key("set-mm")
    claim.write_bytes(b"set-mm")
    with pytest.raises(RegistryError, match="was interrupted") as caught:
        registry.publish(make_expert("set-rnm"), interface=interface)
    assert claim.name in str(caught.value.hint)
    claim.unlink()
    registry.publish(make_expert("set-rnm"), interface=interface)


def test_look_alikes_are_refused_before_anything_is_uploaded(
    registry: Registry, root: Path, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    before = sorted(root.rglob("*"))
    with pytest.raises(RegistryError, match="looks like"):
        registry.publish(make_expert("gerrnan", seed=9), interface=interface)
    assert sorted(root.rglob("*")) == before


def test_what_clients_cannot_read_is_refused_before_anything_is_uploaded(
    registry: Registry, root: Path, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert("french", seed=9)
    file = folder / "expert.toml"
    text = file.read_text()
    count = (MAX_TOML_BYTES - len(text) - 100) // 100  # packing adds the files
    authors = ", ".join(f'"{"x" * 96}"' for _ in range(count))
    file.write_text(text.replace("[expert]", f"[expert]\nauthors = [{authors}]"))
    before = sorted(root.rglob("*"))
    with pytest.raises(PackagingError, match=r"bytes|larger|at most"):
        registry.publish(folder, interface=interface)
    assert sorted(root.rglob("*")) == before
