"""The demo, start to finish: contributors work apart, and a user installs what they published.

No mechanism is here: every step calls the library as a contributor or a user would.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import jax
from rich.console import Console
from rich.text import Text

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.compile_cache import use_compile_cache
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, Spliced, read_documents, splice_documents
from composable.corpora.recipe import shipped_folder
from composable.demo.contribution import LABEL_WIDTH, Contribution, run_contribution
from composable.demo.figure import write_readme_figure
from composable.demo.measure import PUBLIC, HeldOutTexts, list_claims, measure
from composable.demo.operator import REGISTRY, confirm_publications, create_registry, keys_of
from composable.demo.page import write_report
from composable.demo.properties import CAPACITY, Adversary, show_properties, vet_adversary
from composable.demo.result import DemoResult, PublishedExpert, write_result
from composable.demo.table import print_table
from composable.demo.trace import Trace
from composable.errors import ComposableError
from composable.files import atomic
from composable.model.model import Model, Pluggable
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sync import sync_project
from composable.packaging.versions.constraint import Requirement
from composable.progress import StageProgress, show_bars
from composable.vetting.evaluation import trace_routing

BACKBONE_NAME: Final = "tiny-bytes"
CONTRIBUTORS: Final = ("python-code", "set-mm", "legal")
STEPS: Final = 200
_SPLICED: Final = 8
_SEGMENT_BYTES: Final = (256, 640)
_SEGMENTS: Final = 4
_MARK: Final = ".composable-demo"
# Starts of texts of two domains, for the command that the demo ends with.
_PROMPTS: Final = (
    "import os\nimport sys\n\ndef main(",
    "syl.1 $e |- ( ph -> ps ) $.\nsyl.2 $e |- ( ps -> ch ) $.\nsyl $p |- ",
)
_PROMPT_FILE: Final = "prompts.jsonl"


def run_demo(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    json_file: Path | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo in a folder, and write `report.html` and `figure.png` there.

    Args:
        folder: Where registry, project and contributors are stored; emptied first if an earlier
            demo made it.
        seed: Seed of the experts' training and of the spliced texts.
        steps: Training steps per expert.
        json_file: Where to write the results as JSON, too.
        console: Where to print; standard error by default, so that only data is on standard
            output.

    Returns:
        The results.

    Raises:
        ComposableError: If the folder holds other files, or a step fails.
    """
    console = console or Console(stderr=True)
    folder = _prepare_folder(folder)
    loaded = load_backbone(BACKBONE_NAME)
    texts = read_held_out(seed)
    costs = StepCosts()
    with costs.record("contribute"):
        experts, adversary, peak_bytes = _contribute_all(console, folder, loaded, steps, seed)
    costs.memory["contribute"] = max(peak_bytes, costs.memory["contribute"])
    with costs.record("install"):
        project, plugged = _install(console, folder, loaded)
        model = loaded.plug(plugged, CAPACITY)
    with costs.record("measure"), _show_bar(console, "measure") as progress:
        measured = measure(model, texts, progress=progress)
    with costs.record("properties"), _show_bar(console, "properties") as progress:
        properties = show_properties(
            folder, loaded, project, plugged, texts, adversary, progress=progress
        )
    result = DemoResult(
        **vars(measured),
        properties=properties,
        claims=list_claims(measured, properties),
        seconds={step: round(value, 1) for step, value in costs.seconds.items()},
        step_rss_bytes=costs.memory,
        peak_rss_bytes=max(costs.memory.values()),
        seed=seed,
        steps=steps,
        machine=_describe_machine(),
        date=datetime.date.today().isoformat(),
        backbone=f"{loaded.interface.name} {loaded.interface.version}",
        experts=experts,
    )
    traces = _trace_documents(model, texts.spliced[:3])
    write_report(folder / "report.html", result, traces)
    write_readme_figure(folder / "figure.png", result, traces)
    if json_file is not None:
        write_result(json_file, result)
    print_result(console, result, folder / "report.html", project.root)
    return result


def read_held_out(seed: int) -> HeldOutTexts:
    """Return the held-out texts of the shipped experts and of the backbone.

    Args:
        seed: Seed of the spliced texts.
    """
    domains = {name: _read_held_out(name) for name in CONTRIBUTORS}
    public = _read_held_out(BACKBONE_NAME)
    spliced = splice_documents(
        {**domains, PUBLIC: public}, _SPLICED, seed, *_SEGMENT_BYTES, _SEGMENTS
    )
    return HeldOutTexts(domains=domains, public=public, spliced=spliced)


def print_result(console: Console, result: DemoResult, report: Path, project: Path) -> None:
    """Print the results, and a command to continue with.

    Args:
        console: Where to print.
        result: The results.
        report: The HTML report.
        project: Folder of the user's project.
    """
    print_table(result, console)
    console.print()
    for item in result.properties:
        mark = ("✓ ", "green") if item.passed else ("✗ ", "red")
        text = Text.assemble(mark, (item.name, "bold"), f"  {item.found}")
        console.print(text, highlight=False)
    for claim in result.claims:
        if not claim.holds:
            text = Text.assemble(
                ("does not hold: ", "red"), f"{claim.claim}: {claim.describe_found()}"
            )
            console.print(text, highlight=False)
    seconds = sum(result.seconds.values())
    command = f"{_program()} generate --prompts {_PROMPT_FILE} --temperature 0.8 --show-routing"
    continued = f"cd {shlex.quote(str(project))} && {command}"
    for line in (
        f"\n{seconds:.0f} s, {result.peak_rss_bytes / 1e9:.1f} GB at most",
        f"Report: {report}",
        "Continue a program and a theorem, coloured by expert:",
        continued,
    ):
        # Not wrapped, so that paths and commands can be copied.
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _program() -> str:
    """Return what starts this installation's command line: `make` leaves it outside of the path."""
    own = Path(sys.executable).with_name("composable")
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m composable.cli"
    return "composable" if shutil.which("composable") == str(own) else shlex.quote(str(own))


