"""Registries in an OCI registry: Docker's own on loopback, and answers of a hostile one."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from composable.errors import IntegrityError, RegistryError, UnreachableError
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.interface.digest import digest_bytes
from composable.packaging import (
    Registry,
    Store,
    Version,
    open_for_publishing,
    open_registry,
)
from composable.packaging.install.mirror import mirror_registry
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry import oci
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.oci import OciStorage
from composable.packaging.registry.oci_manifests import MANIFEST_TYPE, path_of, tag_of
from composable.packaging.registry.storage import Folder
from tests.packaging.conftest import make_expert, make_interface, registry, store  # noqa: F401
from tests.support.oci_registries import (
    Exchange,
    Relay,
    run_oci_registry,
    run_private_registry,
    run_relay,
)
from tests.support.registries import fetch
from tests.support.signed_registries import check_signed, check_signed_mirror
from tests.support.storages import check_deltas, check_releases, read_files
from tests.support.updates import LARGE

if TYPE_CHECKING:
    from tests.packaging.conftest import MakeExpert

QUICK = TimeBudget(5, first_pause_seconds=0.01)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_oci_registry(tmp_path_factory.mktemp("oci")) as at:
        yield at


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """Return the name of a repository that is empty."""
    return f"tests/{digest_bytes(request.node.name.encode())[7:19]}"


@pytest.fixture
def url(host: str, repository: str) -> str:
    return f"oci://{host}/{repository}"


@pytest.fixture
def bucket(url: str) -> Registry:
    return open_for_publishing(url)


@pytest.fixture
def relay(host: str) -> Iterator[Relay]:
    with run_relay(host) as running:
        yield running


@pytest.fixture
def storage(relay: Relay, repository: str) -> OciStorage:
    """Return the same repository behind the relay."""
    return OciStorage(f"oci://{relay.host}/{repository}", budget=QUICK)


def test_publish_find_yank_and_install(
    bucket: Registry,
    url: str,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
    store: Store,  # noqa: F811
    tmp_path: Path,
) -> None:
    check_releases(bucket, url, make_expert, interface, store, tmp_path)


def test_deltas(bucket: Registry, url: str, host: str, repository: str, tmp_path: Path) -> None:
    check_deltas(bucket, url, make_interface(**LARGE), tmp_path)
    base = f"http://{host}/v2/{repository}"
    _, data, _ = fetch(f"{base}/manifests/german-1.2.0", Accept=MANIFEST_TYPE)
    titles = [
        layer["annotations"]["org.opencontainers.image.title"]
        for layer in json.loads(data)["layers"]
    ]
    # All that the release is made of, so that it does not depend on other tags.
    made_of = ["body.safetensors.delta", "body.safetensors.delta1", "body.safetensors.base"]
    assert titles == ["expert.toml", *made_of, "scout.safetensors"]


def test_other_tools_see_a_model_with_its_files(
    bucket: Registry,
    host: str,
    repository: str,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
) -> None:
    """What a client needs that knows the specifications of OCI and ModelPack, and nothing else."""
    folder = make_expert(license_="MIT")
    published = bucket.publish(folder, interface=interface)
    base = f"http://{host}/v2/{repository}"
    _, data, kind = fetch(f"{base}/manifests/german-1.0.0", Accept=MANIFEST_TYPE)
    manifest = json.loads(data)
    assert kind == manifest["mediaType"] == MANIFEST_TYPE
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    found = {}
    for layer in manifest["layers"]:
        _, content, _ = fetch(f"{base}/blobs/{layer['digest']}")
        assert (digest_bytes(content), len(content)) == (layer["digest"], layer["size"])
        name = layer["annotations"]["org.opencontainers.image.title"]
        assert layer["annotations"]["org.cncf.model.filepath"] == name
        found[name] = (layer["mediaType"].removeprefix("application/vnd.cncf.model."), content)
    assert {name: kind for name, (kind, _) in found.items()} == {
        "README.md": "doc.v1.raw",
        "body.safetensors": "weight.v1.raw",
        "expert.toml": "weight.config.v1.raw",
        "scout.safetensors": "weight.v1.raw",
    }
    assert found["body.safetensors"][1] == (folder / "body.safetensors").read_bytes()
    assert found["expert.toml"][1].decode() == published.to_toml()
    _, config, _ = fetch(f"{base}/blobs/{manifest['config']['digest']}")
    fields = json.loads(config)
    assert fields.keys() == {"descriptor", "modelfs", "config"}
    assert fields["descriptor"]["name"] == "german"
    assert fields["descriptor"]["licenses"] == ["MIT"]
    assert fields["modelfs"] == {
        "type": "layers",
        "diffIds": [layer["digest"] for layer in manifest["layers"]],
    }


def test_a_mirror_there_and_back_is_the_same(
    bucket: Registry,
    url: str,
    registry: Registry,  # noqa: F811
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
    tmp_path: Path,
) -> None:
    registry.publish(make_expert("german", "1.0.0"), interface=interface)
    registry.publish(make_expert("german", "1.1.0-rc.1+build.5", seed=1), interface=interface)
    registry.publish(make_expert("zoology", seed=2), interface=interface)
    registry.yank("german", Version("1.0.0"))
    assert isinstance(registry.storage, Folder)
    registry.storage.replace("trust/1.root_x.json", b"{}", None)
    registry.storage.replace("trust/timestamp.json", b'{"signed":1}', None)
    mirror_registry(registry, bucket)
    assert mirror_registry(registry, bucket).documents == ()
    back = open_for_publishing(tmp_path / "back")
    mirror_registry(open_registry(url), back)
    assert read_files(tmp_path / "back") == read_files(registry.storage.root)


def test_a_state_that_was_not_seen_is_not_replaced(url: str) -> None:
    storage = OciStorage(url)
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
    assert storage.create("y", b"3")
    again = storage.read("y")
    assert again is not None and again.data == b"3"
    assert storage.create("folder/z", b"1")
    assert storage.names_in("folder") == ["z"]
    assert b"".join(storage.stream("folder/z")) == b"1"


def test_no_registry(url: str) -> None:
    with pytest.raises(RegistryError, match="is not a registry"):
        open_registry(url).versions("german")
    assert OciStorage(url).names_in("records/german") == []


@pytest.mark.parametrize(
    "location",
    ["oci://ghcr.io", "oci://ghcr.io/Team", "oci://ghcr.io/a:latest", "oci://h/a?b", "oci:///a"],
)
def test_what_is_not_a_repository(location: str) -> None:
    with pytest.raises(RegistryError) as caught:
        OciStorage(location)
    assert caught.value.hint is not None


def test_a_password_in_the_location_is_refused() -> None:
    with pytest.raises(RegistryError, match="must not contain a user name") as caught:
        OciStorage("oci://ann:secret@ghcr.io/team")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["config.json", "index/ge/german.jsonl", "names/a_b", "records/set-mm/1.0.0-rc.1.json",
     "records/set-mm/1.0.0-rc.1.yanked", "trust/3.publisher-ann.json", "a__b/c d"],
)  # fmt: skip
def test_tags_and_paths(path: str) -> None:
    assert path_of(tag_of(path)) == path


@pytest.mark.parametrize("tag", ["latest", "_", "_.._x", "_a_.._b", "__2e__2e_a", "_a__2fb", "1.0"])
def test_tags_of_others_have_no_path(tag: str) -> None:
    assert path_of(tag) is None


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(RegistryError, match="OCI registries allow 128"):
        tag_of(f"records/german/1.0.0-{'a' * 120}.json")


def publisher(url: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that publishes."""
    script = f"""
        import pathlib
        from composable.packaging import open_for_publishing
        open_for_publishing({url!r}).publish(pathlib.Path({str(folder)!r}))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])


def packed(folder: Path, interface: RouterInterface) -> Path:
    text = (folder / "expert.toml").read_text()
    digest = f'requires = "^1"\ndigest = "{interface.digest}"'
    (folder / "expert.toml").write_text(text.replace('requires = "^1"', digest))
    return folder


def test_publishers_at_once_end_consistent(
    url: str,
    bucket: Registry,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
) -> None:
    """Indexes are written until they list all releases, though OCI has no conditional write."""
    folders = [packed(make_expert("german", f"1.{n}.0", seed=n), interface) for n in range(3)]
    jobs = [publisher(url, folder) for folder in folders]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    assert [release.version.minor for release in bucket.versions("german")] == list(range(3))
    assert [str(entry.version) for entry in bucket.entries()] == ["1.2.0"]


def test_of_two_contents_under_one_version_one_is_refused(
    storage: OciStorage,
    relay: Relay,
    bucket: Registry,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
) -> None:
    """The other publisher writes the tag right after ours: it had looked before."""
    bucket.publish(make_expert(seed=1), interface=interface)
    at = f"http://{relay.target}/v2/{storage._repository}/manifests/german-1.0.0"
    other = fetch(at, Accept=MANIFEST_TYPE)[1]
    bucket.writable_storage().remove("records/german/1.0.0.json")

    def write_over(exchange: Exchange) -> None:
        if exchange.method == "PUT" and at.endswith(exchange.path):
            assert exchange.body != other
            fetch(at, "PUT", other, Content_Type=MANIFEST_TYPE)

    relay.change = write_over
    with pytest.raises(RegistryError, match="already published with other content"):
        Registry(storage).publish(make_expert(seed=0), interface=interface)
    assert fetch(at, Accept=MANIFEST_TYPE)[1] == other


def test_a_registry_whose_tags_may_not_change(
    storage: OciStorage,
    relay: Relay,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
) -> None:
    """Of two publishers of a version the registry lets one succeed; documents still change."""
    written: set[str] = set()

    def refuse_changes(exchange: Exchange) -> None:
        name = exchange.path.rpartition("/")[2]
        if exchange.method == "PUT" and "/manifests/" in exchange.path and name[0] != "_":
            if name in written:
                exchange.status = 409
                exchange.data = b'{"errors":[{"code":"TAG_INVALID","message":"immutable"}]}'
            written.add(name)

    relay.before = refuse_changes
    registry = Registry(storage)  # noqa: F811
    registry.publish(make_expert(), interface=interface)
    registry.publish(make_expert("german", "1.1.0", seed=1), interface=interface)
    assert [str(r.version) for r in registry.versions("german")] == ["1.0.0", "1.1.0"]
    seen = storage._find("records/german/1.0.0.json")
    assert seen is not None
    line = storage.read("records/german/1.1.0.json")
    assert line is not None
    forged = line.data.replace(b"1.1.0", b"1.0.0")
    with pytest.raises(RegistryError):  # its checksum
        storage._put("records/german/1.0.0.json", forged, seen.digest)
    release = registry.versions("german")[1]
    other = dataclasses.replace(release, version=Version("1.0.0")).to_line()
    assert not storage._put("records/german/1.0.0.json", other, seen.digest)


def test_a_manifest_is_sent_again_while_another_publisher_writes_its_blobs(
    storage: OciStorage,
    relay: Relay,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
) -> None:
    """As Docker's registry answers when it reads its link to a blob that is just written."""
    refused: list[str] = []

    def refuse_once(exchange: Exchange) -> None:
        is_manifest = exchange.method == "PUT" and "/manifests/" in exchange.path
        if is_manifest and exchange.path not in refused:
            refused.append(exchange.path)
            exchange.status = 400
            exchange.data = b'{"errors":[{"code":"DIGEST_INVALID","message":"did not match"}]}'

    relay.before = refuse_once
    Registry(storage).publish(make_expert(), interface=interface)
    assert [str(release.version) for release in Registry(storage).versions("german")] == ["1.0.0"]
    assert refused


