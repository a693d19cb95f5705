"""Attacks on a signed registry by somebody who can write to its storage, with stolen keys or none.

Each changes the registry of a world, as `build_world` returns it. Clients must refuse it for the
rule that it breaks, or see what they saw before.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composable.errors import SignatureError
from composable.packaging import Registry
from composable.packaging.registry.index import compile_index, index_path
from composable.packaging.registry.release import Release
from composable.packaging.registry.signed import statement_path
from composable.packaging.registry.storage import Folder
from tests.support.signed_registries import OPERATOR, START, Place, World, use


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack.

    Args:
        name: Its name in the table of attacks.
        run: Changes the registry.
        refused_for: The rule that clients refuse it for; None if they see what they saw before.
        saw: What the client has seen before: `late`, `early`, or nothing.
        asks_for: A package that the client asks for besides those it knows.
    """

    name: str
    run: Callable[[World], None]
    refused_for: str | None
    saw: str | None = "late"
    asks_for: str | None = None


def _restore_old(world: World) -> None:
    world.restore("early")


def _freeze(world: World) -> None:
    world.pass_time(40)


def _mix(world: World) -> None:
    """Show the early list of alice in the late state."""
    early, late = (_newest(folder, "publisher-alice") for folder in _both(world))
    shutil.copy(early, world.folder / "trust" / late.name)


def _mix_snapshots(world: World) -> None:
    early, late = (_newest(folder, "snapshot") for folder in _both(world))
    shutil.copy(early, world.folder / "trust" / late.name)


def _replace_index(world: World) -> None:
    """Put another index in the place of the signed one."""
    release = world.open("attacker").versions("german")[-1]
    index = world.folder / index_path("german")
    digest = _signed_digest(world, "german")
    forged = index.read_bytes().replace(release.manifest.encode(), b"sha256:" + b"0" * 64)
    _overwrite(world.folder / "blobs" / digest[:2] / digest, forged)


def _replace_release(world: World) -> None:
    """Replace the release in its record and in the unsigned index, as for unsigned clients."""
    record = world.folder / "records/german/1.1.0.json"
    release = Release.from_line(record.read_bytes(), "german", "")
    shutil.rmtree(world.folder / "records/german")
    (world.folder / index_path("german")).unlink()
    evil = Registry(Folder(world.folder))
    evil.publish(world.make_expert("german", "1.1.0", 9), interface=world.interface)
    assert evil.versions("german")[-1].manifest != release.manifest


def _replace_statement(world: World) -> None:
    """Sign a statement on the release with a key of another publisher."""
    release = world.open("attacker").versions("german")[-1]
    source = world.open("attacker").versions("french")[-1]
    shutil.copy(
        world.folder / statement_path(source.name, source.version),
        world.folder / statement_path(release.name, release.version),
    )


def _add_release(world: World) -> None:
    evil = Registry(Folder(world.folder))
    evil.publish(world.make_expert("german", "9.9.9", 9), interface=world.interface)


def _add_under_other_name(world: World) -> None:
    """Let bob list german among his own packages, signed with his key and confirmed."""
    signatory = world.signatures("bob").signatory()
    _add_release(world)
    data = (world.folder / index_path("german")).read_bytes()
    held = signatory.load()
    delegator = held.delegator_of("french")
    before = signatory.load_delegated("publisher-bob", delegator)
    assert signatory.sign_targets(
        "publisher-bob", held.grants["bob"].keys, {"german": data}, before
    )
    world.confirm()


def _unyank(world: World) -> None:
    (world.folder / "records/german/1.0.0.yanked").unlink()
    index = world.folder / index_path("german")
    storage = Folder(world.folder)
    index.write_bytes(compile_index(storage, "german", storage.read(index_path("german"))))


def _drop_advisory(world: World) -> None:
    (world.folder / "advisories.jsonl").unlink()


def _claim_lookalike(world: World) -> None:
    """Publish a name that nobody was granted; a client asks for it."""
    evil = Registry(Folder(world.folder))
    evil.publish(world.make_expert("gennan", "1.0.0", 9), interface=world.interface)


def _steal_online_key(world: World) -> None:
    """Confirm, with the online key, the early list of alice as the current one."""
    late = world.folder / "trust"
    for path in (late / _newest(world.folder, "publisher-alice").name,):
        path.unlink()
    _copy_key(world, OPERATOR, "online", "thief")
    thief = world.signatures("thief")
    for path in sorted(late.glob("*.snapshot.json")):
        path.unlink()
    thief.sign()


