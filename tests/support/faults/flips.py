"""One bit flipped somewhere on a disk: noticed before anything wrong is in use?

A flip is *noticed* when the command fails with an error of ours and what was in use stays in use.
It is *harmless* when the command succeeds and everything in use, bytes and lock, is what it would
have been without the flip: a letter of a description, a comment, a line that nobody read. Anything
else is *missed*. For files that are already stored or installed, noticing is up to `verify`, which
must name the file, and the next `sync` must bring it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from composable.errors import ComposableError
from composable.packaging.install.lock import Lock
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import CHUNK_BYTES
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sync import sync_project
from composable.packaging.versions.constraint import Requirement
from tests.support.faults.processes import run_forked
from tests.support.faults.scenarios import Scenario, cli, publish
from tests.support.faults.worlds import CorruptionError, Inputs, State, World, inspect

NOTICED, HARMLESS, MISSED = "noticed", "harmless", "missed"
_BATCH = 100
_WORLD = Scenario(
    name="",
    before=(
        publish("german", "1.0.0"),
        publish("french", "1.0.0", "german"),
        publish("german", "1.1.0", size=30_000),
        publish("french", "1.1.0", "german"),
        cli("install", "french", "--quiet"),
    ),
    steps=(),
)
_LARGE_WORLD = Scenario(
    name="",
    before=(
        publish("german", "1.0.0", size=CHUNK_BYTES + CHUNK_BYTES // 2),
        cli("install", "german", "--quiet"),
    ),
    steps=(),
)


@dataclass(kw_only=True)
class Flipping:
    """What came of flipping bits in files of one kind.

    Args:
        target: What kind of file.
        flips: How many bits.
        noticed: Flips that ended in an error of ours, or that `verify` named.
        harmless: Flips without any effect on what is in use.
        failures: Flips that were missed, with where.
    """

    target: str
    flips: int = 0
    noticed: int = 0
    harmless: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file to flip bits in.

    Args:
        name: What it is called in reports.
        files: Finds the files in a world.
        attempt: Uses the world after the flip; returns one of the three outcomes.
        scenario: Makes the world.
    """

    name: str
    files: Callable[[World], Sequence[Path]]
    attempt: Callable[[World, State, Path], str]
    scenario: Scenario = _WORLD


def flip_everywhere(
    target: Target, inputs: Inputs, scratch: Path, *, flips: int, seed: int = 0
) -> Flipping:
    """Flip random bits of one kind of file, one at a time.

    Args:
        target: The kind of file.
        inputs: What commands read.
        scratch: An empty folder to work in.
        flips: How many.
        seed: Of the choice of bits.
    """
    world = target.scenario.prepare(scratch / "world", inputs)
    clean = inspect(world)
    flipping = Flipping(target=target.name)
    for start in range(0, flips, _BATCH):
        count = min(_BATCH, flips - start)
        rng = random.Random(f"{seed} {target.name} {start}")
        ending = run_forked(partial(_flip_batch, target, world, clean, count, rng))
        if ending.code != 0:
            flipping.failures.append(str(ending))
            continue
        outcomes = json.loads(ending.output.rpartition("\n\0")[2])
        counts = Counter(outcome for outcome, _ in outcomes)
        flipping.flips += count
        flipping.noticed += counts[NOTICED]
        flipping.harmless += counts[HARMLESS]
        flipping.failures += [where for outcome, where in outcomes if outcome == MISSED]
    return flipping


def _flip_batch(target: Target, world: World, clean: State, count: int, rng: random.Random) -> int:
    os.chdir(world.root)
    outcomes = []
    for _ in range(count):
        path = rng.choice(target.files(world))
        position = rng.randrange(path.stat().st_size * 8)
        with flipped(path, position):
            try:
                outcome = target.attempt(world, clean, path)
            except CorruptionError as error:
                outcome = MISSED
                print(f"{path}: {error}")
        outcomes.append((outcome, f"{path.relative_to(world.root)}, bit {position}"))
    print(f"\n\0{json.dumps(outcomes)}")
    return 0


