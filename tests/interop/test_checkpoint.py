import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from composable.errors import InteropError
from composable.interop.checkpoint import Checkpoint, open_source
from composable.model.backbone import Backbone
from composable.model.config import RopeScaling
from composable.model.tensors import shapes_of
from tests.support.subword_kinds import KINDS

FAMILIES = ("llama", "smollm", "qwen3", "olmo2")


def open_checkpoint(folder, **options):
    return Checkpoint(open_source(folder), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_backbone_is_there_once_and_in_shape(write_checkpoint, family):
    folder, _ = write_checkpoint(family)
    checkpoint = open_checkpoint(folder)

    module = Backbone(checkpoint.cfg, np.zeros(600), 600, rngs=nnx.Rngs(0))
    expected = {
        name: shape
        for name, shape in shapes_of(module).items()
        if name != "class_map" and not name.startswith("scout.")
    }
    assert {name: array.shape for name, array in checkpoint.items()} == expected
    assert {name: spec.shape for name, spec in checkpoint.specs.items()} == expected
    assert checkpoint.n_bytes == sum(array.nbytes for array in checkpoint.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_is_lost_or_made_up(write_checkpoint, family):
    folder, tensors = write_checkpoint(family)
    found = np.sort(np.concatenate([x.ravel() for x in open_checkpoint(folder).values()]))
    expected = np.sort(np.concatenate([x.ravel() for x in tensors.values()]))
    np.testing.assert_array_equal(found, expected)


def test_axes_are_put_in_order(write_checkpoint):
    folder, tensors = write_checkpoint("qwen3")
    checkpoint = open_checkpoint(folder)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    o = tensors["model.layers.1.self_attn.o_proj.weight"]
    ours_q, ours_o = (checkpoint[f"layers.1.attention.w_{x}"] for x in "qo")
    for head in range(4):
        rows = slice(head * 16, (head + 1) * 16)
        np.testing.assert_array_equal(ours_q[:, head], q[rows].T)
        np.testing.assert_array_equal(ours_o[head], o[:, rows].T)


def test_shards_are_one_checkpoint(write_checkpoint, save):
    folder, tensors = write_checkpoint("olmo2", shards=4)
    save(folder / "..", {})  # a file outside, which nobody asks for
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint["embed"], tensors["model.embed_tokens.weight"])
    assert len(checkpoint.source.files) == 4


def test_bfloat16_stays_and_float16_becomes_exact_float32(write_checkpoint, save):
    folder, tensors = write_checkpoint("llama", dtype=ml_dtypes.bfloat16)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == "BF16"
    np.testing.assert_array_equal(checkpoint["embed"], tensors["model.embed_tokens.weight"])
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    save(folder, half)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == "F32"
    assert checkpoint["norm"].dtype == np.float32
    np.testing.assert_array_equal(checkpoint["norm"], half["model.norm.weight"])
    assert open_checkpoint(folder, dtype="BF16")["norm"].dtype == ml_dtypes.bfloat16


def test_the_config_is_taken_over(write_checkpoint):
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder, _ = write_checkpoint(
        "llama", rope_parameters=None, rope_scaling=llama3, rope_theta=500_000.0
    )
    cfg = open_checkpoint(folder, tap=2, scout_width=8).cfg
    assert (cfg.tap, cfg.scout_width, cfg.rope_theta, cfg.is_tied) == (2, 8, 500_000.0, False)
    assert cfg.rope_scaling == RopeScaling(
        factor=8.0, low_frequency=1.0, high_frequency=4.0, original_context=32
    )
    assert open_checkpoint(folder).cfg.tap == 1  # a quarter of three layers, rounded up


@pytest.mark.parametrize(
    ("family", "change", "field"),
    [
        ("llama", {"attention_bias": True}, "config.attention_bias"),
        ("llama", {"mlp_bias": True}, "config.mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "config.hidden_act"),
        ("llama", {"rope_interleaved": True}, "config.rope_interleaved"),
        ("llama", {"final_logit_softcapping": 30.0}, "config.final_logit_softcapping"),
        ("llama", {"quantization_config": {"bits": 4}}, "config.quantization_config"),
        ("llama", {"hidden_size": None}, "config.hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "config"),
        ("llama", {"model_type": "mamba"}, "config.model_type"),
        ("qwen3", {"use_sliding_window": True}, "config.use_sliding_window"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "config.layer_types",
        ),
        ("olmo2", {"clip_qkv": 8.0}, "config.clip_qkv"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "config.rope_parameters.rope_type",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "config.rope_scaling.rope_type",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "config.rope_parameters.partial_rotary_factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "config.rope_parameters.low_freq_factor",
        ),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(
    write_checkpoint, family, change, field
):
    folder, _ = write_checkpoint(family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InteropError) as caught:
        open_checkpoint(folder)
    assert caught.value.where == field


def test_a_tensor_that_is_missing_unknown_or_misshapen_is_refused_by_name(write_checkpoint, save):
    folder, tensors = write_checkpoint("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, message in (
        ({n: x for n, x in tensors.items() if n != name}, rf"'{name}' is missing.*\[64, 32\]"),
        (
            {**tensors, "model.extra": tensors[name]},
            r"'model.extra' of shape \[64, 32\] is unknown",
        ),
        (
            {**tensors, name: np.ascontiguousarray(tensors[name].T)},
            rf"'{name}' has shape \[32, 64\], expected \[64, 32\]",
        ),
        ({**tensors, name: tensors[name].astype(np.int64)}, f"'{name}' has dtype I64"),
    ):
        save(folder, changed)
        with pytest.raises(InteropError, match=message):
            open_checkpoint(folder)


def test_what_is_not_finite_is_refused_when_it_is_read(write_checkpoint, save):
    folder, tensors = write_checkpoint("llama")
    tensors["model.norm.weight"][3] = np.nan
    save(folder, tensors)
    with pytest.raises(Exception, match=r"'model.norm.weight' is not finite at \[3\]"):
        open_checkpoint(folder)["norm"]


def test_a_tied_model_may_hold_its_embeddings_twice_but_not_others(write_checkpoint, save):
    folder, tensors = write_checkpoint("smollm")
    embed = tensors["model.embed_tokens.weight"]
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save(folder, {**tensors, **old, "lm_head.weight": embed})
    assert "unembed" not in open_checkpoint(folder)
    save(folder, {**tensors, "lm_head.weight": embed + 1})
    with pytest.raises(InteropError, match=r"'lm_head.weight' differs from the embeddings"):
        open_checkpoint(folder)


def test_an_index_that_lies_is_refused(write_checkpoint):
    folder, _ = write_checkpoint("llama", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = dict(index["weight_map"])
    path.write_text(json.dumps({"weight_map": {**files, "more": files["model.norm.weight"]}}))
    with pytest.raises(
        InteropError, match=r"'more' is missing, listed in model\.safetensors\.index"
    ):
        open_checkpoint(folder)
    path.write_text(json.dumps({"weight_map": {**files, "model.norm.weight": "../x"}}))
    with pytest.raises(InteropError, match=r"'\.\./x' is not a file name"):
        open_checkpoint(folder)


def test_pickles_are_never_opened(write_checkpoint):
    folder, _ = write_checkpoint("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InteropError, match="may run code") as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InteropError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(InteropError, match="expected a folder"):
        open_source(tmp_path / "model.txt")
    with pytest.raises(InteropError, match="no such file"):
        open_source(tmp_path)


def test_special_tokens_are_found(write_checkpoint):
    folder, _ = write_checkpoint("llama")
    found = open_source(folder).tokenizer
    assert (found.begin, found.ends) == ("<|begin|>", ("<|end|>",))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert open_source(folder).tokenizer.begin == "<|end|>"  # nothing else is declared
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InteropError, match="no token begins or ends"):
        open_source(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    assert open_source(folder).tokenizer.ends == ("<|end|>",)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


def change_json(path, **changes):
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **changes}))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"rope_scaling": LLAMA3}, "config.rope_parameters"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "config.rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, "config.rope_parameters"),
        ({"rope_theta": 5e5}, "config.rope_theta"),
        ({"rope_parameters": {**LLAMA3, "type": "default"}}, "config.rope_parameters.type"),
        (
            {"rope_parameters": None, "rope_scaling": {**LLAMA3, "rope_theta": 1e4}},
            "config.rope_th",
        ),
        ({"architectures": ["MistralForCausalLM"]}, "config.architectures"),
        ({"architectures": ["LlamaModel", "LlamaForTokens"]}, "config.architectures"),
        ({"layer_types": ["full_attention"] * 2}, "config.layer_types"),
    ],
)
def test_a_fact_stated_twice_and_differently_is_refused(write_checkpoint, change, where):
    theta = {"rope_theta": 5e5} if where == "config.rope_th" else {}
    folder, _ = write_checkpoint("llama", rope_parameters=PLAIN)
    change_json(folder / "config.json", **change, **theta)
    with pytest.raises(InteropError) as caught:
        open_checkpoint(folder)
    assert caught.value.where.startswith(where)


@pytest.mark.parametrize(
    ("change", "theta", "factor"),
    [
        ({"rope_parameters": PLAIN, "rope_theta": 1e4}, 1e4, None),
        ({"rope_parameters": PLAIN, "rope_scaling": None}, 1e4, None),
        ({"rope_parameters": PLAIN, "rope_scaling": {}}, 1e4, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {**LLAMA3, "type": "llama3"}, "rope_scaling": LLAMA3}, 1e4, 8.0),
        ({"rope_parameters": None}, 1e4, None),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}}, 1e4, None),
    ],
)
def test_a_fact_stated_twice_alike_or_once_is_taken(write_checkpoint, change, theta, factor):
    folder, _ = write_checkpoint("llama", **change)
    cfg = open_checkpoint(folder).cfg
    assert (cfg.rope_theta, cfg.rope_scaling and cfg.rope_scaling.factor) == (theta, factor)


