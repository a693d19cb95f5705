"""Exported folders: the same numbers elsewhere, the same tensors when they come back."""

import json

import numpy as np
import pytest
import safetensors.numpy

from composable.assembly.backbones import load_backbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document
from composable.errors import InteropError, PackagingError
from composable.interop.checkpoint import Checkpoint, open_source
from composable.interop.layer_router import expert_names, layered_logits
from composable.packaging.manifests.backbone_folder import WEIGHTS_FILE
from composable.workflows import export_hf as exporting
from composable.workflows.export_hf import ExportPlan, export_model, split_text

pytestmark = pytest.mark.slow

# Two float32 implementations of three small layers add in other orders: a few units in the last
# place of logits near 1. Another choice of expert in one layer differs by 0.01 and more.
FLOAT32_TOLERANCE = 5e-5
FAMILIES = ("llama", "smollm", "qwen3", "olmo2")
LAYOUTS = {"smollm": "mixtral", "qwen3": "qwen3_moe", "olmo2": "flex_olmo"}
DOMAINS = {"a": "the of and to in is", "b": "quick brown foxes naïve", "c": "∀x ∃y φ→ψ ⊢A∧B"}
TOKENS_BT = np.random.default_rng(0).integers(2, 600, (2, 24), dtype=np.int32)


