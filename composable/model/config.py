"""Shape of a backbone, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from composable.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Architecture of a causal transformer with RMSNorm, RoPE, grouped queries and SwiGLU.

    Args:
        vocab_size: Tokens (V).
        d_model: Width of the residual stream (D).
        n_layers: Transformer layers.
        n_heads: Query heads (N).
        n_kv_heads: Key and value heads (K); divides `n_heads`.
        d_head: Width of one head (H), even.
        d_ff: Hidden width of the feed-forward block (F).
        tap: Layers of the trunk; every layer at or above it is a slot.
        context: Longest sequence, in tokens.
        scout_width: Hidden width of the backbone's own scout (W).
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added to the mean square in RMSNorm.

    Raises:
        ModelError: For a combination that no model has; `where` names the field.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    tap: int
    context: int
    scout_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                value = getattr(self, field.name)
                raise ModelError(f"{value!r} is not positive", where=f"config.{field.name}")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(
                f"{self.n_heads} query heads do not share {self.n_kv_heads} key heads evenly",
                where="config.n_kv_heads",
            )
        if self.d_head % 2:
            raise ModelError(f"{self.d_head} is odd; RoPE turns pairs", where="config.d_head")
        if self.tap >= self.n_layers:
            raise ModelError(
                f"{self.tap} leaves no slot above the trunk of {self.n_layers} layers",
                where="config.tap",
            )

    @property
    def slots(self) -> tuple[int, ...]:
        """Layers where bodies plug in: all above the tap."""
        return tuple(range(self.tap, self.n_layers))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read a config from plain data.

        Raises:
            ModelError: For missing or unknown fields.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ModelError(str(error), where="config") from error


def tiny_bytes() -> BackboneConfig:
    """Return the byte-level backbone that ships with the project: 2.3 M parameters."""
    return BackboneConfig(
        vocab_size=256,
        d_model=192,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        d_head=48,
        d_ff=480,
        tap=2,
        context=512,
        scout_width=64,
    )
