"""One question, one answer, in turn, over a private socket pair: how a program talks with its sanitising enclave.

A message is its length (4 bytes, little endian) and msgpack.

Covers: both ends, deadlines, an other end that dies. Guarantees: after anything but a whole answer in time the connection is
closed, so no answer is ever taken for that to another question; memory grows with what arrives, not with what is announced.
Does not cover: what is said (`wire.sanitising`).
"""

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import msgspec

from cloister.errors import EnclaveLostError, WireError
from cloister.wire.sanitising import (
    MAX_ANSWER_BYTES,
    MAX_QUESTION_BYTES,
    Answer,
    Done,
    Failure,
    Protected,
    Question,
    Ready,
    Report,
    Rows,
    Shown,
)

_PIECE: Final = 2**20

Sent = TypeVar("Sent", Question, Answer)
Received = TypeVar("Received", Question, Answer)
Expected = TypeVar("Expected", Ready, Protected, Rows, Report, Shown, Done)


class FramedSocket(Generic[Sent, Received]):
    """One end of a socket pair: whole messages, each bounded by a limit."""

    def __init__(self, sock: socket.socket, received: Any, limit: int) -> None:
        """Reads messages of the union `received`, each of at most `limit` bytes."""
        self._sock = sock
        self._limit = limit
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)

    def send(self, message: Sent) -> None:
        """Sends one message.

        Raises:
            WireError: it is too long, or the other end is gone.
        """
        frame = bytearray(4)
        try:
            self._encoder.encode_into(message, frame, 4)
        except (msgspec.MsgspecError, OverflowError, TypeError, UnicodeEncodeError) as error:
            raise WireError(f"A message cannot be encoded: {error}.") from error
        length = len(frame) - 4
        if length > MAX_ANSWER_BYTES:
            raise WireError(f"A message of {length} bytes exceeds {MAX_ANSWER_BYTES}.", remedy="Send less at once.")
        frame[:4] = length.to_bytes(4, "little")
        try:
            self._sock.sendall(frame)
        except OSError as error:
            raise WireError(f"The other end is gone ({error}).") from error

    def receive(self) -> Received | None:
        """Returns the next message, or None when the other end closed.

        Raises:
            WireError: it is too long, cut, or no message.
        """
        head = self._exactly(4)
        if head is None:
            return None
        length = int.from_bytes(head, "little")
        if length > self._limit:
            raise WireError(f"The other end announced {length} bytes; at most {self._limit} are read.")
        payload = self._exactly(length)
        if payload is None:
            raise WireError("The connection was cut in the middle of a message.")
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"A message does not decode: {error}.") from error

    def close(self) -> None:
        """Closes this end."""
        self._sock.close()

    def _exactly(self, count: int) -> bytearray | None:
        """Returns `count` bytes; memory grows with what arrives, not with what is announced."""
        held = bytearray(min(count, _PIECE))
        filled = 0
        while filled < count:
            if filled == len(held):
                held.extend(bytes(min(count - filled, len(held))))
            try:
                with memoryview(held) as view:
                    got = self._sock.recv_into(view[filled:])
            except OSError as error:
                raise WireError(f"The connection was cut ({error}).") from error
            if not got:
                if filled:
                    raise WireError("The connection was cut in the middle of a message.")
                return None
            filled += got
        return held


def asking_end(sock: socket.socket) -> "FramedSocket[Question, Answer]":
    """Returns the end that asks."""
    return FramedSocket(sock, Answer, MAX_ANSWER_BYTES)


def answering_end(sock: socket.socket) -> "FramedSocket[Answer, Question]":
    """Returns the end that answers."""
    return FramedSocket(sock, Question, MAX_QUESTION_BYTES)


class Asker:
    """Asks over one socket, a question at a time; safe to call from threads."""

    def __init__(self, sock: socket.socket, why_lost: Callable[[], str]) -> None:
        """`why_lost` says what became of the other end."""
        self._socket = sock
        self._framed = asking_end(sock)
        self._why = why_lost
        self._turn = threading.Lock()
        self._open = True

    def ask(self, question: Question, kind: type[Expected], timeout_seconds: float | None = None) -> Expected:
        """Returns the answer.

        Raises:
            CloisterError: what the enclave refuses with.
            EnclaveLostError: it is gone, does not answer in time, or answers something else.
        """
        with self._turn:
            if not self._open:
                raise self._lost(self._why())
            try:
                self._socket.settimeout(timeout_seconds)
                self._framed.send(question)
                answer = self._framed.receive()
            except WireError as error:
                self.close()
                timed_out = isinstance(error.__cause__, TimeoutError)
                reason = f"no answer within {timeout_seconds:g} s" if timed_out else self._why()
                raise self._lost(reason) from error
            except BaseException:
                self.close()
                raise
            if isinstance(answer, kind):
                return answer
            if not isinstance(answer, Failure):
                self.close()
                raise self._lost(self._why() if answer is None else f"it answered {type(answer).__name__}")
        raise answer.error()

    def close(self) -> None:
        """Closes this end; harmless twice, also while a question is asked."""
        self._open = False
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    @property
    def is_open(self) -> bool:
        """Whether the other end has been there so far; looks without asking."""
        if self._open and self._turn.acquire(blocking=False):
            try:
                readable, _, _ = select.select([self._socket], [], [], 0)
                self._open = not readable  # between questions only an end can be read
            except (OSError, ValueError):  # closed meanwhile
                self._open = False
            finally:
                self._turn.release()
        return self._open

    @staticmethod
    def _lost(reason: str) -> EnclaveLostError:
        return EnclaveLostError(
            f"The sanitising enclave is gone: {reason}. Nothing was sent.",
            remedy="Start this program again: the ledger has what was spent; replacements are drawn anew.",
        )
