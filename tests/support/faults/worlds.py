"""Small worlds to hurt: a registry, a store and a project side by side, and what is right in them.

`inspect` looks at a world with as little of the library as it can: it hashes files itself, and any
byte that is not what its name, its index line or its lock promises is a `CorruptionError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from composable.errors import ComposableError
from composable.files.blobs import STORE_VARIABLE, blob_path
from composable.files.safetensors import write_tensors
from composable.interface import RouterInterface, TensorSpec, body_signature, scout_signature
from composable.interface.digest import digest_bytes
from composable.packaging.install.lock import Lock
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import BackbonePackage, Manifest, PackageFile
from composable.packaging.project.project import Project
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.storage import Document, Folder
from composable.packaging.versions.version import Version

_ANY_DIGEST: Final = "sha256:" + "0" * 64
_INTERFACE: Final[dict[str, Any]] = {
    "name": "tiny-bytes",
    "version": "1.2.0",
    "backbone": _ANY_DIGEST,
    "trunk": _ANY_DIGEST,
    "tokenizer": _ANY_DIGEST,
    "class_map": _ANY_DIGEST,
    "anchor": _ANY_DIGEST,
    "vocab_size": 256,
    "n_classes": 16,
    "d_model": 4,
    "d_ff": 8,
    "tap": 1,
    "slots": (1, 2),
    "scout_max_width": 8,
    "lora_max_rank": 4,
    "discount": 0.98,
    "top_k": 2,
    "backbone_prior": 0.5,
    "switch_rate": 0.01,
    "output_bounds": (1.0, 1.0),
}


class CorruptionError(Exception):
    """A world in a state that no order of whole commands leads to."""


class Served:
    """What a static host would serve of a folder: reading and nothing else, nothing mended.

    Args:
        root: The folder.
    """

    is_remote: Final = False

    def __init__(self, root: Path) -> None:
        self._folder = Folder(root)

    @property
    def location(self) -> str:
        """The folder."""
        return self._folder.location

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document, or None for none."""
        return self._folder.read(path, known)

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        return self._folder.stream(path, start)


def open_folder_registry(path: Path) -> Registry:
    """Return the registry in a folder, to publish to."""
    return open_for_publishing(path)


