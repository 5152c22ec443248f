"""As much of the Hub's HTTP interface as reading and pushing a model takes, on this machine, counting what it sends.

The tests read from it too, and push to it.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

BIG = (".safetensors", ".bin")


@dataclass
class Hub:
    """Repositories `org/name`, each a directory below `root`, all at one commit with the branch `main`.

    Attributes:
        root: The directory.
        gated: Names of repositories that nobody may read, although all may see them.
        takes_ranges: Whether a request for a part of a file gets no more.
        drops_after: Bytes of a big file after which the connection breaks off.
        sent: Bytes of big files sent, by `org/name/path`.
        requests: Requests for parts of big files, by `org/name/path`.
        token: What lets its owner, `me`, who is of `org`, write; None lets nobody.
        private: Names of repositories that others cannot see.
        uploaded: Big files that have arrived, by SHA-256, whether or not a commit names them.
        uploads: How often a big file was sent.
        refuses_uploads: Whether big files are refused.
        commits: Message and paths of each commit, by repository.
        seen: Methods and paths of requests that write.
    """

    root: Path
    gated: set[str] = field(default_factory=set)
    takes_ranges: bool = True
    drops_after: int | None = None
    sent: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    token: str | None = None
    private: set[str] = field(default_factory=set)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    uploads: int = 0
    refuses_uploads: bool = False
    commits: dict[str, list[tuple[str, list[str]]]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())

    def commit(self, name: str) -> str:
        return hashlib.sha1(f"{name}{len(self.commits.get(name, ()))}".encode()).hexdigest()

    def files(self, name: str) -> dict[str, Path]:
        folder = self.root / name
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256(path: Path) -> str:
    return _sha256(path, path.stat().st_mtime_ns)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


@lru_cache
def _sha256(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.body()
        match self.parts:
            case ["api", "validate-yaml"]:
                self.reply({"errors": [], "warnings": []})
            case ["api", "models", _, _, "paths-info" | "tree", *_]:
                self.do_GET()
            case _ if not self.may_write():
                self.fail(401, "Unauthorized")
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "models", org, name, "preupload", _]:
                self.reply({"files": [self.mode(f"{org}/{name}", file) for file in json.loads(body)["files"]]})
            case [_, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.reply({"transfer": "basic", "objects": list(map(self.where_to, json.loads(body)["objects"]))})
            case ["api", "models", org, name, "commit", "main"]:
                self.land(f"{org}/{name}", [json.loads(line) for line in body.splitlines()])
            case _:
                self.fail(404, "EntryNotFound")

    def do_PUT(self) -> None:
        content = self.body()
        match self.parts:
            case ["lfs", oid] if not self.hub.refuses_uploads and hashlib.sha256(content).hexdigest() == oid:
                self.hub.uploaded[oid] = content
                self.hub.uploads += 1
                self.reply({})
            case _:
                self.fail(403, "Refused")

    @property
    def parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def may_write(self) -> bool:
        self.hub.seen.append(f"{self.command} {self.path}")
        return self.hub.token is not None and self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if (self.hub.root / name).is_dir():
            self.fail(409, "RepoExists")
            return
        (self.hub.root / name).mkdir(parents=True)
        (self.hub.root / name / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text")
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        self.reply({"url": f"http://{self.headers['Host']}/{name}", "name": name})

    def mode(self, name: str, file: dict) -> dict:
        known = self.hub.files(name).get(file["path"])
        mode = "lfs" if file["path"].endswith(BIG) else "regular"
        oid = None if known is None else sha256(known) if mode == "lfs" else git_sha1(known.read_bytes())
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def where_to(self, wanted: dict) -> dict:
        if wanted["oid"] in self.hub.uploaded:
            return wanted
        href = f"http://{self.headers['Host']}/lfs/{wanted['oid']}?X-Amz-Signature=signed"
        return wanted | {"actions": {"upload": {"href": href}}}

    def land(self, name: str, lines: list[dict]) -> None:
        paths = []
        for line in lines[1:]:
            value = line["value"]
            path = self.hub.root / name / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            big = line["key"] == "lfsFile"
            path.write_bytes(self.hub.uploaded[value["oid"]] if big else base64.b64decode(value["content"]))
            paths.append(value["path"])
        self.hub.commits.setdefault(name, []).append((lines[0]["value"]["summary"], sorted(paths)))
        commit = self.hub.commit(name)
        address = f"http://{self.headers['Host']}/{name}/commit/{commit}"
        self.reply({"success": True, "commitOid": commit, "commitUrl": address, "pullRequestUrl": None})

    def do_GET(self) -> None:
        match self.parts:
            case ["api", "whoami-v2"]:
                if self.may_write():
                    self.reply({"type": "user", "name": "me", "orgs": [{"name": "org"}]})
                else:
                    self.fail(401, "Unauthorized")
            case ["api", "models", org, name, *rest]:
                self.api(f"{org}/{name}", rest)
            case [org, name, "resolve", revision, *path]:
                self.resolve(f"{org}/{name}", revision, "/".join(path))
            case _:
                self.fail(404, "EntryNotFound")

    def api(self, name: str, rest: list[str]) -> None:
        kind, revision, *_ = rest or ["revision", "main"]
        if self.known(name, revision):
            tree = [self.described(file, path) for file, path in self.hub.files(name).items()]
            if kind == "tree":
                self.reply(tree)
            else:
                siblings = [
                    {"rfilename": row["path"], "size": row["size"], "blobId": row["oid"]}
                    | ({"lfs": row["lfs"] | {"sha256": row["lfs"]["oid"]}} if "lfs" in row else {})
                    for row in tree
                ]
                private = name in self.hub.private
                self.reply({"id": name, "sha": self.hub.commit(name), "private": private, "siblings": siblings})

    def described(self, file: str, path: Path) -> dict:
        row = {"type": "file", "path": file, "size": path.stat().st_size, "oid": sha256(path)[:40]}
        big = {"lfs": {"oid": sha256(path), "size": path.stat().st_size, "pointerSize": 130}}
        return row | (big if path.suffix in BIG else {})

    def known(self, name: str, revision: str) -> bool:
        if not (self.hub.root / name).is_dir():
            self.fail(401, "RepoNotFound")
        elif revision not in ("main", self.hub.commit(name)):
            self.fail(404, "RevisionNotFound")
        else:
            return True
        return False

    def resolve(self, name: str, revision: str, file: str) -> None:
        if not self.known(name, revision):
            return
        if name in self.hub.gated:
            self.fail(403, "GatedRepo")
            return
        path = self.hub.files(name)[file]
        big = file.endswith(BIG)
        etag, size = sha256(path)[: None if big else 40], path.stat().st_size
        first, stop = 0, size
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit(name), "Accept-Ranges": "bytes"}
        asked, code = self.headers.get("Range"), 200
        if asked and self.hub.takes_ranges:
            begin, end = asked.removeprefix("bytes=").split("-")
            first, stop = int(begin), min(int(end) + 1, size) if end else size
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{size}"
            code = 206
        with path.open("rb") as content:
            content.seek(first)
            taken = content.read(stop - first)
        self.send(code, taken, headers, f"{name}/{file}" if big else None)

    def reply(self, answer: object) -> None:
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def fail(self, code: int, error: str) -> None:
        self.send(code, b"", {"X-Error-Code": error, "X-Error-Message": f"the server says {error}"})

    def send(self, code: int, content: bytes, headers: dict[str, str], counted: str | None = None) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if counted is not None:
            if self.hub.drops_after is not None and self.hub.sent_bytes + len(content) > self.hub.drops_after:
                self.close_connection = True
                return
            self.hub.sent[counted] = self.hub.sent.get(counted, 0) + len(content)
            self.hub.requests[counted] = self.hub.requests.get(counted, 0) + 1
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve the repositories; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
