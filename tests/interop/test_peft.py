"""Adapters as low-rank bodies: what is carried, exactly, and what is refused, by name."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from composable.errors import InteropError
from composable.interop import limited_process
from composable.interop.patterns import match_patterns
from composable.interop.peft import read_adapter
from composable.model.config import BackboneConfig

CFG = BackboneConfig(
    vocab_size=600,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=64,
    tap=1,
    context=64,
    scout_width=16,
)
MLP = ("gate_proj", "up_proj", "down_proj")
WIDTHS = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}


def adapter_config(**changes):
    """Return a config as PEFT writes it, unused fields and all."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": "0.21.2",
        "base_model_name_or_path": "somebody/model",
        "revision": None,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": list(MLP),
        "layers_to_transform": [1, 2],
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_parameters": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "exclude_modules": None,
    }
    return {**config, **changes}


def write_adapter(folder, config, modules, ranks=None, extra=None):
    """Write an adapter of some modules, with random tensors of a rank each."""
    rng = np.random.default_rng(0)
    tensors = dict(extra or {})
    for module in modules:
        rank = (ranks or {}).get(module, config["r"])
        n_in, n_out = WIDTHS.get(module.rsplit(".", 1)[-1], (32, 32))
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = rng.normal(size=(rank, n_in)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.normal(size=(n_out, rank)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def mlp(*layers, names=MLP):
    return [f"model.layers.{layer}.mlp.{name}" for layer in layers for name in names]


def test_a_body_is_the_adapters_product_with_its_scale(tmp_path):
    tensors = write_adapter(tmp_path, adapter_config(), mlp(1, 2))
    adapter = read_adapter(tmp_path, CFG)
    body = adapter.body(CFG)
    assert (adapter.rank, adapter.base, adapter.version) == (4, "somebody/model", "0.21.2")
    ours = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}
    assert len(body) == 2 * 3 * 2
    for layer in (1, 2):
        for theirs, matrix in ours.items():
            key = f"base_model.model.model.layers.{layer}.mlp.{theirs}"
            change = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"] * 2
            a, b = (body[f"slots.{layer}.{matrix}.{part}"] for part in "ab")
            np.testing.assert_allclose(a @ b, change.T, rtol=1e-5, atol=1e-5)


def test_what_is_not_adapted_changes_by_nothing(tmp_path):
    config = adapter_config(target_modules=["up_proj"], layers_to_transform=2)
    write_adapter(tmp_path, config, mlp(2, names=["up_proj"]))
    body = read_adapter(tmp_path, CFG).body(CFG)
    changed = {name for name in body if name.endswith(".b") and body[name].any()}
    assert changed == {"slots.2.w_up.b"}


def test_ranks_and_scales_follow_their_patterns_and_pad_exactly(tmp_path):
    config = adapter_config(
        rank_pattern={"up_proj": 2, r"layers\.2\.mlp\.down_proj": 6},
        alpha_pattern={"layers.1.mlp.gate_proj": 20},
        use_rslora=True,
    )
    ranks = {
        "model.layers.1.mlp.up_proj": 2,
        "model.layers.2.mlp.up_proj": 2,
        "model.layers.2.mlp.down_proj": 6,
    }
    tensors = write_adapter(tmp_path, config, mlp(1, 2), ranks)
    adapter = read_adapter(tmp_path, CFG)
    assert adapter.rank == 6
    body = adapter.body(CFG)
    expected = {
        "slots.1.w_gate": ("1.mlp.gate_proj", 20 / 4**0.5),
        "slots.2.w_gate": ("2.mlp.gate_proj", 8 / 4**0.5),
        "slots.1.w_up": ("1.mlp.up_proj", 8 / 2**0.5),
        "slots.2.w_down": ("2.mlp.down_proj", 8 / 6**0.5),
    }
    for name, (module, scale) in expected.items():
        key = f"base_model.model.model.layers.{module}"
        change = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"] * scale
        assert body[f"{name}.a"].shape[1] == 6
        padded = body[f"{name}.a"] @ body[f"{name}.b"]
        np.testing.assert_allclose(padded, change.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": r".*\.layers\.[12]\.mlp\.(gate|up|down)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*(self_attn|layers\.0).*"},
        {"layers_to_transform": None, "exclude_modules": [m[6:] for m in mlp(0)]},
        {"layers_pattern": "layers"},
        {"layers_pattern": ["h", "layers"]},
        {"target_modules": mlp(1, 2), "layers_to_transform": None},
    ],
)
def test_every_way_to_name_modules_is_followed(tmp_path, targets):
    config = adapter_config(**{"layers_to_transform": None, **targets})
    if "layers_pattern" in targets:
        config["layers_to_transform"] = [1, 2]
    write_adapter(tmp_path, config, mlp(1, 2))
    assert len(read_adapter(tmp_path, CFG).changes) == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "some"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        *(
            ("init_lora_weights", name)
            for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
        ),
        ("some_new_variant", {"strength": 2}),
    ],
)
def test_what_would_be_silently_wrong_is_refused_by_its_field(tmp_path, field, value):
    write_adapter(tmp_path, adapter_config(**{field: value}), mlp(1, 2))
    with pytest.raises(InteropError) as caught:
        read_adapter(tmp_path, CFG)
    assert caught.value.where == f"adapter_config.json: {field}"
    assert repr(value) in caught.value.message


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_ways_to_begin_that_leave_the_backbone_alone_are_taken(tmp_path, value):
    write_adapter(tmp_path, adapter_config(init_lora_weights=value), mlp(1, 2))
    assert read_adapter(tmp_path, CFG).rank == 4


@pytest.mark.parametrize("value", ["all", "lora_only"])
def test_biases_are_refused_with_the_cure_where_there_are_any(tmp_path, value):
    """PEFT trains the biases that a model has; most models of these families have none."""
    config = adapter_config(bias=value)
    write_adapter(tmp_path, config, mlp(1, 2))
    assert read_adapter(tmp_path, CFG).rank == 4
    for name in ("model.layers.1.mlp.up_proj.base_layer.bias", "model.layers.1.mlp.x.lora_B.bias"):
        bias = {f"base_model.model.{name}": np.zeros(64, np.float32)}
        write_adapter(tmp_path, config, mlp(1, 2), extra=bias)
        with pytest.raises(InteropError, match=r"\.bias") as caught:
            read_adapter(tmp_path, CFG)
        assert "bias='none'" in caught.value.hint


SLOW = r"(\w+\.?)+!"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": SLOW, "layers_to_transform": None},
        {"exclude_modules": SLOW},
        {"layers_pattern": [SLOW]},
        {"rank_pattern": {SLOW: 2}},
        {"alpha_pattern": {"up_proj": 2, SLOW: 2}},
        {"rank_pattern": {f"a{i}": 2 for i in range(5000)}},
    ],
)
def test_a_pattern_that_takes_forever_is_refused_by_its_field(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(limited_process, "MAX_CLOCK_SECONDS", 1.0)
    write_adapter(tmp_path, adapter_config(**changes), mlp(1, 2))
    with pytest.raises(InteropError) as caught:
        read_adapter(tmp_path, CFG)
    assert caught.value.where.removeprefix("adapter_config.json: ") in changes


@pytest.mark.parametrize(
    "pattern",
    [
        r"layers\.1",
        "up_proj",
        r"^model.*$",
        "(gate|up)_proj",
        "(?i:UP)_PROJ",
        "",
        r"\b",
        "[ab]+",
        "x)|(y",
    ],
)
def test_patterns_match_as_in_python(pattern):
    names = ["layers.1", "up_proj", "model.x", "gate_proj", "", "abba", "a.up_proj"]
    (found,) = match_patterns([pattern], names, r"(.*\.)?({})")
    expected = {n for n in names if re.fullmatch(rf"(.*\.)?({pattern})", n)}
    assert found.keys() == expected


@pytest.mark.parametrize("empty", [[], {}, None])
@pytest.mark.parametrize(
    "field", ["trainable_token_indices", "modules_to_save", "alora_invocation_tokens", "new_thing"]
)
def test_a_field_that_names_nothing_changes_nothing(tmp_path, field, empty):
    write_adapter(tmp_path, adapter_config(**{field: empty}), mlp(1, 2))
    assert read_adapter(tmp_path, CFG).rank == 4


def test_attention_cannot_be_carried_and_every_module_is_named(tmp_path):
    attention = [f"model.layers.{i}.self_attn.{x}_proj" for i in (1, 2) for x in "qv"]
    config = adapter_config(target_modules=[*MLP, "q_proj", "v_proj"])
    write_adapter(tmp_path, config, [*mlp(1, 2), *attention])
    with pytest.raises(InteropError, match="4 of 10 adapted modules cannot be carried") as caught:
        read_adapter(tmp_path, CFG)
    for module in attention:
        assert module in caught.value.message
    assert "down_proj, gate_proj, up_proj" in caught.value.hint
    assert "layers_to_transform 1 to 2" in caught.value.hint


def test_layers_below_the_tap_are_refused(tmp_path):
    config = adapter_config(layers_to_transform=[0, 1, 2])
    write_adapter(tmp_path, config, mlp(0, 1, 2))
    with pytest.raises(InteropError, match=r"below the tap: model\.layers\.0\.mlp\.down_proj"):
        read_adapter(tmp_path, CFG)


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        (mlp(1), r"'model\.layers\.2\.mlp\.gate_proj' are missing"),
        ([*mlp(1, 2), "lm_head"], "1 of 7 adapted modules cannot be carried"),
        ([], "there are no tensors"),
    ],
)
def test_tensors_must_be_those_that_the_config_asks_for(tmp_path, modules, problem):
    write_adapter(tmp_path, adapter_config(), modules)
    with pytest.raises(InteropError, match=problem):
        read_adapter(tmp_path, CFG)


def test_tensors_that_the_config_does_not_ask_for_are_refused(tmp_path):
    write_adapter(tmp_path, adapter_config(target_modules=["up_proj"]), mlp(1, 2))
    with pytest.raises(InteropError, match="which target_modules does not ask for"):
        read_adapter(tmp_path, CFG)


def test_tensors_of_other_kinds_or_shapes_are_refused(tmp_path):
    key = "base_model.model.model.layers.1.mlp.up_proj"
    magnitude = {f"{key}.lora_magnitude_vector": np.ones(64, np.float32)}
    write_adapter(tmp_path, adapter_config(), mlp(1, 2), extra=magnitude)
    with pytest.raises(InteropError, match="lora_magnitude_vector"):
        read_adapter(tmp_path, CFG)
    write_adapter(tmp_path, adapter_config(), mlp(1, 2), {"model.layers.2.mlp.up_proj": 3})
    with pytest.raises(InteropError, match=r"shape \[3, 32\], expected \[4, 32\]"):
        read_adapter(tmp_path, CFG)
    tensors = write_adapter(tmp_path, adapter_config(), mlp(1, 2))
    del tensors[f"{key}.lora_B.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InteropError, match=r"up_proj\.lora_B\.weight' is missing"):
        read_adapter(tmp_path, CFG)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"r": None}, "r"),
        ({"r": 0}, "r"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"rank_pattern": ["up_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"a" * 501: 2}}, "alpha_pattern"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["up_proj", 1]}, "target_modules"),
        ({"r": True}, "r"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"alpha_pattern": {"up_proj": "2"}}, "alpha_pattern"),
        ({"alpha_pattern": {"up_proj": float("nan")}}, "alpha_pattern"),
        ({"rank_pattern": {"up_proj": 0}}, "rank_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules"),
        ({"layers_pattern": [1]}, "layers_pattern"),
        ({"revision": 7}, "revision"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "a" * 401}, "base_model_name_or_path"),
        ({"bias": ["none"]}, "bias"),
    ],
)
def test_a_malformed_config_is_refused_by_its_field(tmp_path, changes, field):
    write_adapter(tmp_path, {**adapter_config(), "r": 4}, mlp(1, 2))
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(**changes)))
    with pytest.raises(InteropError) as caught:
        read_adapter(tmp_path, CFG)
    assert caught.value.where == f"adapter_config.json: {field}"


def test_a_pickled_adapter_is_never_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config()))
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    with pytest.raises(InteropError, match="may run code") as caught:
        read_adapter(tmp_path, CFG)
    assert "safetensors" in caught.value.hint


@pytest.mark.parametrize(
    ("rename", "cure"),
    [
        (lambda name: f"_orig_mod.{name}", "'_orig_mod' was added by torch.compile"),
        (lambda name: name.replace("model.model.", "model._orig_mod.model."), "torch.compile"),
        (lambda name: name.replace(".mlp.", ".mlp._orig_mod."), "torch.compile"),
        (lambda name: f"module.{name}", "data parallelism"),
        (lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."), "FSDP"),
        (lambda name: name.replace(".weight", ".default.weight"), "rename them like 'base_model."),
        (lambda name: name.replace(".weight", ".my_lora.weight"), "save_pretrained"),
        (lambda name: name.removeprefix("base_model.model."), "save_pretrained"),
    ],
)
def test_names_that_peft_would_ignore_are_refused_with_the_cure(tmp_path, rename, cure):
    tensors = write_adapter(tmp_path, adapter_config(), mlp(1, 2))
    renamed = {rename(name): array for name, array in tensors.items()}
    safetensors.numpy.save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InteropError) as caught:
        read_adapter(tmp_path, CFG)
    assert cure in caught.value.hint


@pytest.mark.parametrize("shape", [(0,), (0, 32)])
def test_tensors_without_numbers_are_refused_with_the_cure(tmp_path, shape):
    tensors = write_adapter(tmp_path, adapter_config(), mlp(1, 2))
    empty = dict.fromkeys(tensors, np.zeros(shape, np.float32))
    safetensors.numpy.save_file(empty, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InteropError, match="is empty") as caught:
        read_adapter(tmp_path, CFG)
    assert "gather" in caught.value.hint
