"""Schema 1 of the router interface on disk, in which the router's settings are flat fields.

Interfaces of this schema still read, keep their digests and mean the same; new ones are written in
schema 2. A setting that changes nothing is left out of the plain form, because that is how schema 1
came to keep the digests of interfaces older than the setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from composable.errors import InterfaceError
from composable.interface.settings import (
    DiscountedRecord,
    MixRule,
    OutputMixture,
    SwitchingFilter,
    require_margin,
    require_max_expert_prior,
)

# Field of the rule or of the mixture, and its flat name.
_MIX: Final = {
    "power": "mix_power",
    "backbone_prior": "mix_prior",
    "switch_rate": "mix_switch_rate",
    "max_expert_prior": "mix_share",
    "margin": "mix_margin",
    "floor": "mix_floor",
    "top_k": "mix_top_k",
}
_SCOUT: Final = {"prior": "scout_prior", "rate": "scout_rate", "power": "scout_power"}
# What a flat setting is where the file does not have it, and so changes nothing.
DEFAULTS: Final[Mapping[str, float]] = {
    "mix_power": 0.0,
    "mix_prior": 0.5,
    "mix_switch_rate": 0.0,
    "mix_share": 1.0,
    "mix_margin": 0.0,
    "mix_floor": 0.0,
    "mix_top_k": 0,
    "scout_prior": 0.0,
    "scout_rate": 0.0,
    "scout_power": 1.0,
}
# Settings of the filter that are written, and so are in the digest, where there is no filter, too.
_INERT: Final = ("mix_share", "mix_margin")
_LEFT_OUT: Final = ("mix_share", "mix_margin", "mix_floor", "mix_top_k")


def nest_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `RouterInterface` that flat settings stand for.

    Args:
        flat: Settings by their names in `DEFAULTS`, of the right types; what is left out has its
            default.

    Returns:
        The fields `mix`, `output_mixture` and `inert`.

    Raises:
        InterfaceError: For a setting out of its range; `where` is its flat name.

    Example:
        >>> nest_settings({"mix_floor": 0.1})["mix"]
        DiscountedRecord(floor=0.1, top_k=None)
    """
    flat = {**DEFAULTS, **flat}
    values = {field: flat[name] for field, name in _MIX.items()}
    # A count of 0 stands for the interface's own; a negative one is out of range.
    values["top_k"] = values["top_k"] or None
    mix: MixRule
    inert: tuple[tuple[str, float], ...] = ()
    try:
        if flat["mix_power"]:
            mix = SwitchingFilter(**values)
        else:
            require_max_expert_prior(flat["mix_share"])
            require_margin(flat["mix_margin"])
            mix = DiscountedRecord(floor=values["floor"], top_k=values["top_k"])
            inert = tuple((name, flat[name]) for name in _INERT if flat[name] != DEFAULTS[name])
    except InterfaceError as error:
        error.where = _MIX[str(error.where)]
        raise
    mixture = None
    if flat["scout_prior"]:
        try:
            mixture = OutputMixture(**{field: flat[name] for field, name in _SCOUT.items()})
        except InterfaceError as error:
            error.where = _SCOUT[str(error.where)]
            raise
    return {"mix": mix, "output_mixture": mixture, "inert": inert}


def flatten_settings(
    mix: MixRule, output_mixture: OutputMixture | None, inert: tuple[tuple[str, float], ...]
) -> dict[str, float]:
    """Return the flat settings that `nest_settings` turns into these, without neutral ones.

    Example:
        >>> flatten_settings(DiscountedRecord(top_k=3), None, ())
        {'mix_top_k': 3}
    """
    flat = {_MIX[name]: value for name, value in dataclasses.asdict(mix).items()}
    flat["mix_top_k"] = flat["mix_top_k"] or 0
    flat |= dict(inert)
    if output_mixture:
        flat |= {_SCOUT[name]: value for name, value in dataclasses.asdict(output_mixture).items()}
    return {
        name: value if name == "mix_top_k" else float(value)
        for name, value in flat.items()
        if name not in _LEFT_OUT or value != DEFAULTS[name]
    }
