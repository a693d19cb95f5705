"""The router interface: what a backbone publishes and every expert trains against.

It is data with a digest. Same major version: every published expert still plugs in. Whatever an
expert's scores or weights depend on is named here; nothing else of the backbone is promised.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from composable.errors import InterfaceError
from composable.interface.digest import canonical_json, digest_bytes, is_digest

SCHEMA: Final = 1
DTYPES: Final = ("BF16", "F32")
BodyKind = Literal["ffn", "lora"]
BODY_KINDS: Final[tuple[BodyKind, ...]] = ("ffn", "lora")
# The matrices of a slot and the letters of their dimensions.
SLOT_DIMS: Final = {"w_gate": "DF", "w_up": "DF", "w_down": "FD"}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a tensor file must hold under one name: an exact shape and one of `dtypes`."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = DTYPES


@dataclass(frozen=True, kw_only=True)
class RouterInterface:
    """The contract between a backbone, its router and every expert.

    Args:
        name: Name of the backbone that publishes it.
        version: Semantic version of the contract.
        backbone: Digest of all backbone weights; the upper layers that bodies were trained in.
        trunk: Digest of the weights below the tap; they fix every scout's features.
        tokenizer: Digest of the tokenizer's definition.
        class_map: Digest of the frozen map from tokens to classes.
        anchor: Digest of the public anchor text that ships with the backbone.
        vocab_size: Tokens.
        n_classes: Classes that scouts predict, at most 1,024.
        d_model: Width of the trunk's features.
        d_ff: Hidden width of a full feed-forward body.
        tap: Layers in the trunk; the router reads the residual stream after them.
        slots: Indices of the upper layers where bodies plug in, ascending.
        scout_max_width: Widest hidden layer that a scout may have.
        lora_max_rank: Highest rank of a low-rank body.
        discount: Factor on the track record per token, in (0, 1].
        top_k: Experts mixed per token.
        backbone_prior: Prior weight of the backbone; the experts share the rest evenly.
        switch_rate: Probability per token, in [0, 1), that safe mode's posterior restarts from
            the prior, as after a change of document.
        output_bounds: For every slot the largest root mean square of a body's output at one token;
            in mix mode what exceeds it counts as zero.
        honours: Digests of earlier interfaces whose experts plug in unchanged.
        mix_power: Exponent in (0, 1] on scouts' likelihoods in mix mode's switching filter; 0 where
            mix mode weighs track records instead.
        mix_prior: Prior weight of the backbone in that filter, at least.
        mix_switch_rate: Probability per token, in (0, 1), of a switch to another expert in it.
        mix_share: Prior weight of one expert in it, at most; what is left is the backbone's.
        mix_margin: Nats per token, at least 0, by which an expert's scout has to beat the
            backbone's to gain weight in it.
        mix_floor: Least weight, in [0, 1), of an expert in mix mode; who has less is not run.
        mix_top_k: Experts mixed per token in mix mode; `top_k` where it is 0.
        scout_prior: Share of the output, in [0, 1), that experts' scouts have at first; 0 where
            they only route.
        scout_rate: Probability per token, in (0, 1), that their share starts anew.
        scout_power: Exponent, in (0, 1], on what they say, where 1 minus it is the model's.
        schema: Version of this record's meaning.

    Raises:
        InterfaceError: For a value out of its range; `where` names the field.
    """

    name: str
    version: str
    backbone: str
    trunk: str
    tokenizer: str
    class_map: str
    anchor: str
    vocab_size: int
    n_classes: int
    d_model: int
    d_ff: int
    tap: int
    slots: tuple[int, ...]
    scout_max_width: int
    lora_max_rank: int
    discount: float
    top_k: int
    backbone_prior: float
    switch_rate: float
    output_bounds: tuple[float, ...]
    honours: tuple[str, ...] = ()
    schema: int = SCHEMA
    # From here on left out of the plain form where there is no such filter, so that interfaces made
    # before there was keep their digests.
    mix_power: float = 0.0
    mix_prior: float = 0.5
    mix_switch_rate: float = 0.0
    # And these are left out where they change nothing, for the same reason.
    mix_share: float = 1.0
    mix_margin: float = 0.0
    mix_floor: float = 0.0
    mix_top_k: int = 0
    scout_prior: float = 0.0
    scout_rate: float = 0.0
    scout_power: float = 1.0

    def __post_init__(self) -> None:
        def require(holds: bool, field: str, expected: str) -> None:
            if not holds:
                value = repr(getattr(self, field))
                shown = value if len(value) <= 80 else value[:79] + "…"
                raise InterfaceError(f"{shown} is not {expected}", where=f"interface.{field}")

        require(self.schema == SCHEMA, "schema", f"{SCHEMA}, the one this release reads")
        for field in ("backbone", "trunk", "tokenizer", "class_map", "anchor"):
            require(is_digest(getattr(self, field)), field, "a digest (sha256: and 64 hex digits)")
        require(all(map(is_digest, self.honours)), "honours", "a list of digests")
        for field in ("vocab_size", "d_model", "d_ff", "scout_max_width", "lora_max_rank", "top_k"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, field, "a positive whole number")
        require(0 < self.n_classes <= 1024, "n_classes", "between 1 and 1,024")
        require(self.tap >= 1, "tap", "at least 1: the trunk holds no slot")
        ascending = list(self.slots) == sorted(set(self.slots)) and len(self.slots) > 0
        require(ascending, "slots", "a non-empty ascending list of layers")
        require(self.slots[0] >= self.tap, "slots", f"all at or above the tap ({self.tap})")
        require(0 < self.discount <= 1, "discount", "in (0, 1]")
        require(0 < self.backbone_prior < 1, "backbone_prior", "in (0, 1)")
        require(0 <= self.switch_rate < 1, "switch_rate", "in [0, 1)")
        require(0 <= self.mix_power <= 1, "mix_power", "in [0, 1]")
        if self.mix_power:
            require(0 < self.mix_prior < 1, "mix_prior", "in (0, 1)")
            require(0 < self.mix_switch_rate < 1, "mix_switch_rate", "in (0, 1)")
        require(0 < self.mix_share <= 1, "mix_share", "in (0, 1]")
        is_finite = 0 <= self.mix_margin < float("inf")
        require(is_finite, "mix_margin", "a number of nats, 0 or more")
        require(0 <= self.mix_floor < 1, "mix_floor", "in [0, 1)")
        is_whole = isinstance(self.mix_top_k, int) and self.mix_top_k >= 0
        require(is_whole, "mix_top_k", "a whole number, 0 or more")
        require(0 <= self.scout_prior < 1, "scout_prior", "in [0, 1)")
        if self.scout_prior:
            require(0 < self.scout_rate < 1, "scout_rate", "in (0, 1)")
            require(0 < self.scout_power <= 1, "scout_power", "in (0, 1]")
        is_bounded = len(self.output_bounds) == len(self.slots) and all(
            0 < bound < float("inf") for bound in self.output_bounds
        )
        require(is_bounded, "output_bounds", "one positive number for every slot")

    @property
    def n_mixed(self) -> int:
        """Experts mixed per token in mix mode, at most."""
        return self.mix_top_k or self.top_k

    def safe_bound(self, n_tokens: int) -> float:
        """Return by how many nats a document may cost more in safe mode than the backbone alone.

        Args:
            n_tokens: Tokens that are predicted in it.
        """
        paths = -math.log(self.backbone_prior)
        paths -= n_tokens * math.log1p(-self.switch_rate * (1 - self.backbone_prior))
        scouts = -math.log1p(-self.scout_prior)
        scouts -= n_tokens * math.log1p(-self.scout_rate * self.scout_prior)
        return paths + scouts

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest_bytes(canonical_json(self.to_dict()))

    def honours_digest(self, digest: str) -> bool:
        """Say whether an expert trained against `digest` plugs in."""
        return digest == self.digest or digest in self.honours

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        data = dataclasses.asdict(self)
        # 1 and 1.0 are equal but spelt differently; equal interfaces must have one digest.
        floats = {name: float(data[name]) for name in ("discount", "backbone_prior", "switch_rate")}
        for name in ("mix_power", "mix_prior", "mix_switch_rate"):
            value = data.pop(name)
            if self.mix_power:
                floats[name] = float(value)
        for name, neutral in (("mix_share", 1), ("mix_margin", 0), ("mix_floor", 0)):
            value = data.pop(name)
            if value != neutral:
                floats[name] = float(value)
        if not self.mix_top_k:
            del data["mix_top_k"]
        for name in ("scout_prior", "scout_rate", "scout_power"):
            value = data.pop(name)
            if self.scout_prior:
                floats[name] = float(value)
        lists = {
            "slots": list(self.slots),
            "output_bounds": [float(bound) for bound in self.output_bounds],
            "honours": list(self.honours),
        }
        return {**data, **floats, **lists}

    def to_json(self) -> str:
        """Return the interface as readable JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: Any, where: str = "interface") -> Self:
        """Read an interface from plain data.

        Raises:
            InterfaceError: For missing, unknown, ill-typed or out-of-range fields.
        """
        if not isinstance(data, dict):
            raise InterfaceError("expected a table of fields", where=where)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in data.keys() - fields.keys():
            raise InterfaceError("unknown field", where=f"{where}.{str(name)[:80]}")
        types = {"str": str, "int": int, "float": (int, float), "tuple": (list, tuple)}
        for name, field in fields.items():
            if name not in data:
                if field.default is dataclasses.MISSING:
                    raise InterfaceError("missing field", where=f"{where}.{name}")
                continue
            wanted = types[str(field.type).split("[")[0]]
            if not isinstance(data[name], wanted) or isinstance(data[name], bool):  # type: ignore[arg-type]
                raise InterfaceError(
                    f"{reprlib.repr(data[name])} has the wrong type, expected {field.type}",
                    where=f"{where}.{name}",
                )
        items = {"slots": (int,), "output_bounds": (float, int), "honours": (str,)}
        for name, wanted_items in items.items():
            if not all(type(item) in wanted_items for item in data.get(name, ())):
                expected = f"a list of {wanted_items[0].__name__}"
                raise InterfaceError(f"expected {expected}", where=f"{where}.{name}")
        tuples = {name: tuple(data[name]) for name in items if name in data}
        return cls(**{**data, **tuples})

    @classmethod
    def from_json(cls, text: str, where: str = "interface.json") -> Self:
        """Read an interface from JSON text.

        Raises:
            InterfaceError: For text that is not JSON, or not an interface.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InterfaceError(f"not JSON: {error}", where=where) from error
        return cls.from_dict(data, where)
