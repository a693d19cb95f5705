"""Every benchmark that is a command prints its help."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
COMMANDS = sorted(
    f"benchmarks.{path.relative_to(FOLDER).with_suffix('').as_posix().replace('/', '.')}"
    for path in FOLDER.rglob("*.py")
    if "\n    parser = argparse.ArgumentParser(" in path.read_text()
)


def test_there_is_something_to_check():
    assert len(COMMANDS) > 12
    assert "benchmarks.composition.__main__" in COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, monkeypatch, capsys):
    """In this process: most of them import jax, which takes a second at every start."""
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")
