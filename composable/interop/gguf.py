"""GGUF files: metadata to a config by the names of Hugging Face, tensors of any quantisation.

The `gguf` library parses the header and knows how to dequantise; tensors are read from the file one
at a time and never mapped whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from composable.errors import InteropError
from composable.files.reading import open_file
from composable.interop.gguf_header import check_lengths
from composable.interop.gguf_tokenizer import build_tokenizer
from composable.interop.source import CheckpointSource, StoredTensor
from composable.interop.tables import Count, Index, Positive, Schema, convert

# Key after the architecture's name -> field of a Hugging Face config.
FIELDS: Final = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Keys that must have the value of the width of a head.
_SAME_AS_HEAD: Final = ("rope.dimension_count", "attention.value_length")
_SCHEMA: Final = Schema(
    types={
        **dict.fromkeys((*FIELDS, *_SAME_AS_HEAD), Count),
        **dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base"), Positive),
    },
    only={
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (1.0,),
        "rope.scale_linear": (1.0,),
        "attention.sliding_window": (0,),
        "attention.causal": (True,),
        "expert_count": (0,),
        "expert_used_count": (0,),
    },
    changes="what the model computes",
    cure="if it changes nothing, delete the key with `gguf-new-metadata --remove-metadata KEY`",
)
_ROPE_FACTORS: Final = "rope_freqs.weight"
# Llama 3.1 and later were stretched with these; converters write what follows from them.
_LLAMA3_ROPE: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_DEFAULT_THETA: Final = 10_000.0  # that of the format
_SAME_FACTORS: Final = 1e-4  # relative; they were computed in float32
_SPDX: Final = re.compile(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*")
_LICENSES: Final = {"apache-2.0": "Apache-2.0", "mit": "MIT", "other": "", "unknown": ""}


def open_gguf(path: Path) -> CheckpointSource:
    """Read the header of a GGUF file.

    Raises:
        InteropError: If the library is missing, or the file is malformed or has unknown keys.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InteropError(
            "reading GGUF needs the `gguf` library", hint="pip install 'composable[interop]'"
        ) from error
    open_file(path).close()  # the library would wait for a pipe
    check_lengths(path)
    try:
        reader = GGUFReader(path)
        metadata = {name: entry.contents() for name, entry in reader.fields.items()}
    except Exception as error:  # the library raises nothing narrower
        raise InteropError(f"not a GGUF file: {error}", where=str(path)) from error
    if convert(metadata.get("split.count", 1), Index, f"{path}: split.count") > 1:
        raise InteropError(
            "one part of a split file",
            where=str(path),
            hint="join the parts with `llama-gguf-split --merge FIRST_PART WHOLE`",
        )
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[str(tensor.name)] = StoredTensor(
            dtype=tensor.tensor_type.name,
            shape=shape,
            read=partial(
                _read_tensor,
                path,
                int(tensor.data_offset),
                tuple(tensor.data.shape),
                tensor.data.dtype.str,
                tensor.tensor_type,
                shape,
            ),
        )
    config = read_metadata(metadata)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if "token_embd.weight" in tensors:
        config.setdefault("vocab_size", tensors["token_embd.weight"].shape[0])
    if _ROPE_FACTORS in tensors:
        factors = np.asarray(tensors.pop(_ROPE_FACTORS).read(), np.float64)
        config["rope_scaling"] = _explain_rope_factors(factors, config, str(path))
    return CheckpointSource(
        name=str(path),
        files=(path,),
        is_gguf=True,
        config=config,
        tensors=tensors,
        tokenizer=build_tokenizer(metadata, str(path)),
        license=_read_license(metadata.get("general.license")),
    )


def _read_license(stated: Any) -> str:
    """Return a licence as an SPDX expression; empty if what is stated is none, such as its text."""
    if not isinstance(stated, str) or _SPDX.fullmatch(stated) is None:
        return ""
    return _LICENSES.get(stated, stated)


def _explain_rope_factors(
    factors: np.ndarray, config: Mapping[str, Any], where: str
) -> dict[str, Any] | None:
    """Return the scaling by which all rotary frequencies are divided by these factors.

    Raises:
        InteropError: If there is no such scaling.
    """
    d_head = config.get("head_dim", 0)
    if factors.shape == (d_head // 2,) and (factors > 0).all():
        if (factors == 1).all():
            return None
        frequency = config.get("rope_theta", _DEFAULT_THETA) ** -(np.arange(0, d_head, 2) / d_head)
        low, high, length = _LLAMA3_ROPE.values()
        kept = np.clip((frequency * length / (2 * np.pi) - low) / (high - low), 0, 1)
        # 1 / factors = kept + stretched * (1 - kept), of which the last frequency keeps least.
        stretched = (1 / factors[-1] - kept[-1]) / max(1 - kept[-1], _SAME_FACTORS)
        if stretched > 0 and np.allclose(1 / factors, kept + stretched * (1 - kept), _SAME_FACTORS):
            return {"rope_type": "llama3", "factor": round(float(1 / stretched), 3), **_LLAMA3_ROPE}
    raise InteropError(
        f"tensor {_ROPE_FACTORS!r} stretches the rotary frequencies as no known model does",
        where=where,
        hint="import the Hugging Face folder, whose config.json states the scaling",
    )


def read_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that the metadata of a GGUF file stands for.

    Raises:
        InteropError: For a key of the architecture that is unknown, or has a value that would
            change what is computed; `where` names it.
    """
    family = convert(metadata.get("general.architecture"), str, "general.architecture")
    prefix = f"{family}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    _SCHEMA.check(own, prefix)
    # Shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06.
    config = {"model_type": family} | {
        FIELDS[key]: float(str(np.float32(value))) if isinstance(value, float) else value
        for key, value in own.items()
        if key in FIELDS
    }
    if "head_dim" not in config and {"hidden_size", "num_attention_heads"} <= config.keys():
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    for key in _SAME_AS_HEAD:
        if own.get(key, config.get("head_dim")) != config.get("head_dim"):
            raise InteropError(
                f"{own[key]} is not implemented, expected the width of a head "
                f"({config.get('head_dim')})",
                where=prefix + key,
            )
    return config


def _read_tensor(
    path: Path, offset: int, shape: tuple[int, ...], dtype: str, kind: Any, wanted: tuple[int, ...]
) -> np.ndarray:
    """Read one tensor from the file and dequantise it."""
    from gguf import GGMLQuantizationType, dequantize

    count = int(np.prod(shape))
    with open_file(path) as file:
        file.seek(offset)
        data = np.fromfile(file, np.dtype(dtype), count)
    if len(data) != count:
        raise InteropError("the file was cut short", where=str(path))
    if kind == GGMLQuantizationType.BF16:
        data = data.view(np.uint16).view(ml_dtypes.bfloat16)
        return data.reshape(wanted)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return data.reshape(wanted)
    try:
        return np.asarray(dequantize(data.reshape(shape), kind)).reshape(wanted)
    except NotImplementedError as error:
        raise InteropError(
            f"tensors of type {kind.name} cannot be read", where=str(path)
        ) from error
