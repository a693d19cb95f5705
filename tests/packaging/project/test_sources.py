"""Experts from folders, extras, cut-off dates, exports, pruning: all that a lock can name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import (
    ConstraintError,
    LockError,
    ManifestError,
    PackagingError,
    RegistryError,
    ResolutionError,
)
from composable.interface import RouterInterface
from composable.packaging import (
    Lock,
    Project,
    Registry,
    Requirement,
    Store,
    lock_project,
    open_for_publishing,
    open_registry,
    sync_project,
)
from composable.packaging.project.edits import add_experts, prune_store, read_wanted, refresh_lock
from composable.packaging.project.export import export_project
from composable.packaging.registry.lines import format_line
from composable.packaging.registry.release import parse_cutoff

MakeExpert = Callable[..., Path]


@pytest.fixture
def home(make_expert: MakeExpert, project: Project) -> Path:
    """Return the folder of an expert in development, beside the project."""
    return make_expert("german", "0.1.0")


def add(project: Project, interface: RouterInterface, *texts: str, **options: bool) -> Project:
    wanted = read_wanted(project, texts, base=project.root, **options)
    project, lock = add_experts(project, wanted, interface)
    lock.write(project.lock_path)
    return project


class TestFolders:
    def test_a_folder_is_taken_as_it_was_when_it_was_locked(
        self, project: Project, home: Path, interface: RouterInterface, store: Store
    ) -> None:
        project = add(project, interface, str(home))
        assert project.experts["german"].path == f"../experts/{home.name}"
        assert "german = { path = " in project.path.read_text()
        lock = Lock.read(project.root)
        environment = sync_project(project, lock, store, interface=interface)
        installed = environment.expert_path("german") / "body.safetensors"
        assert installed.read_bytes() == (home / "body.safetensors").read_bytes()
        assert environment.manifests()[0].is_packed
        before = installed.read_bytes()
        data = bytearray((home / "body.safetensors").read_bytes())
        data[-1] ^= 1
        (home / "body.safetensors").write_bytes(data)
        with pytest.raises(LockError, match=r"german in \.\./experts.* has changed"):
            sync_project(project, lock, store, interface=interface)
        assert installed.read_bytes() == before
        again = refresh_lock(project, interface)
        environment = sync_project(project, again, store, interface=interface)
        assert (environment.expert_path("german") / "body.safetensors").read_bytes() == data

    def test_an_editable_folder_is_used_where_it_lies(
        self, project: Project, home: Path, interface: RouterInterface, store: Store
    ) -> None:
        project = add(project, interface, str(home), is_editable=True)
        lock = Lock.read(project.root)
        assert lock["german"].manifest is None and lock["german"].files == ()
        assert Lock.loads(lock.to_toml()) == lock
        environment = sync_project(project, lock, store, interface=interface)
        assert environment.expert_path("german").samefile(home)
        assert environment.holds(lock)
        assert store.digests() == [], "nothing of it is copied"
        (home / "README.md").write_text("changed\n")
        sync_project(project, lock, store, interface=interface)
        (home / "expert.toml").write_text(
            (home / "expert.toml").read_text().replace('"0.1.0"', '"0.2.0"')
        )
        with pytest.raises(LockError, match="has changed since it was locked"):
            sync_project(project, lock, store, interface=interface)
        assert str(refresh_lock(project, interface).versions["german"]) == "0.2.0"

    def test_what_a_folder_needs_comes_from_the_registry(
        self,
        project: Project,
        registry: Registry,
        make_expert: MakeExpert,
        interface: RouterInterface,
        store: Store,
    ) -> None:
        registry.publish(make_expert("base", "1.0.0"), interface=interface)
        folder = make_expert("mine", "0.1.0", requires={"base": "^1"}, seed=3)
        project = add(project, interface, str(folder))
        lock = Lock.read(project.root)
        assert lock["base"].wanted_by == ("mine 0.1.0: ^1",)
        assert lock["mine"].registry is None
        sync_project(project, lock, store, interface=interface)
        assert store.verify() == []

    def test_a_folder_stands_in_for_the_published_one(
        self,
        project: Project,
        registry: Registry,
        make_expert: MakeExpert,
        interface: RouterInterface,
    ) -> None:
        """One bound to a folder is never taken from a registry, even if that has a newer one."""
        registry.publish(make_expert("base", "9.0.0"), interface=interface)
        registry.publish(
            make_expert("top", "1.0.0", requires={"base": ">=1"}, seed=4), interface=interface
        )
        folder = make_expert("base", "1.5.0", seed=5)
        project = add(project, interface, str(folder), "top")
        assert str(Lock.read(project.root).versions["base"]) == "1.5.0"

    def test_bad_folders(
        self, project: Project, home: Path, interface: RouterInterface, tmp_path: Path
    ) -> None:
        before = project.path.read_text()
        with pytest.raises(ManifestError, match="no such folder"):
            add(project, interface, "../experts/nobody")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ManifestError, match="no such file"):
            add(project, interface, "../empty")
        (home / "body.safetensors").unlink()
        with pytest.raises(ManifestError, match="is missing"):
            add(project, interface, str(home))
        with pytest.raises(ManifestError, match="only experts from folders can be editable"):
            add(project, interface, "german", is_editable=True)
        assert project.path.read_text() == before

    def test_a_folder_with_another_name_than_asked_for(
        self, project: Project, home: Path, interface: RouterInterface
    ) -> None:
        text = project.path.read_text()
        project.path.write_text(f'{text}french = {{ path = "../experts/{home.name}" }}\n')
        with pytest.raises(ManifestError, match="contains expert 'german', expected 'french'"):
            lock_project(Project.read(project.root), interface)


EXTRA = '[extras.code]\npython-code = "^1"\n'


class TestExtras:
    @pytest.fixture(autouse=True)
    def world(
        self, registry: Registry, make_expert: MakeExpert, interface: RouterInterface
    ) -> None:
        registry.publish(make_expert("python-code", "1.2.0"), interface=interface)
        registry.publish(make_expert("german", "1.0.0", seed=1), interface=interface)
        registry.publish(make_expert("german", "1.1.0", seed=2, extra=EXTRA), interface=interface)

    def test_an_extra_brings_what_it_requires(
        self, project: Project, interface: RouterInterface, store: Store
    ) -> None:
        project = add(project, interface, "german[code]")
        assert project.experts["german"].extras == ("code",)
        assert 'extras = ["code"]' in project.path.read_text()
        lock = Lock.read(project.root)
        assert {n: str(v) for n, v in lock.versions.items()} == {
            "german": "1.1.0",
            "python-code": "1.2.0",
        }
        assert lock["python-code"].wanted_by == ("german[code] 1.1.0: ^1",)
        assert Lock.loads(lock.to_toml()) == lock
        sync_project(project, lock, store, interface=interface)
        project = add(project, interface, "german")
        with pytest.raises(LockError, match="the required extras of german"):
            sync_project(project, lock, store, interface=interface)
        assert set(Lock.read(project.root).versions) == {"german"}

    def test_an_extra_that_is_not_there(self, project: Project, interface: RouterInterface) -> None:
        with pytest.raises(ResolutionError, match="did you mean 'code'"):
            add(project, interface, "german[cod]")

    def test_extras_survive_the_manifest(self, registry: Registry) -> None:
        release = registry.versions("german")[-1]
        manifest = registry.read_manifest(release)
        assert manifest.extras == release.extras
        assert list(manifest.extras["code"]) == ["python-code"]

    @pytest.mark.parametrize(
        ("extra", "where"),
        [
            ('[extras]\ncode = "^1"\n', "extras.code"),
            ("[extras.code]\n", "extras.code"),
            ('[extras.Code]\nx = "1"\n', "extras.Code"),
            ('[extras.code]\nx = "new"\n', "extras.code.x"),
            ('[extras.code]\ndutch = "1"\n', "extras.code.dutch"),
        ],
    )
    def test_bad_extras(self, make_expert: MakeExpert, extra: str, where: str) -> None:
        from composable.packaging import Manifest

        folder = make_expert("dutch", extra=extra)
        with pytest.raises(ManifestError) as caught:
            Manifest.read(folder)
        assert caught.value.where == f"expert.toml: {where}"


class TestCutOff:
    @pytest.mark.parametrize(
        ("text", "time"),
        [
            ("2026-11-24", "2026-11-24T23:59:59Z"),
            ("2026-11-24T12:00:00Z", "2026-11-24T12:00:00Z"),
            ("2026-11-24T12:00:00+02:00", "2026-11-24T10:00:00Z"),
        ],
    )
    def test_times(self, text: str, time: str) -> None:
        assert parse_cutoff(text) == time

    @pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "2026-11-24T12:00:00"])
    def test_bad_times(self, text: str) -> None:
        with pytest.raises(PackagingError, match="not a date or a time"):
            parse_cutoff(text)

    def test_what_came_later_does_not_exist(
        self,
        project: Project,
        registry: Registry,
        make_expert: MakeExpert,
        interface: RouterInterface,
    ) -> None:
        for minor, day in enumerate((1, 5)):
            registry.publish(make_expert("german", f"1.{minor}.0", seed=minor), interface=interface)
            record = registry.storage.root / "records" / "german" / f"1.{minor}.0.json"  # type: ignore[attr-defined]
            fields = json.loads(record.read_text())
            del fields["check"]
            record.write_bytes(format_line({**fields, "published": f"2026-11-0{day}T08:00:00Z"}))
        (registry.storage.root / "index" / "ge" / "german.jsonl").unlink()  # type: ignore[attr-defined]
        registry.write_index("german")
        project = project.add(Requirement.parse("german"))
        for cutoff, version in {"2026-11-04": "1.0.0", "2026-11-05": "1.1.0"}.items():
            lock = lock_project(
                project, interface, upgrade=True, exclude_newer=parse_cutoff(cutoff)
            )
            assert str(lock.versions["german"]) == version
        with pytest.raises(ResolutionError, match="was published at 2026-11-01T08:00:00Z, after"):
            lock_project(project, interface, upgrade=True, exclude_newer=parse_cutoff("2026-10-01"))


class TestExport:
    @pytest.fixture
    def synced(
        self,
        project: Project,
        registry: Registry,
        make_expert: MakeExpert,
        interface: RouterInterface,
        store: Store,
    ) -> Project:
        registry.publish(make_expert("base", "1.0.0"), interface=interface)
        registry.publish(make_expert("base", "1.1.0", seed=1), interface=interface)
        registry.publish(
            make_expert("top", "1.0.0", requires={"base": "<1.1"}, seed=2), interface=interface
        )
        project = add(project, interface, "top")
        sync_project(project, Lock.read(project.root), store, interface=interface)
        return project

    @pytest.mark.parametrize("name", ["export", "export.tar"])
    def test_carry_it_to_a_machine_without_a_network(
        self,
        synced: Project,
        registry: Registry,
        interface: RouterInterface,
        tmp_path: Path,
        name: str,
    ) -> None:
        lock = Lock.read(synced.root)
        target = tmp_path / name
        export_project(synced, lock, target, interface=interface)
        registry.storage.root.rename(tmp_path / "unplugged")  # type: ignore[attr-defined]
        export = open_registry(target)
        assert export.names() == ["base", "top"]
        assert [str(release.version) for release in export.versions("base")] == ["1.0.0"]
        there = tmp_path / "elsewhere"
        there.mkdir()
        for file in ("composable.toml", "composable.lock"):
            document = export.storage.read(file)
            assert document is not None
            (there / file).write_bytes(document.data)
        project = dataclasses.replace(Project.read(there), is_offline=True)
        store = Store(tmp_path / "another-store")
        environment = sync_project(project, store=store, interface=interface, source=export)
        assert environment.holds(lock)
        assert store.verify() == []
        own = Project.create(tmp_path / "own", "tiny-bytes", {"export": str(target)})
        own = own.add(Requirement.parse("top"))
        assert lock_project(own, interface).versions == lock.versions

    def test_the_same_export_is_the_same_file(
        self, synced: Project, interface: RouterInterface, tmp_path: Path
    ) -> None:
        lock = Lock.read(synced.root)
        names = []
        for number in range(2):
            export_project(synced, lock, tmp_path / f"{number}.tar", interface=interface)
            data = (tmp_path / f"{number}.tar").read_bytes()
            names.append(len(data))
        assert names[0] == names[1]
        assert not list(tmp_path.glob(".tmp-*"))

    def test_refusals(
        self, synced: Project, make_expert: MakeExpert, interface: RouterInterface, tmp_path: Path
    ) -> None:
        lock = Lock.read(synced.root)
        (tmp_path / "there").mkdir()
        with pytest.raises(PackagingError, match="already exists"):
            export_project(synced, lock, tmp_path / "there", interface=interface)
        project = add(synced, interface, str(make_expert("mine", "0.1.0", seed=7)))
        with pytest.raises(PackagingError, match="cannot be exported"):
            export_project(project, Lock.read(project.root), tmp_path / "x", interface=interface)
        (tmp_path / "bad.tar").write_bytes(b"no tar")
        with pytest.raises(RegistryError, match="is not an export"):
            open_registry(tmp_path / "bad.tar")


class TestPruning:
    def test_what_a_registered_lock_needs_stays(
        self,
        project: Project,
        registry: Registry,
        make_expert: MakeExpert,
        interface: RouterInterface,
        store: Store,
        tmp_path: Path,
    ) -> None:
        registry.publish(make_expert("german", "1.0.0"), interface=interface)
        registry.publish(make_expert("french", "1.0.0", seed=4), interface=interface)
        locks = {}
        for name in ("german", "french"):
            own = Project.create(tmp_path / name, "tiny-bytes", {"local": "../registry"})
            own = own.add(Requirement.parse(name))
            locks[name] = lock_project(own, interface)
            sync_project(own, locks[name], store, interface=interface)
        assert store.projects() == sorted(tmp_path / name for name in locks)
        import shutil

        shutil.rmtree(tmp_path / "german" / ".composable")  # not installed, but locked
        shutil.rmtree(tmp_path / "french")  # gone
        pruned = prune_store(store, older_than_seconds=0)
        assert set(pruned.digests) == locks["french"].digests() - locks["german"].digests()
        assert set(store.digests()) == locks["german"].digests()
        (tmp_path / "german" / "composable.lock").write_text("damaged")
        with pytest.raises(LockError, match="cannot tell which files the project in"):
            prune_store(store, older_than_seconds=0)
        assert set(store.digests()) == locks["german"].digests()

    def test_what_is_pruned_while_it_is_installed_is_fetched_again(
        self,
        project: Project,
        registry: Registry,
        make_expert: MakeExpert,
        interface: RouterInterface,
        store: Store,
    ) -> None:
        registry.publish(make_expert("german", "1.0.0"), interface=interface)
        project = project.add(Requirement.parse("german"))
        lock = lock_project(project, interface, is_dry_run=True)  # so nothing protects it
        n_pruned = 0

        def prune_once(label: str, done: int, total: int) -> None:
            nonlocal n_pruned
            if n_pruned == 0 and done == total and "scout" in label:
                n_pruned = len(prune_store(store, older_than_seconds=0).digests)

        sync_project(project, lock, store, interface=interface, progress=prune_once)
        assert n_pruned > 0
        assert project.environment.holds(lock)


def test_what_is_no_requirement(project: Project) -> None:
    with pytest.raises(ConstraintError):
        read_wanted(project, ["german["])


def test_publishing_into_an_export_keeps_what_it_holds(
    project: Project,
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    store: Store,
    tmp_path: Path,
) -> None:
    registry.publish(make_expert("german", "1.0.0"), interface=interface)
    project = add(project, interface, "german")
    lock = Lock.read(project.root)
    sync_project(project, lock, store, interface=interface)
    export_project(project, lock, tmp_path / "export", interface=interface)
    export = open_for_publishing(tmp_path / "export")
    export.publish(make_expert("german", "1.1.0", seed=5), interface=interface)
    assert [release.version.minor for release in export.versions("german")] == [0, 1]
