import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.errors import ContributionWarning, ModelError, TextError
from composable.interface import OutputMixture, SwitchingFilter
from composable.model.chunks import CHUNKS
from composable.model.decoding import (
    Decoder,
    cache_length,
    continue_tokens,
)
from composable.model.layers import CACHE_BLOCK, KVCache, place_tokens
from composable.model.mix import mix, mix_state
from composable.model.model import generate
from composable.model.safe import safe, safe_state
from composable.model.sampling import (
    Sampling,
    draw_token,
    kth_largest,
    make_draw,
    penalize_seen,
    restrict_logits,
)
from composable.model.tokenizer import ByteTokenizer

pytestmark = pytest.mark.slow

# Cached attention sums over the whole cache, masked, where a full pass sums over the blocks in use;
# logits are of order 5.
REORDERED_SUMS = 1e-4

STICKY = SwitchingFilter(power=0.35, backbone_prior=0.8, switch_rate=0.003)


WHOLE = {"mix": lambda model, tokens_BT: model(tokens_BT), "safe": lambda model, x: model.safe(x)}
CHUNK = CHUNKS[0]
LENGTH = CHUNK + 8
MODES = {"mix": (jax.jit(mix), mix_state), "safe": (jax.jit(safe), safe_state)}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(tiny.expert("a"), tiny.expert("b"))


def draw(model, tokens_T, n_tokens, **sampling):
    drawn = continue_tokens(
        model.parts, ByteTokenizer(), tokens_T, n_tokens, sampling=Sampling(**sampling)
    )
    return [token for token, _ in drawn]


def start(model, mode):
    """Return the state of a mode at the start of a document."""
    return MODES[mode][1](model.parts, 1, model.context)


def run_in_pieces(model, mode, tokens_BT):
    """Return a mode's outputs for a first chunk and single tokens after it, and its last state.

    One length of text everywhere, so that tests share compiled programs.
    """
    state, outputs = start(model, mode), []
    for piece_BT in np.split(tokens_BT, range(CHUNK, LENGTH), axis=1):
        output_BTV, state = MODES[mode][0](model.parts, piece_BT, state)
        outputs.append(np.asarray(output_BTV))
    return np.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("mode", WHOLE)
def test_decoding_in_pieces_equals_one_full_pass(tiny, model, mode):
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    found_BTV, state = run_in_pieces(model, mode, tokens_BT)
    np.testing.assert_allclose(found_BTV, WHOLE[mode](model, tokens_BT), atol=REORDERED_SUMS)
    assert int(state.caches.position) == LENGTH


def test_decoding_redistributes_the_weight_of_a_broken_body_as_a_full_pass_does(tiny):
    broken = tiny.expert("b")
    w_down = broken.body.slots["2"].w_down
    w_down[...] = jnp.full_like(w_down, jnp.nan)
    for top_k in (1, 2):
        model = tiny.model(tiny.expert("a"), broken, top_k=top_k)
        tokens_BT = tiny.tokens(batch=1, length=LENGTH)
        assert np.asarray(model.route(tokens_BT))[..., model.names.index("b")].max() > 0.5
        found_BTV, state = run_in_pieces(model, "mix", tokens_BT)
        np.testing.assert_allclose(found_BTV, model(tokens_BT), atol=REORDERED_SUMS)
        counts = model.contributions(tokens_BT)["b"]
        zeroed = int(state.tally.zeroed_E[model.names.index("b")])
        assert zeroed == counts.zeroed == counts.made // 2


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("mix", {}),
        (
            "mix",
            {
                "mix": dataclasses.replace(STICKY, margin=0.1, floor=0.05, top_k=3),
                "output_mixture": OutputMixture(prior=0.3, rate=0.05),
            },
        ),
        ("safe", {"output_mixture": OutputMixture(prior=0.3, rate=0.05)}),
    ],
    ids=["filter", "floor and output mixture", "safe with output mixture"],
)
def test_the_switching_filter_continues_from_piece_to_piece(tiny, mode, more):
    sticky = {"mix": STICKY, **more}
    model = tiny.model(tiny.expert("a"), tiny.expert("b"), **sticky)
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    found_BTV, _ = run_in_pieces(model, mode, tokens_BT)
    np.testing.assert_allclose(found_BTV, WHOLE[mode](model, tokens_BT), atol=REORDERED_SUMS)


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_the_likeliest_continuation_is_that_of_full_passes(tiny, model, penalty):
    """With a penalty on every token of the prompt and of the continuation so far."""
    prompt_T = tiny.tokens(batch=1, length=7)[0]
    tokens = list(prompt_T)
    for token in draw(model, prompt_T, 4, repetition_penalty=penalty):
        padded_BT = np.zeros((1, LENGTH), np.int32)
        padded_BT[0, : len(tokens)] = tokens
        logits_V = np.array(model(padded_BT))[0, len(tokens) - 1]
        for seen in set(tokens):
            logits_V[seen] *= penalty if logits_V[seen] < 0 else 1 / penalty
        assert token == 1 + np.argmax(logits_V[1:])
        tokens.append(token)


