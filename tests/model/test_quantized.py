"""A model with quantized matrices: decoding, isolation, low-rank bodies, and bytes."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from composable.assembly.backbones import make_blank
from composable.errors import ModelError
from composable.kernels import Quantized, load_native
from composable.model.chunks import CHUNKS
from composable.model.model import Model
from composable.model.steps import MixSteps, SafeSteps, _predict, _read
from composable.model.tensors import from_tensors
from composable.workflows.quantize_backbone import quantize_tensors
from tests.support.compiled import multiplied

# Sums in another order; logits are of order 5.
REORDERED_SUMS = 1e-4
CHUNK = CHUNKS[0]
LENGTH = CHUNK + 8


def quantized(tiny, dtype):
    cfg = dataclasses.replace(tiny.cfg, matrix_dtype=dtype)
    tensors = quantize_tensors(tiny.backbone, cfg)
    return from_tensors(make_blank(cfg, tiny.interface.n_classes), tensors)


@pytest.fixture(scope="module")
def backbone(tiny):
    return quantized(tiny, "I8")


@pytest.fixture(scope="module")
def experts(tiny):
    low = [tiny.expert(name, kind="lora", rank=4) for name in "ab"]
    return [*low, tiny.expert("c"), tiny.expert("d")]


def model_of(tiny, backbone, experts, **options):
    return Model(backbone, tiny.interface, experts, **{"capacity": 8, **options})


@pytest.mark.parametrize("dtype", ["I8", "BF16"])
def test_it_predicts_what_the_exact_backbone_does(tiny, dtype):
    tokens_BT = tiny.tokens(batch=2, length=40)
    exact, found = (
        jax.nn.log_softmax(model_of(tiny, backbone, [])(tokens_BT))
        for backbone in (tiny.backbone, quantized(tiny, dtype))
    )
    kl = float((np.exp(exact) * (exact - found)).sum(-1).mean())
    assert 0 < kl < 0.01


@pytest.mark.parametrize(("steps", "n_experts"), [(MixSteps, 0), (MixSteps, 4), (SafeSteps, 4)])
def test_steps_equal_a_full_pass(tiny, backbone, experts, steps, n_experts):
    """Alone, and with experts of both kinds."""
    model = model_of(tiny, backbone, experts[:n_experts], capacity=max(1, 2 * n_experts))
    tokens_BT = tiny.tokens(batch=1, length=LENGTH)
    reader = steps(model.parts, 128)
    pieces = np.split(tokens_BT[0], [CHUNK, *range(CHUNK + 1, LENGTH)])
    outputs = [np.asarray(reader.advance(jax.numpy.asarray(p)[None], False)[0]) for p in pieces]
    full = model if steps is MixSteps else model.safe
    expected_TV = np.asarray(full(tokens_BT))[0, CHUNK - 1 :]
    np.testing.assert_allclose(np.stack(outputs), expected_TV, atol=REORDERED_SUMS)


def test_an_expert_does_not_depend_on_what_else_is_installed(tiny, backbone, experts):
    tokens_BT = tiny.tokens(batch=2, length=24)
    first = model_of(tiny, backbone, experts)
    other = model_of(tiny, backbone, [experts[3], experts[0]], capacity=4)
    for name in ("backbone", experts[0].name, experts[3].name):
        np.testing.assert_array_equal(first.path(tokens_BT, name), other.path(tokens_BT, name))
    before = np.asarray(other(tokens_BT))
    other.install(experts[2])
    other.remove(experts[2].name)
    np.testing.assert_array_equal(other(tokens_BT), before)


def test_low_rank_bodies_are_kept_and_full_ones_are_quantized(tiny, backbone, experts):
    bank = model_of(tiny, backbone, experts).parts.bank
    assert bank.rank == tiny.interface.lora_max_rank
    assert isinstance(bank.slots[0]["w_up"], Quantized)
    assert bank.slots[0]["w_up"].values.dtype == np.int8
    with pytest.raises(ModelError, match="rank 4 cannot be merged into matrices of I8") as caught:
        model_of(tiny, backbone, experts, factor_rank=2)
    assert "factor_rank" in caught.value.hint


def compile_halves(model):
    """Return the two programs that read a token in mix mode."""
    steps = MixSteps(model.parts, 128)
    tokens_BT, state = np.zeros((1, 1), np.int32), steps._state
    lower = state._replace(caches=state.caches._replace(upper=()))
    upper = state._replace(caches=state.caches._replace(trunk=()))
    read = _read.lower(steps._flat, tokens_BT, lower, True)
    reading, _ = read.out_info
    predict = _predict.lower(steps._flat, reading, upper, True, steps._gather([0]))
    return read.compile(), predict.compile()


def test_no_float_matrix_is_in_the_programs_of_a_token(tiny, backbone, experts):
    d, f, v = tiny.cfg.d_model, tiny.cfg.d_ff, tiny.cfg.vocab_size
    shapes = "|".join(f"{m},{n}|{n},{m}" for m, n in ((d, d), (d, f), (v, d)))
    for chosen in ([], experts):
        for program in compile_halves(model_of(tiny, backbone, chosen)):
            text = program.as_text()
            assert "s8[" in text
            assert not re.search(rf"f32\[(\d+,)?({shapes})\]", text)


@pytest.mark.skipif(not load_native().is_loaded, reason="counts calls of the native kernel")
def test_a_token_reads_a_fraction_of_the_bytes(tiny, backbone):
    def count(backbone):
        """Bytes of the matrices of the feed-forward blocks that the programs multiply."""
        programs = compile_halves(model_of(tiny, backbone, [], capacity=1))
        sizes = {(d, f), (f, d)}
        found = [m for program in programs for m in multiplied(program) if m[1] in sizes]
        return sum({"f32": 4, "s8": 1}[kind] * math.prod(dims) for kind, dims in found)

    d, f = tiny.cfg.d_model, tiny.cfg.d_ff
    exact, found = count(tiny.backbone), count(backbone)
    assert exact >= 3 * tiny.cfg.n_layers * d * f * 4
    assert found * 4 == exact
