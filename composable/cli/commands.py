"""The table of commands: their panels, the files that hold them, and the help made of it."""

from __future__ import annotations

# Panel -> command -> the file that holds it, and the first line of its docstring.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
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
        "export": ("project", "Write all that is installed, to carry to an offline machine."),
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

_HEAD = """\
Usage: composable [OPTIONS] COMMAND [ARGS]...

  Grow a pretrained model the way open source grows.

  Experts that never met, plugged together.

Options:
  -V, --version         Show the version.
  --install-completion  Install completion for the current shell.
  --show-completion     Show completion for the current shell, to copy it or
                        customize the installation.
  -h, --help            Show this message and exit.
"""


def format_help() -> str:
    """Return the help of the command line as a whole: its options, and its commands by panel."""
    width = max(len(name) for commands in COMMANDS.values() for name in commands)
    panels = (
        f"\n{panel}:\n"
        + "".join(f"  {name.ljust(width)}  {text}\n" for name, (_, text) in commands.items())
        for panel, commands in COMMANDS.items()
    )
    return _HEAD + "".join(panels)
