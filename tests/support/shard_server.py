"""A real HTTP server on the loopback interface that serves a folder and misbehaves as told, for tests.

Faults are given per file name as a list: each request for the file takes the next one, and when none is left the file
is served as it should be. Everything asked for is kept in `requests`.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Fault:
    """What goes wrong with one request.

    Attributes:
        kind: `status`, `redirect`, `reset`, `short`, `stall`, `stall-first`, `drip`, `wrong`, `huge`, `gzip` or
            `no-range`.
        value: the status, where to redirect, or after how many bytes.
        headers: further ones of the answer.
    """

    kind: str
    value: int | str = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ShardServer:
    """The address of the server, what goes wrong, and what was asked for."""

    folder: Path
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    port: int = 0
    released: threading.Event = field(default_factory=threading.Event)
    before: Callable[[str], None] = lambda name: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/sets/tiny"

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.requests)


@contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    """A server that ends with the block, with all its threads."""
    state = ShardServer(folder)

    class Handler(_Handler):
        shared = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    shared: ShardServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1].split("?")[0]
        asked = self.headers.get("Range", "")
        self.shared.requests.append((name, asked))
        self.shared.authorizations.append(self.headers.get("Authorization", ""))
        self.shared.before(name)
        waiting = self.shared.faults.get(name, []) or self.shared.faults.get("*", [])
        fault = waiting.pop(0) if waiting else Fault("")
        self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):
            self._answer(name, asked, fault)

    def _answer(self, name: str, asked: str, fault: Fault) -> None:
        path = self.shared.folder / name
        if fault.kind == "status" or (fault.kind != "redirect" and not path.is_file()):
            return self._head(int(fault.value or 404), 0, fault.headers)
        if fault.kind == "redirect":
            return self._head(302, 0, {"Location": str(fault.value)})
        if fault.kind == "stall-first":
            self.shared.released.wait(20)
            return None
        content = path.read_bytes()
        if fault.kind == "wrong":
            content = bytes(byte ^ 1 for byte in content)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault.kind != "no-range" else 0
        if start >= len(content) > 0:
            return self._head(416, 0, {})
        headers = {"Content-Encoding": "gzip"} if fault.kind == "gzip" else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault.kind == "huge":
            self._head(200, None, headers)
            while True:
                self._send(name, bytes(2**16))
        self._head(206 if start else 200, len(body), headers)
        if fault.kind == "drip":
            for byte in body:
                self._send(name, bytes([byte]))
                time.sleep(0.02)
        if fault.kind in ("reset", "short", "stall"):
            body = body[: int(fault.value)]
        self._send(name, body)
        if fault.kind == "stall":
            self.shared.released.wait(20)
        if fault.kind == "reset":
            time.sleep(0.05)
            # Lingering for no time at all: the peer sees a reset, not an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return None

    def _send(self, name: str, data: bytes) -> None:
        self.wfile.write(data)
        self.shared.sent[name] += len(data)

    def _head(self, status: int, num_bytes: int | None, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if num_bytes is not None:
            self.send_header("Content-Length", str(num_bytes))
        self.send_header("Connection", "close")
        self.end_headers()
