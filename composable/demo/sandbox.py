"""Confine a process to folders, so that it provably reads only its own text.

On Linux the kernel enforces it (Landlock, since 5.13, no privileges needed), for this process, its
children and all native code. Elsewhere a Python audit hook is used, which stops accidental access
by Python code but not code that tries to escape; see `restrict`.

Not here: hiding names, sizes and times of files (`stat` works everywhere), limits of memory or
time, and defence against kernel bugs.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
import sys
import sysconfig
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from composable.errors import ComposableError

_PACKAGE: Final = Path(__file__).resolve().parents[1]
# Device files of an NVIDIA accelerator, where there is one, and what its driver reads. The driver
# also names its threads by writing to /proc/self/task, and does not start if that is denied.
_ACCELERATORS: Final = tuple(sorted(map(str, Path("/dev").glob("nvidia*"))))
_DRIVER: Final = ("/proc/driver", "/proc/devices", "/proc/modules", "/proc/version", "/sys")
_DEVICES: Final = (
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"),
    *_ACCELERATORS,
    *(("/proc/self/task",) if _ACCELERATORS else ()),
)
_SYSTEM: Final = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/filesystems"),
    *("/proc/sys", "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm"),
    *(_DRIVER if _ACCELERATORS else ()),
)


class SandboxError(ComposableError):
    """A process cannot be confined."""


def restrict(*, read: Sequence[Path], write: Sequence[Path]) -> str:
    """Confine this process, for the rest of its life, to reading and writing the given folders.

    Threads and child processes that start later are confined, too, and nothing can lift it. Files
    that are open already stay usable. Call it first in a process, before numpy or jax are imported:
    Landlock confines only the calling thread, and these libraries start others.

    Landlock denies reading, listing, executing and changing any file elsewhere, to native code
    too. From ABI 2 (Linux 5.19) files can be renamed between the `write` folders, before that only
    within one folder; truncating elsewhere is denied from ABI 3 (6.2), TCP connections and
    listening from ABI 4 (6.7), device control from ABI 5 (6.10), signals and abstract sockets to
    processes outside from ABI 6 (6.12). Never denied: `stat`, changes of mode, owner and times,
    UDP. The *names* in the folders where Python looks for modules stay listable, or nothing could
    be imported; their files are readable only if `read` says so.

    The audit hook, used where the kernel has no Landlock, sees what Python code does through
    `open` and `os`, and denies sockets and child processes altogether. It does not see native
    code (a library that opens files itself), takes names relative to a folder's descriptor as
    relative to the current folder, and any code can evade it through `ctypes`.

    Args:
        read: Files and folders, with all beneath, to read, list and execute; see `python_paths`.
        write: Files and folders, with all beneath, to do this and also change. They must exist.

    Returns:
        The mechanism used, such as "Landlock (ABI 7)" or "Python audit hook".

    Raises:
        SandboxError: If other threads are running, or the kernel refuses.
        FileNotFoundError: If one of the paths does not exist.

    References:
        docs.kernel.org/userspace-api/landlock; PEP 578 (audit hooks).
    """
    if (threads := _count_threads()) > 1:
        raise SandboxError(
            f"{threads} threads are running in this process, and only the calling one would be "
            "confined",
            hint="call restrict() first, before numpy or jax are imported",
        )
    changed = [path.resolve(strict=True) for path in (*write, *_existing(_DEVICES))]
    seen = [path.resolve(strict=True) for path in read]
    if abi := _landlock_abi():
        _restrict_by_landlock(abi, seen, changed, _module_folders())
        return f"Landlock (ABI {abi})"
    sys.addaudithook(_audit_hook(seen, changed, _module_folders()))
    return "Python audit hook"


def python_paths() -> list[Path]:
    """Return what a Python process must be able to read to run and to import installed packages.

    These are the interpreter and its packages, the system's libraries and settings, and a few facts
    about the machine. Texts of experts are left out: of a checkout of this project only the
    package's own folder is included, of an installed package all but its folder `experts`. Folders
    on `sys.path` without installed packages, such as the current one, are left out, too.
    """
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    roots = {path.resolve() for path in _existing((*_SYSTEM, *_DEVICES, *prefixes))}
    checkout = [_PACKAGE.parent] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
    hidden = {_PACKAGE / "experts", *checkout}
    covered = {path for root in roots.union(_module_folders()) for path in _cover(root, hidden)}
    return sorted(covered)


def _cover(root: Path, hidden: Collection[Path]) -> list[Path]:
    """Return paths that cover a tree without the `hidden` folders beneath it."""
    inside = [path for path in hidden if root in path.parents and path.exists()]
    if not inside:
        return [root]
    # Links are left out: their targets are covered where they are stored.
    children = (path for path in root.iterdir() if path not in inside and not path.is_symlink())
    return [path for child in children for path in _cover(child, inside)]


def _module_folders() -> list[Path]:
    """Return the folders in which installed modules are looked up, and the package's own."""
    names = {"site-packages", "dist-packages"}
    searched = (path for path in sys.path if Path(path).name in names)
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *searched}
    return [*(path.resolve() for path in _existing(sorted(sites))), _PACKAGE]


def _existing(paths: Iterable[str]) -> list[Path]:
    return [path for path in map(Path, paths) if path.exists()]


def _count_threads() -> int:
    """Return how many threads are running, native ones included where the system lists them."""
    try:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - a count, no paths
    except OSError:
        return threading.active_count()


# Landlock: the numbers are those of linux/landlock.h, the same on every architecture but alpha.

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_QUERY_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_TCP_BIND_AND_CONNECT: Final = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS: Final = 0b11


