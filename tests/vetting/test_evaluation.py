import numpy as np
import pytest
from flax import nnx

from composable.errors import TextError
from composable.model.model import Model
from composable.vetting.evaluation import (
    BATCH,
    Score,
    _route,
    measure_class_evidence,
    measure_evidence,
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
    slots_scorer,
    trace_routing,
)

# Sums of some hundred log probabilities of order 8, in float32.
SAME_NATS = 1e-2
CONTEXT = 128


@pytest.fixture(scope="module")
def model(loaded, tiny):
    """Return a model of the shapes that vetting uses, so that it compiles nothing of its own."""
    return Model(loaded.backbone, loaded.interface, [tiny.expert("a")])


@pytest.fixture(scope="module")
def documents(tiny):
    return [
        tiny.text("some words of text", seed=i, length=n).encode()
        for i, n in enumerate((300, 5, 128))
    ]


SCORERS = {"mix": mix_scorer, "safe": safe_scorer, "path": path_scorer}


def test_bits_per_byte_are_total_bits_over_total_bytes():
    score = Score(np.array([8.0, 2.0]) * np.log(2), np.array([1, 4]))
    assert score.bits_per_byte == pytest.approx(2.0)


def test_a_documents_score_is_the_sum_over_its_windows(model, documents):
    """Attention restarts with each window; for one path there is nothing else to carry."""
    score = score_documents(path_scorer(model, "a"), documents, context=CONTEXT)
    np.testing.assert_array_equal(score.n_bytes_B, [300, 5, 128])
    for document, found in zip(documents, score.nats_B, strict=True):
        tokens_T = model.encode(document)
        expected = 0.0
        for at in range(0, len(document), CONTEXT):
            window_T = tokens_T[at : at + CONTEXT + 1]
            padded_BT = np.zeros((1, CONTEXT), np.int32)
            padded_BT[0, : len(window_T) - 1] = window_T[:-1]
            logits_TV = np.asarray(model.path(padded_BT, "a"), np.float64)[0, : len(window_T) - 1]
            log_prob_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
            expected -= log_prob_TV[np.arange(len(window_T) - 1), window_T[1:]].sum()
        assert found == pytest.approx(expected, abs=SAME_NATS)


@pytest.mark.bits
def test_the_track_record_is_carried_from_window_to_window(model, documents):
    traces = trace_routing(model, documents)
    assert [trace_TE.shape for trace_TE in traces] == [(300, 2), (5, 2), (128, 2)]
    found_TE = traces[0]
    np.testing.assert_allclose(found_TE.sum(axis=1), 1, atol=1e-5)  # a float32 softmax
    inputs_BT = np.zeros((BATCH, 3 * CONTEXT), np.int32)
    inputs_BT[0, :300] = model.encode(documents[0])[:-1]
    state, carried, afresh = None, [], []
    for window_BT in np.split(inputs_BT, 3, axis=1):
        afresh.append(np.asarray(_route(model.parts, window_BT, None)[0][0]))
        weight_BTE, state = _route(model.parts, window_BT, state)
        carried.append(np.asarray(weight_BTE[0]))
    np.testing.assert_array_equal(found_TE, np.concatenate(carried)[:300])
    first = slice(CONTEXT, CONTEXT + 5)  # of the second window
    assert not np.array_equal(np.concatenate(afresh)[first], found_TE[first])


@pytest.mark.parametrize("mode", SCORERS)
def test_what_else_is_scored_does_not_change_a_documents_score(model, documents, mode):
    scorer = SCORERS[mode](model)
    together = score_documents(scorer, documents, context=CONTEXT)
    for i, document in enumerate(documents):
        alone = score_documents(scorer, [document], context=CONTEXT)
        assert alone.nats_B[0] == pytest.approx(together.nats_B[i], abs=SAME_NATS)
        assert alone.n_bytes_B[0] == together.n_bytes_B[i]
    many = score_documents(scorer, documents * 4, context=CONTEXT)  # more than one batch
    np.testing.assert_allclose(many.nats_B, np.tile(together.nats_B, 4), atol=SAME_NATS)


def test_safe_mode_keeps_its_bound_over_windows(loaded, tiny, documents):
    model = Model(loaded.backbone, loaded.interface, [tiny.expert("a", noise=30.0)])
    safe = score_documents(safe_scorer(model), documents, context=CONTEXT).nats_B
    own = score_documents(path_scorer(model), documents, context=CONTEXT).nats_B
    prior, rate = model.interface.backbone_prior, model.interface.switch_rate
    lengths = np.array([len(document) for document in documents])
    bound = -np.log(prior) - lengths * np.log(1 - rate * (1 - prior))
    assert (safe <= own + bound + SAME_NATS).all()


