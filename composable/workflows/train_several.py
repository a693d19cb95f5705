"""Train several experts in one process, with one copy of the backbone.

Experts of one structure run the same compiled programs. Those on the same text hold out the same
documents. Where the trunk's outputs are worth keeping, all of them read the same ones, and their
scouts are trained on more of the text than one run alone could afford to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from composable.assembly.backbones import LoadedBackbone
from composable.errors import TrainingError
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import Manifest
from composable.progress import TrainingProgress
from composable.training.config import TrainConfig
from composable.training.record import TrainingRecord
from composable.workflows.heldout import HeldoutFigures, measure_heldout
from composable.workflows.sweep import label_stages
from composable.workflows.train import train_expert
from composable.workflows.trunk_cache import is_worth_caching
from composable.workflows.workspace import WORK


@dataclass(frozen=True, kw_only=True)
class TrainedExpert:
    """One of several trained experts.

    Args:
        folder: The expert.
        data: What it was trained on, as it was given.
        record: The record of its run.
        heldout: Its losses on held-out text.
    """

    folder: Path
    data: tuple[Path, ...]
    record: TrainingRecord
    heldout: HeldoutFigures


def train_experts(
    loaded: LoadedBackbone,
    data: Mapping[Path, Sequence[Path]],
    cfgs: Mapping[Path, TrainConfig],
    *,
    parents: Mapping[Path, Pluggable] | None = None,
    progress: TrainingProgress | None = None,
) -> list[TrainedExpert]:
    """Train several experts, one after the other, and measure each on its held-out text.

    Run again after an interruption to resume: with the same experts, since those that share a text
    hold out documents by all their names.

    Args:
        loaded: The backbone.
        data: Text files, JSON-lines files or folders of them, by the folder of the expert.
        cfgs: How to train each, by folder.
        parents: The releases that experts derive from, by folder.
        progress: As for `train_expert`; a stage has the expert's name in front.

    Returns:
        The experts, best first among those on the same text.

    Raises:
        TrainingError: If two experts have one name.
        ComposableError: As `train_expert`.
    """
    names = {folder: Manifest.read(folder).name for folder in data}
    for folder, name in names.items():
        if list(names.values()).count(name) > 1:
            raise TrainingError(
                f"another expert that is trained with it has the name {name!r}", where=str(folder)
            )
    trained = []
    for folder, files in data.items():
        cfg = cfgs[folder]
        sharing = [other for other in data if list(data[other]) == list(files)]
        shared = sharing[0] / WORK / "trunk"
        record = train_expert(
            loaded,
            folder,
            files,
            cfg,
            parent=(parents or {}).get(folder),
            trunk=shared if is_worth_caching(loaded.backbone, cfg) else None,
            n_sharing=len(sharing),
            salt=" ".join(sorted(names[other] for other in sharing)),
            progress=label_stages(progress, names[folder]) if progress else None,
        )
        heldout = measure_heldout(loaded, folder, cfg, shared)
        trained.append(
            TrainedExpert(folder=folder, data=tuple(files), record=record, heldout=heldout)
        )
    texts = [expert.data for expert in trained]
    return sorted(trained, key=lambda e: (texts.index(e.data), e.heldout.bits_per_token))
