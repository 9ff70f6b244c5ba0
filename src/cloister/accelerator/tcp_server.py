"""The server that `cloister accelerator` runs: products for clients on other hosts, over TCP.

Covers: limits on everything that a client sends, deadlines over whole exchanges, clients that stall, leave or talk nonsense.
Does not cover: secrecy and authenticity, which the channel does not need (`accelerator.remote`); access control. The server
multiplies public weights by whatever it is sent, for whoever reaches it: bind it to a private network.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from cloister.accelerator.cpu import Multiplier
from cloister.accelerator.operands import DEFAULT_OPERAND_BYTES, RefusedError
from cloister.accelerator.registry import DEFAULT_WEIGHT_BYTES, Registry
from cloister.errors import CloisterError, SettingsError
from cloister.wire.codec import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    PAIR_BYTES,
    Frame,
    Kind,
    Status,
    decode,
    decode_pair,
    received_pair,
    received_rows,
)
from cloister.wire.messages import weight_hash
from cloister.wire.tcp import CHUNK, CutError, address_of, listen, parse_address, receive_into, send

IDLE_SECONDS: Final = 3600.0
"""How long a server keeps a silent client."""
REQUEST_SECONDS: Final = 300.0
"""How long a server waits for the rest of a request that has begun, and for an answer to be taken."""
MAX_CLIENTS: Final = 16
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 64 * 2**20
"""How much, and for how long, a server reads on from a client that it refused: else the reason would not arrive."""


class AcceleratorServer:
    """Serves clients over TCP, each with weights of its own, until it is closed."""

    def __init__(
        self,
        address: str,
        open_multiplier: Callable[[], Multiplier],
        max_weight_bytes: int = DEFAULT_WEIGHT_BYTES,
        max_operand_bytes: int = DEFAULT_OPERAND_BYTES,
    ) -> None:
        """Listens at `host:port` (port 0: any free one)."""
        host, port = parse_address(address)
        self._multiplier = open_multiplier()
        self._lock = threading.Lock()  # one product at a time: they share the cores
        self._limits = max_weight_bytes, max_operand_bytes  # of each client
        try:
            self._listener = listen(host, port, backlog=MAX_CLIENTS)
        except OSError as error:
            raise SettingsError(
                f"Cannot listen at {address}: {error.strerror or error}.", remedy="Choose another address."
            ) from error
        self._clients, self._clients_lock = set[socket.socket](), threading.Lock()
        self._closed = False

    @property
    def address(self) -> str:
        """Where it listens."""
        return address_of(self._listener)

    @property
    def backend(self) -> str:
        """What it multiplies with."""
        return self._multiplier.name

    def serve(self) -> None:
        """Accepts clients until `close`."""
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                time.sleep(0.0 if self._closed else 0.1)  # the client left already, or descriptors are short
                continue
            with self._clients_lock:
                welcome = not self._closed and len(self._clients) < MAX_CLIENTS
                if welcome:
                    self._clients.add(client)
            if welcome:
                threading.Thread(target=self._serve_client, args=(client,), daemon=True).start()
            else:
                client.close()

    def close(self) -> None:
        """Stops listening and cuts every connection; harmless when already closed."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake a thread that accepts
        self._listener.close()
        with self._clients_lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        self._multiplier.close()

    def _serve_client(self, sock: socket.socket) -> None:
        registry = Registry(self._multiplier, *self._limits)
        try:
            while self._serve_one(sock, registry):
                pass
            _linger(sock)
        except (OSError, CloisterError, MemoryError):
            pass  # this client is gone or speaks nonsense; the others are not concerned
        finally:
            with self._clients_lock:
                self._clients.discard(sock)
            sock.close()

    def _serve_one(self, sock: socket.socket, registry: Registry) -> bool:
        """Serves one request; returns False when the connection cannot go on."""
        header = bytearray(HEADER_BYTES)
        receive_into(sock, memoryview(header)[:1], time.monotonic() + IDLE_SECONDS)
        deadline = time.monotonic() + REQUEST_SECONDS
        receive_into(sock, memoryview(header)[1:], deadline)
        try:
            frame = decode(header)
            if frame.kind is Kind.REGISTER:
                self._register(sock, registry, frame, deadline)
            elif frame.kind is Kind.MULTIPLY:
                self._multiply(sock, registry, frame, deadline)
            elif frame.kind is Kind.PAIR:
                self._multiply_pair(sock, registry, frame, deadline)
            elif frame.kind is Kind.RELEASE:
                registry.operands.release(frame.weight)
                send(sock, Frame(Kind.RELEASED, frame.request, frame.weight).encode(), deadline)
            else:
                raise RefusedError(Status.BAD_FRAME, f"A {frame.kind.name} frame is not a request.")
        except CutError:
            return False
        except (CloisterError, MemoryError) as error:  # the payload may be unread: say why, then end
            _refuse(sock, int.from_bytes(header[8:16], "little"), error)
            return False
        return True

    def _register(self, sock: socket.socket, registry: Registry, frame: Frame, deadline: float) -> None:
        expected = bytearray(32)
        receive_into(sock, memoryview(expected), deadline)
        registry.check_room(frame)
        matrix = np.empty((frame.d_out, frame.d_in), np.int8)
        send(sock, Frame(Kind.READY, frame.request, frame.weight).encode(), deadline)
        receive_into(sock, matrix.data.cast("B"), deadline)
        if weight_hash(matrix) != bytes(expected):
            raise RefusedError(Status.BAD_FRAME, "The weight was damaged on the way.")
        registry.add(frame, matrix)
        send(sock, Frame(Kind.REGISTERED, frame.request, frame.weight).encode(), deadline)

    def _multiply(self, sock: socket.socket, registry: Registry, frame: Frame, deadline: float) -> None:
        d_out = registry.width(frame)
        words = np.empty(frame.rows * frame.d_in, np.int32)
        receive_into(sock, words.data.cast("B"), deadline)
        product = np.empty((frame.rows, d_out), np.int32)
        with self._lock:
            registry.multiply(frame, received_rows(words, frame.rows, frame.d_in), product)
        reply = Frame(Kind.PRODUCT, frame.request, frame.weight, frame.rows, frame.d_in, d_out)
        send(sock, reply.encode() + product.tobytes(), time.monotonic() + REQUEST_SECONDS)

    def _multiply_pair(self, sock: socket.socket, registry: Registry, frame: Frame, deadline: float) -> None:
        second = bytearray(PAIR_BYTES)
        receive_into(sock, memoryview(second), deadline)
        shape = decode_pair(frame, second)
        registry.operands.check(frame.weight, shape)
        words = np.empty(shape.appended_words + shape.left_words, np.int32)
        receive_into(sock, words.data.cast("B"), deadline)
        product = np.empty((shape.heads, shape.rows, shape.d_out), np.int32)
        with self._lock:
            registry.operands.multiply(received_pair(words, frame.weight, shape), product)
        reply = Frame(Kind.PAIR_PRODUCT, frame.request, frame.weight, frame.rows, frame.d_in, frame.d_out)
        send(sock, reply.encode() + product.tobytes(), time.monotonic() + REQUEST_SECONDS)


def _refuse(sock: socket.socket, request: int, error: CloisterError | MemoryError) -> None:
    status, text = Status.NO_MEMORY, "Memory is short."
    if isinstance(error, CloisterError):
        status, text = error.status if isinstance(error, RefusedError) else Status.BAD_FRAME, error.message
    raw = text.encode("ascii", "replace")[:MAX_ERROR_BYTES]
    header = Frame(Kind.ERROR, request, rows=len(raw), status=status).encode()
    send(sock, header + raw, time.monotonic() + LINGER_SECONDS)


def _linger(sock: socket.socket) -> None:
    """Reads on for a moment after a refusal: closing with bytes unread would take the reason back."""
    deadline, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
    sock.shutdown(socket.SHUT_WR)
    while left > 0 and (wait := deadline - time.monotonic()) > 0:
        sock.settimeout(wait)
        count = len(sock.recv(min(left, CHUNK)))
        if not count:
            return
        left -= count
