"""Shape of a backbone, and the presets.

The properties in which transformer families differ are fields, one per property; no code branches
on the name of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from composable.errors import ModelError
from composable.files.records import convert, convert_exactly

# Names of dtypes as tensor files spell them, and as NumPy and jax do.
DTYPE_NAMES: Final = {"F32": "float32", "BF16": "bfloat16"}
# How matrices are kept in memory; `kernels.quantized` says why bfloat16 is kept as bits.
MATRIX_DTYPE_NAMES: Final = {"I8": "int8", "BF16": "uint16"}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies stretched for a longer context than a model was first trained with.

    Wavelengths beyond `original_context / low_frequency` are stretched by `factor`, those below
    `original_context / high_frequency` are kept, and between the two it is interpolated.

    Args:
        factor: How much the longest wavelengths are stretched, at least 1.
        low_frequency: Turns within the original context below which a frequency is low.
        high_frequency: Turns within it above which a frequency is high; above `low_frequency`.
        original_context: Context before stretching, in tokens.

    Raises:
        ModelError: For a value out of its range; `where` names the field.

    References:
        Grattafiori et al. 2024, arXiv:2407.21783 (Llama 3), section 3.4.2, as released with 3.1.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_context: int

    def __post_init__(self) -> None:
        for name, least in (("factor", 1), ("low_frequency", 0), ("original_context", 1)):
            if not getattr(self, name) >= least:
                value = getattr(self, name)
                raise ModelError(f"{value!r} is below {least}", where=f"config.rope_scaling.{name}")
        if not self.high_frequency > self.low_frequency:
            raise ModelError(
                f"{self.high_frequency!r} is not above low_frequency ({self.low_frequency!r})",
                where="config.rope_scaling.high_frequency",
            )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Architecture of a causal transformer with RMSNorm, RoPE, grouped queries and SwiGLU.

    No layer has a bias, and attention reads all earlier positions; architectures that differ in
    this are not supported.

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
        norm_placement: Whether a layer normalises what goes into attention and feed-forward
            ("before") or what comes out of them ("after").
        qk_norm: How queries and keys are normalised: "none", each "head" by itself, or the whole
            "projection" at once.
        is_tied: Whether the embeddings also serve as output matrix; otherwise it has its own.
        rope_scaling: Stretching of the rotary frequencies, if there is any.
        dtype: Type of weights and activations, "F32" or "BF16"; scouts, the sums of norms and
            softmaxes always use float32.
        matrix_dtype: Type that matrices and embeddings are kept in if it has fewer bytes: "I8",
            with a scale for each output, or "BF16". The computation, which must be "F32", widens
            them where it multiplies them; such a backbone is for use, not for training.

    Raises:
        ModelError: For a value out of range or an impossible combination; `where` names the field.
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
    # Fields from here on are left out of the plain form where they have their default, so that
    # packages made before they existed keep their bytes.
    norm_placement: Literal["before", "after"] = "before"
    qk_norm: Literal["none", "head", "projection"] = "none"
    is_tied: bool = True
    rope_scaling: RopeScaling | None = None
    dtype: str = "F32"
    matrix_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not getattr(self, name) > 0:
                value = getattr(self, name)
                raise ModelError(f"{value!r} is not positive", where=f"config.{name}")
            if getattr(self, name) > (most := _MOST.get(name, _MAX_SIZE)):
                value = getattr(self, name)
                raise ModelError(f"{value!r} is above {most:,}", where=f"config.{name}")
        self._require_one_of("norm_placement", ("before", "after"))
        self._require_one_of("qk_norm", ("none", "head", "projection"))
        self._require_one_of("is_tied", (True, False))
        self._require_one_of("dtype", DTYPE_NAMES)
        if self.matrix_dtype is not None:
            self._require_one_of("matrix_dtype", MATRIX_DTYPE_NAMES)
            if self.dtype != "F32":
                raise ModelError(
                    f"{self.dtype} does not go with matrices of {self.matrix_dtype}, expected F32",
                    where="config.dtype",
                )
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

    def _require_one_of(self, name: str, allowed: Collection[Any]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            expected = ", ".join(map(str, allowed))
            raise ModelError(f"{value!r} is not one of {expected}", where=f"config.{name}")

    @property
    def slots(self) -> tuple[int, ...]:
        """Layers where bodies plug in: all above the tap."""
        return tuple(range(self.tap, self.n_layers))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        data = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in data.items()
            if name in _SIZES or getattr(self, name) != defaults[name]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a config from plain data.

        Raises:
            ModelError: For missing, unknown or ill-typed fields.
        """
        table = dict(data)
        if table.get("rope_scaling") is not None:
            where = "config.rope_scaling"
            scaling = convert(table["rope_scaling"], dict[str, Any], where, ModelError)
            table["rope_scaling"] = convert_exactly(scaling, RopeScaling, where, ModelError)
        return convert_exactly(table, cls, "config", ModelError)


# Nothing is made of a config before its sizes are known to be possible. A tensor file holds 4,096
# tensors, of which a layer has at least 9.
_MAX_SIZE: Final = 1 << 31
_MOST: Final = {"n_layers": 4096 // 9, "rope_theta": 1e30, "norm_eps": 1.0}
# The positive numbers, which the first release already had.
_SIZES: Final = (
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_head",
    "d_ff",
    "tap",
    "context",
    "scout_width",
    "rope_theta",
    "norm_eps",
)


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


def small_bytes() -> BackboneConfig:
    """Return a byte-level backbone of 12.7 M parameters, for experiments on an accelerator."""
    return BackboneConfig(
        vocab_size=256,
        d_model=384,
        n_layers=8,
        n_heads=6,
        n_kv_heads=2,
        d_head=64,
        d_ff=1024,
        tap=3,
        context=512,
        scout_width=128,
    )
