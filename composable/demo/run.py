"""The main job, start to finish: contributors who never meet, and a user who plugs them together.

Nothing here is a mechanism of its own: every step calls the library as a contributor, a user or a
sceptic would.
"""

from __future__ import annotations

import dataclasses
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
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from composable.assembly.backbones import BackboneRelease, load_backbone
from composable.assembly.contribution import WORK, check_expert
from composable.assembly.experts import load_expert, make_expert, save_expert
from composable.demo.report import Trace, print_table, write_readme_figure, write_report
from composable.errors import ComposableError, TrainingError
from composable.model.model import Model, Pluggable
from composable.packaging.constraint import Requirement
from composable.packaging.locking import lock_project, sync_project
from composable.packaging.manifest import EXPERT_FILE, Manifest
from composable.packaging.project import Project
from composable.packaging.registry import FolderRegistry
from composable.packaging.version import Version
from composable.training.documents import (
    Document,
    Spliced,
    read_documents,
    splice_documents,
    write_documents,
)
from composable.vetting.checks import recovery
from composable.vetting.evaluation import (
    Scorer,
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
    slots_scorer,
    trace_routing,
)

BACKBONE_NAME: Final = "tiny-bytes"
CONTRIBUTORS: Final = ("python-code", "set-mm", "legal")
PUBLIC: Final = "public"
STEPS: Final = 400
# Each held-out document is scored up to here; spliced ones are made this long.
SCORED_BYTES: Final = 2048
_SPLICED: Final = 16
_SEGMENT_BYTES: Final = (256, 640)
_SEGMENTS: Final = 4
# Room for the experts, the backbone and a hostile guest: one compilation serves all.
_CAPACITY: Final = 8


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
    release = load_backbone(BACKBONE_NAME)
    texts = {name: _heldout(name) for name in (*CONTRIBUTORS, BACKBONE_NAME)}
    public = texts.pop(BACKBONE_NAME)
    spliced = splice_documents(
        {**texts, PUBLIC: public}, _SPLICED, seed, *_SEGMENT_BYTES, _SEGMENTS
    )

    registry = folder / "registry"
    experts = {}
    for name in CONTRIBUTORS:
        with _timed(console, seconds, f"contribute {name}"):
            experts[name] = _contribute(console, folder, release, registry, name, steps, seed)
    with _timed(console, seconds, "install"):
        model, plugged, project = _install(console, folder, release, registry)
    with _timed(console, seconds, "measure"):
        result = _measure(console, model, texts, public, spliced)
    with _timed(console, seconds, "properties"):
        result["properties"] = _properties(
            console, folder, release, project, plugged, public, spliced
        )
    result["claims"] = _claims(result)
    traces = [_trace(model, document) for document in spliced[:3]]
    result |= {
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
        "peak_rss_bytes": 1024
        * max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ),
        "seed": seed,
        "steps": steps,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].platform}, "
        f"jax {jax.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "backbone": f"{release.interface.name} {release.interface.version}",
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


def texts_folder(name: str) -> Path:
    """Return the folder of a first-party expert: in the installed package, or the checkout."""
    package = Path(__file__).parent.parent
    for root in (package / "experts", package.parent / "experts"):
        if (root / name).is_dir():
            return root / name
    raise ComposableError(f"no first-party expert {name!r} ships with this installation")


