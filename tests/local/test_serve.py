"""A listening enclave: a client that verifies, asks, reads the answer whole, and keeps a receipt that holds offline."""

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import pytest

from cloister.assets import demo_model
from cloister.attest.evidence import Kind, Skip
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.receipt import Receipt, SignedStatement, verify_receipt
from cloister.attest.roots import Roots
from cloister.attest.session import checker
from cloister.attest.sim import Installation, SimAttester
from cloister.errors import AttestationError, ChannelError
from cloister.local.owner import tee
from cloister.local.serve import EnclaveServer
from cloister.wire.channel_socket import SealedClient
from cloister.wire.session import Delta, Finished, FromEnclave, Generate, Open, Sampling

INSTALLATION = Installation.create(datetime.now(UTC))
MEASUREMENT = b"m" * 32
ROOTS = Roots(sim=frozenset({INSTALLATION.fingerprint}))


def policy(measurement: bytes = MEASUREMENT) -> Policy:
    accepted = SimPolicy(measurement=frozenset({measurement}), min_version=1)
    return Policy(accept=(accepted,), report_data=Skip("set for each session"))


@pytest.fixture(scope="module")
def server() -> Iterator[EnclaveServer]:
    opened = Open(str(demo_model()))
    with EnclaveServer(opened, lambda digest: SimAttester(INSTALLATION, digest), MEASUREMENT) as server:
        yield server


@pytest.fixture(scope="module")
def address(server: EnclaveServer) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def connect(address: tuple[str, int], expected: Policy) -> SealedClient:
    check = checker(expected, ROOTS, model_roots="a plain folder has no identity")
    return SealedClient(socket.create_connection(address, timeout=30), check)


def test_an_answer_comes_with_a_receipt_that_holds_offline(address: tuple[str, int]) -> None:
    decoder = msgspec.msgpack.Decoder(FromEnclave)
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    request = msgspec.msgpack.encode(Generate(sampling, prompt="Once upon a time"))
    with connect(address, policy()) as client:
        for _ in range(2):
            *pieces, statement = client.ask(request)
            messages = [decoder.decode(piece) for piece in pieces]
            assert isinstance(messages[-1], Finished)
            assert "".join(m.text for m in messages if isinstance(m, Delta))
            signed = msgspec.msgpack.decode(statement, type=SignedStatement)
            receipt = Receipt.of(signed, client.hello, client.offer)
            verdict = verify_receipt(
                receipt, policy(), datetime.now(UTC), ROOTS, request=request, response=b"".join(pieces)
            )
            found = verdict.require().checks
            assert (found.products > 0, found.refused, found.checks_per_product) == (True, 0, 1)
            assert found.products == messages[-1].meter.products
        with pytest.raises(ChannelError, match="refuses"):
            list(client.ask(b"not a request"))


def test_another_measurement_gets_no_prompt(address: tuple[str, int]) -> None:
    with pytest.raises(AttestationError):
        connect(address, policy(b"x" * 32))


def test_a_client_that_leaves_does_not_stop_the_next(address: tuple[str, int]) -> None:
    long = msgspec.msgpack.encode(Generate(Sampling(max_new_tokens=400, ignore_eos=True), prompt="Once"))
    with connect(address, policy()) as client:
        next(client.ask(long))
    with connect(address, policy()) as client:
        short = msgspec.msgpack.encode(Generate(Sampling(max_new_tokens=4), prompt="Once"))
        assert len(list(client.ask(short))) > 1


def test_tokens_do_not_wait_for_acknowledgements(server: EnclaveServer, address: tuple[str, int]) -> None:
    with connect(address, policy()):
        assert server._connections is not None
        held = list(server._connections._open)
        assert held
        assert all(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in held)


def test_only_the_stand_in_calls_itself_one(server: EnclaveServer) -> None:
    assert "stand-in" in server.ready.tee
    for kind in Kind:
        assert ("stand-in" in tee(kind)) == (kind is Kind.SIM), kind
