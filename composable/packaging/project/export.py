"""Exports: everything that a project installs, for machines without a network.

An export is a registry that holds only the locked releases, together with the project file and the
lock: a folder, or the same folder as one uncompressed tar file. `sync --from` reads all files from
it instead of from the registries in the lock. It also works like any other registry.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import PackagingError
from composable.files import atomic
from composable.files.reading import open_file, read_bytes
from composable.packaging.install.lock import LOCK_FILE, Lock
from composable.packaging.project.project import PROJECT_FILE, Project
from composable.packaging.registry.registry import Registry
from composable.packaging.registry.storage import Folder
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

SUFFIX: Final = ".tar"


def export_project(
    project: Project,
    lock: Lock,
    target: Path,
    *,
    interface: RouterInterface | None = None,
    progress: ByteProgress | None = None,
) -> None:
    """Write the installed experts as a registry, together with the project file and the lock.

    Args:
        project: The project, in sync.
        lock: Its lock.
        target: A new folder, or a new file whose name ends in `.tar`.
        interface: The backbone's router interface.
        progress: Called with a file's name, bytes done and bytes in all.

    Raises:
        PackagingError: When the target exists, or when an expert comes from a folder: only
            published experts can be exported.
    """
    if target.exists():
        raise PackagingError("already exists", where=str(target), hint="choose another name")
    for expert in lock.experts:
        if expert.path is not None:
            raise PackagingError(
                f"{expert.name} comes from the folder {expert.path}, which cannot be exported",
                hint=f"publish it, then add {expert.name} from that registry",
            )
    project.environment.require_intact()
    target = target.absolute()
    scratch = atomic.make_scratch_directory(target.parent)
    try:
        registry = Registry(Folder(scratch))
        for expert in lock.experts:
            folder = project.environment.expert_path(expert.name)
            registry.publish(folder, interface=interface, progress=progress)
        atomic.write_bytes(scratch / PROJECT_FILE, read_bytes(project.path))
        atomic.write_text(scratch / LOCK_FILE, lock.to_toml())
        if target.suffix == SUFFIX:
            _write_tar(scratch, target)
        elif not atomic.rename_directory(scratch, target):
            raise PackagingError("already exists", where=str(target))
    finally:
        atomic.remove_directory(scratch)


def _write_tar(folder: Path, target: Path) -> None:
    """Write a folder as a tar file without times, owners or absolute paths."""
    with atomic.Sink(target) as sink, tarfile.open(fileobj=_Pipe(sink), mode="w|") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                member.size = path.stat().st_size
                member.mode = 0o644
                with open_file(path) as file:
                    tar.addfile(member, file)


class _Pipe(io.RawIOBase):
    """A sink as a writable file object."""

    def __init__(self, sink: atomic.Sink) -> None:
        self._sink = sink

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        self._sink.write(data)
        return len(data)
