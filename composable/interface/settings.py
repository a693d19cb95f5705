"""The router's settings in an interface: how experts are weighed and how scouts are mixed in.

Each value checks its own ranges. Errors name the field only; the caller adds where it is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from composable.errors import InterfaceError


def require(holds: bool, value: Any, field: str, expected: str) -> None:
    """Raise an `InterfaceError` about a field unless its value is in range.

    Args:
        holds: Whether it is.
        value: The value, shown shortened.
        field: Name of the field, the error's location.
        expected: What its values are, as in "a positive integer".

    Raises:
        InterfaceError: Where `holds` is false.
    """
    if not holds:
        text = repr(value)
        shown = text if len(text) <= 80 else text[:79] + "…"
        raise InterfaceError(f"{shown} is not {expected}", where=field)


def _require_choice(floor: float, top_k: int | None) -> None:
    require(0 <= floor < 1, floor, "floor", "in [0, 1)")
    is_count = top_k is None or (isinstance(top_k, int) and top_k > 0)
    require(is_count, top_k, "top_k", "a positive integer")


@dataclass(frozen=True, kw_only=True)
class DiscountedRecord:
    """Mix mode weighs experts by their prior and their discounted track record.

    Args:
        floor: Least weight, in [0, 1), of an expert at a token; one with less does not run there.
        top_k: Experts mixed per token, at most; the interface's `top_k` where None.

    Raises:
        InterfaceError: For a value out of its range.

    Example:
        >>> DiscountedRecord(top_k=2)
        DiscountedRecord(floor=0.0, top_k=2)
    """

    floor: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        _require_choice(self.floor, self.top_k)


@dataclass(frozen=True, kw_only=True)
class SwitchingFilter:
    """Mix mode weighs experts by the posterior of a hidden Markov chain that seldom changes expert.

    Args:
        power: Exponent, in (0, 1], on scouts' likelihoods.
        backbone_prior: Least prior weight of the backbone, in (0, 1).
        switch_rate: Probability per token, in (0, 1), of a change of expert.
        max_expert_prior: Largest prior weight of one expert, in (0, 1]; the rest is the backbone's.
        margin: Nats per token, at least 0, by which an expert's scout has to beat the backbone's
            to gain weight.
        floor: Least weight, in [0, 1), of an expert at a token; one with less does not run there.
        top_k: Experts mixed per token, at most; the interface's `top_k` where None.

    Raises:
        InterfaceError: For a value out of its range.

    References:
        `model.router.switching_posterior` has the equations, ADRs 9 and 12 the reasons.

    Example:
        >>> SwitchingFilter(power=0.5, backbone_prior=0.5, switch_rate=0.02).margin
        0.0
    """

    power: float
    backbone_prior: float
    switch_rate: float
    max_expert_prior: float = 1.0
    margin: float = 0.0
    floor: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.power <= 1, self.power, "power", "in (0, 1]")
        require(0 < self.backbone_prior < 1, self.backbone_prior, "backbone_prior", "in (0, 1)")
        require(0 < self.switch_rate < 1, self.switch_rate, "switch_rate", "in (0, 1)")
        require_max_expert_prior(self.max_expert_prior)
        require_margin(self.margin)
        _require_choice(self.floor, self.top_k)


def require_max_expert_prior(value: float) -> None:
    """Check a `SwitchingFilter.max_expert_prior`."""
    require(0 < value <= 1, value, "max_expert_prior", "in (0, 1]")


def require_margin(value: float) -> None:
    """Check a `SwitchingFilter.margin`."""
    require(0 <= value < float("inf"), value, "margin", "a finite number of nats, 0 or more")


MixRule = DiscountedRecord | SwitchingFilter


@dataclass(frozen=True, kw_only=True)
class OutputMixture:
    """Scouts' predictions are mixed into the output, in mix mode and in safe mode.

    Args:
        prior: Weight of the pooled prediction at the start of a document, in (0, 1).
        rate: Probability per token, in (0, 1), that its weight restarts from `prior`.
        power: Exponent, in (0, 1], of scouts' probabilities in the pool; the model's is 1 minus it.

    Raises:
        InterfaceError: For a value out of its range.

    References:
        `model.output_mixture` has the equations, ADR 13 the reasons.

    Example:
        >>> OutputMixture(prior=0.05, rate=0.01).power
        1.0
    """

    prior: float
    rate: float
    power: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.prior < 1, self.prior, "prior", "in (0, 1)")
        require(0 < self.rate < 1, self.rate, "rate", "in (0, 1)")
        require(0 < self.power <= 1, self.power, "power", "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """What is chosen about the router when a backbone is published; the rest is measured.

    The fields are those of `RouterInterface`, which checks and documents them.

    Example:
        >>> settings = RouterSettings(
        ...     discount=0.95, top_k=2, backbone_prior=0.5, switch_rate=0.01,
        ...     scout_max_width=16, lora_max_rank=8)
        >>> settings.mix
        DiscountedRecord(floor=0.0, top_k=None)
    """

    discount: float
    top_k: int
    backbone_prior: float
    switch_rate: float
    scout_max_width: int
    lora_max_rank: int
    mix: MixRule = DiscountedRecord()
    output_mixture: OutputMixture | None = None


def byte_router() -> RouterSettings:
    """Return the settings for backbones whose tokens are bytes, chosen for `tiny-bytes`.

    References:
        docs/results/demo.md and ADRs 9, 11 to 13 and 18 give the reasons.

    Example:
        >>> byte_router().mix.top_k
        4
    """
    return RouterSettings(
        discount=0.975,
        top_k=2,
        backbone_prior=0.99,
        switch_rate=0.005,
        scout_max_width=128,
        lora_max_rank=64,
        mix=SwitchingFilter(
            power=0.35,
            backbone_prior=0.2,
            switch_rate=0.005,
            max_expert_prior=0.1,
            margin=0.2,
            floor=0.1,
            top_k=4,
        ),
        output_mixture=OutputMixture(prior=0.05, rate=0.01, power=0.6),
    )


def subword_router() -> RouterSettings:
    """Return the settings for imported backbones, whose tokens are subwords.

    References:
        docs/results/real-backbone.md gives the reasons.

    Example:
        >>> subword_router().output_mixture is None
        True
    """
    return RouterSettings(
        discount=0.975,
        top_k=2,
        backbone_prior=0.99,
        switch_rate=0.02,
        scout_max_width=128,
        lora_max_rank=64,
        mix=SwitchingFilter(
            power=0.5, backbone_prior=0.5, switch_rate=0.02, margin=0.2, floor=0.05, top_k=4
        ),
    )