def test_sampling_depends_on_its_seed_and_never_draws_the_start_token(tiny, model):
    prompt_T = tiny.tokens(batch=1, length=3)[0]

    first, again, other = (
        draw(model, prompt_T, 40, temperature=5.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert 0 not in first + other


@pytest.mark.parametrize("mode", ["mix", "safe"])
def test_new_prompts_and_new_experts_compile_nothing(tiny, count_compilations, mode):
    model = tiny.model(tiny.expert("a"))
    generate(model, "x" * 40, 3, mode=mode)  # the prefill chunk and the single step
    model.install(tiny.expert("c"))
    model.remove("c")
    with count_compilations() as compiled:
        generate(model, "another prompt", 3, mode=mode)
        generate(model, "y" * 70, 3, mode=mode)
        generate(model, "z" * 32, 4, mode=mode, temperature=0.7, top_p=0.9, seed=3)
        generate(model, "z", 3, mode=mode, repetition_penalty=1.2)
        for top_k, min_p in ((5, 0.1), (10**12, 1.0)):
            generate(model, "z", 3, mode=mode, temperature=0.7, top_k=top_k, min_p=min_p)
        model.install(tiny.expert("b"))
        generate(model, "and another", 3, mode=mode)
        model.remove("a")
        generate(model, "x", 3, mode=mode)
    assert len(compiled) == 0


def test_generate_joins_the_stream(model):
    pieces = list(model.stream("abc", 12, seed=1, temperature=1.0))
    assert "".join(piece.text for piece in pieces) == generate(
        model, "abc", 12, seed=1, temperature=1.0
    )
    assert 0 < len(pieces) <= 13


def test_a_text_may_fill_the_context_and_no_more(tiny, model):
    length = tiny.cfg.context - 2  # the start token comes on top
    assert len(draw(model, model.encode("x" * length), 1)) == 1
    with pytest.raises(TextError, match="128 tokens and 1 more do not fit the context of 128"):
        generate(model, "x" * (length + 1), 1)


def test_prompts_and_settings_that_cannot_be_continued_are_refused(model):
    with pytest.raises(TextError, match="empty"):
        generate(model, "", 5)
    with pytest.raises(ModelError, match="negative"):
        generate(model, "a", 5, temperature=-1.0)
    with pytest.raises(ModelError, match="'fast' is not one of mix, safe"):
        generate(model, "a", 5, mode="fast")


def test_zero_tokens_give_an_empty_text(model):
    assert generate(model, "abc", 0) == ""


def test_decoding_in_safe_mode_stays_finite_with_a_broken_path(tiny):
    model = tiny.model(tiny.expert("broken", noise=1e30))
    state = start(model, "safe")
    for token in (0, 65, 66):
        tokens_BT = np.full((1, 1), token, np.int32)
        log_prob_BTV, state = MODES["safe"][0](model.parts, tokens_BT, state)
        assert np.isfinite(np.asarray(log_prob_BTV)).all()


def test_each_token_has_its_router_weights(tiny, model):
    """Those of the first token are those of a full pass at the prompt's end."""
    text_BT = tiny.tokens(batch=1, length=LENGTH)
    (first, *_) = continue_tokens(model.parts, ByteTokenizer(), text_BT[0, :20], 2)
    expected_E = np.asarray(model.route(text_BT))[0, 19]
    np.testing.assert_allclose(first.weight_E, expected_E, atol=1e-5)  # float32 softmaxes


@pytest.mark.parametrize("mode", MODES)
def test_weights_sum_to_one(tiny, model, mode):
    prompt_T = tiny.tokens(batch=1, length=20)[0]
    for _, weight_E in continue_tokens(model.parts, ByteTokenizer(), prompt_T, 3, mode=mode):
        assert weight_E.sum() == pytest.approx(1, abs=1e-5)
        assert weight_E.shape == (model.parts.bank.capacity,)


@jax.jit
def draw_many(keys, draw, seen_V, logits_V):
    return jax.vmap(lambda key: draw_token(draw._replace(key=key), seen_V, logits_V))(keys)


def drawn(logits_V, n, *, banned=(), seen=(), **settings):
    ids_V = np.arange(len(logits_V))
    settings = Sampling(**{"temperature": 1.0, **settings})
    draw = make_draw(settings, np.isin(ids_V, banned))
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(draw_many(keys, draw, np.isin(ids_V, seen), logits_V))


def restricted(logits_V, **settings):
    """Return the logits that a token is drawn from."""
    settings = Sampling(**{"temperature": 1.0, **settings})
    draw = make_draw(settings, np.zeros(len(logits_V), bool))
    return np.asarray(jax.jit(restrict_logits)(draw, logits_V))


def kept(logits_V, **settings):
    return np.flatnonzero(np.isfinite(restricted(logits_V, **settings))).tolist()


def test_top_p_draws_from_the_fewest_likeliest_tokens_that_reach_it():
    logits_V = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))
    found = {
        top_p: set(drawn(logits_V, 100, top_p=top_p).tolist()) for top_p in (0.01, 0.6, 0.8, 1.0)
    }
    assert found == {0.01: {1}, 0.6: {1, 3}, 0.8: {1, 3, 4}, 1.0: {0, 1, 2, 3, 4}}


