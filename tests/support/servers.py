"""Real servers on loopback: nginx over a folder, an S3 endpoint, and a wire that breaks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NGINX_CONF = """
daemon off; pid {home}/pid; error_log {home}/error.log; user {user};
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  log_format plain '$request_method $uri $status $body_bytes_sent $http_range';
  sendfile on; gzip on; gzip_types application/json application/octet-stream;
  server {{
    listen 127.0.0.1:{port}; root {root}; access_log {home}/access.log plain;
    location /private/ {{
      if ($http_authorization != "Bearer open-sesame") {{ return 401; }}
      alias {root}/;
    }}
    location /moved/ {{ return 302 http://localhost:{port}/private/; }}
    location /busy/ {{ return 503; }}
  }}
}}
"""


@dataclass(frozen=True)
class Asked:
    """One request as nginx logged it."""

    path: str
    status: int
    sent: int
    range: str


@dataclass(frozen=True)
class Nginx:
    """A running nginx that serves a folder."""

    url: str
    home: Path

    def asked(self) -> list[Asked]:
        """Return the requests so far."""
        time.sleep(0.05)  # nginx logs after it has answered
        rows = (line.split(" ") for line in (self.home / "access.log").read_text().splitlines())
        return [Asked(row[1], int(row[2]), int(row[3]), row[4]) for row in rows]

    def forget(self) -> None:
        """Empty the log."""
        time.sleep(0.05)
        (self.home / "access.log").write_text("")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def require(found: bool, what: str) -> None:
    """Skip a test without a program that it needs; on CI, where all are installed, fail."""
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is not installed")


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args} did not start")


@contextlib.contextmanager
def run_nginx(root: Path, home: Path) -> Iterator[Nginx]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    require(program is not None, "nginx")
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    user = "root" if os.geteuid() == 0 else "nobody"
    conf = home / "nginx.conf"
    conf.write_text(NGINX_CONF.format(home=home, root=root, port=port, user=user))
    process = subprocess.Popen([str(program), "-c", str(conf)], stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield Nginx(f"http://127.0.0.1:{port}", home)
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def run_s3() -> Iterator[dict[str, str]]:
    """Run a local S3 endpoint with a bucket `experts`; yield the environment that points to it."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        endpoint = f"http://127.0.0.1:{port}"
        request = urllib.request.Request(f"{endpoint}/experts", method="PUT")
        urllib.request.urlopen(request).close()
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
    finally:
        process.terminate()
        process.wait()


class BreakingWire:
    """A relay to a server that closes each connection after some bytes of answer.

    Args:
        port: Of the server.
        cuts: Bytes after which each further connection is cut; the ones after the last are whole.
    """

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._target = port
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            limit = self._cuts.pop(0) if self._cuts else None
            threading.Thread(target=self._relay, args=(client, limit), daemon=True).start()

    def _relay(self, client: socket.socket, limit: int | None) -> None:
        server = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=self._forward, args=(client, server, None), daemon=True).start()
        self._forward(server, client, limit)

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket, limit: int | None) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if limit is not None and sent + len(data) >= limit:
                    target.sendall(data[: limit - sent])
                    break
                target.sendall(data)
                sent += len(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
