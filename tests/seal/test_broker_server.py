"""The broker over real sockets: enclaves fetch keys, and hostile or slow requests neither stop nor fill it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cloister.errors import BrokerError, KeyRefusedError
from cloister.seal import broker_server
from cloister.seal.broker import Broker
from cloister.seal.broker_server import BrokerServer
from cloister.seal.client import connect, fetch_key
from cloister.seal.package import Package
from cloister.seal.store import Store
from cloister.seal.writer import Sealed
from cloister.wire.channel_messages import Suite
from tests.seal.brokers import ATTESTER, MEASUREMENT, NOW, events
from tests.seal.conftest import ANYONE


@pytest.fixture
def server(broker: Broker, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[BrokerServer]:
    with BrokerServer(broker, request.param.format(folder=tmp_path)) as made:
        thread = threading.Thread(target=made.serve)
        thread.start()
        yield made
        made.close()
        thread.join(10)


@pytest.mark.parametrize("server", ["127.0.0.1:0", "unix:{folder}/s"], indirect=True)
@pytest.mark.parametrize("suite", list(Suite))
def test_an_enclave_fetches_a_key_and_opens_its_package(
    server: BrokerServer, store: Store, sealed: Sealed, suite: Suite
) -> None:
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=3)
    connection = connect(server.address)
    try:
        with Package.open(sealed.folder, ANYONE) as package:
            key = fetch_key(connection, package.manifest, ATTESTER, measurement=MEASUREMENT, suite=suite)
            assert package.checkpoint(key).tensor("model.norm.weight").size
    finally:
        connection.close()


@pytest.mark.parametrize("server", ["127.0.0.1:0"], indirect=True)
def test_a_refusal_says_nothing_and_is_logged(server: BrokerServer, store: Store, sealed: Sealed) -> None:
    store.allow("demo", (b"x" * 32).hex(), NOW, min_version=3)
    connection = connect(server.address)
    with pytest.raises(KeyRefusedError) as caught:
        fetch_key(connection, sealed.manifest, ATTESTER, measurement=MEASUREMENT)
    assert "measurement" not in caught.value.message
    connection.close()
    (line,) = events(store, "refuse")
    assert "measurement" in str(line["reason"])


@pytest.mark.parametrize("server", ["127.0.0.1:0"], indirect=True)
def test_hostile_requests_are_answered_and_the_broker_lives(server: BrokerServer, store: Store, sealed: Sealed) -> None:
    host, port = server.address.rsplit(":", 1)

    def send(content: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(content)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def post(path: str, body: bytes) -> bytes:
        return send(f"POST {path} HTTP/1.1\r\nHost: b\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: 99999999999\r\n\r\n")
    assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: -1\r\n\r\n")
    for digits in (b"9" * 5000, b"0" * 5000):
        assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: " + digits + b"\r\n\r\n")
    assert b" 404 " in post("/../../etc/passwd", b"{}")
    assert b" 403 " in post("/v1/release", b"[" * 5000)
    assert b" 403 " in post("/v1/release", b'{"nonce": 1}')
    assert b" 403 " in post("/v1/release", b"\xff\xfe")
    send(b"\x16\x03\x01\x00\xff")
    send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: 100\r\n\r\nshort")
    assert b" 200 " in post("/v1/challenge", b"{}")
    assert len(events(store, "refuse")) == 3


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /v1/challenge HTTP/1.1\r\nX: ", b"POST /v1/challenge HTTP/1.1\r\nContent-Length: 9999\r\n\r\n"],
)
@pytest.mark.parametrize("server", ["127.0.0.1:0", "unix:{folder}/s"], indirect=True)
def test_a_request_in_small_pieces_ends_in_time(
    server: BrokerServer, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(broker_server._Handler, "timeout", 0.3)
    connection = connect(server.address)
    sock = connection.sock
    sock.settimeout(0.05)
    sock.sendall(begun)
    for _ in range(400):  # a piece in time for each read
        try:
            sock.sendall(b"G")
            if sock.recv(65536) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        pytest.fail("the broker still listens to a request that never ends")
    connection.close()


@pytest.mark.parametrize("server", ["127.0.0.1:0"], indirect=True)
def test_one_address_does_not_hold_every_slot(server: BrokerServer) -> None:
    host, port = server.address.rsplit(":", 1)

    def connected(source: str) -> socket.socket:
        return socket.create_connection((host, int(port)), timeout=10, source_address=(source, 0))

    def answer(sock: socket.socket) -> bytes:
        sock.sendall(b"GET /v1/health HTTP/1.1\r\nHost: b\r\n\r\n")
        return sock.recv(65536)

    with ExitStack() as held:
        slow = [held.enter_context(connected("127.0.0.2")) for _ in range(broker_server.MOST_PER_ADDRESS)]
        assert b" 200 " in answer(slow[-1])
        refused = held.enter_context(connected("127.0.0.2"))
        with suppress(ConnectionError):
            assert answer(refused) == b""
        assert b" 200 " in answer(held.enter_context(connected("127.0.0.1")))
    for _ in range(200):  # the slots come back
        with connected("127.0.0.2") as sock, suppress(ConnectionError):
            if b" 200 " in answer(sock):
                return
        time.sleep(0.02)
    pytest.fail("the slots of an address that left are still taken")


def test_nobody_answers(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none", "127.0.0.1:1", "ftp://x", "http://u@h/", "127.0.0.1:x"):
        with pytest.raises(BrokerError):
            connect(address)
