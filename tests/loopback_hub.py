"""A stand-in for the Hugging Face Hub on the loopback interface: what its client needs to fetch files, no more.

`tests/conftest.py` loads it by its path, as test modules cannot import each other.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
TREE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/?]+)")


@dataclass
class Repo:
    """Files by name; a gate that only some tokens pass; branches and tags by commit; files cut off on their way."""

    files: dict[str, bytes]
    gated: bool = False
    allowed: tuple[str, ...] = ()
    revisions: dict[str, str] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def knows(self, revision: str) -> bool:
        return revision in ("main", self.commit, *self.revisions, *self.revisions.values())

    def commit_of(self, revision: str) -> str:
        return self.revisions.get(revision, revision if revision in self.revisions.values() else self.commit)


class LoopbackHub:
    """The server; ``requests`` holds what was asked of it as ("GET", "org/name", "file")."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.status: int | None = None  # that everything is answered with
        self.delay_s = 0.0  # before every answer
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def add(self, name: str, files: dict[str, bytes], **settings: object) -> Repo:
        self.repos[name] = Repo(dict(files), **settings)
        return self.repos[name]

    def got(self, method: str = "GET") -> list[str]:
        """Files asked for by a method, in order."""
        return [file for verb, _, file in self.requests if verb == method]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(self.path)
        wanted = FILE.fullmatch(path) or TREE.match(path)
        name, file = (wanted["name"], wanted.groupdict().get("file", "")) if wanted else ("", path)
        self.hub.requests.append((self.command, name, file))
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        time.sleep(self.hub.delay_s)
        if self.hub.status is not None:
            self.reply(self.hub.status)
        elif wanted is None:
            self.reply(200, b"{}")
        elif repo is None:
            self.refuse(404 if token else 401, "RepoNotFound")
        elif not repo.knows(wanted["revision"]):
            self.refuse(404, "RevisionNotFound")
        elif not file:
            self.reply(200, json.dumps([self.entry(repo, each) for each in sorted(repo.files)]).encode())
        elif repo.gated and token not in repo.allowed:
            self.refuse(403 if token else 401, "GatedRepo")
        else:
            self.send_file(repo, repo.commit_of(wanted["revision"]), file)

    def entry(self, repo: Repo, file: str) -> dict[str, object]:
        return {"type": "file", "path": file, "size": len(repo.files[file]), "oid": "0" * 40}

    def send_file(self, repo: Repo, commit: str, file: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if file not in repo.files:
            self.refuse(404, "EntryNotFound", headers)
            return
        content = repo.files[file]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if file in repo.cut and self.command == "GET":
            self.reply(200, content[: len(content) // 2], headers, length=len(content))
            self.close_connection = True
        else:
            self.reply(200, content, headers)

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def reply(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()
