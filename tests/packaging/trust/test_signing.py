"""Signing a registry: who may publish what, changes that wait, clocks, keys and interruptions."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path

import pytest

from composable.errors import KeyFileError, RegistryError, SignatureError
from composable.packaging import Requirement
from composable.packaging.trust import metadata as metadata_module
from composable.packaging.trust.keys import KeyFile, create_key, parse_public_key
from composable.packaging.trust.statement import Statement, sign_statement, verify_statement
from tests.support.signed_registries import OPERATOR, World, use

DIGEST = "sha256:" + "1" * 64


def move_key(world: World, owner: str, name: str, to: str) -> None:
    target = world.home / "keys" / to
    target.mkdir(parents=True, exist_ok=True)
    (world.home / "keys" / owner / f"{name}.key").rename(target / f"{name}.key")


# Keys.


def test_a_key_needs_its_pass_phrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = create_key(tmp_path, "alice", "correct horse")
    assert b"correct horse" not in file.path.read_bytes()
    assert KeyFile.read(file.path).public == file.public
    monkeypatch.delenv("COMPOSABLE_PASSPHRASE", raising=False)
    with pytest.raises(KeyFileError, match="needs its pass phrase") as missing:
        file.unlock()
    assert "COMPOSABLE_PASSPHRASE" in str(missing.value.hint)
    monkeypatch.setenv("COMPOSABLE_PASSPHRASE", "wrong")
    with pytest.raises(KeyFileError, match="wrong pass phrase"):
        file.unlock()
    monkeypatch.setenv("COMPOSABLE_PASSPHRASE", "correct horse")
    assert file.unlock().public_key == file.public


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    before = create_key(tmp_path, "alice", None).path.read_bytes()
    with pytest.raises(KeyFileError, match="already exists"):
        create_key(tmp_path, "alice", None)
    assert (tmp_path / "alice.key").read_bytes() == before
    assert (tmp_path / "alice.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"kind": "composable-key"}', b"\xff"])
def test_a_damaged_key_file(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "alice.key").write_bytes(damage)
    with pytest.raises(KeyFileError, match="is not a key file"):
        KeyFile.read(tmp_path / "alice.key")


@pytest.mark.parametrize("text", ["", "ed25519:12", "rsa:" + "0" * 64, "ed25519:" + "g" * 64])
def test_a_bad_public_key(text: str) -> None:
    with pytest.raises(KeyFileError, match="is not a public key"):
        parse_public_key(text)


def test_a_missing_key_loses_nothing(world: World) -> None:
    """Before anything is uploaded."""
    before = sorted(world.folder.rglob("*"))
    (world.home / "keys/alice/alice.key").unlink()
    with pytest.raises(KeyFileError, match="no key of publisher 'alice' is here"):
        world.publish("alice", "german", "1.2.0", seed=5)
    assert sorted(world.folder.rglob("*")) == before


# Statements.


def test_a_statement_covers_every_file(tmp_path: Path) -> None:
    statement = Statement(
        name="german", version="1.0.0", license="MIT", interface=DIGEST, digests={"a": DIGEST}
    )
    alice, bob = (create_key(tmp_path, name, None) for name in ("alice", "bob"))
    data = sign_statement(statement, alice.unlock())
    assert verify_statement(data, [alice.public, bob.public], "") == (statement, alice.public)
    with pytest.raises(SignatureError) as refused:
        verify_statement(data, [bob.public], "")
    assert refused.value.kind == "wrong-signer"
    for damage in (b"", b"{}", data[:-30], b"[1]"):
        with pytest.raises(SignatureError) as refused:
            verify_statement(damage, [alice.public], "")
        assert refused.value.kind == "wrong-content"


def test_a_published_statement_lists_manifest_and_all_files(world: World) -> None:
    release = world.open("client").versions("german")[0]
    data = (world.folder / "statements/german/1.0.0.json").read_bytes()
    key = KeyFile.read(world.home / "keys/alice/alice.key").public
    statement, _ = verify_statement(data, [key], "")
    assert {*statement.digests.values()} == {*release.digests}
    assert statement.digests["expert.toml"] == release.manifest
    assert statement.license == "MIT"


# Who may publish what.


def test_names_belong_to_one_publisher(world: World) -> None:
    authority = world.signatures(OPERATOR).authority()
    key = world.make_key("carol").public
    for name in ("german", "gerrnan", "german-*", "*"):
        if name == "german-*":
            continue  # contains no name of anybody
        with pytest.raises(RegistryError, match=r"'alice'|'bob'"):
            authority.grant("carol", [name], [key])
    with pytest.raises(RegistryError, match="belongs to publisher 'alice'"):
        authority.grant("carol", ["dutch"], [KeyFile.read(_key(world, "alice")).public])


def test_a_prefix_is_granted(world: World) -> None:
    world.grant("carol", "carol-*")
    world.publish("carol", "carol-dutch", "1.0.0", seed=4)
    world.confirm()
    assert [str(r.version) for r in world.open("client").versions("carol-dutch")] == ["1.0.0"]
    with pytest.raises(RegistryError, match=r"looks like|belongs to"):
        world.grant("dave", "caro1-dutch")
    with pytest.raises(RegistryError, match="belongs to"):
        world.grant("eve", "carol-x")


def test_many_publishers_are_in_bins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = use(world.open("client"))
    monkeypatch.setattr(metadata_module, "MAX_PUBLISHERS", 2)
    world.grant("carol", "carol-*")
    assert (world.folder / "trust/1.bin-ff.json").is_file()
    world.publish("carol", "carol-dutch", "1.0.0", seed=4)
    world.publish("alice", "german", "1.2.0", seed=5)
    world.confirm()
    client = world.open("client")
    assert [str(r.version) for r in client.versions("german")] == ["1.0.0", "1.1.0", "1.2.0"]
    assert client.versions("french") == world.open("newcomer").versions("french")
    assert len(client.versions("carol-dutch")) == 1
    assert before["french"] == use(client)["french"]
    operator = world.signatures(OPERATOR)
    operator.change(operator.authority().revoke("bob"))
    with pytest.raises(SignatureError) as refused:
        world.open("client").versions("french")
    assert refused.value.kind == "revoked"


# Changes that wait.


def test_two_people_hold_the_root_keys(world: World) -> None:
    move_key(world, OPERATOR, "root-1", "ann")
    move_key(world, OPERATOR, "root-2", "ben")
    (world.home / "keys" / OPERATOR / "root-3.key").unlink()
    key = world.make_key("carol").public
    ann = world.signatures("ann").authority()
    outcome = ann.grant("carol", ["dutch"], [key])
    assert (outcome.missing, outcome.is_visible) == (1, False)
    assert outcome.waiting[0] == "carol may publish dutch"
    with pytest.raises(RegistryError, match="another change still waits"):
        ann.revoke("alice")
    ben = world.signatures("ben").authority()
    assert ben.describe_pending() == outcome.waiting
    assert ben.approve().missing == 0
    assert ben.describe_pending() == []
    world.confirm()
    world.publish("carol", "dutch", "1.0.0", seed=4)
    world.confirm()
    assert len(world.open("client").versions("dutch")) == 1


def test_a_change_that_no_root_key_signed_is_not_shown(world: World) -> None:
    """Somebody who can write to the storage hopes that a holder of a root key approves."""
    source = max((world.folder / "trust").glob("*.targets.json"))
    number = int(source.name.partition(".")[0]) + 1
    pending = world.folder / "trust-pending" / f"{number}.targets.json"
    pending.parent.mkdir()
    pending.write_bytes(source.read_bytes().replace(b'"german"', b'"russian"'))
    authority = world.signatures(OPERATOR).authority()
    assert authority.describe_pending() == []
    assert authority.approve().signed == []


# Time.


def test_a_clock_that_is_behind(world: World) -> None:
    world.offsets["client"] = datetime.timedelta(days=-400)
    with pytest.raises(SignatureError, match="the clock of this machine is wrong") as refused:
        use(world.open("client"))
    assert refused.value.kind == "clock"


def test_a_clock_that_is_ahead_is_shown(world: World) -> None:
    world.offsets["client"] = datetime.timedelta(days=40)
    with pytest.raises(SignatureError, match=r"the clock of this machine says 2027-01-08 12:00"):
        use(world.open("client"))


def test_a_rare_mirror_is_allowed(world: World) -> None:
    before = use(world.open("client"))
    world.pass_time(40)
    stale = datetime.timedelta(days=11)
    assert use(world.open("client", max_stale=stale)) == before
    with pytest.raises(SignatureError) as refused:
        use(world.open("client", max_stale=datetime.timedelta(days=9)))
    assert refused.value.kind == "freeze"
    assert use(world.open("client", is_offline=True))["names"] == before["names"]


def test_offline_signatures_are_renewed_before_they_expire(world: World) -> None:
    for _ in range(14):
        world.pass_time(29)
        world.confirm()
    assert len(use(world.open("newcomer"))["german"]) == 2


# Interruptions and other signers.


def test_signing_again_repairs_what_was_interrupted(world: World) -> None:
    """A publisher was killed between its release and its list."""
    for path in sorted((world.folder / "trust").glob("*.publisher-alice.json"))[-1:]:
        path.unlink()
    with pytest.raises(SignatureError, match="which it lists"):
        world.confirm()
    saved = world.saved("late") / "trust"
    for path in saved.glob("*.publisher-alice.json"):
        (world.folder / "trust" / path.name).write_bytes(path.read_bytes())
    world.confirm()
    assert len(use(world.open("client"))["german"]) == 2


def test_releases_older_than_the_signatures_are_vouched_for(tmp_path: Path, genuine: World) -> None:
    world = World(tmp_path / "world", genuine.interface)
    plain = world.open("anybody")
    plain.publish(world.make_expert("german", "1.0.0"), interface=world.interface)
    world.create()
    world.grant("alice", "german")
    with pytest.raises(SignatureError, match="its publisher 'alice' has not signed it"):
        world.open("client").versions("german")
    world.signatures("alice").sign([Requirement.parse("german")])
    world.confirm()
    client = world.open("client")
    assert client.names() == ["german"]
    assert client.verify_release(client.versions("german")[0]) is not None


@pytest.mark.parametrize("is_genuine", [True, False], ids=["there", "replaced by another file"])
def test_a_key_that_is_granted_again_vouches_again(world: World, is_genuine: bool) -> None:
    """What it listed before it was replaced is older than what this machine has seen."""
    operator = world.signatures(OPERATOR)
    authority = operator.authority()
    (first,) = authority.find_grant(authority.load(), "alice").keys
    operator.change(authority.rotate_publisher("alice", world.make_key("next").public))
    world.signatures("next").sign([Requirement.parse("german")])
    world.confirm()
    assert "german" in use(world.open("alice"))
    operator = world.signatures(OPERATOR)
    operator.change(operator.authority().rotate_publisher("alice", first))
    with pytest.raises(SignatureError, match="is not signed by the keys in charge"):
        world.open("client").versions("german")
    if not is_genuine:
        newest = sorted((world.folder / "trust").glob("*.publisher-alice.json"))[-1]
        newest.write_bytes(newest.read_bytes().replace(b"german", b"french"))
        with pytest.raises(SignatureError, match="and this machine has seen"):
            world.signatures("alice").sign([Requirement.parse("german")])
        return
    world.signatures("alice").sign([Requirement.parse("german")])
    world.confirm()
    assert "german" in use(world.open("client"))


def test_signing_twice_is_refused(world: World) -> None:
    with pytest.raises(RegistryError, match="is signed already"):
        world.signatures(OPERATOR).create(None)


def test_creation_continues_where_it_was_interrupted(tmp_path: Path, genuine: World) -> None:
    world = World(tmp_path / "world", genuine.interface)
    world.create()
    (world.folder / "trust/timestamp.json").unlink()
    (world.folder / "config.json").write_text('{"kind":"composable-registry","schema":1}')
    assert len(world.signatures(OPERATOR).create(None)) == 4
    assert world.open("client").names() == []


def test_publishers_and_operator_at_once(world: World) -> None:
    """Nothing that was signed is lost, and the last confirmation shows all of it."""

    def publish(name: str, expert: str) -> None:
        for minor in range(2, 4):
            world.publish(name, expert, f"1.{minor}.0", seed=minor)
            world.confirm()

    threads = [
        threading.Thread(target=publish, args=pair)
        for pair in (("alice", "german"), ("bob", "french"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.confirm()
    client = world.open("newcomer")
    assert len(client.versions("german")) == 4
    assert len(client.versions("french")) == 3
    assert client.names() == ["french", "german"]


def _key(world: World, machine: str) -> Path:
    return world.home / "keys" / machine / f"{machine}.key"
