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
from composable.interop.tables import (
    DELETE_IT,
    Count,
    Positive,
    Schema,
    convert,
    require_agreement,
)
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
        kind: Its type.
        default: The value that the family itself has if it is missing; computed from the config if
            callable.
    """

    theirs: str
    kind: Any = Count
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
    "norm_eps": Field(theirs="rms_norm_eps", kind=Positive),
    "is_tied": Field(theirs="tie_word_embeddings", kind=bool, default=False),
}
ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "is_encoder_decoder": (None, False),
    "partial_rotary_factor": (None, 1.0),
}
# The rest of what tools leave in a config. None of it changes logits: names and versions, choices
# of implementation, generation settings of old versions, labels of other tasks, and switches of
# other kinds of models.
IGNORED: Final = frozenset(
    {
        *("transformers_version", "torch_dtype", "dtype", "auto_map", "tokenizer_class"),
        *("pretraining_tp",),  # the same sums in parts
        *("attn_implementation", "use_cache", "use_flash_attention_2", "gradient_checkpointing"),
        *("initializer_range", "attention_dropout", "hidden_dropout", "neftune_noise_alpha"),
        *("classifier_dropout", "transformers.js_config", "torchscript", "use_bfloat16"),
        *("return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states"),
        *("output_scores", "output_router_logits", "chunk_size_feed_forward", "prefix"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        *("task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "is_decoder"),
        *("add_cross_attention", "cross_attention_hidden_size", "pad_token_id", "unk_token_id"),
        *("sep_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams", "num_beam_groups"),
        *("early_stopping", "diversity_penalty", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("num_return_sequences", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens", "penalty_alpha", "generation_config"),
    }
)
IGNORED_PREFIXES: Final = ("_", "unsloth_")
_TOKENS = int | list[int] | None
# Fields that are read beside those of the tables.
_OTHER_TYPES: Final[dict[str, Any]] = {
    "model_type": str,
    "architectures": list[str] | None,
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "rope_theta": Positive | None,
    "rope_scaling": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
    "layer_types": list[str] | None,
    "pruned_heads": dict[str, list[int]] | None,
}
_HINTS: Final = {
    "quantization_config": "import the model that it was quantised from, or a GGUF file of it",
    "partial_rotary_factor": DELETE_IT,
    "use_sliding_window": "if the window is never shorter than a text, set it to false",
}
# Buffers in old checkpoints that follow from the config.
IGNORED_TENSORS: Final = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# Fields of our rotary scaling in theirs.
_ROPE_FIELDS: Final = {
    "factor": "factor",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
_ROPE_TYPES: Final = {
    "rope_theta": Positive | None,
    "rope_type": str | None,
    "type": str | None,
    "factor": Positive | None,
    "low_freq_factor": Positive | None,
    "high_freq_factor": Positive | None,
    "original_max_position_embeddings": Count | None,
}
_DEFAULT_THETA: Final = 10_000.0  # that of transformers for all of these families
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
    only={"rope_interleaved": (None, False), "is_llama_config": (None, True)},
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
    only={"use_sliding_window": (None, False)},
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
    if not isinstance(name, str) or name not in FAMILIES:
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
    _schema(family, fields).check(config, "config.")
    _require_architecture(family, config)
    _require_full_attention(config)
    if config.get("pruned_heads"):
        raise InteropError("heads were removed", where="config.pruned_heads")
    read = {name: entry.read(config) for name, entry in fields.items()}
    theta, scaling = _read_rope(config)
    try:
        return BackboneConfig(
            **{**read, **family.implied},
            tap=tap or math.ceil(read["n_layers"] / 4),
            scout_width=scout_width,
            rope_theta=theta,
            rope_scaling=scaling,
        )
    except ModelError as error:
        raise InteropError(f"no backbone: {error}", where="config") from error


def _schema(family: Family, fields: Mapping[str, Field]) -> Schema:
    """Return what a config of a family may hold."""
    return Schema(
        types=_OTHER_TYPES | {entry.theirs: entry.kind | None for entry in fields.values()},
        only={**ONLY, **family.only},
        ignored=IGNORED | family.ignored,
        ignored_prefixes=IGNORED_PREFIXES,
        changes="what the model computes",
        hints=_HINTS,
    )


def _require_architecture(family: Family, config: Config) -> None:
    """Require that the class which is named is the one that the family's name means."""
    named = config.get("architectures")
    if named and family.architecture.lower() not in [name.lower() for name in named]:
        raise InteropError(
            f"{named!r} contradicts config.model_type, which is {family.name!r}, expected "
            f"[{family.architecture!r}]",
            where="config.architectures",
            hint=f"transformers follows model_type; if the model is a {family.architecture}, set "
            f'architectures to ["{family.architecture}"]',
        )


