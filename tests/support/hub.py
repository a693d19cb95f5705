"""A Hugging Face Hub on loopback: the part of its HTTP API that publishing and reading use.

Files are kept by commit. Large ones go to a second server, as to the Hub's storage, which must not
see a token. Answers follow those of the real Hub as `huggingface_hub` reads them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE_BYTES = 1000
_REPOSITORY = r"/([\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    """A commit of a repository.

    Args:
        oid: Its name.
        message: Its message.
        files: Content by path.
    """

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """The state of a Hub.

    Args:
        token: The token that may read and write.
        url: Where it is.
        storage_url: Where its large files are.
        commits: Commits of each repository, the oldest first.
        large: Large files by SHA-256.
        asked: Method, path and token of each request.
        stored: The same of each request to the storage of large files.
        before_commit: Called before a commit is made.
        change_file: Called with the path and the content of each file that is sent.
    """

    token: str
    url: str = ""
    storage_url: str = ""
    commits: dict[str, list[Commit]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    stored: list[tuple[str, str, str]] = field(default_factory=list)
    before_commit: Callable[[], None] = lambda: None
    change_file: Callable[[str, bytes], bytes] = lambda path, data: data

    def files(self, repository: str) -> dict[str, bytes]:
        """Return the newest files of a repository."""
        return self.commits[repository][-1].files

    def commit(self, repository: str, message: str, files: dict[str, bytes]) -> str:
        """Add a commit; return its name."""
        made = self.commits.setdefault(repository, [])
        oid = hashlib.sha1(f"{repository} {len(made)} {message}".encode()).hexdigest()
        made.append(Commit(oid, message, files))
        return oid

    def find(self, repository: str, revision: str) -> Commit | None:
        """Return the commit of a revision."""
        made = self.commits.get(repository, [])
        if revision == "main":
            return made[-1] if made else None
        return next((commit for commit in made if commit.oid == revision), None)


@contextlib.contextmanager
def run_hub(token: str = "hf_secret") -> Iterator[Hub]:
    """Run a Hub."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(
            self, status: int, data: bytes = b"", kind: str = "application/json", **headers: str
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def answer_json(self, found: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(found).encode())

        def answer_file(self, data: bytes, tag: str) -> None:
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            headers = {"ETag": f'"{tag}"', "Accept_Ranges": "bytes"}
            if self.headers.get("If-None-Match") == f'"{tag}"':
                self.answer(304, ETag=f'"{tag}"')
            elif start:
                at = int(start[1])
                headers["Content_Range"] = f"bytes {at}-{len(data) - 1}/{len(data)}"
                self.answer(206, data[at:], "application/octet-stream", **headers)
            else:
                self.answer(200, data, "application/octet-stream", **headers)

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            login = self.headers.get("Authorization", "")
            parts = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(parts.path)
            self.handle_request(path, body, login)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def handle_request(self, path: str, body: bytes, login: str) -> None:
            raise NotImplementedError

    class Storage(Handler):
        def handle_request(self, path: str, body: bytes, login: str) -> None:
            hub.stored.append((self.command, path, login))
            oid = path.rpartition("/")[2]
            if self.command == "PUT":
                hub.large[hashlib.sha256(body).hexdigest()] = body
                self.answer(200)
            else:
                self.answer_file(hub.change_file(path, hub.large[oid]), oid)

    class Api(Handler):
        def handle_request(self, path: str, body: bytes, login: str) -> None:
            hub.asked.append((self.command, path, login))
            if login not in ("", f"Bearer {hub.token}"):
                self.answer(401, b'{"error":"Invalid credentials"}')
                return
            for pattern, act in ROUTES.items():
                if found := re.fullmatch(pattern, path):
                    if self.command == "POST" and not login:
                        self.answer(401, b'{"error":"Log in"}')
                        return
                    act(self, body, *found.groups())
                    return
            self.answer(404)

        def missing(self, code: str) -> None:
            self.answer(404, json.dumps({"error": code}).encode(), X_Error_Code=code)

        def info(self, _: bytes, repository: str, revision: str) -> None:
            commit = hub.find(repository, revision)
            if commit is None:
                self.missing("RepoNotFound")
            else:
                self.answer_json({"id": repository, "modelId": repository, "sha": commit.oid})

        def tree(self, _: bytes, repository: str, revision: str, folder: str) -> None:
            commit = hub.find(repository, revision)
            assert commit is not None
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            rows: dict[str, Any] = {}
            for path, data in commit.files.items():
                if not path.startswith(f"{folder}/"):
                    continue
                rest = path.removeprefix(f"{folder}/")
                if "/" in rest and query.get("recursive", "").lower() != "true":
                    name = f"{folder}/{rest.partition('/')[0]}"
                    rows[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                else:
                    oid = hashlib.sha1(data).hexdigest()
                    rows[path] = {"type": "file", "path": path, "oid": oid, "size": len(data)}
            if rows:
                self.answer_json([*rows.values()])
            else:
                self.missing("EntryNotFound")

        def resolve(self, _: bytes, repository: str, revision: str, path: str) -> None:
            commit = hub.find(repository, revision)
            if commit is None or path not in commit.files:
                self.missing("EntryNotFound" if commit else "RepoNotFound")
                return
            data = commit.files[path]
            oid = hashlib.sha256(data).hexdigest()
            if oid in hub.large:
                self.answer(302, Location=f"{hub.storage_url}/{oid}", X_Linked_Size=str(len(data)))
            else:
                self.answer_file(hub.change_file(path, data), oid)

        def create(self, body: bytes) -> None:
            fields = json.loads(body)
            repository = f"{fields['organization']}/{fields['name']}"
            assert fields.get("private") or fields.get("visibility") == "private"
            hub.commit(repository, "initial commit", {".gitattributes": b""})
            self.answer_json({"url": f"{hub.url}/{repository}", "name": repository})

        def check_card(self, body: bytes) -> None:
            assert json.loads(body)["content"].startswith("---\n")
            self.answer_json({"errors": [], "warnings": []})

        def preupload(self, body: bytes, _: str, __: str) -> None:
            files = [
                {
                    "path": row["path"],
                    "uploadMode": "lfs" if row["size"] > LARGE_BYTES else "regular",
                    "shouldIgnore": False,
                }
                for row in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})

        def batch(self, body: bytes, _: str) -> None:
            objects = []
            for row in json.loads(body)["objects"]:
                found = {"oid": row["oid"], "size": row["size"]}
                if row["oid"] not in hub.large:
                    href = f"{hub.storage_url}/{row['oid']}"
                    found["actions"] = {"upload": {"href": href, "header": {}}}
                objects.append(found)
            self.answer_json({"transfer": "basic", "objects": objects})

        def make_commit(self, body: bytes, repository: str, _: str) -> None:
            hub.before_commit()
            rows = [json.loads(line) for line in body.splitlines()]
            head = rows[0]["value"]
            newest = hub.commits[repository][-1]
            if head.get("parentCommit") not in (None, newest.oid):
                self.answer_json({"error": "A commit has happened since"}, 412)
                return
            files = dict(newest.files)
            for row in rows[1:]:
                value = row["value"]
                if row["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                else:
                    del files[value["path"]]
            oid = hub.commit(repository, head["summary"], files)
            url = f"{hub.url}/{repository}/commit/{oid}"
            self.answer_json({"commitUrl": url, "commitOid": oid, "success": True})

    ROUTES: dict[str, Any] = {
        rf"/api/models{_REPOSITORY}/revision/([^/]+)": Api.info,
        rf"/api/models{_REPOSITORY}/tree/([^/]+)/(.+)": Api.tree,
        rf"/api/models{_REPOSITORY}/preupload/([^/]+)": Api.preupload,
        rf"/api/models{_REPOSITORY}/commit/([^/]+)": Api.make_commit,
        r"/api/repos/create": Api.create,
        r"/api/validate-yaml": Api.check_card,
        rf"{_REPOSITORY}\.git/info/lfs/objects/batch": Api.batch,
        rf"{_REPOSITORY}/resolve/([^/]+)/(.+)": Api.resolve,
    }
    with _run(Api) as port, _run(Storage) as storage_port:
        hub.url, hub.storage_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{storage_port}"
        yield hub


@contextlib.contextmanager
def _run(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
