"""The inbox of a registry: what arrives, who can see it, and what is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner

from composable.errors import (
    InterfaceError,
    KeyFileError,
    ManifestError,
    ProposalError,
    RegistryError,
    UnknownExpertError,
)
from composable.interface import RouterInterface
from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging import Registry, Version, open_for_publishing
from composable.packaging.install.mirror import mirror_registry
from composable.packaging.install.proposals import fetch_proposal
from composable.packaging.manifests.manifest import Delta
from composable.packaging.registry import inbox as inboxes
from composable.packaging.registry.inbox import Inbox, Outcome, Received, require_open
from composable.packaging.registry.locations import open_inbox
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import create_key
from composable.packaging.trust.proposal import Proposal, open_envelope, seal
from tests.packaging.conftest import ANY_DIGEST, MakeExpert, make_interface
from tests.support.signed_registries import OPERATOR, World

BASE = ("german", Version("1.0.0"))
DELTA = Delta(digest=ANY_DIGEST, size=1, base=ANY_DIGEST, base_size=10)
DERIVED = 'derives-from = "german@1.0.0"\n'


@pytest.fixture
def registry(tmp_path: Path, make_expert: MakeExpert, interface: RouterInterface) -> Registry:
    registry = open_for_publishing(tmp_path / "registry")
    registry.publish(make_expert(), interface=interface)
    return registry


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


@pytest.fixture
def inbox(registry: Registry, keyring: Keyring) -> Inbox:
    return Inbox(registry, keyring)


def derive(folder: Path, text: str = DERIVED) -> Path:
    """Let an expert derive from german 1.0.0."""
    manifest = folder / "expert.toml"
    manifest.write_text(manifest.read_text().replace("[expert]\n", f"[expert]\n{text}", 1))
    return folder


@pytest.fixture
def changed(make_expert: MakeExpert) -> Path:
    """Return a folder with a change of german 1.0.0."""
    return derive(make_expert(seed=7))


@pytest.fixture
def propose(inbox: Inbox, changed: Path, interface: RouterInterface) -> Any:
    def run(folder: Path = changed, **options: Any) -> Proposal:
        return inbox.propose(folder, BASE, interface=interface, **options)

    return run


def only(inbox: Inbox) -> Received:
    (received,) = inbox.entries()
    return received


def test_a_proposal_arrives_whole(
    inbox: Inbox, propose: Any, changed: Path, tmp_path: Path
) -> None:
    proposal = propose(message="more text")
    assert propose(message="more text") == proposal, "the same again changes nothing"
    received = only(inbox)
    assert (received.id, received.proposal, received.state) == (proposal.id, proposal, "open")
    assert inbox.describe_proposer(received) == "unsigned"
    assert inbox.find(proposal.id[:6]) == received
    manifest = fetch_proposal(inbox, received, tmp_path / "out")
    assert (manifest.name, manifest.derives_from) == ("german", "german@1.0.0")
    for name in ("body.safetensors", "scout.safetensors", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (changed / name).read_bytes()


def test_nothing_of_it_can_be_found_or_installed(
    inbox: Inbox, propose: Any, registry: Registry, tmp_path: Path
) -> None:
    root = tmp_path / "registry"

    def outside() -> dict[str, bytes]:
        files = (path for path in root.rglob("*") if path.is_file())
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in files
            if path.relative_to(root).parts[0] not in ("inbox", "locks")
        }

    before = outside()
    proposal = propose()
    assert outside() == before
    assert [str(release.version) for release in registry.versions("german")] == ["1.0.0"]
    assert registry.names() == ["german"]
    target = open_for_publishing(tmp_path / "mirror")
    mirror_registry(registry, target)
    assert not (tmp_path / "mirror" / "inbox").exists()
    digests = {f"blobs/{d[7:9]}/{d[7:]}" for d in proposal.digests.values()}
    assert not digests & {f"{path}" for path in before} - {
        f"blobs/{d[7:9]}/{d[7:]}" for d in registry.versions("german")[0].digests
    }


def test_a_bucket_has_an_inbox(
    make_expert: MakeExpert, changed: Path, interface: RouterInterface, tmp_path: Path
) -> None:
    pytest.importorskip("obstore")
    from composable.packaging.registry.bucket import BucketStorage

    (tmp_path / "bucket").mkdir()
    registry = Registry(BucketStorage((tmp_path / "bucket").as_uri()))
    registry.publish(make_expert(), interface=interface)
    inbox = Inbox(registry, Keyring(tmp_path / "none"))
    proposal = inbox.propose(changed, BASE, interface=interface)
    received = only(inbox)
    assert received.proposal == proposal
    fetch_proposal(inbox, received, tmp_path / "out")
    inbox.decide(received, Outcome(state="rejected", reason="no"))
    assert only(inbox).state == "rejected"
    with pytest.raises(RegistryError, match="no inbox"):
        open_inbox("oci://example.org/team/experts")


# What is refused when it is proposed.


def test_only_a_change_of_its_base_is_taken(
    inbox: Inbox, interface: RouterInterface, make_expert: MakeExpert, changed: Path
) -> None:
    def refuse(folder: Path, base: tuple[str, Version] = BASE, error: Any = ManifestError) -> str:
        with pytest.raises(error) as caught:
            inbox.propose(folder, base, interface=interface)
        return str(caught.value)

    assert "no release german 2.0.0" in refuse(
        changed, ("german", Version("2.0.0")), UnknownExpertError
    )
    assert "not proposed: `composable publish" in refuse(
        changed, ("french", Version("1.0.0")), UnknownExpertError
    )
    assert "'french' is another expert" in refuse(derive(make_expert("french")))
    assert "nothing is what it derives from" in refuse(make_expert(seed=3))
    other = derive(make_expert(seed=4), 'derives-from = "german@0.9.0"\n')
    assert 'derives-from = "german@1.0.0"' in refuse(other)
    with pytest.raises(InterfaceError):
        inbox.propose(changed, BASE, interface=make_interface(name="other"))
    with pytest.raises(ManifestError, match=r"another interface than german@1\.0\.0"):
        inbox.propose(changed, BASE, interface=make_interface(d_ff=8, discount=0.9))
    assert inbox.entries() == []


def test_an_inbox_is_full_at_some_point(
    inbox: Inbox, propose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inboxes, "MAX_OPEN", 2)
    first = propose(message="1")
    propose(message="2")
    with pytest.raises(RegistryError, match="2 open proposals, at most 2"):
        propose(message="3")
    inbox.decide(inbox.find(first.id), Outcome(state="rejected", reason="no"))
    propose(message="3")
    monkeypatch.setattr(inboxes, "MAX_LISTED", 2)
    with pytest.raises(RegistryError, match="3 proposals, of which at most 2 are read"):
        inbox.entries()


def test_what_is_too_large_is_refused(
    propose: Any, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProposalError, match="message has"):
        propose(message="x" * 5000)
    (changed / "README.md").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(ProposalError, match=r"README\.md: .* at most"):
        propose()


# Who proposed it.


def test_a_proposal_is_signed_with_the_only_key(
    inbox: Inbox, propose: Any, keyring: Keyring
) -> None:
    unsigned = propose()
    create_key(keyring.folder, "ann", None)
    signed = propose()
    assert signed.key.startswith("ed25519:") and signed.id != unsigned.id
    assert inbox.describe_proposer(inbox.find(signed.id)) == f"{signed.key[:20]}…"
    create_key(keyring.folder, "ben", None)
    assert propose() == unsigned, "none of several keys is chosen"
    assert propose(key="ann") == signed
    with pytest.raises(KeyFileError, match="no key 'eve'"):
        propose(key="eve")


def test_who_proposed_to_a_signed_registry(tmp_path: Path, interface: RouterInterface) -> None:
    """A stranger's proposal arrives, and is said to be one."""
    world = World(tmp_path / "world", interface)
    world.create()
    world.grant("alice", "german")
    world.publish("alice", "german", "1.0.0")
    world.confirm()
    folder = derive(world.make_expert("german", "1.0.1", seed=3))
    world.make_key("eve")
    for machine, said in (("alice", "alice"), ("eve", "unknown key ed25519:"), ("bob", "unsigned")):
        keyring = Keyring(world.home / "keys" / machine)
        inbox = Inbox(world.open(machine), keyring)
        proposal = inbox.propose(folder, BASE, interface=interface, message=machine)
        inbox = Inbox(world.open(OPERATOR), Keyring(world.home / "keys" / OPERATOR))
        assert inbox.describe_proposer(inbox.find(proposal.id)).startswith(said)
    assert len(inbox.entries()) == 3


