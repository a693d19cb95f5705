"""Environments: the installed experts of a project, as numbered generations.

    .composable/current                           the number of the current generation
    .composable/generations/7/composable.lock     the lock that it was installed from
    .composable/generations/7/previous            the number of the generation before it
    .composable/generations/7/snapshot.json       the state of its files, see `snapshot.py`
    .composable/generations/7/experts/<name>/     the expert's files, placed from the store

A generation is built under a temporary name, synced to disk and renamed; then `current` is
replaced. If the process is killed at any point, the old generation stays current, and the next
install removes the leftovers. A few older generations are kept for rollback.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from composable.errors import IntegrityError, LockError, MissingBlobError, PackagingError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.files.cloning import place_file
from composable.files.reading import read_bytes
from composable.packaging.install.agreement import check_manifest
from composable.packaging.install.lock import LOCK_FILE, Lock, LockedExpert
from composable.packaging.install.snapshot import Inspection, inspect_files, record_files
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.progress import ByteProgress

FOLDER: Final = ".composable"
PREVIOUS_FILE: Final = "previous"
_GENERATION: Final = re.compile("[1-9][0-9]{0,17}")
KEPT_GENERATIONS: Final = 5
# Another process may be about to make a younger generation the current one.
_SETTLED_SECONDS: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One state of an environment.

    Args:
        number: Its number; later generations have higher ones.
        path: Its directory.
    """

    number: int
    path: Path

    @functools.cached_property
    def lock(self) -> Lock:
        """The lock that it was installed from.

        Raises:
            LockError: When it is damaged.
        """
        try:
            return Lock.read(self.path / LOCK_FILE)
        except LockError as error:
            where = f"{self.path}: {error.where}" if error.where else str(self.path)
            raise LockError(error.message, where=where, hint="run `composable sync`") from error

    def expert_path(self, name: str) -> Path:
        """Return the directory of an installed expert; of an editable one, its own folder.

        Raises:
            PackagingError: When it is not installed.
        """
        path = self.path / "experts" / name
        if name in self.lock and self.lock[name].is_editable:
            path = self._folder_of(self.lock[name])
        if not (path / EXPERT_FILE).is_file():
            raise PackagingError(f"{name!r} is not installed", hint=_hint_to_install(name))
        return path

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of an installed expert."""
        return Manifest.read(self.expert_path(name))

    def holds(self, text: str, lock: Lock) -> bool:
        """Return whether installing `lock`, whose text is `text`, would give this generation."""
        try:
            if read_bytes(self.path / LOCK_FILE) != text.encode():
                return False
        except FileNotFoundError:
            return False
        folders = [self._folder_of(expert) for expert in lock.experts if expert.is_editable]
        if not all((folder / EXPERT_FILE).is_file() for folder in folders):
            return False
        return not self.inspect().damaged

    def inspect(
        self, *, is_thorough: bool = False, find_digest: Callable[[Path], str] = digest_file
    ) -> Inspection:
        """Compare the installed files with the lock; see `inspect_files`.

        Args:
            is_thorough: Whether to read also the files whose recorded state has not changed.
            find_digest: Returns the digest of a file.
        """
        return inspect_files(
            self.path, self.digests, is_thorough=is_thorough, find_digest=find_digest
        )

    @property
    def digests(self) -> dict[str, str]:
        """The digests of all installed files, by path relative to the generation."""
        return {
            f"experts/{expert.name}/{name}": digest
            for expert in self.lock.experts
            for name, digest in expert.digests.items()
        }

    def _folder_of(self, expert: LockedExpert) -> Path:
        """Return the folder of an editable expert; its path is relative to the project."""
        return self.path.parents[2] / (expert.path or "")


class Environment:
    """The installed experts of one project.

    Args:
        root: The project's `.composable` directory; created by the first install.

    Example:
        >>> Environment(Path("no-such-project/.composable")).manifests()
        []
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def current(self) -> Generation | None:
        """The current generation, or None before the first install.

        Raises:
            PackagingError: When `current` is damaged or names a missing generation.
        """
        before: int | None = -1
        while True:
            number = self._read_current()
            if number is None and not (self.root / "current").exists():
                return None
            if number is not None and self._generation(number).path.is_dir():
                return self._generation(number)
            # Another process may have switched in between: only what is read twice is damage.
            if number == before:
                raise PackagingError(
                    "names a generation that does not exist",
                    where=str(self.root / "current"),
                    hint="run `composable sync`",
                )
            before = number

    @property
    def lock(self) -> Lock:
        """The lock of the current generation; an empty one before the first install."""
        current = self.current
        return current.lock if current is not None else Lock()

    def holds(self, lock: Lock) -> bool:
        """Return whether the current generation was installed from `lock` and has every file."""
        return self._find_installed(lock) is not None

    def settle(self) -> None:
        """Sync the current generation to disk; the process that wrote it may have been killed."""
        current = self.current
        if current is not None:
            atomic.settle(current.path)
            atomic.settle(self.root / "current")

    def generations(self) -> list[Generation]:
        """Return all stored generations, oldest first."""
        folder = self.root / "generations"
        found = [path for path in atomic.list_directory(folder) if path.is_dir()]
        names = (path.name for path in found if _GENERATION.fullmatch(path.name))
        numbers = sorted(int(name) for name in names)
        return [self._generation(number) for number in numbers]

    def expert_path(self, name: str) -> Path:
        """Return the directory of an installed expert.

        Raises:
            PackagingError: When it is not installed.
        """
        current = self.current
        if current is None:
            raise PackagingError("nothing is installed yet", hint=_hint_to_install(name))
        return current.expert_path(name)

    def manifests(self) -> list[Manifest]:
        """Return the manifests of all installed experts, sorted by name."""
        current = self.current
        if current is None:
            return []
        return [current.manifest(expert.name) for expert in current.lock.experts]

    def install(
        self, lock: Lock, store: Store, *, progress: ByteProgress | None = None
    ) -> Generation:
        """Install a lock as a new generation and make it current, unless it already is.

        Args:
            lock: The lock to install.
            store: The store; it holds every file of the lock.
            progress: Called with `install`, experts done and total experts.

        Returns:
            The current generation.

        Raises:
            MissingBlobError: When the store lacks a file.
            LockError: When a manifest does not match the lock.
        """
        if (current := self._find_installed(lock)) is not None:
            self.settle()
            return current
        with atomic.advisory_lock(self.root / "lock"):
            if (current := self._find_installed(lock)) is not None:
                self.settle()
                return current
            atomic.sweep(self.root / "generations")
            number = self._build_generation(lock, store, progress)
            try:
                self._set_current(number)
            except BaseException:
                if self._read_current() != number:
                    atomic.remove_directory(self._generation(number).path)
                raise
            self._remove_old_generations(number)
        return self._generation(number)

    def intact_files(self) -> Mapping[str, Path]:
        """Return a path of each installed file that is as it was installed, by its digest."""
        try:
            current = self.current
            return {} if current is None else current.inspect().intact
        except PackagingError:
            return {}  # a damaged pointer or lock, which the next install replaces

    def verify(
        self,
        progress: ByteProgress | None = None,
        *,
        find_digest: Callable[[Path], str] = digest_file,
    ) -> list[Path]:
        """Verify the digest of every installed file and remove damaged files.

        The next install restores them.

        Args:
            progress: Called with `verify`, files done and total files.
            find_digest: Returns the digest of a file.

        Returns:
            The files that were damaged or missing.
        """
        current = self.current
        if current is None:
            return []
        done, total = itertools.count(1), len(current.digests)

        def find_and_report(path: Path) -> str:
            digest = find_digest(path)
            if progress is not None:
                progress("verify", next(done), total)
            return digest

        damaged = current.inspect(is_thorough=True, find_digest=find_and_report).damaged
        for path in damaged:
            if path.is_dir() and not path.is_symlink():
                atomic.remove_directory(path)
            else:
                atomic.remove_file(path)
        return list(damaged)

    def require_intact(self) -> None:
        """Verify every installed file, as before a load, and remove damaged files.

        Raises:
            IntegrityError: When a file is damaged or missing.
        """
        if damaged := self.verify():
            more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise IntegrityError(
                f"is damaged or missing{more}",
                where=str(damaged[0]),
                hint="run `composable sync`, which fetches damaged files again",
            )

    def rollback(self) -> Generation:
        """Make the generation that was current before this one current again.

        Generations that never became current, because their process was killed, are skipped.

        Returns:
            The generation that is current now.

        Raises:
            PackagingError: When there is no previous generation.
            IntegrityError: When a file of it is damaged or missing.
        """
        current = self.current
        number = None if current is None else _read_number(current.path / PREVIOUS_FILE)
        if number is None or not self._generation(number).path.is_dir():
            raise PackagingError("no previous generation", where=str(self.root))
        older = self._generation(number)
        for path in older.inspect(is_thorough=True).damaged:
            raise IntegrityError(
                "is damaged or missing", where=str(path), hint="nothing was changed"
            )
        self._set_current(number)
        return older

    def _build_generation(self, lock: Lock, store: Store, progress: ByteProgress | None) -> int:
        """Write a lock as a new generation, but do not make it current; return its number."""
        intact = self.intact_files()
        scratch = atomic.make_scratch_directory(self.root / "generations")
        try:
            for done, expert in enumerate(lock.experts, 1):
                if not expert.is_editable:
                    _place_expert(expert, scratch / "experts" / expert.name, store, lock, intact)
                if progress is not None:
                    progress("install", done, len(lock.experts))
            atomic.write_text(scratch / LOCK_FILE, lock.to_toml())
            record_files(
                scratch, [f"experts/{e.name}/{n}" for e in lock.experts for n in e.digests]
            )
            if (before := self._read_current()) is not None:
                atomic.write_text(scratch / PREVIOUS_FILE, f"{before}\n")
            number = max((g.number for g in self.generations()), default=0) + 1
            while not atomic.rename_directory(scratch, self._generation(number).path):
                number += 1
        except BaseException:
            atomic.remove_directory(scratch)
            raise
        return number

    def _find_installed(self, lock: Lock) -> Generation | None:
        """Return the current generation if it was installed from `lock` and is complete."""
        try:
            current = self.current
        except PackagingError:
            return None  # a damaged pointer, which the next install replaces
        return current if current is not None and current.holds(lock.to_toml(), lock) else None

    def _read_current(self) -> int | None:
        """Return the number in `current`; None if there is none, or no valid number."""
        return _read_number(self.root / "current")

    def _generation(self, number: int) -> Generation:
        return Generation(number=number, path=self.root / "generations" / str(number))

    def _set_current(self, number: int) -> None:
        atomic.write_text(self.root / "current", f"{number}\n")

    def _remove_old_generations(self, current: int) -> None:
        older = [g for g in self.generations() if g.number < current]
        for generation in older[: -KEPT_GENERATIONS + 1]:
            if time.time() - generation.path.stat().st_mtime > _SETTLED_SECONDS:
                atomic.remove_directory(generation.path)


def _hint_to_install(name: str) -> str:
    return f"run `composable sync`; if the project lacks it, `composable install {name}`"


def _read_number(path: Path) -> int | None:
    try:
        text = read_bytes(path).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _place_expert(
    expert: LockedExpert, folder: Path, store: Store, lock: Lock, intact: Mapping[str, Path]
) -> None:
    """Place the files of one expert, and check that its manifest matches the lock.

    Args:
        expert: The expert.
        folder: Where its files are placed.
        store: The store, for the files that are not installed yet.
        lock: The lock that it is part of.
        intact: A path of each file that is installed and intact, by digest.
    """
    atomic.make_directory(folder)
    for name, digest in expert.digests.items():
        try:
            place_file(intact.get(digest) or store.path(digest), folder / name)
        except FileNotFoundError as error:
            raise MissingBlobError(
                f"the store has no {name} of {expert.name} {expert.version} ({digest})",
                where=str(store.root),
                hint="run `composable sync`",
            ) from error
    atomic.sync_directory(folder)
    check_manifest(Manifest.read(folder), expert, lock)
