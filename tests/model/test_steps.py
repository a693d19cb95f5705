"""Decoding steps equal full passes, copy no matrix, and run no path that sleeps."""

import functools
import re

import chex
import jax
import numpy as np
import pytest

from composable.interface import OutputMixture, SwitchingFilter
from composable.model import bank as banks
from composable.model.bank import view_entry
from composable.model.chunks import CHUNKS, cut_prompt, pad
from composable.model.mix import mix_state, trace_mix
from composable.model.model import Model
from composable.model.steps import MixSteps, SafeSteps, _predict, _read
from tests.support.compiled import multiplied

# Cached attention sums over the whole cache, masked, where a full pass sums over the blocks in use;
# logits are of order 5.
REORDERED_SUMS = 1e-4
STICKY = SwitchingFilter(power=0.35, backbone_prior=0.8, switch_rate=0.003)
CHUNK = CHUNKS[0]
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


STEPS = {"mix": MixSteps, "safe": SafeSteps}
SCOUTS = {"output_mixture": OutputMixture(prior=0.3, rate=0.05)}
N_READ = 21  # tokens of a chunk before its padding


def read_padded(parts, mode, tokens_T, padding):
    """Return the output after a chunk that ends in padding, and after single tokens."""
    steps, outputs = STEPS[mode](parts, 128), []
    chunk_T = np.concatenate([tokens_T[:N_READ], padding])
    outputs.append(steps.advance(jax.numpy.asarray(chunk_T)[None], False, N_READ))
    rest = tokens_T[N_READ:LENGTH]
    outputs += [steps.advance(jax.numpy.full((1, 1), token), False) for token in rest]
    writing = STEPS[mode](parts, 128)
    writing.advance(jax.numpy.asarray(chunk_T)[None], False, N_READ)
    start = writing.start_writing()
    outputs.append(writing.advance(jax.numpy.full((1, 1), rest[0]), False))
    return jax.tree.map(np.asarray, [outputs, start, steps.tally])


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("more", [{}, SCOUTS], ids=["alone", "output mixture"])
def test_padding_changes_nothing(tiny, experts, mode, more):
    """Not a bit depends on what it is, and outputs are those of the text without it."""
    model = tiny.model(*experts, capacity=8, top_k=1, mix=STICKY, **more)
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    n_padded = CHUNK - N_READ
    found = read_padded(model.parts, mode, tokens_BT[0], np.full(n_padded, tokens_BT[0, 0]))
    other = read_padded(model.parts, mode, tokens_BT[0], tiny.tokens(seed=9)[0, :n_padded])
    chex.assert_trees_all_equal(found, other)
    full = model if mode == "mix" else model.safe
    expected_TV = np.asarray(full(tokens_BT))[0, N_READ - 1 :]
    *found_TV, again_V = np.stack([output_V for output_V, _ in found[0]])
    np.testing.assert_allclose(again_V, found_TV[1], atol=REORDERED_SUMS)
    np.testing.assert_allclose(found_TV, expected_TV, atol=REORDERED_SUMS)
    tally = STEPS[mode](model.parts, 128)
    for token in tokens_BT[0]:
        tally.advance(jax.numpy.full((1, 1), token), False)
    np.testing.assert_array_equal(found[2].made_E, tally.tally.made_E)


def test_a_prompt_needs_the_programs_of_one_chunk():
    for n_tokens in range(1, 600):
        pieces = cut_prompt(n_tokens, room=1024)
        assert sum(piece.n_tokens for piece in pieces) == n_tokens
        assert len({piece.size for piece in pieces} - {1}) <= 1
        assert sum(piece.size for piece in pieces) < n_tokens + CHUNKS[-1]
        # Single tokens alone, of which each takes as long as a dozen in a chunk, are few.
        assert any(piece.size > 1 for piece in pieces) == (2 * n_tokens >= CHUNKS[0])


def test_padding_stays_in_the_caches():
    for room in range(100, 1100, 7):
        position = 0
        for piece in cut_prompt(100, room):
            assert position + piece.size <= room
            position += piece.n_tokens


def test_texts_of_other_lengths_compile_nothing(tiny, experts):
    model, tokens_T = tiny.model(*experts), tiny.tokens(batch=1, length=100)[0]

    def read(n_tokens):
        steps, start = MixSteps(model.parts, 128), 0
        for n, size in cut_prompt(n_tokens, room=128):
            piece_BT = jax.device_put(pad(tokens_T[start : start + n], size))
            steps.advance(piece_BT, False, n if size > 1 else None)
            start += n

    read(33)  # a chunk and a single token
    counts = [program._cache_size() for program in (_read, _predict)]
    for n_tokens in (7, 20, 32, 40, 63, 95):
        read(n_tokens)
    assert [program._cache_size() for program in (_read, _predict)] == counts