class _Right(enum.IntFlag):
    """Rights on files: LANDLOCK_ACCESS_FS_*, in the order of their bits."""

    EXECUTE = enum.auto()
    WRITE_FILE = enum.auto()
    READ_FILE = enum.auto()
    READ_DIR = enum.auto()
    REMOVE_DIR = enum.auto()
    REMOVE_FILE = enum.auto()
    MAKE_CHAR = enum.auto()
    MAKE_DIR = enum.auto()
    MAKE_REG = enum.auto()
    MAKE_SOCK = enum.auto()
    MAKE_FIFO = enum.auto()
    MAKE_BLOCK = enum.auto()
    MAKE_SYM = enum.auto()
    REFER = enum.auto()  # rename or link between folders
    TRUNCATE = enum.auto()
    IOCTL_DEV = enum.auto()


_ANY: Final = ~_Right(0)
_READ: Final = _Right.EXECUTE | _Right.READ_FILE | _Right.READ_DIR
_WRITE: Final = _ANY & ~(_Right.MAKE_CHAR | _Right.MAKE_BLOCK)
# The rights that a rule may give on something other than a folder.
_ON_FILES: Final = (
    _Right.EXECUTE | _Right.READ_FILE | _Right.WRITE_FILE | _Right.TRUNCATE | _Right.IOCTL_DEV
)


def _known_rights(abi: int) -> _Right:
    """Return the rights that a kernel of this ABI can deny; it rejects any others."""
    newer = {1: _Right.REFER, 2: _Right.TRUNCATE, 3: _Right.IOCTL_DEV, 4: _Right.IOCTL_DEV}
    return _ANY if abi not in newer else _Right(newer[abi] - 1)


def _landlock_abi() -> int:
    """Return the kernel's Landlock ABI, or 0 where there is none or its use is denied."""
    if sys.platform != "linux":
        return 0
    try:
        return _syscall(_CREATE_RULESET, None, 0, _QUERY_VERSION)
    except OSError as error:
        # EPERM: a container's system call filter that is older than Landlock.
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise SandboxError(f"cannot query the kernel's Landlock version: {error}") from error


def _restrict_by_landlock(
    abi: int, read: Sequence[Path], write: Sequence[Path], listed: Sequence[Path]
) -> None:
    known = _known_rights(abi)
    network = _TCP_BIND_AND_CONNECT if abi >= 4 else 0
    scope = _ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0
    # An older kernel accepts the longer struct if the fields unknown to it are zero.
    handled = struct.pack("=QQQ", known, network, scope)
    try:
        ruleset = _syscall(_CREATE_RULESET, handled, len(handled), 0)
        try:
            for paths, rights in ((read, _READ), (write, _WRITE), (listed, _Right.READ_DIR)):
                for path in paths:
                    _allow(ruleset, path, rights & known)
            _forbid_new_privileges()
            _syscall(_RESTRICT_SELF, ruleset, 0)
        finally:
            os.close(ruleset)
    except OSError as error:
        raise SandboxError(f"Landlock (ABI {abi}) refused: {error}") from error


def _allow(ruleset: int, path: Path, rights: _Right) -> None:
    """Add a rule that gives rights on a file, or on a folder and all beneath it."""
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        given = rights if path.is_dir() else rights & _ON_FILES
        _syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", given, beneath), 0)
    finally:
        os.close(beneath)


def _forbid_new_privileges() -> None:
    """Give up set-user-id programs, which the kernel requires before a process restricts itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


def _syscall(number: int, *args: int | bytes | None) -> int:
    """Make a system call; variadic arguments must have the width of a register."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    wide = [ctypes.c_long(arg) if isinstance(arg, int) else ctypes.c_char_p(arg) for arg in args]
    if (result := syscall(ctypes.c_long(number), *wide)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


# The audit hook: which arguments of an event are paths, and which events leave the process.

_LISTS: Final = {"os.listdir": (0,), "os.scandir": (0,)}
_CHANGES: Final = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.truncate"), (0,)),
    **dict.fromkeys(("os.chmod", "os.chown", "os.utime", "os.setxattr"), (0,)),
    **dict.fromkeys(("os.rename", "os.link"), (0, 1)),
    "os.symlink": (1,),
    "sqlite3.connect": (0,),
}
_LEAVES: Final = frozenset(
    {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"}
    | {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}
)
_CHANGING_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _audit_hook(
    read: Sequence[Path], write: Sequence[Path], listed: Sequence[Path]
) -> Callable[[str, tuple[Any, ...]], None]:
    """Return a hook that raises PermissionError for access outside the given folders."""
    changeable = tuple(map(str, write))
    readable = (*changeable, *map(str, read))
    listable = (*readable, *map(str, listed))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            is_change = bool((args[2] or 0) & _CHANGING_FLAGS)
            _require_within(changeable if is_change else readable, args[:1])
        elif event in _LISTS:
            _require_within(listable, args[:1])
        elif event in _CHANGES:
            _require_within(changeable, [args[index] for index in _CHANGES[event]])
        elif event in _LEAVES:
            raise PermissionError(errno.EACCES, f"{event}: {os.strerror(errno.EACCES)}")

    return hook


def _require_within(roots: Sequence[str], paths: Iterable[str | bytes | int | None]) -> None:
    for path in paths:
        if isinstance(path, int):  # an open file: it was checked when it was opened
            continue
        # os.path, because pathlib's own calls are audited in some versions.
        real = os.path.realpath(os.fsdecode(path or "."))
        if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
