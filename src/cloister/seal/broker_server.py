"""The broker over HTTP: two requests, bounded, each answered with the least that the asker needs.

    POST /v1/challenge   {}               → {"nonce"}
    POST /v1/release     ReleaseRequest   → {"sealed"}, or 403 {"refused"}
    GET  /v1/health                       → {}

Covers: limits on what a peer sends and for how long; every refusal logged.
Guarantees: what travels is nonces, public keys, evidence and sealed keys, so plain HTTP gives no key away; a reader on the
path learns which package is asked for.
Does not cover: availability: put it behind a proxy with limits per address where strangers can reach it.
"""

import contextlib
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

import msgspec

from cloister.errors import BrokerError, CloisterError, KeyRefusedError
from cloister.seal.broker import Broker
from cloister.seal.release import MAX_REQUEST_BYTES, Refused, ReleaseRequest

REQUEST_SECONDS: Final = 30.0
MOST_CONNECTIONS: Final = 64


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "cloister"
    sys_version = ""
    timeout = REQUEST_SECONDS

    def __init__(self, request: socket.socket, address: Any, server: Any, broker: Broker) -> None:
        self._broker = broker
        super().__init__(request, address, server)

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
        if not length.isdecimal() or int(length) > MAX_REQUEST_BYTES or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._answer(413, Refused("too long, or without a length"))
            return None
        body = self.rfile.read(int(length))
        return body if len(body) == int(length) else None

    def _answer(self, status: int, content: object) -> None:
        payload = msgspec.json.encode(content)
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
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._broker = broker
        try:
            if listen.startswith("unix:"):
                self.path: Path | None = Path(listen.removeprefix("unix:"))
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.bind(str(self.path))
                self._socket.listen(MOST_CONNECTIONS)
            else:
                self.path = None
                host, _, port = listen.rpartition(":")
                self._socket = socket.create_server((host.strip("[]") or "127.0.0.1", int(port)))
        except (OSError, ValueError, OverflowError) as error:
            raise BrokerError(f"Cannot listen on {listen}: {error}.", remedy="Give host:port or unix:PATH.") from error
        self._closed = False

    @property
    def address(self) -> str:
        """Where it listens, as a client writes it."""
        if self.path is not None:
            return f"unix:{self.path}"
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    def serve(self) -> None:
        """Answers until `close`, each connection in a thread of its own."""
        while not self._closed:
            try:
                connection, address = self._socket.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._handle, args=(connection, address), daemon=True).start()

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

    def _handle(self, connection: socket.socket, address: Any) -> None:
        try:
            serve_connection(self._broker, connection, address)
        finally:
            self._slots.release()


def serve_connection(broker: Broker, connection: socket.socket, address: Any = "local") -> None:
    """Answers the requests of one connection until the peer closes it."""
    with connection:
        try:
            _Handler(connection, address, socketserver.BaseServer, broker)
        except OSError:
            return  # the peer is gone
