"""The router interface: what a backbone publishes and every expert trains against.

It is data with a digest. Within one major version every published expert still plugs in. It names
everything that an expert's scores or weights depend on; the rest of the backbone may change.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from composable.errors import InterfaceError
from composable.interface import flat
from composable.interface.digest import canonical_json, digest_bytes, is_digest
from composable.interface.fields import expect_table, read_fields, read_value, to_plain, types_of
from composable.interface.settings import (
    DiscountedRecord,
    MixRule,
    OutputMixture,
    SwitchingFilter,
    require,
)

# The schema that new interfaces are written in. Schema 1, which `flat` describes, still reads.
SCHEMA: Final = 2
DTYPES: Final = ("BF16", "F32")
BodyKind = Literal["ffn", "lora"]
BODY_KINDS: Final[tuple[BodyKind, ...]] = ("ffn", "lora")
# The matrices of a slot and the letters of their dimensions.
SLOT_DIMS: Final = {"w_gate": "DF", "w_up": "DF", "w_down": "FD"}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Requirements on one tensor of a file: its exact shape, and one of `dtypes`.

    Example:
        >>> TensorSpec(shape=(4, 8)).dtypes
        ('BF16', 'F32')
    """

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
            in mix mode an output that exceeds it counts as zero.
        honours: Digests of earlier interfaces whose experts plug in unchanged.
        mix: How mix mode weighs experts, and how many it mixes per token.
        output_mixture: How scouts' predictions are mixed into the output; None if they only route.
        schema: Layout of this record on disk, which its digest depends on.
        inert: In schema 1, settings without effect that are part of the digest.

    Raises:
        InterfaceError: For a value out of its range; `where` names the field.

    Example:
        >>> import dataclasses, composable as cx
        >>> interface = cx.load("tiny-bytes", experts=[]).interface
        >>> interface.name, interface.n_mixed
        ('tiny-bytes', 4)
        >>> stricter = dataclasses.replace(interface, mix=DiscountedRecord(top_k=1))
        >>> stricter.honours_digest(interface.digest)
        False
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
    mix: MixRule = dataclasses.field(default_factory=DiscountedRecord)
    output_mixture: OutputMixture | None = None
    schema: int = SCHEMA
    inert: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        def expect(holds: bool, field: str, expected: str) -> None:
            require(holds, getattr(self, field), f"interface.{field}", expected)

        expect(self.schema in _READERS, "schema", f"1 or {SCHEMA}, which this version reads")
        for field in ("backbone", "trunk", "tokenizer", "class_map", "anchor"):
            expect(is_digest(getattr(self, field)), field, "a digest (sha256: and 64 hex digits)")
        expect(all(map(is_digest, self.honours)), "honours", "a list of digests")
        for field in ("vocab_size", "d_model", "d_ff", "scout_max_width", "lora_max_rank", "top_k"):
            value = getattr(self, field)
            expect(isinstance(value, int) and value > 0, field, "a positive integer")
        expect(0 < self.n_classes <= 1024, "n_classes", "between 1 and 1,024")
        expect(self.tap >= 1, "tap", "at least 1: the trunk holds no slot")
        ascending = list(self.slots) == sorted(set(self.slots)) and len(self.slots) > 0
        expect(ascending, "slots", "a non-empty ascending list of layers")
        expect(self.slots[0] >= self.tap, "slots", f"all at or above the tap ({self.tap})")
        expect(0 < self.discount <= 1, "discount", "in (0, 1]")
        expect(0 < self.backbone_prior < 1, "backbone_prior", "in (0, 1)")
        expect(0 <= self.switch_rate < 1, "switch_rate", "in [0, 1)")
        is_bounded = len(self.output_bounds) == len(self.slots) and all(
            0 < bound < float("inf") for bound in self.output_bounds
        )
        expect(is_bounded, "output_bounds", "one positive number for every slot")
        expect(self.schema == 1 or not self.inert, "inert", "empty, as schema 2 has it")

    @property
    def n_mixed(self) -> int:
        """Experts mixed per token in mix mode, at most."""
        return self.top_k if self.mix.top_k is None else self.mix.top_k

    def safe_bound(self, n_tokens: int) -> float:
        """Return the most nats by which safe mode can cost a document more than the backbone alone.

        Args:
            n_tokens: Tokens that are predicted in it.

        References:
            `docs/concepts/guarantees.md` has the proof.
        """
        bound = -math.log(self.backbone_prior)
        bound -= n_tokens * math.log1p(-self.switch_rate * (1 - self.backbone_prior))
        if self.output_mixture:
            prior, rate = self.output_mixture.prior, self.output_mixture.rate
            bound += -math.log1p(-prior) - n_tokens * math.log1p(-rate * prior)
        return bound

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest_bytes(canonical_json(self.to_dict()))

    def honours_digest(self, digest: str) -> bool:
        """Return whether an expert trained against `digest` plugs in."""
        return digest == self.digest or digest in self.honours

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        data = to_plain(self, without=_NESTED)
        if self.schema == 1:
            return data | flat.flatten_settings(self.mix, self.output_mixture, self.inert)
        rule = next(name for name, kind in _RULES.items() if kind is type(self.mix))
        data["mix"] = {"rule": rule, **to_plain(self.mix)}
        if self.output_mixture:
            data["output_mixture"] = to_plain(self.output_mixture)
        return data

    def to_json(self) -> str:
        """Return the interface as readable JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: Any, where: str = "interface") -> Self:
        """Read an interface from plain data.

        Raises:
            InterfaceError: For missing, unknown, ill-typed or out-of-range fields.
        """
        try:
            table = expect_table(data)
            schema = table.get("schema", 1)  # the first interfaces did not state it
            is_known = type(schema) is int and schema in _READERS
            require(is_known, schema, "schema", f"1 or {SCHEMA}, which this version reads")
            return cls(**_READERS[schema](table))
        except InterfaceError as error:
            field = (error.where or "").removeprefix("interface.")
            error.where = f"{where}.{field}" if field else where
            raise

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


# How schema 2 names the rule of mix mode.
_RULES: Final[dict[str, Callable[..., MixRule]]] = {
    "discounted-record": DiscountedRecord,
    "switching-filter": SwitchingFilter,
}
# Fields that are not read by their type alone.
_NESTED: Final = ("mix", "output_mixture", "inert")


def _read_flat(table: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an interface from its plain form in schema 1."""
    types = types_of(RouterInterface, _NESTED)
    flat_types = {name: type(value).__name__ for name, value in flat.DEFAULTS.items()}
    fields = read_fields(table, types | flat_types, {*flat_types, "honours", "schema"})
    settings = {name: fields.pop(name) for name in flat_types if name in fields}
    return {"schema": 1, **fields, **flat.nest_settings(settings)}


def _read_nested(table: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an interface from its plain form in schema 2."""
    types = types_of(RouterInterface, _NESTED)
    plain = {name: value for name, value in table.items() if name not in ("mix", "output_mixture")}
    fields = read_fields(plain, types, optional=())
    if "mix" not in table:
        raise InterfaceError("missing field", where="mix")
    try:
        at = "mix"
        fields["mix"] = _read_rule(table["mix"])
        if "output_mixture" in table:
            at = "output_mixture"
            fields["output_mixture"] = read_value(OutputMixture, table["output_mixture"])
    except InterfaceError as error:
        raise error.within(at) from None
    return fields


def _read_rule(data: Any) -> MixRule:
    table = expect_table(data)
    rule = table.get("rule")
    if not isinstance(rule, str) or rule not in _RULES:
        known = " or ".join(_RULES)
        raise InterfaceError(f"{reprlib.repr(rule)} is not {known}", where="rule")
    settings = {name: value for name, value in table.items() if name != "rule"}
    return read_value(_RULES[rule], settings)


_READERS: Final = {1: _read_flat, 2: _read_nested}
