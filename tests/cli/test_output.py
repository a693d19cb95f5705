import warnings

import pytest

from composable.cli.output import note_guards
from composable.errors import ContributionWarning


def test_each_expert_whose_contributions_count_as_zero_is_told_of_once(capsys):
    with note_guards():
        for zeroed in (12, 13):
            warnings.warn(ContributionWarning("loud", zeroed, 512), stacklevel=1)
        warnings.warn(ContributionWarning("other", 1, 2), stacklevel=1)
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split(" contributions")[0] for line in told.err.splitlines()] == [
        "warning: expert loud: 12 of 512",
        "warning: expert other: 1 of 2",
    ]


def test_other_warnings_go_where_they_went():
    with pytest.warns(UserWarning, match="something else"), note_guards():
        warnings.warn("something else", stacklevel=1)
