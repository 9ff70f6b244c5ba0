"""Real workers, over shared memory and over TCP: exact answers, and an error for everything that can go wrong."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.accelerator.api import Accelerator
from cloister.accelerator.cpu import MULTIPLIERS, installed_backends, open_multiplier
from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.accelerator.remote import RemoteAccelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.accelerator.tcp_server import AcceleratorServer
from cloister.arith.modulus import HALF
from cloister.blinding import field
from cloister.errors import (
    AcceleratorError,
    AcceleratorLostError,
    AcceleratorProtocolError,
    AcceleratorTimeoutError,
    SettingsError,
    WireError,
)
from cloister.settings import Backend
from cloister.wire.codec import HEADER_BYTES, Frame, Kind, Status, decode, received_rows
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.sealed_memory import Arena, SealedMatrix, map_sealed_matrix
from cloister.wire.tcp import parse_address
from tests.isolation.processes import innermost

SECONDS = 30.0


def make_weight(rng: np.random.Generator, d_out: int = 24, d_in: int = 40) -> PublicWeight:
    return PublicWeight.of(rng.integers(-127, 128, (d_out, d_in), dtype=np.int8))


def make_rows(rng: np.random.Generator, rows: int, d_in: int = 40) -> Blinded:
    return received_rows(rng.integers(-HALF, HALF + 1, rows * d_in, dtype=np.int32), rows, d_in)


@pytest.fixture(scope="module")
def server() -> Iterator[AcceleratorServer]:
    running = AcceleratorServer("127.0.0.1:0", lambda: open_multiplier(Backend.NUMBA, 1), max_weight_bytes=10**6)
    threading.Thread(target=running.serve, daemon=True).start()
    yield running
    running.close()


@pytest.fixture(params=["in process", "shared memory", "tcp"])
def accelerator(request: pytest.FixtureRequest, server: AcceleratorServer) -> Iterator[Accelerator]:
    kinds: dict[str, Callable[[], Accelerator]] = {
        "in process": InProcessAccelerator,
        "shared memory": lambda: SharedMemoryAccelerator.start(threads=1),
        "tcp": lambda: RemoteAccelerator(server.address),
    }
    made = kinds[request.param]()
    yield made
    made.close()


def test_products_are_exact_for_many_weights_and_row_counts(accelerator: Accelerator, rng: np.random.Generator) -> None:
    weights = [make_weight(rng, d_out, d_in) for d_out, d_in in ((1, 1), (24, 40), (130, 65))]
    for weight in weights:
        accelerator.register(weight)
        accelerator.register(weight)
    for rows in (1, 512, 3):
        for weight in weights:
            blinded = make_rows(rng, rows, weight.shape[1])
            answer = accelerator.multiply(weight.weight_id, blinded, SECONDS)
            np.testing.assert_array_equal(answer, field.product(blinded.rows, weight.matrix))


def test_what_was_not_registered_or_is_closed_is_an_error(accelerator: Accelerator, rng: np.random.Generator) -> None:
    weight = make_weight(rng)
    with pytest.raises(AcceleratorProtocolError, match="not registered"):
        accelerator.multiply(weight.weight_id, make_rows(rng, 1), SECONDS)
    accelerator.register(weight)
    accelerator.close()
    accelerator.close()
    with pytest.raises(AcceleratorLostError):
        accelerator.multiply(weight.weight_id, make_rows(rng, 1), SECONDS)


@pytest.mark.parametrize("backend", list(MULTIPLIERS))
def test_every_backend_is_exact(backend: Backend, rng: np.random.Generator) -> None:
    if backend not in installed_backends():
        pytest.skip(f"{backend.value} is not installed")
    multiplier = open_multiplier(backend, 1)
    for d_out, d_in in ((1, 1), (24, 40), (64, 257)):
        weight = make_weight(rng, d_out, d_in)
        prepared = multiplier.prepare(weight.matrix)
        for tokens in (1, 5, 40):
            rows = rng.integers(-HALF, HALF + 1, (tokens, d_in), dtype=np.int32)
            rows[0, :] = HALF
            rows[-1, :] = -HALF
            out = np.empty((tokens, d_out), np.int32)
            multiplier.multiply(prepared, rows, out)
            np.testing.assert_array_equal(out, field.product(rows, weight.matrix))


def test_a_backend_that_is_not_installed_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install"):
        open_multiplier(Backend.TORCH, 1)


def test_the_worker_loads_no_trusted_package() -> None:
    code = "import cloister.accelerator.worker, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    trusted = (
        "cloister.blinding",
        "cloister.enclave",
        "cloister.model",
        "cloister.local",
        "cryptography",
        "tokenizers",
    )
    assert not [name for name in loaded if name.startswith(trusted)]
    assert "cloister.accelerator.cpu" in loaded


def test_a_killed_worker_is_reported_and_reaped(rng: np.random.Generator) -> None:
    worker = SharedMemoryAccelerator.start(threads=1)
    weight = make_weight(rng)
    worker.register(weight)
    assert worker.pid is not None
    pid = innermost(worker.pid)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(AcceleratorLostError, match="gone"):
        worker.multiply(weight.weight_id, make_rows(rng, 1), SECONDS)
    with pytest.raises(AcceleratorLostError, match="closed"):
        worker.multiply(weight.weight_id, make_rows(rng, 1), SECONDS)
    started = worker.pid
    worker.close()
    assert not psutil.pid_exists(started)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not psutil.pid_exists(pid)


def test_a_hanging_worker_is_given_up_within_the_timeout_and_killed(rng: np.random.Generator) -> None:
    worker = SharedMemoryAccelerator.start(threads=1)
    weight = make_weight(rng)
    worker.register(weight)
    assert worker.pid is not None
    pid = innermost(worker.pid)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(AcceleratorTimeoutError, match="0.2 s"):
        worker.multiply(weight.weight_id, make_rows(rng, 1), 0.2)
    started = worker.pid
    worker.close()
    assert not psutil.pid_exists(started)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not psutil.pid_exists(pid)


def test_a_worker_leaves_when_its_client_is_gone() -> None:
    code = (
        "from cloister.accelerator.shared import SharedMemoryAccelerator as S; import os, psutil\n"
        "w = S.start(threads=1); w._await_ready()\n"
        "print([w.pid, *(p.pid for p in psutil.Process(w.pid).children(recursive=True))][-1], flush=True); os._exit(1)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    pid = int(out)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlived its client"
        time.sleep(0.05)


def test_closing_leaks_no_descriptor(rng: np.random.Generator) -> None:
    weight = make_weight(rng)
    own = psutil.Process()

    def use() -> None:
        worker = SharedMemoryAccelerator.start(threads=1)
        worker.register(weight)
        worker.multiply(weight.weight_id, make_rows(rng, 2), SECONDS)
        worker.close()

    use()
    before = own.num_fds()
    use()
    assert own.num_fds() == before


class LyingWorker:
    """The other end of the socket, in the test's hands: answers every product with whatever it is told to."""

    def __init__(self, answers: Callable[[Frame], list[bytes]]) -> None:
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.client = SharedMemoryAccelerator(ours, None, "liar")
        self._answers = answers
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.client.close()
        self._thread.join()

    def _serve(self) -> None:
        with self.theirs:
            self._exchange()

    def _exchange(self) -> None:
        self.theirs.send(Frame(Kind.READY).encode() + b"liar")
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self.theirs, 64, 4)
            except ConnectionResetError:  # the client hung up with an answer unread
                return
            for fd in fds:
                os.close(fd)
            if not message:
                return
            frame = decode(message[:HEADER_BYTES])
            if frame.kind is Kind.REGISTER:
                self.theirs.send(Frame(Kind.REGISTERED, frame.request).encode())
            elif frame.kind is Kind.ARENAS:
                self.theirs.send(Frame(Kind.READY, frame.request).encode())
            else:
                for answer in self._answers(frame):
                    with contextlib.suppress(BrokenPipeError):  # the client may have hung up already
                        self.theirs.send(answer)