@pytest.mark.parametrize(("when", "n_starts"), [("before", 1), ("change", 2)])
def test_an_upload_that_is_interrupted(
    storage: OciStorage, relay: Relay, monkeypatch: pytest.MonkeyPatch, when: str, n_starts: int
) -> None:
    """It goes on where it stopped; Docker's registry forgets it if only the answer was lost."""
    monkeypatch.setattr(oci, "CHUNK_BYTES", 1000)
    data = bytes(range(256)) * 20
    cuts = iter([False, True])

    def cut(exchange: Exchange) -> None:
        if exchange.method == "PATCH":
            exchange.is_cut = next(cuts, False)

    setattr(relay, when, cut)
    file = PackageFile(name="x", size=len(data), digest=digest_bytes(data))
    pieces = [data[at : at + 250] for at in range(0, len(data), 250)]
    storage.upload(blob_path(file.digest), lambda start: iter(pieces), file, None)
    sent = [len(exchange.body) for exchange in relay.asked if exchange.method == "PATCH"]
    assert sent == [1000] * (6 if n_starts == 1 else 7) + [120]
    assert len([e for e in relay.asked if e.method == "POST"]) == n_starts
    assert b"".join(storage.stream(blob_path(file.digest))) == data
    assert b"".join(storage.stream(blob_path(file.digest), 5000)) == data[5000:]
    before = len(relay.asked)
    storage.upload(blob_path(file.digest), lambda start: iter(pieces), file, None)
    assert [e.method for e in relay.asked[before:]] == ["HEAD"], "it is there already"


