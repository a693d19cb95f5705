import os
import subprocess
import sys

import pytest

from composable.assembly import huge_pages
from composable.assembly.huge_pages import ask_for_huge_pages

OURS = "glibc.malloc.hugetlb=1"


@pytest.fixture
def given(monkeypatch, tmp_path):
    """Let the system give large pages to those who ask."""
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_ENABLED", enabled)
    return enabled


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GLIBC_TUNABLES": OURS}),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.check=3"},
            {"GLIBC_TUNABLES": f"glibc.malloc.check=3:{OURS}"},
        ),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {}),
    ],
    ids=["unset", "other", "chosen"],
)
def test_settings_of_the_user_are_kept(given, before, after):
    assert ask_for_huge_pages(before) == after


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", None])
def test_nothing_is_set_where_no_page_depends_on_it(given, text):
    given.unlink()
    if text:
        given.write_text(text)
    assert ask_for_huge_pages({}) == {}


def test_a_process_starts_again_once_with_the_setting_and_its_arguments(tmp_path):
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    program = (
        "import os, pathlib, sys\n"
        "from composable.assembly import huge_pages\n"
        f"huge_pages._ENABLED = pathlib.Path({str(enabled)!r})\n"
        "print('start', os.getpid(), *sys.argv[1:], flush=True)\n"
        "huge_pages.restart_with_huge_pages()\n"
        "print(os.environ['GLIBC_TUNABLES'])\n"
    )
    environment = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", program, "an argument"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second, setting = done.stdout.splitlines()
    assert first == second
    assert first.endswith("an argument")
    assert setting == OURS
