"""Publishers that sign as an identity, with a sigstore on loopback: tests/support/sigstores.py."""

from __future__ import annotations

import base64
import copy
import datetime
import json
import re
import shutil
import socket
import sys
import threading
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sigstore", reason="needs composable[sigstore]; run `make test-server`")

from cryptography.hazmat.primitives.asymmetric import ec
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from composable.errors import (
    IdentityError,
    KeyFileError,
    RegistryError,
    SignatureError,
)
from composable.packaging import Registry, Requirement, Version, open_for_publishing, open_registry
from composable.packaging.install.mirror import mirror_registry
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.release import Release
from composable.packaging.registry.served import ServedRegistry, ServedStorage
from composable.packaging.trust import metadata as metadata_module
from composable.packaging.trust.identities import (
    BUNDLE,
    IdentityKey,
    Sigstore,
    hex_signature,
    parse_signer,
)
from composable.packaging.trust.ledger import describe_file
from composable.packaging.trust.metadata import metadata_path, to_bytes
from tests.cli.conftest import Fakes, Outcome
from tests.packaging.conftest import make_interface
from tests.server.test_signatures import ADMIN, Lab
from tests.support.registries import make_vetted_expert, run_server
from tests.support.signed_registries import OPERATOR, World, make_advisory
from tests.support.sigstores import Account, LocalSigstore, run_sigstore

WORKFLOW = "https://github.com/alice/german/.github/workflows/publish.yml@refs/heads/main"
Forge = Callable[[LocalSigstore, Account, bytes], dict[str, Any]]


@pytest.fixture(scope="module")
def sigstore() -> Iterator[LocalSigstore]:
    with run_sigstore() as local:
        yield local


@pytest.fixture(scope="module")
def other_sigstore() -> Iterator[LocalSigstore]:
    with run_sigstore() as local:
        yield local


@pytest.fixture
def local(sigstore: LocalSigstore) -> Iterator[LocalSigstore]:
    yield sigstore
    sigstore.down.clear()
    sigstore.offset = datetime.timedelta()
    sigstore.person = "alice@example.org"


@pytest.fixture
def alice(local: LocalSigstore) -> Account:
    """A workflow on GitHub."""
    return local.account(WORKFLOW)


