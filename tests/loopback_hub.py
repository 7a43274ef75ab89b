"""A replacement of the Hugging Face Hub on the loopback interface: what its client needs to fetch and commit files.

Tests get it as the fixture `hub`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
COMMIT = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")
LFS = re.compile(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
INFO = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+?)(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/?]+)")


@dataclass
class Repo:
    """Files by name; a gate that only some tokens pass; branches and tags by commit; files that are sent wrongly.

    Those in ``cut`` end early, those in ``changed`` have other bytes, those in ``dribbled`` come byte by byte.
    """

    files: dict[str, bytes]
    gated: bool = False
    allowed: tuple[str, ...] = ()
    revisions: dict[str, str] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    dribbled: set[str] = field(default_factory=set)
    private: bool | None = None

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
    """The server; ``requests`` are those it received, as ("GET", "org/name", "file")."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.status: int | None = None  # of all answers
        self.delay_s = 0.0  # before an answer
        self.hung_up = 0  # answers that the client did not wait for
        self.writers: dict[str, tuple[str, ...]] = {}  # tokens that may write, by account or organisation
        self.uploads: dict[str, bytes] = {}  # large files before their commit, by hash
        self.commits: list[tuple[str, str]] = []  # repository and message
        self.refused: str | None = None  # the request that fails: "preupload", "upload", "commit"
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
    disable_nagle_algorithm = True  # else a body waits for the client's delayed acknowledgement of the headers
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path).partition("?")[0]
        self.hub.requests.append(("POST", "", path))
        time.sleep(self.hub.delay_s)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        wanted = COMMIT.fullmatch(path) or LFS.fullmatch(path)
        if self.hub.status is not None:
            self.reply(self.hub.status)
        elif path == "/api/repos/create":
            self.create(json.loads(content), token)
        elif wanted is None:
            self.reply(200, b'{"warnings": [], "errors": []}')
        elif token not in self.hub.writers.get(wanted["name"].partition("/")[0], ()):
            self.refuse(403, "")
        elif wanted.groupdict().get("what") == "commit":
            self.commit(wanted["name"], content.decode())
        elif wanted.groupdict().get("what") == "preupload":
            self.reply_modes(json.loads(content))
        else:
            self.reply_locations(json.loads(content))

    def create(self, wanted: dict[str, object], token: str) -> None:
        account = str(wanted["organization"])
        name = f"{account}/{wanted['name']}"
        if token not in self.hub.writers.get(account, ()):
            self.refuse(403 if token else 401, "")
        elif name in self.hub.repos:
            self.reply(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"  # older and newer clients
            self.hub.add(name, {".gitattributes": b""}, private=private)
            self.reply(200, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())

    def reply_modes(self, wanted: dict[str, list[dict[str, object]]]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if str(file["path"]).endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        self.reply(503 if self.hub.refused == "preupload" else 200, json.dumps({"files": files}).encode())

    def reply_locations(self, wanted: dict[str, list[dict[str, object]]]) -> None:
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.hub.url}/upload/{file['oid']}", "header": {}}}}
            for file in wanted["objects"]
        ]
        self.reply(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(("PUT", "", self.path))
        if self.hub.refused == "upload":
            self.reply(403)
            return
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.hub.uploads[self.path.rpartition("/")[2]] = content
        self.reply(200)

    def commit(self, name: str, content: str) -> None:
        if self.hub.refused == "commit":
            self.reply(400, b'{"error": "no"}')
            return
        repo = self.hub.repos[name]
        for line in map(json.loads, content.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "header":
                self.hub.commits.append((name, value["summary"]))
            elif kind == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                repo.files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                assert kind == "deletedFile"
                del repo.files[value["path"]]
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.commit}", "commitOid": repo.commit}
        self.reply(200, json.dumps({"success": True, **answer}).encode())

    def answer(self) -> None:
        path = unquote(self.path)
        wanted = FILE.fullmatch(path) or TREE.match(path) or INFO.fullmatch(path)
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
        elif not repo.knows(wanted["revision"] or "main"):
            self.refuse(404, "RevisionNotFound")
        elif INFO.fullmatch(path):
            self.reply(200, json.dumps({"id": name, "sha": repo.commit}).encode())
        elif not file:
            self.reply(200, json.dumps([self.entry(repo, path) for path in sorted(repo.files)]).encode())
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
        elif file in repo.dribbled and self.command == "GET":
            self.dribble(content, headers)
        else:
            self.reply(200, content[::-1] if file in repo.changed else content, headers)

    def dribble(self, content: bytes, headers: dict[str, str]) -> None:
        self.reply(200, b"", headers, length=len(content))
        try:
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:  # the client has given up
            self.hub.hung_up += 1
        self.close_connection = True

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
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()
