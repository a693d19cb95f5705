"""GGUF files: metadata to a config by the names of Hugging Face, tensors of any quantisation.

The `gguf` library parses the header and knows how to dequantise; tensors are read from the file one
at a time and never mapped whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from composable.errors import InteropError
from composable.files.reading import open_file
from composable.interop.gguf_tokenizer import build_tokenizer
from composable.interop.source import CheckpointSource, StoredTensor

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
# Keys that must have a value that this project computes, for what the config says.
_SAME_AS_HEAD: Final = ("rope.dimension_count", "attention.value_length")
_ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "rope.scaling.type": ("none",),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
}


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
    try:
        reader = GGUFReader(path)
        metadata = {name: entry.contents() for name, entry in reader.fields.items()}
    except Exception as error:  # the library raises nothing narrower
        raise InteropError(f"not a GGUF file: {error}", where=str(path)) from error
    if metadata.get("split.count", 1) > 1:
        raise InteropError("one part of a split file; join the parts first", where=str(path))
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
    license_ = metadata.get("general.license", "")
    return CheckpointSource(
        name=str(path),
        files=(path,),
        is_gguf=True,
        config=config,
        tensors=tensors,
        tokenizer=build_tokenizer(metadata, str(path)),
        license={"apache-2.0": "Apache-2.0", "mit": "MIT"}.get(license_, license_),
    )


def read_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that the metadata of a GGUF file stands for.

    Raises:
        InteropError: For a key of the architecture that is unknown, or has a value that would
            change what is computed; `where` names it.
    """
    family = metadata.get("general.architecture")
    prefix = f"{family}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    config: dict[str, Any] = {"model_type": family}
    for key, value in own.items():
        if key in FIELDS:
            # Shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06.
            config[FIELDS[key]] = (
                float(str(np.float32(value))) if isinstance(value, float) else value
            )
        elif key in _ONLY:
            if value not in _ONLY[key]:
                expected = " or ".join(map(repr, _ONLY[key]))
                raise InteropError(
                    f"{value!r} is not implemented, expected {expected}", where=prefix + key
                )
        elif key not in _SAME_AS_HEAD:
            raise InteropError(
                f"unknown key with value {value!r}; it may change what the model computes",
                where=prefix + key,
            )
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
