"""Small checkpoints as other tools write them.

Names and shapes are written out here a second time on purpose: the tables under test are not used.
"""

import json

import safetensors.numpy

SHARED_CONFIG = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    "torch_dtype": "float32",
}
CHECKPOINT_CONFIGS = {
    "llama": {**SHARED_CONFIG, "model_type": "llama", "mlp_bias": False},
    "smollm": {
        **SHARED_CONFIG,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "is_llama_config": True,
        "rope_interleaved": False,
    },
    "qwen3": {**SHARED_CONFIG, "model_type": "qwen3", "head_dim": 16, "use_sliding_window": False},
    "olmo2": {**SHARED_CONFIG, "model_type": "olmo2"},
}


def checkpoint_shapes(config):
    """Return names and shapes of a checkpoint, as transformers lays them out."""
    d, f = config["hidden_size"], config["intermediate_size"]
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    h = config.get("head_dim", d // n)
    names = {
        "self_attn.q_proj": (n * h, d),
        "self_attn.k_proj": (k * h, d),
        "self_attn.v_proj": (k * h, d),
        "self_attn.o_proj": (d, n * h),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "post_attention_layernorm": (d,),
    }
    if config["model_type"] == "olmo2":
        names |= {
            "post_feedforward_layernorm": (d,),
            "self_attn.q_norm": (n * h,),
            "self_attn.k_norm": (k * h,),
        }
    else:
        names["input_layernorm"] = (d,)
    if config["model_type"] == "qwen3":
        names |= {"self_attn.q_norm": (h,), "self_attn.k_norm": (h,)}
    whole = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        whole["lm_head.weight"] = (config["vocab_size"], d)
    layers = range(config["num_hidden_layers"])
    return whole | {
        f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in names.items()
    }


def save_checkpoint(folder, tensors, shards=1):
    """Write tensors in one file, or in several with an index."""
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    files = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(part, folder / file)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
