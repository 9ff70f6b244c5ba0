"""Questions and answers over a socket pair: what is refused, and that a wrong answer is never taken for another one's."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from cloister.errors import BudgetError, EnclaveBusyError, EnclaveLostError, WireError
from cloister.wire.asking import Asker, answering_end
from cloister.wire.sanitising import (
    MAX_QUESTION_BYTES,
    AskEvidence,
    Done,
    Failure,
    OpenSession,
    Protect,
    Protected,
    Rows,
)

ASK = OpenSession("mine")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def answering(sock: socket.socket, *answers: Callable[[socket.socket], None]) -> threading.Thread:
    """Reads a question for each of `answers`, and lets that write what it likes."""

    def run() -> None:
        end = answering_end(sock)
        for answer in answers:
            if end.receive() is None:
                return
            answer(sock)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def say(message: object) -> Callable[[socket.socket], None]:
    def write(sock: socket.socket) -> None:
        payload = msgspec.msgpack.encode(message)
        sock.sendall(len(payload).to_bytes(4, "little") + payload)

    return write


def raw(data: bytes) -> Callable[[socket.socket], None]:
    return lambda sock: sock.sendall(data)


def hang_up(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_RDWR)


def test_answers_and_refusals_come_back_as_they_are(pair: tuple[socket.socket, socket.socket]) -> None:
    big = Rows(bytes(range(256)) * 20_000, 0.5)
    refusal = Failure.of(BudgetError("It is used up.", remedy="Begin another."))
    asker = Asker(pair[0], lambda: "gone")
    thread = answering(pair[1], say(Done()), say(refusal), say(Failure("NoSuchKind", "odd", "")), say(big))
    assert asker.ask(ASK, Done) == Done()
    with pytest.raises(BudgetError, match="used up") as raised:
        asker.ask(ASK, Done)
    assert raised.value.remedy == "Begin another."
    with pytest.raises(Exception, match="odd"):
        asker.ask(ASK, Done)
    assert asker.is_open  # a refusal is an answer
    assert asker.ask(ASK, Rows, 10) == big
    thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        hang_up,
        say(Protected.__struct_fields__),
        say({"type": "Done", "more": 1}),
        say(Rows(b"x")),  # not what was asked for
        raw(struct.pack("<I", 2**31 + 1)),
        raw(struct.pack("<I", 100) + b"cut"),
        raw(b"\x01\x00\x00\x00\xc1"),
    ],
)
def test_anything_else_closes_the_way_for_good(
    pair: tuple[socket.socket, socket.socket], answer: Callable[[socket.socket], None]
) -> None:
    def then_end(sock: socket.socket) -> None:
        answer(sock)
        sock.close()

    asker = Asker(pair[0], lambda: "the process ended")
    answering(pair[1], then_end)
    with pytest.raises(EnclaveLostError, match="Nothing was sent"):
        asker.ask(ASK, Done, 10)
    assert not asker.is_open
    with pytest.raises(EnclaveLostError):
        asker.ask(ASK, Done, 10)


def test_a_late_answer_is_no_answer_to_the_next_question(pair: tuple[socket.socket, socket.socket]) -> None:
    asker = Asker(pair[0], lambda: "gone")
    with pytest.raises(EnclaveLostError, match="no answer within"):
        asker.ask(ASK, Done, 0.05)
    with pytest.raises(OSError, match=r"[Bb]roken|closed|reset"):
        for _ in range(2):
            say(Done())(pair[1])
    with pytest.raises(EnclaveLostError):
        asker.ask(ASK, Done, 0.05)


def test_a_byte_now_and_then_does_not_put_the_deadline_off(pair: tuple[socket.socket, socket.socket]) -> None:
    def drip(sock: socket.socket) -> None:
        payload = msgspec.msgpack.encode(Rows(bytes(100)))
        for byte in len(payload).to_bytes(4, "little") + payload:
            try:
                sock.send(bytes([byte]))
            except OSError:
                return  # the asker has closed
            time.sleep(0.02)

    asker = Asker(pair[0], lambda: "gone")
    thread = answering(pair[1], drip)
    with pytest.raises(EnclaveLostError, match="no answer within"):
        asker.ask(ASK, Rows, 0.3)
    assert not asker.is_open
    thread.join()


def test_a_question_waits_for_its_turn_as_long_as_for_its_answer(pair: tuple[socket.socket, socket.socket]) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def late(sock: socket.socket) -> None:
        asked.set()
        go_on.wait(60)
        say(Done())(sock)

    asker = Asker(pair[0], lambda: "gone")
    answering(pair[1], late)
    answers: list[Done] = []
    first = threading.Thread(target=lambda: answers.append(asker.ask(ASK, Done)))
    first.start()
    assert asked.wait(60)
    with pytest.raises(EnclaveBusyError, match="Nothing was sent"):
        asker.ask(ASK, Done, 0.05)
    go_on.set()
    first.join()
    assert answers == [Done()]
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        pair[1].recv(1)
    assert asker.is_open


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", MAX_QUESTION_BYTES + 1),
        b"\x02\x00\x00\x00\xff\xff",
        b"\x09\x00\x00\x00short",
        *(
            len(payload).to_bytes(4, "little") + payload
            for payload in (
                msgspec.msgpack.encode({"type": "OpenSession", "session": ""}),
                msgspec.msgpack.encode({"type": "Embed", "tokens": [-1], "most": 1}),
                msgspec.msgpack.encode({"type": "Embed", "tokens": [], "most": 1}),
                msgspec.msgpack.encode({"type": "Embed", "tokens": [2**31], "most": 1}),
                msgspec.msgpack.encode(AskEvidence(b"short")),
                msgspec.msgpack.encode({"type": "RunCommand", "line": "id"}),
            )
        ),
    ],
)
def test_the_enclave_refuses_what_is_no_question(pair: tuple[socket.socket, socket.socket], data: bytes) -> None:
    end = answering_end(pair[1])
    pair[0].sendall(data)
    pair[0].close()
    with pytest.raises(WireError):
        end.receive()


def test_what_cannot_be_encoded_is_not_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    end = answering_end(pair[1])
    with pytest.raises(WireError, match="cannot be encoded"):
        end.send(Rows(2**80))  # type: ignore[arg-type]
    pair[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        pair[0].recv(1)
    asker = Asker(pair[0], lambda: "gone")
    answering(pair[1], say(Done()))
    assert asker.ask(Protect("s", "chat", b"x" * 2**20), Done, 10) == Done()
