"""Registries in an object store: a real S3 endpoint on loopback, and publishers at once."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from composable.errors import IntegrityError, RegistryError, UnreachableError
from composable.interface import RouterInterface
from composable.packaging import (
    Registry,
    Store,
    open_for_publishing,
    open_registry,
)
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry.bucket import BucketStorage
from composable.packaging.registry.index import index_path
from tests.packaging.conftest import make_interface
from tests.support.servers import run_s3
from tests.support.storages import check_deltas, check_releases
from tests.support.updates import LARGE

if TYPE_CHECKING:
    from tests.packaging.conftest import MakeExpert

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint() -> Iterator[dict[str, str]]:
    with run_s3() as environment:
        yield environment


@pytest.fixture
def url(
    endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """Return the location of an empty registry in the bucket."""
    for name, value in endpoint.items():
        monkeypatch.setenv(name, value)
    return f"s3://experts/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def bucket(url: str) -> Registry:
    return open_for_publishing(url)


def test_publish_find_yank_and_install(
    bucket: Registry,
    url: str,
    make_expert: MakeExpert,
    interface: RouterInterface,
    store: Store,
    tmp_path: Path,
) -> None:
    check_releases(bucket, url, make_expert, interface, store, tmp_path)


def test_deltas(bucket: Registry, url: str, tmp_path: Path) -> None:
    check_deltas(bucket, url, make_interface(**LARGE), tmp_path)


def test_no_registry(url: str) -> None:
    with pytest.raises(RegistryError, match="is not a registry"):
        open_registry(url).versions("german")


def test_a_state_that_was_not_seen_is_not_replaced(url: str) -> None:
    storage = BucketStorage(url)
    assert storage.read("x") is None
    assert storage.replace("x", b"1", None)
    assert not storage.replace("x", b"2", None)
    first = storage.read("x")
    assert first is not None and storage.read("x", first) is first
    assert storage.replace("x", b"3", first)
    assert not storage.replace("x", b"4", first)
    second = storage.read("x", first)
    assert second is not None and second.data == b"3"
    assert storage.create("y", b"1")
    assert not storage.create("y", b"2")
    storage.remove("y")
    storage.remove("y")
    assert storage.read("y") is None
    assert storage.create("folder/z", b"1")
    assert storage.names_in("folder") == ["z"]


def test_a_file_that_changes_while_it_is_sent_is_not_published(
    bucket: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folder = make_expert()
    storage = bucket.storage
    upload = storage.upload  # type: ignore[attr-defined]

    def change_first(path: str, source: object, file: PackageFile, progress: object) -> None:
        if file.name == "scout.safetensors":
            data = (folder / file.name).read_bytes()
            (folder / file.name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        upload(path, source, file, progress)

    storage.upload = change_first  # type: ignore[attr-defined]
    with pytest.raises(IntegrityError, match="changed while it was being published"):
        bucket.publish(folder, interface=interface)
    assert bucket.versions("german") == ()


def publisher(url: str, folder: Path, *, dies_before: str = "") -> subprocess.Popen[bytes]:
    """Start a process that publishes; killed by itself before a call on its storage, if asked."""
    script = f"""
        import os, pathlib, signal
        from composable.packaging import open_for_publishing
        registry = open_for_publishing({url!r})
        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)
        if {dies_before!r}:
            setattr(registry.storage, {dies_before!r}, die)
        registry.publish(pathlib.Path({str(folder)!r}))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])


def packed(folder: Path, interface: RouterInterface) -> Path:
    text = (folder / "expert.toml").read_text()
    digest = f'requires = "^1"\ndigest = "{interface.digest}"'
    (folder / "expert.toml").write_text(text.replace('requires = "^1"', digest))
    return folder


def test_publishers_at_once_end_consistent(
    url: str, bucket: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    """Six publish versions of one package, and all are there; no lock exists anywhere."""
    folders = [
        packed(make_expert("german", f"1.{minor}.0", seed=minor), interface) for minor in range(6)
    ]
    jobs = [publisher(url, folder) for folder in folders]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    assert [release.version.minor for release in bucket.versions("german")] == list(range(6))
    assert [str(entry.version) for entry in bucket.entries()] == ["1.5.0"]


def test_of_two_contents_under_one_version_exactly_one_is_published(
    url: str, bucket: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    folders = [packed(make_expert(seed=seed), interface) for seed in range(2)]
    jobs = [publisher(url, folder) for folder in folders]
    assert sorted(job.wait() for job in jobs) == [0, 1]
    (release,) = bucket.versions("german")
    bucket.read_manifest(release)


@pytest.mark.parametrize("call", ["upload", "create", "replace"])
def test_a_publisher_that_is_killed_loses_nothing_of_others(
    url: str, bucket: Registry, make_expert: MakeExpert, interface: RouterInterface, call: str
) -> None:
    bucket.publish(make_expert("german", "1.0.0"), interface=interface)
    folder = packed(make_expert("german", "1.1.0", seed=1), interface)
    assert publisher(url, folder, dies_before=call).wait() == -9
    bucket.publish(make_expert("german", "1.2.0", seed=2), interface=interface)
    versions = [release.version.minor for release in bucket.versions("german")]
    assert versions in ([0, 2], [0, 1, 2])
    bucket.publish(folder)
    assert [release.version.minor for release in bucket.versions("german")] == [0, 1, 2]


def test_an_index_is_never_set_back(
    url: str, bucket: Registry, make_expert: MakeExpert, interface: RouterInterface
) -> None:
    """A publisher that read the index before another one wrote it must not write over that."""
    bucket.publish(make_expert("german", "1.0.0"), interface=interface)
    path = index_path("german")
    stale = BucketStorage(url).read(path)
    bucket.publish(make_expert("german", "1.1.0", seed=1), interface=interface)
    assert stale is not None
    assert not BucketStorage(url).replace(path, stale.data, stale)
    assert len(bucket.versions("german")) == 2


def test_nobody_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("composable.packaging.registry.budget.MAX_RETRIES", 0)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        BucketStorage(url).read("config.json")


def test_obstore_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(RegistryError, match="need the package obstore") as caught:
        open_registry("s3://bucket/registry")
    assert "composable[cloud]" in str(caught.value)
