"""An HTTP proxy on loopback in front of an S3 server that fails as networks and servers do; by seed.

The client's headers go through as they came: the signature of a request covers its Host.
"""

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

# Errors of the server with and without a body that S3 would send; a connection reset before the answer; an answer
# shorter than its Content-Length; one that does not come; and an error after the server has done what it was asked.
Fault = Literal["500", "503", "reset", "cut", "silent", "after"]
# How often each is taken among those that can happen to a request; silence costs a client's whole read timeout.
FAULTS: dict[Fault, int] = {"500": 2, "503": 2, "reset": 2, "cut": 3, "silent": 1, "after": 6}
# No address meets more faults than this, so that six attempts are always enough, whatever the seed.
MOST = 5
SLOW_DOWN = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>Try again</Message></Error>"
# Methods after which the server is not as it was.
CHANGING = {"PUT", "POST", "DELETE"}
# A client sends these for the next hop alone.
HOP_BY_HOP = {"connection", "expect", "keep-alive"}


class FaultyProxy(ThreadingHTTPServer):
    """Hands requests to ``backend``; a share ``rate`` of them meets a fault, and every one whose path has ``refused``.

    ``faults`` counts what was done to requests, ``stored`` the PUTs that reached the backend by path.
    """

    daemon_threads = True

    def __init__(self, backend: str, rate: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend, self.rate = urlsplit(backend).netloc, rate
        self.refused: str | None = None
        self.faults: Counter[Fault] = Counter()
        self.stored: Counter[str] = Counter()
        self.stopping = threading.Event()
        self._chance, self._lock = random.Random(seed), threading.Lock()
        self._met: Counter[str] = Counter()

    @property
    def endpoint(self) -> str:
        """What to give a client in place of the backend's."""
        return f"http://127.0.0.1:{self.server_port}"

    def choose(self, method: str, path: str) -> Fault | None:
        """What happens to a request: a fault that can happen to its kind, or nothing."""
        possible = [f for f in FAULTS if (f != "cut" or method == "GET") and (f != "after" or method in CHANGING)]
        with self._lock:
            if self.refused is not None and self.refused in path:
                return "503"
            if self._chance.random() >= self.rate or self._met[path] == MOST:
                return None
            self._met[path] += 1
            return self._chance.choices(possible, [FAULTS[f] for f in possible])[0]

    def count(self, fault: Fault | None, stored: str | None) -> None:
        """Notes what was done."""
        with self._lock:
            self.faults.update([fault] if fault else [])
            self.stored.update([stored] if stored else [])

    def shutdown_request(self, request: Any) -> None:
        """Closes without a polite end, so that a lingering time of zero is a reset."""
        self.close_request(request)

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news here."""


@contextmanager
def faulty(backend: str, rate: float = 0.0, seed: int = 0) -> Iterator[FaultyProxy]:
    """A proxy that serves while the block runs."""
    with FaultyProxy(backend, rate, seed) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.stopping.set()
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client; its requests go to the backend over a connection of their own each."""

    protocol_version = "HTTP/1.1"
    # or the body waits for the head's acknowledgement
    disable_nagle_algorithm = True
    server: FaultyProxy

    def do_GET(self) -> None:
        """Answers one request of any method, or spoils it."""
        body, path = self._body(), unquote(self.path)
        fault = self.server.choose(self.command, path)
        answer = None if fault in ("500", "503", "reset", "silent") else self._ask(body)
        self.server.count(fault, path if answer and self.command == "PUT" else None)
        if fault == "silent":
            self.server.stopping.wait()
        if fault in ("reset", "silent"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault in ("500", "after"):
            self._answer(500, {}, b"<html>Internal Server Error</html>")
        elif answer is None:
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
        else:
            status, headers, data = answer
            self._answer(status, dict(headers), data, cut=fault == "cut")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _body(self) -> bytes:
        """The request's body; where it comes in chunks, with their lengths, as it is handed on."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        raw = b""
        while True:
            line = self.rfile.readline()
            size = int(line.split(b";")[0], 16)
            raw += line + self.rfile.read(size + 2)
            if size == 0:
                return raw

    def _ask(self, body: bytes) -> tuple[int, HTTPMessage, bytes]:
        backend = HTTPConnection(self.server.backend)
        try:
            backend.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    backend.putheader(name, value)
            backend.endheaders(body)
            response = backend.getresponse()
            return response.status, response.headers, response.read()
        finally:
            backend.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        kept = {n: v for n, v in headers.items() if n.lower() not in {*HOP_BY_HOP, "transfer-encoding"}}
        # the length of what a HEAD speaks of is in its own headers
        length = {} if self.command == "HEAD" and "Content-Length" in kept else {"Content-Length": str(len(data))}
        for name, value in {**kept, **length}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""
