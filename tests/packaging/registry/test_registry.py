"""Registries: what is published, what is refused, and publishers at once."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.numpy

from composable.errors import (
    IntegrityError,
    InterfaceError,
    ManifestError,
    RegistryError,
    TensorFileError,
    UnknownExpertError,
    UnreachableError,
)
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.packaging import (
    Manifest,
    Registry,
    Store,
    Version,
    open_for_publishing,
    read_tensors,
)
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.lines import format_line
from composable.packaging.registry.locations import open_registry

MakeExpert = Callable[..., Path]


def all_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "locks" not in path.parts
    }


def test_publish_and_find(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface, store: Store
) -> None:
    manifest = registry.publish(make_expert(requires={"european": "^1"}), interface=interface)
    registry.publish(make_expert("german", "1.10.0"), interface=interface)
    registry.publish(make_expert("german", "1.9.0"), interface=interface)
    assert registry.names() == ["german"]
    releases = registry.versions("german")
    assert [str(release.version) for release in releases] == ["1.0.0", "1.9.0", "1.10.0"]
    first = releases[0]
    assert first.manifest == manifest.digest
    assert first.interface.digest == interface.digest
    assert first.requires == manifest.requires
    assert first.published.endswith("Z")
    assert not first.is_yanked
    assert registry.read_manifest(first) == manifest
    for file in first.files:
        with store.sink(file.digest, file.size) as sink:
            for data in registry.stream(file.digest):
                sink.write(data)
        assert store.has(file.digest, file.size)
    assert registry.versions("nobody") == ()


def test_the_layout_is_plain_files(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    manifest = registry.publish(make_expert(), interface=interface)
    line = (registry.storage.root / "index" / "ge" / "german.jsonl").read_text()
    assert json.loads(line)["manifest"] == manifest.digest
    assert (registry.storage.root / blob_path(manifest.digest)).read_text() == manifest.to_toml()
    assert json.loads((registry.storage.root / "config.json").read_text())["schema"] == 1
    moved = shutil.copytree(registry.storage.root, registry.storage.root.parent / "moved")
    assert open_for_publishing(moved).versions("german") == registry.versions("german")


def test_publishing_again_changes_nothing(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert()
    registry.publish(folder, interface=interface)
    before = all_files(registry.storage.root)
    registry.publish(folder, interface=interface)
    assert all_files(registry.storage.root) == before


def test_a_release_never_changes(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    registry.publish(make_expert(), interface=interface)
    before = all_files(registry.storage.root)
    with pytest.raises(RegistryError, match="already published with other content"):
        registry.publish(make_expert(seed=5), interface=interface)
    assert all_files(registry.storage.root) == before
    other_build = make_expert("german", "1.0.0+build", seed=6)
    with pytest.raises(RegistryError, match="already published with other content"):
        registry.publish(other_build, interface=interface)


@pytest.mark.parametrize("name", ["gerrnan", "ger-man", "germ-an"])
def test_look_alikes_are_refused(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface, name: str
) -> None:
    registry.publish(make_expert("german"), interface=interface)
    with pytest.raises(RegistryError, match="looks like 'german'"):
        registry.publish(make_expert(name), interface=interface)
    assert registry.names() == ["german"]


def test_bad_experts_are_refused(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert()
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def restore() -> None:
        for name, data in good.items():
            (folder / name).write_bytes(data)

    (folder / "scout.safetensors").unlink()
    with pytest.raises(ManifestError, match="is missing"):
        registry.publish(folder, interface=interface)
    restore()
    (folder / "body.safetensors").write_bytes(good["body.safetensors"][:-4])
    with pytest.raises(TensorFileError, match="truncated"):
        registry.publish(folder, interface=interface)
    (folder / "body.safetensors").write_bytes(good["scout.safetensors"])
    with pytest.raises(TensorFileError, match="not expected"):
        registry.publish(folder, interface=interface)
    restore()
    text = good["expert.toml"].decode()
    (folder / "expert.toml").write_text(text.replace("rank = 2", "rank = 3"))
    with pytest.raises(TensorFileError, match="has shape"):
        registry.publish(folder, interface=interface)
    (folder / "expert.toml").write_text(text.replace("rank = 2", "rank = 99"))
    with pytest.raises(InterfaceError, match="rank"):
        registry.publish(folder, interface=interface)
    (folder / "expert.toml").write_text(text.replace('requires = "^1"', 'requires = "^2"'))
    with pytest.raises(InterfaceError, match="does not contain"):
        registry.publish(folder, interface=interface)
    (folder / "expert.toml").write_text(text.replace("[requires]", "[reqires]"))
    with pytest.raises(ManifestError, match="unknown field"):
        registry.publish(folder, interface=interface)
    (folder / "expert.toml").write_text(text)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(ManifestError, match="not a regular file"):
        registry.publish(folder, interface=interface)
    assert not registry.storage.root.exists(), "a refused expert must leave nothing behind"


def test_a_digest_of_another_interface_is_refused(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert()
    text = (folder / "expert.toml").read_text()
    digest = "sha256:" + "1" * 64
    (folder / "expert.toml").write_text(
        text.replace('requires = "^1"', f'requires = "^1"\ndigest = "{digest}"')
    )
    with pytest.raises(InterfaceError, match="does not honour"):
        registry.publish(folder, interface=interface)
    assert registry.publish(folder).interface.digest == digest  # form only, without an interface


def test_without_an_interface_a_digest_is_needed(
    registry: Registry, make_expert: MakeExpert
) -> None:
    with pytest.raises(ManifestError) as caught:
        registry.publish(make_expert())
    assert caught.value.where == "expert.toml: interface.digest"


def test_only_known_files_are_published(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert()
    (folder / "private-data.txt").write_text("secret")
    manifest = registry.publish(folder, interface=interface)
    names = [file.name for file in manifest.files]
    assert names == ["README.md", "body.safetensors", "scout.safetensors"]
    assert b"secret" not in b"".join(all_files(registry.storage.root).values())


def test_yank(registry: Registry, make_expert: MakeExpert, interface: RouterInterface) -> None:
    registry.publish(make_expert(), interface=interface)
    registry.publish(make_expert("german", "1.1.0"), interface=interface)
    registry.yank("german", Version("1.1.0"))
    assert [release.is_yanked for release in registry.versions("german")] == [False, True]
    registry.publish(make_expert("german", "1.2.0"), interface=interface)
    assert [release.is_yanked for release in registry.versions("german")] == [False, True, False]
    registry.unyank("german", Version("1.1.0"))
    assert not any(release.is_yanked for release in registry.versions("german"))
    with pytest.raises(UnknownExpertError, match=r"no release german 9\.0\.0"):
        registry.yank("german", Version("9.0.0"))
    with pytest.raises(UnknownExpertError) as caught:
        registry.yank("germen", Version("1.0.0"))
    assert caught.value.hint == "did you mean 'german'?"


def test_no_registry(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="is not a registry"):
        open_for_publishing(tmp_path / "nothing").versions("german")
    (tmp_path / "config.json").write_text('{"kind": "composable-registry", "schema": 99}')
    with pytest.raises(RegistryError, match="99"):
        open_for_publishing(tmp_path).versions("german")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(RegistryError, match="cannot be read"):
        open_for_publishing(tmp_path).versions("german")


def test_open_registry(tmp_path: Path) -> None:
    assert open_registry("../x", tmp_path).location == str(tmp_path / "../x")
    assert open_registry(f"file://{tmp_path}", Path("/")).location == str(tmp_path)
    with pytest.raises(RegistryError, match="ftp"):
        open_registry("ftp://example.org", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"name": "other"}, {"version": "1"}, {"manifest": "sha256:../../x"}, {"yanked": 1},
        {"files": [{"name": "../x", "size": 1, "digest": "sha256:" + "0" * 64}]},
        {"files": [{"name": "x", "size": -1, "digest": "sha256:" + "0" * 64}]},
        {"files": [{"name": "x", "size": 1, "digest": "x"}]}, {"files": 3}, {"requires": []},
        {"requires": {"../x": "*"}}, {"requires": {"x": "new"}}, {"interface": None},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_index_lines(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    damage: dict[str, object],
) -> None:
    registry.publish(make_expert(), interface=interface)
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    fields = {**json.loads(index.read_text()), **damage}
    del fields["check"]
    index.write_bytes(format_line(fields))
    with pytest.raises(RegistryError) as caught:
        registry.versions("german")
    (field,) = damage
    assert caught.value.where is not None
    assert caught.value.where.startswith(f"{index}:1: {field}")
    assert "checksum" not in caught.value.message


def test_an_index_line_that_was_changed_does_not_fit_its_check(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    registry.publish(make_expert(), interface=interface)
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    index.write_text(index.read_text().replace('"version":"1.0.0"', '"version":"1.0.1"'))
    with pytest.raises(RegistryError, match="the checksum does not match"):
        registry.versions("german")


def test_a_record_that_rots_loses_nothing(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    registry.publish(make_expert(), interface=interface)
    before = registry.versions("german")
    record = registry.storage.root / "records" / "german" / "1.0.0.json"
    record.write_bytes(record.read_bytes().replace(b'"published":"2', b'"published":"3'))
    registry.publish(make_expert("german", "1.1.0"), interface=interface)
    assert registry.versions("german")[:1] == before
    with pytest.raises(RegistryError, match="already published with other content"):
        registry.publish(make_expert(seed=3), interface=interface)


def test_other_damage_to_an_index(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    registry.publish(make_expert(), interface=interface)
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    line = index.read_text()
    index.write_text(line + line)
    with pytest.raises(RegistryError, match="twice"):
        registry.versions("german")
    for text in ("nonsense", "[" * 100_000, line[:-20], "3", "null"):
        index.write_text(text)
        with pytest.raises(RegistryError, match="damaged"):
            registry.versions("german")


def test_a_dishonest_manifest_blob(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    registry.publish(make_expert(), interface=interface)
    release = registry.versions("german")[0]
    path = registry.storage.root / blob_path(release.manifest)
    path.chmod(0o644)
    path.write_text(path.read_text().replace("1.0.0", "1.0.1"))
    with pytest.raises(IntegrityError):
        registry.read_manifest(release)


@pytest.mark.parametrize("digest", ["", "x", "sha256:", "sha256:../../../etc/passwd", "md5:0"])
def test_no_path_is_made_of_what_is_no_digest(registry: Registry, digest: str) -> None:
    with pytest.raises(IntegrityError, match="not a digest"):
        blob_path(digest)


def test_an_index_that_fell_behind_is_seen_through_and_mended(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    """A publisher killed after its record but before its index line loses nothing."""
    registry.publish(make_expert(), interface=interface)
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    before = index.read_bytes()
    registry.publish(make_expert("german", "1.1.0"), interface=interface)
    after = index.read_bytes()
    for damage in (index.unlink, lambda: index.write_bytes(before)):
        damage()
        assert len(registry.versions("german")) == 2
        registry.yank("german", Version("1.1.0"))
        registry.unyank("german", Version("1.1.0"))
        assert index.read_bytes() == after


def test_a_record_cut_by_a_crash_is_written_again(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert()
    registry.publish(folder, interface=interface)
    record = registry.storage.root / "records" / "german" / "1.0.0.json"
    record.write_bytes(record.read_bytes()[:30])
    registry.publish(folder, interface=interface)
    assert len(registry.versions("german")) == 1
    assert json.loads(record.read_text())["version"] == "1.0.0"


def test_progress_counts_bytes(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    seen: list[tuple[str, int, int]] = []
    registry.publish(make_expert(), interface=interface, progress=lambda *event: seen.append(event))
    assert {name for name, done, total in seen if done == total} == {
        "README.md",
        "body.safetensors",
        "scout.safetensors",
    }


def test_published_tensors_load(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    from composable.interface import scout_signature

    manifest = registry.publish(make_expert(), interface=interface)
    scout = next(file for file in manifest.files if file.name == "scout.safetensors")
    path = registry.storage.root / blob_path(scout.digest)
    assert set(read_tensors(path, scout_signature(interface, 8))) == set(
        safetensors.numpy.load_file(path)
    )
    text = (registry.storage.root / blob_path(manifest.digest)).read_text()
    assert Manifest.loads(text) == manifest


@pytest.mark.parametrize(
    "fields",
    [
        {"published": ""}, {"published": "yesterday"}, {"published": "2026-11-24"},
        {"published": "2026-11-24T12:00:00"}, {"published": "2026-11-24T12:00:00+02:00"},
        {"published": "2026-13-24T12:00:00Z"}, {"published": "2026-11-24T12:00:00.5Z"},
        {"published": "٢٠٢٦-11-24T12:00:00Z"}, {"published": 20261124}, {"published": None},
        {"description": "x" * 501}, {"description": 3}, {"description": None},
        {"tags": "news"}, {"tags": ["x" * 257]}, {"tags": ["\x1b[31m"]}, {"tags": [None]},
        {"files": [{"name": "a", "size": 1 << 63, "digest": "sha256:" + "0" * 64}]},
        {"files": [{"name": "a", "size": True, "digest": "sha256:" + "0" * 64}]},
        {"files": [{"name": n, "size": 1, "digest": "sha256:" + "0" * 64} for n in "aA"]},
        {"files": [{"name": f"a{n}", "size": 1, "digest": "sha256:" + "0" * 64}
                   for n in range(257)]},
        {"files": [{"name": "expert.toml", "size": 1, "digest": "sha256:" + "0" * 64}]},
        {"conflicts": None}, {"conflicts": {"x": 3}}, {"requires": {"x" * 65: "*"}},
        {"extras": []}, {"extras": {"../x": {"a": "*"}}}, {"extras": {"law": {}}},
        {"extras": {"law": "*"}}, {"yanked": None}, {"yanked": "no"}, {"version": 1},
        {"interface": {"name": "a", "requires": "*", "digest": None}},
        {"interface": {"name": "a/b", "requires": "*", "digest": "sha256:" + "0" * 64}},
        {"interface": "tiny-bytes"}, {"manifest": None},
    ],
    ids=lambda fields: str(fields)[:60],
)  # fmt: skip
def test_every_field_of_an_index_line_has_a_type_a_range_and_a_size(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    fields: dict[str, object],
) -> None:
    registry.publish(make_expert(), interface=interface)
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    honest = json.loads(index.read_text())
    del honest["check"]
    index.write_bytes(format_line({**honest, **fields}) + b"\n")
    (field,) = fields
    with pytest.raises(RegistryError) as caught:
        registry.versions("german")
    assert str(caught.value.where).startswith(f"{index}:1: {field}")
    assert len(str(caught.value)) < 1000


def test_a_line_without_a_field_is_not_a_release(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    registry.publish(make_expert(), interface=interface)
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    honest = json.loads(index.read_text())
    del honest["check"]
    for field in honest.keys() - {"extras", "description", "license", "tags", "whole"}:
        rest = {key: value for key, value in honest.items() if key != field}
        index.write_bytes(format_line(rest) + b"\n")
        with pytest.raises(RegistryError):
            registry.versions("german")


@pytest.mark.parametrize(
    "fields",
    [
        {"description": "x" * 501}, {"interface": 3}, {"tags": {}}, {"version": None},
        {"name": "../x"}, {"description": None},
    ],
    ids=lambda fields: str(fields)[:60],
)  # fmt: skip
def test_every_field_of_the_catalogue_has_a_type_and_a_size(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    fields: dict[str, object],
) -> None:
    registry.publish(make_expert(), interface=interface)
    catalog = registry.storage.root / "catalog.jsonl"
    row = json.loads(catalog.read_text())
    del row["check"]
    catalog.write_bytes(format_line({**row, **fields}) + b"\n")
    with pytest.raises(RegistryError):
        registry.entries()


def test_an_index_that_was_cut_is_read_from_the_records_or_refused(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    """In the folder that is published to nothing is lost; a copy without records is refused."""
    for minor in range(3):
        folder = make_expert("german", f"1.{minor}.0", seed=minor)
        registry.publish(folder, interface=interface)
    registry.publish(make_expert("french"), interface=interface)
    index = registry.storage.root / "index" / "ge" / "german.jsonl"
    whole = index.read_bytes()
    lines = whole.splitlines(keepends=True)
    cuts = [lines[:2], lines[1:], [lines[0], lines[2]], []]
    before = registry.versions("german")
    for cut in cuts:
        index.write_bytes(b"".join(cut))
        assert registry.versions("german") == before
    registry.yank("german", Version("1.1.0"))
    registry.unyank("german", Version("1.1.0"))
    assert index.read_bytes() == whole
    shutil.rmtree(registry.storage.root / "records")
    for cut in cuts:
        index.write_bytes(b"".join(cut))
        with pytest.raises(RegistryError, match=r"truncated|empty"):
            registry.versions("german")
    catalog = registry.storage.root / "catalog.jsonl"
    for lines in ([b""], catalog.read_bytes().splitlines(keepends=True)[:1]):
        catalog.write_bytes(b"".join(lines))
        with pytest.raises(RegistryError, match=r"truncated|empty"):
            registry.names()


def count_opened_files(action: Callable[[], object]) -> int:
    """Return how many files an action opens, created ones and folders included."""
    opened = 0
    is_counting = True

    def count(event: str, arguments: object) -> None:
        nonlocal opened
        if is_counting and event == "open":
            opened += 1

    sys.addaudithook(count)
    try:
        action()
    finally:
        is_counting = False
    return opened


def test_publishing_and_yanking_open_the_same_number_of_files_however_many_there_are(
    registry: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    counts = []
    for minor in range(12):
        version = f"1.{minor}.0"
        folder = make_expert("german", version, seed=minor)
        counts.append(
            (
                count_opened_files(lambda: registry.publish(folder, interface=interface)),  # noqa: B023
                count_opened_files(lambda: registry.yank("german", Version(version))),  # noqa: B023
                count_opened_files(lambda: registry.unyank("german", Version(version))),  # noqa: B023
            )
        )
    # The first creates the registry; two blobs may happen to share a folder.
    for of_one_command in zip(*counts[1:], strict=True):
        assert max(of_one_command) - min(of_one_command) <= 2, counts
    assert len(registry.versions("german")) == 12


def test_a_publisher_that_never_gets_its_turn_says_what_it_waits_for_and_gives_up(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry.publish(make_expert(), interface=interface)
    budget = TimeBudget(0.4, notice_seconds=0.1)
    folder = make_expert("german", "1.1.0", seed=1)
    home = "composable.packaging.registry.updates"
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with monkeypatch.context() as patch:
        # A clock that the pauses alone move, and pauses that are not drawn.
        patch.setattr(f"{home}.time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
        patch.setattr(f"{home}.random", SimpleNamespace(uniform=lambda low, high: min(high, 0.06)))
        patch.setattr(f"{home}.current_budget", lambda: budget)
        patch.setattr(f"{home}.MIN_ATTEMPTS", 3)
        replace = registry.storage.replace  # type: ignore[attr-defined]
        patch.setattr(
            registry.storage,
            "replace",
            lambda path, data, seen: "index" not in path and replace(path, data, seen),
        )
        with pytest.raises(UnreachableError, match=r"german\.jsonl: other publishers") as caught:
            registry.publish(folder, interface=interface)
    assert "run the same command again" in str(caught.value.hint)
    assert any("trying until" in message for message in caplog.messages)
    assert budget.left < 0.8
    registry.publish(folder, interface=interface)
    assert len(registry.versions("german")) == 2


@pytest.mark.parametrize(
    ("document", "others"),
    [
        ("index/ge/german.jsonl", []),
        ("catalog.jsonl", ["dutch", "polish", "danish", "russian", "maltese"]),
    ],
)
def test_a_release_that_an_index_has_no_room_for_is_refused_before_it_is_uploaded(
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
    document: str,
    others: list[str],
) -> None:
    for name in ("german", *others):
        registry.publish(make_expert(name), interface=interface)
    root = Path(registry.location)
    limit = (root / document).stat().st_size + 10
    monkeypatch.setattr("composable.packaging.registry.updates.MAX_DOCUMENT_BYTES", limit)
    before = all_files(root)
    name = "french" if others else "german"
    with pytest.raises(RegistryError, match="of which clients read at most") as caught:
        registry.publish(make_expert(name, "1.1.0", seed=1), interface=interface)
    assert document in str(caught.value.where)
    assert all_files(root) == before
    registry.publish(make_expert(), interface=interface)  # what is there already needs no room
