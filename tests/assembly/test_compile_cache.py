"""The cache of compiled programs, in real processes: what each of them still compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest

from composable.assembly.compile_cache import use_compile_cache

ROOT = Path(__file__).parents[2]
# Runs a command, and prints how many programs it asked for, and how many of them it compiled.
COUNT = """
import json, sys
from collections import Counter
import jax
events = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.update([event]))
from composable.cli.main import run
try:
    run()
except SystemExit as error:
    assert not error.code, error.code
n_programs = events["/jax/core/compile/backend_compile_duration"]
n_read = events["/jax/compilation_cache/cache_hits"]
print(json.dumps([n_programs, n_programs - n_read]), file=sys.stderr)
"""

# Writes text, and prints the programs that were needed until the model was there, until its first
# token, and until its last; then what was imported for it.
WRITE = """
import json, sys
import jax
programs = [[]]
def note(event, *_, fun_name=None, **__):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        programs[-1].append(fun_name)
jax.monitoring.register_event_duration_secs_listener(note)
import composable as cx
model = cx.load(sys.argv[1], experts=[])
programs.append([])
pieces = model.stream("quick brown foxes jumped over lazy dogs", 3)
next(pieces)
programs.append([])
list(pieces)
print(json.dumps([programs, list(sys.modules)]))
"""
# What a start may import: rooms of this package, and libraries that take long.
ROOMS = {"errors", "interface", "files", "packaging", "parallel", "kernels", "model", "corpora"}
ROOMS |= {"assembly", "printable", "progress"}
LONG = {"jax.experimental.pallas", "jax.experimental.pallas.tpu", "jax.experimental.pallas.triton"}
LONG |= {"grain", "orbax", "scipy", "tokenizers", "torch", "transformers", "typer", "tuf"}


@pytest.fixture
def unconfigured():
    """Run a test as where no setting names a cache; restore the settings afterwards."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_enable_compilation_cache", before[1])


def start(loaded, cache: Path) -> subprocess.Popen[str]:
    """Start `generate` as a user without any settings of jax's cache would."""
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    command = ["generate", "quick brown foxes jumped over lazy dogs", "--max-tokens", "3"]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", COUNT, *command, "--backbone", str(loaded.folder)],
        env={**kept, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)},
        cwd=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, int, int]:
    """Return what a process wrote, the programs it needed, and those it compiled."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, *json.loads(err.splitlines()[-1])


def programs(cache: Path) -> Mapping[str, int]:
    folder = cache / "composable" / "programs"
    return {path.name: path.stat().st_size for path in folder.glob("*-cache")}


def test_the_second_process_compiles_nothing(loaded, tmp_path):
    text, n_programs, n_compiled = finish(start(loaded, tmp_path))
    # Two programs for chunks, two for single tokens, and five beside, as a test below has them.
    assert n_programs == n_compiled == 9

    # A process that is killed while it writes leaves a program without the time of its last use.
    folder = tmp_path / "composable" / "programs"
    (folder / "jit_orphan-0-cache").write_bytes(b"half a program")
    lost = max(programs(tmp_path), key=programs(tmp_path).__getitem__)
    (folder / lost).with_name(lost.removesuffix("-cache") + "-atime").unlink()
    assert finish(start(loaded, tmp_path)) == (text, n_programs, 1)

    together = [start(loaded, tmp_path) for _ in range(2)]
    assert [finish(process) for process in together] == [(text, n_programs, 0)] * 2
    assert "jit_orphan-0-cache" not in programs(tmp_path)


@pytest.fixture(scope="module")
def written(loaded):
    """Return what was needed to write a text: programs in three lists, and modules."""
    command = [sys.executable, "-c", WRITE, str(loaded.folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_the_first_token_waits_for_no_program_that_it_does_not_need(written):
    """Each costs every later start its tracing, which no cache of programs saves."""
    loading, first, others = written[0]
    assert loading == ["jit(empty_bank)"]
    seed = ["jit(stage)", "jit(_threefry_seed)"]
    assert first == ["jit(_start_mix)", *seed, "jit(_read)", "jit(_predict)", "jit(_draw_next)"]
    # Tokens that were drawn are read one by one.
    assert others == ["jit(_read)", "jit(_predict)"]


def test_a_start_imports_no_more_than_it_needs(written):
    modules = set(written[1])
    assert modules & LONG == set()
    assert {name.split(".")[1] for name in modules if name.startswith("composable.")} <= ROOMS


def test_settings_of_jax_are_respected():
    configured = jax.config.jax_compilation_cache_dir
    assert use_compile_cache() == Path(configured)
    assert jax.config.jax_compilation_cache_dir == configured


def test_it_can_be_turned_off(unconfigured):
    jax.config.update("jax_enable_compilation_cache", False)
    assert use_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_not_used(unconfigured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert use_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
