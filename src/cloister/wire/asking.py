"""One question, one answer, in turn, over a private socket pair: how a program talks with its sanitising enclave.

A message is its length (4 bytes, little endian) and msgpack.

Covers: both ends, deadlines over whole answers (a byte now and then does not extend them), an other end that dies.
Guarantees: after anything but a whole answer in time the connection is closed, so no answer is ever taken for that to another
question; memory grows with what arrives, not with what is announced.
Does not cover: what is said (`wire.sanitising`).
"""

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import msgspec

from cloister.errors import EnclaveBusyError, EnclaveLostError, WireError
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
from cloister.wire.tcp import until

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

    def send(self, message: Sent, deadline: float | None = None) -> None:
        """Sends one message, by `deadline` of the monotonic clock if there is one.

        Raises:
            WireError: it is too long, late, or the other end is gone.
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
            until(self._sock, deadline)
            self._sock.sendall(frame)
        except OSError as error:
            raise WireError(f"The other end is gone ({error}).") from error

    def receive(self, deadline: float | None = None) -> Received | None:
        """Returns the next message, whole by `deadline` of the monotonic clock if there is one; None when the other end closed.

        Raises:
            WireError: it is too long, late, cut, or no message.
        """
        head = self._exactly(4, deadline)
        if head is None:
            return None
        length = int.from_bytes(head, "little")
        if length > self._limit:
            raise WireError(f"The other end announced {length} bytes; at most {self._limit} are read.")
        payload = self._exactly(length, deadline)
        if payload is None:
            raise WireError("The connection was cut in the middle of a message.")
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"A message does not decode: {error}.") from error

    def close(self) -> None:
        """Closes this end."""
        self._sock.close()

    def _exactly(self, count: int, deadline: float | None) -> bytearray | None:
        """Returns `count` bytes; memory grows with what arrives, not with what is announced."""
        held = bytearray(min(count, _PIECE))
        filled = 0
        while filled < count:
            if filled == len(held):
                held.extend(bytes(min(count - filled, len(held))))
            try:
                until(self._sock, deadline)
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
        """Returns the answer; `timeout_seconds` is the longest wait for the turn, and then for question and answer together.

        Raises:
            CloisterError: what the enclave refuses with.
            EnclaveBusyError: other questions took all the time; this one was not asked.
            EnclaveLostError: it is gone, does not answer in time, or answers something else.
        """
        if not self._turn.acquire(timeout=-1 if timeout_seconds is None else timeout_seconds):
            raise EnclaveBusyError(
                f"The sanitising enclave was busy with other questions for {timeout_seconds:g} s. Nothing was sent.",
                remedy="Ask again later.",
            )
        try:
            if not self._open:
                raise self._lost(self._why())
            deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
            try:
                self._framed.send(question, deadline)
                answer = self._framed.receive(deadline)
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
        finally:
            self._turn.release()
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
