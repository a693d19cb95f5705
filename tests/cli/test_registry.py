"""Commands of a registry server: run it as a process, publish to it, administer it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.registries import fetch
from tests.support.servers import free_port, wait_for


@pytest.fixture
def licensed(fakes):
    """Return the folder of a vetted expert with a licence."""
    folder = fakes.write("german")
    path = folder / "expert.toml"
    path.write_text(path.read_text().replace("[expert]\n", '[expert]\nlicense = "MIT"\n'))
    return folder


def test_a_server_from_its_first_account_to_a_backup(cli, works, licensed, tmp_path, monkeypatch):
    root = tmp_path / "served"
    token = works("registry", "account", "ann", root).out.strip()
    assert works("registry", "backbone", "tiny-bytes", root).out.startswith("added tiny-bytes ")
    assert cli("registry", "account", "ann", root).code == 1
    port = free_port()
    command = [sys.executable, "-m", "composable.cli", "registry", "serve", str(root)]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        wait_for(port, process)
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("COMPOSABLE_TOKEN_PUBLISH", token)
        monkeypatch.setenv("COMPOSABLE_ORIGIN_PUBLISH", url)
        works("publish", licensed, "--registry", url)
        works("yank", "german@1.0.0", "--registry", url, "--reason", "too small")
        status, data, _ = fetch(f"{url}/api/v1/packages/german/1.0.0")
        assert (status, b'"reason":"too small"' in data) == (200, True)
        works("unyank", "german@1.0.0", "--registry", url)
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read().decode()
        # uvicorn ends with the signal that it was stopped by.
        assert process.wait() in (0, -signal.SIGTERM)
    assert '"message": "request"' in log
    assert token not in log
    assert works("registry", "audit", root, "--json").json["entries"] == 7
    tokens = works("registry", "tokens", "ann", root, "--revoke", 1, "--json").json
    assert tokens[0]["revoked"] is not None
    counts = works("registry", "backup", tmp_path / "backup", root, "--json").json
    restored = works("registry", "restore", tmp_path / "backup", tmp_path / "new", "--json").json
    assert restored == counts == {"rows": counts["rows"], "blobs": 4}
    assert (Path(tmp_path) / "backup" / "database.jsonl").is_file()


def test_a_mirror_goes_to_a_disk_and_from_there(works, cli, make_fakes, tmp_path):
    """Two commands serve a site without a network."""
    fakes = make_fakes("registry")
    fakes.publish("german")
    fakes.publish("physics", seed=1)
    works("yank", "physics@1.0.0", "--registry", "registry")
    first = works("registry", "mirror", "registry", "disk", "--json").json
    assert [(row["name"], row["version"]) for row in first["copied"]] == [
        ("german", "1.0.0"),
        ("physics", "1.0.0"),
    ]
    assert (first["present"], first["yanked"], first["missing"]) == (0, ["physics@1.0.0"], [])
    inside = works("registry", "mirror", "disk", "inside")
    assert inside.out.startswith("copied 2 releases, ")
    assert "1 yanked" in inside.out
    again = works("registry", "mirror", "disk", "inside", "--quiet", "--check")
    assert (again.out, again.err) == ("", "")
    works("init", "--registry", "inside")
    works("install", "german")
    works("registry", "mirror", "registry", "some", "--only", "german", "--latest", "--quiet")
    assert [path.name for path in (tmp_path / "some" / "index").glob("*/*")] == ["german.jsonl"]
    refused = cli("registry", "mirror", "disk", "http://127.0.0.1:1")
    assert refused.code == 1
    assert "composable registry import disk" in refused.err
