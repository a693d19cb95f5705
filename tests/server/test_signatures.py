"""A server whose registry is signed: by publishers on their machines, confirmed by the server."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import select

from composable.errors import KeyFileError, RegistryError, SignatureError
from composable.interface import RouterInterface
from composable.packaging import Registry, Requirement, Version
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.served import ServedRegistry, ServedStorage
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.trust.keys import create_key
from composable.packaging.versions.constraint import Constraint
from composable.server.signatures import CONFIRMED_DAYS, DatabaseFiles, SigningService
from composable.server.tables import SignedFile
from tests.server.conftest import MakeVetted
from tests.support.registries import Served, run_server
from tests.support.signed_registries import make_advisory

ADVISORY = make_advisory(fixed=(Version("2.0.0"),), affected=(Constraint("<2"),))
ADMIN = ("read", "publish", "yank", "account", "admin", "vet")


@dataclass
class Lab:
    """A signed server, with an operator, and publishers that have accounts and keys.

    Args:
        server: The server.
        home: A folder for the keys and the state of every machine.
        tokens: The token of each machine.
    """

    server: Served
    home: Path
    tokens: dict[str, str]

    def keys(self, machine: str) -> Path:
        return self.home / "keys" / machine

    def settings(self, machine: str) -> SignatureSettings:
        return SignatureSettings(state=self.home / "state" / machine, keys=self.keys(machine))

    def open(self, machine: str) -> ServedRegistry:
        """Open the registry for publishing on a machine."""
        storage = ServedStorage(self.server.url, self.tokens[machine])
        return ServedRegistry(storage, signatures=self.settings(machine))

    def client(self, machine: str = "client") -> Registry:
        """Open the registry for reading on a machine."""
        return Registry(WebStorage(self.server.url), signatures=self.settings(machine))

    def seen(self, machine: str = "client") -> dict[str, list[tuple[str, bool]]]:
        """Return what a client accepts: verified releases, and whether each is yanked."""
        registry = self.client(machine)
        found = {}
        for name in registry.names():
            releases = registry.versions(name)
            for release in releases:
                registry.verify_release(release)
            found[name] = [(str(release.version), release.is_yanked) for release in releases]
        return found

    def join(self, name: str, *packages: str) -> None:
        """Give somebody an account and a key that may publish packages."""
        self.tokens[name] = self.server.account(name)
        key = create_key(self.keys(name), name, None)
        signatures = self.open("operator").find_signatures()
        assert signatures is not None
        assert signatures.change(
            signatures.authority().grant(name, packages, [key.public])
        ).is_visible


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    home = tmp_path / "machines"
    online = home / "keys" / "server"
    with run_server(tmp_path / "served", keys=online) as server:
        lab = Lab(server, home, {})
        lab.tokens["operator"] = server.account("operator", is_admin=True, scopes=ADMIN)
        lab.open("operator").open_signatures().create(None)
        # The online key moves to the server; the operator keeps the offline ones.
        online.mkdir(parents=True)
        shutil.move(lab.keys("operator") / "online.key", online)
        lab.join("alice", "german", "italian")
        lab.join("bob", "french")
        yield lab


@pytest.fixture
def publish(
    lab: Lab, make_vetted: MakeVetted, interface: RouterInterface
) -> Callable[..., ServedRegistry]:
    def run(machine: str, name: str, version: str = "1.0.0", **settings: object) -> ServedRegistry:
        registry = lab.open(machine)
        registry.publish(make_vetted(name, version, **settings), interface=interface)
        return registry

    return run


def test_what_publishers_sign_is_confirmed_and_verified(
    lab: Lab, publish: Callable[..., ServedRegistry]
) -> None:
    assert not publish("alice", "german").awaits_operator
    publish("bob", "french")
    publish("alice", "german", "2.0.0", seed=1).yank("german", Version("1.0.0"), "worse")
    assert lab.seen() == {
        "german": [("1.0.0", True), ("2.0.0", False)],
        "french": [("1.0.0", False)],
    }
    lab.open("alice").unyank("german", Version("1.0.0"))
    assert lab.seen()["german"] == [("1.0.0", False), ("2.0.0", False)]
    publish("alice", "german", "2.0.0", seed=1)  # again: nothing changes
    assert lab.seen()["german"] == [("1.0.0", False), ("2.0.0", False)]

    # Advisories need a root key; the feed is signed.
    lab.open("operator").advise(ADVISORY)
    assert [advisory.id for advisory in lab.client().advisories() or ()] == ["german-1"]
    with pytest.raises(KeyFileError, match="is here"):
        lab.open("alice").advise(dataclasses.replace(ADVISORY, id="german-2"))

    # Pages, the API and search say who signed.
    _, german = lab.server.api("GET", "/packages/german/2.0.0")
    signer = german["signer"]
    assert signer["publisher"] == "alice" and signer["key"].startswith("ed25519:")
    _, page = lab.server.ask("GET", "/experts/german", accept="text/html")
    assert signer["key"] in page.decode()
    _, found = lab.server.api("GET", "/search?signed=yes")
    assert found["total"] == 2 and found["facets"]["signed"] == {"yes": 2}
    assert lab.server.api("GET", "/search?signed=no")[1]["total"] == 0


def test_the_server_refuses_what_is_not_signed_by_the_right_key(
    lab: Lab,
    publish: Callable[..., ServedRegistry],
    make_vetted: MakeVetted,
    interface: RouterInterface,
) -> None:
    publish("alice", "german")
    publish("bob", "french")
    before = lab.seen()
    folder = make_vetted("german", "2.0.0", seed=2)

    # Without a statement.
    plain = ServedRegistry(ServedStorage(lab.server.url, lab.tokens["alice"]))
    with pytest.raises(RegistryError, match="is unsigned, and this registry is signed"):
        plain.publish(folder, interface=interface)
    # With the token of alice and the key of bob.
    shutil.rmtree(lab.keys("alice"))
    shutil.copytree(lab.keys("bob"), lab.keys("alice"))
    with pytest.raises(KeyFileError, match="'alice'"):
        lab.open("alice").publish(folder, interface=interface)
    forged = lab.open("alice").open_signatures()
    forged_keys = forged.keyring.files()
    statement = _sign_with(forged, folder, interface, forged_keys[0])
    with pytest.raises(RegistryError, match="not signed by a key of its publisher"):
        plain._send_release(folder, *_packed(folder, interface), statement, None, {})
    # A list of alice that bob signed, and one of bob that has a package of alice.
    signatory = lab.open("bob").open_signatures().signatory()
    held = signatory.load()
    index = lab.server.services
    with index.database.read() as session:
        data = DatabaseFiles(session, "here").read(
            f"blobs/{_digest_of(lab, 'german')[:2]}/{_digest_of(lab, 'german')}"
        )
    assert data is not None
    delegator = held.delegator_of("french")
    own = signatory.load_delegated("publisher-bob", delegator)
    with pytest.raises(RegistryError, match="may not publish"):
        signatory.sign_targets("publisher-bob", held.grants["bob"].keys, {"german": data.data}, own)
    with pytest.raises(RegistryError, match="not signed by the keys in charge"):
        signatory.sign_targets("publisher-alice", held.grants["bob"].keys, {}, None)
    # What only operators may store.
    storage = ServedStorage(lab.server.url, lab.tokens["bob"])
    for path in (
        "config.json",
        "trust/timestamp.json",
        "trust/9.targets.json",
        "trust/2.root.json",
    ):
        seen = storage.read(path)
        with pytest.raises(RegistryError, match="does not allow 'admin'"):
            storage.replace(path, b"{}", seen)
    for path in ("index/ge/german.jsonl", "trust/x.json", "../trust/timestamp.json", "blobs/aa/b"):
        with pytest.raises(RegistryError, match="is no file of a registry's signatures"):
            storage.create(path, b"{}")
    # An index of alice that is not as the registry has it, though she signs it.
    assert lab.seen() == before


def test_grants_are_by_owner_and_revocation_counts_at_once(
    lab: Lab, publish: Callable[..., ServedRegistry]
) -> None:
    publish("alice", "german")
    assert lab.seen() == {"german": [("1.0.0", False)]}
    with pytest.raises(SignatureError, match="no publisher may publish 'spanish'"):
        publish("alice", "spanish")
    operator = lab.open("operator").open_signatures()
    assert operator.change(operator.authority().revoke("alice")).is_visible
    with pytest.raises(SignatureError) as caught:
        lab.seen()
    assert caught.value.kind == "revoked"
    _, german = lab.server.api("GET", "/packages/german/1.0.0")
    assert german["signer"] is None
    assert lab.server.api("GET", "/search?signed=yes")[1]["total"] == 0

    # A new key, granted; alice vouches for what is hers, over HTTP.
    shutil.rmtree(lab.keys("alice"))
    key = create_key(lab.keys("alice"), "alice-2", None)
    operator = lab.open("operator").open_signatures()
    assert operator.change(operator.authority().grant("alice", [], [key.public])).is_visible
    outcome = lab.open("alice").open_signatures().sign([Requirement.parse("german")])
    assert outcome.is_visible and "german 1.0.0" in outcome.signed
    assert lab.seen() == {"german": [("1.0.0", False)]}
    assert lab.server.api("GET", "/packages/german/1.0.0")[1]["signer"]["publisher"] == "alice"


def test_a_quarantined_release_is_listed_after_vetting(
    tmp_path: Path, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    from composable.server.settings import Settings

    online = tmp_path / "online"
    settings = Settings(is_quarantined=True)
    with run_server(tmp_path / "served", settings=settings, keys=online) as server:
        lab = Lab(server, tmp_path, {})
        lab.tokens["operator"] = server.account("operator", is_admin=True, scopes=ADMIN)
        lab.open("operator").open_signatures().create(None)
        online.mkdir()
        shutil.move(lab.keys("operator") / "online.key", online)
        lab.join("alice", "german")
        registry = lab.open("alice")
        registry.publish(make_vetted("german"), interface=interface)
        assert registry.awaits_vetting and not registry.awaits_operator
        assert lab.seen() == {}
        verdict = {"passed": True, "note": ""}
        status, _ = server.api(
            "POST", "/packages/german/1.0.0/vetting", verdict, lab.tokens["operator"]
        )
        assert status == 204
        assert lab.seen() == {}
        assert lab.open("alice").open_signatures().sign().is_visible
        assert lab.seen() == {"german": [("1.0.0", False)]}


def test_it_confirms_again_in_time_and_numbers_increase(
    lab: Lab, publish: Callable[..., ServedRegistry]
) -> None:
    publish("alice", "german")
    services = lab.server.services
    assert not services.signing.renew()  # it holds for days

    def version(now: datetime.datetime) -> int:
        settings = dataclasses.replace(lab.settings("watcher"), now=lambda: now)
        client = Registry(WebStorage(lab.server.url), signatures=settings).open_signatures()
        client.documents.refresh()
        return client.documents.known_files()["snapshot"].version

    start = datetime.datetime.now(datetime.UTC)
    before = version(start)
    later = start + datetime.timedelta(days=CONFIRMED_DAYS - 1)
    services.signing.clock = lambda: later
    assert services.signing.renew() and version(later) == before + 1
    assert not services.signing.renew()

    # A replica on the same database continues the same numbers.
    replica = SigningService(services.database, lab.keys("server"))
    much_later = later + datetime.timedelta(days=CONFIRMED_DAYS - 1)
    replica.clock = lambda: much_later
    assert replica.renew() and version(much_later) == before + 2


def test_replicas_sign_at_the_same_time(
    lab: Lab, make_vetted: MakeVetted, interface: RouterInterface, tmp_path: Path
) -> None:
    """Neither loses what the other confirmed, and every version is that of one of them."""
    work = [("alice", "german"), ("bob", "french"), ("alice", "italian")]
    folders = [make_vetted(name) for _, name in work]
    with run_server(tmp_path / "served", keys=lab.keys("server")) as other:
        urls = [lab.server.url, other.url, lab.server.url]

        def publish(number: int) -> None:
            machine = work[number][0]
            storage = ServedStorage(urls[number], lab.tokens[machine])
            settings = dataclasses.replace(
                lab.settings(machine), state=lab.home / "state" / f"{machine}-{number}"
            )
            registry = ServedRegistry(storage, signatures=settings)
            registry.publish(folders[number], interface=interface)

        with ThreadPoolExecutor(len(work)) as pool:
            list(pool.map(publish, range(len(work))))
        seen = {name: [("1.0.0", False)] for _, name in work}
        assert lab.seen() == seen
        lab.server.url = other.url
        assert lab.seen("another") == seen


def test_old_lists_are_dropped(lab: Lab, publish: Callable[..., ServedRegistry]) -> None:
    registry = publish("alice", "german")
    for _ in range(3):
        registry.yank("german", Version("1.0.0"))
        registry.unyank("german", Version("1.0.0"))
    with lab.server.services.database.read() as session:
        paths = session.scalars(select(SignedFile.path)).all()
    assert sum(path.endswith(".snapshot.json") for path in paths) == 10
    assert sum(path.endswith(".root.json") for path in paths) == 1
    assert lab.seen() == {"german": [("1.0.0", False)]}


def test_private_packages_are_refused(
    lab: Lab, make_vetted: MakeVetted, publish: Callable[..., ServedRegistry]
) -> None:
    publish("alice", "german")
    status, answer = lab.server.api(
        "PATCH", "/packages/german", {"private": True}, lab.tokens["alice"]
    )
    assert status == 422 and "no private packages" in answer["error"]["message"]


def test_the_online_key_is_rotated(lab: Lab, publish: Callable[..., ServedRegistry]) -> None:
    """The new key is made on the server; the old one confirms nothing afterwards."""
    publish("alice", "german")
    assert lab.seen() == {"german": [("1.0.0", False)]}
    rotate_online(lab)
    publish("alice", "italian")
    assert lab.seen() == {"german": [("1.0.0", False)], "italian": [("1.0.0", False)]}


def rotate_online(lab: Lab) -> None:
    new = create_key(lab.keys("server"), "online-2", None)
    shutil.copy(new.path, lab.keys("operator"))
    operator = lab.open("operator").open_signatures()
    assert operator.change(operator.authority().rotate_online(new.public)).is_visible
    (lab.keys("operator") / "online-2.key").unlink()
    (lab.keys("server") / "online.key").unlink()


# What a compromised server can and cannot do: docs/concepts/signatures.md.


def tamper(lab: Lab, path: str, data: bytes | None) -> None:
    """Change a file of the database, as whoever controls the server can."""
    with lab.server.services.database.write() as session:
        files = DatabaseFiles(session, "here")
        if data is None:
            files.remove(path)
        else:
            files.replace(path, data, files.read(path))


def test_compromised_server_can_withhold(lab: Lab, publish: Callable[..., ServedRegistry]) -> None:
    """It confirms an old state for clients that have not seen the newer one."""
    publish("alice", "german")
    with lab.server.services.database.read() as session:
        before = {row.path: row.data for row in session.scalars(select(SignedFile))}
    lab.seen()
    publish("alice", "german", "2.0.0", seed=1)
    lab.seen("witness")
    with lab.server.services.database.read() as session:
        after = set(session.scalars(select(SignedFile.path)))
    for path in after:
        tamper(lab, path, before.get(path))
    assert lab.seen("newcomer") == lab.seen() == {"german": [("1.0.0", False)]}
    assert _kind(lab, "witness") == "rollback"
    # So it is after a backup was restored: a new online key starts where it likes.
    shutil.rmtree(lab.home / "state" / "operator")
    rotate_online(lab)
    assert lab.seen("witness") == {"german": [("1.0.0", False)]}


def test_compromised_server_cannot_change_what_clients_accept(
    lab: Lab, publish: Callable[..., ServedRegistry]
) -> None:
    publish("alice", "german").yank("german", Version("1.0.0"))
    publish("bob", "french")
    before = lab.seen()
    services = lab.server.services
    with services.database.write() as session, services.signing._open(session) as signatures:
        signatory = signatures.signatory()
        held = signatory.load()
        # It cannot sign for publishers, root or the feed.
        for what in (
            lambda: signatory.find_publisher("german"),
            lambda: signatory.find_advisories_signers(),
            lambda: signatures.authority().revoke("alice"),
        ):
            with pytest.raises(KeyFileError, match="is here"):
                what()
        # It puts an un-yanked index in the place of the signed one, and lists it.
        digest = _digest_of(lab, "german")
        path = f"blobs/{digest[:2]}/{digest}"
        index = signatory.files.read(path)
        assert index is not None and b'"yanked":true' in index.data
        online = held.root.roles["timestamp"].keyids[0]
        assert signatory.sign_targets(
            "publisher-alice",
            (held.root.keys[online],),
            {"german": index.data.replace(b'"yanked":true', b'"yanked":false')},
            signatory.load_delegated("publisher-alice", held.delegator_of("german")),
        )
        signatures.confirm()  # honest code skips what alice did not sign
    assert lab.seen() == before
    # It replaces the signed index, or a statement.
    forged = index.data.replace(b'"yanked":true', b'"yanked":false')
    tamper(lab, path, forged)
    assert _kind(lab, "newcomer") == "wrong-content"
    tamper(lab, path, index.data)
    statement = "statements/german/1.0.0.json"
    with services.database.read() as session:
        genuine = DatabaseFiles(session, "here").read(statement)
        other = DatabaseFiles(session, "here").read("statements/french/1.0.0.json")
    assert genuine is not None and other is not None
    tamper(lab, statement, other.data)
    assert _kind(lab, "client") == "wrong-signer"
    tamper(lab, statement, genuine.data)
    # It says that the registry is unsigned: clients that know it refuse.
    assert lab.seen() == before
    with services.database.write() as session:
        for row in session.scalars(select(SignedFile)):
            session.delete(row)
    assert _kind(lab, "client") == "unsigned"


def _kind(lab: Lab, machine: str) -> str:
    with pytest.raises(SignatureError) as caught:
        lab.seen(machine)
    return caught.value.kind


def _digest_of(lab: Lab, name: str) -> str:
    found = lab.client("auditor").open_signatures().documents.find(name)
    assert found is not None
    return found.digest.removeprefix("sha256:")


def _packed(folder: Path, interface: RouterInterface) -> tuple[object]:
    from composable.packaging.manifests.packing import pack_expert

    return (pack_expert(folder, interface=interface),)


def _sign_with(signatures: object, folder: Path, interface: RouterInterface, file: object) -> str:
    from composable.packaging.registry.release import Release
    from composable.packaging.registry.signed import make_statement
    from composable.packaging.trust.statement import sign_statement

    (manifest,) = _packed(folder, interface)
    release = Release.of(manifest, "2026-11-29T12:00:00Z")
    return sign_statement(make_statement(release), file.unlock()).decode()