@pytest.fixture(autouse=True)
def machine(
    local: LocalSigstore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> pytest.MonkeyPatch:
    """This machine uses the sigstore on loopback, and has no credential and no terminal."""
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI", "SIGSTORE_IDENTITY_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "sigstore.json"
    config.write_text(json.dumps(local.config()))
    monkeypatch.setenv("COMPOSABLE_SIGSTORE", str(config))
    return monkeypatch


@pytest.fixture
def in_ci(machine: pytest.MonkeyPatch, local: LocalSigstore) -> Callable[[str], None]:
    """Return a function that makes this machine run a workflow on GitHub."""

    def run(workflow: str = WORKFLOW) -> None:
        machine.setenv("GITHUB_ACTIONS", "true")
        machine.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{local.url}/actions/token?api-version=2")
        machine.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", urllib.parse.quote(workflow, safe=""))

    return run


@pytest.fixture(scope="module")
def genuine(sigstore: LocalSigstore, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A registry in which alice may publish german with an identity, and bob french with a key."""
    world = World(tmp_path_factory.mktemp("identities") / "world", make_interface())
    world.create()
    accept(world, sigstore)
    grant(world, sigstore.account(WORKFLOW).key)
    world.grant("bob", "french")
    world.publish("bob", "french", "1.0.0")
    world.confirm()
    return world


@pytest.fixture
def world(genuine: World, tmp_path: Path) -> World:
    return genuine.copy(tmp_path / "world")


@pytest.fixture
def published(world: World, in_ci: Callable[..., None]) -> World:
    """The same after alice has published german 1.0.0."""
    in_ci()
    world.publish("alice", "german", "1.0.0")
    world.confirm()
    return world


def accept(world: World, local: LocalSigstore) -> None:
    signatures = world.signatures(OPERATOR)
    outcome = signatures.authority().accept_sigstore(Sigstore(local.trusted_root()))
    assert signatures.change(outcome).is_visible


def grant(world: World, key: IdentityKey, publisher: str = "alice", *names: str) -> None:
    signatures = world.signatures(OPERATOR)
    signatures.change(signatures.authority().grant(publisher, names or ["german"], [key]))


def granted(world: World) -> IdentityKey:
    """Return the identity of alice as it is granted."""
    (key,) = world.signatures(OPERATOR).authority().load().grants["alice"].keys
    assert isinstance(key, IdentityKey)
    return key


def use(registry: Registry, name: str = "german") -> list[str]:
    """Return the releases of a package whose statements are verified."""
    releases = registry.versions(name)
    for release in releases:
        registry.verify_release(release)
    return [str(release.version) for release in releases]


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def statement_file(world: World) -> Path:
    return world.folder / "statements/german/1.0.0.json"


def replace_statement(world: World, alice: Account, forge: Forge, local: LocalSigstore) -> None:
    """Put another signature on the statement on german 1.0.0."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Signature

    path = statement_file(world)
    envelope = Envelope.from_dict(json.loads(path.read_bytes()))
    bundle = forge(local, alice, envelope.pae())
    keyid = granted(world).keyid
    signature = hex_signature(bundle) or "00"
    envelope.signatures = {keyid: Signature(keyid, signature, {BUNDLE: bundle})}
    path.write_text(json.dumps(envelope.to_dict()))


def confirm_forged_list(world: World, alice: Account, forge: Forge, local: LocalSigstore) -> None:
    """Let a thief of the online key confirm a list of alice with another signature."""
    from securesystemslib.signer import Signature

    role = "publisher-alice"
    signatory = world.signatures(OPERATOR).signatory()
    number = signatory.next_version(role)
    newest = max(signatory.list_versions()[role])
    data = (world.folder / metadata_path(role, newest)).read_bytes()
    forged: Metadata[Targets] = Metadata.from_bytes(data)
    forged.signed.version, keyid = number, granted(world).keyid
    bundle = forge(local, alice, forged.signed_bytes)
    signature = hex_signature(bundle) or "00"
    forged.signatures = {keyid: Signature(keyid, signature, {BUNDLE: bundle})}
    path = world.folder / metadata_path(role, number)
    path.write_bytes(to_bytes(forged))
    (online,) = signatory.open_keys(
        [signatory.load().root.keys[k] for k in signatory.load().root.roles["timestamp"].keyids], ""
    )
    stamp: Metadata[Timestamp] = Metadata.from_bytes(
        (world.folder / metadata_path("timestamp")).read_bytes()
    )
    version = stamp.signed.version
    snapshot: Metadata[Snapshot] = Metadata.from_bytes(
        (world.folder / metadata_path("snapshot", version)).read_bytes()
    )
    snapshot.signed.meta[f"{role}.json"] = describe_file(number, path.read_bytes())
    snapshot.signed.version = stamp.signed.version = version + 1
    snapshot.sign(online)
    data = to_bytes(snapshot)
    (world.folder / metadata_path("snapshot", version + 1)).write_bytes(data)
    stamp.signed.snapshot_meta = describe_file(version + 1, data)
    stamp.sign(online)
    (world.folder / metadata_path("timestamp")).write_bytes(to_bytes(stamp))


# Publishing and verifying.


def test_publishing_from_a_workflow(published: World, alice: Account) -> None:
    client = published.open("client")
    (release,) = client.versions("german")
    signer = client.verify_release(release)
    assert signer is not None
    assert (signer.publisher, signer.key) == ("alice", alice.text)
    assert use(client, "french") == ["1.0.0"]


def test_verification_needs_no_network(
    published: World, machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither of a client, nor of what a machine keeps, nor of a copy of the registry."""
    attempts: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        attempts.append(address)
        raise OSError("no network")

    machine.setattr(socket.socket, "connect", refuse)
    client = published.open("client")
    assert use(client) == ["1.0.0"]
    mirror_registry(published.open("carrier"), open_for_publishing(tmp_path / "copy"))
    assert use(open_registry(tmp_path / "copy")) == ["1.0.0"]
    (release,) = client.versions("german")
    shutil.rmtree(published.folder)
    kept = published.signatures("client", is_offline=True)
    digests = {"expert.toml": release.manifest, **{f.name: f.digest for f in release.files}}
    assert kept.verify_kept("german", Version("1.0.0"), digests).publisher == "alice"
    assert attempts == []


def test_time_of_the_log_counts_and_not_now(
    published: World, local: LocalSigstore, alice: Account
) -> None:
    """The certificate of a signature that was made an hour ago has expired since."""
    local.offset = datetime.timedelta(hours=-1)
    replace_statement(published, alice, LocalSigstore.sign, local)
    assert use(published.open("client")) == ["1.0.0"]


def test_publishing_the_same_again_signs_nothing(published: World, local: LocalSigstore) -> None:
    before, n_entries = read_tree(published.folder), len(local.entries)
    published.publish("alice", "german", "1.0.0")
    assert read_tree(published.folder).keys() == before.keys()
    assert len(local.entries) == n_entries


# The library leaves the socket of its server to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_person_signs_in_with_a_browser(
    world: World, local: LocalSigstore, machine: pytest.MonkeyPatch
) -> None:
    def browse(url: str) -> bool:
        # urllib follows the way to the provider and back, as a browser would.
        threading.Thread(target=lambda: urllib.request.urlopen(url).close()).start()
        return True

    machine.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    machine.setattr(webbrowser, "open", browse)
    grant(world, local.account("alice@example.org").key, "alice", "german")
    world.publish("alice", "german", "1.0.0")
    world.confirm()
    client = world.open("client")
    signer = client.verify_release(client.versions("german")[0])
    assert signer is not None and signer.key.endswith("/people#alice@example.org")
    local.person = "mallory@example.org"
    before = read_tree(world.folder)
    with pytest.raises(IdentityError, match=r"signed in as mallory@example\.org .*, which may not"):
        world.publish("alice", "german", "1.1.0", seed=1)
    assert read_tree(world.folder) == before


def test_a_certificate_that_expires_during_an_upload_is_renewed(
    world: World, local: LocalSigstore, alice: Account, machine: pytest.MonkeyPatch
) -> None:
    machine.setenv("SIGSTORE_IDENTITY_TOKEN", local.make_token(alice))
    registry, n_certificates = world.open("alice"), len(local.certificates)
    signatures = registry.find_signatures()
    assert signatures is not None
    signatures.check_publisher("german")
    local.offset = datetime.timedelta(minutes=11)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return local.now()

    machine.setattr("sigstore.sign.datetime", Later)
    registry.publish(world.make_expert("german", "1.0.0"), interface=world.interface)
    assert len(local.certificates) == n_certificates + 2
    world.confirm()
    assert use(world.open("client")) == ["1.0.0"]


def test_many_publishers_are_in_bins(
    world: World, local: LocalSigstore, machine: pytest.MonkeyPatch, in_ci: Callable[..., None]
) -> None:
    machine.setattr(metadata_module, "MAX_PUBLISHERS", 2)
    world.grant("carol", "dutch")
    assert (world.folder / "trust/1.bin-ff.json").is_file()
    in_ci()
    world.publish("alice", "german", "1.0.0")
    world.confirm()
    assert use(world.open("client")) == ["1.0.0"]


def test_two_people_accept_a_sigstore(world: World, other_sigstore: LocalSigstore) -> None:
    for name, machine in (("root-1", "ann"), ("root-2", "ben")):
        (world.home / "keys" / machine).mkdir()
        key = world.home / "keys" / OPERATOR / f"{name}.key"
        key.rename(world.home / "keys" / machine / f"{name}.key")
    (world.home / "keys" / OPERATOR / "root-3.key").unlink()
    wanted = Sigstore(other_sigstore.trusted_root())
    ann = world.signatures("ann").authority()
    outcome = ann.accept_sigstore(wanted)
    assert outcome.missing == 1
    assert outcome.waiting == [f"identities are proven by {wanted.describe()}"]
    assert world.signatures("ben").authority().describe_pending() == outcome.waiting
    assert world.signatures("ben").authority().approve().missing == 0
    assert ann.accept_sigstore(wanted).signed == []


# Refusals.


def change_entry(change: Callable[[dict[str, Any]], object]) -> Forge:
    """Return what forges a signature whose log entry is changed afterwards."""

    def forge(local: LocalSigstore, alice: Account, data: bytes) -> dict[str, Any]:
        bundle = copy.deepcopy(local.sign(alice, data))
        local.sign(alice, b"more")
        change(bundle["verificationMaterial"]["tlogEntries"][0])
        return bundle

    return forge


def shift(text: str) -> str:
    """Return Base64 of the same bytes but for one bit."""
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(bytes(data)).decode()


def change_path(entry: dict[str, Any]) -> None:
    hashes = entry["inclusionProof"]["hashes"]
    hashes[:] = [shift(hashes[0]), *hashes[1:]]


def sign_late(local: LocalSigstore, alice: Account, data: bytes) -> dict[str, Any]:
    """Sign with a certificate that has expired, as whoever found its key later can."""
    key = ec.generate_private_key(ec.SECP256R1())
    local.offset = datetime.timedelta(minutes=-11)
    certificate = local.certify(alice, key.public_key())
    local.offset = datetime.timedelta()
    return local.sign(alice, data, certificate, key)


def borrow_signature(local: LocalSigstore, alice: Account, data: bytes) -> dict[str, Any]:
    """Put the signature of another key in a bundle."""
    bundle = local.sign(alice, data)
    bundle["messageSignature"]["signature"] = local.sign(alice, data)["messageSignature"][
        "signature"
    ]
    return bundle


def borrow_certificate(local: LocalSigstore, alice: Account, data: bytes) -> dict[str, Any]:
    """Put the certificate of alice on what another account signed."""
    mallory = local.sign(Account(alice.issuer, "https://github.com/mallory/german"), data)
    material = local.sign(alice, data)["verificationMaterial"]["certificate"]
    mallory["verificationMaterial"]["certificate"] = material
    return mallory


OTHER = "https://github.com/mallory/german/.github/workflows/publish.yml@refs/heads/main"
# What is forged: how, the rule that it breaks, and what the error says.
FORGED: dict[str, tuple[Forge, str, str]] = {
    "another identity": (
        lambda local, alice, data: local.sign(Account(alice.issuer, OTHER), data),
        "wrong-signer",
        f"it is of {OTHER}, expected {WORKFLOW}",
    ),
    "a branch of the same repository": (
        lambda local, alice, data: local.sign(
            Account(alice.issuer, WORKFLOW.replace("main", "evil")), data
        ),
        "wrong-signer",
        "refs/heads/evil, expected",
    ),
    "another issuer": (
        lambda local, alice, data: local.sign(Account(f"{local.url}/people", WORKFLOW), data),
        "wrong-signer",
        "it is of an account at .*/people', expected .*/actions'",
    ),
    "another statement": (
        lambda local, alice, data: local.sign(alice, b"another statement"),
        "wrong-content",
        "it is a signature of other content",
    ),
    "no inclusion proof": (
        change_entry(lambda entry: entry.pop("inclusionProof")),
        "unproven",
        "the proof that it is in the log",
    ),
    "no checkpoint": (
        change_entry(lambda entry: entry["inclusionProof"].pop("checkpoint")),
        "unproven",
        "checkpoint",
    ),
    "no signed time": (
        change_entry(lambda entry: entry.pop("inclusionPromise")),
        "unproven",
        "inclusion promise or signed timestamp",
    ),
    "another time": (
        change_entry(
            lambda entry: entry.update(integratedTime=str(int(entry["integratedTime"]) + 1))
        ),
        "unproven",
        "inclusion promise",
    ),
    "an impossible time": (
        change_entry(lambda entry: entry.update(integratedTime=str(2**64 - 1))),
        "unproven",
        "is not valid",
    ),
    "a tampered log entry": (
        change_entry(
            lambda entry: entry.update(canonicalizedBody=shift(entry["canonicalizedBody"]))
        ),
        "unproven",
        "invalid log entry",
    ),
    "a tampered inclusion proof": (
        change_entry(change_path),
        "unproven",
        "invalid log entry: inclusion proof contains invalid root hash",
    ),
    "a tampered tree": (
        change_entry(
            lambda entry: entry["inclusionProof"].update(
                rootHash=shift(entry["inclusionProof"]["rootHash"])
            )
        ),
        "unproven",
        "invalid log entry",
    ),
    "a certificate in no certificate log": (
        lambda local, alice, data: local.sign(alice, data, is_logged=False),
        "unproven",
        "does not contain a signed certificate timestamp",
    ),
    "a certificate in another certificate log": (
        lambda local, alice, data: local.sign(
            alice, data, ct_key=ec.generate_private_key(ec.SECP256R1())
        ),
        "unproven",
        "failed to verify SCT",
    ),
    "an expired certificate": (sign_late, "expired", "and its certificate was valid from"),
    "the signature of another key": (borrow_signature, "unproven", "Signature is invalid"),
    "the certificate of another signature": (borrow_certificate, "unproven", "is invalid"),
    "no bundle": (lambda local, alice, data: {}, "unproven", "it is not the one"),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("what", ["statement", "list"])
def test_what_is_forged_is_refused(
    published: World, local: LocalSigstore, alice: Account, name: str, what: str
) -> None:
    """On the statement of a release; and on a list of releases, with the online key stolen too."""
    forge, kind, says = FORGED[name]
    put = replace_statement if what == "statement" else confirm_forged_list
    if name == "no bundle" and what == "statement":
        kind, says = "unproven", "the proof|not the one"
    put(published, alice, forge, local)
    with pytest.raises(SignatureError, match=says) as refused:
        use(published.open("newcomer"))
    assert refused.value.kind == kind
    assert use(published.open("client"), "french") == ["1.0.0"]


@pytest.mark.parametrize("put", [replace_statement, confirm_forged_list])
def test_another_authority_is_refused(
    published: World, local: LocalSigstore, other_sigstore: LocalSigstore, alice: Account, put: Any
) -> None:
    """A sigstore that the registry does not accept, of whose accounts one has the same name."""
    put(published, alice, lambda _, account, data: other_sigstore.sign(account, data), local)
    with pytest.raises(SignatureError, match="an authority that this registry does not") as refused:
        use(published.open("newcomer"))
    assert refused.value.kind == "wrong-signer"


def test_a_genuine_forger_changes_nothing(
    published: World, local: LocalSigstore, alice: Account
) -> None:
    """What forges signatures in these tests makes valid ones if nothing is wrong with them."""
    replace_statement(published, alice, LocalSigstore.sign, local)
    confirm_forged_list(published, alice, LocalSigstore.sign, local)
    assert use(published.open("newcomer")) == ["1.0.0"]


def test_a_forged_list_does_not_keep_the_operator_from_signing(
    published: World, local: LocalSigstore, alice: Account
) -> None:
    """Whoever can write to the storage can add files, and no authority."""
    newest = max((published.folder / "trust").glob("*.publisher-alice.json"))
    forged = json.loads(newest.read_text())
    bundle = forged["signatures"][0][BUNDLE]
    bundle["verificationMaterial"]["tlogEntries"][0]["integratedTime"] = "17"
    forged["signed"]["version"] = 99
    newest.with_name("99.publisher-alice.json").write_text(json.dumps(forged))
    published.confirm()
    assert use(published.open("client")) == ["1.0.0"]


def test_without_the_library_nothing_is_skipped(
    published: World, machine: pytest.MonkeyPatch
) -> None:
    use(published.open("client"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sigstore"]:
        machine.setitem(sys.modules, name, None)
    for newcomer in ("client", "newcomer"):
        registry = published.open(newcomer)
        with pytest.raises(SignatureError, match="library that verifies it is not") as refused:
            registry.versions("german")
        assert refused.value.kind == "unverifiable"
        assert "pip install 'composable[sigstore]'" in str(refused.value.hint)
        assert use(registry, "french") == ["1.0.0"]
    with pytest.raises(SignatureError, match="not installed"):
        published.publish("alice", "german", "1.1.0", seed=1)


def test_identities_need_a_sigstore(tmp_path: Path, genuine: World, alice: Account) -> None:
    world = World(tmp_path / "world", genuine.interface)
    world.create()
    with pytest.raises(RegistryError, match="accepts no sigstore yet") as refused:
        grant(world, alice.key)
    assert f"composable registry sigstore {world.folder}" in str(refused.value.hint)
    key = parse_signer(alice.text)
    with pytest.raises(Exception, match="the registry accepts no sigstore"):
        from securesystemslib.signer import Signature

        key.verify_signature(Signature(key.keyid, "00", {BUNDLE: {}}), b"")


@pytest.mark.parametrize(
    "text",
    [
        "sigstore:",
        "sigstore:https://accounts.google.com",
        "sigstore:alice@example.org",
        "sigstore:https://accounts.google.com#*@example.org",
        "sigstore:https://accounts.google.com#alice@example.org bob@example.org",
        "sigstore:https://accounts.google.com#" + "x" * 401,
    ],
)
def test_a_bad_identity(text: str) -> None:
    with pytest.raises(KeyFileError, match="is not an identity"):
        parse_signer(text)


def test_identities_that_the_guide_shows() -> None:
    guide = Path(__file__).parents[2] / "docs/guides/sign-your-registry.md"
    shown = re.findall(r"--key '(sigstore:[^']+)'", guide.read_text())
    assert shown and all(isinstance(parse_signer(text), IdentityKey) for text in shown)


# What goes wrong while publishing.


def test_no_credential_and_no_terminal(world: World) -> None:
    before = read_tree(world.folder)
    with pytest.raises(IdentityError, match="neither a credential nor a terminal") as refused:
        world.publish("alice", "german", "1.0.0")
    assert "SIGSTORE_IDENTITY_TOKEN" in str(refused.value.hint)
    assert read_tree(world.folder) == before


def test_a_workflow_without_permission(world: World, machine: pytest.MonkeyPatch) -> None:
    machine.setenv("GITHUB_ACTIONS", "true")
    machine.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", raising=False)
    with pytest.raises(IdentityError, match="insufficient OIDC token permissions") as refused:
        world.publish("alice", "german", "1.0.0")
    assert "id-token: write" in str(refused.value.hint)


def test_a_credential_that_is_none(world: World, machine: pytest.MonkeyPatch) -> None:
    machine.setenv("SIGSTORE_IDENTITY_TOKEN", "secret")
    with pytest.raises(IdentityError, match="token is malformed") as refused:
        world.publish("alice", "german", "1.0.0")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("service", ["fulcio", "rekor", "token"])
def test_a_service_that_is_down_loses_nothing(
    world: World, local: LocalSigstore, in_ci: Callable[..., None], service: str
) -> None:
    in_ci()
    before = read_tree(world.folder)
    local.down.add(service)
    with pytest.raises(IdentityError, match="503"):
        world.publish("alice", "german", "1.0.0")
    assert read_tree(world.folder) == before
    local.down.clear()
    world.publish("alice", "german", "1.0.0")
    world.confirm()
    assert use(world.open("client")) == ["1.0.0"]


def test_an_authority_that_cannot_be_reached(
    world: World, local: LocalSigstore, in_ci: Callable[..., None], tmp_path: Path
) -> None:
    in_ci()
    config = local.config()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config["signingConfig"]["caUrls"][0]["url"] = f"http://127.0.0.1:{port}"
    (tmp_path / "sigstore.json").write_text(json.dumps(config))
    before = read_tree(world.folder)
    with pytest.raises(IdentityError, match="sigstore gives no certificate") as refused:
        world.publish("alice", "german", "1.0.0")
    assert "nothing was published" in str(refused.value.hint)
    assert read_tree(world.folder) == before


def test_the_log_fails_between_two_signatures(
    world: World, local: LocalSigstore, in_ci: Callable[..., None], machine: pytest.MonkeyPatch
) -> None:
    """The statement is logged, the list is not: clients see nothing; the same command goes on."""
    in_ci()
    append = local.append

    def append_once(body: bytes) -> dict[str, Any]:
        local.down.add("rekor")
        return append(body)

    machine.setattr(local, "append", append_once)
    with pytest.raises(IdentityError, match="503"):
        world.publish("alice", "german", "1.0.0")
    machine.setattr(local, "append", append)
    local.down.clear()
    world.confirm()
    assert "german" not in world.open("client").names()
    world.publish("alice", "german", "1.0.0")
    world.confirm()
    assert use(world.open("client")) == ["1.0.0"]


def test_another_sigstore_than_the_registry_accepts(
    world: World, other_sigstore: LocalSigstore, alice: Account, machine: Any, tmp_path: Path
) -> None:
    (tmp_path / "sigstore.json").write_text(json.dumps(other_sigstore.config()))
    machine.setenv("SIGSTORE_IDENTITY_TOKEN", other_sigstore.make_token(alice))
    before = read_tree(world.folder)
    with pytest.raises(IdentityError, match="clients would refuse the signature") as refused:
        world.publish("alice", "german", "1.0.0")
    assert "COMPOSABLE_SIGSTORE" in str(refused.value.hint)
    assert read_tree(world.folder) == before


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
def test_a_bad_configuration(
    world: World, in_ci: Callable[..., None], tmp_path: Path, content: str | None
) -> None:
    in_ci()
    path = tmp_path / "sigstore.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(IdentityError, match=r"no such file|not the configuration") as refused:
        world.publish("alice", "german", "1.0.0")
    assert refused.value.where == str(path)


def test_the_public_sigstore_cannot_be_fetched(
    world: World, in_ci: Callable[..., None], machine: pytest.MonkeyPatch
) -> None:
    in_ci()
    machine.delenv("COMPOSABLE_SIGSTORE")
    machine.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nothing listens
    before = read_tree(world.folder)
    with pytest.raises(IdentityError, match="the configuration of the public sigstore cannot"):
        world.publish("alice", "german", "1.0.0")
    assert read_tree(world.folder) == before


# What each compromise can and cannot do, and how to recover: docs/concepts/signatures.md.


def test_a_stolen_account(published: World, in_ci: Callable[..., None]) -> None:
    """It can publish what its owner can, once the operator confirms it, until it is revoked."""
    in_ci()
    registry = published.publish("thief", "german", "1.1.0", seed=6)
    assert registry.awaits_operator
    assert use(published.open("client")) == ["1.0.0"]
    published.confirm()
    assert use(published.open("client")) == ["1.0.0", "1.1.0"]
    for name in ("french", "gennan", "physics"):
        with pytest.raises((KeyFileError, SignatureError)):
            published.publish("thief", name, "1.2.0", seed=6)
    with pytest.raises(KeyFileError, match="advisories"):
        published.open("thief").advise(make_advisory())


@pytest.mark.parametrize("whole", [True, False], ids=["all", "one identity"])
def test_a_revoked_identity(
    published: World, local: LocalSigstore, alice: Account, machine: Any, whole: bool
) -> None:
    """Nothing that it ever signed is accepted; what is genuine is signed as another one."""
    published.publish("thief", "german", "1.1.0", seed=6)
    published.confirm()
    operator = published.signatures(OPERATOR)
    key = None if whole else "sigstore:"
    operator.change(operator.authority().revoke("alice", key))
    with pytest.raises(SignatureError, match="were revoked") as refused:
        use(published.open("client"))
    assert refused.value.kind == "revoked"
    with pytest.raises(SignatureError, match="were revoked"):
        published.publish("thief", "german", "1.2.0", seed=6)
    person = local.account("alice@example.org")
    grant(published, person.key)
    with pytest.raises(IdentityError, match="which may not sign for publisher 'alice'"):
        published.publish("thief", "german", "1.2.0", seed=6)
    machine.setenv("SIGSTORE_IDENTITY_TOKEN", local.make_token(person))
    published.signatures("alice").sign([Requirement.parse("german<1.1")])
    published.confirm()
    client = published.open("client")
    assert use(client) == ["1.0.0"]
    signer = client.verify_release(client.versions("german")[0])
    assert signer is not None and signer.key == person.text


def test_a_compromised_authority_can_be_any_identity(
    published: World, local: LocalSigstore, alice: Account
) -> None:
    """With the key of the certificate log too; but it cannot be a publisher with a key."""
    confirm_forged_list(published, alice, LocalSigstore.sign, local)
    assert use(published.open("newcomer")) == ["1.0.0"]
    path = published.folder / "statements/french/1.0.0.json"
    before = path.read_bytes()
    keyid = json.loads(before)["signatures"][0]["keyid"]
    envelope = json.loads(before)
    bundle = local.sign(alice, b"french")
    signature = bundle["messageSignature"]["signature"]
    envelope["signatures"] = [{"keyid": keyid, "sig": signature, BUNDLE: bundle}]
    path.write_text(json.dumps(envelope))
    with pytest.raises(SignatureError, match="not signed by a key of its publisher"):
        use(published.open("client"), "french")


def test_recovery_from_a_compromised_authority(
    published: World, other_sigstore: LocalSigstore, alice: Account, machine: Any, tmp_path: Path
) -> None:
    """The registry accepts another one; what the old one proved is refused, and signed again."""
    accept(published, other_sigstore)
    with pytest.raises(SignatureError, match="an authority that this registry does not"):
        use(published.open("client"))
    (tmp_path / "sigstore.json").write_text(json.dumps(other_sigstore.config()))
    machine.setenv("SIGSTORE_IDENTITY_TOKEN", other_sigstore.make_token(alice))
    published.signatures("alice").sign([Requirement.parse("german")])
    published.confirm()
    assert use(published.open("client")) == ["1.0.0"]


def test_a_compromised_log_can_only_lie_about_time(
    published: World, local: LocalSigstore, alice: Account
) -> None:
    """It makes an old certificate usable whose private key has leaked, and no certificates."""

    def backdate(local: LocalSigstore, alice: Account, data: bytes) -> dict[str, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        local.offset = datetime.timedelta(minutes=-30)
        try:
            return local.sign(alice, data, local.certify(alice, key.public_key()), key)
        finally:
            local.offset = datetime.timedelta()

    replace_statement(published, alice, backdate, local)
    assert use(published.open("client")) == ["1.0.0"]
    stranger = LocalSigstore(local.url)
    stranger.log_key = local.log_key
    replace_statement(published, alice, lambda _, who, data: stranger.sign(who, data), local)
    with pytest.raises(SignatureError, match="an authority that this registry does not"):
        use(published.open("client"))


def test_a_recovered_account_has_not_signed_what_the_thief_did(
    published: World, local: LocalSigstore, alice: Account
) -> None:
    """The same identity is revoked and granted again: only what it signs from then on is valid."""
    operator = published.signatures(OPERATOR)
    operator.change(operator.authority().revoke("alice"))
    published.now = datetime.datetime.now(datetime.UTC)
    grant(published, alice.key)
    local.offset = datetime.timedelta(hours=-1)
    # The thief puts the new identifier on what the account signed before.
    replace_statement(published, alice, LocalSigstore.sign, local)
    confirm_forged_list(published, alice, LocalSigstore.sign, local)
    with pytest.raises(SignatureError, match="before this identity was granted at") as refused:
        use(published.open("newcomer"))
    assert refused.value.kind == "revoked"
    local.offset = datetime.timedelta()
    published.signatures("alice").sign([Requirement.parse("german")])
    published.confirm()
    assert use(published.open("client")) == ["1.0.0"]


# A server.


def test_a_server_verifies_identities(
    local: LocalSigstore, alice: Account, in_ci: Callable[..., None], machine: Any, tmp_path: Path
) -> None:
    interface, home = make_interface(), tmp_path / "machines"
    online = home / "keys" / "server"
    with run_server(tmp_path / "served", keys=online) as server:
        lab = Lab(server, home, {"alice": server.account("alice")})
        lab.tokens["operator"] = server.account("operator", is_admin=True, scopes=ADMIN)
        lab.open("operator").open_signatures().create(None)
        online.mkdir(parents=True)
        shutil.move(lab.keys("operator") / "online.key", online)
        signatures = lab.open("operator").open_signatures()
        authority = signatures.authority()
        accepted = authority.accept_sigstore(Sigstore(local.trusted_root()))
        assert signatures.change(accepted).is_visible
        assert signatures.change(authority.grant("alice", ["german"], [alice.key])).is_visible

        in_ci()
        folder = make_vetted_expert(tmp_path / "german", interface)
        lab.open("alice").publish(folder, interface=interface)
        assert lab.seen() == {"german": [("1.0.0", False)]}
        _, german = server.api("GET", "/packages/german/1.0.0")
        assert german["signer"] == {"publisher": "alice", "key": alice.text}

        in_ci(OTHER)
        newer = make_vetted_expert(tmp_path / "newer", interface, version="1.1.0", seed=1)
        with pytest.raises(IdentityError, match="which may not sign for publisher 'alice'"):
            lab.open("alice").publish(newer, interface=interface)
        # A client that does not check, and signs as somebody else.
        manifest = pack_expert(newer, interface=interface)
        with machine.context() as patch:
            patch.setattr(IdentityKey, "is_named_by", lambda key, certificate: True)
            patch.setattr(IdentityKey, "verify_signature", lambda key, signature, data: None)
            signatures = lab.open("alice").open_signatures()
            signed = signatures.sign_release(Release.of(manifest, "2026-11-30T00:00:00Z"))
        dishonest = ServedRegistry(ServedStorage(server.url, lab.tokens["alice"]))
        with pytest.raises(RegistryError, match=f"it is of {OTHER}, expected"):
            dishonest._send_release(newer, manifest, signed.decode(), None, {})
        assert lab.seen() == {"german": [("1.0.0", False)]}


# The command line.


@pytest.fixture
def cli(tmp_path: Path, machine: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    from typer.testing import CliRunner

    from composable.cli.app import app

    machine.chdir(tmp_path)
    machine.setenv("COMPOSABLE_KEYS", str(tmp_path / "keys"))
    machine.setenv("COMPOSABLE_PASSPHRASE", "secret")

    def call(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result)

    return call


def test_commands(
    cli: Callable[..., Outcome], alice: Account, in_ci: Callable[..., None], tmp_path: Path
) -> None:
    def works(*arguments: object) -> Outcome:
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    works("registry", "init", "registry", "--signed")
    told = cli("registry", "grant", "registry", "alice", "german", "--key", alice.text)
    assert told.code == 1
    assert "state it first: `composable registry sigstore registry`" in told.err
    shown = works("registry", "sigstore", "registry", "sigstore.json").out
    assert "signed: identities are proven by sigstore of lab (" in shown
    shown = works("registry", "grant", "registry", "alice", "german", "--key", alice.text).out
    assert f"alice signs with {alice.text}" in shown
    rows = works("registry", "signers", "registry", "--json").json["signers"]
    assert [row["signer"] for row in rows] == ["root"] * 3 + ["online", "sigstore", "alice"]
    assert (rows[-1]["key"], rows[-1]["for"]) == (alice.text, "german")

    in_ci()
    fakes = Fakes(tmp_path, "registry")
    fakes.publish("german")
    works("init", "--registry", "registry")
    works("install", "german")
    signer = f'signer = {{ publisher = "alice", key = "{alice.text}" }}'
    assert signer in (tmp_path / "composable.lock").read_text()
    assert f"german is signed by alice ({alice.text})" in works("verify", "--signatures").out
    assert alice.text in works("info", "german").out

    key = works("registry", "key", "alice").out.strip()
    works("registry", "grant", "registry", "alice", "--key", key)
    works("registry", "sign", "registry")
    works("registry", "revoke", "registry", "alice", "--key", alice.text)
    fakes.publish("german", "1.1.0", seed=1)
    told = works("upgrade").err
    assert f"german 1.1.0 is signed by alice with another key ({key}); 1.0.0 was" in told
    assert f"was signed by {alice.text}" in told

    works("registry", "rotate", "registry", "alice", "--new", alice.text)
    works("registry", "sign", "registry", "--identity", "--vouch", "german")
    (tmp_path / "keys/alice.key").unlink()
    told = works("upgrade").err
    assert f"is signed by alice with another key ({alice.text})" in told
    told = cli("registry", "rotate", "registry", "online", "--new", alice.text)
    assert "is not a public key" in told.err
