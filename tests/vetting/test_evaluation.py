import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.errors import TextError
from composable.vetting.evaluation import (
    BATCH,
    Score,
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
    slots_scorer,
    trace_routing,
)

# Sums of some hundred log probabilities of order 8, in float32.
SAME_NATS = 1e-2
CONTEXT = 32


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(tiny.expert("a"), tiny.expert("b"))


@pytest.fixture(scope="module")
def documents(tiny):
    return [
        tiny.text("some words of text", seed=i, length=n).encode()
        for i, n in enumerate((70, 5, 32))
    ]


SCORERS = {"mix": mix_scorer, "safe": safe_scorer, "path": path_scorer}


def test_bits_per_byte_are_total_bits_over_total_bytes():
    score = Score(np.array([8.0, 2.0]) * np.log(2), np.array([1, 4]))
    assert score.bits_per_byte == pytest.approx(2.0)


def test_a_documents_score_is_the_sum_over_its_windows(model, documents):
    """Attention restarts with each window; for one path there is nothing else to carry."""
    score = score_documents(path_scorer(model, "a"), documents, context=CONTEXT)
    np.testing.assert_array_equal(score.n_bytes, [70, 5, 32])
    for document, found in zip(documents, score.nats, strict=True):
        tokens_T = model.encode(document)
        expected = 0.0
        for at in range(0, len(document), CONTEXT):
            window_T = tokens_T[at : at + CONTEXT + 1]
            padded_BT = np.zeros((BATCH, CONTEXT), np.int32)
            padded_BT[0, : len(window_T) - 1] = window_T[:-1]
            logits_TV = np.asarray(model.path(padded_BT, "a"), np.float64)[0, : len(window_T) - 1]
            log_prob_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
            expected -= log_prob_TV[np.arange(len(window_T) - 1), window_T[1:]].sum()
        assert found == pytest.approx(expected, abs=SAME_NATS)


def test_the_track_record_is_carried_from_window_to_window(model, documents):
    """Routing in windows of 32 begins its second window where the first one ended."""
    weight_TE = trace_routing(model, documents[:1])[0]
    assert weight_TE.shape == (70, 4)
    whole_BTE = np.asarray(model.route(model.encode(documents[0])[None, :-1]))
    np.testing.assert_allclose(weight_TE, whole_BTE[0], atol=1e-4)
    short = model.parts.interface  # 70 bytes are one window of 128; so score in smaller ones
    assert short.discount == 0.95
    weights = trace_routing(_Narrow(model), documents[:1])[0]
    assert (weights[CONTEXT, 1:3] != weight_TE[0, 1:3]).any(), "not the prior again"
    # Features differ, since attention restarts, but the record of 32 tokens speaks on.
    assert abs(weights[CONTEXT] - weight_TE[CONTEXT]).max() < 0.5


class _Narrow:
    """A model read in smaller windows."""

    context = CONTEXT

    def __init__(self, model):
        self.parts = model.parts


@pytest.mark.parametrize("mode", SCORERS)
def test_what_else_is_scored_does_not_change_a_documents_score(model, documents, mode):
    scorer = SCORERS[mode](model)
    together = score_documents(scorer, documents, context=CONTEXT)
    for i, document in enumerate(documents):
        alone = score_documents(scorer, [document], context=CONTEXT)
        assert alone.nats[0] == pytest.approx(together.nats[i], abs=SAME_NATS)
        assert alone.n_bytes[0] == together.n_bytes[i]
    many = score_documents(scorer, documents * 4, context=CONTEXT)  # more than one batch
    np.testing.assert_allclose(many.nats, np.tile(together.nats, 4), atol=SAME_NATS)


def test_safe_mode_keeps_its_bound_over_windows(tiny, documents):
    model = tiny.model(tiny.expert("a", noise=30.0))
    safe = score_documents(safe_scorer(model), documents, context=CONTEXT).nats
    own = score_documents(path_scorer(model), documents, context=CONTEXT).nats
    prior, rate = model.interface.backbone_prior, model.interface.switch_rate
    lengths = np.array([len(document) for document in documents])
    bound = -np.log(prior) - lengths * np.log(1 - rate * (1 - prior))
    assert (safe <= own + bound + SAME_NATS).all()


def test_at_most_max_bytes_are_scored(model, documents):
    cut = score_documents(path_scorer(model), documents, context=CONTEXT, max_bytes=20)
    np.testing.assert_array_equal(cut.n_bytes, [20, 5, 20])
    begins = [document[:20] for document in documents]
    expected = score_documents(path_scorer(model), begins, context=CONTEXT)
    np.testing.assert_array_equal(cut.nats, expected.nats)


def test_given_slots_are_a_path_of_their_own(model, documents):
    average = model.average_slots()
    found = score_documents(slots_scorer(model, average), documents, context=CONTEXT).nats
    assert np.isfinite(found).all()
    for name in ("backbone", "a"):
        other = score_documents(path_scorer(model, name), documents, context=CONTEXT).nats
        assert (np.abs(found - other) > SAME_NATS).all()


def test_progress_counts_documents(model, documents):
    heard = []
    score_documents(
        path_scorer(model),
        documents * 4,
        context=CONTEXT,
        progress=lambda done, all_: heard.append((done, all_)),
    )
    assert heard == [(8, 12), (12, 12)]


@pytest.mark.parametrize("documents", [[], [b""]])
def test_nothing_to_score_is_refused(model, documents):
    with pytest.raises(TextError):
        score_documents(path_scorer(model), documents, context=CONTEXT)


def test_scores_are_those_of_the_model(model, documents):
    """A document of one window costs what `Model.safe` says it costs."""
    document = documents[2]
    tokens_T = model.encode(document)
    log_prob_TV = np.asarray(model.safe(jnp.asarray(tokens_T[None, :-1])))[0]
    expected = -log_prob_TV[np.arange(len(document)), tokens_T[1:]].sum()
    found = score_documents(safe_scorer(model), [document], context=CONTEXT).nats[0]
    assert found == pytest.approx(expected, abs=SAME_NATS)
    assert jax.device_count() >= 1
