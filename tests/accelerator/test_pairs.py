"""Accelerators that keep blinded matrices: exact over every transport, within their limits, and honest about the rest."""

import os
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from cloister.accelerator.api import Accelerator, PairAccelerator
from cloister.accelerator.cpu import MULTIPLIERS, installed_backends, open_multiplier
from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.accelerator.operands import OperandStore, RefusedError
from cloister.accelerator.remote import RemoteAccelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.accelerator.tcp_server import AcceleratorServer
from cloister.arith.modulus import HALF
from cloister.arith.pair import pair_product_reference
from cloister.audit.observer import Observer
from cloister.audit.tamper import Tamper
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError, AcceleratorTimeoutError
from cloister.settings import Backend
from cloister.wire.codec import (
    HEADER_BYTES,
    PAIR_BYTES,
    Frame,
    Kind,
    Status,
    decode,
    encode_pair_request,
    received_pair,
)
from cloister.wire.pairs import PairRequest, PairShape
from cloister.wire.sealed_memory import Arena
from tests.accelerator.test_hostile_worker import RealWorker

SECONDS = 30.0
HEADS, WIDTH = 2, 12


@pytest.fixture(scope="module")
def server() -> Iterator[AcceleratorServer]:
    running = AcceleratorServer("127.0.0.1:0", lambda: open_multiplier(Backend.NUMBA, 1))
    threading.Thread(target=running.serve, daemon=True).start()
    yield running
    running.close()


@pytest.fixture(params=["in process", "shared memory", "tcp", "observed"])
def accelerator(request: pytest.FixtureRequest, server: AcceleratorServer) -> Iterator[PairAccelerator]:
    kinds: dict[str, Callable[[], PairAccelerator]] = {
        "in process": InProcessAccelerator,
        "shared memory": lambda: SharedMemoryAccelerator.start(threads=1),
        "tcp": lambda: RemoteAccelerator(server.address),
        "observed": lambda: Observer(Tamper(InProcessAccelerator(), "honest")),
    }
    made = kinds[request.param]()
    yield made
    made.close()


