import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from composable.assembly.experts import load_expert
from composable.corpora.documents import read_documents
from composable.errors import TextError
from composable.vetting.checks import Check, Verdict, _check_routed_share, recovery, vet
from composable.vetting.evidence import vetted_texts
from composable.vetting.statistics import upper_mean


@pytest.fixture(scope="module")
def texts(loaded, trained_folder):
    """Return (held-out private text, public text)."""
    heldout = read_documents([trained_folder / ".work" / "heldout.jsonl"])
    return vetted_texts(heldout), vetted_texts(loaded.anchor)


@pytest.fixture(scope="module")
def good(loaded, trained_folder):
    return load_expert(loaded, trained_folder)


def vet_expert(loaded, expert, texts):
    return vet(loaded.backbone, loaded.interface, expert, *texts)


def failed(verdict):
    return {check.name for check in verdict.checks if not check.passed}


@pytest.mark.parametrize(
    ("backbone", "own", "composed", "share"),
    [(4.0, 2.0, 2.0, 1.0), (4.0, 2.0, 4.0, 0.0), (4.0, 2.0, 3.0, 0.5), (4.0, 2.0, 1.0, 1.5)],
)
def test_recovery_is_the_share_of_the_gap_that_is_closed(backbone, own, composed, share):
    assert recovery(backbone, own, composed) == pytest.approx(share)


def test_a_verdict_passes_when_every_check_does():
    checks = [Check(name=n, passed=p, found="", expected="") for n, p in (("a", True), ("b", True))]
    assert Verdict(checks=tuple(checks), measured={}).passed
    checks.append(Check(name="c", passed=False, found="", expected=""))
    assert not Verdict(checks=tuple(checks), measured={}).passed


def test_a_good_expert_passes_with_its_figures(trained_folder):
    card = json.loads((trained_folder / "card.json").read_text())
    assert card["passed"], card["checks"]
    assert [check["name"] for check in card["checks"]] == [
        "format",
        "isolation",
        "determinism",
        "finite",
        "norms",
        "gain",
        "anchor",
        "taken",
    ]
    measured = card["measured"]
    bits = measured["bits_per_byte"]
    assert bits["own_expert"] < 0.8 * bits["own_backbone"]
    assert measured["gain"] == pytest.approx(
        1 - bits["own_expert"] / bits["own_backbone"], abs=1e-4
    )
    interval = measured["gain_interval"]
    assert interval["low"] < measured["gain"] < interval["high"]
    assert measured["recovery"] > 0.5
    assert measured["anchor_taken"] < 0.5
    assert measured["anchor_taken"] <= measured["anchor_taken_bound"] <= 1
    assert 0 < max(measured["norms"]["largest"]) < 1e3
    assert measured["norms"]["zeroed"] == 0
    assert measured["documents"]["own_digest"].startswith("sha256:")
    assert card["training"]["tokens"] == 60 * 8 * 32


def test_an_expert_that_knows_nothing_new_fails(loaded, tiny, good, texts):
    from composable.model.body import Expert

    fresh = Expert(loaded.backbone, kind="ffn", scout_width=8, rngs=nnx.Rngs(0))
    untrained = dataclasses.replace(good, body=fresh.body, scout=fresh.scout)
    verdict = vet_expert(loaded, untrained, texts)
    assert failed(verdict) == {"gain"}
    assert verdict.measured["gain"] == 0
    json.dumps(verdict.measured, allow_nan=False)


def test_a_scout_that_predicts_better_than_the_body_causes_a_warning(loaded, good, texts):
    """Its scout has learnt the text, and its body nothing."""
    from composable.model.body import Expert

    fresh = Expert(loaded.backbone, kind="ffn", scout_width=8, rngs=nnx.Rngs(0))
    verdict = vet_expert(loaded, dataclasses.replace(good, body=fresh.body), texts)
    bits = verdict.measured["class_bits_per_byte"]
    assert bits["scout"] < bits["body"]
    (warning,) = verdict.warnings
    assert f"{bits['scout']:.3f} against {bits['body']:.3f} bits per byte" in warning
    swapped = vet_expert(loaded, dataclasses.replace(good, scout=fresh.scout), texts)
    assert swapped.warnings == ()


