"""What earlier versions wrote still reads, verifies, installs, and computes the same to the bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from composable.interface import RouterInterface
from composable.packaging.manifests.backbone_folder import read_interface
from composable.packaging.project.locking import lock_project
from composable.packaging.project.project import Project
from composable.packaging.project.sync import sync_project
from composable.packaging.registry.locations import open_registry

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FOLDERS = sorted(path for path in HERE.iterdir() if (path / "logits.json").exists())
# With another jax or processor than those that wrote the logits, float32 rounds otherwise.
OTHER_MACHINE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def golden(request, tmp_path):
    """Return a copy of what one version wrote."""
    return Path(shutil.copytree(request.param, tmp_path / "golden"))


def test_something_is_held():
    assert len(FOLDERS) > 0


def test_interfaces_keep_their_digests(golden):
    digests = json.loads((golden / "interfaces" / "digests.json").read_text())
    assert len(digests) > 5
    for name, digest in digests.items():
        text = (golden / "interfaces" / f"{name}.json").read_text()
        assert RouterInterface.from_json(text).digest == digest, name
        again = RouterInterface.from_json(RouterInterface.from_json(text).to_json())
        assert again.digest == digest, name


def test_releases_read_and_verify(golden):
    registry = open_registry(golden / "registry", golden)
    releases = {name: registry.versions(name) for name in registry.names()}
    assert {n: [str(r.version) for r in found] for n, found in releases.items()} == {
        "logic": ["1.0.0", "1.1.0"],
        "sums": ["1.0.0"],
    }
    assert [r.is_yanked for r in releases["logic"]] == [True, False]
    for release in (release for found in releases.values() for release in found):
        assert registry.read_manifest(release).files == release.files


def test_a_lock_stays_as_it_is_and_installs(golden, tmp_path):
    project = Project.read(golden / "project")
    interface = read_interface(golden / "backbone")
    written = project.lock_path.read_bytes()
    lock = lock_project(project, interface)
    assert project.lock_path.read_bytes() == written
    project.lock_path.unlink()
    assert lock_project(project, interface) == lock
    assert project.lock_path.read_bytes() == written
    environment = sync_project(project, interface=interface)
    assert sorted(m.name for m in environment.manifests()) == ["logic", "sums"]
    assert environment.verify() == []


def test_the_same_logits_to_the_bit(golden, tmp_path):
    # In a process of its own: the instruction set is chosen when jax starts.
    command = [sys.executable, "-m", "tests.golden.logits", str(golden), str(tmp_path / "again")]
    subprocess.run(command, check=True, cwd=HERE.parents[1])
    old, new = (
        json.loads(p.read_text()) for p in (golden / "logits.json", tmp_path / "again.json")
    )
    made_by = {name: (old.pop(name), new.pop(name)) for name in ("jax", "machine", "cpu")}
    if all(then == now for then, now in made_by.values()):
        assert new == old
    arrays, again = np.load(golden / "logits.npz"), np.load(tmp_path / "again.npz")
    assert sorted(arrays) == sorted(again)
    for name in arrays:
        np.testing.assert_allclose(again[name], arrays[name], **OTHER_MACHINE, err_msg=name)
