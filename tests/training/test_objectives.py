import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.model.body import Expert
from composable.training.objectives import (
    backbone_objective,
    expert_objective,
    next_token_loss,
    scout_loss,
)

FLOAT32_ROUNDING = 1e-5


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    rng = np.random.default_rng(0)
    logits_BTV, targets_BT = rng.normal(size=(2, 5, 7)), rng.integers(0, 7, (2, 5))
    expected = -np.take_along_axis(log_softmax(logits_BTV), targets_BT[..., None], -1).mean()
    found = next_token_loss(jnp.asarray(logits_BTV, jnp.float32), jnp.asarray(targets_BT))
    assert float(found) == pytest.approx(expected, rel=FLOAT32_ROUNDING)


def test_a_scout_learns_without_shaping_what_it_reads(tiny):
    feature_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 32)), jnp.float32)
    classes_BT = jnp.ones((2, 5), int)
    scout = tiny.expert("a").scout
    step = jax.jit(jax.value_and_grad(scout_loss, argnums=(0, 1)))
    found, (to_scout, to_feature) = step(scout, feature_BTD, classes_BT)
    assert (np.asarray(to_feature) == 0).all()
    assert all((np.asarray(x) != 0).any() for x in jax.tree.leaves(to_scout))
    expected = -log_softmax(np.asarray(scout(feature_BTD), np.float64))[..., 1].mean()
    assert float(found) == pytest.approx(expected, rel=FLOAT32_ROUNDING)


@pytest.fixture(scope="module")
def tokens_BT(tiny):
    return jnp.asarray(tiny.tokens(length=13))


def test_the_backbone_learns_from_text_and_its_scout_beside_it(tiny, tokens_BT):
    graph, params, rest = nnx.split(tiny.backbone, nnx.Param, ...)
    objective = backbone_objective(graph)

    def scout_bits(params):
        loss, figures = objective(params, rest, tokens_BT)
        return figures["scout_bits"], (loss, figures)

    step = jax.jit(jax.value_and_grad(scout_bits, has_aux=True))
    (_, (loss, figures)), from_scout = step(params)
    logits_BTV = tiny.backbone(tokens_BT[:, :-1])
    plain = float(next_token_loss(logits_BTV, tokens_BT[:, 1:]))
    assert float(figures["bits_per_token"]) == pytest.approx(plain / np.log(2), rel=1e-4)
    total_bits = float(figures["bits_per_token"] + figures["scout_bits"])
    assert float(loss) / np.log(2) == pytest.approx(total_bits, rel=FLOAT32_ROUNDING)
    for path, leaf in nnx.to_flat_state(from_scout):
        assert (np.asarray(leaf[...]) != 0).any() == (path[0] == "scout"), path


def test_an_expert_has_a_gradient_in_every_parameter(tiny, tokens_BT):
    kind, rank = "lora", 2
    expert = tiny.expert("a", kind=kind, rank=rank)
    module = nnx.eval_shape(
        lambda: Expert(tiny.backbone, kind=kind, rank=rank, scout_width=16, rngs=nnx.Rngs(0))
    )
    module.body, module.scout = expert.body, expert.scout
    graph, params = nnx.split(module)
    objective = expert_objective(graph)
    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, figures), gradient = step(params, tiny.backbone, tokens_BT)
    model = tiny.model(expert)
    plain = next_token_loss(model.path(tokens_BT[:, :-1], "a"), tokens_BT[:, 1:])
    assert float(figures["bits_per_token"]) == pytest.approx(float(plain) / np.log(2), rel=1e-4)
    assert float(loss) > float(plain)
    for path, leaf in nnx.to_flat_state(gradient):
        assert (np.asarray(leaf[...]) != 0).any(), path
