"""Families of transformers: a table for each, with the names that its checkpoints use.

A family is data: for every tensor of ours, its name and the order of its axes in either format; for
every field of ours, the field of its config; what the family implies; and which of its fields must
have one value, because no other is implemented here. A field that is in no table is rejected: it
may change what the model computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from composable.errors import InteropError, ModelError
from composable.model.config import BackboneConfig, RopeScaling

_REQUIRED: Final = object()
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor: its names, and the order of its axes.

    Args:
        ours: Attribute path in `Backbone`; `{i}` is the layer.
        theirs: Name in a Hugging Face checkpoint.
        gguf: Name in a GGUF file.
        layout: Their axes and ours in the letters of `interface.dims`, as einops writes them.
        gguf_layout: The same for GGUF where it differs.
    """

    ours: str
    theirs: str
    gguf: str
    layout: str
    gguf_layout: str | None = None


@dataclass(frozen=True, kw_only=True)
class Field:
    """The field of their config that one of ours is read from.

    Args:
        theirs: Its name.
        default: Its value if it is missing; computed from the config if callable.
    """

    theirs: str
    default: Any = _REQUIRED

    def read(self, config: Config) -> Any:
        """Return the value."""
        value = config.get(self.theirs)
        if value is not None:
            return value
        if self.default is _REQUIRED:
            raise InteropError("missing field", where=f"config.{self.theirs}")
        return self.default(config) if callable(self.default) else self.default


@dataclass(frozen=True, kw_only=True)
class Family:
    """The tables of a family.

    Args:
        name: Its name in `model_type` and `general.architecture`.
        architecture: Its name in `architectures`.
        rows: Its tensors, except the output matrix that only untied models have.
        fields: Our config's fields in theirs, where they differ from `FIELDS`.
        implied: Fields of our config that the family fixes.
        only: Its own fields, each with the values that are allowed.
        ignored: Its own fields that do not affect what is computed here.
    """

    name: str
    architecture: str
    rows: tuple[Row, ...]
    fields: Mapping[str, Field] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


def _divide(config: Config) -> int:
    return int(FIELDS["d_model"].read(config)) // int(FIELDS["n_heads"].read(config))