def _steal_online_key_to_publish(world: World) -> None:
    """Sign a list of alice with the online key."""
    _copy_key(world, OPERATOR, "online", "thief")
    thief = world.signatures("thief").signatory()
    held = thief.load()
    online = tuple(held.root.keys[keyid] for keyid in held.root.roles["timestamp"].keyids)
    _add_release(world)
    data = (world.folder / index_path("german")).read_bytes()
    delegator = held.delegator_of("german")
    before = thief.load_delegated("publisher-alice", delegator)
    assert thief.sign_targets("publisher-alice", online, {"german": data}, before)
    newest = _newest(world.folder, "publisher-alice")
    snapshots = world.folder / "trust"
    # List it: confirming honestly would skip what alice did not sign.
    number = int(newest.name.partition(".")[0])
    _sign_snapshot(world, thief, "publisher-alice", number, newest.read_bytes())
    assert snapshots.is_dir()


def _steal_publisher_key(world: World) -> None:
    """Publish with the key of alice, without the online key."""
    _copy_key(world, "alice", "alice", "thief")
    world.publish("thief", "german", "1.2.0", seed=9)


def _steal_publisher_key_for_other(world: World) -> None:
    """Sign a release of bob with the key of alice, and put it in its place."""
    _copy_key(world, "alice", "alice", "thief")
    release = world.open("attacker").versions("french")[-1]
    other = world.open("attacker").versions("german")[-1]
    shutil.copy(
        world.folder / statement_path(other.name, other.version),
        world.folder / statement_path(release.name, release.version),
    )


def _revoke_after_theft(world: World) -> None:
    """Publish with the key of alice; the operator confirms it, and then revokes the key."""
    _steal_publisher_key(world)
    world.confirm()
    operator = world.signatures(OPERATOR)
    operator.change(operator.authority().revoke("alice"))


def _publish_after_revocation(world: World) -> None:
    _revoke_after_theft(world)
    thief = world.signatures("thief")
    held = thief.authority().load()
    key = next(file.public for file in thief.keyring.files())
    signatory = thief.signatory()
    _add_release(world)
    data = (world.folder / index_path("german")).read_bytes()
    signatory.sign_targets("publisher-alice", (key,), {"german": data}, None)
    assert not held.grants["alice"].keys
    world.confirm()


def _expire(world: World) -> None:
    """Keep confirming with the online key until the offline signatures have expired."""
    world.pass_time(400)
    _copy_key(world, OPERATOR, "online", "thief")
    with contextlib.suppress(SignatureError):  # the thief's own client refuses it too
        world.signatures("thief").sign()


def _sign_with_own_keys(world: World) -> None:
    """Sign the whole registry anew with other root keys."""
    shutil.rmtree(world.folder / "trust")
    _edit_config(world, signed=None)
    other = World(world.home / "other", world.interface, START)
    shutil.copytree(world.folder, other.folder)
    other.create()
    other.grant("alice", "german")
    other.grant("bob", "french")
    shutil.rmtree(world.folder)
    shutil.copytree(other.folder, world.folder)


def _strip(world: World) -> None:
    """Remove all signatures, as if the registry had never been signed."""
    shutil.rmtree(world.folder / "trust")
    shutil.rmtree(world.folder / "statements")
    _edit_config(world, signed=None)
    _add_release(world)


def _strip_mark(world: World) -> None:
    """Say that the registry is unsigned, and leave its signatures."""
    _edit_config(world, signed=None)
    _add_release(world)


def _cut_short(world: World) -> None:
    _newest(world.folder, "snapshot").unlink()