@pytest.mark.bits
def test_at_most_max_bytes_are_scored(model, documents):
    cut = score_documents(path_scorer(model), documents, context=CONTEXT, max_bytes=20)
    np.testing.assert_array_equal(cut.n_bytes_B, [20, 5, 20])
    begins = [document[:20] for document in documents]
    expected = score_documents(path_scorer(model), begins, context=CONTEXT)
    np.testing.assert_array_equal(cut.nats_B, expected.nats_B)


def test_given_slots_are_scored_like_an_experts_path(model, documents):
    average = model.average_slots()
    found = score_documents(slots_scorer(model, average), documents, context=CONTEXT).nats_B
    own, body = (
        score_documents(path_scorer(model, name), documents, context=CONTEXT).nats_B
        for name in ("backbone", "a")
    )
    np.testing.assert_array_equal(found, body)  # the average of one
    assert (np.abs(found - own) > SAME_NATS).all()


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


def test_evidence_is_the_log_probability_of_each_token_by_each_scout(model, tiny, documents):
    """In windows, each of which begins anew."""
    for document in documents:
        evidence_EM, tokens_T = measure_evidence(model, [document]), model.encode(document)
        assert evidence_EM.shape == (len(model.names), len(document))
        for start in range(0, len(document), CONTEXT):
            window_T = tokens_T[start : start + CONTEXT + 1]
            backbone, n = model.parts.backbone, len(window_T) - 1
            x_BTD, _ = backbone.trunk(np.pad(window_T[:-1], (0, CONTEXT - n))[None])
            feature_BTD = backbone.features(x_BTD)[:, :n]
            for index, scout in ((0, backbone.scout), (1, tiny.expert("a").scout)):
                expected_T = np.asarray(scout(feature_BTD))[0, np.arange(n), window_T[1:]]
                found_T = evidence_EM[index, start : start + n]
                # Matrix products of other shapes round differently.
                np.testing.assert_allclose(found_T, expected_T, atol=1e-4)
    whole_EM, each = (
        measure_evidence(model, documents),
        [measure_evidence(model, [document]) for document in documents],
    )
    np.testing.assert_allclose(np.sort(whole_EM), np.sort(np.concatenate(each, axis=1)), atol=1e-4)
    cut_EM = measure_evidence(model, documents, max_bytes=100)
    assert cut_EM.shape[1] == sum(min(100, len(document)) for document in documents)


def test_class_evidence_of_a_body_adds_up_the_tokens_of_a_class(loaded, tiny, documents):
    """With a class for every byte it is the body's own score; with half as many, no less."""
    halved = nnx.clone(loaded.backbone)
    halved.class_map[...] = np.arange(256, dtype=np.int32) // 2
    found = []
    for backbone in (loaded.backbone, halved):
        model = Model(backbone, loaded.interface, [tiny.expert("a")])
        found.append(measure_class_evidence(model, "a", documents))
    score = score_documents(path_scorer(model, "a"), documents, context=CONTEXT)
    assert -found[0].sum() == pytest.approx(score.nats_B.sum(), abs=SAME_NATS)
    document = documents[1]
    tokens_T = model.encode(document)
    padded_BT = np.zeros((1, CONTEXT), np.int32)
    padded_BT[0, : len(tokens_T) - 1] = tokens_T[:-1]
    logits_TV = np.asarray(model.path(padded_BT, "a"), np.float64)[0, : len(document)]
    prob_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
    prob_TC = prob_TV.reshape(len(document), 128, 2).sum(-1)
    expected_T = np.log(prob_TC[np.arange(len(document)), tokens_T[1:] // 2])
    alone_M = measure_class_evidence(model, "a", [document])
    # Sums in float32 against sums in float64.
    np.testing.assert_allclose(alone_M, expected_T, atol=1e-4)
    assert (found[1] >= found[0]).all()


def test_an_empty_entry_of_the_bank_has_the_evidence_of_chance(loaded, documents):
    model = Model(loaded.backbone, loaded.interface, capacity=2)
    np.testing.assert_allclose(measure_evidence(model, documents)[1], -np.log(256), rtol=1e-5)