class Inputs:
    """What commands read and never write: a backbone's folder and experts that can be published.

    Args:
        root: A folder for them; it may be shared by many worlds.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.interface = RouterInterface(**_INTERFACE)
        self.backbone = root / "backbone"
        self.backbone.mkdir(parents=True, exist_ok=True)
        data = self.interface.to_json().encode()
        (self.backbone / "interface.json").write_bytes(data)
        file = PackageFile(name="interface.json", size=len(data), digest=digest_bytes(data))
        package = BackbonePackage(name="tiny-bytes", version=Version("1.0.0"), files=(file,))
        (self.backbone / "backbone.toml").write_text(package.to_toml())

    def expert(
        self, name: str, version: str, *, requires: Mapping[str, str] | None = None, size: int = 0
    ) -> Path:
        """Return the folder of an expert; the same arguments give the same bytes.

        Args:
            name: Its name.
            version: Its version.
            requires: Experts that it builds on.
            size: Bytes of its README, beyond the few that it has anyway.
        """
        variant = "-".join([*(requires or ()), str(size)])
        folder = self.root / "experts" / f"{name}-{version}-{variant}"
        if folder.exists():
            return folder
        scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
        scratch.mkdir(parents=True)
        seed = int.from_bytes(hashlib.sha256(folder.name.encode()).digest()[:4], "little")
        rng = np.random.default_rng(seed)
        for file, specs in (
            ("body.safetensors", body_signature(self.interface, "lora", 2)),
            ("scout.safetensors", scout_signature(self.interface, 8)),
        ):
            write_tensors(scratch / file, _draw(rng, specs))
        (scratch / "README.md").write_bytes(f"# {name} {version}\n".encode() + rng.bytes(size))
        ranges = "".join(f'{other} = "{text}"\n' for other, text in (requires or {}).items())
        (scratch / "expert.toml").write_text(
            f'[expert]\nname = "{name}"\nversion = "{version}"\nbackbone = "tiny-bytes"\n'
            '[interface]\nname = "tiny-bytes"\nrequires = "^1"\n'
            f'[body]\nkind = "lora"\nrank = 2\n[scout]\nwidth = 8\n[requires]\n{ranges}'
        )
        with contextlib.suppress(OSError):  # another process made the same one
            scratch.rename(folder)
        return folder


@dataclass(frozen=True, kw_only=True)
class World:
    """A folder with `registry/`, `store/` and a project in it.

    Args:
        root: The folder.
        inputs: What its commands read.
        name: Folder of the project in it.
    """

    root: Path
    inputs: Inputs
    name: str = "project"

    @property
    def project(self) -> Path:
        """The project's folder."""
        return self.root / self.name

    @property
    def store(self) -> Store:
        """The store."""
        return Store(self.root / "store")

    @property
    def registry(self) -> Registry:
        """The registry."""
        return open_folder_registry(self.root / "registry")

    def create_project(self) -> None:
        """Make the project, which asks for nothing yet."""
        Project.create(self.project, str(self.inputs.backbone), {"local": "../registry"})

    def run(self, *arguments: str) -> int:
        """Run a command of `composable` in this process, which must be a forked one."""
        from composable.cli.app import app

        os.chdir(self.project)
        os.environ[STORE_VARIABLE] = str(self.root / "store")
        try:
            app(list(arguments), prog_name="composable")
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        return 0

    def publish(self, name: str, version: str, **fields: Any) -> int:
        """Publish an expert in this process; errors are shown as the command line shows them."""
        folder = self.inputs.expert(name, version, **fields)
        return self._call(lambda: self.registry.publish(folder, interface=self.inputs.interface))

    def yank(self, name: str, version: str) -> int:
        """Yank a release in this process."""
        return self._call(lambda: self.registry.yank(name, Version(version)))

    def _call(self, function: Any) -> int:
        try:
            function()
        except ComposableError as error:
            print(f"error: {error}")
            return 1
        return 0

    def age(self, hours: float = 3) -> None:
        """Make everything look as if it had been written some hours ago."""
        then = time.time() - hours * 3600
        for path in (self.root, *self.root.rglob("*")):
            os.utime(path, (then, then), follow_symlinks=False)


@dataclass(frozen=True, kw_only=True)
class State:
    """What a world means, apart from how its files lie.

    Args:
        releases: Manifest digest and whether it is yanked, by name and version, as the index tells.
        recorded: The same, as the records tell, which may know more for a moment.
        claims: The files by which publishers agree: records, yanks and names that are taken.
        project: Text of the project file; None where there is none.
        lock: Text of the lock file; None where there is none.
        installed: Text of the lock in use; None before the first install.
        blobs: Digests in the store.
    """

    releases: Mapping[tuple[str, str], tuple[str, bool]]
    recorded: Mapping[tuple[str, str], tuple[str, bool]]
    claims: frozenset[str]
    project: str | None
    lock: str | None
    installed: str | None
    blobs: frozenset[str]


def inspect(world: World) -> State:
    """Return the state of a world, every byte of it checked.

    Raises:
        CorruptionError: When something is there that is not what it should be.
    """
    try:
        return State(
            **_inspect_registry(world),
            claims=_inspect_claims(world.root / "registry"),
            project=_read_text(world.project / "composable.toml"),
            lock=_inspect_lock(world.project / "composable.lock"),
            installed=_inspect_environment(world.project),
            blobs=_inspect_store(world),
        )
    except (ComposableError, OSError, ValueError) as error:
        raise CorruptionError(f"{type(error).__name__}: {error}") from error


def check_between(found: State, before: State, after: State) -> None:
    """Check that every part of a state is as before a command or as after it.

    Raises:
        CorruptionError: Naming the part that is neither.
    """
    for field in ("project", "lock", "installed"):
        value = getattr(found, field)
        if value not in (getattr(before, field), getattr(after, field)):
            raise CorruptionError(f"{field} is neither old nor new: {value!r}")
    for view in ("releases", "recorded"):
        here, old, new = (getattr(state, view) for state in (found, before, after))
        for key in here.keys() | old.keys() | new.keys():
            if here.get(key) not in (old.get(key), new.get(key)):
                raise CorruptionError(f"{' '.join(key)} is neither old nor new: {here.get(key)}")
    if not before.claims & after.claims <= found.claims <= before.claims | after.claims:
        raise CorruptionError(f"claims are neither old nor new: {sorted(found.claims)}")
    if lost := (before.blobs & after.blobs) - found.blobs:
        raise CorruptionError(f"the store lost {sorted(lost)}")


