"""A contribution: starts a contributor's process and follows it until its expert is published.

What the process does is in `contributor.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console

from composable.corpora.recipe import shipped_folder
from composable.demo.result import PublishedExpert
from composable.errors import TrainingError
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.progress import UpdateBar, show_bars

# Bars of different steps line up in this many columns.
LABEL_WIDTH: Final = 22
_LOG_TAIL: Final = 2_000


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a contributor's process is started with.

    Args:
        folder: The contributor's folder; its name is the expert's.
        backbone: Folder of the backbone.
        registry: Folder of the registry to publish to.
        steps: Training steps.
        seed: Seed of training.
        unreadable: Another contributor's text, which the process must not be able to read.
    """

    folder: Path
    backbone: Path
    registry: Path
    steps: int
    seed: int
    unreadable: Path


def run_contribution(
    contribution: Contribution, console: Console | None = None
) -> tuple[PublishedExpert, int]:
    """Run a contributor in a process of its own and show its progress.

    Args:
        contribution: What it is started with; its folder must not exist.
        console: Where progress is shown; standard error by default.

    Returns:
        The published expert, and the peak memory of the process in bytes.

    Raises:
        TrainingError: If the process fails, or could read the other contributor's text.
    """
    folder = contribution.folder
    _copy_sources(shipped_folder(folder.name), folder)
    published: dict[str, Any] = {}
    confined_by = ""
    with (
        show_bars(is_transient=False, console=console) as update,
        _start_process(contribution) as lines,
    ):
        update(f"{folder.name}: train".ljust(LABEL_WIDTH), 0, contribution.steps, "starting")
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
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
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


def _describe_confinement(event: dict[str, Any], contribution: Contribution) -> str:
    """Return what confines the process, and the error that it got from another's text."""
    if event["refused"] is None:
        raise TrainingError(
            f"the process could read {contribution.unreadable}, another contributor's text",
            where=contribution.folder.name,
        )
    return f"{event['mechanism']}; reading another contributor's text gave {event['refused']}"


def _show_progress(update: UpdateBar, name: str, event: dict[str, Any]) -> None:
    """Move the bar of training or checking."""
    bits = event.get("bits_per_token")
    note = "" if bits is None else f"{bits:.2f} bits per byte"
    label = f"{name}: {event['event']}".ljust(LABEL_WIDTH)
    update(label, event["done"], event["total"], note)
