"""The sandbox, in real processes: each test confines a child and reports what it could still do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composable.demo import sandbox

pytestmark = pytest.mark.slow

ROOT = Path(sandbox.__file__).parents[2]
MECHANISMS = {
    "landlock": "",
    "audit-hook": "sandbox._landlock_abi = lambda: 0",
}
PREAMBLE = """
import json, os, sys
from pathlib import Path
from composable.demo import sandbox

own, other, programs = (Path(sys.argv[1], name) for name in ("own", "other", "programs"))

def attempt(action):
    try:
        return repr(action())
    except OSError as error:
        return type(error).__name__

"""
ATTEMPTS = {
    "read own": "(own / 'text').read_text()",
    "list own": "os.listdir(own)",
    "write own": "(own / 'new').write_text('x')",
    "rename own": "(own / 'new').rename(own / 'newer').name",
    "move own": "(own / 'newer').rename(own / 'sub' / 'newest').name",
    "remove own": "(own / 'sub' / 'newest').unlink()",
    "discard": "Path(os.devnull).write_text('x')",
    "read programs": "(programs / 'text').read_text()",
    "list programs": "os.listdir(programs)",
    "write programs": "(programs / 'new').write_text('x')",
    "change programs": "(programs / 'text').write_text('x')",
    "remove programs": "(programs / 'text').unlink()",
    "read other": "(other / 'text').read_text()",
    "read other through a link": "(own / 'link').read_text()",
    "list other": "os.listdir(other)",
    "scan other": "list(os.scandir(other))",
    "write other": "(other / 'text').write_text('x')",
    "make other": "(other / 'folder').mkdir()",
    "take other": "(other / 'text').rename(own / 'taken')",
    "link other": "os.link(other / 'text', own / 'taken')",
    "remove other": "(other / 'text').unlink()",
    "truncate other": "os.truncate(other / 'text', 0)",
    "write beside": "(own.parent / 'beside').write_text('x')",
    "write into the package": "Path(sandbox.__file__).with_suffix('.x').write_text('x')",
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    (tmp_path / "own" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "programs").mkdir()
    for name in ("own", "other", "programs"):
        (tmp_path / name / "text").write_text(f"text of {name}")
    (tmp_path / "own" / "link").symlink_to(tmp_path / "other" / "text")
    return tmp_path


@pytest.fixture
def confined(folders: Path) -> Callable[..., Any]:
    def run(code: str, mechanism: str = "landlock") -> Any:
        if mechanism == "landlock" and not sandbox._landlock_abi():
            pytest.skip("this kernel has no Landlock")
        setup = f"{MECHANISMS[mechanism]}\nname = sandbox.restrict(read=[*sandbox.python_paths(), "
        setup += "programs], "
        done = subprocess.run(
            [sys.executable, "-c", f"{PREAMBLE}{setup}write=[own])\n{code}", str(folders)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            cwd=folders / "own",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_only_the_given_folders_are_open(
    mechanism: str, confined: Callable[..., Any], folders: Path
) -> None:
    attempts = ", ".join(f"{name!r}: attempt(lambda: {do})" for name, do in ATTEMPTS.items())
    found = confined(f"print(json.dumps({{{attempts}}}))", mechanism)

    assert found.pop("read own") == "'text of own'"
    assert "text" in found.pop("list own")
    assert found.pop("write own") == "1"
    assert found.pop("rename own") == "'newer'"
    assert found.pop("move own") == "'newest'"
    assert found.pop("remove own") == "None"
    assert found.pop("discard") == "1"
    assert found.pop("read programs") == "'text of programs'"
    assert found.pop("list programs") == "['text']"
    # The kernel calls a move between folders with unlike rights a move between devices.
    assert found.pop("take other") in ("PermissionError", "OSError")
    assert found.pop("link other") in ("PermissionError", "OSError")
    assert found == dict.fromkeys(found, "PermissionError")
    assert (folders / "other" / "text").read_text() == "text of other"
    assert [path.name for path in (folders / "other").iterdir()] == ["text"]


def test_children_and_threads_are_confined_too(confined: Callable[..., Any]) -> None:
    found = confined(
        """
