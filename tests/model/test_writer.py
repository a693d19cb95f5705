"""In safe mode one path writes at a time, drawn by the chain over paths."""

import jax
import numpy as np
import pytest

from composable.interface import OutputMixture
from composable.model.decoding import Decoder
from composable.model.occupancy import WRITING_RATE
from composable.model.safe import safe_state, trace_safe
from composable.model.sampling import Sampling
from composable.model.steps import SafeSteps
from composable.model.tokenizer import ByteTokenizer
from composable.model.writer import Writer

pytestmark = pytest.mark.slow

# Cached attention sums over the whole cache, and a path that caught up read in chunks.
REORDERED_SUMS = 1e-4
LENGTH = 128


@pytest.fixture(scope="module")
def model(tiny):
    experts = (tiny.expert("a"), tiny.expert("b", scout_noise=3.0), tiny.expert("c"))
    return tiny.model(*experts, top_k=2, output_mixture=OutputMixture(prior=0.1, rate=0.05))


def advance(steps, tokens, is_drawn):
    logits_V, weight_E = steps.advance(jax.numpy.asarray([tokens], jax.numpy.int32), is_drawn)
    return np.asarray(logits_V), np.asarray(weight_E)


def follow(model, tokens, n_given):
    """Return outputs and weights of the chain as an average; tokens after `n_given` are drawn."""
    step = jax.jit(trace_safe)
    state = safe_state(model.parts, 1, LENGTH)
    given_BT = jax.numpy.asarray([tokens[:n_given]], jax.numpy.int32)
    outputs = [step(model.parts, given_BT, state, jax.numpy.bool_(False))]
    for token in tokens[n_given:]:
        token_BT = jax.numpy.asarray([[token]], jax.numpy.int32)
        outputs.append(step(model.parts, token_BT, outputs[-1][2], jax.numpy.bool_(True)))
    return outputs


def test_each_path_is_drawn_as_often_as_the_chain_says():
    weight_E, target_E, n = np.array([0.5, 0.3, 0.0, 0.2]), np.array([0.1, 0.1, 0.7, 0.1]), 4000
    counts = np.zeros((2, 4))
    for seed in range(n):
        writer = Writer(weight_E, target_E, seed=seed, position=5)
        counts[0, writer.path] += 1
        for position in range(6, 36):
            writer.move(position)
        counts[1, writer.path] += 1
    kept = (1 - WRITING_RATE) ** 30
    awake_E = target_E * (weight_E > 0)
    later_E = kept * weight_E + (1 - kept) * awake_E / awake_E.sum()
    noise = 4 * np.sqrt(0.25 / n)
    np.testing.assert_allclose(counts[0] / n, weight_E, atol=noise)
    np.testing.assert_allclose(counts[1] / n, later_E, atol=noise)
    assert counts[:, 2].sum() == 0  # a path that sleeps does not write


def paths(seed, weight_E, target_E, n_tokens=300):
    """Return the path that writes each of some tokens."""
    writer = Writer(weight_E, target_E, seed=seed, position=3)
    found = [writer.path]
    for position in range(4, 3 + n_tokens):
        writer.move(position)
        found.append(writer.path)
    return found


def test_a_text_changes_its_path_as_seldom_as_can_be():
    weight_E, target_E, n = [0.6, 0.4, 0.0], [0.3, 0.7, 0.0], 1000
    found = np.array([paths(seed, weight_E, target_E) for seed in range(n)])
    changes = (np.diff(found, axis=1) != 0).sum(axis=1)
    assert set(changes) == {0, 1}
    np.testing.assert_allclose(changes.mean(), 0.3, atol=4 * np.sqrt(0.25 / n))
    assert not np.any((found[:, 0] == 1) & (changes > 0))  # path 1 only gains
    assert set(map(len, map(set, (paths(s, weight_E, weight_E) for s in range(20))))) == {1}


def test_a_writer_depends_on_seed_and_position_alone():
    weight_E, target_E = [0.25] * 4, [0.7, 0.1, 0.1, 0.1]
    assert paths(1, weight_E, target_E) == paths(1, weight_E, target_E)
    assert len({tuple(paths(seed, weight_E, target_E)) for seed in range(-5, 5)}) > 3


