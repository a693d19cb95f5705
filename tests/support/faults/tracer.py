"""Watching, stopping and failing the file operations of a real process, where the kernel sees them.

A function runs in a forked child under ptrace. A seccomp filter makes the child stop at the system
calls that change files, and only there, so reading costs nothing. At each stop the tracer may let
the call pass, kill the process with SIGKILL before or after it, let half of a write through and
kill then, or make the call fail with an error of its choice. What passed is returned as a list of
operations with their data, which is what power loss is simulated from.

This sees what Python's `os` and `io` see and what they do not: buffered writes when they really
happen, `sendfile` inside `shutil`, locks, threads and extension modules. A call that would change
files in a way that is not modelled here (shared memory maps, io_uring, symbolic links) stops the
run with `NotModelledError` instead of passing unseen. Linux on x86_64 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import errno
import os
import platform
import signal
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.support.faults.processes import ACKNOWLEDGEMENTS, Ending, be_child, end, fork


class Kind(enum.StrEnum):
    """What an operation does to the disk."""

    CREATE = "create"
    READ = "open for reading"
    OPEN = "open for writing"
    WRITE = "write"
    TRUNCATE = "truncate"
    SYNC = "fsync"
    RENAME = "rename"
    LINK = "link"
    UNLINK = "unlink"
    MKDIR = "mkdir"
    RMDIR = "rmdir"
    CHMOD = "chmod"
    TIMES = "set times"
    ACKNOWLEDGE = "acknowledge"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One system call that changes the disk.

    Args:
        kind: What it does.
        path: Of what, relative to the traced root; for an acknowledgement, its text.
        target: New name, for rename and link.
        inode: Number of the file or directory that is written, resized or synced.
        offset: First byte of a write.
        data: What was written.
        size: New size, for truncate; mode, for chmod and create.
        error: Number of the error that the call returned; 0 for success.
    """

    kind: Kind
    path: str
    target: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    size: int = 0
    error: int = 0

    def __str__(self) -> str:
        text = f"{self.kind} {self.path or '.'}"
        text += f" -> {self.target}" if self.target else ""
        text += f" [{self.offset}:{self.offset + len(self.data)}]" if self.data else ""
        return text + (f" ({errno.errorcode.get(self.error, self.error)})" if self.error else "")


class Fate(enum.Enum):
    """What becomes of the process at an operation."""

    PASS = enum.auto()
    KILL_BEFORE = enum.auto()
    KILL_AFTER = enum.auto()
    TEAR = enum.auto()  # half of a write, then SIGKILL


@dataclass(frozen=True)
class Fail:
    """Let the operation fail.

    Args:
        error: Number of the error, for example `errno.ENOSPC`.
    """

    error: int


Decide = Callable[[Operation], Fate | Fail]


@dataclass(frozen=True, kw_only=True)
class Run(Ending):
    """How a traced process went.

    Args:
        operations: What it did to the disk under the root, failures included, in order.
    """

    operations: list[Operation]

    @property
    def acknowledged(self) -> int:
        """How many calls it acknowledged."""
        return sum(operation.kind is Kind.ACKNOWLEDGE for operation in self.operations)


class NotModelledError(Exception):
    """The process changed files in a way that this file does not understand."""


