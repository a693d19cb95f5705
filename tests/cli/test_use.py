"""`generate`: with a project, without one, and what it refuses."""

import pytest


@pytest.fixture
def project_of_noise(works, make_fakes, tiny_backbone):
    """Make a project on the backbone of noise with one expert; return its fakes."""
    fakes = make_fakes("registry", tiny_backbone)
    fakes.publish("german")
    works("init", "--backbone", tiny_backbone, "--registry", "registry")
    works("install", "german")
    return fakes


def test_generate_says_what_it_cannot_do(cli, works, project_of_noise):
    text = works("generate", "It was", "--max-tokens", 8).out
    assert text == works("generate", "It was", "--max-tokens", 8, "--experts", "german").out
    assert text.endswith("\n")

    outcome = cli("generate", "")
    assert outcome.code == 1
    assert "the text is empty" in outcome.err
    outcome = cli("generate", "x" * 120, "--max-tokens", 20)
    assert outcome.code == 1
    assert "do not fit the context of 128" in outcome.err
    assert "did you mean 'german'?" in cli("generate", "It was", "--experts", "germn").err


def test_generate_outside_a_project(cli):
    outcome = cli("generate", "It was")
    assert outcome.code == 1
    assert "run `composable init`" in outcome.err