# Attacks on what lies in the inbox.


def write(inbox: Inbox, id_: str, name: str, data: bytes) -> None:
    root = Path(inbox.registry.location) / "inbox" / id_
    root.mkdir(exist_ok=True)
    if (root / name).exists():
        (root / name).chmod(0o644)
    (root / name).write_bytes(data)


@pytest.mark.parametrize(
    "name", ["expert.toml", "body.safetensors", "scout.safetensors", "README.md"]
)
def test_any_byte_of_a_file_counts(inbox: Inbox, propose: Any, tmp_path: Path, name: str) -> None:
    proposal = propose()
    path = Path(inbox.registry.location) / "inbox" / proposal.id / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    write(inbox, proposal.id, name, bytes(data))
    with pytest.raises(ProposalError, match="is not the file that was proposed") as caught:
        fetch_proposal(inbox, only(inbox), tmp_path / "out")
    assert name in str(caught.value.where)
    path.unlink()
    with pytest.raises(ProposalError, match="is not the file that was proposed"):
        fetch_proposal(inbox, only(inbox), tmp_path / "again")


def test_a_longer_file_is_not_read_to_its_end(inbox: Inbox, propose: Any, tmp_path: Path) -> None:
    proposal = propose()
    write(inbox, proposal.id, "README.md", b"x" * 100_000)
    with pytest.raises(ProposalError):
        fetch_proposal(inbox, only(inbox), tmp_path / "out")


