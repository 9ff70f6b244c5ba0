"""The transport between hosts: deadlines that hold, refusals that arrive, a server that outlives every client."""

import contextlib
import os
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

from cloister.accelerator import tcp_server
from cloister.accelerator.cpu import open_multiplier
from cloister.accelerator.remote import RemoteAccelerator
from cloister.accelerator.tcp_server import AcceleratorServer
from cloister.arith.modulus import HALF
from cloister.blinding import field
from cloister.errors import (
    AcceleratorLostError,
    AcceleratorProtocolError,
    AcceleratorTimeoutError,
    SettingsError,
)
from cloister.settings import Backend
from cloister.wire.codec import HEADER_BYTES, Frame, Kind, Status, decode, received_rows
from cloister.wire.messages import Blinded, PublicWeight, weight_hash
from cloister.wire.tcp import parse_address

SECONDS = 30.0
D_OUT, D_IN = 24, 40


def make_weight(rng: np.random.Generator, d_out: int = D_OUT, d_in: int = D_IN) -> PublicWeight:
    return PublicWeight.of(rng.integers(-127, 128, (d_out, d_in), dtype=np.int8))


def make_rows(rng: np.random.Generator, rows: int = 1, d_in: int = D_IN) -> Blinded:
    return received_rows(rng.integers(-HALF, HALF + 1, rows * d_in, dtype=np.int32), rows, d_in)


def open_server(address: str = "127.0.0.1:0", max_weight_bytes: int = 10**6) -> AcceleratorServer:
    server = AcceleratorServer(address, lambda: open_multiplier(Backend.NUMBA, 1), max_weight_bytes)
    threading.Thread(target=server.serve, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server() -> Iterator[AcceleratorServer]:
    running = open_server()
    yield running
    running.close()


def assert_serves(server: AcceleratorServer) -> None:
    rng = np.random.default_rng(1)
    client, weight, blinded = RemoteAccelerator(server.address), make_weight(rng), make_rows(rng, 3)
    client.register(weight)
    answer = client.multiply(weight.weight_id, blinded, SECONDS)
    np.testing.assert_array_equal(answer, field.product(blinded.rows, weight.matrix))
    client.close()


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[socket.socket], None]], RemoteAccelerator]]:
    """A client, with a weight of 24 x 40 called `w`, of a server that does what the test says."""
    opened: list[tuple[RemoteAccelerator, socket.socket, threading.Thread]] = []

    def open_client(behave: Callable[[socket.socket], None]) -> RemoteAccelerator:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
                behave(peer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        client = RemoteAccelerator(f"127.0.0.1:{listener.getsockname()[1]}")
        client._weights[b"w"] = (0, D_IN, D_OUT)
        opened.append((client, listener, thread))
        return client

    yield open_client
    for client, listener, thread in opened:
        client.close()
        listener.close()
        thread.join(SECONDS)


def receive(peer: socket.socket, count: int) -> bytes:
    return peer.recv(count, socket.MSG_WAITALL)


PRODUCT = Frame(Kind.PRODUCT, 1, 0, 1, D_IN, D_OUT).encode() + bytes(4 * D_OUT)


def test_a_server_that_drips_bytes_does_not_outlast_the_timeout(
    scripted: Callable[..., RemoteAccelerator], rng: np.random.Generator
) -> None:
    sent = []

    def drip(peer: socket.socket) -> None:
        receive(peer, HEADER_BYTES + 4 * D_IN)
        for byte in PRODUCT:
            peer.send(bytes([byte]))
            sent.append(byte)
            time.sleep(0.05)

    client = scripted(drip)
    with pytest.raises(AcceleratorTimeoutError, match="0.3 s"):
        client.multiply(b"w", make_rows(rng), 0.3)
    assert len(sent) < len(PRODUCT), "it was cut in the middle"


def test_an_answer_in_pieces_is_put_together(
    scripted: Callable[..., RemoteAccelerator], rng: np.random.Generator
) -> None:
    def answer_in_pieces(peer: socket.socket) -> None:
        receive(peer, HEADER_BYTES + 4 * D_IN)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(PRODUCT), 7):
            peer.send(PRODUCT[start : start + 7])

    assert scripted(answer_in_pieces).multiply(b"w", make_rows(rng), SECONDS).tolist() == [[0] * D_OUT]


def error(text: bytes, request: int = 1, announced: int | None = None) -> bytes:
    rows = len(text) if announced is None else announced
    return Frame(Kind.ERROR, request, rows=rows, status=Status.FAILED).encode() + text