def _fresh(folder: Path) -> Path:
    """Return an empty demo folder; one that an earlier demo made is emptied."""
    folder = folder.absolute()
    mark = folder / ".composable-demo"
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists():
            raise ComposableError(
                "the folder holds something that no demo made", where=str(folder),
                hint="name another folder",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return folder


def _heldout(name: str) -> list[Document]:
    return read_documents([texts_folder(name) / "text" / "heldout.jsonl"])


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


def _contribute(
    console: Console,
    folder: Path,
    release: BackboneRelease,
    registry: Path,
    name: str,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Run one contributor in a process of its own and show its progress."""
    source, own = texts_folder(name), folder / "contributors" / name
    (own / "text").mkdir(parents=True)
    for file in (EXPERT_FILE, "README.md", "text/train.jsonl"):
        shutil.copy(source / file, own / file)
    others = next(other for other in CONTRIBUTORS if other != name)
    unreadable = texts_folder(others) / "text" / "train.jsonl"
    command = [sys.executable, "-m", "composable.demo.contributor", str(own)]
    command += [str(release.folder), str(registry), str(steps), str(seed), str(unreadable)]
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
                task = tasks.get(kind) or bars.add_task(
                    f"{name}: {kind}", total=event["total"], note=""
                )
                tasks[kind] = task
                note = ""
                if "bits_per_token" in event:
                    note = f"{event['bits_per_token']:.2f} bits per byte"
                bars.update(task, completed=event["done"], total=event["total"], note=note)
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
        "train_seconds": published["seconds"],
        "confined_by": confined,
    }


def _install(
    console: Console, folder: Path, release: BackboneRelease, registry: Path
) -> tuple[Model, list[Pluggable], Project]:
    """Add, resolve, lock, install and compose, as a user in a new project."""
    root = folder / "project"
    root.mkdir()
    project = Project.create(root, BACKBONE_NAME, {"demo": "../registry"})
    for name in CONTRIBUTORS:
        project = project.add(Requirement.parse(f"{name}>=1.0,<2"))
    lock = lock_project(project, release.interface)
    environment = sync_project(project, lock, interface=release.interface)
    plugged = [load_expert(release, environment.expert_path(e.name)) for e in lock.experts]
    console.print(
        "  resolved, locked and installed "
        + ", ".join(f"{expert.name} {expert.version}" for expert in lock.experts)
    )
    model = Model(release.backbone, release.interface, plugged, capacity=_CAPACITY)
    return model, plugged, project


def _measure(
    console: Console,
    model: Model,
    texts: Mapping[str, Sequence[Document]],
    public: Sequence[Document],
    spliced: Sequence[Spliced],
) -> dict[str, Any]:
    """Return bits per byte of every text under every method."""
    methods: dict[str, Scorer] = {
        "backbone": path_scorer(model),
        "average": slots_scorer(model, model.average_slots()),
        "mix": mix_scorer(model),
        "safe": safe_scorer(model),
    }
    groups = {name: _begins(documents) for name, documents in texts.items()}
    groups[PUBLIC] = _begins(public)
    groups["spliced"] = [document.text for document in spliced]
    table: dict[str, dict[str, float]] = {}
    with _progress(console) as bars:
        passes = len(groups) * len(methods) + len(texts)
        task = bars.add_task("measure", total=passes, note="")
        for group, documents in groups.items():
            scorers = dict(methods)
            if group in texts:
                scorers["own_expert"] = path_scorer(model, group)
            for method, scorer in scorers.items():
                score = score_documents(scorer, documents, context=model.context)
                table.setdefault(group, {})[method] = round(score.bits_per_byte, 5)
                bars.update(task, advance=1, note=f"{group}, {method}")
    domains = {name: table[name] for name in texts}
    recovered = {
        mode: [
            recovery(row["backbone"], row["own_expert"], row[mode]) for row in domains.values()
        ]
        for mode in ("mix", "safe")
    }
    return {
        "domains": domains,
        "public": table[PUBLIC],
        "spliced": table["spliced"],
        "recovery": {mode: round(float(np.mean(values)), 5) for mode, values in recovered.items()},
    }


def _claims(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what composition promises."""
    public, spliced = result["public"], result["spliced"]
    public_mix = public["mix"] / public["backbone"] - 1
    public_safe = public["safe"] / public["backbone"] - 1
    rival = min(spliced["backbone"], spliced["average"])
    claims = [
        ("recovery in mix mode is at least 97 %", result["recovery"]["mix"], 0.97, False),
        ("recovery in safe mode is at least 99 %", result["recovery"]["safe"], 0.99, False),
        ("public text loses at most 1 % in mix mode", public_mix, 0.01, True),
        ("public text loses nothing in safe mode", public_safe, 0.0, True),
        (
            "spliced text takes at most 0.8 of what backbone or average need",
            spliced["mix"] / rival,
            0.8,
            True,
        ),
    ]
    return [
        {
            "claim": claim,
            "found": round(found, 5),
            "holds": bool(found <= limit if is_most else found >= limit),
        }
        for claim, found, limit, is_most in claims
    ] + [
        {"claim": item["name"], "found": item["found"], "holds": item["passed"]}
        for item in result["properties"]
    ]


def _begins(documents: Sequence[Document]) -> list[bytes]:
    """Return the begins of documents, cut so that no character is split."""
    cut = [document.text.encode()[:SCORED_BYTES] for document in documents]
    return [text.decode(errors="ignore").encode() for text in cut]


def _trace(model: Model, document: Spliced) -> Trace:
    weight_TE = trace_routing(model, document.text)
    names = tuple(name or "" for name in model.names)
    return Trace(document.text, tuple(document.segments), names, weight_TE)


def _properties(
    console: Console,
    folder: Path,
    release: BackboneRelease,
    project: Project,
    plugged: Sequence[Pluggable],
    public: Sequence[Document],
    spliced: Sequence[Spliced],
) -> list[dict[str, Any]]:
    """Show what makes it open source: removing, reordering, refusing, withstanding."""
    shows: dict[str, Callable[[], tuple[bool, str]]] = {
        "remove": lambda: _show_remove(release, plugged, spliced),
        "reorder": lambda: _show_reorder(release, plugged, spliced),
        "refuse": lambda: _show_refusal(folder, release, project),
        "withstand": lambda: _show_hostile(folder, release, plugged, public),
    }
    properties = []
    with _progress(console) as bars:
        task = bars.add_task("properties", total=len(shows), note="")
        for name, show in shows.items():
            bars.update(task, note=name)
            passed, found = show()
            properties.append({"name": name, "passed": passed, "found": found})
            bars.update(task, advance=1)
    return properties


def _tokens(model: Model, spliced: Sequence[Spliced]) -> np.ndarray:
    rows = [model.encode(document.text)[: model.context] for document in spliced[:4]]
    return np.stack([row for row in rows if len(row) == model.context])


def _same_bits(one: Model, other: Model, tokens_BT: np.ndarray) -> tuple[bool, int]:
    """Compare two models in both modes; return whether all values agree, and how many there are."""
    pairs = [
        (np.asarray(one(tokens_BT)), np.asarray(other(tokens_BT))),
        (np.asarray(one.safe(tokens_BT)), np.asarray(other.safe(tokens_BT))),
    ]
    # Compared as integers: -0.0 and 0.0 differ, and so would two kinds of NaN.
    same = all((a.view(np.int32) == b.view(np.int32)).all() for a, b in pairs)
    return same, sum(a.size for a, _ in pairs)


def _show_remove(
    release: BackboneRelease, plugged: Sequence[Pluggable], spliced: Sequence[Spliced]
) -> tuple[bool, str]:
    """Remove an expert; the logits are those of the model that never had it."""
    gone = plugged[1]
    model = Model(release.backbone, release.interface, plugged, capacity=_CAPACITY)
    model.remove(gone.name)
    rest = [expert for expert in plugged if expert is not gone]
    never = Model(release.backbone, release.interface, rest, capacity=_CAPACITY)
    same, n_values = _same_bits(model, never, _tokens(model, spliced))
    verb = "equal" if same else "differ from"
    return same, (
        f"{gone.name} removed: all {n_values:,} logits {verb}, bit for bit, those of the model "
        "that never had it"
    )


def _show_reorder(
    release: BackboneRelease, plugged: Sequence[Pluggable], spliced: Sequence[Spliced]
) -> tuple[bool, str]:
    """Install in another order; the logits are the same."""
    model = Model(release.backbone, release.interface, plugged, capacity=_CAPACITY)
    other = Model(release.backbone, release.interface, capacity=_CAPACITY)
    order = list(reversed(plugged))
    for expert in order:
        other.install(expert)
    same, n_values = _same_bits(model, other, _tokens(model, spliced))
    names = ", ".join(expert.name for expert in order)
    verb = "equal" if same else "differ from"
    return same, f"installed as {names}: all {n_values:,} logits {verb}, bit for bit, the first"


def _show_refusal(folder: Path, release: BackboneRelease, project: Project) -> tuple[bool, str]:
    """Ask for an expert of another interface version; resolution refuses and says why."""
    name = CONTRIBUTORS[0]
    future = folder / "contributors" / f"{name}-2"
    shutil.copytree(
        folder / "contributors" / name, future, ignore=shutil.ignore_patterns(WORK, "text", "log*")
    )
    manifest = Manifest.read(future)
    other_digest = "sha256:" + "0" * 64
    manifest = dataclasses.replace(
        manifest,
        version=Version("2.0.0"),
        interface=dataclasses.replace(
            manifest.interface,
            requires=Requirement.parse("interface>=2.0,<3").constraint,
            digest=other_digest,
        ),
    )
    (future / EXPERT_FILE).write_text(manifest.to_toml())
    FolderRegistry(folder / "registry").publish(future)
    asked = Requirement.parse(f"{name}>=2.0")
    wanted = dataclasses.replace(project.experts[name], constraint=asked.constraint)
    wanting = dataclasses.replace(
        project,
        experts={name: wanted},
        registries={"demo": str(folder / "registry")},
        root=folder / "refused",
    )
    try:
        lock_project(wanting, release.interface, is_dry_run=True)
    except ComposableError as error:
        return True, f"{asked} refused: {error}"
    return False, f"{asked} was not refused"


def _show_hostile(
    folder: Path,
    release: BackboneRelease,
    plugged: Sequence[Pluggable],
    public: Sequence[Document],
) -> tuple[bool, str]:
    """Plug in an expert with an untrained scout and a huge random body."""
    source, own = folder / "contributors" / CONTRIBUTORS[0], folder / "contributors" / "hostile"
    own.mkdir()
    manifest = dataclasses.replace(Manifest.read(source), name="hostile")
    (own / EXPERT_FILE).write_text(manifest.to_toml())
    expert = make_expert(release, manifest, seed=1)
    key = jax.random.key(1)
    noise = jax.tree.map(
        lambda x: 100.0 * jax.random.normal(key, x.shape), nnx.state(expert.body)
    )
    nnx.update(expert.body, noise)
    save_expert(own, expert, manifest)
    shutil.copytree(source / WORK, own / WORK)
    verdict = check_expert(release, own)
    failed = [check.name for check in verdict.checks if not check.passed]

    clean = Model(release.backbone, release.interface, plugged, capacity=_CAPACITY)
    dirty = Model(release.backbone, release.interface, plugged, capacity=_CAPACITY)
    dirty.install(load_expert(release, own))
    documents = _begins(public)
    change = {}
    for mode, scorer in (("mix", mix_scorer), ("safe", safe_scorer)):
        before, after = (
            score_documents(scorer(model), documents, context=model.context).bits_per_byte
            for model in (clean, dirty)
        )
        change[mode] = after / before - 1
    index = dirty.names.index("hostile")
    taken = np.concatenate([trace_routing(dirty, text)[:, index] for text in documents])
    passed = max(map(abs, change.values())) < 1e-3 and bool(failed)
    return passed, (
        f"an untrained scout with a huge random body took {taken.mean():.4%} of the public text's "
        f"bytes and changed its bits by {change['mix']:+.4%} in mix mode, {change['safe']:+.4%} in "
        f"safe mode; vetting refuses it ({', '.join(failed)})"
    )


def _print_properties(console: Console, properties: Sequence[Mapping[str, Any]]) -> None:
    console.print()
    for item in properties:
        mark = "[green]✓[/]" if item["passed"] else "[red]✗[/]"
        console.print(f"{mark} [bold]{item['name']}[/]  ", end="")
        console.print(item["found"], markup=False, highlight=False)

