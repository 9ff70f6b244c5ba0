"""What a worker of this host that means harm can do beside answering wrongly: nothing that outlasts a timeout."""

import gc
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from cloister.accelerator import launch
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.arith.modulus import HALF
from cloister.blinding import field
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError, AcceleratorTimeoutError
from cloister.settings import Backend
from cloister.wire.codec import HEADER_BYTES, Frame, Kind, Status, decode, received_rows
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.sealed_memory import Arena, SealedMatrix
from tests.isolation.processes import innermost

SECONDS = 30.0
D_OUT, D_IN = 24, 40


def make_weight(rng: np.random.Generator, d_out: int = D_OUT, d_in: int = D_IN) -> PublicWeight:
    return PublicWeight.of(rng.integers(-127, 128, (d_out, d_in), dtype=np.int8))


def make_rows(rng: np.random.Generator, rows: int = 1, d_in: int = D_IN) -> Blinded:
    return received_rows(rng.integers(-HALF, HALF + 1, rows * d_in, dtype=np.int32), rows, d_in)


@pytest.fixture
def rigged() -> tuple[SharedMemoryAccelerator, socket.socket]:
    """A client with one registered weight and ready arenas, and the other end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = SharedMemoryAccelerator(ours, None, "hostile")
    theirs.send(Frame(Kind.READY).encode() + b"test")
    theirs.send(Frame(Kind.REGISTERED, 1).encode())
    theirs.send(Frame(Kind.READY, 2).encode())
    yield client, theirs  # type: ignore[misc]
    client.close()
    theirs.close()


def test_a_worker_that_answers_without_reading_cannot_block_the_enclave(
    rigged: tuple[SharedMemoryAccelerator, socket.socket], rng: np.random.Generator
) -> None:
    client, theirs = rigged
    weight, rows = make_weight(rng), make_rows(rng)
    client.register(weight)
    ended: list[Exception] = []

    def lend_for_ever() -> None:
        try:
            for request in range(3, 100_000):
                theirs.send(Frame(Kind.PRODUCT, request, 0, 1, D_IN, D_OUT).encode())
                client.multiply(weight.weight_id, rows, 5.0)
        except AcceleratorTimeoutError as error:
            ended.append(error)

    thread = threading.Thread(target=lend_for_ever, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "the enclave is blocked by a worker that does not read"
    assert "does not read" in str(ended[0])
    with pytest.raises(AcceleratorLostError, match="closed"):
        client.multiply(weight.weight_id, rows, 5.0)


def test_a_late_answer_is_never_taken_for_a_later_one(
    rigged: tuple[SharedMemoryAccelerator, socket.socket], rng: np.random.Generator
) -> None:
    client, theirs = rigged
    weight, rows = make_weight(rng), make_rows(rng)
    client.register(weight)
    with pytest.raises(AcceleratorTimeoutError, match=r"0\.05 s"):
        client.multiply(weight.weight_id, rows, 0.05)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # the client hung up: no answer can reach it any more
        theirs.send(Frame(Kind.PRODUCT, 3, 0, 1, D_IN, D_OUT).encode())
    with pytest.raises(AcceleratorLostError, match="closed"):
        client.multiply(weight.weight_id, rows, 5.0)


def test_answers_in_another_order_are_refused(
    rigged: tuple[SharedMemoryAccelerator, socket.socket], rng: np.random.Generator
) -> None:
    client, theirs = rigged
    weight, rows = make_weight(rng), make_rows(rng)
    client.register(weight)
    for request in (4, 3):
        theirs.send(Frame(Kind.PRODUCT, request, 0, 1, D_IN, D_OUT).encode())
    with pytest.raises(AcceleratorProtocolError, match="answered request 4, not 3"):
        client.multiply(weight.weight_id, rows, 5.0)


def test_descriptors_sent_with_an_answer_are_not_taken(
    rigged: tuple[SharedMemoryAccelerator, socket.socket], rng: np.random.Generator
) -> None:
    client, theirs = rigged
    weight, rows = make_weight(rng), make_rows(rng)
    client.register(weight)
    gc.collect()  # what earlier tests left must not be closed between the two counts
    client_fds = psutil.Process().num_fds()
    with open(os.devnull, "rb") as gift:  # noqa: PTH123
        answer = Frame(Kind.PRODUCT, 3, 0, 1, D_IN, D_OUT).encode()
        socket.send_fds(theirs, [answer], [gift.fileno()] * 50)
        client.multiply(weight.weight_id, rows, 5.0)
    assert psutil.Process().num_fds() == client_fds + 4  # the two arenas: a descriptor and a mapping each


@pytest.mark.parametrize(
    ("registered", "message"),
    [
        (Frame(Kind.ERROR, 1, status=Status.NO_MEMORY).encode() + b"full", "NO_MEMORY.*full"),
        (Frame(Kind.PRODUCT, 1).encode(), "out of turn"),
        (Frame(Kind.REGISTERED, 2).encode(), "request 2, not 1"),
        (b"", "gone"),
    ],
)
def test_a_weight_counts_as_registered_only_when_the_worker_says_so(
    registered: bytes, message: str, rng: np.random.Generator
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = SharedMemoryAccelerator(ours, None, "hostile")
    with theirs:
        theirs.send(Frame(Kind.READY).encode())
        theirs.send(registered) if registered else theirs.close()
        with pytest.raises((AcceleratorProtocolError, AcceleratorLostError), match=message):
            client.register(make_weight(rng))
    client.close()


@pytest.mark.parametrize(
    "hello", [b"hello", Frame(Kind.READY, 5).encode(), Frame(Kind.PRODUCT).encode(), os.urandom(600)]
)
def test_a_worker_that_does_not_say_that_it_is_ready_gets_nothing(hello: bytes, rng: np.random.Generator) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = SharedMemoryAccelerator(ours, None, "hostile")
    with theirs:
        theirs.send(hello)
        with pytest.raises(AcceleratorProtocolError):
            client.register(make_weight(rng))
        assert theirs.recv(HEADER_BYTES) == b"", "nothing was sent to it"
    client.close()


def test_growing_arenas_leak_no_descriptor_and_keep_answers_exact(rng: np.random.Generator) -> None:
    worker = SharedMemoryAccelerator.start(threads=1)
    weight = make_weight(rng, 130, 65)
    worker.register(weight)
    counts = []
    for rows in (1, 30, 600, 2, 2000):
        blinded = make_rows(rng, rows, 65)
        answer = worker.multiply(weight.weight_id, blinded, SECONDS)
        np.testing.assert_array_equal(answer, field.product(blinded.rows, weight.matrix))
        del answer
        counts.append(psutil.Process().num_fds())
    assert len(set(counts)) == 1
    worker.close()


class RealWorker:
    """A real worker process that the test speaks to by hand."""

    def __init__(self, *options: str) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(SECONDS)
        command = [sys.executable, "-I", "-m", "cloister.accelerator.worker", "--fd", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", "--backend", "numba", *options], pass_fds=[theirs.fileno()]
            )
        assert decode(self.sock.recv(1000)[:HEADER_BYTES]).kind is Kind.READY

    def ask(self, message: bytes, fds: tuple[int, ...] = ()) -> tuple[Frame, bytes]:
        socket.send_fds(self.sock, [message], list(fds))
        answer = self.sock.recv(1000)
        return decode(answer[:HEADER_BYTES]), answer[HEADER_BYTES:]

    def close(self) -> int:
        self.sock.close()
        return self.process.wait(SECONDS)


def test_a_worker_refuses_what_it_cannot_serve_and_goes_on(rng: np.random.Generator) -> None:
    worker = RealWorker("--max-weight-bytes", "1500")
    weight, arena = SealedMatrix.create((D_OUT, D_IN)), Arena.create(4096)
    weight.array[:] = rng.integers(-127, 128, weight.shape, dtype=np.int8)
    weight.seal()
    unsealed = SealedMatrix.create((D_OUT, D_IN))
    register = Frame(Kind.REGISTER, 1, 0, 0, D_IN, D_OUT).encode()
    multiply = Frame(Kind.MULTIPLY, 9, 0, 1, D_IN, D_OUT)
    with open(os.devnull, "rb") as null:  # noqa: PTH123
        refused: list[tuple[bytes, tuple[int, ...], Status]] = [
            (b"garbage", (), Status.BAD_FRAME),
            (register + b"more", (), Status.BAD_FRAME),
            (register, (), Status.BAD_FRAME),
            (register, (unsealed.fileno(),), Status.BAD_FRAME),
            (register, (null.fileno(),), Status.BAD_FRAME),
            (Frame(Kind.REGISTER, 1, 0, 0, D_IN, 0).encode(), (weight.fileno(),), Status.BAD_SHAPE),
            (Frame(Kind.REGISTER, 1, 0, 0, D_IN, 90).encode(), (weight.fileno(),), Status.NO_MEMORY),
            (Frame(Kind.ARENAS, 1).encode(), (null.fileno(), arena.fd), Status.BAD_FRAME),
            (multiply.encode(), (), Status.UNKNOWN_WEIGHT),
            (Frame(Kind.PRODUCT, 1).encode(), (), Status.BAD_FRAME),
        ]
        for message, fds, status in refused:
            frame, text = worker.ask(message, fds)
            assert (frame.kind, frame.status) == (Kind.ERROR, status), text
            assert 0 < len(text) <= 512
            assert text.isascii()
    assert worker.ask(register, (weight.fileno(),))[0].kind is Kind.REGISTERED
    assert worker.ask(register, (weight.fileno(),))[0].status is Status.BAD_FRAME
    assert worker.ask(multiply.encode())[0].status is Status.BAD_FRAME  # no arenas yet
    assert worker.ask(Frame(Kind.ARENAS, 3).encode(), (arena.fd, arena.fd))[0].kind is Kind.READY
    for wrong in (Frame(Kind.MULTIPLY, 9, 0, 1, D_IN + 1, D_OUT), Frame(Kind.MULTIPLY, 9, 0, 0, D_IN, D_OUT)):
        assert worker.ask(wrong.encode())[0].status is Status.BAD_SHAPE
    rows = rng.integers(-HALF, HALF + 1, (1, D_IN), dtype=np.int32)
    arena.words[:D_IN] = rows[0]
    frame, text = worker.ask(multiply.encode())
    assert (frame.kind, frame.request, text) == (Kind.PRODUCT, 9, b"")
    np.testing.assert_array_equal(arena.words[:D_OUT], field.product(rows, weight.array)[0])
    assert psutil.Process(worker.process.pid).num_fds() < 20, "refused descriptors are closed"
    assert worker.close() == 0


def test_a_worker_inherits_little_and_is_not_ended_by_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_TEST_SECRET", "do not pass on")
    with open(os.devnull, "rb") as kept:  # noqa: PTH123
        os.set_inheritable(kept.fileno(), True)
        worker = SharedMemoryAccelerator.start(threads=1, backend=Backend.NUMBA)
        assert worker.pid is not None
        pid = innermost(worker.pid)
        assert set(psutil.Process(pid).environ()) <= {*launch.KEPT_VARIABLES, "NUMBA_CACHE_DIR", "LC_CTYPE", "PWD"}
        assert os.getsid(pid) != os.getsid(0)
        opened = {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert opened.pop(0) == opened.pop(1) == os.devnull
        opened.pop(2)
        assert os.devnull not in opened.values(), "a descriptor of ours was passed on"
    worker.close()
