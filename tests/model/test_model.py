import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.errors import ModelError, TextError
from composable.model import mix as mix_mode
from composable.model.model import Model, Pluggable

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(tiny.expert("a"), tiny.expert("b"))


def test_the_constructor_sorts_and_makes_room(tiny):
    experts = [tiny.expert(name) for name in ("b", "a")]
    model = Model(tiny.backbone, tiny.interface, experts)
    assert model.names == ("backbone", "a", "b", None)
    assert model.experts == ["a", "b"]
    assert model.context == tiny.cfg.context


@pytest.mark.bits
def test_a_full_bank_grows_and_keeps_every_logit(tiny):
    experts = [tiny.expert("a"), tiny.expert("b")]
    grown = tiny.model(*experts, capacity=2)
    assert grown.parts.bank.capacity == 4
    assert grown.names == ("backbone", "a", "b", None)
    tokens_BT = tiny.tokens()
    np.testing.assert_array_equal(grown(tokens_BT), tiny.model(*experts)(tokens_BT))


@pytest.mark.parametrize(
    ("tokens_BT", "error", "message"),
    [
        (np.zeros(5, int), ModelError, r"shape \(5,\)"),
        (np.zeros((1, 2, 3), int), ModelError, r"shape \(1, 2, 3\)"),
        (np.zeros((1, 5)), ModelError, "float32"),
        (np.zeros((1, 5), bool), ModelError, "bool"),
        (np.zeros((1, 129), int), TextError, "129 tokens do not fit the context of 128"),
        (np.zeros((1, 0), int), ModelError, r"shape \(1, 0\)"),
        (np.zeros((0, 5), int), ModelError, r"shape \(0, 5\)"),
    ],
    ids=["flat", "cube", "float", "bool", "long", "no time", "no rows"],
)
@pytest.mark.parametrize("call", ["__call__", "safe", "route", "path"])
def test_what_is_no_batch_of_tokens_is_refused(model, call, tokens_BT, error, message):
    with pytest.raises(error, match=message):
        getattr(model, call)(tokens_BT)


def test_names_are_unique_and_known(tiny, model):
    with pytest.raises(ModelError, match="'a' is already plugged in"):
        model.install(tiny.expert("a"))
    with pytest.raises(ModelError, match="'backbone' is already plugged in"):
        model.install(tiny.expert("backbone"))
    with pytest.raises(ModelError, match=r"no expert named 'x' is plugged in \(there are: a, b\)"):
        model.remove("x")
    with pytest.raises(ModelError, match="no expert named 'x'"):
        model.path(tiny.tokens(), "x")
    with pytest.raises(ModelError, match="no expert named 'backbone'"):
        model.remove("backbone")
    assert model.experts == ["a", "b"]


def test_installing_and_removing_within_capacity_compile_nothing(tiny, count_compilations):
    model = tiny.model(tiny.expert("a"))
    model.remove("a")
    tokens_BT = jnp.asarray(tiny.tokens())
    calls = (model.__call__, model.safe, model.route, lambda x_BT: model.path(x_BT, "b"))
    model.install(tiny.expert("b"))
    for call in calls:
        call(tokens_BT)
    experts = [tiny.expert("c"), tiny.expert("d", noise=0.1)]
    with count_compilations() as compiled:
        for expert in experts:
            model.install(expert)
        for call in calls:
            call(tokens_BT)
        model.remove("c")
        for call in calls:
            call(tokens_BT)
    assert len(compiled) == 0


def test_low_rank_experts_kept_as_factors_compile_nothing(tiny, count_compilations):
    def low_rank(name, rank):
        return tiny.expert(name, kind="lora", rank=rank)

    first = low_rank("a", 4)
    model = Model(tiny.backbone, tiny.interface, [first], capacity=4, factor_rank=16)
    assert model.parts.bank.slots[0]["w_up"].shape[0] == 1, "no room for full matrices is made"
    tokens_BT = jnp.asarray(tiny.tokens())
    alone_BTV = np.asarray(model(tokens_BT))
    experts = [low_rank("b", 4), low_rank("c", 9)]
    model.install(experts[0])
    model.remove("b")
    model.install(experts[1])
    model.remove("c")
    with count_compilations() as compiled:
        for expert in experts:
            model.install(expert)
        model(tokens_BT)
        for expert in experts:
            model.remove(expert.name)
        again_BTV = model(tokens_BT)
    assert len(compiled) == 0
    np.testing.assert_array_equal(again_BTV, alone_BTV)


@pytest.mark.bits
@pytest.mark.parametrize("factor_rank", [0, 4])
def test_no_bit_depends_on_the_kinds_of_bodies_that_are_installed(tiny, factor_rank):
    """Nor on the order in which they came, whether low-rank bodies are merged or not."""
    tokens_BT = tiny.tokens()
    full, low = tiny.expert("a"), tiny.expert("b", kind="lora", rank=4)

    def model(*experts):
        return Model(tiny.backbone, tiny.interface, experts, capacity=4, factor_rank=factor_rank)

    both = model(full, low)
    for first, second in ((full, low), (low, full)):
        one = model(first)
        before_BTV = np.asarray(one(tokens_BT))
        one.install(second)
        np.testing.assert_array_equal(one(tokens_BT), both(tokens_BT))
        one.remove(second.name)
        np.testing.assert_array_equal(one(tokens_BT), before_BTV)


