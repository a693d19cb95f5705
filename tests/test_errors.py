"""Errors of other processes are raised here as they were there."""

import pickle

import pytest

from composable import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.ComposableError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_copy_of_an_error_is_the_error(kind):
    needed = {errors.SignatureError: {"kind": "freeze"}, errors.MergeConflictError: {"report": {}}}
    error = kind("'x' is not a number", where="a.toml", hint="write 1", **needed.get(kind, {}))
    error.within("experts[2]")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert (str(found), vars(found), found.args) == (str(error), vars(error), error.args)