def test_top_k_keeps_the_likeliest_and_what_ties_with_the_last_of_them():
    logits_V = np.array([1.0, 3.0, 0.0, 2.0, 2.0], np.float32)
    found = [kept(logits_V, top_k=k) for k in (0, 1, 2, 3, 4, 5)]
    everything = [0, 1, 2, 3, 4]
    assert found == [everything, [1], [1, 3, 4], [1, 3, 4], [0, 1, 3, 4], everything]
    assert set(drawn(logits_V, 100, top_k=2).tolist()) == {1, 3, 4}


def test_the_kth_largest_logit_is_that_of_a_sort():
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, np.inf, -np.inf, -np.inf, 1e-40, -1e-40, 3e38, -3e38, 1.0, -1.0]
    logits_V = np.concatenate([rng.normal(size=50), rng.integers(-3, 3, 50), special])
    logits_V = rng.permutation(logits_V).astype(np.float32)
    found_V = jax.vmap(kth_largest, (0, None))(np.arange(1, len(logits_V) + 1), logits_V)
    np.testing.assert_array_equal(found_V, np.sort(logits_V)[::-1])


def test_a_top_k_over_the_vocabulary_excludes_nothing():
    logits_V = np.array([1.0, 3.0, 0.0, 2.0, 2.0], np.float32)
    for top_k in (5, 6, 2**31, 10**12):
        np.testing.assert_array_equal(restricted(logits_V, top_k=top_k), logits_V)
    assert set(drawn(logits_V, 300, top_k=10**12, banned=[1]).tolist()) == {0, 2, 3, 4}


def test_min_p_is_relative_to_the_likeliest_token():
    logits_V = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))
    assert kept(logits_V, min_p=0.2) == [0, 1, 3, 4]
    assert kept(logits_V, min_p=0.7) == [1, 3]
    np.testing.assert_array_equal(restricted(logits_V, min_p=0.0), logits_V)
    assert kept(logits_V, min_p=1.0) == [1]
    assert kept(np.array([2.0, 1.0, 2.0], np.float32), min_p=1.0) == [0, 2]


