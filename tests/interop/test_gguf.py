import json

import numpy as np
import pytest

from composable.errors import InteropError
from composable.interop.checkpoint import Checkpoint, open_source
from composable.interop.gguf import _read_license, read_metadata
from composable.interop.gguf_tokenizer import RULES
from composable.model.subwords import SubwordTokenizer
from tests.support.foreign_models import make_gguf

gguf = pytest.importorskip("gguf")

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "olmo2": {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}


def gguf_name(name, family):
    if name == "rope_freqs.weight":
        return name
    name = name.replace("model.layers.", "blk.")
    names = {**GGUF_NAMES, **NORMS.get(family, NORMS["llama"])}
    for theirs, ours in sorted(names.items(), key=lambda pair: -len(pair[0])):
        if f"{theirs}.weight" in name:
            return name.replace(f"{theirs}.weight", f"{ours}.weight")
    raise AssertionError(name)


def permute(weight, n_heads):
    """Put the rows of Q or K in GGUF's order, as llama.cpp's converter does for Llama."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, family, config, tensors, subwords, quantise=None, extra=None):
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    definition = json.loads(subwords.to_files()[0])
    vocab = sorted(definition["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in vocab])
    writer.add_token_merges([" ".join(merge) for merge in definition["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    for name, array in tensors.items():
        if arch == "llama" and "q_proj" in name:
            array = permute(array, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            array = permute(array, config["num_key_value_heads"])
        if quantise is not None and array.ndim == 2:
            data = gguf.quantize(array, quantise)
            writer.add_tensor(gguf_name(name, family), data, raw_dtype=quantise)
        else:
            writer.add_tensor(gguf_name(name, family), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def both(write_checkpoint, subwords, tmp_path):
    """Return a function that opens one checkpoint in both formats."""

    def write(family, tensors=None, **options):
        folder, own = write_checkpoint(family)
        config = json.loads((folder / "config.json").read_text())
        own |= tensors or {}
        path = write_gguf(tmp_path / "model.gguf", family, config, own, subwords, **options)
        return Checkpoint(open_source(folder)), open_source(path)

    return write


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3", "olmo2"])
def test_both_formats_give_the_same_backbone(both, family):
    folder, source = both(family)
    checkpoint = Checkpoint(source)
    assert checkpoint.cfg == folder.cfg
    assert checkpoint.keys() == folder.keys()
    for name in folder:
        np.testing.assert_array_equal(checkpoint[name], folder[name], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "steps"), [("F16", 2048), ("BF16", 256), ("Q8_0", 254), ("Q4_0", 14)]
)
def test_quantised_tensors_come_within_half_a_step(both, kind, steps):
    folder, source = both("llama", quantise=gguf.GGMLQuantizationType[kind])
    checkpoint = Checkpoint(source)
    for name in folder:
        largest = np.abs(folder[name]).max()
        error = np.abs(checkpoint[name].astype(np.float32) - folder[name]).max()
        assert error <= 2.1 * largest / steps, name


def test_the_tokenizer_is_rebuilt(both, subwords):
    _, source = both("llama")
    found = source.tokenizer
    assert (found.begin, found.ends) == ("<|begin|>", ("<|end|>",))
    rebuilt = SubwordTokenizer(found.definition, begin=found.begin, ends=found.ends)
    for text in ("the quick brown fox", "naïve Füße ∀x ∃y φ→ψ", "a <|end|> b", "  \n\t"):
        np.testing.assert_array_equal(rebuilt.encode(text), subwords.encode(text))
    assert rebuilt.encode_markup("a<|end|>") == subwords.encode_markup("a<|end|>")


def test_rules_split_text_as_they_are_known_to():
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        "gpt-2": ["I", "'ll", " pay", " 1234", "  ", " now"],
        "smollm": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "  ", " now"],
        "llama-bpe": ["I", "'ll", " pay", " ", "123", "4", "  ", " now"],
        "dbrx": ["I", "'ll", " pay", " ", "123", "4", "  ", " now"],
        "qwen2": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "  ", " now"],
    }
    assert words.keys() == RULES.keys()
    for rule, expected in words.items():
        splitter = RULES[rule][0]()
        assert isinstance(splitter, tokenizers.pre_tokenizers.PreTokenizer)
        found = [word for word, _ in splitter.pre_tokenize_str("I'll pay 1234   now")]
        assert [word.replace("Ġ", " ") for word in found] == expected, rule


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "yarn"),
        ("attention.sliding_window", 4096),
        ("expert_count", 8),
        ("rope.dimension_count", 4),
        ("attention.value_length", 4),
        ("final_logit_softcapping", 30.0),
        ("attention.head_count_kv", [2, 2]),
        ("feed_forward_length", [64, 64]),
        ("attention.layer_norm_rms_epsilon", "1e-5"),
        ("rope.freq_base", 0.0),
        ("rope.scaling.factor", 8.0),
        ("context_length", 64.0),
    ],
)
def test_a_key_that_changes_the_mathematics_is_refused_by_name(key, value):
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": 32,
        "llama.attention.head_count": 4,
        f"llama.{key}": value,
    }
    with pytest.raises(InteropError) as caught:
        read_metadata(metadata)
    assert caught.value.where == f"llama.{key}"


def test_metadata_become_a_config():
    config = read_metadata(
        {
            "general.architecture": "llama",
            "llama.embedding_length": 32,
            "llama.attention.head_count": 4,
            "llama.rope.dimension_count": 8,
            "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        }
    )
    assert config["rms_norm_eps"] == 1e-5
    assert config["head_dim"] == 8


def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(subwords):
    from composable.interop.gguf_tokenizer import build_tokenizer

    tokens = {
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
    }
    assert build_tokenizer({}, "x") is None
    assert build_tokenizer(tokens, "x").begin == "a"
    for changes, field in (
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.pre": 1}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": ["a", 1]}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["x y"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["a"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.bos_token_id": 2}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.eos_token_id": -1}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.bos_token_id": None}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.add_space_prefix": True}, "tokenizer.ggml.add_space_prefix"),
    ):
        with pytest.raises(InteropError) as caught:
            build_tokenizer({**tokens, **changes}, "x")
        assert caught.value.where == f"x: {field}"


def test_what_is_no_gguf_file_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(InteropError, match="not a GGUF file"):
        open_source(path)


def llama3_factors(theta, d_head, factor, low=1.0, high=4.0, length=8192):
    """Return the factors by the words of the paper: a frequency at a time, by its wavelength."""
    factors = []
    for i in range(0, d_head, 2):
        wavelength = 2 * np.pi * theta ** (i / d_head)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_factors_of_rotary_frequencies_are_the_scaling_that_they_follow_from(both, factor):
    factors = llama3_factors(10_000.0, 8, factor)
    _, source = both("llama", tensors={"rope_freqs.weight": factors})
    scaling = Checkpoint(source).cfg.rope_scaling
    if factor == 1.0:
        assert scaling is None
        return
    assert (scaling.factor, scaling.original_context) == (factor, 8192)


@pytest.mark.parametrize("factors", [[1, 1, 2, 8], [1, 1], [0, 0, 0, 0]])
def test_other_factors_of_rotary_frequencies_are_refused(both, factors):
    with pytest.raises(InteropError, match="rope_freqs") as caught:
        both("llama", tensors={"rope_freqs.weight": np.array(factors, np.float32)})
    assert "config.json" in caught.value.hint


@pytest.mark.parametrize(
    ("stated", "license_"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("llama3.1", "llama3.1"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("other", ""),
        ("MIT License\nCopyright (c) 2024", ""),
        (["mit"], ""),
        (None, ""),
    ],
)
def test_a_licence_is_an_expression_or_none(stated, license_):
    assert _read_license(stated) == license_


def test_false_lengths_are_refused_at_once(tmp_path):
    good = make_gguf()
    at = good.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    path = tmp_path / "x.gguf"
    for length in (1 << 40, 1 << 63, (1 << 64) - 1, 6):
        path.write_bytes(good[:at] + length.to_bytes(8, "little") + good[at + 8 :])
        with pytest.raises(InteropError, match="not a GGUF file"):
            open_source(path)
