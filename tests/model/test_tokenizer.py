import numpy as np
import pytest

from composable.errors import TextError
from composable.model.tokenizer import BEGIN, ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("text", ["a", "def f(x):\n\treturn x\n", "naïve – 漢字 🙂"])
def test_text_survives(text):
    tokens_T = TOKENIZER.encode(text)
    assert tokens_T[0] == BEGIN
    assert tokens_T.dtype == np.int32
    assert len(tokens_T) == 1 + len(text.encode())
    assert TOKENIZER.decode(tokens_T) == text
    np.testing.assert_array_equal(tokens_T, TOKENIZER.encode(text.encode()))


def test_bytes_that_are_no_text_show_as_replacement_characters():
    assert TOKENIZER.decode(np.array([104, 0xFF, 105])) == "h\ufffdi"


@pytest.mark.parametrize("text", ["", b""])
def test_empty_text_is_refused(text):
    with pytest.raises(TextError, match="empty"):
        TOKENIZER.encode(text)


def test_a_nul_byte_is_refused_with_its_place():
    with pytest.raises(TextError, match="offset 3"):
        TOKENIZER.encode("abc\0def")


def test_the_definition_has_one_digest():
    expected = "sha256:c58ffe3dd3a75536ffa0e1ebd67098c8c0bafd9cf9c2dd6351beef06cefa0735"
    assert ByteTokenizer().digest == expected
