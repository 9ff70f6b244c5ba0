"""An accelerator on another host, over TCP: the client, and the server that `cloister accelerator` runs.

Covers: the same frames as between processes, followed by their payloads; limits on everything that either side sends.
Does not cover: access control. The server multiplies public weights by whatever it is sent, for whoever reaches it: bind
it to a private network. The client believes nothing: answers are checked by the gate.
"""

import socket
import threading
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cpu import Multiplier
from cloister.accelerator.registry import DEFAULT_WEIGHT_BYTES, RefusedError, Registry
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
    Frame,
    Kind,
    Status,
    decode,
    received_rows,
)
from cloister.wire.messages import Blinded, PublicWeight, weight_hash

CONNECT_SECONDS: Final = 10.0
REGISTER_SECONDS: Final = 300.0
IDLE_SECONDS: Final = 3600.0
"""How long a server keeps a silent client."""
MAX_CLIENTS: Final = 16
_CHUNK: Final = 2**20


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
        d_out, d_in = weight.shape
        index = len(self._weights)
        self._request += 1
        try:
            sock.settimeout(REGISTER_SECONDS)
            sock.sendall(Frame(Kind.REGISTER, self._request, index, 0, d_in, d_out).encode() + weight.weight_id)
            sock.sendall(weight.matrix.data.cast("B"))
            self._answer(sock, Kind.REGISTERED)
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
        self._request += 1
        product = np.empty((rows, d_out), np.int32)
        try:
            sock.settimeout(timeout_seconds)
            header = Frame(Kind.MULTIPLY, self._request, index, rows, d_in, d_out).encode()
            sock.sendall(header + blinded.rows.tobytes())
            frame = self._answer(sock, Kind.PRODUCT)
            if (frame.weight, frame.rows, frame.d_in, frame.d_out) != (index, rows, d_in, d_out):
                raise WireError("It answered with another shape.")
            receive_into(sock, product.data.cast("B"))
        except (OSError, WireError) as error:
            raise self._failure(error, timeout_seconds) from error
        return product

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

    def _answer(self, sock: socket.socket, kind: Kind) -> Frame:
        header = bytearray(HEADER_BYTES)
        receive_into(sock, memoryview(header))
        frame = decode(header)
        if frame.request != self._request:
            raise WireError(f"It answered request {frame.request}, not {self._request}.")
        if frame.kind is Kind.ERROR:
            text = bytearray(min(frame.rows, MAX_ERROR_BYTES))
            receive_into(sock, memoryview(text))
            raise WireError(f"It refuses ({frame.status.name}): {text.decode('ascii', 'replace')}")
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
        if isinstance(error, WireError) and "cut" not in error.message:
            return AcceleratorProtocolError(f"The {self.name}: {error.message}")
        return AcceleratorLostError(f"The {self.name} is gone: {error}.")


class AcceleratorServer:
    """Serves clients over TCP, each with weights of its own, until it is closed."""

    def __init__(
        self, address: str, open_multiplier: Callable[[], Multiplier], max_weight_bytes: int = DEFAULT_WEIGHT_BYTES
    ) -> None:
        """Listens at `host:port` (port 0: any free one)."""
        host, port = parse_address(address)
        self._multiplier = open_multiplier()
        self._lock = threading.Lock()  # one product at a time: they share the cores
        self._max_bytes = max_weight_bytes
        try:
            self._listener = socket.create_server((host, port), backlog=MAX_CLIENTS)
        except OSError as error:
            raise SettingsError(f"Cannot listen at {address}: {error}.", remedy="Choose another address.") from error
        self._slots = threading.BoundedSemaphore(MAX_CLIENTS)

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    @property
    def backend(self) -> str:
        """What it multiplies with."""
        return self._multiplier.name

    def serve(self) -> None:
        """Accepts clients until `close`."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._serve_client, args=(client,), daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._listener.close()

    def _serve_client(self, sock: socket.socket) -> None:
        registry = Registry(self._multiplier, self._max_bytes)
        try:
            with sock:
                sock.settimeout(IDLE_SECONDS)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self._serve_one(sock, registry):
                    pass
        except (OSError, CloisterError, MemoryError):
            pass  # this client is gone or speaks nonsense; the others are not concerned
        finally:
            self._slots.release()

    def _serve_one(self, sock: socket.socket, registry: Registry) -> bool:
        """Serves one request; returns False when the connection cannot go on."""
        header = bytearray(HEADER_BYTES)
        receive_into(sock, memoryview(header))
        frame = decode(header)
        try:
            if frame.kind is Kind.REGISTER:
                registry.check_room(frame)
                registry.add(frame, _receive_weight(sock, frame))
                sock.sendall(Frame(Kind.REGISTERED, frame.request, frame.weight).encode())
            elif frame.kind is Kind.MULTIPLY:
                d_out = registry.width(frame)
                words = np.empty(frame.rows * frame.d_in, np.int32)
                receive_into(sock, words.data.cast("B"))
                product = np.empty((frame.rows, d_out), np.int32)
                with self._lock:
                    registry.multiply(frame, received_rows(words, frame.rows, frame.d_in), product)
                reply = Frame(Kind.PRODUCT, frame.request, frame.weight, frame.rows, frame.d_in, d_out)
                sock.sendall(reply.encode() + product.tobytes())
            else:
                raise RefusedError(Status.BAD_FRAME, f"A {frame.kind.name} frame is not a request.")
        except CloisterError as error:  # the payload may be unread: say why, then close
            status = error.status if isinstance(error, RefusedError) else Status.FAILED
            text = error.message.encode()[:MAX_ERROR_BYTES]
            sock.sendall(Frame(Kind.ERROR, frame.request, rows=len(text), status=status).encode() + text)
            return False
        return True


def _receive_weight(sock: socket.socket, frame: Frame) -> np.ndarray:
    expected = bytearray(32)
    receive_into(sock, memoryview(expected))
    matrix = np.empty((frame.d_out, frame.d_in), np.int8)
    receive_into(sock, matrix.data.cast("B"))
    if weight_hash(matrix) != bytes(expected):
        raise RefusedError(Status.BAD_FRAME, "The weight was damaged on the way.")
    return matrix


def receive_into(sock: socket.socket, target: memoryview) -> None:
    """Fills `target` from the stream.

    Raises:
        WireError: the connection was cut first.
        TimeoutError: the socket's timeout passed.
    """
    filled = 0
    while filled < len(target):
        count = sock.recv_into(target[filled:], min(_CHUNK, len(target) - filled))
        if not count:
            raise WireError("The connection was cut.")
        filled += count


def parse_address(address: str) -> tuple[str, int]:
    """Returns host and port of `host:port` (or `[ipv6]:port`).

    Raises:
        SettingsError: it is not one.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535 or not host:
        raise SettingsError(f"{address!r} is not an address.", remedy="Write host:port, for instance 10.0.0.2:7000.")
    return host.strip("[]"), int(port)
