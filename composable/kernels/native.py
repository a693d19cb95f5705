"""The native kernel: C++ that is compiled once for this machine's processor, if it has a compiler.

`quantized.cc` is compiled on first use with the system's C++ compiler, for the processor at hand,
into the user's cache folder. The file's name is a digest of all that it depends on: source,
compiler, flags, processor and version of jaxlib. Without a compiler the portable path is used; it
computes the same up to rounding, and a process never uses both.

Which products run there is decided in `quantized.py`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

import jax
import jaxlib.version
import platformdirs

from composable.interface.digest import canonical_json, digest_bytes

# Name of the kernel in compiled programs.
TARGET: Final = "composable_multiply"
# "portable" turns the native kernel off.
VARIABLE: Final = "COMPOSABLE_KERNELS"
_SOURCE: Final = Path(__file__).with_name("quantized.cc")
_SYMBOL: Final = "ComposableMultiply"
_FLAGS: Final = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
_COMPILE_SECONDS: Final = 120


class NativeKernel(NamedTuple):
    """Whether the native kernel can be used, and why.

    Args:
        is_loaded: Whether programs may call it.
        reason: What it was compiled with, or why there is none.
    """

    is_loaded: bool
    reason: str


@functools.cache
def load_native() -> NativeKernel:
    """Return the native kernel, compiled if this machine has not done so before.

    Example:
        >>> load_native() is load_native()
        True
    """
    if os.environ.get(VARIABLE) == "portable":
        return NativeKernel(False, f"{VARIABLE}=portable")
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        return NativeKernel(False, f"no C++ compiler ({', '.join(_compilers())})")
    try:
        version = _run(compiler, "--version").splitlines()[0]
        library = ctypes.cdll.LoadLibrary(str(_compile(compiler, version)))
        handler = jax.ffi.pycapsule(getattr(library, _SYMBOL))
    except (OSError, subprocess.SubprocessError, AttributeError, IndexError) as error:
        return NativeKernel(False, f"{compiler} made no library: {_explain(error)}")
    jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
    return NativeKernel(True, f"compiled for this processor with {version}")


def _compilers() -> tuple[str, ...]:
    """Return names of compilers, those of the environment first."""
    return (*filter(None, [os.environ.get("CXX")]), "c++", "g++", "clang++")


def _compile(compiler: str, version: str) -> Path:
    """Return the library of this source, compiler and processor."""
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    flags = (*_FLAGS, "-mcpu=native" if is_arm else "-march=native")
    source = _SOURCE.read_bytes()
    parts = [version, flags, _describe_processor(), jaxlib.version.__version__]
    name = digest_bytes(canonical_json([digest_bytes(source), *parts])).removeprefix("sha256:")
    folder = Path(platformdirs.user_cache_dir("composable", appauthor=False)) / "kernels"
    library = folder / f"{name}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        _run(compiler, *flags, "-I", jax.ffi.include_dir(), str(_SOURCE), "-o", str(made))
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
