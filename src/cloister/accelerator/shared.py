"""The client of a worker of this host: headers over a socket pair, rows and products in shared memory.

Covers: registering weights without copying them, one product at a time with a timeout, and everything that a faulty or
hostile worker can do to the exchange: die, hang, answer short, late, twice or for another request.
Guarantees: every wait ends within its timeout. After its first failure this accelerator is closed and says so.
Does not cover: starting the worker (`accelerator.launch`); wrong numbers, which the check of the gate catches.
"""

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int32, Int64

from cloister.accelerator.launch import launch_worker
from cloister.errors import (
    AcceleratorError,
    AcceleratorLostError,
    AcceleratorProtocolError,
    AcceleratorTimeoutError,
    WireError,
)
from cloister.settings import Backend
from cloister.wire.codec import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    MAX_WEIGHTS,
    Frame,
    Kind,
    decode,
    encode_pair,
    encode_pair_request,
    peer_text,
)
from cloister.wire.exchange import UNSENT, Line
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.pairs import PairRequest
from cloister.wire.sealed_memory import Arena, SealedMatrix

START_SECONDS: Final = 120.0
"""Longest wait for a worker to start, compile its kernels once and answer."""

REGISTER_SECONDS: Final = 60.0
"""Longest wait for a worker to take one weight."""

SEND_SECONDS: Final = 1.0
"""Longest wait for room for one header. Only a worker that answers without reading can let the socket fill up."""


_REQUEST: Final = 1
"""Which 8 bytes of a header number the request."""


@dataclass(frozen=True)
class _Headers:
    """The headers of a line, all but the numbers of its requests, and its longest row and product."""

    weights: Sequence[PublicWeight]
    headers: Int64[np.ndarray, "weights 2 words"]
    d_in: int
    d_out: int


