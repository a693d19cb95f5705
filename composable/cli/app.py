"""The Typer application: loads commands on demand and turns errors into exit codes.

A command's file is imported when the command is used. Deliberate errors of the library are printed
here and exit with 1, or with 75 (asked to stop) or 76 (another process failed) if the same command
again would go on; usage errors exit with 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Annotated, Any, Final

import click
import typer
from typer.core import TyperGroup
from typer.main import get_command

from composable.cli.commands import COMMANDS, format_help
from composable.cli.group import report_to_group
from composable.cli.output import note_warnings, show_error
from composable.errors import ComposableError, TextError
from composable.files.text import check_text

# 128 and the number of SIGINT, as shells have it.
_INTERRUPTED: Final = 130


class Commands(TyperGroup):
    """The group of all commands, each loaded on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the table."""
        return [name for panel in COMMANDS.values() for name in panel]

    def get_command(self, ctx: Any, name: str) -> Any:
        """Import the file of a command and return the command; None if there is none."""
        for panel in COMMANDS.values():
            if name in panel:
                return _load_commands(panel[name][0])[name]
        return None

    def get_help(self, ctx: Any) -> str:
        """Return the help; no command's file is imported for it."""
        return format_help().rstrip("\n")

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print warnings, and exit with an error's code after a deliberate one."""
        from composable.packaging.registry.budget import share_budget

        try:
            with note_warnings(), share_budget():
                return super().invoke(ctx)
        except ComposableError as error:
            show_error(error, ctx)
            report_to_group(error, ctx, error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            report_to_group(error, ctx, _INTERRUPTED)
            raise


@functools.cache
def _load_commands(file: str) -> dict[str, Any]:
    """Return the commands of a file, made once for all calls in a process."""
    home = importlib.import_module(f"composable.cli.{file}")
    commands: dict[str, Any] = get_command(home.app).commands  # type: ignore[attr-defined]
    for command in commands.values():
        _check_arguments(command)
    return commands


class _Text(click.types.StringParamType):
    """Text of an argument: UTF-8, unless it names a file, whose name may have any bytes."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the text.

        Raises:
            TextError: For bytes that are not UTF-8.
        """
        text = super().convert(value, param, ctx)
        try:
            return check_text(text, f"argument {param.human_readable_name}")
        except TextError:
            if os.path.exists(text):  # noqa: PTH110  Path.exists raises for a long text
                return text
            raise


def _check_arguments(command: Any) -> None:
    """Let every argument of a command that is text be checked."""
    for subcommand in getattr(command, "commands", {}).values():
        _check_arguments(subcommand)
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = _Text()


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
            "--version", "-V", callback=_show_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Build pretrained models from expert packages.

    Combine independently trained experts on a frozen backbone.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
