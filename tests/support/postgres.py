"""A PostgreSQL server on loopback, with its data in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers import free_port, require, wait_for


def find_program(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs; Debian does not have them in the PATH."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join(map(str, homes))) or shutil.which(name)


@contextlib.contextmanager
def run_postgres(home: Path) -> Iterator[str]:
    """Run a server; yield the URL of an empty database."""
    initdb, postgres = find_program("initdb"), find_program("postgres")
    require(initdb is not None and postgres is not None, "PostgreSQL")
    # It refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    home.mkdir(parents=True, exist_ok=True)
    if user is not None:
        owner = pwd.getpwnam(user)
        os.chown(home, owner.pw_uid, owner.pw_gid)
        for folder in (home, *home.parents):
            if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
    data = home / "data"
    subprocess.run(
        [str(initdb), "-D", str(data), "-U", "composable", "-A", "trust", "--no-sync"],
        check=True,
        stdout=subprocess.DEVNULL,
        user=user,
        cwd=home,
    )
    port = free_port()
    settings = ["-h", "127.0.0.1", "-p", str(port), "-k", str(home), "-c", "fsync=off"]
    process = subprocess.Popen(
        [str(postgres), "-D", str(data), *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=user,
        cwd=home,
    )
    try:
        wait_for(port, process)
        _wait_until_ready(port)
        yield f"postgresql://composable@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(port: int) -> None:
    ready = find_program("pg_isready")
    for _ in range(300):
        run = subprocess.run([str(ready), "-q", "-h", "127.0.0.1", "-p", str(port)], check=False)
        if run.returncode == 0:
            return
    raise RuntimeError("PostgreSQL did not start")
