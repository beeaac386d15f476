"""A stand-in for the Hugging Face hub: as much of its HTTP interface as pushing and pulling a repository takes.

Repositories are in memory. One that is private is there only for who sends :data:`TOKEN`. Tensors go by the protocol
for large files, everything else in the commit itself, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_standin"


@dataclass
class Repository:
    """A repository with one branch. ``commits``: of each, its files by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""
    message: str = ""

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        self.head = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[self.head] = files
        self.message = message
        return self.head


class StandIn(ThreadingHTTPServer):
    """The server. ``repositories`` by name; ``requests``: method and path of everything that was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        self.repositories[name] = Repository(private)
        self.repositories[name].commit({".gitattributes": b"", **files})
        return self.repositories[name]


@contextmanager
def running() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                handle(self, *match.groups())
                return
        self._send(404, {"error": f"no such route: {self.command} {path}"})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _found(self, name: str) -> Repository | None:
        """The repository, where it is there for who asks."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self._may):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _writable(self, name: str) -> Repository | None:
        if not self._may:
            self._send(401, {"error": "Invalid username or password."})
            return None
        return self._found(name)

    def _at(self, repository: Repository, revision: str) -> str | None:
        commit = repository.head if revision == "main" else revision
        if commit in repository.commits:
            return commit
        self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def create(self) -> None:
        if not self._may:
            self._send(401, {"error": "Invalid username or password."})
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repositories:
            self._send(409, {"error": "You already created this model repo"})
            return
        # Releases of the client say it in one way or the other.
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.put(name, {}, private)
        self._send(200, {"url": f"{self.server.url}/{name}", "name": name})

    def validate(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self._found(name)
        commit = repository and self._at(repository, revision or "main")
        if repository and commit:
            files = [{"rfilename": file} for file in repository.commits[commit]]
            told = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": files}
            self._send(200, {**told, "cardData": _metadata(repository.commits[commit])})

    def tree(self, name: str, revision: str) -> None:
        repository = self._found(name)
        commit = repository and self._at(repository, revision)
        if repository and commit:
            self._send(200, [_entry(path, data) for path, data in repository.commits[commit].items()])

    def folder(self, *_: str) -> None:
        self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def preupload(self, name: str, _: str) -> None:
        if self._writable(name):
            files = [
                {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(self.body)["files"]
            ]
            self._send(200, {"files": files})

    def batch(self, name: str) -> None:
        if self._writable(name):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}", "header": {}}}}
                for each in json.loads(self.body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self._send(200, {})

    def commit(self, name: str, _: str) -> None:
        repository = self._writable(name)
        if not repository:
            return
        files, message = dict(repository.files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, message)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._send(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._found(name)
        commit = repository and self._at(repository, revision)
        if not repository or not commit:
            return
        data = repository.commits[commit].get(path)
        if data is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit})


def _metadata(files: dict[str, bytes]) -> dict[str, Any]:
    head = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
    return yaml.safe_load(head[1]) if head else {}


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if _mode(path) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), rf"/api/models/{NAME}", _Handler.info),
    (("GET",), rf"/api/models/{NAME}/revision/([^/]+)", _Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    (("GET",), rf"/api/models/{NAME}/tree/([^/]+)/.+", _Handler.folder),
    (("POST",), rf"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/large/([0-9a-f]{64})", _Handler.upload),
    (("POST",), rf"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    (("GET", "HEAD"), rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