import subprocess
from concurrent.futures import ThreadPoolExecutor
cat = lambda path: subprocess.run(["cat", path], capture_output=True, text=True).stdout
with ThreadPoolExecutor(1) as pool:
    in_thread = pool.submit(attempt, (other / "text").read_text).result()
shell = os.system(f"cat {other}/text 2>{os.devnull}")
print(json.dumps([cat(own / "text"), cat(other / "text"), shell != 0, in_thread]))
"""
    )
    assert found == ["text of own", "", True, "PermissionError"]


def test_the_audit_hook_starts_no_process(confined: Callable[..., Any]) -> None:
    code = "print(json.dumps(attempt(lambda: os.system('true'))))"
    assert confined(code, "audit-hook") == "PermissionError"


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_there_is_no_network(mechanism: str, confined: Callable[..., Any]) -> None:
    if mechanism == "landlock" and sandbox._landlock_abi() < 4:
        pytest.skip("this kernel's Landlock leaves the network alone")
    code = """
import socket
print(json.dumps(attempt(lambda: socket.create_connection(("127.0.0.1", 9), timeout=1))))
"""
    assert confined(code, mechanism) == "PermissionError"


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_jax_computes_inside(mechanism: str, confined: Callable[..., Any]) -> None:
    found = confined(
        """
import jax
total = float(jax.jit(lambda x_D: (x_D * x_D).sum())(jax.numpy.ones(8)))
print(json.dumps([name, total, attempt((other / "text").read_text)]))
""",
        mechanism,
    )
    name = "Landlock" if mechanism == "landlock" else "Python audit hook"
    assert found[0].startswith(name)
    assert found[1:] == [8.0, "PermissionError"]


def test_texts_of_experts_stay_unreadable(confined: Callable[..., Any]) -> None:
    text = ROOT / "experts" / "_template" / "README.md"
    if not text.is_file():
        pytest.skip("not run from a checkout")
    code = f"print(json.dumps(attempt(Path({str(text)!r}).read_text)))"
    assert confined(code) == "PermissionError"


def test_it_comes_before_other_threads(folders: Path) -> None:
    code = """
import threading
release = threading.Event()
threading.Thread(target=release.wait).start()
try:
    sandbox.restrict(read=[], write=[own])
except sandbox.SandboxError as error:
    print(json.dumps([str(error), attempt((other / "text").read_text)]))
release.set()
"""
    out = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, str(folders)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    ).stdout
    message, read = json.loads(out)
    assert "2 threads" in message
    assert read == "'text of other'"


@pytest.mark.parametrize("is_installed", [True, False])
def test_packages_are_covered_but_for_the_texts(
    is_installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both layouts: an installed wheel, and a checkout with its own virtual environment."""
    site = tmp_path / ".venv" / "site-packages"
    package = (site if is_installed else tmp_path) / "composable"
    texts = (package if is_installed else tmp_path) / "experts"
    for folder in (site / "numpy", package / "model", texts / "legal", tmp_path / "work"):
        folder.mkdir(parents=True)
    if not is_installed:
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(sandbox, "_PACKAGE", package)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(site), *sys.path])

    def is_covered(path: Path) -> bool:
        return any(path.is_relative_to(root) for root in sandbox.python_paths())

    assert is_covered(site / "numpy")
    assert is_covered(package / "model")
    assert not is_covered(texts / "legal")
    assert not is_covered(tmp_path / "work")
    assert is_covered(site) != is_installed
    assert site in sandbox._module_folders()


def test_no_right_is_named_to_a_kernel_that_does_not_know_it() -> None:
    count = {abi: sandbox._known_rights(abi).bit_count() for abi in range(1, 8)}
    assert count == {1: 13, 2: 14, 3: 15, 4: 15, 5: 16, 6: 16, 7: 16}