@pytest.mark.parametrize(("n_experts", "waits"), [(3, False), (4, True)])
def test_no_step_waits_for_the_router_where_bodies_are_few(
    tiny, experts, monkeypatch, n_experts, waits
):
    asked, gather = [], MixSteps._gather_chosen
    monkeypatch.setattr(
        MixSteps, "_gather_chosen", lambda *args: asked.append(args) or gather(*args)
    )
    steps = MixSteps(tiny.model(*experts[:n_experts], capacity=8).parts, 128)
    steps.advance(tiny.tokens(batch=1, length=1), False)
    assert bool(asked) == waits


@pytest.mark.parametrize(("more", "n_mixed"), [({}, 1), (SCOUTS, CHUNK)])
def test_safe_mode_mixes_what_follows_a_chunk_alone(tiny, experts, more, n_mixed):
    """Only the scouts' share needs the mixture after every token of it."""
    model = tiny.model(*experts, capacity=8, **more)
    steps = SafeSteps(model.parts, 128)
    steps.advance(jax.numpy.asarray(tiny.tokens(batch=1, length=CHUNK)), False)
    shapes = {reading.log_prob_BTV.shape for reading in steps._piece.now.readings}
    assert shapes == {(1, n_mixed, tiny.cfg.vocab_size)}


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


def compile_both(model, n_tokens=1):
    """Return the two programs that read a token, or a chunk, in mix mode."""
    steps = MixSteps(model.parts, 128)
    tokens_BT, state = np.zeros((1, n_tokens), np.int32), steps._state
    length = np.int32(n_tokens) if n_tokens > 1 else None
    lower = state._replace(caches=state.caches._replace(upper=()))
    upper = state._replace(caches=state.caches._replace(trunk=()))
    read = _read.lower(steps._flat, tokens_BT, lower, True, length)
    reading, _ = read.out_info
    bodies = steps._gather([1, 2])
    predict = _predict.lower(steps._flat, reading, upper, True, bodies)
    return read.compile(), predict.compile()


@pytest.fixture(scope="module")
def compile_halves(tiny):
    """Return a function that compiles, once, the two programs of a model with these bodies."""

    @functools.cache
    def compile_once(kinds, n_tokens, capacity):
        return compile_both(model_of(tiny, kinds, capacity), n_tokens)

    return lambda kinds, n_tokens=1, capacity=8: compile_once(kinds, n_tokens, capacity)


# Nine and forty tokens: then no number of rows is another dimension.
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("n_tokens", [1, 9])
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


def test_a_chunk_predicts_the_next_token_alone(tiny, experts):
    """Except for the scouts' share, which depends on the prediction of every token."""
    for more, is_there in ({}, False), (SCOUTS, True):
        _, predict = compile_both(tiny.model(*experts, **more), CHUNK)
        assert (f"f32[1,{CHUNK},{tiny.cfg.vocab_size}]" in predict.as_text()) == is_there


@pytest.mark.parametrize("kinds", KINDS)
def test_products_of_a_chunk_have_as_many_rows_as_tokens(tiny, compile_halves, kinds):
    """A loop over blocks in use, which is one block where a text has one expert."""
    _, predict = compile_halves(kinds, n_tokens=40)
    rows = re.findall(rf"= f32\[(\d+),{tiny.cfg.d_ff}\]\S* dot\(", predict.as_text())
    assert set(rows) == {"40"}


@pytest.mark.parametrize("kinds", KINDS)
def test_the_bytes_of_a_decoded_token_do_not_grow_with_the_bank(tiny, compile_halves, kinds):
    (_, few), (_, many) = (compile_halves(kinds, capacity=capacity) for capacity in (8, 32))
    d, f = tiny.cfg.d_model, tiny.cfg.d_ff
    body = 3 * 4 * d * f
    # Of a native product XLA counts no bytes: it reads its operands, which are the same.
    counts = [program.cost_analysis()["bytes accessed"] for program in (few, many)]
    assert counts[0] > 0 and counts[1] - counts[0] < body
    shapes = [(d, f), (f, d)] if kinds == "ffn" else [(d, f), (f, d), (d, BANK_RANK)]
    reads = [[products_with(program, shape) for shape in shapes] for program in (few, many)]
    assert reads[0] == reads[1] and all(reads[0])


def products_with(compiled, shape):
    """Return how many products of a program have a matrix of this shape."""
    return sum(dims == shape for _, dims in multiplied(compiled))


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
