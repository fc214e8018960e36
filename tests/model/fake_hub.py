"""A Hugging Face Hub on the loopback that serves one folder and counts the bytes sent of each file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
ROOT = Path(__file__).parents[2]


class FakeHub:
    """`sent` counts bytes by file; `error` makes every answer that status and code of the Hub's."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo = repo
        self.folder = folder
        self.sent: Counter[str] = Counter()
        self.error: tuple[int, str] | None = None
        self.endpoint = ""

    def run(
        self, home: Path, program: str, *arguments: object, offline: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python program that asks this Hub and has its caches, `hf` and `lockstep`, in `home`.

        In a process of its own, because the Hub's client reads its settings when it is imported.
        """
        env = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}/src:{ROOT}/tests",
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hf"),
            "LOCKSTEP_CACHE": str(home / "lockstep"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


@contextmanager
def serve(repo: str, folder: Path):
    """Yield a running FakeHub whose `endpoint` is meant for HF_ENDPOINT."""
    hub = FakeHub(repo, folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        path = self.path.split("?")[0].removeprefix("/")
        repo = self.hub.repo
        if self.hub.error is not None:
            status, code = self.hub.error
            return self._answer(status, b"", {"X-Error-Code": code}, body)
        for prefix in (f"api/models/{repo}/tree/", f"api/models/{repo}/revision/"):
            if path.startswith(prefix) and path.removeprefix(prefix) not in ("main", COMMIT):
                return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if path.startswith(f"api/models/{repo}/tree/"):
            return self._json(self._tree(), body)
        if path == f"api/models/{repo}" or path.startswith(f"api/models/{repo}/revision/"):
            return self._json({"id": repo, "sha": COMMIT, "siblings": self._siblings()}, body)
        file = path.removeprefix(f"{repo}/resolve/{COMMIT}/")
        if file != path and (self.hub.folder / file).is_file():
            return self._file(file, body)
        if path.startswith(f"{repo}/resolve/"):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def _siblings(self):
        return [{"rfilename": file.name} for file in sorted(self.hub.folder.iterdir())]

    def _tree(self):
        files = sorted(self.hub.folder.iterdir())
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]

    def _file(self, file: str, body: bool):
        path = self.hub.folder / file
        size = path.stat().st_size
        first, end, status = 0, size, 200
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            end, status = min(last + 1, size), 206
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        with path.open("rb") as opened:
            opened.seek(first)
            content = opened.read(end - first)
        if body:
            self.hub.sent[file] += len(content)
        return self._answer(status, content, headers, body)

    def _json(self, content: object, body: bool):
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)

    def _answer(self, status: int, content: bytes, headers: dict[str, str], body: bool):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object):
        pass


@cache
def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
