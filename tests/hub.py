"""A stand-in of the Hugging Face hub on this machine: the part of its API that pushing and fetching use."""

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

TOKEN = "hf_of_the_tests"
READ_TOKEN = "hf_that_only_reads"

Files = dict[str, bytes]


@dataclass
class Repository:
    """Its commits, oldest first, and names of them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files) -> str:
        """Add a commit on main; returns its id."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        self.refs["main"] = digest
        return digest

    def find_commit(self, revision: str) -> str | None:
        """The id of a branch, a tag or a commit."""
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None

    @property
    def files(self) -> Files:
        """Those of main."""
        return self.commits[self.refs["main"]]


@dataclass
class Hub:
    """A hub that listens; tests look into it."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""

    def add(self, name: str, files: Files, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit({".gitattributes": b"", **files})
        return repository


class _Answer(Exception):
    """Ends a request, well or badly."""

    def __init__(
        self, status: int, body: object = None, code: str = "", message: str = "", **headers: str
    ) -> None:
        self.status, self.body = status, body
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            self._route(path)
        except _Answer as answer:
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for header, value in {**answer.headers, "Content-Length": str(len(content))}.items():
                if value:
                    self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _route(self, path: str) -> None:
        name = r"([\w.-]+/[\w.-]+)"
        for pattern, answer in (
            ("/api/repos/create", self._create),
            ("/api/validate-yaml", self._validate),
            (f"/api/models/{name}/preupload/(.+)", self._preupload),
            (f"/api/models/{name}/commit/(.+)", self._commit),
            (f"/api/models/{name}/tree/(.+)", self._list),
            (f"/api/models/{name}/revision/(.+)", self._describe),
            (f"/api/models/{name}", self._describe),
            (rf"/{name}\.git/info/lfs/objects/batch", self._offer_upload),
            (r"/blobs/(\w+)", self._store),
            (f"/{name}/resolve/([^/]+)/(.+)", self._send_file),
        ):
            if match := re.fullmatch(pattern, path):
                answer(*match.groups())
        raise _Answer(404)

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _check_writes(self) -> None:
        if self._token not in (TOKEN, READ_TOKEN):
            raise _Answer(
                401, {"error": "Invalid username or password."}, message="Invalid username or password."
            )
        if self._token != TOKEN:
            raise _Answer(403, {"error": "no rights"}, message="You don't have the rights to do this")

    def _find(self, name: str, revision: str = "main") -> tuple[Repository, str]:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._token):
            raise _Answer(404 if self._token else 401, {"error": "Repository not found"}, "RepoNotFound")
        if (commit := repository.find_commit(revision)) is None:
            raise _Answer(404, {"error": "Invalid rev id"}, "RevisionNotFound", "Invalid rev id")
        return repository, commit

    def _create(self) -> None:
        self._check_writes()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            raise _Answer(409, {"error": "You already created this model repo", "url": self._url(name)})
        self.hub.add(name, {}, asked.get("visibility") == "private")
        raise _Answer(200, {"url": self._url(name), "name": name, "id": name})

    def _url(self, name: str) -> str:
        return f"{self.hub.address}/{name}"

    def _validate(self) -> None:
        raise _Answer(200, {"errors": [], "warnings": []})

    def _describe(self, name: str, revision: str = "main") -> None:
        repository, commit = self._find(name, revision)
        files = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        raise _Answer(
            200,
            {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": files},
        )

    def _list(self, name: str, revision: str) -> None:
        repository, commit = self._find(name, revision)
        entries = []
        for path, content in sorted(repository.commits[commit].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _hash_blob(content)}
            if _is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        raise _Answer(200, entries)

    def _preupload(self, name: str, revision: str) -> None:
        self._check_writes()
        self._find(name, revision)
        paths = [entry["path"] for entry in json.loads(self.body)["files"]]
        modes = [
            {"path": path, "uploadMode": "lfs" if _is_large(path) else "regular", "shouldIgnore": False}
            for path in paths
        ]
        raise _Answer(200, {"files": modes})

    def _offer_upload(self, name: str) -> None:
        self._check_writes()
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.address}/blobs/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.hub.blobs else {**wanted, "actions": upload})
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.blobs[digest] = self.body
        raise _Answer(200)

    def _commit(self, name: str, revision: str) -> None:
        self._check_writes()
        repository, parent = self._find(name, revision)
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        raise _Answer(200, {"commitUrl": f"{self._url(name)}/commit/{commit}", "commitOid": commit})

    def _send_file(self, name: str, revision: str, path: str) -> None:
        repository, commit = self._find(name, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise _Answer(404, {"error": "Entry not found"}, "EntryNotFound")
        digest = hashlib.sha256(content).hexdigest() if _is_large(path) else _hash_blob(content)
        raise _Answer(200, content, **{"X-Repo-Commit": commit, "ETag": f'"{digest}"'})


def _hash_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


@contextmanager
def listen() -> Iterator[Hub]:
    """A hub at an address of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
