"""The inbox of a server: who may propose, who sees it, who decides, and how much fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from composable.errors import ManifestError, ProposalError, RegistryError
from composable.interface import RouterInterface
from composable.packaging import Store, Version
from composable.packaging.install.deltas import prepare_deltas
from composable.packaging.install.proposals import fetch_proposal
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.inbox import Outcome
from composable.packaging.registry.served_inbox import ServedInbox
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import create_key
from composable.packaging.trust.proposal import Proposal, seal
from composable.server.database import in_hours
from composable.server.settings import Settings
from composable.server.tables import Proposal as Row
from tests.packaging.conftest import make_interface
from tests.server.conftest import MakeVetted
from tests.support.registries import Served, run_server
from tests.support.updates import BODY, LARGE, Family, propose_update, vet

BASE = ("german", Version("1.0.0"))
DERIVED = 'derives-from = "german@1.0.0"'
NO = Outcome(state="rejected", reason="worse on contracts")


class People:
    """A maintainer who published german 1.0.0, a contributor, and a stranger."""

    def __init__(self, server: Served, folder: Path, home: Path, interface: RouterInterface):
        self.server = server
        self.interface = interface
        self.tokens = {name: server.account(name) for name in ("maintainer", "ann", "eve")}
        self.home = home
        server.registry(self.tokens["maintainer"]).publish(folder, interface=interface)

    def inbox(self, name: str) -> ServedInbox:
        registry = self.server.registry(self.tokens.get(name))
        return ServedInbox(registry, Keyring(self.home / "keys" / name))

    def propose(self, folder: Path, name: str = "ann", **options: Any) -> Proposal:
        return self.inbox(name).propose(folder, BASE, interface=self.interface, **options)

    def ids(self, name: str) -> list[str]:
        return [received.id for received in self.inbox(name).entries()]


@pytest.fixture
def people(
    server: Served, make_vetted: MakeVetted, tmp_path: Path, interface: RouterInterface
) -> People:
    return People(server, make_vetted(), tmp_path, interface)


@pytest.fixture
def changed(make_vetted: MakeVetted) -> Path:
    return make_vetted(version="1.0.1", seed=5, head=DERIVED)


def test_a_proposal_goes_from_a_contributor_to_a_maintainer(
    people: People, changed: Path, make_vetted: MakeVetted, tmp_path: Path
) -> None:
    create_key(tmp_path / "keys" / "ann", "ann", None)
    proposal = people.propose(changed, message="more")
    assert people.propose(changed, message="more") == proposal, "the same again changes nothing"
    maintainer = people.inbox("maintainer")
    received = maintainer.find("german")
    assert (received.id, received.account, received.state) == (proposal.id, "ann", "open")
    assert maintainer.describe_proposer(received) == f"ann, {proposal.key[:20]}…"
    manifest = fetch_proposal(maintainer, received, tmp_path / "out")
    assert manifest.derives_from == "german@1.0.0"
    for name in ("body.safetensors", "card.json"):
        assert (tmp_path / "out" / name).read_bytes() == (changed / name).read_bytes()
    assert people.ids("ann") == people.ids("maintainer") == [proposal.id]
    with pytest.raises(RegistryError, match="is not a release of this proposal"):
        maintainer.decide(received, Outcome(state="accepted", release="german@1.0.0"))
    maintainer.decide(received, NO)
    maintainer.decide(received, NO)
    (seen,) = people.inbox("ann").entries()
    assert (seen.state, seen.outcome) == ("rejected", NO)
    with pytest.raises(RegistryError, match="rejected already: worse on contracts"):
        people.propose(changed, message="more")
    with pytest.raises(ProposalError, match="is not the file that was proposed"):
        fetch_proposal(maintainer, received, tmp_path / "again")
    root = tmp_path / "served"
    assert not list((root / "inbox").rglob("*.safetensors"))
    left = [path.parts for path in (root / "uploads").rglob("*") if path.is_file()]
    assert not [parts for parts in left if proposal.id in parts], "its chunks are gone"


def test_an_accepted_proposal_is_one_that_a_release_names(
    people: People, changed: Path, make_vetted: MakeVetted
) -> None:
    proposal = people.propose(changed)
    digest = "sha256:" + "1" * 64
    provenance = (
        f'[provenance]\nproposal = "sha256:{proposal.id}"\nbase = "german@1.0.0"\n'
        f'verdict = "{digest}"\n'
    )
    release = make_vetted(version="2.0.0", seed=5, head=DERIVED, tail=provenance)
    maintainer = people.inbox("maintainer")
    maintainer.registry.publish(release, interface=people.interface)
    outcome = Outcome(state="accepted", release="german@2.0.0", verdict=digest)
    maintainer.decide(maintainer.find("german"), outcome)
    assert people.inbox("ann").entries()[0].outcome == outcome


def test_no_client_sees_it(people: People, changed: Path) -> None:
    before = {
        path: people.server.ask("GET", path)
        for path in ("/index/ge/german.jsonl", "/catalog.jsonl", "/api/v1/packages/german")
    }
    proposal = people.propose(changed)
    assert {path: people.server.ask("GET", path) for path in before} == before
    for digest in proposal.digests.values():
        token = people.tokens["maintainer"]
        status, _ = people.server.ask("GET", f"/blobs/{digest[7:9]}/{digest[7:]}", token=token)
        is_published = digest in str(before["/index/ge/german.jsonl"][1])
        assert status == (200 if is_published else 404)


def test_strangers_see_nothing_and_decide_nothing(people: People, changed: Path) -> None:
    proposal = people.propose(changed)
    assert people.ids("eve") == []
    path = f"/inbox/{proposal.id}/body.safetensors"
    statuses = [
        people.server.ask("GET", path, token=people.tokens.get(name))[0]
        for name in ("nobody", "eve", "ann", "maintainer")
    ]
    assert statuses == [401, 404, 200, 200]
    assert people.server.ask("GET", path[:-5], token=people.tokens["ann"])[0] == 404
    received = people.inbox("ann").find("german")
    with pytest.raises(RegistryError, match="no such proposal"):
        people.inbox("eve").decide(received, NO)
    with pytest.raises(RegistryError, match="belongs to somebody else"):
        people.inbox("ann").decide(received, NO)
    with pytest.raises(RegistryError, match="somebody else has proposed exactly this"):
        people.propose(changed, "eve")
    with pytest.raises(RegistryError, match="a token is needed"):
        people.propose(changed, "nobody")


def test_interrupted_uploads_go_on_and_are_dropped_in_the_end(
    people: People, changed: Path, server: Served, tmp_path: Path
) -> None:
    proposal = people.propose(changed)
    with server.services.database.write() as session:
        session.get_one(Row, proposal.id).state = "arriving"
    assert people.ids("maintainer") == [], "what is incomplete is not listed"
    again = people.propose(changed)
    assert again == proposal
    assert people.ids("maintainer") == [proposal.id]
    with server.services.database.write() as session:
        row = session.get_one(Row, proposal.id)
        row.state, row.created = "arriving", in_hours(-100)
    assert server.services.proposals.drop_expired() == 1
    assert not any(path.is_file() for path in (tmp_path / "served" / "inbox").rglob("*"))


def test_what_is_not_what_it_says(people: People, changed: Path) -> None:
    token, server = people.tokens["ann"], people.server
    genuine = people.propose(changed)
    text = (
        Path(server.services.storage.location) / "inbox" / genuine.id / "expert.toml"
    ).read_text()
    envelope = seal(genuine).decode()
    attacks = {
        "damaged": {"envelope": envelope[:-10], "manifest": text},
        "another manifest": {"envelope": envelope, "manifest": text.replace("Knows", "Has")},
        "no manifest": {"envelope": envelope, "manifest": ""},
        "not JSON": {"envelope": "[" * 5000, "manifest": text},
    }
    for attack, body in attacks.items():
        status, answer = server.api("POST", "/proposals", body, token)
        assert status == 422, (attack, answer)
    for path in ("/proposals/none/commit", f"/proposals/{'0' * 64}/commit"):
        assert server.api("POST", path, {}, token)[0] == 404
    wrong = b"x" * 10
    path = f"/proposals/{genuine.id}/files/{genuine.digests['body.safetensors']}/0"
    assert server.api("PUT", path, wrong, token)[0] == 409, "it is complete"


def test_only_a_change_of_a_release_is_taken(
    people: People, changed: Path, make_vetted: MakeVetted
) -> None:
    with pytest.raises(ManifestError, match="nothing is what it derives from"):
        people.propose(make_vetted(version="1.0.1", seed=6))
    proposal = people.propose(changed)
    other = dataclasses.replace(proposal, base_manifest="sha256:" + "2" * 64)
    text = people.server.services.storage.read(f"inbox/{proposal.id}/expert.toml")
    assert text is not None
    body = {"envelope": seal(other).decode(), "manifest": text.data.decode()}
    status, answer = people.server.api("POST", "/proposals", body, people.tokens["ann"])
    assert status == 404 and "with that manifest" in answer["error"]["message"]


def test_quotas(
    tmp_path: Path, make_vetted: MakeVetted, changed: Path, interface: RouterInterface
) -> None:
    settings = Settings(max_open_proposals=2, max_proposal_bytes=100_000)
    with run_server(tmp_path / "small", settings=settings) as server:
        people = People(server, make_vetted(), tmp_path, interface)
        for message in ("1", "2"):
            people.propose(changed, message=message)
        with pytest.raises(RegistryError, match="2 proposals of yours are undecided, at most 2"):
            people.propose(changed, message="3")
        people.propose(changed, "eve", message="another account has room")
        maintainer = people.inbox("maintainer")
        maintainer.decide(maintainer.entries()[0], NO)
        (changed / "README.md").write_bytes(b"x" * 200_000)
        with pytest.raises(RegistryError, match="at most 100,000 can be proposed"):
            people.propose(changed)


# Proposals that are sent as deltas.


class Updated(People):
    """People whose german is large enough for deltas; ann has a low-rank update of it."""

    def __init__(self, server: Served, home: Path):
        large = make_interface(**LARGE)
        self.family = Family(home / "family", large, version="{}.0.0", is_derived=True)
        for folder in self.family.folders:
            vet(folder, large)
        super().__init__(server, self.family.folders[0], home, large)

    def update(self, name: str = "ann") -> Proposal:
        store = Store(self.home / "stores" / name)
        folder, factors = self.family.folders[1], self.family.factors[1]
        return propose_update(self.inbox(name), folder, self.interface, store, factors)

    def fetch(self, out: Path) -> None:
        maintainer = self.inbox("maintainer")
        store = Store(self.home / "stores" / "maintainer")
        fetch_proposal(maintainer, maintainer.find("german"), out, store=store)


def test_only_the_change_is_sent_and_kept(server: Served, tmp_path: Path) -> None:
    people = Updated(server, tmp_path)
    proposal = people.update()
    assert people.update() == proposal, "the same again changes nothing"
    kept = {path.name: path for path in (tmp_path / "served" / "inbox" / proposal.id).iterdir()}
    assert f"{BODY}.delta" in kept and BODY not in kept
    assert sum(path.stat().st_size for path in kept.values()) == proposal.n_bytes
    assert proposal.n_bytes < 0.2 * sum(proposal.sizes.values())
    (seen,) = people.inbox("maintainer").entries()
    assert seen.proposal == proposal
    people.fetch(tmp_path / "out")
    assert (tmp_path / "out" / BODY).read_bytes() == (people.family.folders[1] / BODY).read_bytes()
    path = f"/inbox/{proposal.id}/{BODY}.delta"
    statuses = [server.ask("GET", path, token=people.tokens[who])[0] for who in ("eve", "ann")]
    assert statuses == [404, 200]
    people.inbox("maintainer").decide(seen, NO)
    assert not any(path.exists() for path in kept.values())


def test_the_quota_counts_what_is_sent(tmp_path: Path) -> None:
    settings = Settings(max_proposal_bytes=50_000)
    with run_server(tmp_path / "served", settings=settings) as server:
        people = Updated(server, tmp_path)
        with pytest.raises(RegistryError, match="at most 50,000 can be proposed"):
            people.inbox("ann").propose(
                people.family.folders[1],
                ("german", Version("0.0.0")),
                interface=people.interface,
            )
        people.update()
    # What it makes is limited like a release.
    settings = Settings(max_file_bytes=110_000, max_release_bytes=110_000)
    with run_server(tmp_path / "small", settings=settings) as server:
        people = Updated(server, tmp_path / "small-2")
        (people.family.folders[1] / "README.md").write_bytes(b"x" * 10_000)
        with pytest.raises(RegistryError, match="bytes of whole files"):
            people.update()


def test_a_base_that_is_taken_down(server: Served, tmp_path: Path) -> None:
    people = Updated(server, tmp_path)
    admin = server.account("root", is_admin=True, scopes=("admin",))
    proposal = people.update()
    with server.services.database.write() as session:
        session.get_one(Row, proposal.id).state = "arriving"
    body = {"reason": "court order"}
    assert server.api("POST", "/packages/german/0.0.0/takedown", body, admin)[0] == 200
    for file in proposal.sent:
        if file.name != "expert.toml":  # it comes with the statement
            data = (tmp_path / "served" / "inbox" / proposal.id / file.name).read_bytes()
            path = f"/proposals/{proposal.id}/files/{file.digest}/0"
            assert server.api("PUT", path, data, people.tokens["ann"])[0] == 204
    commit = f"/proposals/{proposal.id}/commit"
    status, answer = server.api("POST", commit, {}, people.tokens["ann"])
    assert status == 409 and "which is gone" in answer["error"]["message"]
    with server.services.database.write() as session:
        session.get_one(Row, proposal.id).state = "open"
    with pytest.raises(ProposalError, match=r"as a change of german@0\.0\.0, which is gone"):
        people.fetch(tmp_path / "out")


def test_a_delta_that_makes_another_file(server: Served, tmp_path: Path) -> None:
    people = Updated(server, tmp_path)
    _, second, third = people.family.folders
    text = (third / "expert.toml").read_text().replace("german@1.0.0", "german@0.0.0")
    (third / "expert.toml").write_text(text)
    packed = [pack_expert(folder, interface=people.interface) for folder in (second, third)]
    target = next(file.digest for file in packed[0].files if file.name == BODY)
    inbox, store = people.inbox("ann"), Store(tmp_path / "store")
    with prepare_deltas(inbox.registry, third, packed[1], store, is_proposal=True) as prepared:
        wrong = dataclasses.replace(prepared.deltas[BODY], target=target)
        with pytest.raises(RegistryError, match="have digest"):
            inbox.propose(
                second,
                ("german", Version("0.0.0")),
                interface=people.interface,
                deltas={BODY: wrong},
            )
    assert people.ids("maintainer") == []
    people.update()
    assert len(people.ids("maintainer")) == 1
