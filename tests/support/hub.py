"""A small model hub on 127.0.0.1: models and datasets from local folders, uploads, a log of requests, faults on demand.

It answers what huggingface_hub, transformers and datasets ask for: repository info, the tree, path infos, files with
ETag and ranges, repository creation, LFS uploads, commits. Point a process to it with the variables of `Hub.env`; the
libraries read them when they are imported, so tests run their commands in processes of their own.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS = (".safetensors", ".bin", ".parquet")
"""The endings of files that the hub keeps as large files."""

PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


@dataclass
class Fault:
    """What befalls requests whose "METHOD /path" matches `pattern`, `times` times (None: for ever)."""

    pattern: str
    kind: str  # "status", "cut" (in the middle of the body), "silent", "page" (HTML in a 200), "size", "bytes" (others)
    status: int = 0
    times: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0  # requests that are served first


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    authorization: str | None
    range: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Hub:
    """The hub's contents, faults and log. `url` is its address while it serves (see `serving`)."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}  # ("models", "org/name"): {path: content}
        self.uploaded: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.faults: list[Fault] = []
        self.log: list[Asked] = []
        self.url = ""
        self.released = threading.Event()  # ends all silences
        self.lock = threading.Lock()

    def add(self, kind: str, name: str, folder: Path) -> None:
        """Adds the folder's files as the model or dataset (`kind`) `name`, as a new commit where it is there."""
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        self.repositories[f"{kind}s", name] = files

    def add_dataset(self, name: str, folder: Path, splits: dict[str, list[str]]) -> None:
        """Adds a folder of `<subset>/<split>-*.parquet` as a dataset, with the card that tells `datasets` so."""
        lines = ["---", "configs:"]
        for subset, names in splits.items():
            lines += [f"- config_name: {subset}", "  data_files:"]
            for split in names:
                lines += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
        self.add("dataset", name, folder)
        self.repositories["datasets", name]["README.md"] = "\n".join([*lines, "---", ""]).encode()

    def commit(self, kind: str, name: str) -> str:
        """The newest commit: a hash of the contents, so that another text is another commit."""
        files = self.repositories[f"{kind}s", name]
        lines = [f"{path} {hashlib.sha1(content).hexdigest()}\n" for path, content in sorted(files.items())]
        return hashlib.sha1(f"{kind}{name}{''.join(lines)}".encode()).hexdigest()

    def fail(self, pattern: str, status: int = 0, kind: str = "status", **options: Any) -> Fault:
        fault = Fault(pattern, kind, status, **options)
        self.faults.append(fault)
        return fault

    def gate(self, name: str) -> Fault:
        """Refuses a repository's files, as the hub does until its terms are accepted. Its info stays public."""
        return self.fail(rf"{re.escape(name)}/resolve/", 403, headers={"X-Error-Code": "GatedRepo"})

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that uses this hub, with its own caches under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            kept.pop(name, None)
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | own | more

    def asked(self, pattern: str = "") -> list[str]:
        """The requests so far that match, as "METHOD /path"."""
        with self.lock:
            return [str(asked) for asked in self.log if re.search(pattern, str(asked))]

    def forget(self) -> None:
        with self.lock:
            self.log.clear()


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub answers while inside."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.released.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.query = urllib.parse.parse_qs(url.query)
        asked = Asked(self.command, path, self.headers.get("Authorization"), self.headers.get("Range"))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.log.append(asked)
            self.fault = self._fault(str(asked))
        if self.fault is not None and self.fault.kind == "status":
            body = json.dumps({"error": f"a fault of {self.fault.status}"}).encode()
            self._answer(body, self.fault.status, {"Content-Type": "application/json", **self.fault.headers})
        elif self.fault is not None and self.fault.kind == "silent":
            self.hub.released.wait(60)
            self.close_connection = True
        elif self.fault is not None and self.fault.kind == "page":
            self._answer(PAGE, 200, {"Content-Type": "text/html; charset=utf-8", **self.fault.headers})
        else:
            self._route(path)

    def _fault(self, asked: str) -> Fault | None:
        for fault in self.hub.faults:
            if re.search(fault.pattern, asked) and fault.times != 0:
                if fault.after:
                    fault.after -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def _route(self, path: str) -> None:
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = found.groups()
            self._file(kind or "models", name, revision, file)
        elif path == "/api/repos/create":
            values = json.loads(self.body)
            name = f"{values['organization']}/{values['name']}"
            is_new = self.hub.repositories.setdefault((f"{values['type']}s", name), {}) == {}
            self._json({"url": f"{self.hub.url}/{name}"}, 200 if is_new else 409)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/whoami-v2":
            self._json({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(self.body)["objects"]
            for each in objects:
                if each["oid"] not in self.hub.uploaded:
                    each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/lfs/(\w+)", path):
            self.hub.uploaded[found[1]] = self.body
            self._answer(b"", 200, {})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.+))?)?", path):
            self._api(*found.groups())
        else:
            self._json({"error": "no such page"}, 404)

    def _api(self, kind: str, name: str, what: str | None, rest: str | None) -> None:
        files = self.hub.repositories.get((kind, name))
        if files is None:
            self._refuse("RepoNotFound", "Repository not found", 401 if not self.headers.get("Authorization") else 404)
            return
        commit = self.hub.commit(kind[:-1], name)
        if what in (None, "revision"):
            if rest not in (None, commit, "main"):
                self._refuse("RevisionNotFound", f"Invalid rev id: {rest}")
                return
            siblings = [self._stated(path, content) for path, content in files.items()]
            if "blobs" not in self.query:
                siblings = [{"rfilename": each["rfilename"]} for each in siblings]
            self._json({"id": name, "sha": commit, "private": False, "gated": False, "tags": [], "siblings": siblings})
        elif what == "tree":
            folder = (rest or "").partition("/")[2]
            self._json(self._tree(files, folder.rstrip("/"), "recursive" in self.query))
        elif what == "paths-info":
            form = urllib.parse.parse_qs(self.body.decode())
            paths = form.get("paths") or json.loads(self.body or b"{}").get("paths", [])
            self._json([self._entry(path, files[path]) for path in paths if path in files])
        elif what == "preupload":
            asked = json.loads(self.body)["files"]
            kept = {path: self._entry(path, content) for path, content in files.items()}
            modes = [
                {
                    "path": each["path"],
                    "oid": kept[each["path"]].get("lfs", kept[each["path"]])["oid"] if each["path"] in kept else None,
                    "uploadMode": "lfs" if each["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for each in asked
            ]
            self._json({"files": modes})
        elif what == "commit":
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.uploaded[value["oid"]]
            commit = self.hub.commit(kind[:-1], name)
            self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})
        else:
            self._json({"error": "no such page"}, 404)

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        start = f"{folder}/" if folder else ""
        for path, content in files.items():
            if path.startswith(start):
                parts = path.removeprefix(start).split("/")
                for n in range(1, len(parts)):
                    if recursive or n == 1:
                        inner = start + "/".join(parts[:n])
                        entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": "0" * 40}
                if recursive or len(parts) == 1:
                    entries[path] = self._entry(path, content)
        return list(entries.values())

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        stated = self._stated(path, content)
        entry = {"type": "file", "path": path, "size": len(content), "oid": stated["blobId"]}
        if "lfs" in stated:
            entry["lfs"] = {"oid": stated["lfs"]["sha256"], "size": len(content), "pointerSize": 130}
        return entry

    def _stated(self, path: str, content: bytes) -> dict[str, Any]:
        """What the hub says of a file."""
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        stated: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob}
        if path.endswith(LFS):
            stated["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
        return stated

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        files = self.hub.repositories.get((kind, name))
        if files is None:
            self._refuse("RepoNotFound", "Repository not found", 401 if not self.headers.get("Authorization") else 404)
            return
        commit = self.hub.commit(kind[:-1], name)
        if revision not in (commit, "main"):
            self._refuse("RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if file not in files:
            self._refuse("EntryNotFound", "Entry not found", headers={"X-Repo-Commit": commit})
            return
        content = files[file]
        stated = self._stated(file, content)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "lfs" in stated:
            headers |= {"ETag": f'"{stated["lfs"]["sha256"]}"', "X-Linked-ETag": f'"{stated["lfs"]["sha256"]}"'}
            headers["X-Linked-Size"] = str(len(content))
        else:
            headers["ETag"] = f'"{stated["blobId"]}"'
        status, part = 200, content
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), int(found[2]) + 1 if found[2] else len(content)
            status, part = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        if self.fault is not None and self.fault.kind == "bytes":
            part = bytes(byte ^ 1 for byte in part[:1]) + part[1:]
        if self.fault is not None and self.fault.kind == "size" and self.command == "GET":
            part = part[: len(part) // 2]
        self._answer(part, status, headers)

    def _refuse(self, code: str, message: str, status: int = 404, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._answer(json.dumps({"error": message}).encode(), status, {"Content-Type": "application/json", **headers})

    def _json(self, values: Any, status: int = 200) -> None:
        self._answer(json.dumps(values).encode(), status, {"Content-Type": "application/json"})

    def _answer(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.fault is not None and self.fault.kind == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                time.sleep(0.01)
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(body)