def test_any_byte_of_the_proposal_counts(inbox: Inbox, propose: Any, keyring: Keyring) -> None:
    create_key(keyring.folder, "ann", None)
    proposal = propose(message="mine")
    path = Path(inbox.registry.location) / "inbox" / proposal.id / "proposal.json"
    genuine = path.read_bytes()
    path.chmod(0o644)
    for at in range(len(genuine)):
        changed = bytearray(genuine)
        changed[at] ^= 1
        with pytest.raises(ProposalError):
            open_envelope(bytes(changed), proposal.id)
    for spoiled in (b"", b"{}", b"[]", b"\xff", genuine[:-1], b" " + genuine, b"[" * 100_000):
        path.write_bytes(spoiled)
        received = only(inbox)
        assert (received.state, received.proposal) == ("damaged", None)
        assert received.problem
        with pytest.raises(ProposalError):
            inbox.find(proposal.id)


def test_a_signature_can_neither_be_removed_nor_replaced(
    inbox: Inbox, propose: Any, keyring: Keyring
) -> None:
    ann, eve = (create_key(keyring.folder, name, None) for name in ("ann", "eve"))
    proposal = propose(key="ann")
    genuine = json.loads(seal(proposal, ann.unlock()))
    forged = json.loads(seal(proposal, eve.unlock()))
    unsigned = dataclasses.replace(proposal, key="")
    plain = json.loads(seal(unsigned))
    attacks = {
        "removed": {**genuine, "signatures": []},
        "replaced": {**genuine, "signatures": forged["signatures"]},
        "added": {**genuine, "signatures": genuine["signatures"] + forged["signatures"]},
        "payload of another": {**genuine, "payload": plain["payload"]},
    }
    assert open_envelope(canonical_json(genuine) + b"\n", proposal.id) == proposal
    for attack, fields in attacks.items():
        with pytest.raises(ProposalError):
            open_envelope(canonical_json(fields) + b"\n", proposal.id)
            pytest.fail(attack)
    signed = {**plain, "signatures": forged["signatures"]}
    with pytest.raises(ProposalError, match="1 signatures"):
        open_envelope(canonical_json(signed) + b"\n", unsigned.id)
    assert isinstance(ann.unlock(), CryptoSigner)


