"""The sealed channel over a stream socket: whole messages with a length in front, bounded waits, one uniform refusal.

Covers: framing, limits, deadlines; the order hello, offer, requests and answers on each side.
Guarantees: `SealedClient` sends a hello and nothing else before the evidence was verified. A message longer than its limit is
refused by its length, before it is read.
Does not cover: secrecy and integrity, which `wire.channel` gives; HTTP, which carries the same messages.
"""

import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final

from cloister.errors import ChannelError
from cloister.wire.channel import REFUSED, Check, ClientChannel, Prove, ServerChannel
from cloister.wire.channel_answers import AnswerReader, AnswerSealer
from cloister.wire.channel_messages import (
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    MAX_OFFER_BYTES,
    MAX_REQUEST_BYTES,
    OVERHEAD_BYTES,
    Offer,
    Suite,
)

HANDSHAKE_SECONDS: Final = 30.0
"""Longest wait for a hello or an offer; hardware evidence can take seconds."""

SEND_SECONDS: Final = 120.0
"""Longest time for a message to leave."""
INTERRUPTION_BYTES: Final = 8192
"""Longest request that is read while another is being answered; a sealed `Cancel` is shorter."""

_LENGTH: Final = struct.Struct(">I")


class MessageSocket:
    """Whole messages over a stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, message: bytes) -> None:
        """Sends one message.

        Raises:
            ChannelError: the peer is gone.
        """
        try:
            self._socket.settimeout(SEND_SECONDS)
            self._socket.sendall(_LENGTH.pack(len(message)) + message)
        except OSError as error:
            raise ChannelError(f"The peer is gone ({error}).") from error

    def receive(self, limit: int, seconds: float) -> bytes | None:
        """Returns the next message, or None when the peer closed the connection between two.

        Raises:
            ChannelError: longer than `limit`, cut, or not complete within `seconds`.
        """
        deadline = time.monotonic() + seconds
        head = self._read(_LENGTH.size, deadline, at_start=True)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > limit:
            raise ChannelError(f"The peer announced {length} bytes; at most {limit} are read.")
        return self._read(length, deadline) or b""

    def pending(self) -> bool:
        """Returns, without waiting, whether there is a whole short message, one that is too long, or the end."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLRDHUP)
        ready = poller.poll(0)
        if not ready:
            return False
        try:
            head = self._socket.recv(_LENGTH.size + INTERRUPTION_BYTES, socket.MSG_PEEK)
        except OSError:
            return True
        if ready[0][1] & ~select.POLLIN or not head:
            return True
        if len(head) < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(head)
        return length > INTERRUPTION_BYTES or len(head) >= _LENGTH.size + length

    def abort(self) -> None:
        """Ends the connection under a thread that still uses it; `close` it when that thread is done."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _read(self, count: int, deadline: float, *, at_start: bool = False) -> bytes | None:
        made = bytearray()
        while len(made) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ChannelError("The peer did not answer in time.")
            try:
                self._socket.settimeout(left)
                piece = self._socket.recv(min(count - len(made), 2**18))
            except OSError as error:
                raise ChannelError(f"The connection failed ({error}).") from error
            if not piece:
                if at_start and not made:
                    return None
                raise ChannelError("The connection was cut in the middle of a message.")
            made += piece
        return bytes(made)


class SealedClient:
    """A verified connection to an enclave. Use it as a context manager."""

    def __init__(
        self, sock: socket.socket, check: Check, *, seconds: float = 600.0,
        suites: Iterable[Suite] = (Suite.X_WING, Suite.X25519),
    ) -> None:  # fmt: skip
        """Says hello on a connected socket and verifies the offer; `seconds` bounds the wait for each piece of an answer.

        Raises:
            ChannelError: the peer refuses or does not speak this protocol. Whatever `check` raises is raised too.
        """
        self._messages = MessageSocket(sock)
        self._channel = ClientChannel(suites)
        self._seconds = seconds
        try:
            self.hello: bytes = self._channel.hello()
            self._messages.send(self.hello)
            self.offer: Offer = self._channel.accept(self._next(MAX_OFFER_BYTES, HANDSHAKE_SECONDS), check)
        except BaseException:
            self.close()
            raise

    def ask(self, request: bytes) -> Iterator[bytes]:
        """Sends a request; returns an iterator over the pieces of its answer, which ends only after the final one.

        Raises:
            ChannelError: the answer is cut, changed, or not the one to this request.
        """
        message, reader = self._channel.seal(request)
        self._messages.send(message)
        return self._pieces(reader)

    def _pieces(self, reader: AnswerReader) -> Iterator[bytes]:
        while not reader.finished:
            yield reader.open(self._next(MAX_FRAME_BYTES, self._seconds))

    def tell(self, request: bytes) -> None:
        """Sends a request that has no answer of its own, such as to cancel the one in hand."""
        self._messages.send(self._channel.seal(request)[0])

    def usable(self) -> bool:
        """Returns whether the connection is still open; to be asked between two answers only."""
        return not self._messages.pending()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()
        self._messages.close()

    def __enter__(self) -> "SealedClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _next(self, limit: int, seconds: float) -> bytes:
        message = self._messages.receive(limit + OVERHEAD_BYTES, seconds)
        if message is None:
            raise ChannelError("The peer closed the connection.", remedy="See the log of the enclave.")
        if message == REFUSED:
            raise ChannelError("The enclave refuses.", remedy="See the log of the enclave.")
        return message


class SealedServer:
    """The enclave's end of one connection."""

    def __init__(
        self, sock: socket.socket, channel: ServerChannel, prove: Prove, *, idle_seconds: float = 600.0
    ) -> None:
        self._messages = MessageSocket(sock)
        self._channel = channel
        self._prove = prove
        self._idle = idle_seconds

    def greet(self) -> None:
        """Answers the hello.

        Raises:
            ChannelError: there is none; the peer is told that it is refused, and nothing else.
        """
        with _refusing(self._messages):
            hello = self._messages.receive(MAX_HELLO_BYTES, HANDSHAKE_SECONDS)
            if hello is None:
                raise ChannelError("The client closed the connection.")
            self._messages.send(self._channel.answer(hello, self._prove))

    def next(self) -> tuple[bytes, AnswerSealer] | None:
        """Returns the next request and the sealer of its answer; None when the client is gone.

        Raises:
            ChannelError: the request is not one of this connection; the peer is told that it is refused, and nothing else.
        """
        with _refusing(self._messages):
            message = self._messages.receive(MAX_REQUEST_BYTES + 2 * OVERHEAD_BYTES, self._idle)
            return None if message is None else self._channel.open(message)

    def interruption(self) -> bytes | None:
        """Returns a short request that came while another is being answered; None if there is none. Never waits for one.

        Raises:
            ChannelError: the client is gone, or sent something else.
        """
        if not self._messages.pending():
            return None
        message = self._messages.receive(INTERRUPTION_BYTES, 1.0)
        if message is None:
            raise ChannelError("The client is gone.")
        return self._channel.open(message)[0]

    def send(self, frame: bytes) -> None:
        """Sends a frame of an answer."""
        self._messages.send(frame)

    def refuse(self) -> None:
        """Tells the peer that it is refused, and nothing else."""
        with suppress(ChannelError):
            self._messages.send(REFUSED)

    def abort(self) -> None:
        """Ends the connection under a thread that still uses it."""
        self._messages.abort()

    def close(self) -> None:
        """Closes the connection and forgets its keys."""
        self._channel.close()
        self._messages.close()


@contextmanager
def _refusing(messages: MessageSocket) -> Iterator[None]:
    """On any error: tells the peer that it is refused, and nothing else, and closes the connection."""
    try:
        yield
    except BaseException:
        with suppress(ChannelError):
            messages.send(REFUSED)
        messages.close()
        raise
