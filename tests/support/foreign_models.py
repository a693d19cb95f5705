"""Readers of other projects' models, with good files to start from: a folder and a GGUF file.

Each reader gets one file of a small model that is complete otherwise.
"""

import json
import os
import struct
from pathlib import Path

import numpy as np

from tests.support.checkpoints import CHECKPOINT_CONFIGS, checkpoint_shapes, save_checkpoint
from tests.support.subword_kinds import KINDS

CONFIG = CHECKPOINT_CONFIGS["llama"] | {
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": 2,
    "rope_parameters": {
        **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 32,
    },
}
TOKENIZER_CONFIG = {
    "bos_token": "<|begin|>",
    "eos_token": {"content": "<|end|>", "special": True},
    "add_bos_token": True,
    "added_tokens_decoder": {"1": {"content": "<|begin|>", "special": True, "lstrip": False}},
    "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}],
}
GENERATION = {"eos_token_id": [2, 1], "do_sample": True}
ADAPTER = {
    **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False},
    **{"target_modules": ["up_proj"], "exclude_modules": None, "layers_to_transform": [1, 2]},
    **{"rank_pattern": {"1.mlp.up_proj": 2}, "alpha_pattern": {"up_proj": 3.5}},
    **{"layers_pattern": "layers", "base_model_name_or_path": "a/b", "revision": None},
}
# Without its template, which a process renders: ten times as fast.
NO_TEMPLATE = TOKENIZER_CONFIG | {"chat_template": [{"name": "default"}]}
JSON_DOCUMENTS = {
    "hf-config": CONFIG,
    "hf-tokenizer-config": NO_TEMPLATE,
    "hf-generation": GENERATION,
    "hf-adapter": ADAPTER,
}


def make_readers(scratch: Path):
    """Return a reader and its good inputs for every kind of file, by name."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    from composable.interop.checkpoint import Checkpoint, open_source
    from composable.interop.families import LLAMA, read_config
    from composable.interop.gguf_tokenizer import build_tokenizer
    from composable.interop.peft import read_adapter
    from composable.interop.tokenizer import make_tokenizer

    model, adapter = scratch / "model", scratch / "adapter"
    model.mkdir(exist_ok=True)
    adapter.mkdir(exist_ok=True)
    shapes = checkpoint_shapes(CONFIG)
    save_checkpoint(model, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    pairs = {}
    for layer in (1, 2):
        key = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        pairs[f"{key}.lora_A.weight"] = np.ones((2, 32), np.float32)
        pairs[f"{key}.lora_B.weight"] = np.ones((64, 2), np.float32)
    save_checkpoint(adapter, pairs)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    files = {
        "config.json": json.dumps(CONFIG),
        "tokenizer.json": KINDS["unigram"](),
        "tokenizer_config.json": json.dumps(NO_TEMPLATE),
        "generation_config.json": json.dumps(GENERATION),
    }

    def read_model(name):
        def read(data):
            for file, text in files.items():
                (model / file).write_text(text)
            (model / name).write_bytes(data)
            source = open_source(model)
            Checkpoint(source)
            make_tokenizer(source).encode("the river")

        return read

    cfg = read_config(LLAMA, CONFIG, tap=1, scout_width=8)

    def read_adapter_config(data):
        (adapter / "adapter_config.json").write_bytes(data)
        read_adapter(adapter, cfg).body(cfg)

    def read_gguf(data):
        (scratch / "x.gguf").write_bytes(data)
        source = open_source(scratch / "x.gguf")
        if source.tokenizer is not None:
            make_tokenizer(source).encode("the river")
        assert build_tokenizer({}, "x") is None

    def encode(document):
        return json.dumps(document).encode()

    return {
        "hf-config": (read_model("config.json"), (encode(CONFIG),)),
        "hf-tokenizer": (
            read_model("tokenizer.json"),
            tuple(make().encode() for make in KINDS.values()),
        ),
        "hf-tokenizer-config": (read_model("tokenizer_config.json"), (encode(TOKENIZER_CONFIG),)),
        "hf-generation": (read_model("generation_config.json"), (encode(GENERATION),)),
        "hf-adapter": (read_adapter_config, (encode(ADAPTER),)),
        "gguf": (read_gguf, (make_gguf(),)),
    }


READER_NAMES = (
    "hf-config", "hf-tokenizer", "hf-tokenizer-config", "hf-generation", "hf-adapter", "gguf",
)  # fmt: skip


def make_gguf() -> bytes:
    """Return a GGUF file of metadata alone, written out by hand: no library is needed."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def entry(key, value):
        if isinstance(value, str):
            return text(key) + struct.pack("<I", 8) + text(value)
        if isinstance(value, bool):
            return text(key) + struct.pack("<I?", 7, value)
        if isinstance(value, float):
            return text(key) + struct.pack("<If", 6, value)
        if isinstance(value, int):
            return text(key) + struct.pack("<II", 4, value)
        kind = 8 if isinstance(value[0], str) else 5
        items = [text(v) if kind == 8 else struct.pack("<i", v) for v in value]
        return text(key) + struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)

    metadata = {
        "general.architecture": "llama",
        "general.license": "mit",
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<b>", "t", "h", "e", "th"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    entries = [entry(key, value) for key, value in metadata.items()]
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
    return data + bytes(-len(data) % 32)
