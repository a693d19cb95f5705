"""Native kernels: C++ that is compiled once for this machine's processor, if it has a compiler.

The sources beside this file are compiled on first use with the system's C++ compiler, for the
processor at hand, into the user's cache folder. The file's name is a digest of all that it depends
on: sources, compiler, flags, processor and version of jaxlib. Without a compiler the portable paths
are used; they compute the same up to rounding, and a process never uses both.

What runs there is decided in `quantized.py` and the files beside it whose name begins with
`native`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import platformdirs
from jax.typing import DTypeLike

from composable.interface.digest import canonical_json, digest_bytes

# Names of the kernels in compiled programs.
MULTIPLY: Final = "composable_multiply"
ATTEND: Final = "composable_attend"
ATTEND_BACKWARD: Final = "composable_attend_backward"
ATTEND_CACHED: Final = "composable_attend_cached"
GATE: Final = "composable_gate"
GATE_BACKWARD: Final = "composable_gate_backward"
ORTHOGONALIZE: Final = "composable_orthogonalize"
SCOUT_LOSS: Final = "composable_scout_loss"
# "portable" turns the native kernels off; a path names a library of them, for a process that may
# not compile.
KERNELS_VARIABLE: Final = "COMPOSABLE_KERNELS"
_SYMBOLS: Final = {
    MULTIPLY: "ComposableMultiply",
    ATTEND: "ComposableAttend",
    ATTEND_BACKWARD: "ComposableAttendBackward",
    ATTEND_CACHED: "ComposableAttendCached",
    GATE: "ComposableGate",
    GATE_BACKWARD: "ComposableGateBackward",
    ORTHOGONALIZE: "ComposableOrthogonalize",
    SCOUT_LOSS: "ComposableScoutLoss",
}
_FOLDER: Final = Path(__file__).parent
_SOURCES: Final = tuple(
    _FOLDER / f"{name}.cc"
    for name in (
        "native_attention",
        "native_muon",
        "native_product",
        "native_scout",
        "native_swiglu",
    )
)
_HEADERS: Final = tuple(_FOLDER / name for name in ("lanes.h", "products.h", "threads.h"))
_FLAGS: Final = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC")
# Ten seconds of two cores, and far more where others keep them busy.
_COMPILE_SECONDS: Final = 600
# Threads that ask at the same time wait for one of them to compile.
_LOADING: Final = threading.Lock()
# Widths of what a kernel keeps in registers are multiples of this.
_WIDTH: Final = 16


class NativeKernels(NamedTuple):
    """Whether the native kernels can be used, and why.

    Args:
        library: The library that has them, which is loaded; None if programs may not call them.
        reason: What they were compiled with, or why there are none.
    """

    library: Path | None
    reason: str

    @property
    def is_loaded(self) -> bool:
        """Whether programs may call them."""
        return self.library is not None


def load_native() -> NativeKernels:
    """Return the native kernels, compiled if this machine has not done so before.

    Example:
        >>> load_native() is load_native()
        True
    """
    with _LOADING:
        return _find_native()


@functools.cache
def _find_native() -> NativeKernels:
    """Return what `load_native` does; called once."""
    choice = os.environ.get(KERNELS_VARIABLE)
    if choice == "portable":
        return NativeKernels(None, f"{KERNELS_VARIABLE}=portable")
    if choice:
        return _load(Path(choice), f"found in {KERNELS_VARIABLE}")
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        return NativeKernels(None, f"no C++ compiler ({', '.join(_compilers())})")
    try:
        version = _run(compiler, "--version").splitlines()[0]
        library = _compile(compiler, version)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return NativeKernels(None, f"{compiler} made no library: {_explain(error)}")
    return _load(library, f"compiled for this processor with {version}")


def _load(library: Path, origin: str) -> NativeKernels:
    """Load a library, and make what is in it known to jax."""
    try:
        functions = ctypes.cdll.LoadLibrary(str(library))
        handlers = {
            name: jax.ffi.pycapsule(getattr(functions, symbol)) for name, symbol in _SYMBOLS.items()
        }
    except (OSError, AttributeError) as error:
        return NativeKernels(None, f"{library} cannot be used: {error}")
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return NativeKernels(library, origin)


def takes_native(platform: str | None, dtype: DTypeLike, width: int = _WIDTH) -> bool:
    """Return whether native kernels of attention, SwiGLU and Muon take arrays.

    Args:
        platform: That of the devices, as jax names it; None where it is not known.
        dtype: Of the arrays.
        width: Numbers of a head, or hidden units of a block; a kernel that takes any has none.

    Example:
        >>> takes_native("tpu", "float32", 64)
        False
    """
    fits = jnp.dtype(dtype) == jnp.float32 and width % _WIDTH == 0
    return platform == "cpu" and fits and load_native().is_loaded


def wants_native() -> bool:
    """Return whether this process computes on a CPU, which native kernels are for.

    Example:
        >>> isinstance(wants_native(), bool)
        True
    """
    return jax.default_backend() == "cpu"


def is_on_one_device() -> bool:
    """Return whether no mesh of several devices is in use, whose arrays no kernel here can split.

    Example:
        >>> is_on_one_device()
        True
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.empty or mesh.size == 1)


def _compilers() -> tuple[str, ...]:
    """Return names of compilers, those of the environment first."""
    return (*filter(None, [os.environ.get("CXX")]), "c++", "g++", "clang++")


def _compile(compiler: str, version: str) -> Path:
    """Return the library of these sources, compiler and processor."""
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    flags = (*_FLAGS, "-mcpu=native" if is_arm else "-march=native")
    sources = [digest_bytes(path.read_bytes()) for path in (*_SOURCES, *_HEADERS)]
    parts = [version, flags, _describe_processor(), jaxlib.version.__version__]
    name = digest_bytes(canonical_json([sources, *parts])).removeprefix("sha256:")
    folder = Path(platformdirs.user_cache_dir("composable", appauthor=False)) / "kernels"
    library = folder / f"{name}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        objects = [made.with_name(f"{source.stem}.o") for source in _SOURCES]
        include = ("-I", jax.ffi.include_dir())

        def compile_one(source: Path, compiled: Path) -> None:
            _run(compiler, *flags, *include, "-c", str(source), "-o", str(compiled))

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, _SOURCES, objects))
        _run(compiler, *flags, "-shared", *map(str, objects), "-o", str(made))
        made.replace(library)
    return library


def _run(*command: str) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS
    )
    return done.stdout


def _describe_processor() -> list[str]:
    """Return what decides which instructions a processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.machine(), platform.processor(), platform.platform()]
    kinds = ("model name", "flags", "Features", "CPU part")
    return [platform.machine(), *(line for line in lines if line.startswith(kinds))]


def _explain(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return lines[0] if lines else f"exit status {error.returncode}"
    return str(error)
