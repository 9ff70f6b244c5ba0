"""An accelerator on another host, over TCP: the client, and the server that `cloister accelerator` runs.

Covers: the same frames as between processes, followed by their payloads; limits on everything that either side sends,
deadlines over whole exchanges (a byte now and then does not extend them). A weight is sent once the server has room for it.
The channel needs no secrecy: it carries public weights and blinded values. Nor need it be authentic: a weight is hashed on
arrival and every product is checked by the gate. Someone on the path learns what the server learns (shapes, timing), and can
delay, cut or spoil an exchange: the work then goes elsewhere.
Does not cover: access control. The server multiplies public weights by whatever it is sent, for whoever reaches it: bind
it to a private network.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cpu import Multiplier
from cloister.accelerator.operands import DEFAULT_OPERAND_BYTES, RefusedError
from cloister.accelerator.registry import DEFAULT_WEIGHT_BYTES, Registry
from cloister.errors import (
    AcceleratorError,
    AcceleratorLostError,
    AcceleratorProtocolError,
    AcceleratorTimeoutError,
    CloisterError,
    SettingsError,
    WireError,
)
from cloister.wire.codec import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    MAX_WEIGHTS,
    PAIR_BYTES,
    Frame,
    Kind,
    Status,
    decode,
    decode_pair,
    encode_pair_request,
    peer_text,
    received_pair,
    received_rows,
)
from cloister.wire.messages import Blinded, PublicWeight, weight_hash
from cloister.wire.pairs import PairRequest

CONNECT_SECONDS: Final = 10.0
REGISTER_SECONDS: Final = 300.0
IDLE_SECONDS: Final = 3600.0
"""How long a server keeps a silent client."""
REQUEST_SECONDS: Final = 300.0
"""How long a server waits for the rest of a request that has begun, and for an answer to be taken."""
MAX_CLIENTS: Final = 16
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 64 * 2**20
"""How much, and for how long, a server reads on from a client that it refused: else the reason would not arrive."""
_CHUNK: Final = 2**20


class _CutError(WireError):
    """The stream ended before its message did."""


class RemoteAccelerator:
    """The client of an accelerator at `host:port`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._host, self._port = parse_address(address)
        self._sock: socket.socket | None = None
        self._closed = ""
        self._request = 0
        self._weights: dict[bytes, tuple[int, int, int]] = {}

    @property
    def name(self) -> str:
        """Returns the address."""
        return f"accelerator at {self._address}"

    def register(self, weight: PublicWeight) -> None:
        """Sends `weight`, once."""
        if weight.weight_id in self._weights:
            return
        sock = self._connected()
        if len(self._weights) >= MAX_WEIGHTS:
            raise AcceleratorProtocolError(f"More than {MAX_WEIGHTS} weights.")
        d_out, d_in = weight.shape
        index = len(self._weights)
        self._request += 1
        deadline = time.monotonic() + REGISTER_SECONDS
        try:
            send(sock, Frame(Kind.REGISTER, self._request, index, 0, d_in, d_out).encode() + weight.weight_id, deadline)
            self._answer(sock, Kind.READY, deadline)  # it has room: only now is the weight sent
            send(sock, weight.matrix.data.cast("B"), deadline)
            self._answer(sock, Kind.REGISTERED, deadline)
        except (OSError, WireError) as error:
            raise self._failure(error, REGISTER_SECONDS) from error
        self._weights[weight.weight_id] = (index, d_in, d_out)

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the unverified product."""
        sock = self._connected()
        if weight_id not in self._weights:
            raise AcceleratorProtocolError("The weight was not registered.", remedy="Register it first.")
        index, d_in, d_out = self._weights[weight_id]
        rows = blinded.rows.shape[0]
        if blinded.rows.shape[1] != d_in:
            raise AcceleratorProtocolError(f"Rows of {blinded.rows.shape[1]} do not fit a weight of {d_out} x {d_in}.")
        self._request += 1
        product = np.empty((rows, d_out), np.int32)
        deadline = time.monotonic() + timeout_seconds
        try:
            header = Frame(Kind.MULTIPLY, self._request, index, rows, d_in, d_out).encode()
            send(sock, header + blinded.rows.tobytes(), deadline)
            frame = self._answer(sock, Kind.PRODUCT, deadline)
            if (frame.weight, frame.rows, frame.d_in, frame.d_out) != (index, rows, d_in, d_out):
                raise WireError("It answered with another shape.")
            receive_into(sock, product.data.cast("B"), deadline)
        except (OSError, WireError) as error:
            raise self._failure(error, timeout_seconds) from error
        return product

    def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> Int32[np.ndarray, "heads rows d_out"]:
        """Returns the unverified product of two blinded matrices."""
        sock, shape = self._connected(), request.shape
        self._request += 1
        product = np.empty((shape.heads, shape.rows, shape.d_out), np.int32)
        deadline = time.monotonic() + timeout_seconds
        header, expected = encode_pair_request(self._request, request.operand, shape)
        parts = [part.rows.tobytes() for part in (request.appended, request.left) if part is not None]
        try:
            send(sock, b"".join([header, *parts]), deadline)
            if self._answer(sock, Kind.PAIR_PRODUCT, deadline).encode() != expected:
                raise WireError("It answered with another shape.")
            receive_into(sock, product.data.cast("B") if product.size else memoryview(b""), deadline)
        except (OSError, WireError) as error:
            raise self._failure(error, timeout_seconds) from error
        return product

    def release(self, operand: int, timeout_seconds: float) -> None:
        """Lets the accelerator forget a kept operand."""
        sock = self._connected()
        self._request += 1
        deadline = time.monotonic() + timeout_seconds
        try:
            send(sock, Frame(Kind.RELEASE, self._request, operand).encode(), deadline)
            self._answer(sock, Kind.RELEASED, deadline)
        except (OSError, WireError) as error:
            raise self._failure(error, timeout_seconds) from error

    def close(self) -> None:
        """Closes the connection; harmless when already closed."""
        self._closed = self._closed or "closed"
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _connected(self) -> socket.socket:
        if self._closed:
            raise AcceleratorLostError(f"The {self.name} is {self._closed}.", remedy="Start another.")
        if self._sock is None:
            try:
                self._sock = socket.create_connection((self._host, self._port), CONNECT_SECONDS)
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                self._closed = "unreachable"
                raise AcceleratorLostError(
                    f"The {self.name} cannot be reached: {error}.",
                    remedy="Start it there with: cloister accelerator --listen HOST:PORT.",
                ) from error
        return self._sock

    def _answer(self, sock: socket.socket, kind: Kind, deadline: float) -> Frame:
        header = bytearray(HEADER_BYTES)
        receive_into(sock, memoryview(header), deadline)
        frame = decode(header)
        if frame.request != self._request:
            raise WireError(f"It answered request {frame.request}, not {self._request}.")
        if frame.kind is Kind.ERROR:
            text = bytearray(min(frame.rows, MAX_ERROR_BYTES))
            receive_into(sock, memoryview(text), deadline)
            raise WireError(f"It refuses ({frame.status.name}): {peer_text(text)}")
        if frame.kind is not kind:
            raise WireError(f"It sent {frame.kind.name} out of turn.")
        return frame

    def _failure(self, error: Exception, timeout_seconds: float) -> AcceleratorError:
        self._closed = "closed after a failure"
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if isinstance(error, TimeoutError):
            return AcceleratorTimeoutError(f"The {self.name} did not answer within {timeout_seconds:g} s.")
        if isinstance(error, WireError) and not isinstance(error, _CutError):
            return AcceleratorProtocolError(f"The {self.name}: {error.message}")
        return AcceleratorLostError(f"The {self.name} is gone: {error}.")


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
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=MAX_CLIENTS)
        except OSError as error:
            raise SettingsError(f"Cannot listen at {address}: {error}.", remedy="Choose another address.") from error
        self._clients, self._clients_lock = set[socket.socket](), threading.Lock()
        self._closed = False

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

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
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        except _CutError:
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
        count = len(sock.recv(min(left, _CHUNK)))
        if not count:
            return
        left -= count


def send(sock: socket.socket, data: bytes | memoryview, deadline: float) -> None:
    """Sends all of `data`.

    Raises:
        OSError: the connection is gone (`TimeoutError`: the deadline, a time of the monotonic clock, passed).
    """
    _until(sock, deadline)
    sock.sendall(data)


def _until(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:  # also when data is there: a peer that always has one more byte would never end
        raise TimeoutError("The deadline passed.")
    sock.settimeout(left)


def receive_into(sock: socket.socket, target: memoryview, deadline: float) -> None:
    """Fills `target` from the stream.

    Raises:
        WireError: the connection was cut first.
        OSError: the connection is gone (`TimeoutError`: the deadline, a time of the monotonic clock, passed).
    """
    filled = 0
    while filled < len(target):
        _until(sock, deadline)
        count = sock.recv_into(target[filled:], min(_CHUNK, len(target) - filled))
        if not count:
            raise _CutError("The connection was cut.")
        filled += count


def parse_address(address: str) -> tuple[str, int]:
    """Returns host and port of `host:port` (or `[ipv6]:port`).

    Raises:
        SettingsError: it is not one.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535 or not host:
        raise SettingsError(f"{address!r} is not an address.", remedy="Write host:port, for instance 10.0.0.2:7000.")
    return host.strip("[]"), int(port)