@pytest.mark.parametrize(
    "change",
    [
        {"_commit_hash": "4e20", "_attn_implementation_autoset": True, "_unheard_of": [1]},
        {"unsloth_fixed": True, "unsloth_version": "2024.12.4", "unsloth_next": 1},
        {"max_length": 4096, "do_sample": True, "temperature": 0.9, "repetition_penalty": 1.1},
        {"pruned_heads": {}, "is_decoder": False, "tie_encoder_decoder": False},
        {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
        {"sliding_window": None, "anything": None},
        {"architectures": ["LLaMAForCausalLM"]},
        {"hidden_act": "swish", "pretraining_tp": 2, "partial_rotary_factor": 1.0},
    ],
)
def test_what_changes_nothing_is_taken(write_checkpoint, change):
    folder, _ = write_checkpoint("llama")
    before = open_checkpoint(folder).cfg
    change_json(folder / "config.json", **change)
    assert open_checkpoint(folder).cfg == before


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "32"},
        {"hidden_size": 32.0},
        {"num_hidden_layers": True},
        {"num_attention_heads": [4, 4, 4]},
        {"rms_norm_eps": "1e-6"},
        {"rms_norm_eps": -1.0},
        {"tie_word_embeddings": "false"},
        {"attention_bias": 0},
        {"architectures": "LlamaForCausalLM"},
        {"rope_theta": {"a": 1}},
        {"rope_parameters": [1]},
        {"layer_types": {"a": 1}},
        {"pruned_heads": {"0": [1]}},
        {"model_type": ["llama"]},
        {"eos_token_id": "2"},
    ],
)
def test_no_field_is_used_before_its_type_is_known(write_checkpoint, change):
    folder, _ = write_checkpoint("llama")
    change_json(folder / "config.json", **change)
    with pytest.raises(InteropError) as caught:
        open_checkpoint(folder)
    assert caught.value.where == f"config.{next(iter(change))}"


