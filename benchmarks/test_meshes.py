"""A small run of the comparison of meshes: two processes with a device each."""

import pytest

from benchmarks.meshes import TOLERANCE, compare

pytestmark = pytest.mark.slow


def test_two_processes_on_every_mesh_of_two_devices(tmp_path):
    kind = "low-rank expert"
    found = compare([2], 2, [kind], tmp_path)[kind]["2"]
    assert set(found) == {"data=2", "fsdp=2", "tensor=2"}
    assert max(found.values()) <= TOLERANCE
