"""The worker process of this host: `python -m cloister.accelerator.worker --fd N`. Holds no secret.

Covers: serving one client over a socket pair, rows and products in shared memory, until the client closes its end.
Does not cover: trust. Nothing that this process computes is believed; it imports no trusted package.
"""

import argparse
import os
import socket
import sys
from typing import Final

from cloister.accelerator.cpu import Multiplier, open_multiplier
from cloister.accelerator.cuda.configurations import DECODE_ROWS
from cloister.accelerator.cuda.interfaces import DeviceMultiplier
from cloister.accelerator.cuda.ring import Layout, Ring
from cloister.accelerator.operands import DEFAULT_OPERAND_BYTES, RefusedError
from cloister.accelerator.registry import DEFAULT_WEIGHT_BYTES, Registry
from cloister.errors import CloisterError, SettingsError, WireError
from cloister.settings import Backend
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
from cloister.wire.sealed_memory import Arena, map_sealed_matrix

_MAX_DESCRIPTORS: Final = 2
_MAX_MESSAGE: Final = HEADER_BYTES + PAIR_BYTES + 1
"""One byte more than any request has: a longer one is seen to be longer."""

POLLS: Final = 500
"""How often an idle worker polls before it sleeps: about a millisecond."""


class Worker:
    """Serves one client."""

    def __init__(self, sock: socket.socket, registry: Registry, device: DeviceMultiplier | None = None) -> None:
        """`device`: the registry's multiplier, if it owns a device that can lock memory and serve a ring."""
        self._sock = sock
        self._registry = registry
        self._device = device
        self._arenas: tuple[Arena, Arena] | None = None

    def serve(self, name: str) -> None:
        """Says that it is ready, then answers until the client is gone."""
        self._sock.send(Frame(Kind.READY).encode() + name.encode()[:MAX_ERROR_BYTES])
        while True:
            message, descriptors = self._next()
            if not message:
                return
            try:
                reply = self._answer(message, descriptors)
            except RefusedError as error:
                reply = self._error(message, error.status, error.message)
            except CloisterError as error:
                reply = self._error(message, Status.BAD_FRAME, error.message)
            except (OSError, ValueError) as error:  # the system refuses; the words of the error stay here
                reply = self._error(message, Status.FAILED, type(error).__name__)
            except MemoryError:
                reply = self._error(message, Status.NO_MEMORY, "Memory is short.")
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            self._sock.send(reply)

    def _next(self) -> tuple[bytes, list[int]]:
        """Returns the next message and its descriptors: polls for a moment, then sleeps.

        A worker that sleeps between two products of a decode step is woken up to a hundred microseconds late.
        """
        for _ in range(POLLS):
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    self._sock, _MAX_MESSAGE, _MAX_DESCRIPTORS, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                os.sched_yield()
            else:
                return message, descriptors
        message, descriptors, _, _ = socket.recv_fds(self._sock, _MAX_MESSAGE, _MAX_DESCRIPTORS)
        return message, descriptors

    def _answer(self, message: bytes, descriptors: list[int]) -> bytes:
        if len(message) > HEADER_BYTES:
            frame = decode(message[:HEADER_BYTES])
            if frame.kind is not Kind.PAIR:
                raise WireError(f"A {frame.kind.name} frame has {len(message)} bytes.")
            return self._multiply_pair(frame, message[HEADER_BYTES:])
        frame = decode(message)
        if frame.kind is Kind.MULTIPLY:
            return self._multiply(frame)
        if frame.kind is Kind.RELEASE:
            self._registry.operands.release(frame.weight)
            return Frame(Kind.RELEASED, frame.request, frame.weight).encode()
        if frame.kind is Kind.REGISTER and len(descriptors) == 1:
            self._registry.check_room(frame)
            self._registry.add(frame, map_sealed_matrix(descriptors[0], (frame.d_out, frame.d_in)))
            return Frame(Kind.REGISTERED, frame.request, frame.weight).encode()
        if frame.kind is Kind.ARENAS and len(descriptors) == 2:
            self._exchange_arenas((Arena.received(descriptors[0]), Arena.received(descriptors[1])))
            return Frame(Kind.READY, frame.request).encode()
        if frame.kind is Kind.RING and len(descriptors) == 1:
            self._serve_ring(frame, Arena.received(descriptors[0]))
            return Frame(Kind.READY, frame.request).encode()
        raise WireError(f"A {frame.kind.name} frame came with {len(descriptors)} descriptors.")

    def _exchange_arenas(self, arenas: tuple[Arena, Arena]) -> None:
        if self._device is not None:
            for arena in self._arenas or ():
                self._device.unpin(arena.words)
            for arena in arenas:
                self._device.pin(arena.words)
        self._arenas = arenas

    def _serve_ring(self, frame: Frame, arena: Arena) -> None:
        """Lets the device serve decode steps over all weights registered so far."""
        if self._device is None or not 1 <= frame.rows <= DECODE_ROWS:
            raise RefusedError(Status.BAD_FRAME, f"This backend serves no ring of {frame.rows} rows.")
        ring = Ring(arena.words, Layout.of(self._registry.shapes(), frame.rows))
        self._device.serve(ring, self._registry.prepared(), frame.rows, self._device_failed)

    def _device_failed(self, error: Exception) -> None:
        """Ends this worker: its client learns it from the closed socket, whoever reads the log from this line."""
        print(f"worker: the device failed: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        self._sock.shutdown(socket.SHUT_RDWR)

    def _multiply(self, frame: Frame) -> bytes:
        d_out = self._registry.width(frame)
        if self._arenas is None or frame.rows * d_out * 4 > self._arenas[1].size:
            raise WireError("The arenas are too small for this product.")
        request, answer = self._arenas
        blinded = received_rows(request.words, frame.rows, frame.d_in)
        self._registry.multiply(frame, blinded, answer.words[: frame.rows * d_out].reshape(frame.rows, d_out))
        return Frame(Kind.PRODUCT, frame.request, frame.weight, frame.rows, frame.d_in, d_out).encode()

    def _multiply_pair(self, frame: Frame, second: bytes) -> bytes:
        shape = decode_pair(frame, second)
        sent = shape.appended_words + shape.left_words
        if self._arenas is None or 4 * sent > self._arenas[0].size or 4 * shape.answer_words > self._arenas[1].size:
            raise WireError("The arenas are too small for this product.")
        request, answer = self._arenas
        out = answer.words[: shape.answer_words].reshape(shape.heads, shape.rows, shape.d_out)
        self._registry.operands.multiply(received_pair(request.words[:sent], frame.weight, shape), out)
        return Frame(Kind.PAIR_PRODUCT, frame.request, frame.weight, frame.rows, frame.d_in, frame.d_out).encode()

    @staticmethod
    def _error(message: bytes, status: Status, text: str) -> bytes:
        request = int.from_bytes(message[8:16], "little")
        return Frame(Kind.ERROR, request, status=status).encode() + text.encode()[:MAX_ERROR_BYTES]


def main(arguments: list[str] | None = None) -> int:
    """Runs a worker on an inherited socket; returns the exit code."""
    parser = argparse.ArgumentParser(description="A worker of this host. Started by Cloister, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the socket to the client")
    parser.add_argument("--backend", choices=list(Backend), default=Backend.AUTO, help="what multiplies")
    parser.add_argument("--threads", type=int, default=0, help="0: one per usable core")
    parser.add_argument("--max-weight-bytes", type=int, default=DEFAULT_WEIGHT_BYTES)
    parser.add_argument("--max-operand-bytes", type=int, default=DEFAULT_OPERAND_BYTES)
    options = parser.parse_args(arguments)
    with socket.socket(fileno=options.fd) as sock:
        try:
            multiplier: Multiplier = open_multiplier(Backend(options.backend), options.threads)
        except SettingsError as error:
            sock.send(Frame(Kind.ERROR, status=Status.FAILED).encode() + str(error).encode()[:MAX_ERROR_BYTES])
            return 1
        device = multiplier if isinstance(multiplier, DeviceMultiplier) else None
        registry = Registry(multiplier, options.max_weight_bytes, options.max_operand_bytes)
        try:
            Worker(sock, registry, device).serve(multiplier.name)
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the client is gone
        finally:
            multiplier.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