def test_what_is_written_is_the_text_of_one_path(model, tiny):
    """Logits are those of the path that writes with the scouts' share, and only it is run."""
    tokens = tiny.tokens(batch=1, length=40)[0].tolist()
    steps = SafeSteps(model.parts, LENGTH, seed=4)
    advance(steps, tokens[:32], False)
    first = advance(steps, tokens[32:33], False)
    logits_V, weight_E = map(np.asarray, steps.start_writing())
    assert (first[1] > 0).sum() == 3 and sorted(weight_E.tolist()) == [0] * 3 + [1]
    assert steps.start_writing() is None
    name = model.names[int(weight_E.argmax())]
    whole_BTV = jax.nn.log_softmax(model.path(np.array([tokens]), name))
    held = {path: cached.n_filled for path, cached in steps._paths.items()}
    for n in range(33, 40):
        # Between the path's prediction and the scouts' there is the output mixture's share.
        change_V = logits_V - np.asarray(whole_BTV)[0, n - 1]
        share = float(steps._state.output_mixture.share_B[0])
        assert change_V.min() >= np.log1p(-share) - REORDERED_SUMS
        (path,) = np.flatnonzero(weight_E)
        logits_V, weight_E = advance(steps, tokens[n : n + 1], True)
        np.testing.assert_array_equal(np.flatnonzero(weight_E), [path])  # seed 4 does not switch
    moved = {p for p, cached in steps._paths.items() if cached.n_filled != held[p]}
    assert [steps._entry_of[p] for p in moved] == [path]


@pytest.mark.parametrize("n_written", [1, 9])
def test_after_written_text_given_text_is_read_by_all_paths_again(tiny, n_written):
    """The posterior moved by the chain, and every path predicts what follows."""
    model = tiny.model(*(tiny.expert(name) for name in "abc"), top_k=2)
    tokens = tiny.tokens(batch=1, length=20 + n_written)[0].tolist()
    steps = SafeSteps(model.parts, LENGTH, seed=1)
    advance(steps, tokens[:10], False)
    for token in tokens[10 : 10 + n_written]:
        advance(steps, [token], True)
    state = follow(model, tokens[: 10 + n_written], 10)[-1][2]
    step = jax.jit(trace_safe)
    for token in tokens[10 + n_written :]:
        token_BT = jax.numpy.asarray([[token]], jax.numpy.int32)
        expected_BTV, weight_BTE, state = step(model.parts, token_BT, state, jax.numpy.bool_(False))
        found_V, weight_E = advance(steps, [token], False)
        np.testing.assert_allclose(weight_E, weight_BTE[0, -1], atol=REORDERED_SUMS)
        np.testing.assert_allclose(found_V, expected_BTV[0, -1], atol=10 * REORDERED_SUMS)
    np.testing.assert_allclose(
        steps._state.occupancy_BEO, state.occupancy_BEO, rtol=1e-3, atol=1e-3
    )


def test_texts_of_many_seeds_are_by_each_path_as_often_as_its_weight(model, tiny):
    tokens = tiny.tokens(batch=1, length=24)[0]
    weight_BTE = follow(model, tokens.tolist(), 24)[0][1]
    counts_E, n = np.zeros(4), 120
    for seed in range(n):
        sampling = Sampling(temperature=1.0, seed=seed)
        decoder = Decoder(model.parts, ByteTokenizer(), length=32, sampling=sampling, mode="safe")
        decoder.feed(tokens)
        (drawn,) = decoder.draw(1)
        counts_E += drawn.weight_E
    np.testing.assert_allclose(counts_E / n, weight_BTE[0, -1], atol=4 * np.sqrt(0.25 / n))


def test_at_temperature_zero_the_likeliest_path_writes(model, tiny):
    tokens = tiny.tokens(batch=1, length=24)[0]
    weight_BTE = follow(model, tokens.tolist(), 24)[0][1]
    decoder = Decoder(model.parts, ByteTokenizer(), length=64, mode="safe")
    decoder.feed(tokens)
    drawn = list(decoder.draw(8))
    assert drawn[0].weight_E.argmax() == weight_BTE[0, -1].argmax()
    assert all(one.weight_E.max() == 1 for one in drawn)
