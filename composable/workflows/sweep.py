"""Train variants of one expert that differ in seed, rank or rate, on one pass of the trunk.

The trunk's outputs depend on the text alone, so all variants read the same ones from disk, and
variants of one rank run one compiled program. The best on held-out text becomes the expert.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomlkit

from composable.assembly.backbones import LoadedBackbone
from composable.errors import TrainingError
from composable.files import atomic
from composable.files.reading import open_file, read_bytes
from composable.files.user_files import BYTE_ORDER_MARK, replace_text
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    Manifest,
)
from composable.progress import TrainingProgress
from composable.training.config import TrainConfig
from composable.training.record import TrainingRecord
from composable.workflows.heldout import HeldoutFigures, measure_heldout
from composable.workflows.train import train_expert
from composable.workflows.workspace import HELDOUT_FILE, TRAINING_FILE, WORK

# What variants may differ in, and what its values are.
SWEPT: Final = {"rank": int, "seed": int, "learning-rate": float}
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One expert of a sweep, trained.

    Args:
        name: What it differs in, such as "rank=4,seed=0".
        folder: The expert.
        record: The record of its run.
        heldout: Its losses on held-out text.
    """

    name: str
    folder: Path
    record: TrainingRecord
    heldout: HeldoutFigures


def parse_sweep(options: Sequence[str]) -> dict[str, list[Any]]:
    """Parse `NAME=VALUE,VALUE` options.

    Args:
        options: One option per setting that is varied.

    Raises:
        TrainingError: For another setting, one that is given twice, or a value that is no number.

    Example:
        >>> parse_sweep(["rank=4,16", "learning-rate=3e-3,0.001"])
        {'rank': [4, 16], 'learning-rate': [0.001, 0.003]}
    """
    sweep: dict[str, list[Any]] = {}
    for option in options:
        name, _, text = option.partition("=")
        values = [_parse_value(name, value) for value in text.split(",")]
        if name in sweep or None in values:
            raise TrainingError(
                f"{option!r} is not a setting and its values",
                where="--sweep",
                hint="write --sweep rank=4,16 or --sweep seed=0,1 or --sweep "
                "learning-rate=0.001,0.003, each setting once",
            )
        sweep[name] = sorted(set(values))
    return sweep


def _parse_value(name: str, text: str) -> float | None:
    """Return a value of a setting; None where it has none such."""
    if SWEPT.get(name) is int:
        return int(text) if text.isdecimal() else None
    try:
        rate = float(text) if name in SWEPT else 0.0
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None


def train_variants(
    loaded: LoadedBackbone,
    folder: Path,
    data: Sequence[Path],
    cfg: TrainConfig,
    sweep: Mapping[str, Sequence[Any]],
    *,
    parent: Pluggable | None = None,
    progress: TrainingProgress | None = None,
) -> list[Variant]:
    """Train every combination of the swept settings, and make the best one the folder's expert.

    A variant is a folder of its own in `.work/sweep`. Run again after an interruption to resume.

    Args:
        loaded: The backbone.
        folder: The expert, with `expert.toml`.
        data: Text files, JSON-lines files or folders of them.
        cfg: How to train; its seed and rate are used where none is swept.
        sweep: Values by setting, as `parse_sweep` returns.
        parent: The release that the expert derives from, as for `train_expert`.
        progress: As for `train_expert`; a stage has the variant's name in front.

    Returns:
        The variants, best first: by bits per token on held-out text.

    Raises:
        TrainingError: If ranks are swept of a body that has none, or of an expert that derives
            from another one.
        ComposableError: As `train_expert`.
    """
    manifest = Manifest.read(folder)
    if "rank" in sweep and (manifest.body.rank is None or parent is not None):
        raise TrainingError(
            "ranks can be swept only of a low-rank body that starts from the backbone",
            where=f"{folder / EXPERT_FILE}: body.kind",
            hint='write kind = "lora" and no derives-from, or sweep seeds and rates only',
        )
    work = folder / WORK / "sweep"
    trained: list[tuple[str, Path, TrainingRecord]] = []
    combinations = list(itertools.product(*sweep.values()))
    for values in combinations:
        setting = dict(zip(sweep, values, strict=True))
        name = ",".join(f"{key}={value}" for key, value in setting.items())
        variant = _write_variant(work / name, manifest, setting.get("rank"))
        run = dataclasses.replace(
            cfg,
            seed=setting.get("seed", cfg.seed),
            learning_rate=setting.get("learning-rate", cfg.learning_rate),
        )
        show = label_stages(progress, name) if progress else None
        record = train_expert(
            loaded,
            variant,
            data,
            run,
            parent=parent,
            trunk=work / "trunk",
            n_sharing=len(combinations),
            progress=show,
        )
        trained.append((name, variant, record))
    variants = [
        Variant(
            name=name,
            folder=variant,
            record=record,
            heldout=measure_heldout(loaded, variant, cfg, work / "trunk"),
        )
        for name, variant, record in trained
    ]
    variants.sort(key=lambda variant: variant.heldout.bits_per_token)
    _adopt(folder, variants[0])
    return variants


def label_stages(progress: TrainingProgress, name: str) -> TrainingProgress:
    """Return a callback that reports stages with a name in front.

    Args:
        progress: What it calls.
        name: What the stages are of, such as a variant.
    """

    def show(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        progress(f"{name} {stage}", done, total, figures)

    return show


def _write_variant(folder: Path, manifest: Manifest, rank: int | None) -> Path:
    """Write the manifest of a variant; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank is not None:
        body = dataclasses.replace(manifest.body, rank=rank)
        manifest = dataclasses.replace(manifest, body=body)
    atomic.write_text(folder / EXPERT_FILE, manifest.to_toml())
    return folder


def _adopt(folder: Path, best: Variant) -> None:
    """Make the folder's expert the best variant: tensors, rank, record and held-out text."""
    (folder / WORK).mkdir(exist_ok=True)
    for name in (BODY_FILE, SCOUT_FILE, f"{WORK}/{HELDOUT_FILE}", f"{WORK}/{TRAINING_FILE}"):
        with open_file(best.folder / name) as file, atomic.Sink(folder / name) as sink:
            while block := file.read(_BLOCK):
                sink.write(block)
    rank = Manifest.read(best.folder).body.rank
    text = read_bytes(folder / EXPERT_FILE).decode().removeprefix(BYTE_ORDER_MARK)
    document: Any = tomlkit.parse(text)
    if rank is not None and document["body"]["rank"] != rank:
        document["body"]["rank"] = rank
        replace_text(folder / EXPERT_FILE, tomlkit.dumps(document))
