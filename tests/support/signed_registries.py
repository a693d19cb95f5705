"""Signed registries: an operator, two publishers and clients, each a machine with its own keys."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composable.errors import SignatureError
from composable.interface import RouterInterface, body_signature, scout_signature
from composable.packaging import (
    Registry,
    Version,
    open_for_publishing,
    open_registry,
    write_tensors,
)
from composable.packaging.install.mirror import mirror_registry
from composable.packaging.registry.advisories import Advisory
from composable.packaging.registry.bucket import BucketStorage
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.registry.signed import Signatures
from composable.packaging.registry.storage import Folder, Storage
from composable.packaging.trust.keys import KeyFile, create_key
from composable.packaging.versions.constraint import Constraint

START = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC)
OPERATOR = "operator"


@dataclass
class World:
    """A signed registry in a folder, and the machines that use it.

    Args:
        home: A folder for all of it.
        interface: The router interface of its experts.
        now: The time on every machine.
    """

    home: Path
    interface: RouterInterface
    now: datetime.datetime = START
    offsets: dict[str, datetime.timedelta] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the registry."""
        return self.home / "registry"

    def pass_time(self, days: float) -> None:
        """Move all clocks."""
        self.now += datetime.timedelta(days=days)

    def settings(self, machine: str, keys: str | None = None, **changes: Any) -> SignatureSettings:
        """Return how a machine treats signatures."""
        fields: dict[str, Any] = {
            "state": self.home / "machines" / machine,
            "keys": self.home / "keys" / (keys or machine),
            "now": lambda: self.now + self.offsets.get(machine, datetime.timedelta()),
        }
        return SignatureSettings(**{**fields, **changes})

    def open(self, machine: str, storage: Storage | None = None, **changes: Any) -> Registry:
        """Open the registry on a machine."""
        storage = storage or Folder(self.folder)
        return Registry(storage, signatures=self.settings(machine, **changes))

    def signatures(self, machine: str, **changes: Any) -> Signatures:
        """Return the signatures of the registry as a machine sees them."""
        return self.open(machine, **changes).open_signatures()

    def make_key(self, machine: str, name: str | None = None) -> KeyFile:
        """Create a key on a machine."""
        return create_key(self.home / "keys" / machine, name or machine, None)

    def create(self) -> None:
        """Create the registry, signed."""
        registry = self.open(OPERATOR)
        registry.create()
        registry.open_signatures().create(None)

    def grant(self, publisher: str, *names: str, key: KeyFile | None = None) -> None:
        """Let a publisher publish names; it gets a key unless one is given."""
        key = key or self.make_key(publisher)
        signatures = self.signatures(OPERATOR)
        signatures.change(signatures.authority().grant(publisher, names, [key.public]))

    def confirm(self, **changes: Any) -> None:
        """Let the operator confirm the current state."""
        self.signatures(OPERATOR, **changes).sign()

    def make_expert(self, name: str, version: str, seed: int = 0) -> Path:
        """Return the folder of an expert; another seed gives other parameters."""
        folder = self.home / "experts" / f"{name}-{version}-{seed}"
        if not folder.exists():
            folder.mkdir(parents=True)
            rng = np.random.default_rng(seed)
            for part, specs in (
                ("body", body_signature(self.interface, "lora", 2)),
                ("scout", scout_signature(self.interface, 8)),
            ):
                tensors = {
                    key: rng.normal(size=spec.shape).astype(np.float32)
                    for key, spec in specs.items()
                }
                write_tensors(folder / f"{part}.safetensors", tensors)
            (folder / "expert.toml").write_text(
                f'[expert]\nname = "{name}"\nversion = "{version}"\nbackbone = "tiny-bytes"\n'
                'license = "MIT"\n[interface]\nname = "tiny-bytes"\nrequires = "^1"\n'
                '[body]\nkind = "lora"\nrank = 2\n[scout]\nwidth = 8\n[requires]\n'
            )
        return folder

    def publish(
        self, publisher: str, name: str, version: str, seed: int = 0, **changes: Any
    ) -> Registry:
        """Publish a release from the machine of a publisher."""
        registry = self.open(publisher, **changes)
        registry.publish(self.make_expert(name, version, seed), interface=self.interface)
        return registry

    def copy(self, home: Path) -> World:
        """Return a copy of all of it in another folder."""
        shutil.copytree(self.home, home)
        return World(home, self.interface, self.now)

    def save(self, name: str) -> None:
        """Keep a copy of the registry as it is now."""
        shutil.copytree(self.folder, self.home / "saved" / name)

    def saved(self, name: str) -> Path:
        """Return a copy that was kept."""
        return self.home / "saved" / name

    def restore(self, name: str) -> None:
        """Put a copy that was kept in the place of the registry."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.saved(name), self.folder)


def build_world(home: Path, interface: RouterInterface) -> World:
    """Return a registry in two states, `early` and `late`, of which it is in the later one.

    Early: alice has published german 1.0.0, bob french 1.0.0. Late: german 1.1.0 too, 1.0.0 is
    yanked, and there is an advisory on it.
    """
    world = World(home, interface)
    world.create()
    world.grant("alice", "german")
    world.grant("bob", "french")
    world.publish("alice", "german", "1.0.0")
    world.publish("bob", "french", "1.0.0")
    world.confirm()
    world.save("early")
    world.publish("alice", "german", "1.1.0", seed=1)
    world.open("alice").yank("german", Version("1.0.0"))
    world.confirm()
    world.open(OPERATOR).advise(make_advisory())
    world.save("late")
    return world


def make_advisory(**changes: Any) -> Advisory:
    """Return an advisory on german 1.0.0, or what is like it but for changes."""
    advisory = Advisory(
        id="german-1",
        name="german",
        kind="recalled",
        affected=(Constraint("<1.1"),),
        fixed=(Version("1.1.0"),),
        text="Trained on its own held-out text.",
        published="2026-11-29T12:00:00Z",
    )
    if "name" in changes:
        changes = {"fixed": (), "affected": (Constraint("*"),), **changes}
    return dataclasses.replace(advisory, **changes)


def use(registry: Registry) -> dict[str, Any]:
    """Read everything that a client uses, as a project does; return what it saw."""
    seen: dict[str, Any] = {"names": registry.names()}
    for name in ("german", "french"):
        releases = registry.versions(name)
        for release in releases:
            registry.verify_release(release)
        seen[name] = [(str(release.version), release.is_yanked) for release in releases]
        seen[f"{name} content"] = [release.manifest for release in releases]
    seen["advisories"] = [advisory.id for advisory in registry.advisories() or ()]
    return seen


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP; yield its URL."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Place:
    """Where clients read the registry of a world: its folder, a web server, a bucket or a server.

    Args:
        kind: `folder`, `http`, `bucket` or `server`.
        url: The URL of the web server, or of the bucket.
        fill: Makes the database of a server like a folder.
    """

    def __init__(
        self,
        kind: str,
        url: str | None = None,
        fill: Callable[[Mapping[str, bytes]], None] | None = None,
    ) -> None:
        self.kind = kind
        self._url = url
        self._fill = fill
        self._uploaded: dict[str, bytes] = {}

    def open(self, world: World) -> Storage:
        """Return the storage with the current state of the registry."""
        if self.kind == "folder":
            return Folder(world.folder)
        assert self._url is not None
        if self._fill is not None:
            self._fill(_read_tree(world.folder))
        if self.kind in ("http", "server"):
            return WebStorage(self._url)
        self._upload(_read_tree(world.folder))
        return BucketStorage(self._url)

    def _upload(self, tree: Mapping[str, bytes]) -> None:
        """Make the bucket like a folder."""
        import obstore
        from obstore.store import from_url

        store = from_url(str(self._url))
        for path, data in tree.items():
            if self._uploaded.get(path) != data:
                obstore.put(store, path, data)
        for path in self._uploaded.keys() - tree.keys():
            obstore.delete(store, path)
        self._uploaded = dict(tree)


def _read_tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "locks" not in path.parts
    }


def check_signed(url: str, home: Path, interface: RouterInterface) -> None:
    """Sign an empty registry at a location, publish to it, verify it there, and mirror it.

    Args:
        url: Where it is.
        home: A folder for keys and experts.
        interface: The router interface.
    """
    world = World(home, interface)
    keys = {name: home / "keys" / name for name in (OPERATOR, "alice", "bob")}

    def confirm() -> None:
        open_for_publishing(url, keys=keys[OPERATOR]).open_signatures().sign()

    registry = open_for_publishing(url, keys=keys[OPERATOR])
    registry.create()
    signatures = registry.open_signatures()
    signatures.create(None)
    public = world.make_key("alice").public
    assert signatures.change(signatures.authority().grant("alice", ["german"], [public])).is_visible

    alice = open_for_publishing(url, keys=keys["alice"])
    alice.publish(world.make_expert("german", "1.0.0"), interface=interface)
    assert alice.awaits_operator and not open_registry(url).names()
    confirm()
    (release,) = open_registry(url).versions("german")
    signer = open_registry(url).verify_release(release)
    assert signer is not None and signer.publisher == "alice"
    with pytest.raises(SignatureError, match="no publisher may publish 'french'"):
        open_for_publishing(url, keys=keys["bob"]).publish(
            world.make_expert("french", "1.0.0"), interface=interface
        )

    open_for_publishing(url, keys=keys["alice"]).yank("german", release.version)
    assert not open_registry(url).versions("german")[0].is_yanked
    confirm()
    assert open_registry(url).versions("german")[0].is_yanked

    mirror_registry(open_registry(url), open_for_publishing(home / "copy"))
    copy = open_registry(home / "copy")
    assert copy.verify_release(copy.versions("german")[0]) == signer


def check_signed_mirror(url: str, home: Path, interface: RouterInterface) -> None:
    """Mirror a signed folder to a location, twice, and verify each state there."""
    world = build_world(home / "world", interface)
    for state in ("early", "late"):
        world.restore(state)
        mirror_registry(world.open("carrier"), open_for_publishing(url))
        storage = open_registry(url)._files
        assert use(world.open("client", storage)) == use(world.open("other-client"))
