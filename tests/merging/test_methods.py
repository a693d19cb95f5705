"""Methods of merging: what each keeps, weights and drops."""

import numpy as np
import pytest

from composable.merging.dare import drop_and_rescale, merge_dare
from composable.merging.fisher import merge_fisher
from composable.merging.low_rank import factor_matrix, truncate
from composable.merging.methods import METHODS, Candidate, list_candidates, merge_candidates
from composable.merging.regmean import merge_regmean
from composable.merging.statistics import MatrixStatistics
from composable.merging.ties import merge_ties
from composable.merging.updates import add_update, find_updates

rng = np.random.default_rng(0)
SHAPES = {"up": (6, 9), "down": (9, 6)}


def make():
    return {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}


def describe(shape, seed):
    """Return statistics of random inputs and gradients, and the inputs."""
    random = np.random.default_rng(seed)
    x_MD, g_MF = (random.normal(size=(200, size)) for size in shape)
    found = MatrixStatistics.of(
        x_MD.T @ x_MD / 200,
        x_MD.T @ g_MF / 200,
        (x_MD**2 * (g_MF**2).sum(1, keepdims=True)).mean(0),
        (g_MF**2 * (x_MD**2).sum(1, keepdims=True)).mean(0),
    )
    return found, x_MD, g_MF


BASE, ONE, TWO = make(), make(), make()
STATISTICS = [{n: describe(s, seed)[0] for n, s in SHAPES.items()} for seed in (1, 2)]


@pytest.mark.parametrize("method", ["linear", "fisher", "regmean"])
def test_sides_that_agree_give_what_they_agree_on(method):
    """Random drops, trims and cuts are left out: they lose some of it on purpose."""
    candidate = Candidate(method=method)
    ((_, merged),) = merge_candidates(BASE, [ONE, ONE], [candidate], STATISTICS)
    for name, w_DF in merged.items():
        np.testing.assert_allclose(w_DF, ONE[name], atol=2e-5)


# In DARE every side drops by its place.
@pytest.mark.parametrize("method", sorted({*METHODS} - {"dare"}))
def test_the_order_of_sides_does_not_matter(method):
    candidates = list_candidates([method])
    there = list(merge_candidates(BASE, [ONE, TWO], candidates, STATISTICS))
    back = list(merge_candidates(BASE, [TWO, ONE], candidates, STATISTICS[::-1]))
    for (_, first), (_, second) in zip(there, back, strict=True):
        for name, w_DF in first.items():
            np.testing.assert_allclose(w_DF, second[name], atol=1e-5)


def test_a_linear_merge_at_the_number_of_sides_adds_the_updates():
    candidate = Candidate(method="linear", scale=2.0)
    ((_, merged),) = merge_candidates(BASE, [ONE, TWO], [candidate])
    np.testing.assert_allclose(merged["up"], ONE["up"] + TWO["up"] - BASE["up"], atol=1e-5)


def test_ties_by_hand():
    one = {"a": np.array([[3.0, -1.0, 0.1]]), "b": np.array([[0.2]])}
    two = {"a": np.array([[-1.0, -2.0, 0.1]]), "b": np.array([[4.0]])}
    # Half of the four weights of each side: 3 and -1; 4 and -2, over both matrices together.
    merged = merge_ties([one, two], density=0.5)
    assert merged["a"].tolist() == [[3.0, -1.5, 0.0]] and merged["b"].tolist() == [[4.0]]


def test_dare_keeps_the_mean_and_drops_the_same_on_every_machine():
    update = {"w": np.ones((200, 200), np.float32)}
    dropped = drop_and_rescale(update, 0.9, seed=3)["w"]
    assert (dropped == 0).mean() == pytest.approx(0.9, abs=0.01)
    assert dropped.mean() == pytest.approx(1.0, abs=0.05)
    assert np.flatnonzero(dropped)[:4].tolist() == [31, 40, 43, 44]
    assert not np.array_equal(merge_dare([update, update], 0.9)["w"], 2 * dropped)


