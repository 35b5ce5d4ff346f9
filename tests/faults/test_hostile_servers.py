"""A web server that lies about what it sends: a cache behind it is read as it is, or refused in one line, in bounds."""

from __future__ import annotations

import functools
import re
import resource
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.stage.manifests import read_manifest, require_seal
from capgap.pipeline.store import ShardReader
from capgap.schemas.errors import CapgapError
from capgap.schemas.manifest import MANIFEST_NAME

SHARD = re.compile(r"/sampled-\d+\.tar")
# A manifest here has kilobytes.
MORE_KIB = 200 << 10


class _Lying(SimpleHTTPRequestHandler):
    """Lies as its server is told to, about shards or about the manifest."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        file = Path(self.directory) / path.lstrip("/")
        is_lie = SHARD.search(path) is not None if self.server.of == "shards" else path.endswith(MANIFEST_NAME)
        if path.startswith("/round"):
            self._redirect(path)
        elif not file.is_file():
            self.send_error(404)
        else:
            LIES[self.server.lie if is_lie else "none"](self, file.read_bytes(), body)

    def _redirect(self, where: str) -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data: bytes, body: bool, said: int | None = None, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data) if said is None else said))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(data)
        self.close_connection = said is not None

    def send_without_end(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        try:
            while body:
                self.wfile.write(data)
        except OSError:
            pass  # the reader has had enough


def _another_range(server: _Lying, data: bytes, body: bool) -> None:
    where = f"bytes 100-{len(data) - 1}/{len(data)}"
    server.send(data[100:], body, code=206, Content_Range=where)


LIES = {
    "none": lambda server, data, body: server.send(data, body),
    "short": lambda server, data, body: server.send(data[:-100], body, said=len(data)),
    "shorter and proud of it": lambda server, data, body: server.send(data[:-100], body),
    "longer": lambda server, data, body: server.send(data + b"\0" * 100, body),
    "other bytes": lambda server, data, body: server.send(data[::-1], body),
    "another range": _another_range,
    "a page": lambda server, data, body: server.send(b"<html>log in first</html>", body, Content_Type="text/html"),
    "nothing": lambda server, data, body: server.send(b"", body),
    "without end": lambda server, data, body: server.send_without_end(data * 20, body),
    "a file": lambda server, data, body: server._redirect("file:///etc/passwd"),
    "round and round": lambda server, data, body: server._redirect("/round"),
    "no such coding": lambda server, data, body: server.send(data, body, Content_Encoding="gzip"),
    "a size of terabytes": lambda server, data, body: server.send(data, body, said=1 << 45),
    "not now": lambda server, data, body: server.send(b"\x1b[2Jno", body, code=503),
}


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Lying, directory=str(made / "cache")))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("of", ["shards", "manifest"])
@pytest.mark.parametrize("lie", LIES)
def test_what_a_lying_server_sends_is_refused_by_name_and_in_bounds(
    server: Any, lie: str, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.lie, server.of = lie, of
    url = f"http://127.0.0.1:{server.server_port}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = ""
    try:
        manifest = read_manifest(url)
        if manifest is not None:
            require_seal(url, manifest)
            reader = ShardReader(url, manifest.shard_sets["sampled"])
            assert len(reader.read_member(0, 0)[0]) == 8
    except CapgapError as error:
        refused = str(error)
    assert bool(refused) == (lie != "none"), refused
    assert url in refused or lie == "none"
    assert "\n" not in refused and "root:" not in refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_KIB or lie == "without end"
    # nothing that is not what the manifest lists stays under its name
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [] or lie == "none" or of == "manifest"
