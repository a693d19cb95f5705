"""A small run of the steps with eight experts, and the counts that need no compiler of a chip."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import eight_experts
from composable.model.config import tiny_bytes
from tests.support.compiled import count_traffic


def make_case(length, **sizes):
    return eight_experts.Case(
        cfg=dataclasses.replace(tiny_bytes(), **sizes), batch=8, length=length
    )


@pytest.mark.slow
def test_tokens_go_to_about_one_of_eight_experts_and_all_steps_run():
    case = make_case(
        16, n_layers=2, tap=1, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=16, scout_width=8
    )
    reading, training = eight_experts.measure(case, rounds=2)
    assert (reading["step"], training["step"]) == ("reading", "training")
    assert min(reading["ratio"], training["ratio"]) > 0
    # The first tokens of a document are the backbone's, and several experts' until one is settled.
    assert 1 <= reading["rows"] < 1.5


@pytest.mark.parametrize("chip", [eight_experts.H100, "v5e:2x4"])
@pytest.mark.parametrize("n_mixed", [1, 2])
def test_bodies_multiply_little_more_than_the_rows_of_their_tokens(chip, n_mixed):
    case = make_case(128)
    cfg = case.cfg
    found = eight_experts.count_expert_flops(case, n_mixed, chip)["bodies"]
    needed = 6 * case.n_tokens * n_mixed * cfg.d_model * cfg.d_ff * len(cfg.slots)
    # Widths of 192 and 480 are padded to tiles and steps on a GPU.
    assert 1 <= found / needed < 1.1


def test_traffic_is_what_operations_read_and_write():
    x_MD, y_DF = jnp.ones((8, 16)), jnp.ones((16, 4))
    text = jax.jit(jnp.dot).lower(x_MD, y_DF).compile().as_text()
    assert count_traffic(text) == 4 * (8 * 16 + 16 * 4 + 8 * 4)