def product_frame(frame: Frame, **changes: int) -> bytes:
    fields = {
        "request": frame.request,
        "weight": frame.weight,
        "rows": frame.rows,
        "d_in": frame.d_in,
        "d_out": frame.d_out,
    }
    return Frame(Kind.PRODUCT, **{**fields, **changes}).encode()  # type: ignore[arg-type]


LIES: dict[str, tuple[Callable[[Frame], list[bytes]], str]] = {
    "short": (lambda f: [product_frame(f)[:-1]], "header"),
    "long": (lambda f: [product_frame(f) + b"more"], "bytes|another shape"),
    "garbage": (lambda f: [os.urandom(HEADER_BYTES)], "speaks"),
    "another request": (lambda f: [product_frame(f, request=f.request + 7)], "late or repeated"),
    "an earlier request": (lambda f: [product_frame(f, request=f.request - 1)], "late or repeated"),
    "another shape": (lambda f: [product_frame(f, rows=2)], "another shape"),
    "another weight": (lambda f: [product_frame(f, weight=1)], "another shape"),
    "out of turn": (lambda f: [Frame(Kind.REGISTERED, f.request).encode()], "out of turn"),
    "beyond the limits": (lambda f: [product_frame(f)[:20] + b"\xff" * 12], "limits"),
    "refusal": (
        lambda f: [Frame(Kind.ERROR, f.request, status=Status.NO_MEMORY).encode() + b"no \x1b[31mroom"],
        "NO_MEMORY.*room",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_worker_is_caught_and_closed(lie: str, rng: np.random.Generator) -> None:
    answers, message = LIES[lie]
    liar = LyingWorker(answers)
    weight = make_weight(rng)
    liar.client.register(weight)
    with pytest.raises(AcceleratorProtocolError, match=message) as caught:
        liar.client.multiply(weight.weight_id, make_rows(rng, 1), 2.0)
    assert "\x1b" not in str(caught.value), "a worker's text must not reach the terminal as it is"
    with pytest.raises(AcceleratorLostError, match="closed"):
        liar.client.multiply(weight.weight_id, make_rows(rng, 1), 2.0)
    liar.close()


def test_an_answer_sent_twice_is_caught_at_the_next_product(rng: np.random.Generator) -> None:
    liar = LyingWorker(lambda f: [product_frame(f), product_frame(f)])
    weight = make_weight(rng)
    liar.client.register(weight)
    liar.client.multiply(weight.weight_id, make_rows(rng, 1), 2.0)
    with pytest.raises(AcceleratorProtocolError, match="late or repeated"):
        liar.client.multiply(weight.weight_id, make_rows(rng, 1), 2.0)
    liar.close()


def test_sealed_weights_cannot_be_written_or_resized() -> None:
    memory = SealedMatrix.create((8, 64))
    memory.array[:] = 5
    memory.seal()
    fd = memory.fileno()
    for attempt in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1), lambda: os.ftruncate(fd, 10**6)):
        with pytest.raises(PermissionError):
            attempt()
    with pytest.raises(ValueError, match="read-only"):
        memory.array[0, 0] = 1
    assert (map_sealed_matrix(fd, (8, 64)) == 5).all()
    with pytest.raises(WireError, match="sealed"):
        map_sealed_matrix(fd, (8, 65))
    unsealed = SealedMatrix.create((8, 64))
    with pytest.raises(WireError, match="sealed"):
        map_sealed_matrix(unsealed.fileno(), (8, 64))


