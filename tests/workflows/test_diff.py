"""What changed between two experts: tensors, patches, and figures on text."""

import dataclasses

import numpy as np
import pytest

from composable.assembly.experts import load_expert, save_expert
from composable.corpora.documents import Document
from composable.files.safetensors import write_tensors
from composable.model.body import MATRICES
from composable.model.tensors import to_tensors
from composable.packaging.manifests.manifest import SCOUT_FILE, Manifest
from composable.vetting.evaluation import mix_scorer, score_documents
from composable.workflows.diff import diff_experts, diff_on_text
from composable.workflows.diff_page import write_page


@pytest.fixture
def changed(loaded, write_expert):
    """Return the folders of an expert and of the same one with a change of rank 1 in one matrix."""

    def make(kind="ffn", at=0.5):
        before, after = (write_expert(loaded, name, kind=kind) for name in ("one", "two"))
        expert = load_expert(loaded, before)
        layer = loaded.interface.slots[0]
        slot = expert.body.slots[str(layer)]
        array = slot.w_up.b if kind == "lora" else slot.w_up
        row = np.arange(1.0, array[...].shape[-1] + 1)
        array[...] = array[...] + at * np.outer(np.ones(array[...].shape[0]), row / len(row))
        save_expert(after, expert, Manifest.read(after))
        return before, after

    return make


def test_an_expert_does_not_differ_from_itself(loaded, write_expert):
    folder = write_expert(loaded, "one")
    found = diff_experts(loaded, folder, folder)
    assert found.fields == () and found.text is None
    assert {matrix.difference for matrix in found.matrices} == {0.0}
    assert {matrix.rank for matrix in found.matrices} == {0, None}
    assert found.patch_bytes == 0 < found.n_bytes


@pytest.mark.parametrize("kind", ["ffn", "lora"])
def test_a_change_is_found_where_it_is_with_its_rank_and_norm(loaded, changed, kind):
    before, after = changed(kind)
    found = diff_experts(loaded, before, after)
    layer = loaded.interface.slots[0]
    moved = [matrix for matrix in found.matrices if matrix.difference]
    assert [matrix.name for matrix in moved] == [f"slots.{layer}.w_up"]
    (matrix,) = moved
    assert matrix.rank == 1
    own, old, new = (
        np.asarray(slot["w_up"])
        for slot in (
            {name: getattr(loaded.backbone.layers[layer].ffn, name)[...] for name in MATRICES},
            *(load_expert(loaded, f).body.merged(loaded.backbone, layer) for f in (before, after)),
        )
    )
    assert matrix.difference == pytest.approx(np.linalg.norm(new - old), rel=1e-5)
    assert matrix.relative == pytest.approx(
        np.linalg.norm(new - old) / np.linalg.norm(old - own), rel=1e-5
    )
    assert found.patch_bytes < found.n_bytes
    assert [change.field for change in found.fields] == ["expert.name"]


def test_bodies_of_two_kinds_and_scouts_of_two_widths(loaded, write_expert):
    one, two = write_expert(loaded, "one", kind="lora"), write_expert(loaded, "two", kind="ffn")
    manifest = dataclasses.replace(Manifest.read(two), scout_width=4)
    scout = to_tensors(load_expert(loaded, two).scout)
    for name, cut in (("w_in", np.s_[:, :4]), ("b_in", np.s_[:4]), ("w_out", np.s_[:4])):
        scout[name] = scout[name][cut]
    (two / "expert.toml").write_text(manifest.to_toml())
    write_tensors(two / SCOUT_FILE, scout)
    found = diff_experts(loaded, one, two)
    by_name = {matrix.name: matrix for matrix in found.matrices}
    assert by_name["scout.w_in"].difference is None and by_name["scout.w_in"].rank is None
    assert by_name["scout.b_out"].difference is not None
    assert all(m.difference for name, m in by_name.items() if name.startswith("slots."))
    assert {change.field for change in found.fields} >= {"body.kind", "body.rank", "scout.width"}


def test_figures_on_text_are_those_of_the_models(loaded, changed, tiny, tmp_path):
    before, after = changed(at=3.0)
    documents = [Document(f"d{i}", tiny.text("the of and", seed=i, length=60)) for i in range(3)]
    seen = []
    found = diff_experts(loaded, before, after, documents, lambda done, n: seen.append((done, n)))
    assert seen[-1] == (9, 9)
    model = loaded.plug([load_expert(loaded, after)])
    texts = [document.text.encode() for document in documents]
    expected = score_documents(mix_scorer(model), texts, context=model.context)
    bits_B = expected.nats_B / expected.n_bytes_B / np.log(2)
    np.testing.assert_allclose([doc.bits[2] for doc in found.text.documents], bits_B, rtol=1e-5)
    assert found.text.change == pytest.approx(np.mean([d.change for d in found.text.documents]))
    low, high = found.text.interval
    assert low < found.text.change < high
    assert all(0 <= w <= 1 for doc in found.text.documents for w in doc.weight)
    same = diff_on_text(model, model, documents[:1])
    assert same.change == 0 and same.interval is None

    page = tmp_path / "page.html"
    odd = dataclasses.replace(found.text.documents[0], id="<b>\x1b[31m")
    text = dataclasses.replace(found.text, documents=(odd, *found.text.documents[1:]))
    write_page(page, "one", "two", found.matrices, {"": text})
    html = page.read_text()
    assert html.count("<circle") == 3 and "slots." in html
    assert "<b>" not in html and "\x1b" not in html
