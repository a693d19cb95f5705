"""The results of the demo, as `result.json` stores them.

Nothing is measured here; that is in `measure.py` and `properties.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composable.files import atomic
from composable.files.records import to_plain


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bits per byte of one held-out text under every method; lower is better.

    Args:
        backbone: The backbone alone.
        average: The mean of the experts' weights.
        mix: The composed model in mix mode.
        safe: The composed model in safe mode.
        own_expert: The expert of the text's domain, always on; None where no expert is for the
            text.
    """

    backbone: float
    average: float
    mix: float
    safe: float
    own_expert: float | None = None

    def by_method(self) -> dict[str, float]:
        """Return the figures by method, without those that are None.

        Example:
            >>> Bits(backbone=4.0, average=3.0, mix=2.0, safe=1.5).by_method()
            {'backbone': 4.0, 'average': 3.0, 'mix': 2.0, 'safe': 1.5}
        """
        return {method: bits for method, bits in vars(self).items() if bits is not None}


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Share of the gap between backbone and own expert that composition closes, over the domains.

    Args:
        mix: In mix mode; 1 is the whole gap.
        safe: In safe mode.
    """

    mix: float
    safe: float


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What the demo measures of the composed model.

    Args:
        safe_bound: What safe mode may at most add to public text, as a share of the backbone's
            bits.
        domains: Held-out text by domain.
        public: Held-out text like the backbone's own.
        spliced: Texts that switch domain midway.
        recovery: Mean over the domains.
        intervals: 95 % intervals of the claimed figures, for other documents of these kinds, in
            the order of the claims; None in results that have none.
    """

    safe_bound: float
    domains: dict[str, Bits]
    public: Bits
    spliced: Bits
    recovery: Recovery
    intervals: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Property:
    """A property of composition that the demo shows.

    Args:
        name: Its name.
        passed: Whether it held.
        found: What was found, in words.
    """

    name: str
    passed: bool
    found: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim about the figures, or that a property holds.

    Args:
        claim: The claim, in words.
        found: The figure, or what was found, in words.
        holds: Whether the claim holds; of a figure with an interval, all of it.
        interval: 95 % interval of the figure, if it has one.
    """

    claim: str
    found: float | str
    holds: bool
    interval: tuple[float, float] | None = None

    def describe_found(self) -> str:
        """Return what was found, with its interval, in one line.

        Example:
            >>> Claim(claim="loss", found=0.1, holds=True, interval=(0.0, 0.2)).describe_found()
            '0.1, 95 % interval 0.0 to 0.2'
        """
        found = " ".join(str(self.found).split())
        if self.interval is None:
            return found
        low, high = self.interval
        return f"{found}, 95 % interval {low} to {high}"


@dataclass(frozen=True, kw_only=True)
class PublishedExpert:
    """An expert that a contributor published.

    Args:
        version: Its version.
        size_bytes: Size of its files.
        license: SPDX expression.
        description: One line.
        measured: The figures of its card; one that is not finite is None.
        train_seconds: Wall time of training.
        confined_by: What confined the contributor's process, and how it was tested.
    """

    version: str
    size_bytes: int
    license: str
    description: str
    measured: dict[str, Any]
    train_seconds: float
    confined_by: str


@dataclass(frozen=True, kw_only=True)
class DemoResult(Measurements):
    """All results of one run of the demo.

    Args:
        properties: The properties shown, in that order.
        claims: The claims about the figures, then one for each property.
        seconds: Wall time by step.
        step_rss_bytes: Peak resident memory by step: of the contributor's process, or of the main
            process until then.
        peak_rss_bytes: The largest of these.
        seed: Seed of training and of the spliced texts.
        steps: Training steps per expert.
        machine: Processor, device and versions.
        date: Day of the run, as YYYY-MM-DD.
        backbone: Name and version of the router interface.
        experts: The experts by name, in the order they were published.
    """

    properties: tuple[Property, ...]
    claims: tuple[Claim, ...]
    seconds: dict[str, float]
    step_rss_bytes: dict[str, int]
    peak_rss_bytes: int
    seed: int
    steps: int
    machine: str
    date: str
    backbone: str
    experts: dict[str, PublishedExpert]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON data."""
        plain: dict[str, Any] = to_plain(self)
        for name, expert in self.experts.items():
            # None is a figure there: the one that is not finite.
            plain["experts"][name]["measured"] = expert.measured
        return plain


def write_result(path: Path, result: DemoResult) -> None:
    """Write a result as JSON; its folder is made if needed.

    Args:
        path: The file.
        result: The result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(result.to_json(), indent=2) + "\n")