def test_an_arena_cannot_be_truncated_by_the_other_side() -> None:
    arena = Arena.create(100)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_a_server_survives_any_bytes(server: AcceleratorServer, data: bytes) -> None:
    host, port = parse_address(server.address)
    with socket.create_connection((host, port), 5) as client:
        with contextlib.suppress(OSError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        client.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # it closed with some of our bytes unread
            while client.recv(4096):
                pass
    rng = np.random.default_rng(0)
    good, weight = RemoteAccelerator(server.address), make_weight(rng)
    good.register(weight)
    blinded = make_rows(rng, 2)
    answer = good.multiply(weight.weight_id, blinded, SECONDS)
    np.testing.assert_array_equal(answer, field.product(blinded.rows, weight.matrix))
    good.close()


def test_a_server_refuses_more_weights_than_its_limit_before_reading_them(
    server: AcceleratorServer, rng: np.random.Generator
) -> None:
    client = RemoteAccelerator(server.address)
    with pytest.raises(AcceleratorError, match="limit|gone"):
        client.register(make_weight(rng, 1100, 1000))
    client.close()


def test_a_server_refuses_a_damaged_weight(server: AcceleratorServer, rng: np.random.Generator) -> None:
    client = RemoteAccelerator(server.address)
    weight = make_weight(rng)
    with pytest.raises(AcceleratorProtocolError, match="damaged"):
        client.register(PublicWeight(weight.matrix, bytes(32)))
    client.close()


def test_a_remote_accelerator_that_hangs_or_is_absent_is_reported(rng: np.random.Generator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        client = RemoteAccelerator(f"127.0.0.1:{port}")
        client._weights[b"w"] = (0, 40, 24)
        with pytest.raises(AcceleratorTimeoutError, match="0.2 s"):
            client.multiply(b"w", make_rows(rng, 1), 0.2)
        client.close()
    with pytest.raises(AcceleratorLostError, match="cannot be reached"):
        RemoteAccelerator(f"127.0.0.1:{port}").register(make_weight(rng))


@pytest.mark.parametrize("address", ["", "7000", "host:", "host:x", "host:70000", ":7000"])
def test_what_is_not_an_address_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="address"):
        RemoteAccelerator(address)


@given(st.binary(max_size=64))
def test_no_bytes_decode_to_anything_but_a_frame_or_a_wire_error(data: bytes) -> None:
    try:
        frame = decode(data)
    except WireError:
        return
    assert frame.encode() == data


def test_a_socket_listening_twice_names_the_remedy(server: AcceleratorServer) -> None:
    with pytest.raises(SettingsError, match="Cannot listen"):
        AcceleratorServer(server.address, lambda: open_multiplier(Backend.NUMBA, 1))
