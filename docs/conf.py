"""Sphinx configuration: MyST pages, furo, a reference from docstrings, and generated pages."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "reference" / "generated"

project = "composable"
author = "The composable authors"
copyright = "2026, the composable authors; Apache-2.0"
release = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build", "_build", "Thumbs.db"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
nitpicky = False
default_role = "literal"
# A linked notebook or source file becomes a download, and JSON with elisions is still JSON to us.
# Pages that a benchmark fills start their figures at the third level; names that a package exports
# again have two targets.
suppress_warnings = ["misc.highlighting_failure", "myst.header", "ref.python"]

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("References", "notes")]

html_theme = "furo"
html_title = "composable"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

# Records whose JSON schema the reference lists, if the class exists: (module, class, file).
RECORDS = (
    ("composable.vetting.card", "Card", "card.json"),
    ("composable.training.record", "TrainingRecord", ".work/training.json"),
    ("composable.demo.result", "DemoResult", "demo/result.json"),
)


def write_generated_pages() -> None:
    """Write the pages of the command line and of the JSON schemas."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    pages = {"command-line.md": format_commands(), "schemas.md": format_schemas()}
    for name, text in pages.items():
        path = GENERATED / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def format_commands() -> str:
    """Return a page with the help of every command, as `--help` prints it."""
    import click
    from typer.main import get_command

    from composable.cli.app import app
    from composable.cli.commands import COMMANDS, format_help

    def help_of(command: click.Command, name: str) -> str:
        command.rich_markup_mode = None
        context = click.Context(command, info_name=name, terminal_width=88, max_content_width=88)
        return f"```text\n{strip_markup(command.get_help(context)).rstrip()}\n```\n"

    root = get_command(app)
    context = click.Context(root, info_name="composable")
    parts = ["# Command line\n", f"```text\n{format_help().rstrip()}\n```\n"]
    for panel, commands in COMMANDS.items():
        parts.append(f"## {panel}\n")
        for name in commands:
            command = root.get_command(context, name)
            parts += [f"### {name}\n", help_of(command, f"composable {name}")]
            for inner, subcommand in sorted(getattr(command, "commands", {}).items()):
                parts += [f"#### {name} {inner}\n"]
                parts += [help_of(subcommand, f"composable {name} {inner}")]
    return "\n".join(parts)


def strip_markup(text: str) -> str:
    """Return help text without terminal control sequences."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def format_schemas() -> str:
    """Return a page with the JSON schemas of the records that are dataclasses."""
    from composable.files.records import record_schema

    parts = [
        "# JSON schemas\n",
        "Schemas of the JSON files that composable writes, generated from the dataclasses that"
        " read them. Readers ignore unknown fields, so later versions can add some.\n",
    ]
    for module, name, file in RECORDS:
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            continue
        if not dataclasses.is_dataclass(kind) or kind.__module__ != module:
            continue
        schema = json.dumps(record_schema(kind), indent=2, ensure_ascii=False)
        parts += [f"## {name}\n", f"`{file}`: {inspect.getdoc(kind).splitlines()[0]}\n"]
        parts += [f"```json\n{schema}\n```\n"]
    if len(parts) == 2:
        parts.append("No record of this version is generated from a dataclass.\n")
    return "\n".join(parts)


write_generated_pages()