def test_fisher_weights_are_those_of_the_product_of_marginals():
    updates = [find_updates(BASE, side) for side in (ONE, TWO)]
    merged = merge_fisher(updates, STATISTICS)["up"]
    fishers = [side["up"].fisher() for side in STATISTICS]
    sizes = [
        np.mean(np.concatenate([s.fisher().ravel() for s in side.values()])) for side in STATISTICS
    ]
    first, second = (f / size for f, size in zip(fishers, sizes, strict=True))
    expected = (first * updates[0]["up"] + second * updates[1]["up"]) / (first + second)
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4)


def test_regmean_is_the_least_squares_solution():
    """No matrix has smaller errors on the inputs of both sides together."""
    described = [describe(SHAPES["up"], seed) for seed in (1, 2)]
    updates = [{"up": ONE["up"]}, {"up": TWO["up"]}]
    merged = merge_regmean(updates, [{"up": found} for found, _, _ in described], shrink=1.0)["up"]
    x_MD = np.concatenate([x for _, x, _ in described])
    y_MF = np.concatenate([x @ u["up"] for (_, x, _), u in zip(described, updates, strict=True)])
    expected, *_ = np.linalg.lstsq(x_MD, y_MF, rcond=None)
    np.testing.assert_allclose(merged, expected, atol=1e-4)


def test_a_low_rank_matrix_is_kept_and_another_is_cut_to_its_largest_singular_values():
    low_DF = rng.normal(size=(8, 2)) @ rng.normal(size=(2, 5))
    for w_DF in (low_DF, low_DF.T):
        a_DR, b_RF = factor_matrix(w_DF, rank=3)
        assert a_DR.shape == (len(w_DF), 3) and np.abs(a_DR @ b_RF - w_DF).max() < 1e-5
        assert np.linalg.norm(a_DR[:, :2], axis=0) == pytest.approx(
            np.linalg.norm(b_RF[:2], axis=1), rel=1e-4
        )
    full_DF = rng.normal(size=(8, 5))
    left = np.linalg.svd(full_DF, compute_uv=False)[2:]
    error = np.linalg.norm(truncate({"w": full_DF}, share=0.4)["w"] - full_DF)
    assert error == pytest.approx(np.linalg.norm(left), rel=1e-4)


def test_statistics_stand_for_the_inputs_they_were_made_of():
    found, x_MD, g_MF = describe((6, 4), seed=5)
    np.testing.assert_allclose(found.gram(), x_MD.T @ x_MD / 200, atol=1e-6)
    change_DF = rng.normal(size=(6, 4))
    assert found.regression_error(change_DF) == pytest.approx(
        ((x_MD @ change_DF) ** 2).sum(1).mean(), rel=1e-5
    )
    squares_F = found.column_F / np.trace(found.gram())
    expected = (x_MD.T @ g_MF / 200 * change_DF).sum() + 0.5 * (
        ((x_MD @ change_DF) ** 2).mean(0) @ squares_F
    )
    assert found.predict_change(change_DF) == pytest.approx(expected, rel=1e-5)


def test_a_sketch_keeps_the_diagonal_and_the_largest_directions():
    x_MD = rng.normal(size=(500, 40)) * np.geomspace(30, 0.1, 40)
    gram_DD = x_MD.T @ x_MD / 500
    found = MatrixStatistics.of(gram_DD, np.zeros((40, 2)), np.ones(40), np.ones(2))
    np.testing.assert_allclose(np.diagonal(found.gram()), np.diagonal(gram_DD), rtol=1e-6)
    value, vector = np.linalg.eigh(gram_DD)
    top = vector[:, -1]
    assert top @ found.gram() @ top == pytest.approx(value[-1], rel=1e-3)


def test_an_update_is_undone_by_its_negative():
    update = find_updates(BASE, ONE)
    back = add_update(add_update(BASE, update), update, -1.0)
    np.testing.assert_allclose(back["up"], BASE["up"], atol=1e-5)
