"""Registries on the Hugging Face Hub: a Hub on loopback that answers as the real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from composable.errors import IntegrityError, RegistryError, UnreachableError
from composable.interface import RouterInterface
from composable.packaging import (
    Project,
    Registry,
    Requirement,
    Store,
    Version,
    lock_project,
    open_for_publishing,
    open_registry,
    sync_project,
)
from composable.packaging.install.mirror import mirror_registry
from composable.packaging.registry import hub as hub_module
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.hub import HubStorage
from composable.packaging.registry.storage import Folder
from tests.packaging.conftest import make_interface
from tests.support.hub import Hub, run_hub
from tests.support.signed_registries import check_signed, check_signed_mirror
from tests.support.storages import check_deltas, read_files
from tests.support.updates import LARGE

if TYPE_CHECKING:
    from tests.packaging.conftest import MakeExpert

pytestmark = [
    pytest.mark.slow,
    # The Hub's library passes files in a way that its HTTP client no longer likes.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

NAME = "team/experts"
URL = f"hf://{NAME}"
QUICK = TimeBudget(5, first_pause_seconds=0.01)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with run_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", running.token)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_module, "_LARGE_BYTES", 1000)
        yield running


@pytest.fixture
def remote(hub: Hub) -> Registry:
    return open_for_publishing(URL)


def write_card(folder: Path) -> Path:
    """Give an expert a card with figures."""
    bits = {"own_backbone": 2.0, "own_expert": 1.0, "own_mix": 1.25}
    card = {"measured": {"bits_per_byte": bits}}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def test_publish_find_yank_and_install(
    hub: Hub,
    remote: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    store: Store,
    tmp_path: Path,
) -> None:
    manifest = remote.publish(make_expert(), interface=interface)
    remote.publish(make_expert("german", "1.1.0", seed=1), interface=interface)
    n_commits = len(hub.commits[NAME])
    remote.publish(make_expert(), interface=interface)  # again: changes nothing
    assert len(hub.commits[NAME]) == n_commits == 3, "one to create it, and one for each release"
    reader = open_registry(URL)
    assert reader.names() == ["german"]
    assert [str(release.version) for release in reader.versions("german")] == ["1.0.0", "1.1.0"]
    assert reader.read_manifest(reader.versions("german")[0]) == manifest
    remote.yank("german", Version("1.1.0"), "too small")
    assert hub.commits[NAME][-1].message == "Yank german 1.1.0: too small"
    assert [row.is_yanked for row in open_registry(URL).versions("german")] == [False, True]
    assert [row.is_yanked for row in reader.versions("german")] == [False, False], "one commit"
    project = Project.create(tmp_path / "project", "tiny-bytes", {"hub": URL})
    project = project.add(Requirement.parse("german"))
    lock = lock_project(project, interface)
    assert str(lock.versions["german"]) == "1.0.0"
    assert lock.registries == {"hub": f"{URL}@{hub.commits[NAME][-1].oid}"}
    remote.unyank("german", Version("1.1.0"))
    assert [row.is_yanked for row in open_registry(URL).versions("german")] == [False, False]
    hub.asked.clear()
    sync_project(project, lock, store, interface=interface)
    assert store.verify() == []
    assert hub.asked and all(lock.registries["hub"][-40:] in path for _, path, _ in hub.asked)
    assert project.environment.holds(lock)
    with pytest.raises(RegistryError, match="already published with other content"):
        remote.publish(make_expert(seed=9), interface=interface)
    with pytest.raises(RegistryError, match="looks like 'german'"):
        remote.publish(make_expert("gerrnan"), interface=interface)


def test_deltas(hub: Hub, remote: Registry, tmp_path: Path) -> None:
    check_deltas(remote, URL, make_interface(**LARGE), tmp_path)
    last = hub.commits[NAME][-1]
    assert last.message == "Publish german-1.2.0", "a mirror of what is there commits nothing"


def test_a_location_with_a_commit_is_read_only(
    hub: Hub, remote: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    remote.publish(make_expert(), interface=interface)
    pinned = f"{URL}@{hub.commits[NAME][-1].oid}"
    remote.publish(make_expert("german", "1.1.0", seed=1), interface=interface)
    assert len(open_registry(pinned).versions("german")) == 1
    with pytest.raises(RegistryError, match="read only: it names a commit"):
        open_for_publishing(pinned).publish(make_expert("zoology"), interface=interface)


def test_large_files_are_elsewhere_and_that_server_gets_no_token(
    hub: Hub, remote: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    remote.publish(make_expert(), interface=interface)
    (release,) = open_registry(URL).versions("german")
    (body,) = (file for file in release.files if file.name == "body.safetensors")
    assert body.digest.removeprefix("sha256:") in hub.large
    data = b"".join(open_registry(URL).stream(body.digest))
    assert b"".join(open_registry(URL).stream(body.digest, 500)) == data[500:]
    assert {method for method, _, _ in hub.stored} == {"PUT", "GET"}
    assert {login for _, _, login in hub.stored} == {""}
    assert {login for _, _, login in hub.asked} == {f"Bearer {hub.token}"}


def test_the_card_has_what_the_hub_shows(
    hub: Hub, remote: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = write_card(make_expert(license_="MIT", domains=("law",)))
    text = (folder / "expert.toml").read_text()
    (folder / "expert.toml").write_text(
        text.replace("[expert]\n", '[expert]\ndescription = "Knows | <b>law</b>."\n')
    )
    remote.publish(folder, interface=interface)
    card = hub.files(NAME)["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["library_name"] == "composable"
    assert front["tags"] == ["composable", "mixture-of-experts", "law"]
    (entry,) = front["model-index"]
    (result,) = entry["results"]
    assert result["dataset"]["name"] == "held-out text of german 1.0.0"
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {"bits_per_byte": 1.25, "backbone_bits_per_byte": 2.0}
    assert r"| german | 1.0.0 | MIT | 2.000 | 1.250 | Knows \| \<b\>law\</b\>. |" in card
    remote.publish(make_expert("zoology", license_="Apache-2.0"), interface=interface)
    front = yaml.safe_load(hub.files(NAME)["README.md"].decode().split("---\n")[1])
    assert front["license"] == "other"


def test_a_card_of_the_owner_stays(
    hub: Hub, remote: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    hub.commit(NAME, "mine", {"README.md": b"# Mine\n"})
    remote.publish(make_expert(), interface=interface)
    assert hub.files(NAME)["README.md"] == b"# Mine\n"


def test_somebody_else_was_first(
    hub: Hub, remote: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    """A commit on an older state is refused; the release is published on the newer one."""
    other = open_for_publishing(URL)
    other.publish(make_expert("german", "1.0.0"), interface=interface)
    turns = iter([make_expert("german", "1.1.0", seed=1)])

    def publish_first() -> None:
        for folder in turns:
            open_for_publishing(URL).publish(folder, interface=interface)

    hub.before_commit = publish_first
    remote.publish(make_expert("german", "1.2.0", seed=2), interface=interface)
    versions = [str(release.version) for release in open_registry(URL).versions("german")]
    assert versions == ["1.0.0", "1.1.0", "1.2.0"]
    assert [str(entry.version) for entry in open_registry(URL).entries()] == ["1.2.0"]


def test_of_two_contents_under_one_version_one_is_refused(
    hub: Hub, remote: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    turns = iter([make_expert(seed=1)])

    def publish_first() -> None:
        for folder in turns:
            open_for_publishing(URL).publish(folder, interface=interface)

    hub.before_commit = publish_first
    with pytest.raises(RegistryError, match="already published with other content"):
        remote.publish(make_expert(seed=0), interface=interface)
    (release,) = open_registry(URL).versions("german")
    open_registry(URL).read_manifest(release)


def test_a_commit_that_always_comes_too_late(
    hub: Hub,
    remote: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "MAX_COMMITS", 2)
    hub.before_commit = lambda: hub.commit(NAME, "another", hub.files(NAME)) and None
    with pytest.raises(UnreachableError, match="others changed it 2 times"):
        remote.publish(make_expert(), interface=interface)
    assert "index/ge/german.jsonl" not in hub.files(NAME)


def test_an_interrupted_publication_does_not_send_files_again(
    hub: Hub,
    remote: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    folder = make_expert()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HubStorage, "finish", fail)
        open_for_publishing(URL).publish(folder, interface=interface)
    assert open_registry(URL).storage.read("config.json") is None, "nothing is half visible"
    sent = [path for method, path, _ in hub.stored if method == "PUT"]
    assert sent
    remote.publish(folder, interface=interface)
    assert [path for method, path, _ in hub.stored if method == "PUT"] == sent


def test_a_mirror_there_and_back_is_the_same(
    hub: Hub,
    remote: Registry,
    registry: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    tmp_path: Path,
) -> None:
    registry.publish(make_expert("german", "1.0.0"), interface=interface)
    registry.publish(make_expert("zoology", seed=2), interface=interface)
    registry.yank("german", Version("1.0.0"))
    assert isinstance(registry.storage, Folder)
    registry.storage.replace("trust/timestamp.json", b'{"signed":1}', None)
    mirror_registry(registry, remote)
    assert len(hub.commits[NAME]) == 2, "all of it in one commit"
    assert mirror_registry(registry, open_for_publishing(URL)).documents == ()
    assert len(hub.commits[NAME]) == 2
    back = open_for_publishing(tmp_path / "back")
    mirror_registry(open_registry(URL), back)
    assert read_files(tmp_path / "back") == read_files(registry.storage.root)
    copied = {p: d for p, d in hub.files(NAME).items() if p not in (".gitattributes", "README.md")}
    assert copied == read_files(registry.storage.root), "a clone of it is a folder registry"


def test_wrong_bytes_are_noticed(
    hub: Hub, remote: Registry, make_expert: MakeExpert, interface: RouterInterface, store: Store
) -> None:
    remote.publish(make_expert(), interface=interface)
    reader = open_registry(URL)
    (release,) = reader.versions("german")
    for change in (lambda data: data[:-1] + b"~", lambda data: data + b"x" * 100_000):
        hub.change_file = lambda path, data, change=change: change(data)  # type: ignore[misc]
        with pytest.raises(IntegrityError):
            reader.read_manifest(release)
        with pytest.raises(RegistryError):
            open_registry(URL).entries()


def test_a_file_that_changes_while_it_is_sent_is_not_published(
    hub: Hub,
    remote: Registry,
    make_expert: MakeExpert,
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_expert()
    send = HubStorage._send

    def change_first(self: HubStorage, path: str, local: Path, file: Any) -> Any:
        if file.name == "body.safetensors":
            data = local.read_bytes()
            local.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return send(self, path, local, file)

    monkeypatch.setattr(HubStorage, "_send", change_first)
    with pytest.raises(IntegrityError, match="changed while it was being published"):
        remote.publish(folder, interface=interface)
    assert "index/ge/german.jsonl" not in hub.files(NAME)


def test_single_writes_are_commits_of_their_own(hub: Hub) -> None:
    storage = HubStorage(URL)
    assert storage.create("names/x", b"1")
    assert not storage.create("names/x", b"2")
    first = storage.read("names/x")
    assert first is not None and first.data == b"1"
    assert storage.replace("names/x", b"3", first)
    assert not storage.replace("names/x", b"4", first)
    assert storage.names_in("names") == ["x"]
    storage.remove("names/x")
    storage.remove("names/x")
    assert storage.read("names/x") is None
    assert storage.names_in("names") == []
    messages = [commit.message for commit in hub.commits[NAME]]
    assert messages == ["initial commit", "Write names/x", "Write names/x", "Remove names/x"]


@pytest.mark.parametrize(
    "location",
    ["hf://team", "hf://team/experts/more", "hf://team/experts@main", "hf://../experts", "hf:///x"],
)
def test_what_is_not_a_repository(location: str) -> None:
    with pytest.raises(RegistryError, match="is not a repository of the Hub"):
        open_registry(location)


def test_no_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="is not a registry"):
        open_registry(URL).versions("german")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RegistryError, match="no such repository, or a private one") as caught:
        open_registry(URL).versions("german")
    assert "HF_TOKEN" in str(caught.value)


def test_a_token_that_is_refused(
    hub: Hub, make_expert: MakeExpert, interface: RouterInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RegistryError) as caught:
        open_for_publishing(URL).publish(make_expert(), interface=interface)
    assert "hf_wrong" not in str(caught.value)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UnreachableError, match="cannot be reached"):
        HubStorage(URL, budget=QUICK).read("config.json")


def test_the_library_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RegistryError, match="needs the package huggingface_hub") as caught:
        open_registry(URL)
    assert "composable[hub]" in str(caught.value)


def test_a_signed_registry(hub: Hub, tmp_path: Path, interface: RouterInterface) -> None:
    check_signed(URL, tmp_path, interface)


def test_a_mirror_of_a_signed_registry(
    hub: Hub, tmp_path: Path, interface: RouterInterface
) -> None:
    check_signed_mirror(URL, tmp_path, interface)