def test_an_upload_that_the_server_forgot_starts_over(storage: OciStorage, relay: Relay) -> None:
    forgotten = iter([404])

    def forget(exchange: Exchange) -> None:
        if exchange.method == "PATCH":
            exchange.status = next(forgotten, 0)

    relay.before = forget
    file = PackageFile(name="x", size=5, digest=digest_bytes(b"hello"))
    storage.upload(blob_path(file.digest), lambda start: iter([b"hello"]), file, None)
    assert len([e for e in relay.asked if e.method == "POST"]) == 2
    assert b"".join(storage.stream(blob_path(file.digest))) == b"hello"


def test_an_upload_of_other_bytes_is_not_completed(storage: OciStorage, relay: Relay) -> None:
    for data in (b"jello", b"hello!", b"hell"):
        file = PackageFile(name="x", size=5, digest=digest_bytes(b"hello"))
        with pytest.raises(IntegrityError, match="changed while it was being published"):
            storage.upload(blob_path(file.digest), lambda start, d=data: iter([d]), file, None)
    assert not [exchange for exchange in relay.asked if exchange.method == "PUT"]


def test_what_the_registry_received_is_checked_there(storage: OciStorage, relay: Relay) -> None:
    def damage(exchange: Exchange) -> None:
        if exchange.method == "PATCH":
            exchange.body = b"J" + exchange.body[1:]

    relay.before = damage
    file = PackageFile(name="x", size=5, digest=digest_bytes(b"hello"))
    with pytest.raises(RegistryError, match="DIGEST_INVALID"):
        storage.upload(blob_path(file.digest), lambda start: iter([b"hello"]), file, None)