class Mirror:
    """What an accelerator should keep, in plain arrays."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.kept: dict[int, np.ndarray] = {}

    def ask(
        self, operand: int, keep: int, append: int, rows: int, transposed: bool = True, start: int = 0
    ) -> tuple[PairRequest, np.ndarray]:
        """A request of random rows, and its answer."""
        shape = PairShape(HEADS, WIDTH, keep, append, start, transposed, rows)
        words = self.rng.integers(-HALF, HALF + 1, shape.appended_words + shape.left_words, dtype=np.int32)
        before = self.kept.get(operand, np.zeros((HEADS, 0, WIDTH), np.int32))[:, :keep]
        fresh = words[: shape.appended_words].reshape(HEADS, append, WIDTH)
        self.kept[operand] = np.concatenate([before, fresh], axis=1)
        left = words[shape.appended_words :].reshape(HEADS, rows, shape.d_in)
        expected = np.zeros((HEADS, 0, shape.d_out), np.int32)
        if rows:
            right = np.ascontiguousarray(self.kept[operand][:, start:])
            expected = pair_product_reference(left, right, transposed)
        return received_pair(words, operand, shape), expected


def test_what_is_kept_grows_is_cut_and_multiplied_exactly(
    accelerator: PairAccelerator, rng: np.random.Generator
) -> None:
    mirror = Mirror(rng)
    steps = [
        (0, 0, 1, 3, True, 0), (0, 1, 1, 3, True, 0), (1, 0, 2, 3, False, 0), (0, 2, 300, 0, True, 0),
        (0, 302, 5, 8, True, 17), (1, 2, 90, 2, False, 30), (0, 4, 1, 1, True, 2), (1, 92, 0, 7, False, 0), (0, 0, 6, 2, True, 0),
    ]  # fmt: skip
    for step in steps:
        request, expected = mirror.ask(*step)
        np.testing.assert_array_equal(accelerator.multiply_pair(request, SECONDS), expected)


def test_what_was_released_is_gone_and_its_number_free(accelerator: PairAccelerator, rng: np.random.Generator) -> None:
    mirror = Mirror(rng)
    accelerator.release(5, SECONDS)  # there is none: harmless
    request, expected = mirror.ask(5, 0, 3, 2)
    np.testing.assert_array_equal(accelerator.multiply_pair(request, SECONDS), expected)
    accelerator.release(5, SECONDS)
    again, expected = mirror.ask(5, 0, 4, 1)
    np.testing.assert_array_equal(accelerator.multiply_pair(again, SECONDS), expected)
    accelerator.release(5, SECONDS)
    with pytest.raises(AcceleratorProtocolError, match="not kept"):
        accelerator.multiply_pair(mirror.ask(5, 4, 1, 1)[0], SECONDS)


def test_after_closing_there_is_nothing(accelerator: PairAccelerator, rng: np.random.Generator) -> None:
    accelerator.close()
    with pytest.raises(AcceleratorLostError):
        accelerator.multiply_pair(Mirror(rng).ask(0, 0, 1, 1)[0], SECONDS)
    with pytest.raises(AcceleratorLostError):
        accelerator.release(0, SECONDS)


@pytest.mark.parametrize("backend", list(MULTIPLIERS))
def test_every_backend_is_exact(backend: Backend, rng: np.random.Generator) -> None:
    if backend not in installed_backends():
        pytest.skip(f"{backend.value} is not installed")
    store, mirror = OperandStore(open_multiplier(backend, 1)), Mirror(rng)
    for step in [(0, 0, 7, 3, True), (0, 7, 1, 2, False)]:
        request, expected = mirror.ask(*step)
        out = np.empty(expected.shape, np.int32)
        store.multiply(request, out)
        np.testing.assert_array_equal(out, expected)


def test_limits_are_kept_and_a_refusal_changes_nothing(rng: np.random.Generator) -> None:
    store, mirror = OperandStore(open_multiplier(Backend.NUMBA, 1), max_bytes=2 * 4 * HEADS * WIDTH * 64), Mirror(rng)

    def multiply(request: PairRequest) -> np.ndarray:
        shape = request.shape
        out = np.empty((shape.heads, shape.rows, shape.d_out), np.int32)
        store.multiply(request, out)
        return out

    multiply(mirror.ask(0, 0, 64, 0)[0])
    multiply(mirror.ask(1, 0, 1, 0)[0])
    before = mirror.kept[0]
    for refused, status in [
        (mirror.ask(2, 0, 1, 1)[0], Status.NO_MEMORY),  # one operand too many
        (mirror.ask(0, 64, 1, 1)[0], Status.NO_MEMORY),  # it would have to grow
        (mirror.ask(3, 1, 1, 1)[0], Status.UNKNOWN_OPERAND),
        (mirror.ask(1, 2, 1, 1)[0], Status.UNKNOWN_OPERAND),  # it has one row
    ]:
        with pytest.raises(RefusedError) as caught:
            multiply(refused)
        assert caught.value.status is status
    narrow = PairShape(HEADS, WIDTH - 1, 1, 1, 0, True, 0)
    with pytest.raises(RefusedError, match="another shape"):
        store.check(1, narrow)
    mirror.kept[0] = before
    request, expected = mirror.ask(0, 64, 0, 2)
    np.testing.assert_array_equal(multiply(request), expected)
    store.release(1)
    multiply(mirror.ask(7, 0, 1, 0)[0])


def test_two_clients_keep_apart(server: AcceleratorServer, rng: np.random.Generator) -> None:
    first, second = (RemoteAccelerator(server.address) for _ in range(2))
    mirrors = Mirror(rng), Mirror(rng)
    for step in [(0, 0, 5, 2), (0, 5, 1, 2), (0, 3, 2, 1)]:
        for client, mirror in zip((first, second), mirrors, strict=True):
            request, expected = mirror.ask(*step)
            np.testing.assert_array_equal(client.multiply_pair(request, SECONDS), expected)
    first.close()
    second.close()


def test_a_server_refuses_more_operands_than_its_limit_and_says_so(rng: np.random.Generator) -> None:
    small = AcceleratorServer("127.0.0.1:0", lambda: open_multiplier(Backend.NUMBA, 1), max_operand_bytes=100)
    threading.Thread(target=small.serve, daemon=True).start()
    client = RemoteAccelerator(small.address)
    with pytest.raises(AcceleratorProtocolError, match=r"NO_MEMORY.*limit of 100"):
        client.multiply_pair(Mirror(rng).ask(0, 0, 3, 1)[0], SECONDS)
    small.close()


def test_a_worker_refuses_requests_that_do_not_fit_and_goes_on(rng: np.random.Generator) -> None:
    worker = RealWorker("--max-operand-bytes", str(4 * HEADS * WIDTH * 64))
    request, expected = Mirror(rng).ask(0, 0, 2, 3)
    good, _ = encode_pair_request(4, 0, request.shape)
    assert worker.ask(good)[0].status is Status.BAD_FRAME  # no arenas yet
    arenas = Arena.create(4096), Arena.create(4096)
    assert worker.ask(Frame(Kind.ARENAS, 1).encode(), (arenas[0].fd, arenas[1].fd))[0].kind is Kind.READY
    large, _ = encode_pair_request(4, 0, request.shape._replace(append=200))
    refused: list[tuple[bytes, Status]] = [
        (good[:HEADER_BYTES], Status.BAD_FRAME),
        (good[:-1], Status.BAD_FRAME),
        (good + b"\0", Status.BAD_FRAME),
        (Frame(Kind.MULTIPLY, 4, 0, 1, 1, 1).encode() + good[HEADER_BYTES:], Status.BAD_FRAME),
        (large, Status.BAD_FRAME),
        (encode_pair_request(4, 0, PairShape(HEADS, WIDTH, 9, 1, 0, True, 1))[0], Status.UNKNOWN_OPERAND),
        (encode_pair_request(4, 0, PairShape(3, WIDTH, 0, 1, 0, True, 1))[0], Status.NO_MEMORY),
        (Frame(Kind.PAIR_PRODUCT, 1).encode(), Status.BAD_FRAME),
    ]
    for message, status in refused:
        frame, text = worker.ask(message)
        assert (frame.kind, frame.status) == (Kind.ERROR, status), text
    assert request.appended is not None and request.left is not None
    words = np.concatenate([request.appended.rows.reshape(-1), request.left.rows.reshape(-1)])
    arenas[0].words[: words.size] = words
    assert worker.ask(good)[0].kind is Kind.PAIR_PRODUCT
    np.testing.assert_array_equal(arenas[1].words[: expected.size], expected.reshape(-1))
    assert worker.ask(Frame(Kind.RELEASE, 8, 0).encode())[0] == Frame(Kind.RELEASED, 8, 0)
    assert worker.close() == 0


LIES: dict[str, Callable[[bytes], bytes]] = {
    "short": lambda honest: honest[:-1],
    "garbage": lambda honest: os.urandom(HEADER_BYTES),
    "another request": lambda honest: honest[:8] + b"\x63" + honest[9:],
    "another operand": lambda honest: honest[:16] + b"\x01" + honest[17:],
    "another shape": lambda honest: honest[:20] + b"\x01" + honest[21:],
    "another kind": lambda honest: Frame(Kind.PRODUCT, 2, 0, 3, WIDTH, 2).encode(),
    "refusal": lambda honest: Frame(Kind.ERROR, 2, status=Status.NO_MEMORY).encode() + b"full",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_worker_is_caught_and_closed(lie: str, rng: np.random.Generator) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = SharedMemoryAccelerator(ours, None, "liar")
    request, _ = Mirror(rng).ask(0, 0, 2, 3)
    _, honest = encode_pair_request(2, 0, request.shape)
    with theirs:
        theirs.send(Frame(Kind.READY).encode())
        theirs.send(Frame(Kind.READY, 1).encode())
        theirs.send(LIES[lie](honest))
        with pytest.raises(AcceleratorProtocolError):
            client.multiply_pair(request, 2.0)
        with pytest.raises(AcceleratorLostError, match="closed"):
            client.multiply_pair(request, 2.0)
    client.close()


def test_a_silent_worker_times_out(rng: np.random.Generator) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = SharedMemoryAccelerator(ours, None, "silent")
    with theirs:
        theirs.send(Frame(Kind.READY).encode())
        theirs.send(Frame(Kind.READY, 1).encode())
        with pytest.raises(AcceleratorTimeoutError, match=r"0\.05 s"):
            client.multiply_pair(Mirror(rng).ask(0, 0, 2, 3)[0], 0.05)
    client.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda honest: honest[:20], AcceleratorLostError),
        (lambda honest: honest + b"1234", AcceleratorLostError),
        (lambda honest: honest[:20] + b"\x01" + honest[21:], AcceleratorProtocolError),
        (lambda honest: b"HTTP/1.1 400 Bad Request\r\n\r\n....", AcceleratorProtocolError),
        (lambda honest: None, AcceleratorTimeoutError),
    ],
)
def test_a_lying_server_is_caught_and_closed(
    answer: Callable[[bytes], bytes | None], error: type[Exception], rng: np.random.Generator
) -> None:
    request, _ = Mirror(rng).ask(0, 0, 2, 3)
    size = HEADER_BYTES + PAIR_BYTES + 4 * (request.shape.appended_words + request.shape.left_words)
    done = threading.Event()

    def serve() -> None:
        with listener.accept()[0] as peer:
            assert decode(peer.recv(size, socket.MSG_WAITALL)[:HEADER_BYTES]).kind is Kind.PAIR
            said = answer(encode_pair_request(1, 0, request.shape)[1])
            if said is None:
                done.wait(SECONDS)
            else:
                peer.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        client = RemoteAccelerator(f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(error):
            client.multiply_pair(request, 0.5)
        done.set()
        with pytest.raises(AcceleratorLostError, match="closed"):
            client.multiply_pair(request, 0.5)
        thread.join(SECONDS)


def test_an_accelerator_without_the_operation_says_so(rng: np.random.Generator) -> None:
    class Plain:
        name = "plain"

        def register(self, weight: object) -> None: ...

        def multiply(self, weight_id: bytes, blinded: object, timeout_seconds: float) -> np.ndarray:
            return np.zeros((1, 1), np.int32)

        def close(self) -> None: ...

    plain = Plain()
    assert isinstance(plain, Accelerator)
    assert not isinstance(plain, PairAccelerator)
    with pytest.raises(AcceleratorProtocolError, match="does not multiply two"):
        Observer(plain).multiply_pair(Mirror(rng).ask(0, 0, 1, 1)[0], SECONDS)
