"""Array names carry the letters of their dimensions, and the letters are those of the key."""

import ast
import re
from pathlib import Path

import pytest

from composable.interface import DIMS

ROOT = Path(__file__).parents[1] / "composable"
FILES = sorted(
    path
    for room in ("model", "kernels", "merging", "training", "vetting")
    for path in (ROOT / room).glob("*.py")
)
# `x_BTD`; a 1 is a dimension of size one, as in `weight_BT1`.
DIMENSIONS = re.compile(r"(?:.*[a-z0-9])?_([A-Z][A-Z0-9]*)")
# Arrays without letters: scalars, and arrays of any shape.
SCALARS = {
    *("e", "i", "index", "is_drawn", "k", "key", "position", "rank", "width", "_"),
    *("condition", "min_p", "penalty", "repetition_penalty", "temperature", "top_k", "top_p"),
}
ANY_SHAPE = {"array", "dy", "left", "log_prob", "right", "scale", "stack", "values", "w", "x", "y"}
EINSUM = re.compile(r"[A-Za-z]+(,[A-Za-z]+)*->[A-Za-z]*")
ARRAYS = {"Array", "jax.Array", "np.ndarray", "jax.Array | None", "np.ndarray | None"}


def names_in(tree):
    """Return every name that is bound, with its line and its annotation, if it has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno, node.annotation
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.lineno, node.annotation
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno, None
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno, None


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_array_names_end_in_letters_of_the_key(path):
    wrong = []
    for name, line, annotation in names_in(ast.parse(path.read_text())):
        found = DIMENSIONS.fullmatch(name)
        letters = set(found[1]) - {"1"} if found and not name.isupper() else None
        if letters and letters - DIMS.keys():
            wrong.append(f"{line}: {name} has {letters - DIMS.keys()}, which the key lacks")
        is_array = annotation is not None and ast.unparse(annotation) in ARRAYS
        if is_array and letters is None and name not in SCALARS | ANY_SHAPE:
            wrong.append(f"{line}: {name} is an array without letters")
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_einsums_use_letters_of_the_key(path):
    strings = (
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    einsums = [text for text in strings if EINSUM.fullmatch(text)]
    assert [text for text in einsums if set(re.sub("[,>-]", "", text)) - DIMS.keys()] == []


def test_the_key_has_no_letter_that_is_not_used():
    rooms = "".join(path.read_text() for path in ROOT.rglob("*.py"))
    used = {letter for name in re.findall(r"_([A-Z][A-Z0-9]*)\b", rooms) for letter in name}
    assert DIMS.keys() - used == set()


def test_exceptions_are_needed():
    names = {name for path in FILES for name, _, _ in names_in(ast.parse(path.read_text()))}
    assert (SCALARS | ANY_SHAPE) - names == set()