def test_memory_does_not_grow_with_files(url: str, tmp_path: Path) -> None:
    """64 MB pass through both ways in a fraction of that memory."""
    piece = bytes(range(256)) * 4096
    n_pieces = 64
    state = hashlib.sha256()
    for _ in range(n_pieces):
        state.update(piece)
    file = PackageFile(name="x", size=n_pieces * len(piece), digest=f"sha256:{state.hexdigest()}")
    storage = OciStorage(url)
    tracemalloc.start()
    storage.upload(
        blob_path(file.digest), lambda start: (piece for _ in range(n_pieces)), file, None
    )
    total = sum(len(data) for data in storage.stream(blob_path(file.digest)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == file.size
    assert peak < 40e6


@pytest.fixture
def published(
    bucket: Registry,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
) -> Registry:
    bucket.publish(make_expert(), interface=interface)
    return bucket


def on(ending: str, act: Any) -> Any:
    """Return a change of the answers to requests for a path that ends so."""

    def change(exchange: Exchange) -> None:
        if exchange.method == "GET" and exchange.path.partition("?")[0].endswith(ending):
            act(exchange)

    return change


def edit(**fields: Any) -> Any:
    """Return a change of fields of a manifest, with the digest that it then has."""

    def act(exchange: Exchange) -> None:
        exchange.data = json.dumps({**json.loads(exchange.data), **fields}).encode()
        exchange.headers["Docker-Content-Digest"] = digest_bytes(exchange.data)

    return act


def test_wrong_bytes_are_noticed(published: Registry, storage: OciStorage, relay: Relay) -> None:
    (release,) = published.versions("german")
    remote = Registry(storage)

    def flip(exchange: Exchange) -> None:
        exchange.data = exchange.data[:-1] + b"~"

    relay.change = on(release.manifest, flip)
    with pytest.raises(IntegrityError, match="does not match its digest"):
        remote.read_manifest(release)
    relay.change = on("/manifests/_config.json", flip)
    with pytest.raises(UnreachableError, match="does not match its digest"):
        storage.read("config.json")
    relay.change = lambda exchange: (
        flip(exchange) if "/blobs/" in exchange.path and exchange.method == "GET" else None
    )
    with pytest.raises(IntegrityError):
        storage.read("config.json")


def test_more_bytes_than_stated_are_refused(
    published: Registry, storage: OciStorage, relay: Relay
) -> None:
    def extend(exchange: Exchange) -> None:
        exchange.data += b" " * 100_000

    relay.change = lambda exchange: extend(exchange) if "/blobs/" in exchange.path else None
    with pytest.raises(IntegrityError):
        storage.read("index/ge/german.jsonl")
    relay.change = on("/manifests/_config.json", lambda e: extend_to(e, 5 << 20))
    with pytest.raises(RegistryError, match="sent more than"):
        storage.read("config.json")


def extend_to(exchange: Exchange, size: int) -> None:
    exchange.data = exchange.data.ljust(size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mediaType": "application/vnd.oci.image.index.v1+json"}, "it is of type"),
        ({"artifactType": "application/vnd.example"}, "it holds 'application/vnd.example'"),
        ({"layers": []}, "another document"),
        ({"layers": [{"digest": "sha256:../../x", "size": 1}]}, "no SHA-256"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": -1}]}, "no size"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": 1 << 40}]}, "larger than 64 MiB"),
        ({"annotations": {"org.opencontainers.image.title": "../config.json"}}, "another document"),
    ],
)
def test_manifests_of_another_kind_are_refused(
    published: Registry, storage: OciStorage, relay: Relay, fields: Any, message: str
) -> None:
    relay.change = on("/manifests/_config.json", edit(**fields))
    with pytest.raises(RegistryError, match=message):
        storage.read("config.json")


def test_an_image_under_our_tag_is_refused(
    published: Registry, storage: OciStorage, relay: Relay
) -> None:
    def send_image(exchange: Exchange) -> None:
        exchange.headers["Content-Type"] = "application/vnd.docker.distribution.manifest.v2+json"

    relay.change = on("/manifests/_config.json", send_image)
    with pytest.raises(RegistryError, match="another program has written this tag"):
        storage.read("config.json")


def test_a_release_with_other_layers_is_refused(
    published: Registry, storage: OciStorage, relay: Relay
) -> None:
    def swap(exchange: Exchange) -> None:
        fields = json.loads(exchange.data)
        edit(layers=fields["layers"][1:])(exchange)

    relay.change = on("/manifests/german-1.0.0", swap)
    with pytest.raises(RegistryError, match="lists other files"):
        storage.read("records/german/1.0.0.json")


def test_a_redirect_to_another_server_gets_no_credentials(
    published: Registry, relay: Relay, repository: str, host: str
) -> None:
    """Registries redirect to the bucket that holds their blobs."""
    (release,) = published.versions("german")
    with run_relay(host) as elsewhere:
        pair = f"Basic {base64.b64encode(b'ann:secret').decode()}"

        def redirect(exchange: Exchange) -> None:
            if exchange.sent.get("Authorization") != pair:
                exchange.status = 401
                exchange.headers = {"WWW-Authenticate": 'Basic realm="x"'}
            elif "/blobs/" in exchange.path:
                exchange.status = 307
                exchange.headers = {"Location": f"http://{elsewhere.host}{exchange.path}"}

        relay.before = redirect
        storage = OciStorage(f"oci://{relay.host}/{repository}", "ann:secret", budget=QUICK)
        assert Registry(storage).read_manifest(release).name == "german"
        assert elsewhere.asked
        assert not [e for e in elsewhere.asked if "Authorization" in e.sent]

        def challenge(exchange: Exchange) -> None:
            exchange.status = 401
            exchange.headers = {"WWW-Authenticate": 'Basic realm="x"'}

        elsewhere.before = challenge
        with pytest.raises(RegistryError, match="401"):
            Registry(storage).read_manifest(release)
        assert not [e for e in elsewhere.asked if "Authorization" in e.sent]


@pytest.mark.parametrize("where", ["http://example.org/upload", "https://127.0.0.1/upload"])
def test_an_upload_does_not_go_to_another_server(
    storage: OciStorage, relay: Relay, where: str
) -> None:
    def send_away(exchange: Exchange) -> None:
        if exchange.method == "POST":
            exchange.headers["Location"] = where

    relay.change = send_away
    with pytest.raises(RegistryError, match="asks to upload to another server"):
        storage.create("x", b"1")


def test_a_list_of_tags_in_pages(published: Registry, storage: OciStorage, relay: Relay) -> None:
    def cut_pages(exchange: Exchange) -> None:
        if exchange.path.partition("?")[0].endswith("/tags/list"):
            tags = sorted(json.loads(exchange.data)["tags"])
            last = exchange.path.partition("last=")[2]
            left = [tag for tag in tags if tag > last]
            exchange.data = json.dumps({"tags": left[:1]}).encode()
            if left[1:]:
                path = exchange.path.partition("?")[0]
                exchange.headers["Link"] = f'<{path}?n=1&last={left[0]}>; rel="next"'

    relay.change = cut_pages
    assert storage.names_in("records/german") == ["1.0.0.json"]
    relay.change = on(
        "/tags/list",
        lambda e: e.headers.update(Link='<http://example.org/v2/tags/list>; rel="next"'),
    )
    with pytest.raises(RegistryError, match="another server"):
        storage.names_in("records/german")
    relay.change = on("/tags/list", lambda e: setattr(e, "data", b'{"tags": [1]}'))
    with pytest.raises(RegistryError, match="is not a list of tags"):
        storage.names_in("records/german")


def test_a_download_goes_on_where_it_was_interrupted(
    published: Registry, storage: OciStorage, relay: Relay
) -> None:
    (release,) = published.versions("german")
    (body,) = (file for file in release.files if file.name == "body.safetensors")
    cuts = iter([500, 300])

    def cut(exchange: Exchange) -> None:
        if exchange.path.endswith(body.digest) and exchange.method == "GET":
            size = next(cuts, None)
            if size is not None:
                exchange.data = exchange.data[:size]

    # The relay states the length that it cut to, so the file looks shorter: the reader, who knows
    # its size, asks for the rest.
    relay.change = cut
    data = b""
    while len(data) < body.size:
        data += b"".join(Registry(storage).stream(body.digest, len(data)))
    assert digest_bytes(data) == body.digest
    ranges = [e.sent.get("Range") for e in relay.asked if e.path.endswith(body.digest)]
    assert ranges[-3:] == [None, "bytes=500-", "bytes=800-"]


def test_a_registry_with_tokens(
    tmp_path: Path,
    make_expert: MakeExpert,  # noqa: F811
    interface: RouterInterface,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everybody may read; a token for writing is asked with the credentials, and only then."""
    with run_private_registry(tmp_path / "oci", "ann:open-sesame") as (host, tokens):
        location = f"oci://{host}/team/experts"
        monkeypatch.setenv("COMPOSABLE_TOKEN_PUBLISH", "ann:open-sesame")
        monkeypatch.setenv("COMPOSABLE_ORIGIN_PUBLISH", f"http://{host}")
        open_for_publishing(location).publish(make_expert(), interface=interface)
        scopes = {query["scope"] for query, _ in tokens.asked}
        assert scopes == {
            "repository:team/experts:pull",
            "repository:team/experts:pull,push",
        }
        tokens.asked.clear()
        assert open_registry(location).names() == ["german"]
        assert [login for _, login in tokens.asked] == [""]
        with pytest.raises(RegistryError, match="401"):
            OciStorage(location, budget=QUICK).create("x", b"1")
        with pytest.raises(RegistryError, match="refused access") as caught:
            OciStorage(location, "ann:wrong", budget=QUICK).read("config.json")
        assert "wrong" not in str(caught.value)
        monkeypatch.setenv("COMPOSABLE_ORIGIN_PUBLISH", "https://example.org")
        tokens.asked.clear()
        with pytest.raises(RegistryError, match="401"):
            expert = make_expert("german", "1.1.0", seed=1)
            open_for_publishing(location).publish(expert, interface=interface)
        assert not [login for _, login in tokens.asked if login], "it is for another server"


@pytest.mark.parametrize(
    ("realm", "message"),
    [
        ("http://example.org/token", "send the credentials to another server"),
        ("ftp://127.0.0.1/token", "not encrypted or not a URL"),
        ("nowhere", "not encrypted or not a URL"),
    ],
)
def test_credentials_do_not_go_to_another_server(
    relay: Relay, repository: str, realm: str, message: str
) -> None:
    def challenge(exchange: Exchange) -> None:
        exchange.status = 401
        exchange.headers = {"WWW-Authenticate": f'Bearer realm="{realm}",service="x"'}

    relay.before = challenge
    storage = OciStorage(f"oci://{relay.host}/{repository}", "ann:secret", budget=QUICK)
    with pytest.raises(RegistryError, match=message):
        storage.read("config.json")


def test_nobody_there() -> None:
    storage = OciStorage("oci://127.0.0.1:1/x", budget=TimeBudget(5, max_retries=0))
    with pytest.raises(UnreachableError, match="cannot be reached"):
        storage.read("config.json")


def test_a_signed_registry(url: str, tmp_path: Path, interface: RouterInterface) -> None:
    check_signed(url, tmp_path, interface)


def test_a_mirror_of_a_signed_registry(
    url: str, tmp_path: Path, interface: RouterInterface
) -> None:
    check_signed_mirror(url, tmp_path, interface)
