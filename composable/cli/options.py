"""Options and arguments that several commands share, or that need more than a line to declare.

A declaration is an annotated type: commands use it as the type of a parameter. Options of one
command with a short declaration stay with the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from composable.errors import ComposableError

# Key of the Click context under which the index of a process of a group is recorded, so that errors
# name it.
PROCESS: Final = "composable.process"
# Key of the Click context under which --json is recorded, so that errors are printed as JSON too.
AS_JSON: Final = "composable.is_json"


def _record_json(ctx: typer.Context, value: bool) -> bool:
    """Record in the context whether --json was given, for errors raised later."""
    ctx.meta[AS_JSON] = value
    return value


def complete_names(incomplete: str) -> list[str]:
    """Return the project's experts whose names start with a prefix, for shell completion."""
    from composable.packaging.project.project import Project

    try:
        project = Project.find()
        names = {*project.experts, *(project.lock.versions if project.lock else ())}
    except ComposableError:
        return []  # no project, or an unreadable one: nothing to complete
    return sorted(name for name in names if name.startswith(incomplete))


# All commands.
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON, including errors.", callback=_record_json),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing except errors.")]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Do not use the network.", envvar="COMPOSABLE_OFFLINE"),
]
MaxStale = Annotated[
    float,
    typer.Option(
        "--max-stale",
        metavar="DAYS",
        min=0,
        help="Accept signatures that expired up to this many days ago, for rare mirrors.",
        envvar="COMPOSABLE_MAX_STALE",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would change, without writing anything.")
]

# Projects.
Requirements = Annotated[
    list[str],
    typer.Argument(
        metavar="REQ...",
        help="NAME, 'NAME>=1.2,<2', NAME@1.2.0, 'NAME[EXTRA]', or the folder of an expert.",
        show_default=False,
    ),
]
RegistryName = Annotated[
    str | None,
    typer.Option("--registry", metavar="NAME", help="Project registry to take the experts from."),
]
Editable = Annotated[
    bool, typer.Option("--editable", "-e", help="Use expert folders in place, without copying.")
]
ExcludeNewer = Annotated[
    str | None,
    typer.Option(
        metavar="DATE",
        help="Ignore releases published after DATE.",
        envvar="COMPOSABLE_EXCLUDE_NEWER",
        show_default=False,
    ),
]
LookupRegistry = Annotated[
    str | None,
    typer.Option(
        "--registry", metavar="LOCATION", help="Registry to use instead of the project's."
    ),
]

# Models.
Experts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REQ",
        help="Expert to load; repeatable. Default: the experts installed in the project.",
        show_default=False,
    ),
]
Backbone = Annotated[
    str | None, typer.Option(metavar="NAME|DIR", help="Backbone. Default: the project's.")
]
ExpertsRegistry = Annotated[
    str | None,
    typer.Option(
        "--registry", metavar="DIR|URL", help="Registry for --experts. Default: the project's."
    ),
]
Alone = Annotated[
    bool, typer.Option("--alone", help="Use the backbone without experts; needs no project.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="Sampling temperature; 0 selects the most likely token.")
]
TopP = Annotated[
    float,
    typer.Option(help="Sample from the most likely tokens with this total probability."),
]
TopK = Annotated[
    int, typer.Option(min=0, help="Sample from this many most likely tokens; 0 for no limit.")
]
MinP = Annotated[
    float,
    typer.Option(
        help="Sample from tokens at least this many times as probable as the most likely one."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Make tokens that already occur less likely (over 1); also at temperature 0."
    ),
]
SamplingSeed = Annotated[int, typer.Option(help="Random seed for sampling.")]
Safe = Annotated[
    bool,
    typer.Option(
        "--safe",
        help="Use safe mode: reads more slowly, with a bound on the loss against the backbone.",
    ),
]
ShowRouting = Annotated[
    bool, typer.Option("--show-routing", help="Show the expert with the largest router weight.")
]

# Contributors.
ExpertFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the expert.", show_default=False)
]
# An option takes one value, so `--data *.txt` leaves the other files as arguments.
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data", metavar="FILES", help="Text: files or folders; repeatable.", show_default=False
    ),
]
MoreData = Annotated[
    list[Path] | None,
    typer.Argument(metavar="FILES", help="More text, as for --data.", show_default=False),
]
ExpertBackbone = Annotated[
    str | None,
    typer.Option(
        "--backbone", metavar="NAME|DIR", help="Backbone. Default: the one in expert.toml."
    ),
]
ReferenceRegistry = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="LOCATION",
        help="Registry for the releases compared with. Default: the project's registries.",
        show_default=False,
    ),
]
ParentRegistry = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="LOCATION",
        help="Registry for the release of derives-from. Default: the project's registries.",
        show_default=False,
    ),
]
PublishRegistry = Annotated[
    str,
    typer.Option(
        "--registry",
        metavar="LOCATION",
        help="Registry: a folder, a bucket, a server, oci://HOST/REPO or hf://OWNER/REPO.",
        envvar="COMPOSABLE_REGISTRY",
        show_default=False,
    ),
]
Release = Annotated[str, typer.Argument(metavar="NAME@VERSION", show_default=False)]
InboxRegistry = Annotated[
    str,
    typer.Argument(
        metavar="REGISTRY", help="A folder, or the URL of a bucket or server.", show_default=False
    ),
]
ProposalId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="The first digits of its id; or the expert, if one proposal of it is open.",
        show_default=False,
    ),
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REQ|DIR|all",
        help="Also check with this published expert installed, or with all of them; repeatable.",
        show_default=False,
    ),
]
BesideData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE", help="Held-out text of an expert of --beside.", show_default=False
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Processes for --beside. Default: what cores and memory allow; one for few experts.",
        show_default=False,
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of what --beside measured. Default: in your cache.",
        show_default=False,
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only measure part I of N of the experts of --beside, and write no card.",
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[@V]|DIR",
        help="Also check the version bump required since this release.",
        show_default=False,
    ),
]

