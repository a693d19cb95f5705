"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from composable.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run: linear warm-up, then cosine decay of the learning rate.

    Args:
        steps: Optimiser steps.
        batch_size: Rows per step over all processes.
        window: Positions to predict per row.
        learning_rate: Peak learning rate.
        final_fraction: Final learning rate as a fraction of the peak.
        warmup_fraction: Fraction of the steps that warm-up takes.
        weight_decay: Decoupled, on every matrix; vectors are not decayed.
        clip_norm: Global norm that gradients are clipped to.
        seed: Seed of the initial weights and of the order of the data.
        checkpoint_every: Steps between checkpoints, where a directory is given.
        log_every: Steps between logged figures.

    Raises:
        TrainingError: For a value out of its range; `where` names the field.

    Example:
        >>> TrainConfig(steps=10, batch_size=4, window=256, learning_rate=0.01).tokens
        10240
    """

    steps: int
    batch_size: int
    window: int
    learning_rate: float
    final_fraction: float = 0.1
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "window", "learning_rate", "clip_norm"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise TrainingError(
                    f"{value!r} is not positive and finite", where=f"training.{name}"
                )

    @property
    def tokens(self) -> int:
        """Tokens predicted over all steps."""
        return self.steps * self.batch_size * self.window