class SharedMemoryAccelerator:
    """A worker process on this host."""

    def __init__(self, sock: socket.socket, process: "subprocess.Popen[bytes] | None", label: str) -> None:
        """Wraps a connected socket; `start` is the usual way to get one."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_SECONDS), 0))
        self._sock = sock
        self._process = process
        self._label = label
        self._backend = "starting"
        self._ready = False
        self._closed = ""
        self._request = 0
        self._weights: dict[bytes, tuple[int, int, int]] = {}
        self._kept: list[SealedMatrix] = []
        self._arenas: tuple[Arena, Arena] | None = None
        self._buffer = bytearray(HEADER_BYTES + MAX_ERROR_BYTES + 1)
        self._timeout = -1.0
        self._line: _Headers | None = None

    @staticmethod
    def start(label: str = "worker", backend: Backend = Backend.AUTO, threads: int = 0) -> "SharedMemoryAccelerator":
        """Returns a client of a new worker process; the process starts up while the caller goes on.

        Raises:
            AcceleratorLostError: no process can be started.
        """
        sock, process = launch_worker(label, backend, threads)
        return SharedMemoryAccelerator(sock, process, label)

    @property
    def name(self) -> str:
        """Returns the label and what the worker says that it multiplies with."""
        return f"{self._label} ({self._backend})"

    @property
    def pid(self) -> int | None:
        """Process id of the worker."""
        return self._process.pid if self._process is not None else None

    def register(self, weight: PublicWeight) -> None:
        """Hands the worker a read-only mapping of `weight`; without sealed memory behind it, one copy is made."""
        if weight.weight_id in self._weights:
            return
        self._await_ready()
        if len(self._weights) >= MAX_WEIGHTS:
            raise AcceleratorProtocolError(f"More than {MAX_WEIGHTS} weights.")
        backing = weight.backing or self._copied(weight)
        self._kept.append(backing)
        d_out, d_in = weight.shape
        index = len(self._weights)
        frame = Frame(Kind.REGISTER, self._next(), index, 0, d_in, d_out)
        self._send(frame.encode(), [backing.fileno()])
        self._receive(Kind.REGISTERED, REGISTER_SECONDS)
        self._weights[weight.weight_id] = (index, d_in, d_out)

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the unverified product, in memory that the worker can still write."""
        self._await_ready()
        if weight_id not in self._weights:
            raise AcceleratorProtocolError("The weight was not registered.", remedy="Register it first.")
        index, d_in, d_out = self._weights[weight_id]
        rows = blinded.rows.shape[0]
        if blinded.rows.shape[1] != d_in:
            raise AcceleratorProtocolError(f"Rows of {blinded.rows.shape[1]} do not fit a weight of {d_out} x {d_in}.")
        request, answer = self._arenas_for(rows * d_in, rows * d_out, timeout_seconds)
        np.copyto(request.words[: rows * d_in].reshape(rows, d_in), blinded.rows)
        self._request += 1
        self._exchange(*encode_pair(self._request, index, rows, d_in, d_out), Kind.PRODUCT, timeout_seconds)
        return answer.words[: rows * d_out].reshape(rows, d_out)

    def line(self, weights: Sequence[PublicWeight], timeout_seconds: float) -> Line:
        """Returns a line to lend one row for each of `weights`, in turn; it ends when anything else is asked of this."""
        self._await_ready()
        if self._line is None or self._line.weights is not weights:
            self._line = self._headers_for(weights)
        headers, count = self._line.headers, len(weights)
        request, answer = self._arenas_for(self._line.d_in, self._line.d_out, timeout_seconds)
        self._limit(timeout_seconds)
        headers[:, :, _REQUEST] = np.arange(self._request + 1, self._request + 1 + count)[:, None]
        self._request += count
        return Line(self._sock.fileno(), headers, request.words, answer.words, np.frombuffer(self._buffer, np.uint8))

    def settle(self, line: Line, index: int, outcome: int) -> None:
        """Raises the error behind the `outcome` of an exchange on a line; returns if a signal interrupted it, no more."""
        self._request = int(line.headers[index, 0, _REQUEST])
        if outcome <= UNSENT:
            code = UNSENT - outcome
            raise self._unsent(OSError(code, os.strerror(code)))
        if outcome < 0 and outcome != -errno.EINTR:
            raise self._unanswered(OSError(-outcome, os.strerror(-outcome)))
        if not outcome:
            raise self._fail(self._lost())
        self._checked(outcome if outcome > 0 else self._wait(self._timeout), Kind.PRODUCT)
        if not self._buffer.startswith(line.headers[index, 1].tobytes()):
            raise self._odd_shape()

    def _headers_for(self, weights: Sequence[PublicWeight]) -> "_Headers":
        pairs: list[tuple[bytes, bytes]] = []
        for weight in weights:
            if weight.weight_id not in self._weights:
                raise AcceleratorProtocolError("A weight was not registered.", remedy="Register it first.")
            index, d_in, d_out = self._weights[weight.weight_id]
            pairs.append(encode_pair(0, index, 1, d_in, d_out))
        headers = np.frombuffer(bytearray().join(header for pair in pairs for header in pair), np.int64)
        shapes = [weight.shape for weight in weights]
        return _Headers(
            weights,
            headers.reshape(len(pairs), 2, -1),
            max(d_in for _, d_in in shapes),
            max(d_out for d_out, _ in shapes),
        )

    def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> Int32[np.ndarray, "heads rows d_out"]:
        """Returns the unverified product of two blinded matrices, in memory that the worker can still write."""
        self._await_ready()
        shape, split = request.shape, request.shape.appended_words
        sent, answer = self._arenas_for(split + shape.left_words, shape.answer_words, timeout_seconds)
        if request.appended is not None:
            np.copyto(sent.words[:split], request.appended.rows.reshape(-1))
        if request.left is not None:
            np.copyto(sent.words[split : split + shape.left_words], request.left.rows.reshape(-1))
        self._request += 1
        headers = encode_pair_request(self._request, request.operand, shape)
        self._exchange(*headers, Kind.PAIR_PRODUCT, timeout_seconds)
        return answer.words[: shape.answer_words].reshape(shape.heads, shape.rows, shape.d_out)

    def release(self, operand: int, timeout_seconds: float) -> None:
        """Lets the worker forget a kept operand."""
        self._await_ready()
        self._send(Frame(Kind.RELEASE, self._next(), operand).encode())
        self._receive(Kind.RELEASED, timeout_seconds)

    def _exchange(self, header: bytes, expected: bytes, kind: Kind, timeout_seconds: float) -> None:
        """Sends a request and waits for the one header that answers it."""
        self._send(header)
        length = self._wait(timeout_seconds)
        if length != HEADER_BYTES or not self._buffer.startswith(expected):  # anything else is explained at leisure
            self._checked(length, kind)
            raise self._odd_shape()

    def _odd_shape(self) -> AcceleratorError:
        return self._fail(AcceleratorProtocolError(f"The worker {self.name} answered with another shape."))

    def attach_ring(self, arena: Arena, rows: int) -> None:
        """Lets the worker's device serve a ring in `arena`, with steps over all weights registered so far.

        Raises:
            AcceleratorError: it has no device, or the device cannot; this accelerator is closed then.
        """
        self._await_ready()
        self._send(Frame(Kind.RING, self._next(), rows=rows).encode(), [arena.fd])
        self._receive(Kind.READY, START_SECONDS)

    def check_alive(self) -> None:
        """Raises `AcceleratorError`, and closes this accelerator, if the worker is gone or speaks unasked."""
        try:
            length = len(self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return
        except OSError as error:
            raise self._fail(self._lost()) from error
        raise self._fail(
            AcceleratorProtocolError(f"The worker {self.name} speaks without being asked.") if length else self._lost()
        )

    def give_up(self, error: AcceleratorError) -> AcceleratorError:
        """Closes this accelerator and returns the error, to be raised: its ring can no longer be trusted to be in turn."""
        return self._fail(error)

    def close(self) -> None:
        """Ends the worker and frees the memory; harmless when already closed."""
        self._closed = self._closed or "closed"
        self._sock.close()
        for arena in self._arenas or ():
            arena.close()
        self._arenas = None
        self._kept.clear()
        process, self._process = self._process, None
        if process is not None:
            try:
                process.wait(timeout=0.5)  # it leaves by itself when its socket closes
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _await_ready(self) -> None:
        if self._closed:
            raise AcceleratorLostError(f"The accelerator {self.name} is {self._closed}.", remedy="Start another.")
        if not self._ready:
            length = self._wait(START_SECONDS)
            frame = self._decoded(length, [Kind.READY, Kind.ERROR])
            if frame.kind is Kind.ERROR:
                raise self._fail(AcceleratorLostError(f"The worker {self._label} cannot start: {self._text(length)}"))
            if frame.request != 0:
                raise self._fail(AcceleratorProtocolError(f"The worker {self._label} did not say that it is ready."))
            self._backend = self._text(length)
            self._ready = True

    def _arenas_for(self, request_words: int, answer_words: int, timeout_seconds: float) -> tuple[Arena, Arena]:
        current = self._arenas
        if current and current[0].size >= 4 * request_words and current[1].size >= 4 * answer_words:
            return current
        sizes = [4 * request_words, 4 * max(answer_words, 1)]  # a request that only appends has no answer
        if current:
            sizes = [max(size, arena.size) for size, arena in zip(sizes, current, strict=True)]
        try:
            arenas = (Arena.create(sizes[0]), Arena.create(sizes[1]))
        except WireError as error:
            raise self._fail(self._without_memory(error)) from error
        self._arenas = arenas  # before the worker has answered: `close` frees them whatever it says
        for arena in current or ():
            arena.close()
        self._send(Frame(Kind.ARENAS, self._next()).encode(), [arena.fd for arena in arenas])
        self._receive(Kind.READY, timeout_seconds)
        return arenas

    def _copied(self, weight: PublicWeight) -> SealedMatrix:
        """Returns a sealed copy of a weight that does not lie in sealed memory yet."""
        try:
            copy = SealedMatrix.create(weight.shape)
        except WireError as error:
            raise self._fail(self._without_memory(error)) from error
        copy.array[:] = weight.matrix
        copy.seal()
        return copy

    def _without_memory(self, error: WireError) -> AcceleratorLostError:
        return AcceleratorLostError(f"Nothing can be shared with {self.name}: {error.message}", remedy=error.remedy)

    def _next(self) -> int:
        self._request += 1
        return self._request

    def _send(self, header: bytes, descriptors: list[int] | None = None) -> None:
        try:
            if descriptors is None:
                self._sock.send(header)
            else:
                socket.send_fds(self._sock, [header], descriptors)
        except OSError as error:
            raise self._unsent(error) from error

    def _unsent(self, error: OSError) -> AcceleratorError:
        if isinstance(error, BlockingIOError):
            return self._fail(AcceleratorTimeoutError(f"The worker {self.name} does not read what it is sent."))
        return self._fail(self._lost())

    def _receive(self, kind: Kind, timeout_seconds: float) -> Frame:
        """Returns the answer to the last request, or closes this accelerator."""
        return self._checked(self._wait(timeout_seconds), kind)

    def _checked(self, length: int, kind: Kind) -> Frame:
        """Returns the frame just received if it answers the last request in `kind`, or closes this accelerator."""
        frame = self._decoded(length, [kind, Kind.ERROR])
        if frame.request != self._request:
            raise self._fail(
                AcceleratorProtocolError(
                    f"The worker {self.name} answered request {frame.request}, not {self._request}: late or repeated."
                )
            )
        if frame.kind is Kind.ERROR:
            text = self._text(length)
            raise self._fail(AcceleratorProtocolError(f"The worker {self.name} refuses ({frame.status.name}): {text}."))
        if length != HEADER_BYTES:
            raise self._fail(AcceleratorProtocolError(f"The worker {self.name} answered with {length} bytes."))
        return frame

    def _limit(self, timeout_seconds: float) -> None:
        """Sets how long an answer is waited for. The kernel keeps the limit: one system call per answer, not two."""
        if timeout_seconds != self._timeout:
            whole = int(timeout_seconds)
            limit = struct.pack("ll", whole, int((timeout_seconds - whole) * 1e6) or (0 if whole else 1))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._timeout = timeout_seconds

    def _wait(self, timeout_seconds: float) -> int:
        self._limit(timeout_seconds)
        try:
            length = self._sock.recv_into(self._buffer)
        except OSError as error:
            raise self._unanswered(error) from error
        if not length:
            raise self._fail(self._lost())
        return length

    def _unanswered(self, error: OSError) -> AcceleratorError:
        if isinstance(error, BlockingIOError):
            return self._fail(
                AcceleratorTimeoutError(
                    f"The worker {self.name} did not answer within {self._timeout:g} s.",
                    remedy="Raise accelerator.timeout_seconds if the machine is merely slow.",
                )
            )
        return self._fail(self._lost())

    def _decoded(self, length: int, kinds: list[Kind]) -> Frame:
        try:
            frame = decode(memoryview(self._buffer)[: min(length, HEADER_BYTES)])
        except WireError as error:
            raise self._fail(AcceleratorProtocolError(f"The worker {self.name}: {error.message}")) from error
        if frame.kind not in kinds:
            raise self._fail(AcceleratorProtocolError(f"The worker {self.name} sent {frame.kind.name} out of turn."))
        return frame

    def _text(self, length: int) -> str:
        return peer_text(memoryview(self._buffer)[HEADER_BYTES:length])

    def _lost(self) -> AcceleratorLostError:
        code = self._process.poll() if self._process is not None else None
        ended = f" (exit code {code})" if code is not None else ""
        return AcceleratorLostError(f"The worker {self.name} is gone{ended}.", remedy="Its work is done elsewhere.")

    def _fail(self, error: AcceleratorError) -> AcceleratorError:
        """Closes this accelerator and returns the error: what comes from it afterwards would not be an answer."""
        self._closed = "closed after a failure"
        self._sock.close()
        return error