# Fields that all families share.
FIELDS: Final[dict[str, Field]] = {
    "vocab_size": Field(theirs="vocab_size"),
    "d_model": Field(theirs="hidden_size"),
    "n_layers": Field(theirs="num_hidden_layers"),
    "n_heads": Field(theirs="num_attention_heads"),
    "n_kv_heads": Field(
        theirs="num_key_value_heads", default=lambda config: FIELDS["n_heads"].read(config)
    ),
    "d_head": Field(theirs="head_dim", default=_divide),
    "d_ff": Field(theirs="intermediate_size"),
    "context": Field(theirs="max_position_embeddings"),
    "norm_eps": Field(theirs="rms_norm_eps"),
    "is_tied": Field(theirs="tie_word_embeddings", default=False),
}
ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
}
IGNORED: Final = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
        *("use_cache", "initializer_range", "attention_dropout", "_name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type"),
        *("rope_theta", "rope_scaling", "rope_parameters"),  # `_read_rope` reads these
    }
)
# Buffers in old checkpoints that follow from the config.
IGNORED_TENSORS: Final = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# Fields of our rotary scaling in theirs.
_ROPE_FIELDS: Final = {
    "factor": "factor",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
# Fields that distinguish families, with their values where a family implies nothing else.
STRUCTURE: Final = {"norm_placement": "before", "qk_norm": "none"}
_HF: Final = "model.layers.{i}."
_EMBED: Final = Row(
    ours="embed", theirs="model.embed_tokens.weight", gguf="token_embd.weight", layout="V D -> V D"
)
_NORM: Final = Row(ours="norm", theirs="model.norm.weight", gguf="output_norm.weight", layout="D")
UNEMBED: Final = Row(
    ours="unembed", theirs="lm_head.weight", gguf="output.weight", layout="V D -> V D"
)


def _projection(
    ours: str, theirs: str, gguf: str, layout: str, gguf_layout: str | None = None
) -> Row:
    return Row(
        ours=f"layers.{{i}}.{ours}",
        theirs=f"{_HF}{theirs}.weight",
        gguf=f"blk.{{i}}.{gguf}.weight",
        layout=layout,
        gguf_layout=gguf_layout,
    )


_VALUE_AND_OUTPUT: Final = (
    _projection("attention.w_v", "self_attn.v_proj", "attn_v", "(K H) D -> D K H"),
    _projection("attention.w_o", "self_attn.o_proj", "attn_output", "D (N H) -> N H D"),
)
_QUERY_AND_KEY: Final = (
    _projection("attention.w_q", "self_attn.q_proj", "attn_q", "(N H) D -> D N H"),
    _projection("attention.w_k", "self_attn.k_proj", "attn_k", "(K H) D -> D K H"),
)
# GGUF rotates adjacent pairs where the checkpoints rotate halves, and its rows are permuted
# to match: a head is H/2 pairs of two there, two halves here.
_PERMUTED_QUERY_AND_KEY: Final = (
    _projection(
        *("attention.w_q", "self_attn.q_proj", "attn_q", "(N H) D -> D N H"),
        "(N half two) D -> D N (two half)",
    ),
    _projection(
        *("attention.w_k", "self_attn.k_proj", "attn_k", "(K H) D -> D K H"),
        "(K half two) D -> D K (two half)",
    ),
)
_FEED_FORWARD: Final = (
    _projection("ffn.w_gate", "mlp.gate_proj", "ffn_gate", "F D -> D F"),
    _projection("ffn.w_up", "mlp.up_proj", "ffn_up", "F D -> D F"),
    _projection("ffn.w_down", "mlp.down_proj", "ffn_down", "D F -> F D"),
)
_NORMS_BEFORE: Final = (
    _projection("attention_norm", "input_layernorm", "attn_norm", "D"),
    _projection("ffn_norm", "post_attention_layernorm", "ffn_norm", "D"),
)

LLAMA: Final = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rows=(
        *(_EMBED, _NORM, *_NORMS_BEFORE),
        *(*_PERMUTED_QUERY_AND_KEY, *_VALUE_AND_OUTPUT, *_FEED_FORWARD),
    ),
    # SmolLM is a Llama with tied embeddings, as its config states.
    only={"rope_interleaved": (False,), "is_llama_config": (True,)},
    ignored=frozenset({"transformers.js_config"}),
)
QWEN3: Final = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(
        *(_EMBED, _NORM, *_NORMS_BEFORE),
        *(*_QUERY_AND_KEY, *_VALUE_AND_OUTPUT, *_FEED_FORWARD),
        _projection("attention.q_norm", "self_attn.q_norm", "attn_q_norm", "H"),
        _projection("attention.k_norm", "self_attn.k_norm", "attn_k_norm", "H"),
    ),
    fields={"d_head": Field(theirs="head_dim", default=128)},
    implied={"qk_norm": "head"},
    only={"use_sliding_window": (False,), "layer_types": ("full_attention",)},
    ignored=frozenset({"sliding_window", "max_window_layers"}),  # not without use_sliding_window
)
OLMO2: Final = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    rows=(
        _EMBED,
        _NORM,
        _projection("attention_norm", "post_attention_layernorm", "post_attention_norm", "D"),
        _projection("ffn_norm", "post_feedforward_layernorm", "post_ffw_norm", "D"),
        *(*_QUERY_AND_KEY, *_VALUE_AND_OUTPUT, *_FEED_FORWARD),
        _projection("attention.q_norm", "self_attn.q_norm", "attn_q_norm", "(N H) -> N H"),
        _projection("attention.k_norm", "self_attn.k_norm", "attn_k_norm", "(K H) -> K H"),
    ),
    implied={"norm_placement": "after", "qk_norm": "projection"},
)
FAMILIES: Final[dict[str, Family]] = {family.name: family for family in (LLAMA, QWEN3, OLMO2)}


def find_family(name: Any) -> Family:
    """Return a family by its name.

    Raises:
        InteropError: If the name is unknown.
    """
    if name not in FAMILIES:
        raise InteropError(
            f"{name!r} is not a family that can be imported ({', '.join(sorted(FAMILIES))})",
            where="config.model_type",
        )
    return FAMILIES[name]


def family_of(cfg: BackboneConfig) -> Family:
    """Return the family that computes what a config describes.

    Raises:
        InteropError: If there is none.
    """
    for family in FAMILIES.values():
        structure = {**STRUCTURE, **family.implied}
        if all(getattr(cfg, name) == value for name, value in structure.items()):
            return family
    raise InteropError(
        f"{cfg.qk_norm!r} with norms {cfg.norm_placement!r} is no family's "
        f"({', '.join(sorted(FAMILIES))})",
        where="config.qk_norm",
    )


