"""What holds for all commands: help, start-up, exit codes, the forms of an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import composable
from composable.cli.app import Commands
from composable.cli.commands import COMMANDS
from composable.cli.main import run

ALL = [(name, text) for panel in COMMANDS.values() for name, (_, text) in panel.items()]


def run_python(*arguments):
    """Run Python in a process of its own that finds this very package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(composable.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_bare_command_prints_help(works):
    assert works().out == works("--help").out


def test_help_needs_no_typer(works, monkeypatch, capsys):
    """What is printed at once is what Typer would print."""
    for arguments in ([], ["-h"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["composable", *arguments])
        run()
        assert capsys.readouterr().out == works("--help").out
    loaded = "import sys, composable.cli.main; print('typer' in sys.modules)"
    assert run_python("-c", loaded).stdout == "False\n"


def test_help_tells_of_every_option(works):
    from typer.main import get_command

    from composable.cli.app import app

    text = works("--help").out
    for parameter in get_command(app).params:
        assert parameter.opts[0] in text
        assert parameter.help.rstrip(".") in " ".join(text.split())


def test_help_lists_every_command_under_its_panel(works):
    lines = works("--help").out.splitlines()
    for panel, commands in COMMANDS.items():
        start = lines.index(f"{panel}:")
        shown = [line.split()[0] for line in lines[start + 1 : start + 1 + len(commands)]]
        assert shown == list(commands)


@pytest.mark.parametrize(("name", "text"), ALL)
def test_table_says_what_the_command_says_of_itself(works, name, text):
    assert text in works(name, "--help").out


def test_version(works):
    assert works("--version").out == f"composable {composable.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("sync", "--nonsense"),
        ("install",),
        ("resolve", "--universe", "nowhere.json"),
        ("yank", "german>=1.0", "--registry", "registry"),
        ("publish", "my-expert"),
        ("init", "--registry", "one", "--registry", "two"),
    ],
)
def test_wrong_usage_exits_with_2(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "Usage:" in outcome.err
    assert not outcome.out


def test_error_is_one_message_on_standard_error(cli):
    outcome = cli("list")
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert "\n  hint: run `composable init`" in outcome.err
    assert not outcome.out


def test_error_is_json_where_json_was_asked_for(cli):
    outcome = cli("list", "--json")
    assert outcome.code == 1
    assert outcome.json["error"]["kind"] == "MissingProjectError"
    assert outcome.json["error"]["hint"].startswith("run `composable init`")
    assert not outcome.err


def test_interrupt_exits_with_130_and_says_nothing(cli, monkeypatch):
    def interrupt(self, ctx, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(Commands, "get_command", interrupt)
    outcome = cli("list")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")


def test_bug_keeps_its_traceback(cli, monkeypatch):
    def fail(self, ctx, name):
        raise ZeroDivisionError

    monkeypatch.setattr(Commands, "get_command", fail)
    with pytest.raises(ZeroDivisionError):
        cli("list")


def test_packaging_commands_import_no_jax_and_help_imports_next_to_nothing(project):
    program = """
import sys
from typer.testing import CliRunner
from composable.cli.app import app

def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)

run("--help")
heavy = {"jax", "flax", "numpy", "rich", "composable.packaging"} & set(sys.modules)
assert not heavy, heavy
for line in open("commands"):
    run(*line.split())
heavy = {"jax", "flax", "optax"} & set(sys.modules)
assert not heavy, heavy
"""
    commands = """\
install german<2 physics
add german<3
remove german
lock --upgrade
sync --frozen
tree
why german
list
outdated
search german
info german@1.2.0
upgrade
yank german@1.0.0 --registry registry
unyank german@1.0.0 --registry registry
publish experts/german-1.0.0 --registry registry
new my-expert
verify
cache list
cache prune
cache dir
"""
    (project / "commands").write_text(commands)
    done = run_python("-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr


def test_module_runs_as_the_command():
    done = run_python("-m", "composable.cli", "info", "german", "--registry", "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
