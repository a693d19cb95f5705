"""The main job, start to finish: contributors who never meet, and a user who plugs them together.

Nothing here is a mechanism of its own: every step calls the library as a contributor, a user or a
sceptic would.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, Spliced, read_documents, splice_documents
from composable.corpora.recipe import shipped_folder
from composable.demo.figure import write_readme_figure
from composable.demo.measure import PUBLIC, claims_of, measure
from composable.demo.page import write_report
from composable.demo.properties import CAPACITY, show_properties
from composable.demo.table import print_table
from composable.demo.trace import Trace
from composable.errors import ComposableError, TrainingError
from composable.model.model import Model, Pluggable
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sync import sync_project
from composable.packaging.versions.constraint import Requirement
from composable.vetting.evaluation import trace_routing

BACKBONE_NAME: Final = "tiny-bytes"
CONTRIBUTORS: Final = ("python-code", "set-mm", "legal")
STEPS: Final = 200
_SPLICED: Final = 8
_SEGMENT_BYTES: Final = (256, 640)
_SEGMENTS: Final = 4


def run_demo(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    json_file: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo in a folder and write `report.html` there.

    Args:
        folder: Where registry, project and contributors live; emptied first if an earlier demo
            made it.
        seed: Seed of the experts' training and of the spliced documents.
        steps: Training steps per expert.
        json_file: Where to write all figures, too.
        console: Where to print; standard error by default, so that nothing but data is on
            standard output.

    Returns:
        All figures.

    Raises:
        ComposableError: If the folder holds something else, or a step fails.
    """
    console = console or Console(stderr=True)
    folder = _fresh(folder)
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    loaded = load_backbone(BACKBONE_NAME)
    texts = {name: _heldout(name) for name in (*CONTRIBUTORS, BACKBONE_NAME)}
    public = texts.pop(BACKBONE_NAME)
    spliced = splice_documents(
        {**texts, PUBLIC: public}, _SPLICED, seed, *_SEGMENT_BYTES, _SEGMENTS
    )

    registry = folder / "registry"
    experts = {}
    for name in CONTRIBUTORS:
        with _timed(console, seconds, f"contribute {name}"):
            experts[name] = _contribute(console, folder, loaded, registry, name, steps, seed)
        memory[f"contribute {name}"] = experts[name].pop("peak_rss_bytes")
    with _timed(console, seconds, "install"):
        model, plugged, project = _install(console, folder, loaded, registry)
    memory["install"] = _peak_memory()
    with _timed(console, seconds, "measure"), _bar(console, "measure") as show:
        result = measure(model, texts, public, spliced, progress=show)
    memory["measure"] = _peak_memory()
    with _timed(console, seconds, "properties"), _bar(console, "properties") as show:
        result["properties"] = show_properties(
            folder, loaded, project, plugged, public, spliced, progress=show
        )
    memory["properties"] = _peak_memory()
    result["claims"] = claims_of(result)
    traces = _traces(model, spliced[:3])
    result |= {
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
        "step_rss_bytes": memory,
        "peak_rss_bytes": max(memory.values()),
        "seed": seed,
        "steps": steps,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].platform}, "
        f"jax {jax.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "backbone": f"{loaded.interface.name} {loaded.interface.version}",
        "experts": experts,
    }
    print_table(result, console)
    _print_properties(console, result["properties"])
    for claim in result["claims"]:
        if not claim["holds"]:
            console.print(f"[red]does not hold:[/] {claim['claim']}: {claim['found']}")
    write_report(folder / "report.html", result, traces)
    write_readme_figure(folder / "figure.png", result, traces)
    total = sum(seconds.values())
    console.print(
        f"\n{total:.0f} s, {result['peak_rss_bytes'] / 1e9:.1f} GB at most. "
        f"Report: {folder / 'report.html'}\n"
        f"Go on: cd {project.root} && composable generate 'def main('"
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _fresh(folder: Path) -> Path:
    """Return an empty demo folder; one that an earlier demo made is emptied."""
    folder = folder.absolute()
    mark = folder / ".composable-demo"
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists():
            raise ComposableError(
                "the folder holds something that no demo made",
                where=str(folder),
                hint="name another folder",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return folder


def _heldout(name: str) -> list[Document]:
    return read_documents([shipped_folder(name) / "text" / "heldout.jsonl"])


def _peak_memory() -> int:
    """Return the most memory that this process has had so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def _timed(console: Console, seconds: dict[str, float], step: str) -> Iterator[None]:
    """Record the wall time of a step."""
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def _bar(console: Console, label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show one bar and yield what moves it."""
    with _progress(console) as bars:
        task = bars.add_task(label, total=None, note="")
        yield lambda done, total, note: bars.update(task, completed=done, total=total, note=note)


def _contribute(
    console: Console,
    folder: Path,
    loaded: LoadedBackbone,
    registry: Path,
    name: str,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Run one contributor in a process of its own and show its progress."""
    source, own = shipped_folder(name), folder / "contributors" / name
    (own / "text").mkdir(parents=True)
    for file in (EXPERT_FILE, "README.md", "text/train.jsonl"):
        shutil.copy(source / file, own / file)
    others = next(other for other in CONTRIBUTORS if other != name)
    unreadable = shipped_folder(others) / "text" / "train.jsonl"
    command = [sys.executable, "-m", "composable.demo.contributor", str(own)]
    command += [str(loaded.folder), str(registry), str(steps), str(seed), str(unreadable)]
    published: dict[str, Any] = {}
    confined = ""
    log = (own / "log.txt").open("w+")
    with log, _progress(console) as bars:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        tasks = {"train": bars.add_task(f"{name}: train", total=steps, note="starting")}
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            kind = event["event"]
            if kind == "confined":
                if event["refused"] is None:
                    raise TrainingError(f"{name} could read {unreadable}, which is not its own")
                confined = f"{event['mechanism']} ({event['refused']} on another's text)"
            elif kind == "published":
                published = event
            else:
                if kind not in tasks:
                    tasks[kind] = bars.add_task(f"{name}: {kind}", total=None, note="")
                note = ""
                if "bits_per_token" in event:
                    note = f"{event['bits_per_token']:.2f} bits per byte"
                bars.update(tasks[kind], completed=event["done"], total=event["total"], note=note)
        if process.wait():
            log.seek(0)
            raise TrainingError(
                f"the contributor ended with status {process.returncode}:\n{log.read()[-2000:]}",
                where=name,
            )
    manifest = Manifest.read(own)
    console.print(
        f"  published {name} {published['version']}, {published['bytes'] / 1e6:.1f} MB; "
        f"process confined by {confined}"
    )
    return {
        "version": published["version"],
        "size_bytes": published["bytes"],
        "license": manifest.license,
        "description": manifest.description,
        "measured": published["measured"],
        "peak_rss_bytes": published["peak_rss_bytes"],
        "train_seconds": published["seconds"],
        "confined_by": confined,
    }


def _install(
    console: Console, folder: Path, loaded: LoadedBackbone, registry: Path
) -> tuple[Model, list[Pluggable], Project]:
    """Add, resolve, lock, install and compose, as a user in a new project."""
    root = folder / "project"
    root.mkdir()
    project = Project.create(root, BACKBONE_NAME, {"demo": "../registry"})
    for name in CONTRIBUTORS:
        project = project.add(Requirement.parse(f"{name}>=1.0,<2"))
    lock = lock_project(project, loaded.interface)
    environment = sync_project(project, lock, interface=loaded.interface)
    plugged = [load_expert(loaded, environment.expert_path(e.name)) for e in lock.experts]
    console.print(
        "  resolved, locked and installed "
        + ", ".join(f"{expert.name} {expert.version}" for expert in lock.experts)
    )
    model = loaded.plug(plugged, CAPACITY)
    return model, plugged, project


def _traces(model: Model, documents: Sequence[Spliced]) -> list[Trace]:
    weights = trace_routing(model, [document.text for document in documents])
    names = tuple(name or "" for name in model.names)
    return [
        Trace(document.text, document.segments, names, weight_TE)
        for document, weight_TE in zip(documents, weights, strict=True)
    ]


def _print_properties(console: Console, properties: Sequence[Mapping[str, Any]]) -> None:
    console.print()
    for item in properties:
        mark = "[green]✓[/]" if item["passed"] else "[red]✗[/]"
        console.print(f"{mark} [bold]{item['name']}[/]  ", end="")
        console.print(item["found"], markup=False, highlight=False)
