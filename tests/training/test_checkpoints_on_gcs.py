"""Checkpoints on Google Cloud Storage, with a local server in its place; for `make parity`."""

import contextlib
import signal
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from composable.errors import ComposableWarning
from composable.training.checkpoints import Checkpoints
from composable.training.loop import fit
from tests.support.servers import free_port, wait_for
from tests.training.line_program import CFG, objective, parts
from tests.training.test_checkpoints import CFG as SMALL
from tests.training.test_checkpoints import state_of

pytest.importorskip("gcsfs")
pytestmark = [pytest.mark.slow, pytest.mark.parity]

# Google's servers name the generation of what they send, and TensorStore needs it to write a file
# again that it has read. The emulator leaves it out.
SERVER = """
import sys
from gcp_storage_emulator.handlers import objects

send = objects.download

def download(request, response, storage, *rest, **options):
    send(request, response, storage, *rest, **options)
    if response.status in (200, 206):
        names = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]

objects.download = download
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@pytest.fixture(scope="module")
def bucket():
    """Return the address of a folder in a bucket."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", SERVER, str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        # gcsfs, Google's own client, and TensorStore each have a name for the server.
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "project")
        patch.setenv("NO_GCE_CHECK", "true")
        try:
            wait_for(port, server)
            yield "gs://bucket"
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()


def test_a_run_resumes_from_the_bucket_to_the_bit(bucket, tmp_path):
    whole = fit(objective, *parts(), CFG)

    class StopError(Exception):
        pass

    def stop(step, *_):
        if step == CFG.checkpoint_every + 1:
            raise StopError

    home = f"{bucket}/line/checkpoints"
    with contextlib.suppress(StopError):
        fit(objective, *parts(), CFG, directory=tmp_path / "one", checkpoints=home, progress=stop)
    # Another host, with nothing but the bucket.
    seen = []
    resumed = fit(
        objective,
        *parts(),
        CFG,
        directory=tmp_path / "two",
        checkpoints=home,
        progress=lambda step, *_: seen.append(step),
    )
    assert seen == list(range(CFG.checkpoint_every + 1, CFG.steps + 1))
    for name, array in whole.trained.items():
        np.testing.assert_array_equal(resumed.trained[name], array)
    assert not (tmp_path / "two" / "checkpoints").exists()


def test_a_damaged_checkpoint_in_the_bucket_is_passed_over(bucket):
    home = f"{bucket}/damaged"
    with Checkpoints(home, SMALL) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, *state_of(step), {"position": step})
    with Checkpoints(home, SMALL) as checkpoints:
        assert sorted(checkpoints._manager.all_steps()) == [2, 3]
        storage = fsspec.filesystem("gcs")
        sizes = storage.du(f"{home}/3/arrays", total=False)
        largest = max(sizes, key=sizes.__getitem__)
        storage.pipe_file(largest, bytes(sizes[largest]))
        with pytest.warns(ComposableWarning, match="step 3 is damaged .*; resuming from step 2"):
            found = checkpoints.restore(*state_of(99))
    assert (found.step, found.data_state) == (2, {"position": 2})
    np.testing.assert_array_equal(found.trained["w"][...], state_of(2)[0]["w"][...])
