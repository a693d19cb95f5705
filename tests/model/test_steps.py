"""Decoding steps equal full passes, copy no matrix, and run no path that sleeps."""

import functools
import re

import jax
import numpy as np
import pytest

from composable.model import bank as banks
from composable.model.bank import view_entry
from composable.model.mix import mix_state, trace_mix
from composable.model.model import Model
from composable.model.steps import CHUNK, MixSteps, SafeSteps, _predict, _read

# Cached attention sums over the whole cache, masked, where a full pass sums over the blocks in use;
# logits are of order 5.
REORDERED_SUMS = 1e-4
LENGTH = CHUNK + 24
# Instructions whose result is another one's memory.
ALIASES = {"parameter", "get-tuple-element", "bitcast", "tuple"}


# Room is made for a rank of 48, which is no other dimension of the tiny backbone.
RANK, BANK_RANK = 40, 48
# The bodies of the experts in a bank.
KINDS = {"ffn": ["ffn"] * 4, "lora": ["lora"] * 4, "both": ["ffn", "lora", "lora", "ffn"]}


@pytest.fixture(scope="module")
def experts(tiny):
    return [tiny.expert(name) for name in "abcd"]


def model_of(tiny, kinds, capacity=8, **changes):
    """Return a model whose low-rank bodies are kept as factors."""
    experts = [
        tiny.expert(name, kind=kind, rank=RANK if kind == "lora" else None)
        for name, kind in zip("abcd", KINDS[kinds], strict=True)
    ]
    model = Model(
        tiny.backbone,
        tiny.interface_with(**changes),
        experts,
        capacity=capacity,
        factor_rank=0 if kinds == "ffn" else BANK_RANK,
    )
    assert bool(model.parts.bank.changes) == (kinds != "ffn")
    assert model.parts.bank.has_full == (kinds != "lora")
    return model


def read_one_by_one(steps, tokens_T, first=1):
    """Return the output after each token: of a first piece, and of single tokens after it."""
    outputs, starts = [], [0, *range(first, len(tokens_T))]
    for piece_T in np.split(tokens_T, starts[1:]):
        output_V, _ = steps.advance(jax.numpy.asarray(piece_T)[None], False)
        outputs.append(np.asarray(output_V))
    return np.stack(outputs)


@pytest.mark.parametrize(
    ("kinds", "first"), [("ffn", 1), ("ffn", CHUNK), ("lora", CHUNK), ("both", CHUNK)]
)
def test_mix_mode_in_steps_equals_a_full_pass(tiny, kinds, first):
    model = model_of(tiny, kinds)
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    found_TV = read_one_by_one(MixSteps(model.parts, 128), tokens_BT[0], first)
    expected_TV = np.asarray(model(tokens_BT))[0, first - 1 :]
    np.testing.assert_allclose(found_TV, expected_TV, atol=REORDERED_SUMS)
    assert (np.asarray(model.route(tokens_BT)) > 0).sum(-1).max() == 2  # bodies of a token


@pytest.mark.parametrize(("kinds", "first"), [("ffn", 1), ("ffn", CHUNK), ("both", 1)])
def test_safe_mode_in_steps_equals_a_full_pass(tiny, kinds, first):
    """With one expert awake at a time, so that paths fall asleep, wake and catch up."""
    model = model_of(tiny, kinds, top_k=1)
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


@pytest.fixture(scope="module")
def compile_halves(tiny):
    """Return a function that compiles, once, the two programs that read a token in mix mode."""

    @functools.cache
    def compile_both(kinds, n_tokens, capacity):
        steps = MixSteps(model_of(tiny, kinds, capacity).parts, 128)
        tokens_BT, state = np.zeros((1, n_tokens), np.int32), steps._state
        lower = state._replace(caches=state.caches._replace(upper=()))
        upper = state._replace(caches=state.caches._replace(trunk=()))
        read = _read.lower(steps._flat, tokens_BT, lower, True)
        reading, _ = read.out_info
        bodies = steps._gather([1, 2])
        predict = _predict.lower(steps._flat, reading, upper, True, bodies)
        return read.compile(), predict.compile()

    return lambda kinds, n_tokens=1, capacity=8: compile_both(kinds, n_tokens, capacity)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("n_tokens", [1, 8])
