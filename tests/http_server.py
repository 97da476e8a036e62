"""A web server for a test."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: str
    headers: Message
    body: bytes


# A status, the content (anything but bytes as JSON), and headers in place of the usual ones; an empty one is left out.
Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


@contextmanager
def serving(answer: Callable[[Request], Answer]) -> Iterator[str]:
    """Serve on loopback and yield the address; the server stops at the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            # The client may be gone, for example a killed process.
            with suppress(ConnectionError):
                super().handle()

        def _serve(self) -> None:
            path, _, query = self.path.partition("?")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content, *more = answer(Request(self.command, path, query, self.headers, body))
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
            headers = {name: value for name, value in {**headers, **dict(*more)}.items() if value}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)
            # The client would wait for the rest of a longer content.
            self.close_connection = headers.get("Content-Length") != str(len(raw))

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # The argument is the interval at which the server checks for shutdown().
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
