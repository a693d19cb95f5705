"""What a compiled program costs, against programs whose costs are known."""

import jax
import jax.numpy as jnp
import pytest

from composable.errors import TrainingError
from composable.parallel.chips import find_chip, tpu_devices
from composable.parallel.program import count_operations, measure_program

# As the TPU's compiler prints them: a loop that counts to 8 by twos, a product written as a
# convolution over a padded window of 4, and the two halves of an asynchronous operation.
PROGRAM = """\
HloModule step

%part (p: bf16[128,64]) -> bf16[2048,64] {
  %p = bf16[128,64]{1,0} parameter(0)
  ROOT %gather.1 = bf16[2048,64]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%body (state: (u32[], f32[16,8])) -> (u32[], f32[16,8]) {
  %state = (u32[], f32[16,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%state), index=0
  %x = f32[16,8]{1,0} get-tuple-element(%state), index=1
  %one = u32[] constant(1)
  %i.1 = u32[] add(%i, %one)
  %i.2 = u32[] add(%i.1, %one)
  %w = f32[8,8]{1,0} constant({...})
  %dot.1 = f32[16,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %send = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%dot.1), channel_id=9
  ROOT %next = (u32[], f32[16,8]{1,0}) tuple(%i.2, %dot.1)
}

%condition (state.1: (u32[], f32[16,8])) -> pred[] {
  %state.1 = (u32[], f32[16,8]{1,0}) parameter(0)
  %end = u32[] constant(8)
  %i.3 = u32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.3, %end), direction=LT
}

ENTRY %main (a: (u32[], f32[16,8]), b: bf16[128,64]) -> bf16[5] {
  %a = (u32[], f32[16,8]{1,0}) parameter(0)
  %b = bf16[128,64]{1,0} parameter(1)
  %loop = (u32[], f32[16,8]{1,0}) while(%a), condition=%condition, body=%body
  %start = bf16[2048,64]{1,0} fusion(%b), kind=kCustom, calls=%part
  %done = bf16[2048,64]{1,0} fusion(%start), kind=kCustom, calls=%part
  %l = bf16[32,16,1]{2,1,0} constant({...})
  %norm = f32[] all-reduce(%scalar), channel_id=11, to_apply=%add
  %r = bf16[4,16,64]{2,1,0} constant({...})
  ROOT %c = bf16[32,4,64]{2,1,0} convolution(%l, %r), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0io->b0f
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run():
    flops, collectives = count_operations(PROGRAM)
    trips, in_loop = 4, 2 * 16 * 8 * 8
    # Of 4 by 4 positions in the window, each of the 4 results meets the one input once.
    convolution = 2 * 32 * 64 * 16 * 4
    assert flops == trips * in_loop + convolution
    assert collectives["collective-permute"].count == trips
    assert collectives["collective-permute"].bytes == trips * 16 * 8 * 4


def test_the_parts_of_an_asynchronous_operation_are_one():
    _, collectives = count_operations(PROGRAM)
    assert collectives["all-gather"].count == 2
    assert collectives["all-gather"].bytes == 2 * 2048 * 64 * 2


def test_operations_of_a_function_on_each_device_share_a_channel_and_are_counted_apart():
    line = "  %sum.{} = f32[8]{{0}} all-reduce(%x), channel_id=1, to_apply=%add\n"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line.format(1)}{line.format(2)}}}\n"
    assert count_operations(text)[1]["all-reduce"].count == 2


def test_uneven_parts_are_at_most_what_a_device_sends():
    text = """\
ENTRY %main (x: f32[16,8]) -> f32[64,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %o = f32[64,8]{1,0} parameter(1)
  ROOT %r = f32[64,8]{1,0} ragged-all-to-all(%x, %o, %a, %b, %c, %d), channel_id=1
}
"""
    assert count_operations(text)[1]["ragged-all-to-all"].bytes == 16 * 8 * 4


def test_a_scalar_is_four_bytes():
    _, collectives = count_operations(PROGRAM)
    assert (collectives["all-reduce"].count, collectives["all-reduce"].bytes) == (1, 4)


def test_a_scan_here_counts_all_its_steps():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((5, 16, 16), "float32")
    cost = measure_program(jax.jit(run).lower(*shapes).compile())
    assert cost.flops == 5 * 2 * 8 * 16 * 16
    assert cost.collectives == {}
    assert cost.arguments == 4 * (8 * 16 + 5 * 16 * 16)
    assert cost.peak >= cost.arguments


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("switch", ["cond", "switch"])
def test_of_branches_the_most_expensive_is_counted_or_the_least(is_first, switch):
    def once(x):
        return x @ x

    def twice(x):
        return (x @ x) @ x

    def run(which, x):
        branches = (twice, once) if is_first else (once, twice)
        if switch == "cond":
            return jax.lax.cond(which > 0, *branches, x)
        return jax.lax.switch(which, (*branches, jnp.tanh), x)

    shapes = jax.ShapeDtypeStruct((), "int32"), jax.ShapeDtypeStruct((16, 16), "float32")
    compiled = jax.jit(run).lower(*shapes).compile()
    assert measure_program(compiled).flops == 2 * 2 * 16**3
    least = {"cond": 2 * 16**3, "switch": 0}[switch]
    assert count_operations(compiled.as_text(), choose=min)[0] == least


@pytest.mark.parametrize(("topology", "hint"), [("v5x:2x2", "'v5"), ("h100:8", "v5e:4x4")])
def test_an_unknown_chip_is_refused(topology, hint):
    with pytest.raises(TrainingError, match="is not one of v4, v5e, v5p, v6e") as caught:
        find_chip(topology)
    assert hint in caught.value.hint


def test_without_the_compiler_the_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="not installed") as caught:
        tpu_devices("v5e:4x4")
    assert "libtpu" in caught.value.hint
