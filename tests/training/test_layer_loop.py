"""Layers in a loop train what unrolled layers do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.training import layer_loop
from composable.training.layer_loop import needs_loop
from composable.training.objectives import backbone_objective, expert_objective

pytestmark = pytest.mark.slow

# Sums in another order, through three layers.
FLOAT32_ROUNDING = 2e-5
# Activations of 8 bits of precision, against float32.
BFLOAT16_ROUNDING = 0.1


def split_backbone(tiny, **changes):
    cfg = dataclasses.replace(tiny.cfg, **changes)
    shapes = nnx.eval_shape(lambda: Backbone(cfg, np.arange(256), 256, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(shapes, nnx.Param, ...)
    rng = np.random.default_rng(0)
    scale = {True: lambda shape: shape[0] ** -0.5, False: lambda shape: 1.0}
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * scale[x.ndim > 1](x.shape)).astype(np.float32),
        params,
    )
    return graph, params, jax.tree.map(lambda _: jnp.arange(256, dtype=jnp.int32), rest)


def largest_difference(one, other):
    """Return the largest difference, relative to the largest number of each array."""
    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (one, other))
    pairs = zip(*leaves, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def step_of(objective):
    """Return a new function for the loss and its gradients, which is traced when it is called."""
    return jax.jit(jax.value_and_grad(objective, has_aux=True))


@pytest.fixture
def in_loop(monkeypatch):
    """Return a function that traces and runs another with all layers in a loop."""

    def run(fn, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(layer_loop, "_MOST_BYTES", 0)
            return fn(*arguments)

    return run


@pytest.mark.parametrize(("is_tied", "norm_placement"), [(True, "before"), (False, "after")])
def test_a_backbone_has_the_same_loss_and_gradients(tiny, in_loop, is_tied, norm_placement):
    graph, *arguments = split_backbone(tiny, is_tied=is_tied, norm_placement=norm_placement)
    arguments.append(tiny.tokens(batch=2, length=17))
    (expected, _), expected_gradients = step_of(backbone_objective(graph))(*arguments)
    (found, _), gradients = in_loop(step_of(backbone_objective(graph)), *arguments)
    assert float(found) == pytest.approx(float(expected), rel=FLOAT32_ROUNDING)
    assert largest_difference(gradients, expected_gradients) < FLOAT32_ROUNDING


@pytest.mark.parametrize(("kind", "rank"), [("ffn", None), ("lora", 2)])
def test_an_expert_has_the_same_loss_and_gradients(tiny, in_loop, kind, rank):
    expert = Expert(tiny.backbone, kind=kind, scout_width=8, rank=rank, rngs=nnx.Rngs(0))
    graph, params = nnx.split(expert)
    params = jax.tree.map(
        lambda x: (
            np.asarray(x) + 0.01 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
        ),
        params,
    )
    arguments = params, tiny.backbone, tiny.tokens(batch=2, length=17)
    (expected, _), expected_gradients = step_of(expert_objective(graph))(*arguments)
    (found, _), gradients = in_loop(step_of(expert_objective(graph)), *arguments)
    assert float(found) == pytest.approx(float(expected), rel=FLOAT32_ROUNDING)
    assert largest_difference(gradients, expected_gradients) < FLOAT32_ROUNDING


@pytest.mark.parametrize("is_large", [False, True], ids=["unrolled", "loop"])
def test_masters_in_float32_have_activations_in_bfloat16(tiny, in_loop, is_large):
    graph, *arguments = split_backbone(tiny, dtype="BF16")
    arguments.append(tiny.tokens(batch=2, length=17))
    step = step_of(backbone_objective(graph))
    (found, _), gradients = in_loop(step, *arguments) if is_large else step(*arguments)
    float_graph, *_ = split_backbone(tiny)
    (expected, _), expected_gradients = step_of(backbone_objective(float_graph))(*arguments)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert found != expected, "activations are rounded"
    assert float(found) == pytest.approx(float(expected), rel=BFLOAT16_ROUNDING)
    assert largest_difference(gradients, expected_gradients) < BFLOAT16_ROUNDING


def test_only_large_steps_run_in_a_loop(tiny):
    assert not needs_loop(tiny.cfg, tiny.cfg.slots, 64, 128)
    wide = dataclasses.replace(tiny.cfg, d_model=4096, d_ff=11008, n_layers=32)
    assert needs_loop(wide, range(32), 16, 2048)
    assert needs_loop(wide, range(32), 1, 8), "the weights alone are large"


def test_the_gradient_of_a_loop_keeps_one_residual_stream_per_layer(tiny, in_loop):
    """Of every layer: its input and attention's result, and nothing as wide as the feed-forward."""
    graph, params, rest = split_backbone(tiny, d_ff=96)
    tokens_BU = tiny.tokens(batch=2, length=17)
    step = jax.grad(backbone_objective(graph), has_aux=True)

    def stacked_widths():
        jaxpr = jax.make_jaxpr(step)(params, rest, tokens_BU).jaxpr
        loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        shapes = [tuple(v.aval.shape) for eqn in loops for v in eqn.outvars]
        return {shape[1:] for shape in shapes if shape[:1] == (2,)}

    kept = {shape for shape in in_loop(stacked_widths) if shape[:2] == (2, 16)}
    assert kept == {(2, 16, 32), (2, 16, 4, 8)}
