"""How to train: the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass

from composable.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: an optimiser with warm-up and cosine decay.

    Args:
        steps: Optimiser steps.
        batch_size: Rows per step over all processes.
        window: Positions per row.
        learning_rate: Peak.
        final_fraction: Share of the peak that the rate ends at.
        warmup_fraction: Share of the steps that the rate rises.
        weight_decay: Decoupled, on every matrix; vectors are not decayed.
        clip_norm: Global norm that gradients are cut to.
        seed: Seed of the initial weights and of the data's order.
        checkpoint_every: Steps between checkpoints, where a directory is given.
        log_every: Steps between logged figures.

    Raises:
        TrainingError: For a value out of its range; `where` names the field.
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
            if not getattr(self, name) > 0:
                value = getattr(self, name)
                raise TrainingError(f"{value!r} is not positive", where=f"training.{name}")

    @property
    def tokens(self) -> int:
        """Tokens that the whole run predicts."""
        return self.steps * self.batch_size * self.window
