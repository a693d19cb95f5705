"""The effect of a new expert on its peers: whether its scout is a copy of one of theirs."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from composable.assembly.experts import load_expert
from composable.corpora.documents import read_documents
from composable.model.scout import Scout
from composable.training.data import token_stream
from composable.training.scouts import train_scout
from composable.vetting.evidence import vetted_texts
from composable.vetting.peers import (
    MAX_CORRELATION,
    Peer,
    _check_copied,
    correlate_scouts,
    vet_with_peers,
)
from composable.workflows.trunk_cache import cut_rows, trunk_features

MATRICES = ("w_in", "b_in", "w_out", "b_out")


@pytest.fixture(scope="module")
def published(loaded, trained_folder):
    return load_expert(loaded, trained_folder)


@pytest.fixture(scope="module")
def check(loaded, published):
    """Return a function that vets a scout beside experts: the check `copied`, and the figures."""

    def run(scout, *peers, **fields):
        newcomer = dataclasses.replace(published, name="newcomer", scout=scout)
        beside = [Peer(expert=it, release=f"{it.name}@1.0.0", **fields) for it in peers]
        checks, measured = vet_with_peers(
            loaded.backbone, loaded.interface, newcomer, beside, vetted_texts(loaded.anchor)
        )
        assert [it.name for it in checks] == [*(f"beside {it.name}" for it in peers), "copied"]
        return checks[-1], [row["likeness"] for row in measured.values()]

    return run


@pytest.fixture(scope="module")
def train(loaded, trained_folder):
    """Return a function that trains a scout on every other document of the published one's text."""
    texts = trained_folder.parent / "logic.jsonl"

    def run(begin, seed):
        stream = token_stream(read_documents([texts])[begin::2], loaded.tokenizer)
        features = trunk_features(loaded.backbone, cut_rows(stream, 32, len(stream)))
        cfg = loaded.backbone.cfg
        scout = Scout(cfg.d_model, 16, 256, rngs=nnx.Rngs(seed))
        return train_scout(scout, features, steps=200, seed=seed).scout

    return run


def changed(scout, change):
    """Return a copy of a scout with every matrix changed."""
    scout = nnx.clone(scout)
    for name in MATRICES:
        getattr(scout, name)[...] = change(name, np.asarray(getattr(scout, name)[...]))
    return scout


def noised(scout, share):
    """Return a scout with noise on every weight, as a share of the weights' own deviation."""
    rng = np.random.default_rng(0)
    return changed(
        scout, lambda _, x: x + (share * x.std() * rng.normal(size=x.shape)).astype(np.float32)
    )


def rearranged(scout, _):
    """Return a scout with its hidden units in another order: other tensors, the same function."""
    order = np.random.default_rng(0).permutation(16)
    axis = {"w_in": 1, "b_in": 0, "w_out": 0}
    return changed(scout, lambda name, x: np.take(x, order, axis[name]) if name in axis else x)


def spoilt(scout, nats):
    """Return a scout that never expects a byte that only public text has."""
    byte = ord("m")
    return changed(
        scout, lambda name, x: x - nats * (np.arange(256) == byte) if name == "b_out" else x
    )


@pytest.mark.parametrize(
    ("disguise", "amount"),
    [(noised, 0), (noised, 0.02), (noised, 0.05), (rearranged, 0), (spoilt, 60)],
    ids=["none", "noise of 2 %", "noise of 5 %", "units rearranged", "one byte spoilt"],
)
def test_a_disguised_copy_of_a_scout_is_detected(check, published, disguise, amount):
    copy = disguise(published.scout, amount)
    found, (likeness,) = check(copy, published)
    assert likeness > MAX_CORRELATION
    assert not found.passed
    assert f"{likeness:.2f} with that of logic@1.0.0 (a copy" in found.found


def test_scouts_trained_apart_on_one_domain_are_not_copies(check, published, train):
    """On halves of one text, and on the same half from another seed."""
    mine, other, again = train(0, seed=1), train(1, seed=2), train(0, seed=3)
    rivals = [
        dataclasses.replace(published, name=name, scout=scout)
        for name, scout in (("other", other), ("again", again))
    ]
    found, likenesses = check(mine, *rivals, published)
    assert found.passed, found
    assert len(likenesses) == 3
    assert f"correlates {max(likenesses):.2f} with that of" in found.found
    assert found.found.count("with that of") == 1, (
        "only the most similar peer is reported where none is copied"
    )


def test_an_untrained_scout_correlates_with_no_other(check, published, loaded):
    """What is hard for every scout makes none of them alike, nor does the backbone's own."""
    rng = np.random.default_rng(1)
    silent = changed(
        published.scout, lambda _, x: 0.01 * rng.normal(size=x.shape).astype(np.float32)
    )
    for scout in (silent, loaded.backbone.scout):
        found, (likeness,) = check(scout, published)
        assert found.passed
        assert abs(likeness) < 0.5


def test_related_experts_may_correlate_and_the_check_reports_it(check, published):
    found, likenesses = check(published.scout, published, is_related=True)
    assert found.passed
    assert likenesses == [1]
    assert "1.00 with that of logic@1.0.0, which is related by derives-from" in found.found


def test_every_copied_peer_is_reported(published):
    def pair(name, likeness, **fields):
        return Peer(expert=published, release=f"{name}@1.0.0", **fields), likeness

    found = _check_copied(
        [pair("a", 0.99), pair("b", 0.5), pair("c", 0.95), pair("d", 1.0, is_related=True)]
    )
    assert not found.passed
    assert [name for name in "abcd" if f"{name}@1.0.0" in found.found] == ["a", "c", "d"]
    assert _check_copied([pair("b", MAX_CORRELATION), pair("d", 1.0, is_related=True)]).passed


def test_correlation_is_of_what_the_backbones_scout_does_not_explain():
    """Two that share half of their own variance, whatever of the backbone's either has on top."""
    rng = np.random.default_rng(0)
    backbone_M, shared_M, own_M, other_M = rng.normal(size=(4, 20_000))
    for weight in (0, 1, 10):
        found = correlate_scouts(
            shared_M + own_M + weight * backbone_M, shared_M + other_M - backbone_M, backbone_M
        )
        # A correlation of 20,000 draws, their tails cut off.
        assert found == pytest.approx(0.5, abs=0.03)
    assert correlate_scouts(own_M, own_M, backbone_M) == 1
    assert correlate_scouts(backbone_M, backbone_M, backbone_M) == 1
    assert correlate_scouts(own_M, -own_M, backbone_M) == pytest.approx(-1)
    assert correlate_scouts(backbone_M, own_M, backbone_M) == 0
    assert correlate_scouts(np.zeros(20_000), own_M, backbone_M) == 0


def test_a_copy_with_a_few_spoilt_tokens_is_still_detected():
    rng = np.random.default_rng(0)
    backbone_M, own_M = rng.normal(size=(2, 2_000))
    spoilt_M = own_M - 60 * (rng.random(2_000) < 0.015)
    assert np.corrcoef(own_M, spoilt_M)[0, 1] < 0.2
    assert correlate_scouts(own_M, spoilt_M, backbone_M) > MAX_CORRELATION
