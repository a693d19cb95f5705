import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.errors import ModelError
from composable.model.body import MATRICES, Body, Expert, backbone_slot
from composable.model.model import Pluggable


def fresh_expert(tiny, kind, rank=None):
    return Expert(tiny.backbone, kind=kind, rank=rank, scout_width=8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("kind", "rank"), [("ffn", None), ("lora", 4)])
@pytest.mark.bits
def test_an_untrained_body_is_the_backbones_own_to_the_bit(tiny, kind, rank):
    body = fresh_expert(tiny, kind, rank).body
    for layer in tiny.cfg.slots:
        own, merged = backbone_slot(tiny.backbone, layer), body.merged(tiny.backbone, layer)
        for name in MATRICES:
            np.testing.assert_array_equal(merged[name], own[name])


@pytest.mark.bits
def test_an_untrained_expert_changes_no_logits(tiny):
    expert = fresh_expert(tiny, "ffn")
    pluggable = Pluggable(name="fresh", body=expert.body, scout=expert.scout, key=1)
    model, tokens_BT = tiny.model(pluggable), tiny.tokens()
    np.testing.assert_array_equal(model.path(tokens_BT, "fresh"), model.path(tokens_BT))


def test_a_low_rank_body_adds_its_product(tiny):
    expert = tiny.expert("low", kind="lora", rank=4)
    for layer in tiny.cfg.slots:
        own = backbone_slot(tiny.backbone, layer)
        merged = expert.body.merged(tiny.backbone, layer)
        for name in MATRICES:
            low = getattr(expert.body.slots[str(layer)], name)
            a, b = np.asarray(low.a[...], np.float64), np.asarray(low.b[...], np.float64)
            assert np.linalg.matrix_rank(a @ b) == 4
            # Products of four terms of order one, in float32.
            np.testing.assert_allclose(merged[name], own[name] + a @ b, atol=1e-5)


def test_training_and_the_bank_run_the_same_body(tiny):
    """What `feed_forward` runs while training is what `merged` puts into the bank."""
    expert = tiny.expert("low", kind="lora", rank=4)
    model, tokens_BT = tiny.model(expert), jnp.asarray(tiny.tokens())

    @jax.jit
    def run_as_in_training(backbone, body):
        x_BTD, _ = backbone.trunk(tokens_BT)
        return backbone.upper(x_BTD, body.feed_forward(backbone))[0]

    trained_BTV = run_as_in_training(tiny.backbone, expert.body)
    # One merges the low-rank product before and one inside the compiled program.
    np.testing.assert_allclose(model.path(tokens_BT, "low"), trained_BTV, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "rank", "field"),
    [("moe", None, "body.kind"), ("ffn", 4, "body.rank"), ("lora", None, "body.rank")],
)
def test_a_body_that_does_not_exist_is_refused(tiny, kind, rank, field):
    with pytest.raises(ModelError) as caught:
        Body(tiny.backbone, kind, rank, rngs=nnx.Rngs(0))
    assert caught.value.where == field


def test_the_attribute_paths_are_those_of_the_signature(tiny):
    from composable.interface import body_signature, scout_signature
    from composable.model.tensors import shapes_of

    for kind, rank in (("ffn", None), ("lora", 4)):
        shapes = shapes_of(fresh_expert(tiny, kind, rank))
        body, scout = body_signature(tiny.interface, kind, rank), scout_signature(tiny.interface, 8)
        expected = {f"body.{name}": spec.shape for name, spec in body.items()}
        expected |= {f"scout.{name}": spec.shape for name, spec in scout.items()}
        assert shapes == expected
