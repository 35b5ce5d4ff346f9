"""Shards behind gs://, hf:// and https:// URLs, from servers on this machine; each is read in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import ssl
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.store import LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.store.codec import SAMPLED

SIZES = ((3, 1), (4,), (2, 2, 1))
READ = """
import hashlib, sys
from pathlib import Path
from capgap.pipeline.store import DiskCache, LoaderSettings, Remote, SequenceLoader, ShardReader, place_of
from capgap.schemas.manifest import ShardSet

url, copies = sys.argv[1:]
data = Remote(url).read("set.json")
assert Remote(url).read("none.json") is None
there = ShardReader(place_of(url, DiskCache(Path(copies), 1 << 20)), ShardSet.model_validate_json(data))
print([row.numpy().tobytes().hex() for batch in SequenceLoader(there, LoaderSettings(2, 0)) for row in batch.ids_NK])
"""


@pytest.fixture
def reader(codecs, make_reader, tmp_path) -> ShardReader:
    reader = make_reader(codecs[SAMPLED], SIZES)
    (tmp_path / "shards" / "set.json").write_text(reader.shard_set.model_dump_json())
    return reader


def _read(url: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "SSL_CERT_FILE")}
    return subprocess.run(
        [sys.executable, "-c", READ, url, str(tmp_path / "copies")],
        env=kept | {"NO_PROXY": "*", "no_proxy": "*"} | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def _assert_reads(reader: ShardReader, url: str, tmp_path: Path, **environment: str) -> None:
    done = _read(url, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    alone = [
        row.numpy().tobytes().hex() for batch in SequenceLoader(reader, LoaderSettings(2, 0)) for row in batch.ids_NK
    ]
    assert done.stdout.strip() == str(alone)


class _Files(BaseHTTPRequestHandler):
    """Files of a folder with ranges, below any prefix."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path, ranges: list[str], **kwargs: Any) -> None:
        self.folder, self.ranges = folder, ranges
        super().__init__(*args, **kwargs)

    def log_message(self, *args: object) -> None:
        pass

    def file(self) -> Path:
        return self.folder / urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).rsplit("/", 1)[-1]

    def headers_of(self, path: Path) -> dict[str, str]:
        return {"Accept-Ranges": "bytes"}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.file()
        if not path.is_file():
            self.answer(404, b"")
            return
        data, headers = path.read_bytes(), self.headers_of(path)
        wanted = self.headers.get("Range")
        if wanted is None:
            self.answer(200, data, headers)
            return
        self.ranges.append(wanted)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        end = int(first) + len(part) - 1
        self.answer(206, part, headers | {"Content-Range": f"bytes {first}-{end}/{len(data)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def _serving(handler: Callable[..., BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_web_servers_shards_over_tls_are_those_of_the_disk(reader, tmp_path) -> None:
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ranges: list[str] = []
    handler = functools.partial(_Files, folder=tmp_path / "shards", ranges=ranges)
    with _serving(handler, context) as port:
        url = f"https://localhost:{port}/deep/cache"
        _assert_reads(reader, url, tmp_path, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
        assert ranges, "shards are read in ranges"
        refused = _read(url, tmp_path)
        assert refused.returncode and "cannot be read" in refused.stderr and "CERTIFICATE_VERIFY" in refused.stderr


class _Hub(_Files):
    """The few answers of a Hugging Face server that reading a dataset's files takes."""

    def headers_of(self, path: Path) -> dict[str, str]:
        return super().headers_of(path) | {"ETag": '"0"', "X-Repo-Commit": "0" * 40}

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):
            super().do_GET()
        elif "/tree/" in self.path:
            self.answer_json([self.entry(path) for path in sorted(self.folder.iterdir())])
        else:
            self.answer_json({"_id": "0", "id": "me/cache", "sha": "0" * 40, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = urllib.parse.parse_qs(body)["paths"]
        found = [self.folder / path for path in ([paths] if isinstance(paths, str) else paths)]
        self.answer_json([self.entry(path) for path in found if path.is_file()])

    def entry(self, path: Path) -> dict[str, Any]:
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def test_hugging_faces_shards_are_those_of_the_disk(reader, tmp_path) -> None:
    ranges: list[str] = []
    with _serving(functools.partial(_Hub, folder=tmp_path / "shards", ranges=ranges)) as port:
        _assert_reads(
            reader,
            "hf://datasets/me/cache",
            tmp_path,
            HF_ENDPOINT=f"http://127.0.0.1:{port}",
            HF_HOME=str(tmp_path / "hf"),
            HF_HUB_DISABLE_XET="1",
        )


def test_google_storages_shards_are_those_of_the_disk(reader, tmp_path) -> None:
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="caches")
    server.start()
    try:
        host = f"http://127.0.0.1:{server._api._httpd.server_port}"
        for path in (tmp_path / "shards").iterdir():
            name = urllib.parse.quote(f"one/{path.name}", safe="")
            request = urllib.request.Request(
                f"{host}/upload/storage/v1/b/caches/o?uploadType=media&name={name}",
                data=path.read_bytes(),
                headers={"Content-Type": "application/octet-stream"},
            )
            urllib.request.urlopen(request).close()
        _assert_reads(
            reader,
            "gs://caches/one",
            tmp_path,
            STORAGE_EMULATOR_HOST=host,
            FSSPEC_GS_TOKEN="anon",
            GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
        )
    finally:
        server.stop()
