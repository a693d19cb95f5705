import numpy as np
import pytest

from composable.interface import digest_tensors, hash_classes


@pytest.mark.parametrize("vocab_size", [1025, 49_152, 151_936])
def test_every_class_gets_its_share(vocab_size):
    counts = np.bincount(hash_classes(vocab_size), minlength=1024)
    assert len(counts) == 1024
    fair = vocab_size / 1024
    assert counts.min() >= fair - 3
    assert counts.max() <= fair + 3


def test_consecutive_tokens_fall_into_different_classes():
    class_V = hash_classes(49_152)
    assert all((class_V[:-step] != class_V[step:]).all() for step in range(1, 17))


def test_where_there_are_classes_enough_every_token_has_its_own():
    np.testing.assert_array_equal(hash_classes(256), np.arange(256))


def test_the_map_is_frozen():
    """Published interfaces hang on it; another map would need another name."""
    digest = digest_tensors({"class_map": hash_classes(49_152)})
    assert digest == "sha256:9bc39423c3b84b23b939e4cc953414e988acd6f5aaea4e185b5fd0d0878bd0c7"
    assert hash_classes(49_152)[:5].tolist() == [0, 632, 241, 874, 483]