ANSWERS: dict[str, tuple[bytes, type[Exception], str]] = {
    "nothing": (b"", AcceleratorLostError, "gone"),
    "half a header": (PRODUCT[:20], AcceleratorLostError, "gone"),
    "half a product": (PRODUCT[:-1], AcceleratorLostError, "gone"),
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", AcceleratorProtocolError, "speaks"),
    "another version": (PRODUCT[:4] + b"\x07" + PRODUCT[5:], AcceleratorProtocolError, "version 7"),
    "oversize": (PRODUCT[:24] + b"\xff" * 8, AcceleratorProtocolError, "limits"),
    "another shape": (
        Frame(Kind.PRODUCT, 1, 0, 2, D_IN, D_OUT).encode() + bytes(8 * D_OUT),
        AcceleratorProtocolError,
        "another shape",
    ),
    "another request": (
        Frame(Kind.PRODUCT, 7, 0, 1, D_IN, D_OUT).encode(),
        AcceleratorProtocolError,
        "request 7, not 1",
    ),
    "out of turn": (Frame(Kind.REGISTERED, 1).encode(), AcceleratorProtocolError, "out of turn"),
    "an error that mentions cuts": (error(b"executed: The connection was cut."), AcceleratorProtocolError, "FAILED"),
    "an error without end": (error(b"x" * 600, announced=4096), AcceleratorProtocolError, "x{512}$"),
    "an error cut short": (error(b"x", announced=9), AcceleratorLostError, "gone"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_wrong_answer_is_an_error_that_closes_the_connection(
    answer: str, scripted: Callable[..., RemoteAccelerator], rng: np.random.Generator
) -> None:
    raw, kind, message = ANSWERS[answer]

    def reply(peer: socket.socket) -> None:
        receive(peer, HEADER_BYTES + 4 * D_IN)
        peer.sendall(raw)

    client = scripted(reply)
    with pytest.raises(kind, match=message):
        client.multiply(b"w", make_rows(rng), 5.0)
    with pytest.raises(AcceleratorLostError, match="closed after a failure"):
        client.multiply(b"w", make_rows(rng), 5.0)


def test_the_text_of_a_server_cannot_steer_the_terminal(
    scripted: Callable[..., RemoteAccelerator], rng: np.random.Generator
) -> None:
    def reply(peer: socket.socket) -> None:
        receive(peer, HEADER_BYTES + 4 * D_IN)
        peer.sendall(error(b"\x1b[2J\x9bm\r\nall is well"))

    with pytest.raises(AcceleratorProtocolError, match="all is well") as caught:
        scripted(reply).multiply(b"w", make_rows(rng), 5.0)
    assert str(caught.value).isprintable()


def test_trailing_bytes_of_an_answer_spoil_the_next(
    scripted: Callable[..., RemoteAccelerator], rng: np.random.Generator
) -> None:
    def reply(peer: socket.socket) -> None:
        receive(peer, HEADER_BYTES + 4 * D_IN)
        peer.sendall(PRODUCT + PRODUCT)
        receive(peer, HEADER_BYTES + 4 * D_IN)

    client = scripted(reply)
    client.multiply(b"w", make_rows(rng), 5.0)
    with pytest.raises(AcceleratorProtocolError, match="request 1, not 2"):
        client.multiply(b"w", make_rows(rng), 5.0)


def test_no_byte_of_a_weight_is_sent_to_a_server_without_room(
    server: AcceleratorServer, rng: np.random.Generator
) -> None:
    client = RemoteAccelerator(server.address)
    with pytest.raises(AcceleratorProtocolError, match=r"NO_MEMORY.*limit of 1000000"):
        client.register(make_weight(rng, 4000, 4000))
    client.close()
    assert_serves(server)


def test_the_room_of_a_client_is_bounded_over_all_its_weights(
    server: AcceleratorServer, rng: np.random.Generator
) -> None:
    client = RemoteAccelerator(server.address)
    client.register(make_weight(rng, 600, 1000))
    with pytest.raises(AcceleratorProtocolError, match="NO_MEMORY"):
        client.register(make_weight(rng, 600, 1000))
    client.close()


def exchange(address: str, *messages: bytes) -> bytes:
    """Returns everything that the server says to these bytes until it closes."""
    with socket.create_connection(parse_address(address), SECONDS) as peer:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for message in messages:
                peer.sendall(message)
        peer.shutdown(socket.SHUT_WR)
        said = b""
        while part := peer.recv(4096):
            said += part
    return said


REQUESTS: dict[str, tuple[bytes, Status, str]] = {
    "another protocol": (b"GET / HTTP/1.1\r\nHost: accelerator\r\n\r\n", Status.BAD_FRAME, "speaks"),
    "unknown weight": (
        Frame(Kind.MULTIPLY, 5, 9, 64, 4096, 4096).encode() + bytes(4 * 64 * 4096),
        Status.UNKNOWN_WEIGHT,
        "Weight 9",
    ),
    "empty weight": (Frame(Kind.REGISTER, 5, 0, 0, 0, 4).encode() + bytes(32), Status.BAD_SHAPE, "empty"),
    "huge weight": (Frame(Kind.REGISTER, 5, 0, 0, 2**16, 2**20).encode() + bytes(32), Status.NO_MEMORY, "limit"),
    "not a request": (Frame(Kind.PRODUCT, 5).encode(), Status.BAD_FRAME, "not a request"),
    "descriptors": (Frame(Kind.ARENAS, 5).encode(), Status.BAD_FRAME, "not a request"),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_reason_of_a_refusal_arrives_even_with_bytes_unread(server: AcceleratorServer, request_: str) -> None:
    raw, status, message = REQUESTS[request_]
    said = exchange(server.address, raw)
    frame = decode(said[:HEADER_BYTES])
    assert (frame.kind, frame.status) == (Kind.ERROR, status)
    assert frame.rows == len(said) - HEADER_BYTES
    assert message in said[HEADER_BYTES:].decode()
    assert_serves(server)


def test_a_weight_with_a_forbidden_value_is_refused(server: AcceleratorServer) -> None:
    matrix = np.full((2, 3), -128, np.int8)
    client = RemoteAccelerator(server.address)
    with pytest.raises(AcceleratorProtocolError, match="-128"):
        client.register(PublicWeight(matrix, weight_hash(matrix)))
    client.close()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 3), st.integers(0, 70), st.binary(max_size=90))))