def check_equal(found: State, wanted: State, *, is_store_kept: bool = True) -> None:
    """Check that a state is the wanted one; blobs in the store may be more.

    Args:
        found: The state.
        wanted: What it should be.
        is_store_kept: Whether the store may lack nothing. It may, where what is in use does not
            need it: it is fetched again when it is asked for.

    Raises:
        CorruptionError: Naming a part that differs.
    """
    for field in ("project", "lock", "installed", "releases", "recorded", "claims"):
        if getattr(found, field) != getattr(wanted, field):
            raise CorruptionError(
                f"{field} is {getattr(found, field)!r}, expected {getattr(wanted, field)!r}"
            )
    if is_store_kept and (lost := wanted.blobs - found.blobs):
        raise CorruptionError(f"the store lost {sorted(lost)}")


def files_of(world: World) -> dict[str, int]:
    """Return the size of every file in a world by its path, locks left out."""
    return {
        str(path.relative_to(world.root)): path.lstat().st_size
        for path in sorted(world.root.rglob("*"))
        if not path.is_dir() and "lock" not in path.relative_to(world.root).parts[-2:]
    }


def has_digest(path: Path, digest: str, size: int | None = None) -> bool:
    """Say whether a file is there and is what was promised."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    return digest_bytes(data) == digest and size in (None, len(data))


def _draw(rng: np.random.Generator, specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _inspect_registry(
    world: World,
) -> dict[str, dict[tuple[str, str], tuple[str, bool]]]:
    """Return the releases that a static host would serve, and those that a publisher sees."""
    where = world.root / "registry"
    if not (where / "config.json").exists():
        return {"releases": {}, "recorded": {}}
    found: dict[str, dict[tuple[str, str], tuple[str, bool]]] = {}
    for view, registry in (
        ("releases", Registry(Served(where))),
        ("recorded", open_folder_registry(where)),
    ):
        names = {path.stem for path in where.glob("index/*/*.jsonl")} | set(registry.names())
        names |= {path.name for path in where.glob("records/*")}
        found[view] = {}
        for name in sorted(names):
            for release in registry.versions(name):
                wanted = [(release.manifest, None), *((f.digest, f.size) for f in release.files)]
                for digest, size in wanted:
                    if not has_digest(where / blob_path(digest), digest, size):
                        raise CorruptionError(
                            f"{name} {release.version} lists {digest}, which is not"
                        )
                found[view][name, str(release.version)] = (release.manifest, release.is_yanked)
    return found


def _inspect_claims(registry: Path) -> frozenset[str]:
    paths = (*registry.glob("records/*/*"), *registry.glob("names/*"))
    return frozenset(
        str(path.relative_to(registry)) for path in paths if not path.name.startswith(".")
    )


def _inspect_lock(path: Path) -> str | None:
    text = _read_text(path)
    if text is not None and Lock.loads(text).to_toml() != text:
        raise CorruptionError("the lock file is not what its lock would write")
    return text


def _inspect_environment(project: Path) -> str | None:
    current = Project.read(project).environment.current if project.exists() else None
    if current is None:
        return None
    lock = current.lock
    for expert in lock.experts:
        folder = current.expert_path(expert.name)
        for name, digest in expert.digests.items():
            if not has_digest(folder / name, digest):
                raise CorruptionError(f"{folder / name} is in use and damaged")
        if Manifest.read(folder).version != expert.version:
            raise CorruptionError(f"{folder} is in use with another manifest")
    return lock.to_toml()


def _inspect_store(world: World) -> frozenset[str]:
    digests = world.store.digests()
    for digest in digests:
        if not has_digest(world.store.path(digest), digest):
            raise CorruptionError(f"{digest} is in the store and damaged")
    return frozenset(digests)