@dataclass(frozen=True)
class StepCosts:
    """What each step of the demo cost.

    Args:
        seconds: Wall time by step.
        memory: Peak resident memory in bytes by step.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def record(self, step: str) -> Iterator[None]:
        """Record the wall time of a step, and the peak memory of this process until its end."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start
        self.memory[step] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _prepare_folder(folder: Path) -> Path:
    """Return an empty demo folder; one that an earlier demo made is emptied."""
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise ComposableError(
                "the folder is not empty and was not made by the demo",
                where=str(folder),
                hint="name another folder",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    return folder


def _read_held_out(name: str) -> list[Document]:
    return read_documents([shipped_folder(name) / "text" / "heldout.jsonl"])


@contextmanager
def _show_bar(console: Console, label: str) -> Iterator[StageProgress]:
    """Show one bar and yield what moves it."""
    label = label.ljust(LABEL_WIDTH)
    with show_bars(is_transient=False, console=console) as update:
        update(label, 0, None)
        yield lambda stage, done, total: update(label, done, total, stage)


def _contribute_all(
    console: Console, folder: Path, loaded: LoadedBackbone, steps: int, seed: int
) -> tuple[dict[str, PublishedExpert], Adversary, int]:
    """Run the contributors side by side, and vet an adversarial expert meanwhile.

    That compiles the programs that the contributors need for their own checks. They read them from
    the folder where this process keeps them, but cannot write there.

    Returns:
        Their experts by name, the adversarial one, and the peak memory of a process in bytes.
    """
    programs = use_compile_cache()
    create_registry(folder, CONTRIBUTORS)
    contributions = [
        Contribution(
            folder=folder / "contributors" / name,
            backbone=loaded.folder,
            registry=folder / REGISTRY,
            keys=keys_of(folder, name),
            steps=steps,
            seed=seed,
            unreadable=shipped_folder(other) / "text" / "train.jsonl",
            programs=programs.resolve() if programs and programs.is_dir() else None,
            n_threads=max(1, _count_cores() // len(CONTRIBUTORS)),
        )
        for name, other in zip(CONTRIBUTORS, (*CONTRIBUTORS[1:], CONTRIBUTORS[0]), strict=True)
    ]
    with (
        show_bars(is_transient=False, console=console) as update,
        ThreadPoolExecutor(len(contributions)) as pool,
    ):
        running = [pool.submit(run_contribution, each, update) for each in contributions]
        label = "adversarial: check".ljust(LABEL_WIDTH)
        adversary = vet_adversary(
            folder / "contributors" / "adversarial",
            loaded,
            progress=lambda done, total: update(label, done, total),
        )
        published = [future.result() for future in running]
    confirm_publications(folder)
    for name, (expert, _) in zip(CONTRIBUTORS, published, strict=True):
        console.print(
            f"  published {name} {expert.version}, {expert.size_bytes / 1e6:.1f} MB; "
            f"process confined by {expert.confined_by}",
            highlight=False,
        )
    experts = {name: expert for name, (expert, _) in zip(CONTRIBUTORS, published, strict=True)}
    return experts, adversary, max(peak_bytes for _, peak_bytes in published)


def _count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _install(
    console: Console, folder: Path, loaded: LoadedBackbone
) -> tuple[Project, list[Pluggable]]:
    """Add, resolve, lock, install and load the experts, as a user in a new project."""
    root = folder / "project"
    root.mkdir()
    project = Project.create(root, BACKBONE_NAME, {"demo": "../registry"})
    for name in CONTRIBUTORS:
        project = project.add(Requirement.parse(f"{name}>=1.0,<2"))
    lock = lock_project(project, loaded.interface)
    environment = sync_project(project, lock, interface=loaded.interface)
    plugged = [load_expert(loaded, environment.expert_path(e.name)) for e in lock.experts]
    prompts = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in _PROMPTS)
    atomic.write_text(root / _PROMPT_FILE, prompts)
    names = ", ".join(f"{expert.name} {expert.version}" for expert in lock.experts)
    console.print(f"  resolved, locked and installed {names}", highlight=False)
    return project, plugged


def _trace_documents(model: Model, documents: Sequence[Spliced]) -> list[Trace]:
    """Return the router weights along documents."""
    weights = trace_routing(model, [document.text for document in documents])
    names = tuple(name or "" for name in model.names)
    return [
        Trace(document.text, document.segments, names, weight_TE)
        for document, weight_TE in zip(documents, weights, strict=True)
    ]


def _describe_machine() -> str:
    """Return processor, device and versions."""
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].platform}, "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )
