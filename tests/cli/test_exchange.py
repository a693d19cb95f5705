"""`import-peft` and `export-hf`: what they make, what they print and what they refuse."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

pytestmark = pytest.mark.slow


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter for the tiny backbone; return its folder."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["down_proj"],
        "layers_to_transform": [1],
        "base_model_name_or_path": "somebody/tiny",
    }
    rng = np.random.default_rng(0)
    key = "base_model.model.model.layers.1.mlp.down_proj"
    tensors = {
        f"{key}.lora_A.weight": rng.normal(size=(2, 64)).astype(np.float32),
        f"{key}.lora_B.weight": 0.1 * rng.normal(size=(32, 2)).astype(np.float32),
    }
    folder = tmp_path / "old-english"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def sample(tiny, tmp_path):
    path = tmp_path / "sample.txt"
    path.write_text(tiny.text("ye olde thou art hath", seed=0, length=600))
    return path


def test_import_peft_makes_an_expert_that_can_be_checked(
    cli, works, adapter, sample, tiny_backbone
):
    command = ("import-peft", adapter, "--backbone", tiny_backbone, "--sample", sample)
    small = ("--scout-steps", 10, "--out", "expert")
    outcome = works(*command, *small, "--json").json
    assert (outcome["name"], outcome["version"]) == ("old-english", "1.0.0")
    assert outcome["body"] == {"rank": 2, "changed": ["1.w_down"], "matrices": 6}
    again = cli(*command, *small)
    assert again.code == 1
    assert "already exists" in again.err
    checked = cli("check", "expert", "--backbone", tiny_backbone, "--json").json
    assert checked["measured"]["bits_per_byte"]["own_backbone"] > 0

    assert works(*command, *small[:2], "--json").json["folder"] == "old-english-expert"
    printed = works(*command, "--scout-steps", 2, "--name", "other", "--version", "2.0.0").out
    assert "other 2.0.0 for tiny@1.0.0" in printed
    assert "somebody/tiny (not verified)" in printed
    assert "composable check other" in printed


def test_import_peft_refuses_by_field(cli, adapter, sample, tiny_backbone):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    command = ("import-peft", adapter, "--backbone", tiny_backbone, "--sample", sample)
    error = cli(*command, "--json").json["error"]
    assert error["kind"] == "InteropError"
    assert error["where"] == "adapter_config.json: use_dora"


def test_export_hf_writes_a_folder_and_says_what_is_lost(
    cli, works, adapter, sample, tiny_backbone, tmp_path
):
    alone = ("export-hf", "alone", "--backbone", tiny_backbone, "--alone")
    assert works(*alone).out == "wrote alone: tiny, dense, BF16\nlost: nothing\n"
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "composable.json"),
    }
    again = cli(*alone, "--json")
    assert again.json["error"]["kind"] == "PackagingError"
    assert cli(*alone, "--merge", "x").code == 2
    error = cli("export-hf", "other", *alone[2:], "--layout", "mixtral", "--json").json["error"]
    assert error["where"] == "layout"


def test_what_the_guide_shows_can_be_typed():
    from typer.main import get_command

    from composable.cli.app import app

    guide = (Path(__file__).parents[2] / "docs" / "guides" / "exchange.md").read_text()
    commands = re.findall(r"^composable (.*)$", guide, flags=re.MULTILINE)
    assert len(commands) > 4
    for line in commands:
        name, *words = shlex.split(line)
        command = get_command(app).get_command(None, name)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
