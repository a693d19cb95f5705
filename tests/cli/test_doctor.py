import json

import jax
from typer.testing import CliRunner

from composable.cli.app import app


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_it_reports_what_a_run_would_use():
    done = run("--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["jax"] == jax.__version__
    assert report["devices"] == "1 x cpu (cpu)"
    assert report["processes"] == "1, this is 0"
    assert report["mesh"] == "data=1, fsdp=1, tensor=1, expert=1"
    assert report["attention"].startswith("blocks of queries")
    assert report["expert bodies"].startswith("loop_blocks")
    assert len(run().stdout.splitlines()) == len(report)


def test_a_mesh_that_does_not_fit_is_refused():
    done = run("--mesh", "fsdp=2")
    assert done.exit_code == 1
    assert "meshes that fit: data=1" in done.output