@contextlib.contextmanager
def flipped(path: Path, position: int) -> Iterator[None]:
    """Flip one bit of a file, in place and for all its hard links, for the block."""
    path.chmod(0o644)
    whole = path.read_bytes()
    bad = bytearray(whole)
    bad[position // 8] ^= 1 << position % 8
    path.write_bytes(bad)
    try:
        yield
    finally:
        if path.exists():
            path.chmod(0o644)
        path.write_bytes(whole)


def _install_afresh(world: World, clean: State, path: Path) -> str:
    """Lock and install in a new project with an empty store."""
    return _install(world, clean, needs_lock=True)


def _install_locked(world: World, clean: State, path: Path) -> str:
    """Install what the lock file says, in a new project with an empty store."""
    return _install(world, clean, needs_lock=False)


def _publish_more(world: World, clean: State, path: Path) -> str:
    """Publish another version, which derives the index from all records."""
    copy = World(root=world.root / "copy", inputs=world.inputs)
    shutil.rmtree(copy.root, ignore_errors=True)
    shutil.copytree(world.root / "registry", copy.root / "registry")
    name = path.parent.name
    try:
        folder = world.inputs.expert(name, "1.2.0")
        copy.registry.publish(folder, interface=world.inputs.interface)
    except ComposableError:
        return NOTICED
    found = inspect(copy).releases
    is_there = all(found.get(key) == value for key, value in clean.releases.items())
    return HARMLESS if is_there else MISSED


def _install(world: World, clean: State, *, needs_lock: bool) -> str:
    fresh = World(root=world.root, inputs=world.inputs, name="fresh")
    store = world.root / "fresh-store"
    for folder in (fresh.project, store):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.create_project()
    project = Project.read(fresh.project).add(Requirement.parse("french"))
    try:
        if needs_lock:
            lock = lock_project(project, world.inputs.interface)
        else:
            shutil.copy(world.project / "composable.lock", fresh.project)
            lock = Lock.read(fresh.project)
        sync_project(project, lock, Store(store), interface=world.inputs.interface)
    except ComposableError:
        if project.environment.current is not None:
            raise CorruptionError("an error, but something is in use") from None
        return NOTICED
    found, wanted = (
        {
            str(path.relative_to(_generation(place))): path.read_bytes()
            for path in _generation(place).glob("experts/*/*")
        }
        for place in (fresh, world)
    )
    before = Lock.loads(clean.installed or "")
    same_lock = lock.digests() == before.digests() and lock.versions == before.versions
    return HARMLESS if found == wanted and same_lock else MISSED


def _verify_and_sync(world: World, clean: State, path: Path) -> str:
    """Have `verify` find it and `sync` bring it again."""
    project = Project.read(world.project)
    named = {blob.digest for blob in world.store.verify()}
    named |= {str(file) for file in project.environment.verify()}
    if not named:
        return MISSED
    sync_project(project, None, world.store, interface=world.inputs.interface)
    state = inspect(world)
    return NOTICED if (state.installed, state.blobs) == (clean.installed, clean.blobs) else MISSED


def _install_from_store(world: World, clean: State, path: Path) -> str:
    """Install in a new project from the damaged store; the registry has the file as it was."""
    fresh = World(root=world.root, inputs=world.inputs, name="fresh")
    shutil.rmtree(fresh.project, ignore_errors=True)
    fresh.create_project()
    project = Project.read(fresh.project).add(Requirement.parse("french"))
    lock = lock_project(project, world.inputs.interface)
    sync_project(project, lock, world.store, interface=world.inputs.interface)
    if inspect(fresh).installed != clean.installed:
        return MISSED
    return NOTICED if (world.root / "store" / "quarantine" / path.name).exists() else HARMLESS


def _resume(world: World, clean: State, path: Path) -> str:
    """Go on with a download of which a damaged part is there."""
    for folder in (world.root / "store" / "blobs", world.project / ".composable"):
        shutil.rmtree(folder, ignore_errors=True)
    project = Project.read(world.project)
    sync_project(project, None, world.store, interface=world.inputs.interface)
    if (inspect(world).installed, path.exists()) != (clean.installed, False):
        return MISSED
    return NOTICED


def _partial(world: World) -> list[Path]:
    """Return what has arrived of a large file, which is put there if it is not."""
    blobs = (world.root / "registry" / "blobs").glob("*/*")
    large = max(blobs, key=lambda path: path.stat().st_size)
    path = world.root / "store" / "partial" / f"{large.name}-1-0"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(large.read_bytes()[: CHUNK_BYTES + CHUNK_BYTES // 4])
    return [path]


def _generation(world: World) -> Path:
    current = Project.read(world.project).environment.current
    assert current is not None
    return current.path


def _blobs(world: World, wanted: Callable[[bytes], bool]) -> list[Path]:
    blobs = sorted((world.root / "registry" / "blobs").glob("*/*"))
    in_use = Lock.loads((world.project / "composable.lock").read_text()).digests()
    return [
        path for path in blobs if f"sha256:{path.name}" in in_use and wanted(path.read_bytes()[:9])
    ]


REGISTRY_FILES = Target(
    name="a file in the registry",
    files=lambda world: _blobs(world, lambda head: not head.startswith(b"[expert]")),
    attempt=_install_afresh,
)
REGISTRY_MANIFESTS = Target(
    name="a manifest in the registry",
    files=lambda world: _blobs(world, lambda head: head.startswith(b"[expert]")),
    attempt=_install_afresh,
)
INDEX_LINES = Target(
    name="an index line",
    files=lambda world: sorted((world.root / "registry" / "index").glob("*/*")),
    attempt=_install_afresh,
)
RECORDS = Target(
    name="a record of the registry",
    files=lambda world: sorted((world.root / "registry" / "records").glob("*/*.json")),
    attempt=_publish_more,
)
LOCKS = Target(
    name="a lock file",
    files=lambda world: [world.project / "composable.lock"],
    attempt=_install_locked,
)
STORED = Target(
    name="a file in the store",
    files=lambda world: [world.store.path(digest) for digest in world.store.digests()],
    attempt=_verify_and_sync,
)
STORED_ELSEWHERE = Target(
    name="a file in the store, then another project",
    files=STORED.files,
    attempt=_install_from_store,
)
INSTALLED = Target(
    name="an installed file",
    files=lambda world: sorted(_generation(world).glob("experts/*/*")),
    attempt=_verify_and_sync,
)
PARTIAL = Target(
    name="what has arrived of a download",
    files=_partial,
    attempt=_resume,
    scenario=_LARGE_WORLD,
)
ALL = (
    REGISTRY_FILES,
    REGISTRY_MANIFESTS,
    INDEX_LINES,
    RECORDS,
    LOCKS,
    STORED,
    STORED_ELSEWHERE,
    INSTALLED,
    PARTIAL,
)