def _require_full_attention(config: Config) -> None:
    """Require that the list of layers has all layers, and that each attends to all positions."""
    layers, place = config.get("layer_types"), "config.layer_types"
    if layers is None:
        return
    for name in layers:
        if name != "full_attention":
            raise InteropError(
                f"{name!r} is not implemented, expected 'full_attention'", where=place
            )
    require_agreement(
        {"config.num_hidden_layers": config.get("num_hidden_layers"), place: len(layers)}
    )


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
    """Return base and scaling of the rotary frequencies, from the old spelling or the new.

    Where a config has both, transformers follows the old one, and its older versions know no other.
    """
    places = [name for name in ("rope_scaling", "rope_parameters") if config.get(name)]
    read = [_read_rope_table(config[place], config, f"config.{place}.") for place in places]
    if len(set(read)) > 1:
        require_agreement(
            {f"config.{place}": config[place] for place in places},
            hint="transformers follows rope_scaling; delete the other field",
        )
    return read[0] if read else (config.get("rope_theta") or _DEFAULT_THETA, None)


def _read_rope_table(table: Config, config: Config, place: str) -> tuple[float, RopeScaling | None]:
    """Return base and scaling that one of the two spellings states."""
    theta, kind = _read_rope_names(table, config, place)
    if kind not in ("default", "llama3"):
        raise InteropError(
            f"{kind!r} is not implemented, expected 'default' or 'llama3'",
            where=f"{place}rope_type",
        )
    own = ("rope_theta", "rope_type", "type")
    Schema(
        types=_ROPE_TYPES if kind == "llama3" else {name: _ROPE_TYPES[name] for name in own},
        only={"partial_rotary_factor": (None, 1.0)},
        changes="what the model computes",
    ).check(table, place)
    if kind == "default":
        return theta, None
    for name in _ROPE_FIELDS.values():
        if table.get(name) is None:
            raise InteropError("missing field", where=f"{place}{name}")
    try:
        return theta, RopeScaling(**{ours: table[theirs] for ours, theirs in _ROPE_FIELDS.items()})
    except ModelError as error:
        raise InteropError(str(error), where=place.removesuffix(".")) from error


def _read_rope_names(table: Config, config: Config, place: str) -> tuple[float, str]:
    """Return base and kind, each of which may be stated in two places."""
    names = {
        f"{place}{name}": convert(table[name], str, f"{place}{name}")
        for name in ("rope_type", "type")
        if table.get(name) is not None
    }
    require_agreement(names, hint="transformers follows rope_type; delete the other field")
    thetas = {
        where: convert(value, Positive, where)
        for where, value in (
            (f"{place}rope_theta", table.get("rope_theta")),
            ("config.rope_theta", config.get("rope_theta")),
        )
        if value is not None
    }
    require_agreement(
        thetas, hint=f"transformers follows {place}rope_theta; delete the other field"
    )
    return next(iter(thetas.values()), _DEFAULT_THETA), next(iter(names.values()), "default")


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