ATTACKS = (
    Attack(name="old index", run=_restore_old, refused_for="rollback"),
    Attack(name="frozen index", run=_freeze, refused_for="freeze"),
    Attack(name="mixed indexes", run=_mix, refused_for="mix-and-match", saw="early"),
    Attack(name="mixed snapshots", run=_mix_snapshots, refused_for="mix-and-match", saw="early"),
    Attack(name="replaced index", run=_replace_index, refused_for="wrong-content", saw="early"),
    Attack(name="replaced release", run=_replace_release, refused_for=None),
    Attack(name="replaced statement", run=_replace_statement, refused_for="wrong-signer"),
    Attack(name="added release", run=_add_release, refused_for=None),
    Attack(name="added release under another's name", run=_add_under_other_name, refused_for=None),
    Attack(name="un-yank", run=_unyank, refused_for=None),
    Attack(name="withheld advisory", run=_drop_advisory, refused_for=None),
    Attack(
        name="look-alike claim",
        run=_claim_lookalike,
        refused_for="wrong-publisher",
        asks_for="gennan",
    ),
    Attack(name="stolen online key: old list", run=_steal_online_key, refused_for="rollback"),
    Attack(
        name="stolen online key: new release",
        run=_steal_online_key_to_publish,
        refused_for="wrong-signer",
    ),
    Attack(name="stolen publisher key, not confirmed", run=_steal_publisher_key, refused_for=None),
    Attack(
        name="stolen publisher key: another's package",
        run=_steal_publisher_key_for_other,
        refused_for="wrong-signer",
    ),
    Attack(name="stolen publisher key, revoked", run=_revoke_after_theft, refused_for="revoked"),
    Attack(
        name="stolen publisher key, used after revocation",
        run=_publish_after_revocation,
        refused_for="revoked",
    ),
    Attack(name="expired metadata", run=_expire, refused_for="expired"),
    Attack(name="changed signer", run=_sign_with_own_keys, refused_for="wrong-signer"),
    Attack(name="signatures removed", run=_strip, refused_for="unsigned"),
    Attack(name="said to be unsigned", run=_strip_mark, refused_for=None),
    Attack(name="half-signed folder", run=_cut_short, refused_for="incomplete", saw=None),
)


def _both(world: World) -> tuple[Path, Path]:
    return world.saved("early"), world.saved("late")


def _newest(folder: Path, role: str) -> Path:
    """Return the newest file of a role."""
    found = (folder / "trust").glob(f"*.{role}.json")
    return max(found, key=lambda path: int(path.name.partition(".")[0]))


def _signed_digest(world: World, name: str) -> str:
    found = world.signatures("attacker").documents.find(name)
    assert found is not None
    return found.digest.removeprefix("sha256:")


def _overwrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _copy_key(world: World, owner: str, name: str, thief: str) -> None:
    folder = world.home / "keys" / thief
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(world.home / "keys" / owner / f"{name}.key", folder)


def _edit_config(world: World, *, signed: bool | None) -> None:
    path = world.folder / "config.json"
    fields = json.loads(path.read_bytes())
    fields.pop("signed", None)
    if signed is not None:
        fields["signed"] = signed
    path.write_text(json.dumps(fields))


def _sign_snapshot(world: World, thief: object, role: str, version: int, data: bytes) -> None:
    """Sign a snapshot and a timestamp that list one role as they please."""
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import Metadata, Snapshot, Timestamp

    from composable.packaging.trust.ledger import describe_file

    keys = world.signatures("thief").keyring
    signer: CryptoSigner = keys.unlock(keys.files()[0])
    snapshot = Metadata[Snapshot].from_file(str(_newest(world.folder, "snapshot")))
    snapshot.signed.version += 1
    snapshot.signed.meta[f"{role}.json"] = describe_file(version, data)
    snapshot.sign(signer)
    listed = snapshot.to_bytes()
    number = snapshot.signed.version
    (world.folder / "trust" / f"{number}.snapshot.json").write_bytes(listed)
    path = world.folder / "trust" / "timestamp.json"
    timestamp = Metadata[Timestamp].from_file(str(path))
    timestamp.signed.version = number
    timestamp.signed.snapshot_meta = describe_file(number, listed)
    timestamp.sign(signer)
    path.write_bytes(timestamp.to_bytes())


def meet_attack(world: World, place: Place, attack: Attack) -> str | None:
    """Let a client use the registry, then attack it, and let the client use it again.

    Args:
        world: A registry in its later state.
        place: Where the client reads it.
        attack: The attack.

    Returns:
        The rule that the client refused the registry for; None if it saw what it saw before.

    Raises:
        AssertionError: When it saw anything else.
    """
    before: dict[str, Any] | None = None
    if attack.saw is not None:
        world.restore(attack.saw)
        before = use(world.open("client", place.open(world)))
        world.restore("late")
    attack.run(world)
    client = world.open("client", place.open(world))
    try:
        after = use(client)
        if attack.asks_for is not None:
            client.versions(attack.asks_for)
    except SignatureError as error:
        assert error.hint and error.where
        return error.kind
    assert after == before, attack.name
    return None