def test_gain_shows_the_body_alone_and_in_mix_mode(loaded, good, texts):
    verdict = vet_expert(loaded, good, texts)
    bits = verdict.measured["bits_per_byte"]
    (found,) = (check.found for check in verdict.checks if check.name == "gain")
    assert f"to {bits['own_expert']:.3f} bits per byte on its own held-out text" in found
    assert found.endswith(f"with the body always on; {bits['own_mix']:.3f} in mix mode")


def test_an_expert_that_attracts_public_text_and_predicts_it_badly_fails(loaded, tiny, good, texts):
    """The backbone's own scout with a bias for public letters, and a body that knows nothing."""
    scout = tiny.expert("thief", width=16).scout
    backbone = loaded.backbone.scout
    for name in ("w_in", "b_in", "w_out", "b_out"):
        getattr(scout, name)[...] = getattr(backbone, name)[...]
    body = tiny.expert("noise", noise=3.0).body
    thief = dataclasses.replace(good, body=body, scout=scout)
    verdict = vet_expert(loaded, thief, texts)
    assert "anchor" in failed(verdict)
    assert "isolation" not in failed(verdict)
    assert verdict.measured["anchor_loss"] > 0.01


def test_outputs_beyond_the_bounds_fail(loaded, tiny, good, texts):
    """They are finite, and count as zero in mix mode, but not with the body always on."""
    huge = dataclasses.replace(good, body=tiny.expert("huge", noise=1e4).body)
    verdict = vet_expert(loaded, huge, texts)
    assert "norms" in failed(verdict)
    assert "finite" not in failed(verdict)
    assert verdict.measured["norms"]["zeroed"] > 0.5
    assert "anchor" not in failed(verdict)


def test_an_overconfident_scout_gets_no_tokens(loaded, good, texts):
    """It is certain of one byte, so it is wrong about all others, and gets no weight."""
    scout = nnx.clone(good.scout)
    scout.b_out[...] = scout.b_out[...].at[ord("e")].set(60.0)
    verdict = vet_expert(loaded, dataclasses.replace(good, scout=scout), texts)
    assert verdict.measured["anchor_taken"] < 0.01
    assert verdict.measured["recovery"] < 0.1
    assert failed(verdict) == set()


def test_the_share_of_public_text_is_bounded_by_the_number_of_documents():
    few = np.array([0.1, 0.2])
    assert _check_routed_share(few, upper_mean(few), 0.002).passed, "two documents give no bound"
    many = np.full(40, 0.1)
    assert _check_routed_share(many, upper_mean(many), 0.002).passed
    assert not _check_routed_share(few + 0.5, 1.0, 0.002).passed
    assert not _check_routed_share(many + 0.5, upper_mean(many + 0.5), 0.002).passed
    assert _check_routed_share(many + 0.5, upper_mean(many + 0.5), -0.002).passed, "the text gains"
    unsure = np.tile([0.0, 0.0, 0.9], 3)
    assert not _check_routed_share(unsure, upper_mean(unsure), 0.002).passed, (
        "a third, but it may be more"
    )


def test_a_body_that_overflows_fails(loaded, tiny, good, texts):
    broken = dataclasses.replace(good, body=tiny.expert("huge", noise=1e25).body)
    verdict = vet_expert(loaded, broken, texts)
    assert {"finite", "gain"} <= failed(verdict)
    json.dumps(verdict.measured, allow_nan=False)
    assert "isolation" not in failed(verdict)


def test_progress_counts_the_passes(loaded, good, texts):
    calls = []
    vet(loaded.backbone, loaded.interface, good, *texts, progress=lambda *at: calls.append(at))
    assert calls == [(i, len(calls)) for i in range(1, len(calls) + 1)]
    assert len(calls) > 1


@pytest.mark.parametrize("missing", [0, 1])
def test_vetting_without_text_is_refused(loaded, good, texts, missing):
    given = [[] if i == missing else text for i, text in enumerate(texts)]
    with pytest.raises(TextError):
        vet(loaded.backbone, loaded.interface, good, *given)


def test_figures_are_valid_json(loaded, good, texts):
    measured = vet_expert(loaded, good, texts).measured
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert all(np.isfinite(x) for x in measured["bits_per_byte"].values())