def test_a_server_survives_any_sequence_of_frames(
    server: AcceleratorServer, script: list[tuple[Kind, int, int, bytes]]
) -> None:
    messages = [Frame(kind, 1, weight, size, size, size).encode() + tail for kind, weight, size, tail in script]
    with contextlib.suppress(ConnectionResetError):
        exchange(server.address, *messages)
    assert_serves(server)


def test_a_closed_server_accepts_nobody_and_cuts_its_clients(rng: np.random.Generator) -> None:
    server = AcceleratorServer("127.0.0.1:0", lambda: open_multiplier(Backend.NUMBA, 2))
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    client, weight = RemoteAccelerator(server.address), make_weight(rng)
    client.register(weight)
    server.close()
    server.close()
    thread.join(SECONDS)
    assert not thread.is_alive()
    with pytest.raises(AcceleratorLostError, match="gone"):
        client.multiply(weight.weight_id, make_rows(rng), SECONDS)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(parse_address(client._address), SECONDS)


def test_more_clients_than_there_is_room_for_are_turned_away(
    server: AcceleratorServer, rng: np.random.Generator
) -> None:
    clients = [RemoteAccelerator(server.address) for _ in range(tcp_server.MAX_CLIENTS)]
    for client in clients:
        client.register(make_weight(rng))
    late = RemoteAccelerator(server.address)
    with pytest.raises(AcceleratorLostError, match="gone"):
        late.register(make_weight(rng))
    for client in clients:
        client.close()
    deadline = time.monotonic() + SECONDS
    while server._clients:
        assert time.monotonic() < deadline, "a client that left still takes a place"
        time.sleep(0.01)
    assert_serves(server)


def test_clients_leave_no_descriptor_behind(server: AcceleratorServer) -> None:
    def settle() -> int:
        deadline = time.monotonic() + SECONDS
        while server._clients and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        return psutil.Process().num_fds()

    assert_serves(server)
    before = settle()
    for _ in range(5):
        assert_serves(server)
        exchange(server.address, b"nonsense")
    assert settle() == before


def test_many_clients_at_once_get_their_own_answers(server: AcceleratorServer) -> None:
    wrong: list[int] = []

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        client, weight = RemoteAccelerator(server.address), make_weight(rng)
        client.register(weight)
        for rows in (1, 5, 40):
            blinded = make_rows(rng, rows)
            answer = client.multiply(weight.weight_id, blinded, SECONDS)
            if not np.array_equal(answer, field.product(blinded.rows, weight.matrix)):
                wrong.append(seed)
        client.close()

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert wrong == []


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")  # noqa: PTH110
def test_ipv6_addresses_work() -> None:
    server = open_server("[::1]:0")
    assert server.address.startswith("[::1]:")
    assert_serves(server)
    server.close()


def test_addresses_as_users_write_them() -> None:
    assert parse_address("host:7", 9) == parse_address("host:7") == ("host", 7)
    assert parse_address("[::1]:7", 9) == ("::1", 7)
    assert parse_address("host", 9) == ("host", 9)
    assert parse_address("[::1]", 9) == ("::1", 9)
    for address in ("host", "[::1]"):
        with pytest.raises(SettingsError, match="not an address"):
            parse_address(address)
    for address in ("", ":7", "[]:7", "host:", "host:65536"):
        with pytest.raises(SettingsError, match="not an address"):
            parse_address(address, 9)


@pytest.mark.parametrize("port", ["²", "٣٤", "9" * 5000, "-1", "+1", "1_0"])
def test_what_is_not_a_port_is_refused(port: str) -> None:
    with pytest.raises(SettingsError, match="not an address"):
        parse_address(f"host:{port}")


def test_the_command_serves_until_interrupted() -> None:
    command = [sys.executable, "-m", "cloister", "accelerator", "--listen", "127.0.0.1:0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = next(word for word in line.split() if word.startswith("127.0.0.1:"))
        rng = np.random.default_rng(0)
        client, weight, blinded = RemoteAccelerator(address), make_weight(rng), make_rows(rng)
        client.register(weight)
        answer = client.multiply(weight.weight_id, blinded, SECONDS)
        np.testing.assert_array_equal(answer, field.product(blinded.rows, weight.matrix))
        process.send_signal(2)
        process.wait(SECONDS)
        with pytest.raises(AcceleratorLostError):
            client.multiply(weight.weight_id, blinded, SECONDS)
        client.close()
