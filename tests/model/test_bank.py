import jax.numpy as jnp
import numpy as np
import pytest

from composable.model import bank as banks
from composable.model.body import MATRICES, backbone_slot


@pytest.fixture(scope="module")
def expert(tiny):
    return tiny.expert("a", width=8)


def entry_of(tiny, expert):
    return banks.make_entry(tiny.backbone, tiny.interface, expert.body, expert.scout, expert.key)


def test_an_empty_bank_holds_the_backbone_alone(tiny):
    bank = banks.empty_bank(tiny.backbone, tiny.interface, 4)
    assert bank.capacity == 4
    np.testing.assert_array_equal(bank.alive_E, [True, False, False, False])
    np.testing.assert_array_equal(bank.key_E, [0, *[2**32 - 1] * 3])
    for layer, slot in zip(tiny.interface.slots, bank.slots, strict=True):
        own = backbone_slot(tiny.backbone, layer)
        for name in MATRICES:
            np.testing.assert_array_equal(slot[name][0], own[name])
            assert (np.asarray(slot[name][1:]) == 0).all()


@pytest.mark.bits
def test_installing_writes_one_entry_and_removing_clears_it(tiny, expert):
    before = banks.empty_bank(tiny.backbone, tiny.interface, 4)
    bank = banks.install(
        banks.empty_bank(tiny.backbone, tiny.interface, 4), 2, entry_of(tiny, expert)
    )
    assert list(np.asarray(bank.alive_E)) == [True, False, True, False]
    assert int(bank.key_E[2]) == expert.key
    for slot, empty in zip(bank.slots, before.slots, strict=True):
        for name in MATRICES:
            assert (np.asarray(slot[name][2]) != 0).any()
            for other in (0, 1, 3):
                np.testing.assert_array_equal(slot[name][other], empty[name][other])
    cleared = banks.remove(bank, 2)
    for found, expected in zip(_leaves(cleared), _leaves(before), strict=True):
        np.testing.assert_array_equal(found, expected)


def _leaves(bank):
    slots = [slot[name] for slot in bank.slots for name in MATRICES]
    return [*slots, *bank.scouts, bank.width_E, bank.alive_E, bank.key_E]


def test_padding_a_narrow_scout_keeps_its_log_probabilities(tiny, expert):
    from composable.model.scout import class_log_probs

    bank = banks.install(
        banks.empty_bank(tiny.backbone, tiny.interface, 2), 1, entry_of(tiny, expert)
    )
    feature_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 32)), jnp.float32)
    padded_BTC = class_log_probs(feature_BTD, *(x[1] for x in bank.scouts))
    # The padded product has eight more terms, all zero, and may sum in another order.
    np.testing.assert_allclose(padded_BTC, expert.scout(feature_BTD), atol=1e-5)


@pytest.mark.bits
def test_growing_keeps_every_bit(tiny, expert):
    bank = banks.install(
        banks.empty_bank(tiny.backbone, tiny.interface, 2), 1, entry_of(tiny, expert)
    )
    grown = banks.grow(bank, 4)
    for found, expected in zip(_leaves(grown), _leaves(bank), strict=True):
        np.testing.assert_array_equal(found[:2], expected)
    assert not np.asarray(grown.alive_E[2:]).any()
    assert (np.asarray(grown.key_E[2:]) == 2**32 - 1).all()


def test_the_average_leaves_out_backbone_and_dead_entries(tiny):
    experts = [tiny.expert("a"), tiny.expert("b")]
    bank = banks.empty_bank(tiny.backbone, tiny.interface, 4)
    for index, one in zip((1, 3), experts, strict=True):
        bank = banks.install(bank, index, entry_of(tiny, one))
    average = banks.average_slots(bank)
    for i, layer in enumerate(tiny.interface.slots):
        for name in MATRICES:
            bodies = [one.body.merged(tiny.backbone, layer)[name] for one in experts]
            np.testing.assert_allclose(average[i][name], np.mean(bodies, axis=0), atol=1e-6)
