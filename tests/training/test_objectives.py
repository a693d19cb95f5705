import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from composable.model.body import MATRICES, Expert, backbone_slot
from composable.model.layers import swiglu
from composable.training import unembedding
from composable.training.config import TrainConfig
from composable.training.data import TappedRows
from composable.training.loop import fit
from composable.training.objectives import (
    backbone_objective,
    expert_objective,
    next_token_loss,
    scout_loss,
    tapped_objective,
)
from composable.training.optimizers import muon

FLOAT32_ROUNDING = 1e-5
# Two programs that sum in another order, over five steps of an optimiser.
SAME_CURVE = 1e-4


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


@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("n_logits", [1, 2 * 2 * 40, 1 << 23], ids=["position", "two", "whole"])
def test_the_loss_in_parts_is_that_of_all_logits(monkeypatch, n_logits, is_trained):
    monkeypatch.setattr(unembedding, "_LOGITS", n_logits)
    monkeypatch.setattr(unembedding, "_FEWEST_ROWS", 3)
    rng = np.random.default_rng(0)
    x_BTD, w_VD = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 6, 8), (40, 8))
    )
    targets_BT = jnp.asarray(rng.integers(0, 40, (2, 6)))

    def plain(x_BTD, w_VD, targets_BT):
        return 3 * next_token_loss(jnp.einsum("BTD,VD->BTV", x_BTD, w_VD), targets_BT)

    def in_parts(*arguments):
        return 3 * unembedding.unembedded_loss(*arguments, is_trained=is_trained)

    wanted = (0, 1) if is_trained else (0,)
    expected, slopes = jax.value_and_grad(plain, wanted)(x_BTD, w_VD, targets_BT)
    found, found_slopes = jax.value_and_grad(in_parts, wanted)(x_BTD, w_VD, targets_BT)
    assert float(found) == pytest.approx(float(expected), rel=FLOAT32_ROUNDING)
    for found, slope in zip(found_slopes, slopes, strict=True):
        np.testing.assert_allclose(found, slope, atol=FLOAT32_ROUNDING)


def plain_objective(graph):
    """Return an expert's objective as it is defined: every weight merged, all logits, no tricks."""

    def objective(params, backbone, rows):
        expert, targets_BT = nnx.merge(graph, params), rows.tokens_BU[:, 1:]
        slots = {n: expert.body.merged(backbone, n) for n in backbone.cfg.slots}

        def run(layer, x_BTD):
            return swiglu(x_BTD, *(slots[layer][name] for name in MATRICES))

        logits_BTV, _ = backbone.upper(rows.x_BTD, run)
        log_prob_BTC = expert.scout(backbone.features(rows.x_BTD))
        classes_BT = backbone.class_map[...][targets_BT]
        scout = -jnp.take_along_axis(log_prob_BTC, classes_BT[..., None], -1).mean()
        return next_token_loss(logits_BTV, targets_BT) + scout, {}

    return objective


@pytest.fixture(scope="module", params=[("lora", 4), ("ffn", None)], ids=["lora", "ffn"])
def start(request, tiny, tokens_BT):
    """Return an expert's graph and parameters, and rows whose trunk was run."""
    kind, rank = request.param
    expert = Expert(tiny.backbone, kind=kind, rank=rank, scout_width=16, rngs=nnx.Rngs(0))
    x_BTD, _ = jax.jit(tiny.backbone.trunk)(tokens_BT[:, :-1])
    return *nnx.split(expert), TappedRows(tokens_BT, x_BTD)


def test_training_is_that_of_the_plain_loss(tiny, start):
    """Over several steps of Muon, which amplifies small gradients."""
    graph, params, rows = start
    cfg = TrainConfig(steps=5, batch_size=2, window=12, learning_rate=1e-2, log_every=1)
    plain, ours = (
        fit(make(graph), params, tiny.backbone, Same(rows), cfg, optimizer=muon(cfg))
        for make in (plain_objective, tapped_objective)
    )
    losses = [[row["loss"] for row in fitted.history] for fitted in (plain, ours)]
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=SAME_CURVE)


class Same:
    """Data that is one batch for ever."""

    def __init__(self, batch):
        self.batch = jax.tree.map(np.asarray, batch)

    def __next__(self):
        return self.batch

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def test_a_step_has_no_gradient_of_frozen_matrices_and_never_all_logits(monkeypatch, tiny, start):
    graph, params, rows = start
    tokens_BT, n_vocab = rows.tokens_BU[:, 1:], tiny.cfg.vocab_size
    monkeypatch.setattr(unembedding, "_MOST_ROWS", n_vocab // 3)
    step = jax.value_and_grad(tapped_objective(graph), has_aux=True)
    found = list(products(jax.make_jaxpr(step)(params, tiny.backbone, rows).jaxpr))
    trained = [leaf.shape for leaf in jax.tree.leaves(params)]
    attention = tiny.backbone.layers[0].attention
    frozen = [attention.w_q.shape, attention.w_o.shape, tiny.backbone.embed.shape]
    matrices = [matrix.shape for matrix in backbone_slot(tiny.backbone, tiny.cfg.tap).values()]
    if matrices[0] not in trained:
        frozen += matrices
    shapes = [equation.outvars[0].aval.shape for equation in found]
    transposed = [shape[::-1] for shape in frozen]
    assert not [shape for shape in shapes if shape in frozen or shape in transposed]
    n_rows, rest = n_vocab // 3, n_vocab % 3
    parts = [(n, tiny.cfg.d_model) for n in (n_rows, rest)]
    logits = [
        equation.outvars[0].aval.shape
        for equation in found
        if equation.invars[1].aval.shape in parts
        and equation.outvars[0].aval.shape[-1] in (n_rows, rest)
    ]
    assert (*tokens_BT.shape, n_vocab) not in shapes
    assert logits == [(*tokens_BT.shape, n) for n in (n_rows, rest) if n]


def products(jaxpr):
    """Yield every product of matrices in a program and in the programs that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)
