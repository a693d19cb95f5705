import jax.numpy as jnp
import numpy as np
import pytest

from composable.errors import ModelError, TextError
from composable.model.decoding import _MODES, _PREFILL, _advance, continue_tokens
from composable.model.model import generate

# Cached attention sums over the whole cache, masked, where a full pass sums over the blocks in use;
# logits are of order 5.
REORDERED_SUMS = 1e-4


WHOLE = {"mix": lambda model, tokens_BT: model(tokens_BT), "safe": lambda model, x: model.safe(x)}
LENGTH = _PREFILL + 8


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(tiny.expert("a"), tiny.expert("b"))


def begin(model, mode):
    return _MODES[mode][1](model.parts, 1, model.context)


@pytest.mark.parametrize("mode", WHOLE)
def test_decoding_in_pieces_equals_one_full_pass(tiny, model, mode):
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    state, outputs = begin(model, mode), []
    for piece_BT in np.split(tokens_BT, range(_PREFILL, LENGTH), axis=1):
        output_BTV, state = _advance(model.parts, piece_BT, state, mode=mode)
        outputs.append(np.asarray(output_BTV))
    expected_BTV = WHOLE[mode](model, tokens_BT)
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected_BTV, atol=REORDERED_SUMS)
    assert int(state.caches.position) == LENGTH


def test_the_likeliest_continuation_is_that_of_full_passes(tiny, model):
    prompt_T = tiny.tokens(batch=1, length=7)[0]
    tokens = list(prompt_T)
    for token in continue_tokens(model.parts, prompt_T, 4):
        padded_BT = np.zeros((1, LENGTH), np.int32)
        padded_BT[0, : len(tokens)] = tokens
        logits_V = np.asarray(model(padded_BT))[0, len(tokens) - 1]
        assert token == 1 + np.argmax(logits_V[1:])
        tokens.append(token)


def test_sampling_hangs_on_its_seed_and_never_draws_the_begin_token(tiny, model):
    prompt_T = tiny.tokens(batch=1, length=3)[0]

    def draw(seed):
        return list(continue_tokens(model.parts, prompt_T, 40, temperature=5.0, seed=seed))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert 0 not in draw(0) + draw(1)


@pytest.mark.parametrize("mode", ["mix", "safe"])
def test_no_prompt_and_no_expert_compiles_anything_new(tiny, count_compilations, mode):
    model = tiny.model(tiny.expert("a"))
    generate(model, "x" * 40, 3, mode=mode)  # the prefill chunk and the single step
    with count_compilations() as compiled:
        generate(model, "another prompt", 3, mode=mode)
        generate(model, "y" * 70, 3, mode=mode)
        generate(model, "z" * 32, 3, mode=mode, temperature=0.7, seed=3)
        model.install(tiny.expert("b"))
        generate(model, "and another", 3, mode=mode)
        model.remove("a")
        generate(model, "x", 3, mode=mode)
    assert len(compiled) == 0


def test_generate_joins_the_stream(model):
    pieces = list(model.stream("abc", 12, seed=1, temperature=1.0))
    assert "".join(pieces) == generate(model, "abc", 12, seed=1, temperature=1.0)
    assert 0 < len(pieces) <= 13


def test_a_text_may_fill_the_context_and_no_more(tiny, model):
    length = tiny.cfg.context - 2  # the begin token comes on top
    assert len(list(continue_tokens(model.parts, model.encode("x" * length), 1))) == 1
    with pytest.raises(TextError, match="128 tokens and 1 more do not fit the context of 128"):
        generate(model, "x" * (length + 1), 1)


def test_what_cannot_be_continued_is_refused(model):
    with pytest.raises(TextError, match="empty"):
        generate(model, "", 5)
    with pytest.raises(ModelError, match="negative"):
        generate(model, "a", 5, temperature=-1.0)
    with pytest.raises(ModelError, match="'fast' is not one of mix, safe"):
        generate(model, "a", 5, mode="fast")


def test_asking_for_nothing_gives_nothing(model):
    assert generate(model, "abc", 0) == ""


def test_a_broken_path_leaves_decoding_in_safe_mode_sound(tiny):
    model = tiny.model(tiny.expert("broken", noise=1e30))
    state = begin(model, "safe")
    for token in (0, 65, 66):
        tokens_BT = jnp.full((1, 1), token)
        log_prob_BTV, state = _advance(model.parts, tokens_BT, state, mode="safe")
        assert np.isfinite(np.asarray(log_prob_BTV)).all()
