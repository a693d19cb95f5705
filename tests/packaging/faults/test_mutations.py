"""The faults can be noticed: code that is broken on purpose is caught, each way by its own kind."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from composable.files import atomic
from composable.packaging.registry import lines, registry
from composable.packaging.registry.release import Release
from tests.support.faults import flips, scenarios
from tests.support.faults.disk import NAMES, STRICT
from tests.support.faults.flips import flip_everywhere
from tests.support.faults.full_disk import refuse_everywhere
from tests.support.faults.kills import Bench, crash_for_days, kill_everywhere
from tests.support.faults.power_loss import cut_after_kills, cut_everywhere
from tests.support.faults.worlds import Inputs

Break = Callable[[pytest.MonkeyPatch], None]
Find = Callable[[Inputs, Path], list[str]]


def files_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def sync_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            fsync(descriptor)

    patch.setattr(os, "fsync", sync_directories)


def directories_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic, "sync_directory", lambda path: None)


def directories_above_are_not_settled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic, "settle", lambda path: atomic.sync_directory(path.parent))


def what_is_there_is_trusted_to_be_durable(patch: pytest.MonkeyPatch) -> None:
    create_bytes = atomic.create_bytes

    def create(path: Path, data: bytes) -> bool:
        return not path.exists() and create_bytes(path, data)

    patch.setattr(atomic, "create_bytes", create)


def files_are_written_in_place(patch: pytest.MonkeyPatch) -> None:
    def write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        atomic.sync_directory(path.parent)

    patch.setattr(atomic, "write_bytes", write)


def nothing_is_swept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic, "sweep", lambda directory, older_than_seconds=0: 0)


def errors_of_the_disk_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic, "explained", lambda path, what="": contextlib.nullcontext())


def what_arrives_is_not_verified(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic.Sink, "_verify", lambda self: None)


def index_lines_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lines, "_checksum_of", lambda fields: "0" * 16)
    # Either of these notices most of what the checksums of lines would have noticed.
    patch.setattr(registry, "check_extent", lambda document, where: None)
    patch.setattr(Release, "find_difference", lambda self, manifest: None)


def by_kills(inputs: Inputs, scratch: Path) -> list[str]:
    return kill_everywhere(Bench(scenarios.YANK, inputs, scratch)).failures


def by_power_loss(inputs: Inputs, scratch: Path) -> list[str]:
    bench = Bench(scenarios.PUBLISH_FIRST, inputs, scratch)
    return cut_everywhere(bench, (STRICT, NAMES), every=7).failures


def by_power_loss_after_a_kill(inputs: Inputs, scratch: Path) -> list[str]:
    found = []
    for number, scenario in enumerate((scenarios.YANK, scenarios.PUBLISH_FIRST)):
        bench = Bench(scenario, inputs, scratch / str(number))
        found += cut_after_kills(bench, every=1 + 5 * number).failures
    return found


def by_days_of_crashes(inputs: Inputs, scratch: Path) -> list[str]:
    once, twice = crash_for_days(Bench(scenarios.YANK, inputs, scratch))
    return twice if len(twice) > len(once) else []


def by_a_full_disk(inputs: Inputs, scratch: Path) -> list[str]:
    bench = Bench(scenarios.YANK, inputs, scratch)
    return refuse_everywhere(bench, "ENOSPC", is_lasting=False).failures


def by_flips_of_files(inputs: Inputs, scratch: Path) -> list[str]:
    return flip_everywhere(flips.REGISTRY_FILES, inputs, scratch, flips=20).failures


def by_flips_of_index_lines(inputs: Inputs, scratch: Path) -> list[str]:
    return flip_everywhere(flips.INDEX_LINES, inputs, scratch, flips=400).failures


@pytest.mark.parametrize(
    ("break_it", "find"),
    [
        (files_are_not_synced, by_power_loss),
        (directories_are_not_synced, by_power_loss),
        (directories_above_are_not_settled, by_power_loss_after_a_kill),
        (what_is_there_is_trusted_to_be_durable, by_power_loss_after_a_kill),
        (files_are_written_in_place, by_kills),
        (nothing_is_swept, by_days_of_crashes),
        (errors_of_the_disk_pass, by_a_full_disk),
        (what_arrives_is_not_verified, by_flips_of_files),
        (index_lines_are_not_checked, by_flips_of_index_lines),
    ],
    ids=lambda function: function.__name__,
)
def test_what_is_broken_is_found(
    break_it: Break,
    find: Find,
    inputs: Inputs,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_it(monkeypatch)
    assert find(inputs, scratch) != []