@pytest.fixture
def text(tiny):
    words = list(DOMAINS.values())
    return [
        Document(f"text/{i}", tiny.text(words[i // 2 % 3], seed=i, length=200)) for i in range(12)
    ]


@pytest.fixture
def elsewhere():
    """Return a function that loads a folder with transformers: the model and its logits."""
    import torch
    import transformers

    def run(folder):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
        model = model.eval()

        def logits(tokens_BT):
            with torch.no_grad():
                return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()

        return model, logits

    return run


def exported_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_goes_out_and_comes_back_to_the_bit(imported, tmp_path, family):
    loaded, checkpoint = imported(family)
    record = export_model(loaded, [], tmp_path / "out", ExportPlan())
    assert (record["layout"], record["lost"]) == ("dense", [])
    before = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    after = exported_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    source = open_source(tmp_path / "out")
    assert (
        Checkpoint(source, tap=loaded.backbone.cfg.tap, scout_width=64).cfg.to_dict()
        | {"scout_width": 8}
        == loaded.backbone.cfg.to_dict()
    )


def test_bfloat16_stays_bfloat16(imported, tmp_path):
    loaded, checkpoint = imported("llama", dtype="bfloat16")
    record = export_model(loaded, [], tmp_path / "out", ExportPlan())
    assert record["dtype"] == "BF16"
    before = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    after = exported_tensors(tmp_path / "out")
    assert all((after[name] == array).all() for name, array in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_a_merged_expert_goes_out_and_comes_back_to_the_bit(imported, write_expert, tmp_path, kind):
    loaded, _ = imported("llama")
    folders = [write_expert(loaded, name, kind=kind, seed=i) for i, name in enumerate("ab")]
    record = export_model(loaded, folders, tmp_path / "out", ExportPlan(merge="b"))
    assert [e["name"] for e in record["experts"]] == ["b"]
    assert any("on for every text" in line for line in record["lost"])
    checkpoint = Checkpoint(open_source(tmp_path / "out"), tap=1)
    body = load_expert(loaded, folders[1]).body
    stored = safetensors.numpy.load_file(loaded.folder / WEIGHTS_FILE)
    for name, array in checkpoint.items():
        _, *place = name.split(".")
        if ".ffn." in name and int(place[0]) >= 1:
            expected = np.asarray(body.merged(loaded.backbone, int(place[0]))[place[-1]])
        else:
            expected = stored[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # other people's
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_expert_is_the_expert_always_on(
    imported, write_expert, elsewhere, tmp_path, family
):
    loaded, _ = imported(family)
    folder = write_expert(loaded, "a")
    export_model(loaded, [folder], tmp_path / "out", ExportPlan(merge="a"))
    _, logits = elsewhere(tmp_path / "out")
    expected_BTV = np.asarray(loaded.plug([load_expert(loaded, folder)]).path(TOKENS_BT, "a"))
    assert np.abs(logits(TOKENS_BT) - expected_BTV).max() < FLOAT32_TOLERANCE


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", LAYOUTS)
def test_a_mixture_is_ours_but_for_its_routers(
    imported, write_expert, elsewhere, text, tmp_path, family
):
    import torch

    loaded, _ = imported(family)
    folders = [
        write_expert(loaded, name, seed=i, words=words)
        for i, (name, words) in enumerate(DOMAINS.items())
    ]
    model = loaded.plug([load_expert(loaded, folder) for folder in folders])
    out = tmp_path / "out"
    record = export_model(loaded, folders, out, ExportPlan(fit_tokens=600), text)
    assert record["layout"] == LAYOUTS[family]
    # Experts that are never trusted would have equal rows, and ties.
    assert min(record["routers"]["trust"].values()) > 0.02
    theirs, logits = elsewhere(out)
    tokens_BT = np.stack([loaded.tokenizer.encode(doc.text)[:24] for doc in text[1::2]])

    # Its own routers: what was measured here is what is computed there.
    names = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate", "flex_olmo": "mlp.gate"}
    tensors = exported_tensors(out)
    rows_LED = np.stack(
        [tensors[f"model.layers.{i}.{names[record['layout']]}.weight"] for i in (1, 2)]
    )
    expected_BTV = np.asarray(layered_logits(model, tokens_BT, rows_LED, 2))
    assert np.abs(logits(tokens_BT) - expected_BTV).max() < FLOAT32_TOLERANCE
    bits = sum_bits(logits, loaded.tokenizer, split_text(text)[1]) / record["measured"]["bytes"]
    assert bits == pytest.approx(record["measured"]["bits_per_byte"]["exported"], abs=1e-4)

    # Our router in their place: our model.
    order = [model.names.index(name) for name in expert_names(model)]
    weight_BTE = np.asarray(model.route(tokens_BT))[..., order]
    weight_ME = torch.tensor(weight_BTE.reshape(-1, len(order)))
    weight_MJ, expert_MJ = weight_ME.topk(model.interface.mix.top_k)
    assert len(set(expert_MJ[:, 0].tolist())) > 1  # it does choose
    for layer in (1, 2):
        gate = theirs.model.layers[layer].mlp.gate
        gate.forward = lambda hidden, *_: (weight_ME.log(), weight_MJ, expert_MJ)
    assert np.abs(logits(tokens_BT) - np.asarray(model(tokens_BT))).max() < FLOAT32_TOLERANCE


def sum_bits(logits, tokenizer, documents):
    """Return the bits of documents by somebody else's logits, window by window."""
    total = 0.0
    for document in documents:
        tokens_T = tokenizer.encode(document.text)
        for start in range(0, len(tokens_T) - 1, 64):
            here_T = tokens_T[start : start + 65]
            logits_TV = logits(here_T[None, :-1])[0].astype(np.float64)
            log_prob_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
            total -= log_prob_TV[np.arange(len(here_T) - 1), here_T[1:]].sum()
    return total / np.log(2)


def test_text_is_split_so_that_every_kind_is_on_both_sides():
    text = [Document(f"{'abcd'[i // 40]}/{i}", "words") for i in range(160)]
    fit, scored = split_text(text)
    assert (len(fit), len(scored)) == (32, 8)
    for side in (fit, scored):
        assert {document.id[0] for document in side} == set("abcd")
    assert not {document.id for document in fit} & {document.id for document in scored}


def test_what_is_lost_is_said_everywhere(imported, write_expert, text, tmp_path):
    loaded, _ = imported("llama")
    folders = [write_expert(loaded, name, seed=i) for i, name in enumerate("ab")]
    record = export_model(loaded, folders, tmp_path / "out", ExportPlan(dtype="BF16"), text)
    said = " ".join(record["lost"])
    for word in ("The router", "bits per byte", "The bounds", "Safe mode", "Memory", "Precision"):
        assert word in said
    readme = (tmp_path / "out" / "README.md").read_text()
    assert all(line in readme for line in record["lost"])
    assert json.loads((tmp_path / "out" / "composable.json").read_text()) == record
    assert set(record["routers"]["trust"]) == {"backbone", "a", "b"}
    assert sum(record["routers"]["trust"].values()) == pytest.approx(1, abs=1e-3)
    assert record["backbone"]["interface"] == loaded.interface.digest
    assert record["licenses"] == ["MIT"]


def test_an_expert_that_the_text_never_asked_for_is_named(
    imported, write_expert, monkeypatch, tmp_path
):
    loaded, _ = imported("llama")
    folder = write_expert(loaded, "a")
    monkeypatch.setattr(exporting, "_HARDLY", 1.1)
    record = export_model(loaded, [folder], tmp_path / "out", ExportPlan())  # on the anchor
    assert any(line.startswith("Nearly all use of a:") for line in record["lost"])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_large_models_are_written_in_several_files(imported, elsewhere, monkeypatch, tmp_path):
    loaded, _ = imported("llama")
    monkeypatch.setattr(exporting, "_MAX_FILE_BYTES", 40_000)
    export_model(loaded, [], tmp_path / "out", ExportPlan())
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert len(Checkpoint(open_source(tmp_path / "out"), tap=1)) == 30
    _, logits = elsewhere(tmp_path / "out")
    expected_BTV = np.asarray(loaded.plug().path(TOKENS_BT))
    assert np.abs(logits(TOKENS_BT) - expected_BTV).max() < FLOAT32_TOLERANCE


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_text_becomes_the_same_tokens_elsewhere(imported, loaded, tmp_path):
    import transformers

    subword_release, _ = imported("smollm")
    for name, source in (("subwords", subword_release), ("bytes", loaded)):
        export_model(source, [], tmp_path / name, ExportPlan())
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for text in ("the quick brown naïve Füße", "x\n\ty  z\r\n", "∀x 日本 👩‍👩‍👧"):
            tokens = tokenizer(text).input_ids
            assert tokens == source.tokenizer.encode(text).tolist()
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert tokenizer.bos_token_id == source.tokenizer.begin


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_byte_level_backbone_computes_the_same_elsewhere(loaded, elsewhere, tiny, tmp_path):
    export_model(loaded, [], tmp_path / "out", ExportPlan())
    _, logits = elsewhere(tmp_path / "out")
    tokens_BT = tiny.tokens()
    expected_BTV = np.asarray(loaded.backbone(tokens_BT))
    assert np.abs(logits(tokens_BT) - expected_BTV).max() < FLOAT32_TOLERANCE


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    imported, write_expert, tmp_path
):
    loaded, _ = imported("qwen3")
    folder = write_expert(loaded, "a")

    def refused(folders, plan, where):
        with pytest.raises(InteropError) as caught:
            export_model(loaded, folders, tmp_path / "out", plan)
        assert caught.value.where == where
        assert not (tmp_path / "out").exists()

    refused([folder], ExportPlan(layout="mixtral"), "config.qk_norm")
    refused([folder], ExportPlan(merge="b"), "merge")
    refused([folder], ExportPlan(dtype="F16"), "dtype")
    refused([folder], ExportPlan(merge="a", layout="qwen3_moe"), "layout")
    refused([], ExportPlan(layout="qwen3_moe"), "layout")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(PackagingError, match="already exists"):
        export_model(loaded, [], tmp_path / "out", ExportPlan())


def test_an_export_of_the_backbone_is_known_as_a_base(imported, tmp_path):
    from composable.interop.peft import Adapter
    from composable.workflows.import_peft import _check_base

    loaded, _ = imported("llama")
    out = tmp_path / "out"
    export_model(loaded, [], out, ExportPlan())
    fields = dict.fromkeys(("version", "config_digest", "weights_digest", "rank", "changes"))
    adapter = Adapter(base=str(out), revision=None, **fields)
    assert _check_base(load_backbone(str(loaded.folder)), adapter, None)
    record = json.loads((out / "composable.json").read_text())
    record["backbone"]["interface"] = "sha256:other"
    (out / "composable.json").write_text(json.dumps(record))
    with pytest.raises(InteropError, match="not an export of this backbone alone"):
        _check_base(loaded, adapter, None)
