"""What each stolen key can and cannot do, and how to recover: docs/concepts/signatures.md."""

from __future__ import annotations

import shutil

import pytest

from composable.errors import KeyFileError, RegistryError, SignatureError
from composable.packaging import Registry, Requirement, Version
from composable.packaging.trust.keys import format_public_key
from tests.support.signed_registries import OPERATOR, World, make_advisory, use


def steal(world: World, owner: str, *names: str) -> None:
    """Copy keys of a machine to that of the thief."""
    folder = world.home / "keys" / "thief"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(world.home / "keys" / owner / f"{name}.key", folder)


def kind_of(registry: Registry) -> str | None:
    """Return the rule that a client refuses a registry for."""
    try:
        use(registry)
    except SignatureError as error:
        return error.kind
    return None


def versions(registry: Registry, name: str = "german") -> list[str]:
    return [str(release.version) for release in registry.versions(name)]


# The online key.


def test_online_key_can_freeze(world: World) -> None:
    before = use(world.open("client"))
    steal(world, OPERATOR, "online")
    kept = world.home / "kept"
    shutil.copytree(world.folder, kept)
    world.publish("alice", "german", "1.2.0", seed=5)
    world.confirm()
    shutil.rmtree(world.folder)
    shutil.copytree(kept, world.folder)  # what alice published is withheld
    world.pass_time(40)
    world.signatures("thief").sign()
    assert use(world.open("client")) == before


@pytest.mark.parametrize(
    "act",
    [
        lambda world: world.publish("thief", "german", "6.6.6", seed=6),
        lambda world: world.open("thief").unyank("german", Version("1.0.0")),
        lambda world: world.open("thief").advise(make_advisory()),
        lambda world: world.signatures("thief").authority().revoke("alice"),
    ],
    ids=["publish", "un-yank", "advise", "change who may publish"],
)
def test_online_key_cannot(world: World, act: object) -> None:
    steal(world, OPERATOR, "online")
    before = use(world.open("client"))
    with pytest.raises(KeyFileError, match="is here"):
        act(world)  # type: ignore[operator]
    world.signatures("thief").sign()
    assert use(world.open("client")) == before


def test_online_key_is_rotated(world: World) -> None:
    """Whatever numbers the thief used up, the new key starts where it likes."""
    steal(world, OPERATOR, "online")
    for _ in range(3):
        world.signatures("thief").sign()
    before = use(world.open("client"))
    new = world.make_key(OPERATOR, "online-2")
    signatures = world.signatures(OPERATOR)
    assert signatures.change(signatures.authority().rotate_online(new.public)).is_visible
    assert use(world.open("client")) == before
    with pytest.raises(KeyFileError, match="no key of"):
        world.signatures("thief").sign()


# A publisher's key.


def test_publisher_key_waits_for_the_operator(world: World) -> None:
    steal(world, "alice", "alice")
    registry = world.publish("thief", "german", "1.2.0", seed=9)
    assert registry.awaits_operator
    assert versions(world.open("client")) == ["1.0.0", "1.1.0"]


def test_publisher_key_publishes_its_own_packages_only(world: World) -> None:
    steal(world, "alice", "alice")
    world.publish("thief", "german", "1.2.0", seed=9)
    world.confirm()
    assert versions(world.open("client")) == ["1.0.0", "1.1.0", "1.2.0"]
    for name in ("french", "gennan", "physics"):
        with pytest.raises((KeyFileError, SignatureError)):
            world.publish("thief", name, "1.2.0", seed=9)
    with pytest.raises(KeyFileError, match="advisories"):
        world.open("thief").advise(make_advisory())


def test_recovery_from_a_stolen_publisher_key(world: World) -> None:
    """The genuine releases are signed again, with a new key; the thief's are not listed."""
    steal(world, "alice", "alice")
    genuine = use(world.open("client"))
    world.publish("thief", "german", "1.2.0", seed=9)
    world.confirm()
    operator = world.signatures(OPERATOR)
    operator.change(operator.authority().revoke("alice"))
    assert kind_of(world.open("client")) == "revoked"
    with pytest.raises(SignatureError, match="revoked") as refused:
        world.publish("thief", "german", "1.3.0", seed=9)
    assert refused.value.kind == "revoked"
    (world.home / "keys/alice/alice.key").unlink()
    world.grant("alice", key=world.make_key("alice", "alice-2"))
    world.signatures("alice").sign([Requirement.parse("german<1.2")])
    world.confirm()
    assert use(world.open("client")) == genuine
    assert use(world.open("newcomer")) == genuine


def test_revoked_names_stay_taken(world: World) -> None:
    operator = world.signatures(OPERATOR)
    operator.change(operator.authority().revoke("alice"))
    for name in ("german", "gerrnan", "ger-man"):
        with pytest.raises(RegistryError, match="'alice'"):
            world.signatures(OPERATOR).authority().grant("bob", [name], [])


# Root keys.


def test_one_root_key_changes_advisories_and_nothing_else(world: World) -> None:
    steal(world, OPERATOR, "root-1")
    before = use(world.open("client"))
    thief = world.signatures("thief").authority()
    assert thief.revoke("alice").missing == 1
    assert thief.discard()
    key = world.make_key("thief").public
    assert thief.grant("alice", [], [key]).missing == 1
    world.confirm()
    assert use(world.open("client")) == before
    registry = world.open("thief")
    registry.advise(make_advisory(id="french-1", name="french"))
    world.confirm()
    assert use(world.open("client"))["advisories"] == ["german-1", "french-1"]


def test_a_root_key_is_rotated(world: World) -> None:
    steal(world, OPERATOR, "root-1")
    before = use(world.open("client"))
    stolen = next(file for file in world.signatures("thief").keyring.files())
    (world.home / "keys" / OPERATOR / "root-1.key").unlink()
    new = world.make_key(OPERATOR, "root-4").public
    operator = world.signatures(OPERATOR)
    outcome = operator.change(
        operator.authority().rotate_root(format_public_key(stolen.public), new)
    )
    assert outcome.missing == 0
    assert use(world.open("client")) == before == use(world.open("newcomer"))
    with pytest.raises(KeyFileError, match="none of the root keys"):
        world.signatures("thief").authority().revoke("alice")
    with pytest.raises(KeyFileError, match="advisories"):
        world.open("thief").advise(make_advisory(id="french-1", name="french"))


def test_two_root_keys_can_do_everything(world: World) -> None:
    steal(world, OPERATOR, "root-1", "root-2", "online")
    use(world.open("client"))
    thief = world.signatures("thief")
    thief.change(thief.authority().rotate_publisher("alice", world.make_key("thief").public))
    thief.sign([Requirement.parse("german")])
    world.publish("thief", "german", "6.6.6", seed=6)
    assert versions(world.open("client")) == ["1.0.0", "1.1.0", "6.6.6"]
    signer = world.open("client").verify_release(world.open("client").versions("german")[0])
    assert signer is not None
    assert signer.publisher == "alice"