def test_top_k_restricts_before_top_p_and_temperature_before_both():
    logits_V = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert kept(logits_V, top_p=0.5) == [0, 1]
    assert kept(logits_V, top_p=0.5, top_k=2) == [0]  # 4/7 of what top k keeps
    assert kept(logits_V, top_p=0.5, temperature=0.1) == [0]
    assert kept(logits_V, min_p=0.7, temperature=1.0) == [0, 1]
    assert kept(logits_V, min_p=0.7, temperature=4.0) == [0, 1, 2, 3]


def test_a_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits_V = np.array([2.0, -2.0, 0.0, 2.0, -np.inf], np.float32)
    seen_V = np.array([True, True, True, False, True])
    np.testing.assert_array_equal(
        penalize_seen(jnp.float32(2.0), seen_V, logits_V), [1.0, -4.0, 0.0, 2.0, -np.inf]
    )


@pytest.mark.parametrize(
    ("logits", "token"),
    [([1, 3, 2, 3], 1), ([3, 3], 0), ([-np.inf, -np.inf, 0], 2), ([-np.inf] * 3, 0)],
)
def test_the_first_of_the_likeliest_tokens_is_taken(logits, token):
    assert drawn(np.array(logits, np.float32), 1, temperature=0).tolist() == [token]


def test_a_repetition_penalty_of_one_changes_nothing():
    logits_V = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    same_V = penalize_seen(jnp.float32(1.0), np.ones(1000, bool), logits_V)
    np.testing.assert_array_equal(np.asarray(same_V).view(np.int32), logits_V.view(np.int32))


@pytest.mark.parametrize("mode", MODES)
def test_greedy_decoding_with_a_large_penalty_never_repeats_a_token(tiny, model, mode):
    prompt_T = tiny.tokens(batch=1, length=20)[0]
    settings = {"mode": mode, "sampling": Sampling(repetition_penalty=1e4)}
    tokens = [t for t, _ in continue_tokens(model.parts, ByteTokenizer(), prompt_T, 60, **settings)]
    assert len({*prompt_T.tolist(), *tokens}) == len(set(prompt_T.tolist())) + len(tokens)
    plain = draw(model, prompt_T, 60)
    assert len(set(plain)) < len(plain)  # or the penalty would have nothing to prevent


def test_without_a_temperature_only_the_repetition_penalty_counts():
    logits_V = np.array([3.0, 2.0, 1.0], np.float32)
    settings = {"temperature": 0.0, "top_k": 1, "top_p": 0.1, "min_p": 1.0}
    assert drawn(logits_V, 1, **settings) == [0]
    assert drawn(logits_V, 1, seen=[0], repetition_penalty=2.0, **settings) == [1]


def test_draws_follow_the_distribution():
    probability_V = np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)
    counts = np.bincount(drawn(np.log(probability_V), 2000), minlength=5) / 2000
    np.testing.assert_allclose(counts, probability_V, atol=0.04)  # over three standard errors


def test_banned_tokens_are_never_drawn():
    logits_V = np.array([9.0, 1.0, 2.0, 0.0, 0.0], np.float32)
    assert set(drawn(logits_V, 5, temperature=0.0, banned=[0])) == {2}
    assert set(drawn(logits_V, 100, banned=[0, 1, 3, 4])) == {2}


def test_feeding_in_turns_equals_feeding_at_once(tiny):
    """Drawn tokens are part of the sequence, whether or not more is fed after them.

    Without experts, for which text that the model drew differs from text that it was given.
    """
    model = tiny.model()
    first_T, second_T = tiny.tokens(batch=2, length=9)
    decoder = Decoder(model.parts, ByteTokenizer(), length=64)
    decoder.feed(first_T)
    between = [token for token, _ in decoder.draw(3)]
    decoder.feed(second_T)
    after = [token for token, _ in decoder.draw(3)]
    assert after == draw(model, np.concatenate([first_T, between, second_T]), 3)
    assert decoder.room == 64 - 9 - 3 - 9 - 3


