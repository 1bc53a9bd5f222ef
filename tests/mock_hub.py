"""A Hub of our own on the loopback: repositories are folders, and every request is written down."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """The server's folder and what it has been asked.

    Args:
        root: holds `models/<owner>/<name>/…` and `datasets/<owner>/<name>/…`.
        url: for HF_ENDPOINT.
        gated: names of repositories that ask for consent.
        cut: bytes of a file after which the connection is closed, as often as there are numbers; 0 closes it at once.
        wait: seconds before a file is sent.
        asked: (method, path, range) of every request.
    """

    root: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    cut: list[int] = field(default_factory=list)
    wait: float = 0.0
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """The files of which something was sent."""
        found = (re.search(r"/resolve/[^/]+/(.+)", path) for method, path, _ in self.asked if method == "GET")
        return {match[1] for match in found if match}

    def ranges(self) -> list[str]:
        """The ranges of files that were asked for, in order."""
        return [wanted for method, path, wanted in self.asked if method == "GET" and "/resolve/" in path]


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Answer,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answer(BaseHTTPRequestHandler):
    """The part of the Hub's interface that huggingface_hub and datasets ask for."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, asked = unquote(url.path), parse_qs(url.query)
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w+|paths-info))?(?:/([^/]+))?(/.*)?", path
        ):
            kind, name, what, _, below = match.groups()
            if (folder := self._folder(kind, name)) is not None:
                self._about(folder, name, what or "revision", (below or "").strip("/"), asked, sent)
        elif match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, _, file = match.groups()
            if (folder := self._folder(kind or "models", name)) is not None:
                self._file(folder / file, file)
        else:
            self._json({"error": f"unknown: {path}"}, 404)

    do_HEAD = do_POST = do_GET

    def _folder(self, kind: str, name: str) -> Path | None:
        """The folder of a repository; without one, or without consent, the request is answered."""
        if name in self.hub.gated:
            return self._json({"error": "Access is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        folder = self.hub.root / kind / name
        if folder.is_dir():
            return folder
        return self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})

    def _about(self, folder: Path, name: str, what: str, below: str, asked: dict[str, list[str]], sent: bytes) -> None:
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if what == "revision":
            facts = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            listed = {"siblings": [{"rfilename": file} for file in files]}
            self._json({"_id": name, "id": name, "modelId": name, "sha": COMMIT, **facts, **listed})
        elif what == "tree":
            deep = asked.get("recursive", ["false"])[0].lower() in ("true", "1")
            inside = [path for path in folder.joinpath(below).glob("**/*" if deep else "*")]
            self._json([self._entry(folder, path) for path in sorted(inside)])
        elif what == "paths-info":
            wanted = json.loads(sent)["paths"] if sent.startswith(b"{") else parse_qs(sent.decode()).get("paths", [])
            paths = [folder / path for path in ([wanted] if isinstance(wanted, str) else wanted)]
            self._json([self._entry(folder, path) for path in paths if path.exists()])
        else:
            self._json({"error": f"unknown: {what}"}, 404)

    def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
        kind = "file" if path.is_file() else "directory"
        size = path.stat().st_size if path.is_file() else 0
        return {"type": kind, "oid": _oid(path), "size": size, "path": path.relative_to(folder).as_posix()}

    def _file(self, path: Path, name: str) -> None:
        if not path.is_file():
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if self.command == "GET":
            Event().wait(self.hub.wait)  # which a test that takes time.sleep away leaves alone
        whole = path.read_bytes()
        said = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(path)}"', "Accept-Ranges": "bytes"}
        status, body = 200, whole
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(whole)), len(whole) - 1)
            status, body = 206, whole[start : end + 1]
            said["Content-Range"] = f"bytes {start}-{end}/{len(whole)}"
        self._send(status, body, said)

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if "ETag" in headers and self.hub.cut and len(body) > self.hub.cut[0]:
            self.wfile.write(body[: self.hub.cut.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes() if path.is_file() else str(path).encode()).hexdigest()
