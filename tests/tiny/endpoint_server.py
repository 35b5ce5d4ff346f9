"""A server of OpenAI's form on this machine, whose replies a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Body = dict[str, Any]


@dataclass
class Answer:
    """A status, headers and a body."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class EndpointServer:
    """The server's side.

    Attributes:
        url: its base URL.
        asked: the bodies of all requests to the model, in order.
        keys: the keys that came with them.
        models: what it lists; an Answer in place of a list is sent as it is.
    """

    url: str = ""
    asked: list[Body] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    models: list[dict[str, Any]] | Answer = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: Body, number: int) -> Answer:
        """What is answered to a request, before which so many others came."""
        raise NotImplementedError


Server = TypeVar("Server", bound=EndpointServer)


@contextmanager
def serving(state: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if isinstance(state.models, Answer):
                self._send(state.models)
            else:
                self._send(Answer({"object": "list", "data": state.models}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.asked)
                state.asked.append(body)
                state.keys.append(self.headers["Authorization"].removeprefix("Bearer "))
            self._send(state.reply(body, number))

        def _send(self, answer: Answer) -> None:
            data = answer.body.encode() if isinstance(answer.body, str) else json.dumps(answer.body).encode()
            try:
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # whoever asked has gone

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
