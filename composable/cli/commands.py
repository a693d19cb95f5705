"""The table of commands: their panels, the files that hold them, and the help built from it."""

from __future__ import annotations

# Panel -> command -> the file that holds it, and the first line of its docstring.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Use": {
        "generate": ("use", "Generate text from a prompt, or from each prompt in a file."),
        "chat": ("use", "Chat with a model; an empty line or end of input quits."),
        "doctor": ("doctor", "Show versions, devices, processes, mesh, compile cache and kernels."),
        "demo": ("use", "Train, publish, install and evaluate three experts, and write a report."),
    },
    "Project": {
        "init": ("project", "Create a project in the current directory."),
        "install": ("project", "Add experts to the project, lock and sync."),
        "add": ("project", "Add experts to composable.toml."),
        "remove": ("project", "Remove experts from composable.toml."),
        "lock": ("project", "Resolve versions and write composable.lock."),
        "sync": ("project", "Install the locked experts, updating the lock first if needed."),
        "upgrade": ("project", "Lock the newest compatible versions and sync."),
        "rollback": ("project", "Restore the previous environment."),
        "export": (
            "project",
            "Write the locked experts to a folder, for offline use.",
        ),
    },
    "Look": {
        "list": ("look", "List installed experts."),
        "tree": ("look", "Show the locked experts as a dependency tree."),
        "why": ("look", "Show which requirements lead to an expert."),
        "outdated": ("look", "List installed experts that have a newer release."),
        "search": ("look", "Search the registries by name, description and tags."),
        "info": ("look", "Show the details of a release."),
        "diff": ("diff", "Show what changed between two experts, or between two locks."),
        "audit": ("look", "Check the locked experts against advisories."),
        "bom": ("look", "Write a bill of materials: what the locked model consists of."),
        "resolve": ("look", "Resolve requirements against releases listed in a JSON file."),
    },
    "Contribute": {
        "new": ("contribute", "Create an expert from the template."),
        "train": ("train", "Train an expert on text; run again to resume."),
        "check": ("contribute", "Check an expert and write its card."),
        "merge": ("merge", "Merge experts that derive from one release into one."),
        "publish": ("contribute", "Publish a checked expert to a registry."),
        "propose": ("review", "Propose a change of a published expert to its maintainers."),
        "review": ("review", "List the proposals of a registry, or vet one of them."),
        "accept": ("review", "Publish a proposal that was reviewed, as the next release."),
        "reject": ("review", "Reject a proposal, and say why."),
        "yank": ("contribute", "Exclude a release from new resolutions."),
        "unyank": ("contribute", "Undo a yank."),
        "advise": ("contribute", "Publish an advisory on releases, or withdraw one."),
    },
    "Exchange": {
        "backbone": ("backbone", "Import, train and quantize backbones."),
        "import-peft": ("exchange", "Convert a PEFT adapter into an expert."),
        "export-hf": (
            "exchange",
            "Write a model as a Hugging Face folder, and list what is lost.",
        ),
    },
    "Registry": {
        "registry": ("registry", "Sign and copy registries; run and administer a registry server."),
    },
    "Store": {
        "verify": ("storage", "Verify the digests of all stored and installed files."),
        "cache": ("storage", "Manage the store, which all projects share."),
    },
}

_HEAD = """\
Usage: composable [OPTIONS] COMMAND [ARGS]...

  Build pretrained models from expert packages.

  Combine independently trained experts on a frozen backbone.

Options:
  -V, --version         Print the version.
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
