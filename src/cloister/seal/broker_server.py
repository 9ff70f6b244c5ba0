"""The broker over HTTP: two requests, bounded, each answered with the least that the asker needs.

    POST /v1/challenge   {}               → {"nonce"}
    POST /v1/release     ReleaseRequest   → {"sealed"}, or 403 {"refused"}
    GET  /v1/health                       → {}

Covers: limits on what a peer sends, for how long a whole request may take, and how many connections one address has; every
refusal logged.
Guarantees: what travels is nonces, public keys, evidence and sealed keys, so plain HTTP gives no key away; a reader on the
path learns which package is asked for.
Does not cover: availability against whoever has many addresses: put it behind a proxy where strangers can reach it.
"""

import contextlib
import io
import socket
import socketserver
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

import msgspec

from cloister.errors import BrokerError, CloisterError, KeyRefusedError, SettingsError
from cloister.seal.broker import Broker
from cloister.seal.release import MAX_REQUEST_BYTES, Refused, ReleaseRequest
from cloister.wire.tcp import address_of, parse_address
from cloister.wire.tcp import listen as tcp_listen

REQUEST_SECONDS: Final = 30.0
"""Longest wait for a whole request, from when the one before was answered."""
MOST_CONNECTIONS: Final = 64
MOST_PER_ADDRESS: Final = 32
_MOST_DIGITS: Final = 10
"""Of a length; Python refuses to read numbers of thousands of digits."""


class _Timed(io.RawIOBase):
    """What a peer sends, until a moment: many small pieces take no longer than one large."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds
        self.begin()

    def begin(self) -> None:
        """Gives the next request all the time."""
        self._until = time.monotonic() + self._seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("The request took too long.")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "cloister"
    sys_version = ""
    timeout = REQUEST_SECONDS

    def __init__(self, request: socket.socket, address: Any, server: Any, broker: Broker) -> None:
        self._broker = broker
        super().__init__(request, address, server)

    def setup(self) -> None:
        """Has every request end in time."""
        super().setup()
        self.rfile.close()
        self._timed = _Timed(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self._timed)

    def handle_one_request(self) -> None:
        """Answers one request, which has to be complete in time."""
        self._timed.begin()
        super().handle_one_request()

    def do_GET(self) -> None:
        """Answers a health check."""
        self._answer(200 if self.path == "/v1/health" else 404, {})

    def do_POST(self) -> None:
        """Answers a challenge or a release."""
        body = self._body()
        if body is None:
            return
        try:
            if self.path == "/v1/challenge":
                self._answer(200, self._broker.challenge())
            elif self.path == "/v1/release":
                self._answer(200, self._broker.release(msgspec.json.decode(body, type=ReleaseRequest), self._peer()))
            else:
                self._answer(404, Refused("no such path"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refused(f"a request that does not decode: {error}")
        except KeyRefusedError:
            self._answer(403, Refused())
        except BrokerError:
            self._answer(503, Refused("the broker cannot decide now"))
        except CloisterError as error:
            self._refused(error.message)

    def _refused(self, reason: str) -> None:
        try:
            self._broker.refuse(reason, self._peer())
        except BrokerError:
            self._answer(503, Refused("the broker cannot decide now"))
        else:
            self._answer(403, Refused())

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        bounded = length.isdecimal() and len(length) <= _MOST_DIGITS and int(length) <= MAX_REQUEST_BYTES
        if not bounded or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._answer(413, Refused("too long, or without a length"))
            return None
        body = self.rfile.read(int(length))
        return body if len(body) == int(length) else None

    def _answer(self, status: int, content: object) -> None:
        payload = msgspec.json.encode(content)
        self.connection.settimeout(self.timeout)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(payload)

    def _peer(self) -> str:
        return (
            str(self.client_address[0]) if isinstance(self.client_address, tuple) and self.client_address else "local"
        )

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing: the broker has its own log."""


class BrokerServer:
    """A broker that listens. Use it as a context manager, or call `close`."""

    def __init__(self, broker: Broker, listen: str) -> None:
        """Listens on `host:port`, or on a Unix socket given as `unix:PATH`.

        Raises:
            BrokerError: the address cannot be had.
        """
        self._slots: Counter[str] = Counter()
        self._slots_lock = threading.Lock()
        self._broker = broker
        try:
            if listen.startswith("unix:"):
                self.path: Path | None = Path(listen.removeprefix("unix:"))
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.bind(str(self.path))
                self._socket.listen(MOST_CONNECTIONS)
            else:
                self.path = None
                self._socket = tcp_listen(*parse_address(listen))
        except SettingsError as error:
            raise BrokerError(f"Cannot listen on {listen}.", remedy="Give host:port or unix:PATH.") from error
        except OSError as error:
            raise BrokerError(f"Cannot listen on {listen}: {error}.", remedy="Give host:port or unix:PATH.") from error
        self._closed = False

    @property
    def address(self) -> str:
        """Where it listens, as a client writes it."""
        if self.path is not None:
            return f"unix:{self.path}"
        return address_of(self._socket)

    def serve(self) -> None:
        """Answers until `close`, each connection in a thread of its own."""
        while not self._closed:
            try:
                connection, address = self._socket.accept()
            except OSError:
                return
            peer = str(address[0]) if isinstance(address, tuple) else ""  # all who reach a Unix socket are one user's
            if not self._admitted(peer):
                connection.close()
                continue
            threading.Thread(target=self._handle, args=(connection, address, peer), daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "BrokerServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admitted(self, peer: str) -> bool:
        with self._slots_lock:
            if self._slots.total() >= MOST_CONNECTIONS or (peer and self._slots[peer] >= MOST_PER_ADDRESS):
                return False
            self._slots[peer] += 1
            return True

    def _handle(self, connection: socket.socket, address: Any, peer: str) -> None:
        try:
            serve_connection(self._broker, connection, address)
        finally:
            with self._slots_lock:
                self._slots[peer] -= 1
                self._slots += Counter()  # forgets who has none


def serve_connection(broker: Broker, connection: socket.socket, address: Any = "local") -> None:
    """Answers the requests of one connection until the peer closes it."""
    with connection:
        try:
            _Handler(connection, address, socketserver.BaseServer, broker)
        except OSError:
            return  # the peer is gone
