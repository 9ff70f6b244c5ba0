"""The client of an accelerator on another host, over TCP (`accelerator.tcp_server`).

Covers: the same frames as between processes, followed by their payloads; deadlines over whole exchanges. A weight is sent
once the server has room for it, and once only.
The channel needs no secrecy: it carries public weights and blinded values. Nor need it be authentic: a weight is hashed on
arrival and every product is checked by the gate. Someone on the path learns what the server learns (shapes, timing), and can
delay, cut or spoil an exchange: the work then goes elsewhere.
"""

import socket
import time
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.errors import (
    AcceleratorError,
    AcceleratorLostError,
    AcceleratorProtocolError,
    AcceleratorTimeoutError,
    WireError,
)
from cloister.wire.codec import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    MAX_WEIGHTS,
    Frame,
    Kind,
    decode,
    encode_pair_request,
    peer_text,
)
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.pairs import PairRequest
from cloister.wire.tcp import CutError, parse_address, receive_into, send

CONNECT_SECONDS: Final = 10.0
REGISTER_SECONDS: Final = 300.0


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
        if isinstance(error, WireError) and not isinstance(error, CutError):
            return AcceleratorProtocolError(f"The {self.name}: {error.message}")
        return AcceleratorLostError(f"The {self.name} is gone: {error}.")