def test_a_repetition_penalty_counts_every_turn(tiny):
    """Without experts, for which text that the model drew differs from text that it was given."""
    backbone, sampling = tiny.model(), Sampling(repetition_penalty=3.0)
    first_T, second_T = tiny.tokens(batch=2, length=9)
    decoder = Decoder(backbone.parts, ByteTokenizer(), length=64, sampling=sampling)
    decoder.feed(first_T)
    between = [token for token, _ in decoder.draw(3)]
    decoder.feed(second_T)
    after = [token for token, _ in decoder.draw(12)]
    whole_T = np.concatenate([first_T, between, second_T])
    assert after == draw(backbone, whole_T, 12, repetition_penalty=3.0)
    assert after != draw(backbone, whole_T, 12)


def test_a_cache_is_read_as_far_as_it_is_filled_and_no_further(tiny):
    """Values in the cache beyond the sequence, over several blocks, change nothing."""
    cfg = tiny.cfg
    attention = tiny.backbone.layers[0].attention

    @jax.jit
    def attend(attention, x_BTD, first=0, cache=None):
        return attention(x_BTD, place_tokens(cfg, x_BTD.shape[1], first), cache)

    n_blocks = 3
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(1, 2 * CACHE_BLOCK, cfg.d_model)).astype(np.float32)
    shape = (1, cfg.n_kv_heads, n_blocks * CACHE_BLOCK, cfg.d_head)
    expected_BTD, _ = attend(attention, x_BTD)
    for fill in (0.0, 1e3):
        filled = np.full(shape, fill, np.float32)
        cache = KVCache(filled, filled)
        first_BTD, cache = attend(attention, x_BTD[:, :-1], 0, cache)
        last_BTD, _ = attend(attention, x_BTD[:, -1:], x_BTD.shape[1] - 1, cache)
        found_BTD = np.concatenate([first_BTD, last_BTD], axis=1)
        np.testing.assert_allclose(found_BTD, expected_BTD, atol=REORDERED_SUMS)


def test_caches_come_in_few_sizes():
    assert {cache_length(n, 8192) for n in range(1, 1025)} == {1024}
    assert {cache_length(n, 8192) for n in range(1025, 8193)} == {2048, 4096, 8192}
    assert cache_length(100, 128) == 128


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", np.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", np.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", np.inf),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ModelError) as caught:
        Sampling(**{field: value})
    assert caught.value.where == field


@pytest.mark.parametrize("n_taken", [1, 2, 3])
def test_a_text_that_is_broken_off_continues_with_what_was_taken(tiny, n_taken):
    """The first token is handed out before it is read, the others while they are."""
    model = tiny.model()
    first_T, second_T = tiny.tokens(batch=2, length=9)
    decoder = Decoder(model.parts, ByteTokenizer(), length=64)
    decoder.feed(first_T)
    drawing = decoder.draw(5)
    taken = [next(drawing).token for _ in range(n_taken)]
    drawing.close()
    assert decoder.last == taken[-1]
    assert decoder.room == 64 - 9 - n_taken
    decoder.feed(second_T)
    after = [token for token, _ in decoder.draw(3)]
    assert after == draw(model, np.concatenate([first_T, taken, second_T]), 3)


def test_decoding_without_tokens_or_without_room_is_refused(model):
    decoder = Decoder(model.parts, ByteTokenizer(), length=8)
    with pytest.raises(TextError, match="no tokens to continue"):
        list(decoder.draw(1))
    with pytest.raises(TextError, match="do not fit the 8 positions left"):
        decoder.feed(list(range(9)))
    with pytest.raises(TextError, match="context of 128"):
        Decoder(model.parts, ByteTokenizer(), length=129)


def test_an_expert_whose_contributions_are_zeroed_is_reported_once_at_the_end(tiny):
    """By name and with figures; no other expert is reported."""
    model = tiny.model(tiny.expert("a"), tiny.expert("huge", noise=1e6))
    with pytest.warns(ContributionWarning, match="expert huge: ") as caught:
        text = generate(model, "some words", 8)
    assert len(caught) == 1
    assert 0 < caught[0].message.zeroed <= caught[0].message.made
    assert isinstance(text, str)
