"""Statistics of an expert on text: what they predict, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from composable.assembly.experts import load_expert
from composable.corpora.documents import Document
from composable.errors import StatisticsError
from composable.files.safetensors import read_metadata, read_tensors, write_tensors
from composable.interface import statistics_signature
from composable.merging.statistics import predict_changes
from composable.packaging.manifests.packing import pack_expert
from composable.workflows.expert_matrices import from_matrices, to_matrices
from composable.workflows.merge_scores import prepare_text
from composable.workflows.statistics import compute_statistics, read_statistics, write_statistics
from tests.support.families import write_family
from tests.support.tiny import PRIVATE_WORDS

PARTS = ("body", "scout")


@pytest.fixture(scope="module")
def documents(tiny):
    return [Document(f"private/{i}", tiny.text(PRIVATE_WORDS, seed=i, length=40)) for i in range(4)]


@pytest.fixture
def described(loaded, documents, tmp_path):
    """Return the folder of an expert with statistics."""
    folder = write_family(tmp_path, loaded)[1]
    write_statistics(loaded, folder, load_expert(loaded, folder), documents)
    return folder


def test_a_small_step_changes_the_loss_as_predicted(loaded, documents, tmp_path):
    """Against the gradient of the loss that vetting's own layers give, in nats per token."""
    folder = write_family(tmp_path, loaded)[1]
    matrices = to_matrices(loaded, load_expert(loaded, folder))
    found, losses, n_tokens = compute_statistics(loaded, matrices, documents)
    text = prepare_text(loaded, documents)
    assert n_tokens <= sum(len(d.text.encode()) + 1 for d in documents)
    # Down the gradients, as far as each is kept.
    step = {
        n: w - 0.02 * s.gradient_DR @ s.gradient_RF
        for (n, s), w in ((pair, matrices[pair[0]]) for pair in found.items())
    }
    step = {name: w.astype(np.float32) for name, w in step.items()}
    predicted = predict_changes(found, matrices, step)
    for part, loss in zip(PARTS, losses, strict=True):
        before, after = text.score(part, matrices), text.score(part, step)
        assert before == pytest.approx(loss, rel=0.1)  # rows are cut elsewhere
        change = sum(x for name, x in predicted.items() if name.startswith(part))
        assert change < 0
        assert after - before == pytest.approx(change, rel=0.35)


def test_matrices_are_those_that_act_in_a_slot(loaded, tmp_path):
    for kind in ("ffn", "lora"):
        folder = write_family(tmp_path / kind, loaded, kind=kind)[1]
        expert = load_expert(loaded, folder)
        matrices = to_matrices(loaded, expert)
        for layer in loaded.interface.slots:
            for name, w_DF in expert.body.merged(loaded.backbone, layer).items():
                np.testing.assert_allclose(matrices[f"body.slots.{layer}.{name}"], w_DF, atol=1e-6)
        from composable.packaging.manifests.manifest import Manifest

        back = to_matrices(loaded, from_matrices(loaded, Manifest.read(folder), matrices))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), matrices, back)


def test_they_are_small_and_published_with_the_expert(loaded, described):
    record = read_statistics(loaded, described).record
    assert record.documents == 4 and record.body_nats > 0
    packed = pack_expert(described, interface=loaded.interface)
    assert "statistics.safetensors" in [file.name for file in packed.files]


def test_statistics_of_other_tensors_are_refused(loaded, described):
    body = described / "body.safetensors"
    specs = {n: dataclasses.replace(s) for n, s in _body_specs(loaded).items()}
    tensors = read_tensors(body, specs)
    name = next(iter(tensors))
    write_tensors(body, {**tensors, name: tensors[name] + 1})
    for use in (
        lambda: read_statistics(loaded, described),
        lambda: pack_expert(described, interface=loaded.interface),
    ):
        with pytest.raises(StatisticsError, match="do not fit the tensors") as caught:
            use()
        assert "--statistics" in caught.value.hint


def _body_specs(loaded):
    from composable.interface import body_signature

    return body_signature(loaded.interface, "ffn")


@pytest.mark.parametrize(
    "damage",
    ["cut", "no record", "not a record", "shape", "negative", "impossible"],
)
def test_damaged_statistics_are_refused(loaded, described, damage):
    path = described / "statistics.safetensors"
    specs = statistics_signature(loaded.interface, 8)
    metadata, tensors = read_metadata(path), read_tensors(path, specs)
    record = json.loads(metadata["composable"])
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no record":
        write_tensors(path, tensors)
    elif damage == "not a record":
        write_tensors(path, tensors, {"composable": "[]"})
    elif damage == "shape":
        write_tensors(
            path, {**tensors, "scout.w_in.rest": tensors["scout.w_in.rest"][:-1]}, metadata
        )
    elif damage == "negative":
        write_tensors(
            path, {**tensors, "scout.w_in.rest": -1 - tensors["scout.w_in.rest"]}, metadata
        )
    else:
        write_tensors(path, tensors, {"composable": json.dumps({**record, "body_nats": -1.0})})
    with pytest.raises(StatisticsError, match="statistics") as caught:
        read_statistics(loaded, described)
    assert str(path) in str(caught.value)
