"""Adapters as experts: the same logits as PEFT itself, and the same model or a refusal."""

import dataclasses
import json

import numpy as np
import pytest

from composable.assembly.experts import load_expert
from composable.corpora.documents import Document
from composable.errors import InteropError, PackagingError, TextError
from composable.interop.peft import read_adapter
from composable.packaging.manifests.manifest import Manifest
from composable.workflows import import_peft
from composable.workflows.import_peft import AdapterPlan, import_adapter, split_sample
from composable.workflows.vet import check_expert

pytestmark = pytest.mark.slow

# Two float32 implementations of three small layers add in other orders: a few units in the last
# place of logits near 1. An adapter that is off by its scale, or left out, differs by 0.1 and more.
FLOAT32_TOLERANCE = 2e-5
PLAN = AdapterPlan(name="dialect", scout_width=8, scout_steps=20, license="MIT")
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def sample(tiny):
    return [Document(f"sample/{i}", tiny.text("ye olde thou art", seed=i)) for i in range(8)]


@pytest.fixture
def adapt(tmp_path):
    """Return a function that makes a random adapter with PEFT: its folder and its logits."""
    import peft
    import torch
    import transformers

    def run(checkpoint, tokens_BT, **options):
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": MLP, "layers_to_transform": [1, 2]}
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **options})
        model = peft.get_peft_model(base, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        with torch.no_grad():
            logits_BTV = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
            with model.disable_adapter():
                plain_BTV = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
        return folder, logits_BTV, plain_BTV

    return run


ADAPTERS = {
    "llama": [
        {},
        {"target_modules": ["up_proj"], "layers_to_transform": 1},
        {"rank_pattern": {"up_proj": 2, "layers.2.mlp.down_proj": 7}},
        {"alpha_pattern": {"gate_proj": 3}, "rank_pattern": {"^model.*up_proj": 1}},
        {"target_modules": r".*\.[12]\.mlp\.\w+_proj", "layers_to_transform": None},
        {"fan_in_fan_out": True},
    ],
    "qwen3": [{"use_rslora": True, "init_lora_weights": "gaussian"}],
    "olmo2": [{"layers_to_transform": [2], "layers_pattern": "layers"}],
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # other people's
@pytest.mark.parametrize("family", ADAPTERS)
def test_logits_are_those_of_peft(imported, adapt, sample, tmp_path, family):
    loaded, checkpoint = imported(family)
    tokens_BT = np.random.default_rng(0).integers(0, 600, (2, 24), dtype=np.int32)
    plan = dataclasses.replace(PLAN, scout_steps=0)
    for i, options in enumerate(ADAPTERS[family]):
        folder, expected_BTV, plain_BTV = adapt(checkpoint, tokens_BT, **options)
        out = tmp_path / f"expert-{i}"
        import_adapter(loaded, folder, out, plan, sample, cache=tmp_path)
        model = loaded.plug([load_expert(loaded, out)])
        assert np.abs(expected_BTV - plain_BTV).max() > 1000 * FLOAT32_TOLERANCE
        found_BTV = np.asarray(model.path(tokens_BT, "dialect"))
        assert np.abs(found_BTV - expected_BTV).max() < FLOAT32_TOLERANCE, options
        alone_BTV = np.asarray(model.path(tokens_BT))
        assert np.abs(alone_BTV - plain_BTV).max() < FLOAT32_TOLERANCE


@pytest.fixture
def written(tmp_path):
    """Return a function that writes an adapter by hand, for tests that need no torch."""
    import safetensors.numpy

    def run(base="somebody/model", revision=None, layers=(1, 2)):
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 2,
            "target_modules": MLP,
            "layers_to_transform": list(layers),
            "base_model_name_or_path": str(base),
            "revision": revision,
        }
        rng = np.random.default_rng(0)
        tensors = {}
        for layer in layers:
            for name in MLP:
                n_in, n_out = (64, 32) if name == "down_proj" else (32, 64)
                key = f"base_model.model.model.layers.{layer}.mlp.{name}"
                for part, shape in (("A", (2, n_in)), ("B", (n_out, 2))):
                    noise = 0.05 * rng.normal(size=shape)
                    tensors[f"{key}.lora_{part}.weight"] = noise.astype(np.float32)
        folder = tmp_path / "written"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return run


def test_an_expert_says_where_it_comes_from_and_can_be_vetted(loaded, written, sample, tmp_path):
    out = tmp_path / "expert"
    stages = set()
    record = import_adapter(
        loaded,
        written(revision="abc"),
        out,
        dataclasses.replace(PLAN, scout_steps=60),
        sample,
        cache=tmp_path,
        progress=lambda label, done, total: stages.add(label),
    )
    manifest = Manifest.read(out)
    assert manifest.origin.format == "peft"
    assert manifest.origin.base == "somebody/model@abc"
    assert (manifest.body.kind, manifest.body.rank, manifest.scout_width) == ("lora", 2, 8)
    assert manifest.interface.digest == loaded.interface.digest
    assert Manifest.loads(manifest.to_toml()) == manifest
    assert not record["origin"]["is_verified"]
    assert record["body"]["changed"] == sorted(
        f"{i}.w_{x}" for i in (1, 2) for x in ("down", "gate", "up")
    )
    assert record["scout"]["heldout_bits_per_class"] < 6  # of 8: it learned something
    assert {"features", "scout", "score"} <= stages
    assert "the same weights was not verified" in (out / "README.md").read_text()
    verdict = check_expert(loaded, out)  # on what was held out of the sample
    assert verdict.measured["bits_per_byte"].keys() >= {"own_backbone", "own_expert"}
    # Another sample is another origin.
    again = import_adapter(
        loaded, written(revision="abc"), tmp_path / "again", PLAN, sample[1:], cache=tmp_path
    )
    assert again["origin"]["sample"] != record["origin"]["sample"]
    assert again["origin"]["weights"] == record["origin"]["weights"]


def test_the_base_is_compared_where_it_can_be(imported, written, sample, tmp_path):
    loaded, checkpoint = imported()

    def run(folder, out, base=None):
        plan = dataclasses.replace(PLAN, scout_steps=0, base=base)
        return import_adapter(loaded, folder, tmp_path / out, plan, sample, cache=tmp_path)

    assert run(written(checkpoint), "same")["origin"]["is_verified"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(InteropError, match="is neither the source of this backbone") as caught:
        run(written(other), "other-expert")
    assert caught.value.where == "adapter_config.json: base_model_name_or_path"
    assert f"--base {other}" in caught.value.hint
    assert run(written(other), "said-so", base=str(other))["origin"]["is_verified"]

    named = written("somebody/model", revision="v2")
    assert run(named, "named", base="somebody/model@v2")["origin"]["is_verified"]
    for wrong in ("somebody/model", "somebody/model@v1", "somebody/else@v2"):
        with pytest.raises(InteropError, match="made for 'somebody/model@v2', expected"):
            run(named, "wrong", base=wrong)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("base", ["a\nb", "x" * 400, "\x1b[2J", "", "/dev/zero"])
def test_any_name_of_a_base_can_be_recorded(loaded, written, sample, tmp_path, base):
    plan = dataclasses.replace(PLAN, scout_steps=0)
    import_adapter(
        loaded, written(base, "r" * 99), tmp_path / "expert", plan, sample, cache=tmp_path
    )
    assert Manifest.read(tmp_path / "expert").origin.base == f"{base}@{'r' * 99}"


@pytest.mark.parametrize("card", [b"[]", b"{", b'{"source": 1}', b'{"source": {"digests": [1]}}'])
def test_a_malformed_card_of_the_backbone_is_an_error(loaded, written, tmp_path, monkeypatch, card):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(import_peft, "lists_file", lambda folder, name: True)
    monkeypatch.setattr(import_peft, "read_listed", lambda folder, name: card)
    adapter = read_adapter(written(tmp_path), loaded.backbone.cfg)
    with pytest.raises(InteropError, match=r"card\.json"):
        import_peft._check_base(loaded, adapter, None)


@pytest.mark.parametrize("record", [b"[]", b'{"layout": "dense", "backbone": "x", "experts": []}'])
def test_a_malformed_record_of_an_export_is_an_error(loaded, written, tmp_path, record):
    (tmp_path / "composable.json").write_bytes(record)
    adapter = read_adapter(written(tmp_path), loaded.backbone.cfg)
    with pytest.raises(InteropError, match=r"composable\.json"):
        import_peft._check_base(loaded, adapter, None)


def test_nothing_is_overwritten_and_no_rank_too_high(loaded, written, sample, tmp_path):
    out = tmp_path / "expert"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(PackagingError, match="already exists"):
        import_adapter(loaded, written(), out, PLAN, sample, cache=tmp_path)


def test_a_single_document_is_cut_in_two():
    (train,), (heldout,) = split_sample([Document("one", "word " * 100)], "salt")
    assert len(train.text) > 8 * len(heldout.text) > 0
    assert (train.id, heldout.id) == ("one#begin", "one#end")
    with pytest.raises(TextError, match="is too short"):
        split_sample([Document("one", "x")], "salt")
    with pytest.raises(TextError, match="no sample"):
        split_sample([], "salt")