@pytest.mark.parametrize(
    "change",
    [
        {"digests": {"expert.toml": ANY_DIGEST, "../../config.json": ANY_DIGEST}},
        {"digests": {"body.safetensors": ANY_DIGEST}},
        {"digests": {"expert.toml": "sha256:../../x"}},
        {"sizes": {"expert.toml": -1}},
        {"sizes": {}},
        {"name": "../elsewhere"},
        {"base": "latest"},
        {"base_manifest": "none"},
        {"key": "ed25519:none"},
        {"message": "x" * 5000},
        {"deltas": {"expert.toml": DELTA}},
        {"deltas": {"../body.safetensors": DELTA}},
        {"deltas": {"body.safetensors": DELTA}},
    ],
    ids=lambda change: " ".join(change),
)
def test_fields_that_no_client_of_ours_writes(propose: Any, change: dict[str, Any]) -> None:
    fields = {"key": "", "digests": {"expert.toml": ANY_DIGEST}, "sizes": {"expert.toml": 10}}
    plain = dataclasses.replace(propose(), **fields)
    hostile = dataclasses.replace(plain, **change)
    payload = base64.b64encode(hostile.to_payload()).decode()
    envelope = {**json.loads(seal(plain)), "payload": payload}
    with pytest.raises(ProposalError, match="is no proposal"):
        open_envelope(canonical_json(envelope) + b"\n", hostile.id)


def test_a_proposal_under_the_id_of_another(inbox: Inbox, propose: Any) -> None:
    first, second = propose(message="1"), propose(message="2")
    root = Path(inbox.registry.location) / "inbox"
    shutil.rmtree(root / first.id)
    shutil.copytree(root / second.id, root / first.id)
    states = {received.id: received.state for received in inbox.entries()}
    assert states == {first.id: "damaged", second.id: "open"}


def test_a_manifest_that_lists_other_files(inbox: Inbox, propose: Any, tmp_path: Path) -> None:
    """All digests are right, but the manifest is that of another release."""
    proposal = propose()
    root = Path(inbox.registry.location) / "inbox"
    text = (root / proposal.id / "expert.toml").read_text().split("[[files]]")[0].encode()
    hostile = dataclasses.replace(
        proposal,
        digests={**proposal.digests, "expert.toml": digest_bytes(text)},
        sizes={**proposal.sizes, "expert.toml": len(text)},
    )
    shutil.copytree(root / proposal.id, root / hostile.id)
    write(inbox, hostile.id, "proposal.json", seal(hostile))
    write(inbox, hostile.id, "expert.toml", text)
    with pytest.raises(ProposalError, match="lists other files"):
        fetch_proposal(inbox, inbox.find(hostile.id), tmp_path / "out")


# Decisions.


def test_a_decision_is_made_once(inbox: Inbox, propose: Any) -> None:
    proposal = propose()
    received = only(inbox)
    no = Outcome(state="rejected", reason="worse on contracts")
    inbox.decide(received, no)
    inbox.decide(received, no)
    assert (only(inbox).state, only(inbox).outcome) == ("rejected", no)
    with pytest.raises(RegistryError, match="was rejected already: worse on contracts"):
        inbox.decide(received, Outcome(state="accepted", release="german@1.0.1"))
    with pytest.raises(RegistryError, match="was rejected already"):
        require_open(only(inbox), "here")
    with pytest.raises(RegistryError, match="was rejected already"):
        propose()
    files = sorted(
        path.name for path in (Path(inbox.registry.location) / "inbox" / proposal.id).iterdir()
    )
    assert files == ["outcome.json", "proposal.json"], "its files make room for others"


def test_ids_are_found_by_their_first_digits(inbox: Inbox, propose: Any) -> None:
    proposal = propose()
    for text in (proposal.id[:3], "zzzz", "../.."):
        with pytest.raises(RegistryError, match="no proposal of the id or the expert"):
            inbox.find(text)
    assert inbox.find(proposal.id[:4].upper()).id == proposal.id
    assert inbox.find("german").id == proposal.id
    propose(message="another")
    with pytest.raises(RegistryError, match="2 proposals of the id or the expert 'german'"):
        inbox.find("german")
    inbox.decide(inbox.find(proposal.id), Outcome(state="rejected", reason="no"))
    assert inbox.find("german").id != proposal.id