def read_config(
    family: Family, config: Config, *, tap: int | None, scout_width: int
) -> BackboneConfig:
    """Return our config for theirs.

    Args:
        family: The family.
        config: Theirs, with the names of Hugging Face.
        tap: Number of trunk layers; by default a quarter, rounded up.
        scout_width: Hidden width of the backbone's own scout.

    Raises:
        InteropError: For a field that is missing, unknown, or has a value that would change what
            is computed; `where` names it.
    """
    fields = {**FIELDS, **family.fields}
    only = {**ONLY, **family.only}
    known = {f.theirs for f in fields.values()} | only.keys() | IGNORED | family.ignored
    for name in sorted(config.keys() - known):
        raise InteropError(
            f"unknown field with value {config[name]!r}; it may change what the model computes",
            where=f"config.{name}",
        )
    for name, allowed in only.items():
        values = config.get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise InteropError(
                    f"{value!r} is not implemented, expected {expected}", where=f"config.{name}"
                )
    read = {name: entry.read(config) for name, entry in fields.items()}
    theta, scaling = _read_rope(config)
    try:
        return BackboneConfig(
            **{**read, **family.implied},
            tap=tap or math.ceil(int(read["n_layers"]) / 4),
            scout_width=scout_width,
            rope_theta=theta,
            rope_scaling=scaling,
        )
    except (ModelError, TypeError) as error:
        raise InteropError(f"no backbone: {error}", where="config") from error


def write_config(family: Family, cfg: BackboneConfig) -> dict[str, Any]:
    """Return their config for ours: what `read_config` reads, in the spelling most runtimes know.

    Args:
        family: The family, as `family_of` finds it.
        cfg: Our config.
    """
    fields = {**FIELDS, **family.fields}
    scaling = cfg.rope_scaling
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{entry.theirs: getattr(cfg, name) for name, entry in fields.items()},
        "hidden_act": "silu",
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            **{theirs: getattr(scaling, ours) for ours, theirs in _ROPE_FIELDS.items()},
        },
    }


def _read_rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Return base and scaling of the rotary frequencies, from the old spelling or the new."""
    place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = dict(config.get(place) or {})
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind == "default" and not rope:
        return theta, None
    fields = _ROPE_FIELDS
    if kind != "llama3":
        raise InteropError(
            f"{kind!r} with {rope} is not implemented, expected 'default' or 'llama3'",
            where=f"config.{place}.rope_type",
        )
    for name in fields.values():
        if name not in rope:
            raise InteropError("missing field", where=f"config.{place}.{name}")
    for name in rope.keys() - set(fields.values()):
        raise InteropError(
            f"unknown field with value {rope[name]!r}", where=f"config.{place}.{name}"
        )
    try:
        return theta, RopeScaling(**{ours: rope[theirs] for ours, theirs in fields.items()})
    except (ModelError, TypeError) as error:
        raise InteropError(str(error), where=f"config.{place}") from error


def rows_of(family: Family, cfg: BackboneConfig) -> list[Row]:
    """Return one row per tensor of a model, for every layer, in the order of the model."""
    rows = [*family.rows, *([] if cfg.is_tied else [UNEMBED])]
    spelt = []
    for row in rows:
        layers = range(cfg.n_layers) if "{i}" in row.ours else range(1)
        for i in layers:
            names = (text.replace("{i}", str(i)) for text in (row.ours, row.theirs, row.gguf))
            ours, theirs, gguf = names
            spelt.append(
                Row(
                    ours=ours,
                    theirs=theirs,
                    gguf=gguf,
                    layout=row.layout,
                    gguf_layout=row.gguf_layout,
                )
            )
    return spelt


def sizes_of(cfg: BackboneConfig) -> dict[str, int]:
    """Return the size of every axis that a layout names."""
    return {
        "V": cfg.vocab_size,
        "D": cfg.d_model,
        "N": cfg.n_heads,
        "K": cfg.n_kv_heads,
        "H": cfg.d_head,
        "F": cfg.d_ff,
        "two": 2,
        "half": cfg.d_head // 2,
    }


def shape_of_axes(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that one side of a layout stands for: `(N H) D` is two axes."""
    groups = re.findall(r"\(([^)]*)\)|(\w+)", axes)
    return tuple(math.prod(sizes[name] for name in (many or one).split()) for many, one in groups)
