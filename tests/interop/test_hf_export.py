"""Layouts of other runtimes: the right one, or a refusal that names the field."""

import dataclasses

import pytest

from composable.errors import InteropError
from composable.interop.families import FAMILIES, family_of, read_config, write_config
from composable.interop.hf_export import (
    FLEX_OLMO,
    MIXTRAL,
    QWEN3_MOE,
    dense_pieces,
    find_layout,
    mixture_config,
    mixture_pieces,
    split_pieces,
)
from composable.model.config import BackboneConfig, RopeScaling

CFG = BackboneConfig(
    vocab_size=600,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    d_ff=64,
    tap=1,
    context=64,
    scout_width=16,
    rope_theta=5e5,
    is_tied=False,
    rope_scaling=RopeScaling(
        factor=8.0, low_frequency=1.0, high_frequency=4.0, original_context=32
    ),
)
QWEN3_CFG = dataclasses.replace(CFG, qk_norm="head")
OLMO2_CFG = dataclasses.replace(CFG, qk_norm="projection", norm_placement="after")


@pytest.mark.parametrize(
    ("cfg", "family", "layout"),
    [
        (CFG, "llama", MIXTRAL),
        (QWEN3_CFG, "qwen3", QWEN3_MOE),
        (OLMO2_CFG, "olmo2", FLEX_OLMO),
    ],
)
@pytest.mark.parametrize("scaling", [None, CFG.rope_scaling])
def test_a_config_comes_back_as_it_was(cfg, family, layout, scaling):
    cfg = dataclasses.replace(cfg, rope_scaling=scaling)
    assert family_of(cfg) is FAMILIES[family]
    assert find_layout(cfg) is layout
    config = write_config(family_of(cfg), cfg)
    assert read_config(FAMILIES[family], config, tap=1, scout_width=16) == cfg


@pytest.mark.parametrize(
    ("cfg", "layout", "where"),
    [
        (QWEN3_CFG, "mixtral", "config.qk_norm"),
        (OLMO2_CFG, "mixtral", "config.norm_placement"),
        (CFG, "flex_olmo", "config.norm_placement"),
        (CFG, "qwen3_moe", "config.qk_norm"),
    ],
)
def test_a_layout_that_computes_another_model_is_refused(cfg, layout, where):
    with pytest.raises(InteropError, match="does not compute") as caught:
        find_layout(cfg, layout)
    assert caught.value.where == where
    assert find_layout(cfg).name in caught.value.hint


def test_what_no_layout_computes_is_refused():
    odd = dataclasses.replace(CFG, qk_norm="head", norm_placement="after")
    with pytest.raises(InteropError, match="is no family's") as caught:
        find_layout(odd)
    assert caught.value.where == "config.qk_norm"
    with pytest.raises(InteropError, match="'gguf' is not a layout"):
        find_layout(CFG, "gguf")


def test_mixtral_repeats_the_trunk_and_names_every_expert():
    pieces = {piece.theirs: piece for piece in mixture_pieces(MIXTRAL, CFG, 3)}
    expert = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    for layer, owners in ((0, (0, 0, 0)), (1, (0, 1, 2)), (2, (0, 1, 2))):
        for e, owner in enumerate(owners):
            piece = pieces[expert.format(layer, e, "w2")]
            assert (piece.expert, piece.ours) == (owner, f"layers.{layer}.ffn.w_down")
            assert piece.shape == (32, 64)
        router = pieces[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert (router.ours, router.shape) == (f"routers.{layer}", (3, 32))
    assert not any(".mlp." in name for name in pieces)
    config = mixture_config(MIXTRAL, CFG, 3, 2)
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)


def test_qwen3_moe_keeps_the_trunk_plain():
    pieces = {piece.theirs: piece for piece in mixture_pieces(QWEN3_MOE, QWEN3_CFG, 3)}
    assert "model.layers.0.mlp.gate_proj.weight" in pieces
    assert "model.layers.0.mlp.gate.weight" not in pieces
    assert pieces["model.layers.1.mlp.experts.2.up_proj.weight"].expert == 2
    config = mixture_config(QWEN3_MOE, QWEN3_CFG, 3, 2)
    assert config["mlp_only_layers"] == [0]
    assert config["moe_intermediate_size"] == 64
    assert config["norm_topk_prob"]


def test_no_more_experts_are_mixed_than_there_are():
    assert mixture_config(MIXTRAL, CFG, 2, 4)["num_experts_per_tok"] == 2


def test_files_keep_to_their_limits():
    pieces = dense_pieces(CFG)
    assert split_pieces(pieces, 4, max_bytes=1 << 40, max_tensors=4096) == [pieces]
    for limits in (
        {"max_bytes": 1 << 40, "max_tensors": 7},
        {"max_bytes": 9000, "max_tensors": 99},
    ):
        files = split_pieces(pieces, 4, **limits)
        assert [piece for file in files for piece in file] == pieces
        assert all(len(file) <= limits["max_tensors"] for file in files)
        assert len(files) > 1
