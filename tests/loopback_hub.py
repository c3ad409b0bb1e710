"""A real HTTP Hub on 127.0.0.1, in memory: what push, download and from_pretrained call, with faults on demand.

Run it by hand with ``python tests/loopback_hub.py --port 8765`` and follow what it prints, or use :func:`running`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, ORG = "tester", "org"
WRITE_TOKEN, READ_TOKEN = "hf_loopback-write", "hf_loopback-read"  # a dash: no real token has one
LFS_SUFFIXES = {".safetensors", ".bin", ".model", ".png"}
LFS_FROM = 10 * 1024 * 1024
NOW = "2026-11-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """One file at one commit; ``listed`` is a digest that the listing shows instead of the true one."""

    content: bytes
    lfs: bool
    listed: str = ""

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    """A repository: the files of each commit, and refs (branches and pull requests) that name commits."""

    name: str
    private: bool
    gated: str | bool = False
    pulls: list[tuple[int, str]] = field(default_factory=list)  # open pull requests: number and title
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob]) -> str:
        seed = [self.name, ref, len(self.commits), sorted((name, blob.oid) for name, blob in files.items())]
        oid = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def at(self, revision: str = "main") -> str:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.at(revision)]


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The state of the server and what a test may look at or change.

    Attributes:
        calls: how often each kind of call arrived (the names of :data:`ROUTES`); ``log`` has them in their order.
        granted: tokens that may read gated repositories.
        after_commit: called with the repository and its new commit before the answer leaves.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.granted = {WRITE_TOKEN}
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.after_commit: Callable[[Repo, str], None] | None = None
        self.lock = threading.RLock()
        self.faults: list[tuple[str, int, str]] = []

    def fail(self, kind: str, nth: int, action: str) -> None:
        """Let the nth call of a kind, counted from now, fail.

        ``action``: an HTTP status ("500"), "reset" (the connection is reset while the request is sent), "drop" (it
        closes before the call has an effect), "lost" (the call has its effect, but its answer never arrives) or "slow"
        (the request is read, and its answer sent, in small pieces).
        """
        with self.lock:
            self.faults.append((kind, self.calls[kind] + nth, action))

    def fault_of(self, kind: str) -> str | None:
        with self.lock:
            self.calls[kind] += 1
            self.log.append(kind)
            fired = [fault for fault in self.faults if fault[:2] == (kind, self.calls[kind])]
            self.faults = [fault for fault in self.faults if fault not in fired]
            return fired[0][2] if fired else None


@dataclass
class Call:
    """One request: path parameters, query, headers and body; ``role`` is None without a token."""

    hub: Hub
    args: dict[str, str]
    query: dict[str, list[str]]
    body: bytes
    role: str | None
    base: str
    token: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"null")

    @property
    def repo(self) -> Repo:
        repo = self.hub.repos.get(self.args["id"])
        if repo is None or (repo.private and self.role is None):
            raise Refused(404 if self.role else 401, "Repository not found", "RepoNotFound")
        return repo

    @property
    def revision(self) -> str:
        return unquote(self.args.get("rev") or "main")

    def must_write(self) -> None:
        if self.role != "write":
            raise Refused(403 if self.role else 401, "You need write access")


@dataclass
class Answer:
    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def whoami(call: Call) -> Any:
    if call.role is None:
        raise Refused(401, "Invalid credentials in Authorization header")
    auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": call.role}}
    return {"type": "user", "name": USER, "orgs": [{"name": ORG, "type": "org"}], "auth": auth}


def create_repo(call: Call) -> Any:
    call.must_write()
    name = f"{call.json.get('organization') or USER}/{call.json['name']}"
    if name.split("/")[0] not in (USER, ORG):
        raise Refused(403, f"You don't have the rights to create a model under {name.split('/')[0]}")
    url = {"url": f"{call.base}/{name}", "name": name}
    if name in call.hub.repos:
        return Answer({**url, "error": "You already created this model repo"}, 409)
    repo = call.hub.repos[name] = Repo(name, call.json.get("visibility") == "private" or bool(call.json.get("private")))
    repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs\n", False)})
    return url


def info(call: Call) -> Any:
    """As the Hub does, what it shows of a model comes from the metadata of its card."""
    repo, sha = call.repo, call.repo.at(call.revision)
    files = repo.files(sha)
    card = files["README.md"].content.decode() if "README.md" in files else ""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(block[1]) if block else {}
    index = {"model-index": data.pop("model-index")} if "model-index" in data else {}
    tags = [*data.get("tags", []), *(f"license:{data['license']}" for _ in range("license" in data))]
    shown = {"cardData": data, "tags": tags, "pipeline_tag": data.get("pipeline_tag"), **index}
    siblings = [{"rfilename": name} for name in sorted(files)]
    rest = {"downloads": 0, "likes": 0, "createdAt": NOW, "lastModified": NOW, "gated": repo.gated}
    return {"id": repo.name, "sha": sha, "private": repo.private, "siblings": siblings, **shown, **rest}


def settings(call: Call) -> Any:
    call.must_write()
    if "gated" in call.json:
        call.repo.gated = call.json["gated"]
    if "visibility" in call.json:
        call.repo.private = call.json["visibility"] == "private"
    return {}


def discussions(call: Call) -> Any:
    repo, author = call.repo, call.query.get("author", [USER])[0]
    about = {"repo": {"name": repo.name, "type": "model"}, "author": {"name": USER}, "createdAt": NOW}
    found = [
        {"num": number, "title": title, "status": "open", "isPullRequest": True, **about}
        for number, title in repo.pulls
        if author == USER
    ]
    return {"discussions": found, "count": len(found), "start": 0}


def _entries(files: dict[str, Blob], folder: str) -> list[dict[str, Any]]:
    found = []
    for name, blob in sorted(files.items()):
        if not folder or name.startswith(folder + "/"):
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "size": len(blob.content),
                "oid": blob.listed or blob.oid,
            }
            if blob.lfs:
                entry["lfs"] = {"oid": blob.listed or blob.sha256, "size": len(blob.content), "pointerSize": 134}
            found.append(entry)
    return found


def tree(call: Call) -> Any:
    folder, recursive = unquote(call.args.get("path") or ""), call.query.get("recursive") == ["true"]
    found = _entries(call.repo.files(call.revision), folder)
    if folder and not found:
        raise Refused(404, f"{folder} does not exist", "EntryNotFound")
    depth = len(PurePosixPath(folder).parts)
    parents = {p for entry in found for p in PurePosixPath(entry["path"]).parents if len(p.parts) > depth}
    folders = [{"type": "directory", "path": str(p), "oid": "0" * 40, "size": 0} for p in parents]
    everything = found + folders
    return everything if recursive else [e for e in everything if len(PurePosixPath(e["path"]).parts) == depth + 1]


def branch(call: Call) -> Any:
    call.must_write()
    name, repo = unquote(call.args["branch"]), call.repo
    if name in repo.refs:
        raise Refused(409, f"Reference already exists: {name}")
    repo.refs[name] = repo.at((call.json or {}).get("startingPoint") or "main")
    return {}


def validate_yaml(call: Call) -> Any:
    if not re.match(r"---\n.*?\n---\n", call.json["content"], re.DOTALL):
        raise Refused(400, "empty or missing yaml metadata in repo card")
    return {"errors": [], "warnings": []}


def preupload(call: Call) -> Any:
    call.must_write()
    files, answer = call.repo.files(call.revision), []
    for entry in call.json["files"]:
        lfs = PurePosixPath(entry["path"]).suffix in LFS_SUFFIXES or entry["size"] >= LFS_FROM
        known = {"oid": files[entry["path"]].etag} if entry["path"] in files else {}
        mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answer.append({"path": entry["path"], **mode, **known})
    return {"files": answer}


def lfs_batch(call: Call) -> Any:
    call.must_write()
    answer = []
    for entry in call.json["objects"]:
        upload = {"href": f"{call.base}/lfs/{entry['oid']}"}
        verify = {"href": f"{call.base}/{call.repo.name}.git/info/lfs/verify"}
        missing = entry["oid"] not in call.hub.objects
        answer.append({**entry, **({"actions": {"upload": upload, "verify": verify}} if missing else {})})
    return {"transfer": "basic", "objects": answer}


def lfs_put(call: Call) -> Any:
    if hashlib.sha256(call.body).hexdigest() != call.args["oid"]:
        raise Refused(400, "the content does not have the digest it was announced with")
    call.hub.objects[call.args["oid"]] = call.body
    return {}


def lfs_verify(call: Call) -> Any:
    if len(call.hub.objects.get(call.json["oid"], b"")) != call.json["size"]:
        raise Refused(404, "the object was not uploaded")
    return {}


def commit(call: Call) -> Any:
    call.must_write()
    repo, revision = call.repo, call.revision
    parent = repo.at(revision)
    files, title = dict(repo.files(parent)), ""
    for line in call.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, parent):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in call.hub.objects:
                raise Refused(400, f"LFS object {value['oid']} is missing")
            files[value["path"]] = Blob(call.hub.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refused(400, f"unknown operation {key}")
    pull = call.query.get("create_pr") == ["1"]
    number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
    made = repo.commit(f"refs/pr/{number}" if pull else revision, files)
    if pull:
        repo.pulls.append((number, title))
    if call.hub.after_commit is not None:
        call.hub.after_commit(repo, made)
    page = f"{call.base}/{repo.name}"
    return {
        "commitOid": made,
        "commitUrl": f"{page}/commit/{made}",
        "pullRequestUrl": f"{page}/discussions/{number}",
    }


def resolve(call: Call) -> Any:
    if call.repo.gated and call.token not in call.hub.granted:
        raise Refused(403, "Access to this model is restricted", "GatedRepo")
    sha, name = call.repo.at(call.revision), unquote(call.args["path"])
    if name not in call.repo.files(sha):
        raise Refused(404, "Entry not found", "EntryNotFound")
    blob = call.repo.files(sha)[name]
    return Answer(blob.content, headers={"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"'})


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
REV = r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, str, str, Callable[[Call], Any]]] = [
    ("whoami", "GET", r"/api/whoami-v2", whoami),
    ("create_repo", "POST", r"/api/repos/create", create_repo),
    ("yaml", "POST", r"/api/validate-yaml", validate_yaml),
    ("info", "GET", rf"/api/models/{ID}(/revision/{REV})?", info),
    ("tree", "GET", rf"/api/models/{ID}/tree/{REV}(/(?P<path>.+))?", tree),
    ("settings", "PUT", rf"/api/models/{ID}/settings", settings),
    ("discussions", "GET", rf"/api/models/{ID}/discussions", discussions),
    ("branch", "POST", rf"/api/models/{ID}/branch/(?P<branch>[^/]+)", branch),
    ("preupload", "POST", rf"/api/models/{ID}/preupload/{REV}", preupload),
    ("commit", "POST", rf"/api/models/{ID}/commit/{REV}", commit),
    ("lfs_batch", "POST", rf"/{ID}\.git/info/lfs/objects/batch", lfs_batch),
    ("lfs_verify", "POST", rf"/{ID}\.git/info/lfs/verify", lfs_verify),
    ("lfs_put", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("resolve", "GET", rf"/{ID}/resolve/{REV}/(?P<path>.+)", resolve),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: Hub.calls counts what arrives."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        matching = ((k, f, re.fullmatch(p, url.path)) for k, m, p, f in ROUTES if m == method)
        kind, function, match = next(((k, f, m) for k, f, m in matching if m), ("unknown", None, None))
        fault = self.hub.fault_of(kind)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "reset":
            self.rfile.read(length // 2)
            return self._reset()
        step = max(1, length // 8) if fault == "slow" else max(1, length)
        body = b""
        while len(body) < length and (piece := self.rfile.read(min(step, length - len(body)))):
            body += piece
            time.sleep(0.02 if fault == "slow" else 0)
        if fault == "drop":
            return self._hang_up()
        try:
            if fault is not None and fault.isdigit():
                raise Refused(int(fault), "injected fault")
            if function is None or match is None:
                raise Refused(404, f"this Hub does not know {self.command} {url.path}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            role = self.hub.tokens.get(token)
            args = {key: value for key, value in match.groupdict().items() if value is not None}
            with self.hub.lock:
                base = f"http://{self.headers['Host']}"
                result = function(Call(self.hub, args, parse_qs(url.query), body, role, base, token))
            answer = result if isinstance(result, Answer) else Answer(result)
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            answer = Answer({"error": str(refused)}, refused.status, {"X-Error-Message": str(refused), **code})
        if fault == "lost":
            return self._hang_up()
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, answer: Answer) -> None:
        raw = isinstance(answer.content, bytes)
        content = answer.content if raw else json.dumps(answer.content).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        """Close with a reset (RST) instead of an orderly end, as a network that breaks does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests; anything else is shown by its effect on the client."""


@contextlib.contextmanager
def running(port: int = 0) -> Iterator[tuple[str, Hub]]:
    """Serve a new, empty Hub: yields its URL (for HF_ENDPOINT) and its state."""
    hub = Hub()
    server = _Server(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--fault", action="append", default=[], metavar="KIND:N:ACTION", help="e.g. commit:1:drop")
    options = parser.parse_args()
    with running(options.port) as (url, hub):
        for fault in options.fault:
            kind, nth, action = fault.split(":")
            hub.fail(kind, int(nth), action)
        print(f"export HF_ENDPOINT={url} HF_TOKEN={WRITE_TOKEN} HF_HUB_DISABLE_XET=1 HF_HUB_OFFLINE=0", flush=True)
        print(f"# users {USER} and {ORG}; read-only token: {READ_TOKEN}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
