"""A model hub on this machine: as much of the protocol as huggingface_hub speaks to find a model and to fetch it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_COMMIT = "a" * 40


class Hub:
    """What is on the hub.

    Args:
        repos: folders by id.
        gated: ids that may be looked at and not fetched.

    Attributes:
        fetched: bytes sent of each file so far, by id and name.
    """

    def __init__(self, repos: Mapping[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.repos, self.gated, self.fetched = dict(repos), gated, dict[str, int]()

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its address, as long as it is needed."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._respond(False)

    def do_GET(self) -> None:
        self._respond(True)

    def _respond(self, has_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_question = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_question else parts[:2])
        folder = self.hub.repos.get(name)
        files = [] if folder is None else sorted(folder.iterdir())
        if folder is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, has_body)
        elif is_question and parts[4:5] == ["tree"]:
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in files
            ]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, has_body)
        elif is_question:
            siblings = [{"rfilename": file.name} for file in files]
            answer = {"id": name, "modelId": name, "sha": _COMMIT, "siblings": siblings, "tags": [], "private": False}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, has_body)
        elif name in self.hub.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, has_body)
        elif not (folder / parts[-1]).is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT}, has_body)
        else:
            self._send_file(folder / parts[-1], f"{name}/{parts[-1]}", has_body)

    def _send_file(self, file: Path, name: str, has_body: bool) -> None:
        data = file.read_bytes()
        told = {"X-Repo-Commit": _COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        wanted, code = self.headers.get("Range"), 200
        if wanted is not None:
            first, last = wanted.removeprefix("bytes=").split("-")
            size, code = len(data), 206
            data = data[int(first or 0) : int(last or size) + 1]
            told["Content-Range"] = f"bytes {first}-{int(first or 0) + len(data) - 1}/{size}"
        if has_body:
            self.hub.fetched[name] = self.hub.fetched.get(name, 0) + len(data)
        self._send(code, data, told, has_body)

    def _send(self, code: int, body: bytes, told: Mapping[str, str], has_body: bool) -> None:
        self.send_response(code)
        for name, value in told.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)
