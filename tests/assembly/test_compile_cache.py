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
    # Two programs for chunks, two for single tokens, and few beside: each costs every later start
    # its tracing.
    assert 4 < n_programs == n_compiled <= 12

    # A process that is killed while it writes leaves a program without the time of its last use.
    folder = tmp_path / "composable" / "programs"
    (folder / "jit_orphan-0-cache").write_bytes(b"half a program")
    lost = max(programs(tmp_path), key=programs(tmp_path).__getitem__)
    (folder / lost).with_name(lost.removesuffix("-cache") + "-atime").unlink()
    assert finish(start(loaded, tmp_path)) == (text, n_programs, 1)

    together = [start(loaded, tmp_path) for _ in range(2)]
    assert [finish(process) for process in together] == [(text, n_programs, 0)] * 2
    assert "jit_orphan-0-cache" not in programs(tmp_path)


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
