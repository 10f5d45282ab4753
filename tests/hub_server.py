"""A small Hugging Face Hub on this machine: what is needed to look a model up, fetch parts of it, and publish one.

It serves a folder as one repository over HTTP and can be told to misbehave: to ignore ranges, break connections off, send too
little, or change a file under the reader's feet.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The repository, the ways to misbehave, and what was asked for.

    `drops`: how many more answers with weights break off after half of their body. `short_by`: bytes that every answer with
    weights lacks at its end, by its own account. `busy`: how many more requests for weights are answered 503.
    `denies`: the status and the error code that every file is answered with, as for who was not let in.
    `through_cdn`: weights are redirected to another path with another ETag, as large files are on the real Hub.
    """

    repo: str
    folder: Path
    honours_ranges: bool = True
    through_cdn: bool = True
    drops: int = 0
    busy: int = 0
    short_by: int = 0
    etag_suffix: str = ""
    total_offset: int = 0
    url: str = ""
    private: bool = False
    refuses_uploads: bool = False
    denies: tuple[int, str] | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    weight_bytes_sent: int = 0
    bodies: list[tuple[str, str, bytes]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cdn(self) -> str:
        """Another host: huggingface_hub follows redirects to its own by itself when it looks for an ETag."""
        return self.url.replace("127.0.0.1", "localhost") + "/cdn"

    def ranges_of(self, name: str) -> list[str | None]:
        """The Range headers of GET requests that were answered with bytes of a file."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(name)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.bodies.append(("POST", self.path, body))
        if self.path == "/api/repos/create":
            self.answer_json({"url": f"{self.hub.url}/{self.hub.repo}", "id": self.hub.repo})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False} for file in files
            ]  # fmt: skip
            self.answer_json({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.answer_json({"transfer": "basic", "objects": objects})
        elif self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            self.answer_json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/c/{COMMIT}"})
        else:
            self.answer_json({"error": "unknown"}, status=404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.bodies.append(("PUT", self.path, body))
        self.answer(403 if self.hub.refuses_uploads else 200, {}, b"")

    def serve(self) -> None:
        hub = self.hub
        path = self.path.partition("?")[0]
        with hub.lock:
            hub.requests.append((self.command, path, self.headers.get("Range")))
        files = {
            file.relative_to(hub.folder).as_posix(): file for file in sorted(hub.folder.rglob("*")) if file.is_file()
        }
        if re.fullmatch(rf"/api/models/{hub.repo}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in files]
            self.answer_json({"_id": "1", "id": hub.repo, "modelId": hub.repo, "sha": COMMIT, "siblings": siblings,
                              "private": hub.private, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        elif re.fullmatch(rf"/api/models/{hub.repo}/tree/[^/]+", path):
            self.answer_json(
                [{"type": "file", "path": name, "size": file.stat().st_size, "oid": hashlib.sha1(name.encode()).hexdigest()}
                 for name, file in files.items()]
            )  # fmt: skip
        elif found := re.fullmatch(rf"/{hub.repo}/resolve/({COMMIT}|main)/(.+)", path):
            self.resolve(found[2], files)
        elif (found := re.fullmatch(r"/cdn/(.+)", path)) and found[1] in files:
            self.send_weights(files[found[1]], {"ETag": '"of-the-cdn"'})
        elif path.startswith("/api/models/"):
            self.answer_json({"error": f"no {path}"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
        else:
            self.answer_json({"error": f"no {path}"}, status=404, headers={"X-Error-Code": "EntryNotFound"})

    def resolve(self, name: str, files: dict[str, Path]) -> None:
        if self.hub.denies is not None:
            status, code = self.hub.denies
            reason = {"X-Error-Code": code, "X-Error-Message": "Access to this model is restricted."}
            self.answer_json({"error": "restricted"}, status=status, headers=reason)
            return
        if name not in files:
            self.answer_json({"error": "no such file"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        content = files[name].read_bytes()
        large = name.endswith(".safetensors")
        etag = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}{self.hub.etag_suffix if large else ""}"'}
        if not large:
            self.answer(200, headers, content)
        elif self.hub.through_cdn:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
            self.answer(302, {**headers, "Location": f"{self.hub.cdn}/{name}"}, b"")
        else:
            self.send_weights(files[name], headers)

    def send_weights(self, file: Path, headers: dict[str, str]) -> None:
        hub = self.hub
        content = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if hub.honours_ranges else None
        status, total = 200, len(content)
        with hub.lock:
            busy, hub.busy = hub.busy > 0, max(0, hub.busy - 1)
        if busy and self.command == "GET":
            self.answer(503, {}, b"")
            return
        if wanted is not None:
            first, last = int(wanted[1]), min(int(wanted[2]), total - 1)
            content, status = content[first : last + 1], 206
            headers |= {"Content-Range": f"bytes {first}-{last}/{total + hub.total_offset}"}
        if hub.short_by:
            content = content[: max(0, len(content) - hub.short_by)]
        with hub.lock:
            dropped, hub.drops = hub.drops > 0 and self.command == "GET", max(0, hub.drops - 1)
        self.answer(status, headers, content, sent=len(content) // 2 if dropped else len(content))

    def answer_json(self, document: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(document).encode())

    def answer(self, status: int, headers: dict[str, str], content: bytes, *, sent: int | None = None) -> None:
        body = content[:sent] if self.command != "HEAD" else b""
        if self.path.endswith(".safetensors"):
            with self.hub.lock:  # before the client hears of it: it may ask at once how much was sent
                self.hub.weight_bytes_sent += len(body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body)
        except OSError:  # the other side has read enough
            self.close_connection = True
        if len(body) < len(content):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # of the usual 5, a client with more connections may wait for seconds

    def handle_error(self, *_: Any) -> None:
        """Clients break connections off on purpose here."""


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port for the duration of the block; `hub.url` is its HF_ENDPOINT."""
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def using_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """Serve a hub, and make it the one of huggingface_hub in this process. The environment is read when that is imported."""
    with serve_hub(hub), monkeypatch.context() as patch:
        constants = huggingface_hub.constants
        for name, value in {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():  # fmt: skip
            patch.setattr(constants, name, value)
            if name in vars(huggingface_hub.file_download):  # 0.36 has the template there, too
                patch.setattr(huggingface_hub.file_download, name, value)
        patch.setenv("HF_TOKEN", "hf_of_a_test")
        yield hub
