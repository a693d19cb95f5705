"""The record of a training run, stored as JSON in the expert's folder and in its card.

Reading and writing are in `composable.files.records`; nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CacheRecord:
    """The cache of the trunk's activations.

    Args:
        tokens: Tokens whose activations were cached.
        bytes: Size of the cache in bytes.
        flops_saved: Floating-point operations that training did not have to repeat.
    """

    tokens: int
    bytes: int
    flops_saved: int


@dataclass(frozen=True, kw_only=True)
class ScoutRecord:
    """The scout-only steps of a run.

    Args:
        tokens: Tokens in the rows that the scout was trained on.
        steps: Optimiser steps of the scout that was kept.
        heldout_bits: Bits per class on held-out rows; None where the scout was not trained.
    """

    tokens: int
    steps: int
    heldout_bits: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """The figures of a training run; the default stands for an expert without a record.

    Args:
        documents: Documents trained on.
        text_bytes: Their UTF-8 bytes.
        tokens: Tokens predicted over all steps.
        seconds: Wall time of the whole run.
        seed: Seed of weights and data order.
        learning_rate: Peak learning rate.
        device: Number and kind of devices, and the machine.
        last: Last logged figures; empty if no step ran.
        step_seconds: Wall time by stage: `trunk`, `body`, `scout`.
        derives_from: The release whose weights training started from.
        update_rank: Rank of the products that training added to its parent; None where it changed
            all numbers.
        cache: The cached trunk, where one was used.
        scout: The scout-only steps.

    Example:
        >>> from composable.files.records import parse_record
        >>> record = parse_record(TrainingRecord, '{"documents": 3, "tokens": 96}', "record.json")
        >>> record.tokens
        96
    """

    documents: int = 0
    text_bytes: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    seed: int | None = None
    learning_rate: float | None = None
    device: str | None = None
    last: dict[str, int | float] | None = None
    step_seconds: dict[str, float] | None = None
    derives_from: str | None = None
    update_rank: int | None = None
    cache: CacheRecord | None = None
    scout: ScoutRecord | None = None
