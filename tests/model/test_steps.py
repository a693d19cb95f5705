"""Decoding steps equal full passes, copy no matrix, and run no path that sleeps."""

import re

import jax
import numpy as np
import pytest

from composable.model import bank as banks
from composable.model.bank import view_entry
from composable.model.mix import mix_state, trace_mix
from composable.model.steps import CHUNK, MixSteps, SafeSteps, _predict, _read

# Cached attention sums over the whole cache, masked, where a full pass sums over the blocks in use;
# logits are of order 5.
REORDERED_SUMS = 1e-4
LENGTH = CHUNK + 24
# Instructions whose result is another one's memory.
ALIASES = {"parameter", "get-tuple-element", "bitcast", "tuple"}


@pytest.fixture(scope="module")
def experts(tiny):
    return [tiny.expert(name) for name in "abcd"]


def read_one_by_one(steps, tokens_T, first=1):
    """Return the output after each token: of a first piece, and of single tokens after it."""
    outputs, starts = [], [0, *range(first, len(tokens_T))]
    for piece_T in np.split(tokens_T, starts[1:]):
        output_V, _ = steps.advance(jax.numpy.asarray(piece_T)[None], False)
        outputs.append(np.asarray(output_V))
    return np.stack(outputs)


@pytest.mark.parametrize("first", [1, CHUNK])
def test_mix_mode_in_steps_equals_a_full_pass(tiny, experts, first):
    model = tiny.model(*experts, capacity=8)
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    found_TV = read_one_by_one(MixSteps(model.parts, 128), tokens_BT[0], first)
    expected_TV = np.asarray(model(tokens_BT))[0, first - 1 :]
    np.testing.assert_allclose(found_TV, expected_TV, atol=REORDERED_SUMS)
    assert (np.asarray(model.route(tokens_BT)) > 0).sum(-1).max() == 2  # bodies of a token


@pytest.mark.parametrize("first", [1, CHUNK])
def test_safe_mode_in_steps_equals_a_full_pass(tiny, experts, first):
    """With one expert awake at a time, so that paths fall asleep, wake and catch up."""
    model = tiny.model(*experts, capacity=8, top_k=1)
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    found_TV = read_one_by_one(SafeSteps(model.parts, 128), tokens_BT[0], first)
    expected_TV = np.asarray(model.safe(tokens_BT))[0, first - 1 :]
    np.testing.assert_allclose(found_TV, expected_TV, atol=REORDERED_SUMS)


def test_a_path_that_sleeps_is_not_run(tiny, experts):
    """Each path holds the positions up to the last one at which it was awake."""
    model = tiny.model(*experts, capacity=8, top_k=1)
    tokens_T = tiny.tokens(batch=1, length=LENGTH)[0]
    steps, last_awake = SafeSteps(model.parts, 128), {}
    for position, token in enumerate(tokens_T):
        _, weight_E = steps.advance(jax.numpy.full((1, 1), token), False)
        last_awake |= {int(e): position for e in np.flatnonzero(np.asarray(weight_E))}
    held = {steps._entry_of[n]: path.n_filled - 1 for n, path in steps._paths.items()}
    assert held == last_awake
    assert len(held) > 2
    assert min(held.values()) < LENGTH - CHUNK / 4


def matrices_made(compiled, shape):
    """Return the instructions of a program that make an array of a matrix's shape, or a stack."""
    rows, columns = shape
    sizes = rf"(?:\d+,)?(?:{rows},{columns}|{columns},{rows})"
    found = re.findall(rf"= f32\[{sizes}\]\S* ([\w-]+)\(", compiled.as_text())
    return [name for name in found if name not in ALIASES]


def compile_halves(model, n_tokens=1):
    """Return the two programs that read a token in mix mode."""
    steps = MixSteps(model.parts, 128)
    tokens_BT, state = np.zeros((1, n_tokens), np.int32), steps._state
    lower = state._replace(caches=state.caches._replace(upper=()))
    upper = state._replace(caches=state.caches._replace(trunk=()))
    read = _read.lower(steps._flat, tokens_BT, lower, True)
    reading, _ = read.out_info
    bodies = steps._gather([1, 2])
    predict = _predict.lower(steps._flat, reading, upper, True, bodies)
    return read.compile(), predict.compile()


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_no_matrix_is_copied(tiny, experts, n_tokens):
    """Inside one program the bodies would be sliced out of the bank first."""
    model = tiny.model(*experts)
    shape = (tiny.cfg.d_model, tiny.cfg.d_ff)
    for program in compile_halves(model, n_tokens):
        assert matrices_made(program, shape) == []
    state = mix_state(model.parts, 1, 128)
    whole = jax.jit(trace_mix).lower(model.parts, np.zeros((1, 1), np.int32), state).compile()
    assert len(matrices_made(whole, shape)) >= 3 * len(model.interface.slots)


def test_the_bytes_of_a_decoded_token_do_not_grow_with_the_bank(tiny, experts):
    def bytes_of(capacity):
        _, predict = compile_halves(tiny.model(*experts[:2], capacity=capacity))
        return predict.cost_analysis()["bytes accessed"]

    few, many = bytes_of(4), bytes_of(32)
    matrix = 4 * tiny.cfg.d_model * tiny.cfg.d_ff
    assert many - few < matrix


def test_a_view_of_an_entry_keeps_its_values_and_costs_no_memory(tiny, experts):
    bank = banks.empty_bank(tiny.backbone, tiny.interface, 4)
    entries = [
        banks.make_entry(tiny.backbone, tiny.interface, expert.body, expert.scout, expert.key)
        for expert in experts[:2]
    ]
    bank = banks.install(bank, 1, entries[0])
    stack = bank.slots[0]["w_up"]
    start, n_bytes = stack.unsafe_buffer_pointer(), stack.nbytes
    view_DF = view_entry(bank, 1)[0]["w_up"]
    assert start < view_DF.unsafe_buffer_pointer() < start + n_bytes
    before_DF = np.array(view_DF)
    del stack
    bank = banks.install(bank, 1, entries[1])
    np.testing.assert_array_equal(view_DF, before_DF)
    assert not np.array_equal(view_entry(bank, 1)[0]["w_up"], before_DF)
