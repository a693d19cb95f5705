"""Proposals that are sent as deltas: what arrives, what is made of it, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from composable.errors import ProposalError
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.packaging import Registry, Store, Version, open_for_publishing
from composable.packaging.install import deltas as deltas_module
from composable.packaging.install.deltas import prepare_deltas
from composable.packaging.install.proposals import fetch_proposal
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.inbox import Inbox, Outcome
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import create_key
from composable.packaging.trust.proposal import Proposal, seal
from tests.packaging.conftest import ANY_DIGEST, make_interface
from tests.support.updates import BODY, LARGE, Family, propose_update

DELTA = f"{BODY}.delta"
SCOUT = "scout.safetensors"


@pytest.fixture
def interface() -> RouterInterface:
    return make_interface(**LARGE)


@pytest.fixture
def family(tmp_path: Path, interface: RouterInterface) -> Family:
    """Return three generations, each of which derives from the one before."""
    return Family(tmp_path / "experts", interface, is_derived=True)


@pytest.fixture
def inbox(registry: Registry, family: Family, tmp_path: Path) -> Inbox:
    """Return the inbox of a registry with the first generation."""
    family.publish(registry, Store(tmp_path / "publisher"), range(1))
    return Inbox(registry, Keyring(tmp_path / "keys"))


def propose(inbox: Inbox, family: Family, number: int = 1) -> Proposal:
    store = Store(family.folders[0].parent.parent / "proposer")
    return propose_update(
        inbox, family.folders[number], family.interface, store, family.factors[number]
    )


def folder_of(inbox: Inbox, proposal: Proposal) -> Path:
    return Path(inbox.registry.location) / "inbox" / proposal.id


def refuse(inbox: Inbox, proposal: Proposal, store: Store, out: Path) -> str:
    with pytest.raises(ProposalError) as caught:
        fetch_proposal(inbox, inbox.find(proposal.id), out, store=store)
    assert not (out / BODY).exists()
    return f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_only_the_change_is_sent(
    kind: str, family: Family, interface: RouterInterface, store: Store, tmp_path: Path
) -> None:
    registry = open_for_publishing(tmp_path / "registry")
    if kind == "bucket":
        pytest.importorskip("obstore")
        from composable.packaging.registry.bucket import BucketStorage

        (tmp_path / "registry").mkdir()
        registry = Registry(BucketStorage((tmp_path / "registry").as_uri()))
    family.publish(registry, Store(tmp_path / "publisher"), range(1))
    create_key(tmp_path / "keys", "ann", None)
    inbox = Inbox(registry, Keyring(tmp_path / "keys"))
    proposal = propose(inbox, family)
    assert propose(inbox, family) == proposal, "the same again changes nothing"

    packed = pack_expert(family.folders[1], interface=interface)
    whole = {file.name: file.digest for file in packed.files}
    assert {n: d for n, d in proposal.digests.items() if n != "expert.toml"} == whole
    assert proposal.key and proposal.deltas.keys() == {BODY}
    place = tmp_path / "registry" / "inbox" / proposal.id
    arrived = {path.name: path.stat().st_size for path in place.iterdir()}
    assert arrived.pop("proposal.json")
    assert arrived.keys() == {DELTA, SCOUT, "expert.toml"}
    assert sum(arrived.values()) == proposal.n_bytes < 0.2 * sum(proposal.sizes.values())

    received = inbox.find("german")
    manifest = fetch_proposal(inbox, received, tmp_path / "out", store=store)
    assert manifest.digest == packed.digest
    for name in (BODY, SCOUT):
        assert (tmp_path / "out" / name).read_bytes() == (family.folders[1] / name).read_bytes()
    inbox.decide(received, Outcome(state="rejected", reason="no"))
    assert {path.name for path in place.iterdir()} == {"outcome.json", "proposal.json"}


def test_a_change_of_a_release_that_is_kept_as_a_delta(
    inbox: Inbox, family: Family, store: Store, tmp_path: Path
) -> None:
    family.publish(inbox.registry, Store(tmp_path / "publisher"), range(1, 2))
    base = inbox.find_base("german", Version("1.1.0"))
    assert any(file.deltas for file in base.files)
    proposal = propose(inbox, family, 2)
    assert proposal.deltas[BODY].base_size == proposal.sizes[BODY]
    inbox.registry.yank("german", base.version)
    fetch_proposal(inbox, inbox.find(proposal.id), tmp_path / "out", store=store)
    assert (tmp_path / "out" / BODY).read_bytes() == (family.folders[2] / BODY).read_bytes()


def test_a_file_that_did_not_change_is_not_sent(
    inbox: Inbox, family: Family, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas_module, "MIN_DELTA_BYTES", 1000)
    proposal = propose(inbox, family)
    assert proposal.deltas[SCOUT].size < 0.2 * proposal.sizes[SCOUT]
    fetch_proposal(inbox, inbox.find(proposal.id), tmp_path / "out", store=store)
    assert (tmp_path / "out" / SCOUT).read_bytes() == (family.folders[1] / SCOUT).read_bytes()


def test_whole_files_are_a_statement_as_before(
    inbox: Inbox, family: Family, interface: RouterInterface
) -> None:
    base = ("german", Version("1.0.0"))
    proposal = inbox.propose(family.folders[1], base, interface=interface)
    assert not proposal.deltas and b"deltas" not in proposal.to_payload()
    assert proposal.n_bytes == sum(proposal.sizes.values())
    assert propose(inbox, family).id != proposal.id, "what is sent is signed, too"


def test_what_it_starts_from_is_gone(
    inbox: Inbox, family: Family, store: Store, tmp_path: Path
) -> None:
    proposal = propose(inbox, family)
    root = Path(inbox.registry.location)
    base = root / blob_path(proposal.deltas[BODY].base)
    base.rename(tmp_path / "kept")
    found = refuse(inbox, proposal, store, tmp_path / "1")
    assert "is sent as a change of german@1.0.0, which is gone" in found
    assert "composable propose DIR --whole" in found
    (tmp_path / "kept").rename(base)
    shutil.rmtree(root / "index")
    shutil.rmtree(root / "records")
    assert "which is gone: no release german 1.0.0" in refuse(
        inbox, proposal, store, tmp_path / "2"
    )


def test_it_does_not_make_the_file_that_is_signed(
    inbox: Inbox, family: Family, interface: RouterInterface, store: Store, tmp_path: Path
) -> None:
    """The delta arrives as it was signed, and makes another file than the one that was."""
    other = shutil.copytree(family.folders[2], tmp_path / "other")
    text = (other / "expert.toml").read_text().replace("german@1.1.0", "german@1.0.0")
    (other / "expert.toml").write_text(text)
    packed = [pack_expert(folder, interface=interface) for folder in (family.folders[1], other)]
    target = next(file.digest for file in packed[0].files if file.name == BODY)
    with prepare_deltas(
        inbox.registry, other, packed[1], Store(tmp_path / "proposer"), is_proposal=True
    ) as prepared:
        wrong = dataclasses.replace(prepared.deltas[BODY], target=target)
        base = ("german", Version("1.0.0"))
        proposal = inbox.propose(family.folders[1], base, interface=interface, deltas={BODY: wrong})
    found = refuse(inbox, proposal, store, tmp_path / "out")
    assert "does not make the file that was proposed from that of german@1.0.0" in found


def test_it_starts_from_another_file(
    inbox: Inbox, family: Family, store: Store, tmp_path: Path
) -> None:
    proposal = propose(inbox, family)
    deltas = {BODY: dataclasses.replace(proposal.deltas[BODY], base=ANY_DIGEST)}
    hostile = dataclasses.replace(proposal, deltas=deltas)
    shutil.copytree(folder_of(inbox, proposal), folder_of(inbox, hostile))
    path = folder_of(inbox, hostile) / "proposal.json"
    path.chmod(0o644)
    path.write_bytes(seal(hostile))
    found = refuse(inbox, hostile, store, tmp_path / "out")
    assert f"is a change of {ANY_DIGEST}, which is not {BODY} of german@1.0.0" in found


def test_any_byte_of_a_delta_counts(
    inbox: Inbox, family: Family, store: Store, tmp_path: Path
) -> None:
    proposal = propose(inbox, family)
    path = folder_of(inbox, proposal) / DELTA
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert "is not the file that was proposed" in refuse(inbox, proposal, store, tmp_path / "1")
    path.unlink()
    assert "is not the file that was proposed" in refuse(inbox, proposal, store, tmp_path / "2")


def test_a_damaged_base_in_the_store_is_downloaded_again(
    inbox: Inbox, family: Family, store: Store, tmp_path: Path
) -> None:
    proposal = propose(inbox, family)
    received = inbox.find(proposal.id)
    fetch_proposal(inbox, received, tmp_path / "first", store=store)
    base = store.path(proposal.deltas[BODY].base)
    base.chmod(0o644)
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    fetch_proposal(inbox, received, tmp_path / "again", store=store)
    assert (tmp_path / "again" / BODY).read_bytes() == (family.folders[1] / BODY).read_bytes()
