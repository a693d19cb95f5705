"""`composable`: the table of commands, and what holds for all of them.

A command's file is imported when the command is asked for, so that `composable --help` costs what
Typer costs. Errors that the library raises on purpose are printed here and exit with 1; errors of
usage exit with 2; anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from composable.cli.output import show_error
from composable.errors import ComposableError

# Panel -> command -> the file that holds it, and the first line of its docstring.
COMMANDS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Use": {
        "generate": ("use", "Continue a text, or every text of a file."),
        "chat": ("use", "Talk with a model; an empty line or the end of input ends it."),
        "demo": ("use", "Run the main job from start to finish and report on it."),
    },
    "Project": {
        "init": ("project", "Make this directory a project."),
        "install": ("project", "Add experts, lock and sync."),
        "add": ("project", "Ask for experts in composable.toml."),
        "remove": ("project", "Stop asking for experts in composable.toml."),
        "lock": ("project", "Choose versions and write composable.lock."),
        "sync": ("project", "Install what is locked, locking first where that is needed."),
        "upgrade": ("project", "Lock the newest versions that fit, and sync."),
        "rollback": ("project", "Go back to what was installed before."),
    },
    "Look": {
        "list": ("look", "List what is installed."),
        "tree": ("look", "Show what is locked as a tree."),
        "why": ("look", "Show who asks for an expert."),
        "outdated": ("look", "List experts of which there is a newer release."),
        "search": ("look", "Search the registries by name, description and tags."),
        "info": ("look", "Show what a registry tells of an expert."),
        "resolve": ("look", "Resolve a universe given as a JSON file."),
    },
    "Contribute": {
        "new": ("contribute", "Start an expert from the template."),
        "train": ("contribute", "Train an expert on your text; run again to resume."),
        "check": ("contribute", "Vet an expert and write its card."),
        "publish": ("contribute", "Publish a vetted expert to a registry."),
        "yank": ("contribute", "Withdraw a release from new resolutions."),
        "unyank": ("contribute", "Take back a yank."),
    },
    "Exchange": {
        "backbone": ("backbone", "Take over other people's backbones."),
        "import-peft": ("exchange", "Make an expert of a PEFT adapter."),
        "export-hf": (
            "exchange",
            "Write a model as a Hugging Face folder, and say what is lost.",
        ),
    },
    "Store": {
        "verify": ("storage", "Read every stored and installed file and find damage."),
        "cache": ("storage", "Look into the store, which all projects share."),
    },
}


class Commands(TyperGroup):
    """The group of all commands, loaded one by one."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the table."""
        return [name for panel in COMMANDS.values() for name in panel]

    def get_command(self, ctx: Any, name: str) -> Any:
        """Import the file that holds a command and return the command; None for none."""
        for panel in COMMANDS.values():
            if name in panel:
                home = importlib.import_module(f"composable.cli.{panel[name][0]}")
                return get_command(home.app).commands[name]  # type: ignore[attr-defined]
        return None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands into the help, by panel and without importing any."""
        width = max(map(len, self.list_commands(ctx)))
        for panel, commands in COMMANDS.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(width), row[1]) for name, row in commands.items()])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print a deliberate error and exit with 1."""
        try:
            return super().invoke(ctx)
        except ComposableError as error:
            show_error(error, ctx)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="composable",
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        from composable import __version__

        print(f"composable {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def composable(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Grow a pretrained model the way open source grows.

    Experts that never met, plugged together.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def run() -> None:
    """Run the command line."""
    app(prog_name="composable")
