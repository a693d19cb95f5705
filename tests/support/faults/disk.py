"""A disk that keeps only what it was made to keep.

`Snapshot` is a tree of files in memory, hard links included. `History` is a snapshot and the
operations that followed; `History.image` is what a power cut after some of them may leave:

- A name (created, renamed, linked or removed) is durable once the directory that holds it was
  synced afterwards; a directory that is not durable in its own parent is lost with all in it.
- Data, sizes and modes of a file are durable once that file was synced afterwards.
- A rename within the disk is one step: both names change or none does. It is durable once either
  directory was synced.
- What is not durable is at the mercy of an `Omen`: each step by itself survives or does not, and
  the data of a file that has a name may be there, missing, cut or zeros, whatever its name says.

This is weaker than what ext4, XFS, btrfs and APFS keep, which commit names in order, and it knows
nothing of disks that lie about fsync.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.support.faults.tracer import Kind, Operation

ROOT: Final = 0


@dataclass(kw_only=True)
class Node:
    """A file or a directory.

    Args:
        mode: Its permissions.
        data: Its bytes; None for a directory.
        entries: What a directory holds, as numbers of nodes by name.
    """

    mode: int
    data: bytes | None = None
    entries: dict[str, int] = dataclasses.field(default_factory=dict)


class Snapshot:
    """A tree of files in memory; node 0 is its root."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {ROOT: Node(mode=0o755)}

    @classmethod
    def read(cls, root: Path) -> tuple[Self, dict[int, int]]:
        """Read a folder; return it and the number of each node by that of its inode."""
        snapshot = cls()
        numbers = {root.stat().st_ino: ROOT}

        def visit(folder: Path, node: Node) -> None:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                status = entry.stat(follow_symlinks=False)
                number = numbers.setdefault(status.st_ino, len(numbers))
                node.entries[entry.name] = number
                mode = stat.S_IMODE(status.st_mode)
                if entry.is_dir(follow_symlinks=False):
                    snapshot.nodes[number] = Node(mode=mode)
                    visit(Path(entry.path), snapshot.nodes[number])
                elif number not in snapshot.nodes:
                    data = Path(entry.path).read_bytes()
                    snapshot.nodes[number] = Node(mode=mode, data=data)

        visit(root, snapshot.nodes[ROOT])
        return snapshot, numbers

    def write(self, root: Path) -> None:
        """Write the tree as a new folder, or into an empty one."""
        first: dict[int, Path] = {}

        def visit(path: Path, node: Node) -> None:
            path.mkdir(exist_ok=path == root)
            for name, number in node.entries.items():
                child = self.nodes[number]
                if child.data is None:
                    visit(path / name, child)
                elif number in first:
                    os.link(first[number], path / name)
                else:
                    first[number] = path / name
                    descriptor = os.open(path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    os.write(descriptor, child.data)
                    os.fchmod(descriptor, child.mode)
                    os.close(descriptor)

        visit(root, self.nodes[ROOT])

    def digest(self) -> str:
        """Return a digest of names, links and bytes, so that equal images are looked at once."""
        state = hashlib.sha256()
        seen: dict[int, int] = {}

        def visit(node: Node) -> None:
            for name, number in sorted(node.entries.items()):
                child = self.nodes[number]
                kind = "directory" if child.data is None else f"file {len(child.data)}"
                state.update(f"{name}\0{kind} {seen.setdefault(number, len(seen))}\0".encode())
                if child.data is None:
                    visit(child)
                    state.update(b"/")
                else:
                    state.update(child.data)

        visit(self.nodes[ROOT])
        return state.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A name that is given to a node, or with None taken away."""

    folder: int
    name: str
    node: int | None


@dataclass(frozen=True)
class Data:
    """Bytes that are written to a file."""

    node: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    """A new size of a file."""

    node: int
    size: int


@dataclass(frozen=True)
class Mode:
    """New permissions of a file or directory."""

    node: int
    mode: int


Effect = Entry | Data | Resize | Mode


@dataclass(kw_only=True)
class DiskChange:
    """What one operation does, all or nothing but for data.

    Args:
        at: Number of the operation.
        effects: What it does.
        durable_at: Number of the operation that made it durable; None while none has.
    """

    at: int
    effects: tuple[Effect, ...]
    durable_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class Omen:
    """What becomes of changes that were not made durable.

    Args:
        name: What it is called in reports.
        survives: Whether a change of names, sizes or modes survives.
        spoil: What is left of data that was not synced: None for nothing, not even its length.
    """

    name: str
    survives: Callable[[DiskChange], bool]
    spoil: Callable[[bytes], bytes | None]


def _drop(data: bytes) -> None:
    return None


STRICT: Final = Omen(name="nothing unsynced survives", survives=lambda _: False, spoil=_drop)
NAMES: Final = Omen(name="names survive, data does not", survives=lambda _: True, spoil=_drop)
ZEROS: Final = Omen(
    name="names and lengths survive, data is zeros",
    survives=lambda _: True,
    spoil=lambda data: bytes(len(data)),
)
CUT: Final = Omen(
    name="names and half of each write survive",
    survives=lambda _: True,
    spoil=lambda data: data[: len(data) // 2],
)
WHOLE: Final = Omen(name="all survives", survives=lambda _: True, spoil=lambda data: data)


def draw_omen(seed: int) -> Omen:
    """Return an omen that settles every change by itself, by chance."""
    rng = random.Random(seed)
    share = rng.choice([0.2, 0.5, 0.8])

    def spoil(data: bytes) -> bytes | None:
        whole, cut = data, data[: rng.randrange(len(data) + 1)]
        return rng.choice([whole, whole, cut, bytes(len(data)), None])

    return Omen(name=f"chance {seed}", survives=lambda _: rng.random() < share, spoil=spoil)


class History:
    """A disk, and what was done to it since.

    Args:
        before: The disk at the start, all of it durable.
        numbers: Its nodes by number of inode, as `Snapshot.read` returns them.
        operations: What a traced process did.
    """

    def __init__(
        self, before: Snapshot, numbers: dict[int, int], operations: Iterable[Operation]
    ) -> None:
        self.before = before
        self.changes: list[DiskChange] = []
        self.acknowledged: list[tuple[int, str]] = []
        self._node_of = dict(numbers)
        self._live = {number: dict(node.entries) for number, node in before.nodes.items()}
        self._is_folder = {number: node.data is None for number, node in before.nodes.items()}
        self._modes: dict[int, tuple[bool, int]] = {}
        self.n_operations = 0
        for operation in operations:
            if operation.kind is Kind.ACKNOWLEDGE:
                self.acknowledged.append((self.n_operations, operation.path))
                continue
            self.n_operations += 1
            if operation.error == 0:
                self._take(operation, self.n_operations)

    def acknowledged_at(self, cut: int) -> list[str]:
        """Return what had been acknowledged when the power was cut after `cut` operations."""
        return [text for at, text in self.acknowledged if at <= cut]

    def image(self, cut: int, omen: Omen) -> Snapshot:
        """Return what may be on the disk when the power is cut after `cut` operations."""
        image = Snapshot()
        image.nodes = {
            number: Node(mode=node.mode, data=node.data, entries=dict(node.entries))
            for number, node in self.before.nodes.items()
        }
        for number, (is_folder, mode) in self._modes.items():
            image.nodes[number] = Node(mode=mode, data=None if is_folder else b"")
        for change in self.changes:
            if change.at > cut:
                break
            is_durable = change.durable_at is not None and change.durable_at <= cut
            for effect in change.effects:
                if isinstance(effect, Data):
                    data = effect.data if is_durable else omen.spoil(effect.data)
                    if data is not None:
                        _write(image.nodes[effect.node], effect.offset, data)
            if is_durable or omen.survives(change):
                for effect in change.effects:
                    _apply(image, effect)
        return image

    def _take(self, operation: Operation, at: int) -> None:
        """Note the effects of an operation that succeeded, and what it makes durable."""
        kind = operation.kind
        if kind is Kind.SYNC:
            node = self._node_of[operation.inode]
            for change in self.changes:
                if change.durable_at is None and _touches(change, node):
                    change.durable_at = at
            return
        effects: list[Effect] = []
        if kind in (Kind.CREATE, Kind.MKDIR):
            number = max(self._live) + 1
            self._live[number] = {}
            self._is_folder[number] = kind is Kind.MKDIR
            self._modes[number] = (kind is Kind.MKDIR, operation.size)
            self._node_of[operation.inode] = number
            effects = [Entry(*self._place(operation.path), number)]
        elif kind is Kind.WRITE:
            node = self._node_of[operation.inode]
            effects = [Data(node, operation.offset, operation.data)]
        elif kind is Kind.TRUNCATE:
            effects = [Resize(self._node_of[operation.inode], operation.size)]
        elif kind is Kind.CHMOD:
            effects = [Mode(self._node_of[operation.inode], operation.size)]
        elif kind in (Kind.UNLINK, Kind.RMDIR):
            effects = [Entry(*self._place(operation.path), None)]
        elif kind in (Kind.RENAME, Kind.LINK):
            source = self._place(operation.path)
            node = self._live[source[0]][source[1]]
            target = self._place(operation.target)
            if kind is Kind.RENAME and self._live[target[0]].get(target[1]) == node:
                return  # two names of one file: POSIX says that nothing happens
            effects = [Entry(*source, None)] if kind is Kind.RENAME else []
            effects.append(Entry(*target, node))
        if not effects:
            return
        self.changes.append(DiskChange(at=at, effects=tuple(effects)))
        for effect in effects:
            if isinstance(effect, Entry):
                if effect.node is None:
                    del self._live[effect.folder][effect.name]
                else:
                    self._live[effect.folder][effect.name] = effect.node

    def _place(self, path: str) -> tuple[int, str]:
        """Return the node of a path's folder, as the running process sees it, and its name."""
        *folders, name = path.split("/")
        number = ROOT
        for folder in folders:
            number = self._live[number][folder]
        return number, name


def _touches(change: DiskChange, node: int) -> bool:
    return any(
        (effect.folder if isinstance(effect, Entry) else effect.node) == node
        for effect in change.effects
    )


def _apply(image: Snapshot, effect: Effect) -> None:
    if isinstance(effect, Entry):
        entries = image.nodes[effect.folder].entries
        if effect.node is None:
            entries.pop(effect.name, None)
        else:
            entries[effect.name] = effect.node
    elif isinstance(effect, Resize):
        node = image.nodes[effect.node]
        node.data = (node.data or b"")[: effect.size].ljust(effect.size, b"\0")
    elif isinstance(effect, Mode):
        image.nodes[effect.node].mode = effect.mode


def _write(node: Node, offset: int, data: bytes) -> None:
    old = (node.data or b"").ljust(offset, b"\0")
    node.data = old[:offset] + data + old[offset + len(data) :]