def test_low_rank_bodies_are_merged_unless_they_are_kept_as_factors(tiny):
    """A larger rank is merged, and needs room for full matrices."""
    low, larger = (tiny.expert(n, kind="lora", rank=r) for n, r in (("a", 4), ("b", 20)))
    model = Model(tiny.backbone, tiny.interface, [low], capacity=4, factor_rank=16)
    assert (model.parts.bank.rank, model.parts.bank.has_full) == (16, False)
    model.install(larger)
    assert (model.parts.bank.rank, model.parts.bank.has_full) == (16, True)
    merged = Model(tiny.backbone, tiny.interface, [low, larger], capacity=4)
    assert (merged.parts.bank.rank, merged.parts.bank.has_full) == (0, True)
    tokens_BT = tiny.tokens()
    # Sums in another order; logits are of order 5.
    np.testing.assert_allclose(model(tokens_BT), merged(tokens_BT), atol=1e-4)


def test_the_counter_of_compilations_counts(count_compilations):
    x = jnp.ones(3)
    with count_compilations() as compiled:
        jax.jit(lambda x: x * 41.5 + 3)(x)
    assert len(compiled) == 1


@pytest.mark.bits
def test_a_model_goes_through_jit(tiny, model):
    tokens_BT = jnp.asarray(tiny.tokens())
    weight_BTE = jax.jit(lambda model, tokens_BT: model.route(tokens_BT))(model, tokens_BT)
    np.testing.assert_array_equal(weight_BTE, model.route(tokens_BT))
    leaves, structure = jax.tree.flatten(model)
    assert jax.tree.unflatten(structure, leaves).names == model.names


def test_a_model_goes_through_vmap(tiny, model):
    tokens_BT = jnp.asarray(tiny.tokens())
    one_by_one = jax.vmap(lambda tokens_T: model(tokens_T[None])[0])(tokens_BT)
    # Other block sizes, so sums in another order; logits are of order 5.
    np.testing.assert_allclose(one_by_one, model(tokens_BT), atol=1e-4)


def test_only_chosen_experts_have_a_gradient(tiny):
    """An expert whose scout rules out what the text holds is never chosen, and learns nothing."""
    mute = tiny.expert("mute")
    never = mute.scout.b_out[...].at[1:].set(-500.0)
    mute.scout.b_out[...] = never
    model = tiny.model(tiny.expert("a"), mute, tiny.expert("b"))
    index = model.names.index("mute")
    tokens_BT = jnp.asarray(tiny.tokens())
    # At the start token all experts tie, and the smallest key wins; mute's is not the smallest.
    weight_BTE = np.asarray(model.route(tokens_BT))
    assert (weight_BTE[:, 1:, index] == 0).all()
    used = [e for e in range(4) if (weight_BTE[..., e] > 0).any()]
    assert len(used) > 1

    @jax.jit
    @jax.grad
    def gradient(slots):
        bank = dataclasses.replace(model.parts.bank, slots=slots)
        parts = dataclasses.replace(model.parts, bank=bank)
        logits_BTV, _ = mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, 2))
        return jnp.square(jax.nn.log_softmax(logits_BTV)).mean()

    for slot in gradient(model.parts.bank.slots):
        for stack in slot.values():
            size_E = np.abs(np.asarray(stack)).max(axis=(1, 2))
            assert np.isfinite(size_E).all()
            for e in range(4):
                assert (size_E[e] > 0) == (e in used), f"entry {e} of {model.names}"


def test_the_mixture_is_differentiable_where_a_scout_is_broken(tiny):
    broken = tiny.expert("broken", scout_noise=float("nan"))
    model = tiny.model(tiny.expert("a"), broken)
    tokens_BT = jnp.asarray(tiny.tokens())

    def loss(scouts):
        bank = dataclasses.replace(model.parts.bank, scouts=scouts)
        parts = dataclasses.replace(model.parts, bank=bank)
        weight_BTE, _ = mix_mode.route(parts, tokens_BT, mix_mode.mix_state(parts, 2))
        return (weight_BTE * jnp.arange(4)).sum()

    gradient = jax.jit(jax.grad(loss))(model.parts.bank.scouts)
    assert all(np.isfinite(np.asarray(x)[:2]).all() for x in gradient)
    assert (np.asarray(gradient.b_out_EC)[1] != 0).any()


def test_a_pluggable_is_data(tiny):
    expert = tiny.expert("a")
    assert dataclasses.replace(expert, name="z").body is expert.body
    assert isinstance(expert, Pluggable)
