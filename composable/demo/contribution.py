"""A contribution: starts a contributor's process and follows it until its expert is published.

What the process does is in `contributor.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from composable.assembly.huge_pages import ask_for_huge_pages
from composable.corpora.recipe import shipped_folder
from composable.demo.result import PublishedExpert
from composable.errors import TrainingError
from composable.files.blobs import STORE_VARIABLE
from composable.kernels import KERNELS_VARIABLE, load_native
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.trust.keys import KEYS_VARIABLE
from composable.progress import UpdateBar

# Bars of different steps line up in this many columns.
LABEL_WIDTH: Final = 27
_LOG_TAIL: Final = 2_000


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a contributor's process is started with.

    Args:
        folder: The contributor's folder; its name is the expert's.
        backbone: Folder of the backbone.
        registry: Folder of the registry to publish to.
        keys: Folder of the contributor's key, which only this contributor may read.
        steps: Training steps.
        seed: Seed of training.
        unreadable: Another contributor's text, which the process must not be able to read.
        programs: Folder of programs that the backbone's owner compiled, which the process may
            read and not write; without one, it compiles all programs itself.
        n_threads: Threads that compute.
    """

    folder: Path
    backbone: Path
    registry: Path
    keys: Path
    steps: int
    seed: int
    unreadable: Path
    programs: Path | None = None
    n_threads: int = 1


def run_contribution(contribution: Contribution, update: UpdateBar) -> tuple[PublishedExpert, int]:
    """Run a contributor in a process of its own and show its progress.

    Args:
        contribution: What it is started with; its folder must not exist.
        update: Moves the bar of a stage.

    Returns:
        The published expert, and the peak memory of the process in bytes.

    Raises:
        TrainingError: If the process fails, could read the other contributor's text, or could
            write to the folder of programs.
    """
    folder = contribution.folder
    _copy_sources(shipped_folder(folder.name), folder)
    published: dict[str, Any] = {}
    confined_by = ""
    with _start_process(contribution) as lines:
        update(_label(folder.name, "body and scout"), 0, contribution.steps, "starting")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "confined":
                confined_by = _describe_confinement(event, contribution)
            elif event["event"] == "published":
                published = event
            else:
                _show_progress(update, folder.name, event)
    manifest = Manifest.read(folder)
    expert = PublishedExpert(
        version=published["version"],
        size_bytes=published["bytes"],
        license=manifest.license,
        description=manifest.description,
        measured=published["measured"],
        train_seconds=published["seconds"],
        confined_by=confined_by,
    )
    return expert, published["peak_rss_bytes"]


def _copy_sources(source: Path, folder: Path) -> None:
    """Copy what a contributor starts from: manifest, README and training text."""
    (folder / "text").mkdir(parents=True)
    for file in (EXPERT_FILE, "README.md", "text/train.jsonl"):
        shutil.copy(source / file, folder / file)


@contextmanager
def _start_process(contribution: Contribution) -> Iterator[IO[str]]:
    """Start the process, yield the lines that it prints, and check its exit status."""
    command = [sys.executable, "-m", "composable.demo.contributor"]
    command += [str(contribution.folder), str(contribution.backbone), str(contribution.registry)]
    command += [str(contribution.steps), str(contribution.seed), str(contribution.unreadable)]
    with (contribution.folder / "log.txt").open("w+") as log:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(contribution)
        ) as process:
            assert process.stdout is not None
            yield process.stdout
        if process.returncode:
            log.seek(0)
            raise TrainingError(
                f"the contributor's process ended with status {process.returncode}: "
                + " | ".join(log.read()[-_LOG_TAIL:].splitlines()),
                where=contribution.folder.name,
                hint=f"read {log.name}",
            )


def _environment(contribution: Contribution) -> dict[str, str]:
    """Return the environment of the process: its threads, and a cache that it does not write.

    Nor may it compile: native kernels are those that this process uses.
    """
    programs = contribution.programs
    kernels = load_native().library
    settings = {
        # The size of XLA's pool of threads on a CPU.
        "NPROC": str(contribution.n_threads),
        "JAX_ENABLE_COMPILATION_CACHE": str(programs is not None).lower(),
        "JAX_COMPILATION_CACHE_DIR": str(programs or ""),
        # Without a limit, reading takes no lock and notes no time of use.
        "JAX_COMPILATION_CACHE_MAX_SIZE": "-1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "inf",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        KERNELS_VARIABLE: str(kernels or "portable"),
        KEYS_VARIABLE: str(contribution.keys),
        # For the root keys of the registry, which every contributor pins for itself.
        STORE_VARIABLE: str(contribution.folder / "store"),
    }
    return {**os.environ, **ask_for_huge_pages(os.environ), **settings}


def _describe_confinement(event: dict[str, Any], contribution: Contribution) -> str:
    """Return what confines the process, and the error that it got from another's text."""
    if event["refused"] is None:
        raise TrainingError(
            f"the process could read {contribution.unreadable}, another contributor's text",
            where=contribution.folder.name,
        )
    if event["can_write_programs"]:
        raise TrainingError(
            f"the process could write to {contribution.programs}, which others read",
            where=contribution.folder.name,
        )
    return f"{event['mechanism']}; reading another contributor's text gave {event['refused']}"


def _show_progress(update: UpdateBar, name: str, event: dict[str, Any]) -> None:
    """Move the bar of a stage of training, or of checking."""
    bits = event.get("bits_per_token")
    note = "compiling" if not event["done"] else ""
    if bits is not None:
        note = f"{bits:.2f} bits per byte"
    update(_label(name, event["stage"]), event["done"], event["total"], note)


def _label(name: str, stage: str) -> str:
    return f"{name}: {stage}".ljust(LABEL_WIDTH)