def is_supported() -> bool:
    """Say whether processes can be traced here."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        return run_traced(lambda: None, Path("/nonexistent")).code == 0
    except OSError:
        return False


def run_traced(
    function: Callable[[], Any],
    root: Path,
    decide: Decide | None = None,
    *,
    with_reads: bool = False,
) -> Run:
    """Run a function in a forked child that stops at every change of the disk under `root`.

    Args:
        function: What to run; an int that it returns is the exit code.
        root: Operations elsewhere pass unseen.
        decide: Called before every operation, with what is known before it.
        with_reads: Whether to stop where a file or folder is opened for reading, too.

    Raises:
        NotModelledError: When a change under `root` cannot be understood.
        OSError: When the system does not allow tracing.
    """
    with tempfile.TemporaryFile() as output:
        pid = fork()
        if pid == 0:
            be_child(function, output.fileno(), partial(_ask_to_be_traced, with_reads))
        tracer = _Tracer(pid, Path(os.path.realpath(root)), decide or (lambda _: Fate.PASS))
        try:
            status = tracer.follow()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-pid, _WALL)
            raise
        return Run(**vars(end(status, output)), operations=tracer.operations)


# --- ptrace and seccomp ---------------------------------------------------------------------------

_WALL: Final = 0x40000000
_TRACEME, _CONT, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
_EVENT_SECCOMP: Final = 7
# TRACESYSGOOD, FORK, VFORK, CLONE, EXEC, SECCOMP, EXITKILL
_OPTIONS: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_O_TMPFILE: Final = 0o20000000

_NUMBERS: Final = {
    "write": 1, "open": 2, "mmap": 9, "pwrite64": 18, "writev": 20, "msync": 26, "sendfile": 40,
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83,
    "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91,
    "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "mknod": 133, "sync": 162,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "utimes": 235, "openat": 257,
    "mkdirat": 258, "mknodat": 259, "fchownat": 260, "futimesat": 261, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268, "splice": 275,
    "sync_file_range": 277, "utimensat": 280, "fallocate": 285, "pwritev": 296, "syncfs": 306,
    "renameat2": 316, "copy_file_range": 326, "pwritev2": 328, "io_uring_setup": 425,
    "openat2": 437, "fchmodat2": 452,
}  # fmt: skip
_NAMES: Final = {number: name for name, number in _NUMBERS.items()}
# Those that cannot be followed; they stop the run where they touch a file under the root.
_NOT_MODELLED: Final = frozenset(
    {
        "mmap", "msync", "symlink", "symlinkat", "mknod", "mknodat", "splice", "sync", "syncfs",
        "pwritev2", "io_uring_setup", "openat2", "setxattr", "lsetxattr", "fsetxattr", "fallocate",
    }
)  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Registers(ctypes.Structure):
    """`struct user_regs_struct` of x86_64."""

    _fields_ = [
        (name, ctypes.c_ulong)
        for name in (
            "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
            "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base",
            "ds", "es", "fs", "gs",
        )
    ]  # fmt: skip

    @property
    def arguments(self) -> tuple[int, ...]:
        """The six arguments of a system call."""
        return (self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9)

    @property
    def result(self) -> int:
        """What a system call returned, negative for an error."""
        return ctypes.c_long(self.rax).value


class _Filter(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def _ptrace(request: int, tid: int, address: Any = None, data: Any = None) -> None:
    if _libc.ptrace(request, tid, address, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ask_to_be_traced(with_reads: bool) -> None:
    """Stop until the tracer is there, then have the kernel stop this process at changes."""
    _ptrace(_TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    _install_filter(with_reads)


def _install_filter(with_reads: bool) -> None:
    """Install the seccomp filter: trace what may change files, allow everything else."""
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    trace, allow = 0x7FF00000, 0x7FFF0000

    def code(operation: int, if_true: int, if_false: int, value: int) -> bytes:
        return struct.pack("HBBI", operation, if_true, if_false, value)

    program = [code(load, 0, 0, 0)]  # the number of the call
    for name, number in _NUMBERS.items():
        if name in ("open", "openat") and not with_reads:  # only those that may write
            flags = 16 + 8 * (1 if name == "open" else 2)
            program += [
                code(equal, 0, 4, number),
                code(load, 0, 0, flags),
                code(any_bit, 0, 1, _WRITE_FLAGS | _O_TMPFILE),
                code(answer, 0, 0, trace),
                code(answer, 0, 0, allow),
            ]
        elif name == "mmap":  # only what is shared and writable
            program += [
                code(equal, 0, 6, number),
                code(load, 0, 0, 16 + 8 * 2),
                code(any_bit, 0, 3, 0x2),
                code(load, 0, 0, 16 + 8 * 3),
                code(any_bit, 0, 1, 0x1),
                code(answer, 0, 0, trace),
                code(answer, 0, 0, allow),
            ]
        else:
            program += [code(equal, 0, 1, number), code(answer, 0, 0, trace)]
    program.append(code(answer, 0, 0, allow))
    text = ctypes.create_string_buffer(b"".join(program))
    filter_ = _Filter(len(program), ctypes.addressof(text))
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    if (
        _libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0
        or _libc.prctl(set_seccomp, by_filter, ctypes.byref(filter_), 0, 0) != 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp is not allowed here")


@dataclass(kw_only=True)
class _Pending:
    """A call that was entered and has not returned."""

    name: str
    arguments: tuple[int, ...]
    operation: Operation
    fate: Fate | Fail
    existed: bool = False


class _Tracer:
    """Follows one process and its threads and children from start to end."""

    def __init__(self, pid: int, root: Path, decide: Decide) -> None:
        self.operations: list[Operation] = []
        self._pid = pid
        self._root = os.fspath(root)
        self._decide = decide
        self._pending: dict[int, _Pending] = {}

    def follow(self) -> int:
        """Follow to the end; return the status of the first process."""
        _, status = os.waitpid(self._pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise OSError(errno.EPERM, "ptrace is not allowed here")
        _ptrace(_SETOPTIONS, self._pid, None, _OPTIONS)
        _ptrace(_CONT, self._pid, None, 0)
        last = 0
        while True:
            try:
                tid, status = os.waitpid(-self._pid, _WALL)
            except ChildProcessError:
                return last
            if os.WIFSTOPPED(status):
                with contextlib.suppress(ProcessLookupError):  # killed at the same moment
                    self._stopped(tid, status)
            elif tid == self._pid:
                last = status

    def _stopped(self, tid: int, status: int) -> None:
        """Handle one stop and let the thread go on."""
        signal_, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP:
            self._entered(tid)
        elif signal_ == signal.SIGTRAP | 0x80:
            self._returned(tid)
        elif event or signal_ == signal.SIGSTOP:  # births, and the first stop of a newborn
            _ptrace(_CONT, tid, None, 0)
        else:
            _ptrace(_CONT, tid, None, signal_)

    def _entered(self, tid: int) -> None:
        registers = _Registers()
        _ptrace(_GETREGS, tid, None, ctypes.byref(registers))
        pending = self._read_call(tid, _NAMES[registers.orig_rax], registers.arguments)
        if pending is None:
            _ptrace(_CONT, tid, None, 0)
            return
        if pending.operation.kind is not Kind.ACKNOWLEDGE:
            pending.fate = self._decide(pending.operation)
        if pending.fate is Fate.KILL_BEFORE:
            os.kill(self._pid, signal.SIGKILL)
            return
        if isinstance(pending.fate, Fail):
            registers.orig_rax = ctypes.c_ulong(-1).value
            registers.rax = ctypes.c_ulong(-pending.fate.error).value
            _ptrace(_SETREGS, tid, None, ctypes.byref(registers))
        elif pending.fate is Fate.TEAR:
            if pending.name not in ("write", "pwrite64"):
                raise NotModelledError(f"a torn {pending.name}")
            registers.rdx //= 2
            _ptrace(_SETREGS, tid, None, ctypes.byref(registers))
        self._pending[tid] = pending
        _ptrace(_SYSCALL, tid, None, 0)

    def _returned(self, tid: int) -> None:
        registers = _Registers()
        _ptrace(_GETREGS, tid, None, ctypes.byref(registers))
        pending = self._pending.pop(tid)
        self.operations.append(self._complete(tid, pending, registers.result))
        if pending.fate in (Fate.KILL_AFTER, Fate.TEAR):
            os.kill(self._pid, signal.SIGKILL)
            return
        _ptrace(_CONT, tid, None, 0)

    def _read_call(self, tid: int, name: str, args: tuple[int, ...]) -> _Pending | None:
        """Return what a call is about to do to the disk under the root, if anything."""
        operation = self._read_operation(tid, name, args)
        if operation is None:
            return None
        pending = _Pending(name=name, arguments=args, operation=operation, fate=Fate.PASS)
        if operation.kind is Kind.CREATE:
            pending.existed = os.path.lexists(self._absolute(operation.path))
            flags = self._open_flags(name, args)
            if pending.existed:
                kind = Kind.TRUNCATE if flags & os.O_TRUNC else Kind.OPEN
                pending.operation = dataclasses.replace(operation, kind=kind)
        return pending

    def _read_operation(self, tid: int, name: str, args: tuple[int, ...]) -> Operation | None:
        if name in _NOT_MODELLED:
            self._refuse_if_ours(tid, name, args)
            return None
        if name in ("write", "writev", "pwrite64", "pwritev"):
            return self._read_write(tid, name, args)
        if name in ("sendfile", "copy_file_range"):
            output = args[0] if name == "sendfile" else args[2]
            path = self._of_descriptor(tid, output)
            offset = self._position(tid, output) if path is not None else 0
            return self._about(Kind.WRITE, path, offset=offset)
        if name in ("fsync", "fdatasync"):
            return self._about(Kind.SYNC, self._of_descriptor(tid, args[0]))
        if name == "sync_file_range":  # promises nothing about metadata, so it counts for nothing
            return None
        if name in ("ftruncate", "fchmod"):
            kind = Kind.TRUNCATE if name == "ftruncate" else Kind.CHMOD
            return self._about(kind, self._of_descriptor(tid, args[0]), size=args[1])
        if name in ("open", "creat", "openat"):
            at = args[0] if name == "openat" else _AT_FDCWD
            address = args[1] if name == "openat" else args[0]
            path = self._of_path(tid, at, address)
            if path is not None and self._open_flags(name, args) & _O_TMPFILE == _O_TMPFILE:
                raise NotModelledError(f"O_TMPFILE in {path}")
            if path is None or self._open_flags(name, args) & os.O_CREAT:
                return self._about(Kind.CREATE, path)
            if not self._open_flags(name, args) & _WRITE_FLAGS:
                return self._about(Kind.READ, path)
            kind = Kind.TRUNCATE if self._open_flags(name, args) & os.O_TRUNC else Kind.OPEN
            return self._about(kind, path)
        return self._read_name_call(tid, name, args)

    def _read_name_call(self, tid: int, name: str, args: tuple[int, ...]) -> Operation | None:
        """Return what a call that takes paths is about to do."""
        if name.startswith(("rename", "link")):
            if name == "renameat2" and args[4] & ~1:
                raise NotModelledError("an exchange of two names")
            is_at = "at" in name
            source = self._of_path(tid, *(args[0:2] if is_at else (_AT_FDCWD, args[0])))
            target = self._of_path(tid, *(args[2:4] if is_at else (_AT_FDCWD, args[1])))
            kind = Kind.LINK if name.startswith("link") else Kind.RENAME
            if (source is None) != (target is None):
                raise NotModelledError(f"{name} across the traced root: {source} {target}")
            return self._about(kind, source, target=target or "")
        is_at = name.endswith("at") or name.endswith("at2")
        if name in ("utimensat", "futimesat") and args[1] == 0:
            path = self._of_descriptor(tid, args[0])
        else:
            path = self._of_path(tid, *((args[0], args[1]) if is_at else (_AT_FDCWD, args[0])))
        if name == "unlinkat":
            return self._about(Kind.RMDIR if args[2] & 0x200 else Kind.UNLINK, path)
        if name in ("chmod", "fchmodat", "fchmodat2", "truncate"):
            kind = Kind.TRUNCATE if name == "truncate" else Kind.CHMOD
            return self._about(kind, path, size=args[2] if is_at else args[1])
        kinds = {
            "unlink": Kind.UNLINK, "rmdir": Kind.RMDIR, "mkdir": Kind.MKDIR, "mkdirat": Kind.MKDIR,
        }  # fmt: skip
        if "time" in name or "chown" in name:
            return self._about(Kind.TIMES, path)
        return self._about(kinds[name], path)

    def _read_write(self, tid: int, name: str, args: tuple[int, ...]) -> Operation | None:
        if args[0] == ACKNOWLEDGEMENTS:
            text = self._read_memory(tid, args[1], args[2]).decode()
            return Operation(kind=Kind.ACKNOWLEDGE, path=text)
        path = self._of_descriptor(tid, args[0])
        if path is None:
            return None
        offset = args[3] if name.startswith("p") else self._position(tid, args[0])
        return self._about(Kind.WRITE, path, offset=offset)

    def _complete(self, tid: int, pending: _Pending, result: int) -> Operation:
        """Return the operation with what is known once the call has returned."""
        operation, name, args = pending.operation, pending.name, pending.arguments
        if result < 0:
            return dataclasses.replace(operation, error=-result)
        if operation.kind is Kind.WRITE:
            if name in ("write", "pwrite64"):
                data = self._read_memory(tid, args[1], result)
            elif name in ("writev", "pwritev"):
                data = self._read_vector(tid, args[1], args[2])[:result]
            else:
                output = args[0] if name == "sendfile" else args[2]
                with open(f"/proc/{tid}/fd/{output}", "rb") as file:  # noqa: PTH123
                    data = os.pread(file.fileno(), result, operation.offset)
            operation = dataclasses.replace(operation, data=data)
        elif operation.kind in (Kind.CREATE, Kind.MKDIR):
            status = os.lstat(self._absolute(operation.path))
            mode = stat.S_IMODE(status.st_mode)
            operation = dataclasses.replace(operation, inode=status.st_ino, size=mode)
        return operation

    def _about(self, kind: Kind, path: str | None, **fields: Any) -> Operation | None:
        """Return an operation on a path under the root with its inode; None elsewhere."""
        if path is None:
            return None
        inode = 0
        if path.startswith("fd:"):  # an open file, by whatever name it has now, or none
            inode, path = (lambda parts: (int(parts[1]), parts[2]))(path.split(":", 2))
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                inode = os.lstat(self._absolute(path)).st_ino
        return Operation(kind=kind, path=path, inode=inode, **fields)

    def _of_descriptor(self, tid: int, descriptor: int) -> str | None:
        link = f"/proc/{tid}/fd/{ctypes.c_int(descriptor).value}"
        try:
            path = os.readlink(link).removesuffix(" (deleted)")  # noqa: PTH115
        except FileNotFoundError:
            return None
        relative = self._relative(path)
        if relative is None:
            return None
        return f"fd:{os.stat(link).st_ino}:{relative}"  # noqa: PTH116

    def _of_path(self, tid: int, at: int, address: int) -> str | None:
        text = self._read_text(tid, address)
        at = ctypes.c_int(at).value
        if not os.path.isabs(text):  # noqa: PTH117
            link = f"/proc/{tid}/cwd" if at == _AT_FDCWD else f"/proc/{tid}/fd/{at}"
            text = os.path.join(os.readlink(link), text)  # noqa: PTH115, PTH118
        folder, name = os.path.split(os.path.normpath(text))
        return self._relative(os.path.join(os.path.realpath(folder), name))  # noqa: PTH118

    def _relative(self, path: str) -> str | None:
        if path == self._root:
            return ""
        return path[len(self._root) + 1 :] if path.startswith(self._root + "/") else None

    def _absolute(self, path: str) -> str:
        return os.path.join(self._root, path) if path else self._root  # noqa: PTH118

    def _open_flags(self, name: str, args: tuple[int, ...]) -> int:
        if name == "creat":
            return os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        return args[2] if name == "openat" else args[1]

    def _position(self, tid: int, descriptor: int) -> int:
        """Return where the next write of a descriptor goes."""
        with open(f"/proc/{tid}/fdinfo/{descriptor}") as file:  # noqa: PTH123
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        if int(fields["flags"], 8) & os.O_APPEND:
            return os.stat(f"/proc/{tid}/fd/{descriptor}").st_size  # noqa: PTH116
        return int(fields["pos"])

    def _refuse_if_ours(self, tid: int, name: str, args: tuple[int, ...]) -> None:
        if name in ("mmap", "splice"):
            path = self._of_descriptor(tid, args[4] if name == "mmap" else args[2])
            if path is None:
                return
        raise NotModelledError(f"{name}{args}")

    def _read_memory(self, tid: int, address: int, size: int) -> bytes:
        with open(f"/proc/{tid}/mem", "rb", buffering=0) as file:  # noqa: PTH123
            return os.pread(file.fileno(), size, address)

    def _read_vector(self, tid: int, address: int, count: int) -> bytes:
        vector = struct.iter_unpack("QQ", self._read_memory(tid, address, 16 * count))
        return b"".join(self._read_memory(tid, start, size) for start, size in vector)

    def _read_text(self, tid: int, address: int) -> str:
        data = b""
        while b"\0" not in data and len(data) < 1 << 14:
            step = 4096 - (address + len(data)) % 4096  # never across into a page that is not there
            data += self._read_memory(tid, address + len(data), min(step, 256))
        return os.fsdecode(data.split(b"\0", 1)[0])


def operations_of(run: Run) -> Iterator[Operation]:
    """Yield the operations of a run that are points to fail at: all but acknowledgements."""
    return (operation for operation in run.operations if operation.kind is not Kind.ACKNOWLEDGE)