def test_an_unknown_field_has_a_cure(write_checkpoint):
    folder, _ = write_checkpoint("llama", unheard_of=7)
    with pytest.raises(InteropError, match="7") as caught:
        open_checkpoint(folder)
    assert caught.value.hint == "if it changes nothing, delete the field"


def test_weights_that_are_there_twice_are_refused(write_checkpoint, save):
    folder, tensors = write_checkpoint("llama", shards=2)
    save(folder, {name: array + 1 for name, array in tensors.items()})
    with pytest.raises(InteropError, match="twice") as caught:
        open_checkpoint(folder)
    assert "model.safetensors.index.json" in caught.value.hint
    weight_map = dict.fromkeys(tensors, "model.safetensors")
    change_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert len(open_checkpoint(folder).source.files) == 1


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, [6, 7]),
        ({"eos_token_id": 5}, {"do_sample": True}, [5]),
        ({"eos_token_id": [5, 100_000, -1]}, {}, [5]),
        ({}, {"eos_token_id": 6}, [6]),
    ],
)
def test_a_text_ends_where_transformers_ends_it(
    write_checkpoint, subwords, config, generation, ends
):
    folder, _ = write_checkpoint("llama", **config)
    change_json(folder / "generation_config.json", **generation)
    names = [json.loads(subwords.to_files()[0])["model"]["vocab"]]
    by_id = {index: token for token, index in names[0].items()}
    assert open_source(folder).tokenizer.ends == ("<|end|>", *(by_id[i] for i in ends))


@pytest.mark.parametrize(
    ("file", "change", "where"),
    [
        ("tokenizer_config.json", {"bos_token": "<s>"}, "bos_token"),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>"}}, "eos_token"),
        ("tokenizer_config.json", {"eos_token": 2}, "eos_token"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"0": {"content": "<|end|>"}}},
            "added_tokens_decoder.0.content",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9999": {"content": "<pad>", "special": True}}},
            "added_tokens_decoder.9999.content",
        ),
        ("special_tokens_map.json", {"eos_token": "<|begin|>"}, "eos_token"),
        ("generation_config.json", {"eos_token_id": ["<|end|>"]}, "eos_token_id"),
    ],
)
def test_a_tokenizer_config_that_contradicts_is_refused(write_checkpoint, file, change, where):
    folder, _ = write_checkpoint("llama")
    change_json(folder / file, **change)
    with pytest.raises(InteropError) as caught:
        open_source(folder)
    assert caught.value.where == f"{folder / file}: {where}"


def test_the_tokenizer_is_asked_what_it_puts_before_a_text(write_checkpoint):
    folder, _ = write_checkpoint("llama")
    for name, make in KINDS.items():
        (folder / "tokenizer.json").write_text(make())
        (folder / "tokenizer_config.json").write_text("{}")
        found = open_source(folder).tokenizer
        assert (found.begin, found.bos) == ("<|begin|>", None), name
        stated = {"bos_token": "<|end|>", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
        assert open_source(folder).tokenizer.begin == "<|begin|>"  # as transformers does