# Runs of many processes and devices.
MeshSizes = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXIS=N,...",
        help="Devices along data, fsdp, tensor, expert; -1 for the rest. Default: all along data.",
        show_default=False,
    ),
]
Accumulate = Annotated[
    int,
    typer.Option(
        min=1,
        help="Run the sequences of a step in N parts, to need less memory.",
        metavar="N",
    ),
]
CheckpointHome = Annotated[
    str | None,
    typer.Option(
        "--checkpoints",
        metavar="DIR|gs://BUCKET/PATH",
        help="Where checkpoints are kept, seen by all processes. Default: beside the curves.",
        show_default=False,
    ),
]
PlanTopology = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="TOPOLOGY",
        help="Train nothing: compile a step for TPUs such as v5e:4x4, and print what it costs.",
        show_default=False,
    ),
]
Report = Annotated[
    bool,
    typer.Option(
        "--report", help="Train nothing: print where the time of this training went, and draw it."
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Address of process 0 in a run of many processes. Default: detected.",
        show_default=False,
    ),
]
NumProcesses = Annotated[
    int | None, typer.Option(min=1, help="Number of processes.", show_default=False)
]
ProcessId = Annotated[
    int | None, typer.Option(min=0, help="Index of this process.", show_default=False)
]
InitTimeout = Annotated[
    float, typer.Option(min=1, help="Seconds that all processes have to start.")
]

# Exchange with other formats.
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file.",
        show_default=False,
    ),
]
Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="Folder with adapter_config.json and adapter_model.safetensors.",
        show_default=False,
    ),
]
AdapterBackbone = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="NAME|DIR",
        help="Backbone that the adapter was trained on.",
        show_default=False,
    ),
]
AdapterBase = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[@REVISION]",
        help="Require this base model in adapter_config.json.",
        show_default=False,
    ),
]
AdapterName = Annotated[
    str | None,
    typer.Option("--name", help="Name of the expert. Default: the folder's.", show_default=False),
]
Sample = Annotated[
    list[Path],
    typer.Option(
        metavar="TEXT",
        help="Text of the adapter's domain: a file, a .jsonl file or a folder; repeatable.",
        show_default=False,
    ),
]
PackageName = Annotated[str, typer.Option("--name", help="Package name.", show_default=False)]
PackageVersion = Annotated[str, typer.Option("--version", help="Package version.")]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Output folder. Default: the name.", show_default=False
    ),
]
License = Annotated[
    str,
    typer.Option(
        "--license",
        help="SPDX licence identifier. Default: the one in SOURCE.",
        show_default=False,
    ),
]
AdapterLicense = Annotated[
    str, typer.Option("--license", help="SPDX licence identifier.", show_default=False)
]
Description = Annotated[
    str, typer.Option("--description", help="Description in one line.", show_default=False)
]
Tap = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of trunk layers. Default: a quarter of all layers.", show_default=False
    ),
]
PublicText = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE|DIR",
        help="Public text for the scout and the anchor. Default: speeches, fetched with npm.",
        show_default=False,
    ),
]
ScoutTokens = Annotated[
    int, typer.Option("--scout-tokens", min=1, help="Tokens of text to train the scout on.")
]
StoredDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="F32|BF16",
        help="Data type of the written weights. Default: one that loses nothing.",
        show_default=False,
    ),
]
ComputeDtype = Annotated[
    str, typer.Option(metavar="F32|BF16", help="Data type of the computation.")
]
BeginToken = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Token at the start of a document. Default: the one in SOURCE.",
        show_default=False,
    ),
]
Merge = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Merge this expert into the backbone. Default: write a mixture of all experts.",
        show_default=False,
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        metavar="mixtral|qwen3_moe|flex_olmo",
        help="Layout of a mixture. Default: the one that fits.",
        show_default=False,
    ),
]
RouterText = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="TEXT",
        help="Text of all domains to fit the routers on; repeatable. Default: the anchor.",
        show_default=False,
    ),
]