def test_no_matrix_is_copied(tiny, compile_halves, kinds, n_tokens):
    """Inside one program the bodies would be sliced out of the bank first."""
    d, f, rank = tiny.cfg.d_model, tiny.cfg.d_ff, BANK_RANK
    for program in compile_halves(kinds, n_tokens):
        for shape in ((d, f), (d, rank), (f, rank)):
            assert matrices_made(program, shape) == []


def test_a_program_with_bodies_of_its_own_copies_matrices(tiny, experts):
    """What the test above counts is there to count."""
    model, shape = tiny.model(*experts), (tiny.cfg.d_model, tiny.cfg.d_ff)
    state = mix_state(model.parts, 1, 128)
    whole = jax.jit(trace_mix).lower(model.parts, np.zeros((1, 1), np.int32), state).compile()
    assert len(matrices_made(whole, shape)) >= 3 * len(model.interface.slots)


@pytest.mark.parametrize("kinds", KINDS)
def test_the_bytes_of_a_decoded_token_do_not_grow_with_the_bank(tiny, compile_halves, kinds):
    def bytes_of(capacity):
        _, predict = compile_halves(kinds, capacity=capacity)
        return predict.cost_analysis()["bytes accessed"]

    few, many = bytes_of(8), bytes_of(32)
    body = 3 * 4 * tiny.cfg.d_model * tiny.cfg.d_ff
    assert many - few < body


def products_with(compiled, shape):
    """Return how many products of a program have a matrix of this shape."""
    text = compiled.as_text()
    names = set(re.findall(rf"(%[\w.-]+) = f32\[{shape[0]},{shape[1]}\]", text))
    operands = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    return sum(bool(names & set(pair)) for pair in operands)


def test_low_rank_bodies_share_the_products_with_the_backbones_matrices(tiny, compile_halves):
    """Full bodies have products of their own, as many as a token may mix."""
    d, f, slots = tiny.cfg.d_model, tiny.cfg.d_ff, len(tiny.interface.slots)
    counts = {}
    for kinds in ("ffn", "lora"):
        _, predict = compile_halves(kinds)
        counts[kinds] = products_with(predict, (d, f)) + products_with(predict, (f, d))
    # The backbone's block is there again for tokens without a contribution that counts.
    assert counts == {"ffn": 3 * slots * (4 + 1), "lora": 3 * slots * (1 + 1)}


def test_factors_give_what_merged_matrices_give(tiny):
    model, kinds = model_of(tiny, "both"), KINDS["both"]
    merged = Model(tiny.backbone, tiny.interface, capacity=8)
    for name, kind in zip("abcd", kinds, strict=True):
        merged.install(tiny.expert(name, kind=kind, rank=RANK if kind == "lora" else None))
    assert not merged.parts.bank.changes
    tokens_BT = tiny.tokens(length=64)
    np.testing.assert_allclose(model(tokens_BT), merged(tokens_BT), atol=REORDERED_SUMS)
    found, expected = (model.path(tokens_BT, "b"), merged.path(tokens_BT, "b"))
    np.testing.assert_allclose(found, expected, atol=REORDERED_SUMS)
    for found, expected in zip(model.average_slots(), merged.average_slots(), strict=True):
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_a_view_of_an_entry_keeps_its_values_and_costs_no_memory(tiny, experts):
    bank = banks.empty_bank(tiny.backbone, tiny.interface, 4)
    entries = [
        banks.make_entry(tiny.backbone, tiny.interface, expert.body, expert.scout, expert.key)
        for expert in experts[:2]
    ]
    bank = banks.install(bank, 1, entries[0])
    stack = bank.slots[0]["w_up"]
    start, n_bytes = stack.unsafe_buffer_pointer(), stack.nbytes
    view_DF = view_entry(bank.slots, 1)[0]["w_up"]
    assert start < view_DF.unsafe_buffer_pointer() < start + n_bytes
    before_DF = np.array(view_DF)
    del stack
    bank = banks.install(bank, 1, entries[1])
    np.testing.assert_array_equal(view_DF, before_DF)
    assert not np.array_equal(view_entry(bank.slots, 1)[0]["w_up"], before_DF)
