"""The sealed channel over real sockets, with somebody in between: nothing but the hello leaves when the peer is refused."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta

import msgspec
import pytest

from cloister.attest.roots import Roots
from cloister.attest.session import checker, prover
from cloister.attest.sim import SimAttester
from cloister.errors import AttestationError, ChannelError, CloisterError
from cloister.wire.channel import REFUSED, ClientChannel, ServerChannel
from cloister.wire.channel_messages import Hello, Offer, Suite
from cloister.wire.channel_socket import SealedClient, SealedServer
from wire.peers import (
    INSTALLATION,
    MEASUREMENT,
    PLAN,
    PROMPT,
    RECEIPT_KEY,
    ROOT,
    connected,
    good_check,
    policy,
    server_channel,
)


class Wire:
    """A real connection between a client and an enclave, with someone in between who keeps and may change every message."""

    def __init__(self, change_hello: Callable[[bytes], bytes], change_offer: Callable[[bytes], bytes]) -> None:
        self.client, client_side = socket.socketpair()
        server_side, self.server = socket.socketpair()
        self.from_client = bytearray()
        self._threads = [
            threading.Thread(
                target=self._carry, args=(client_side, server_side, change_hello, self.from_client), daemon=True
            ),
            threading.Thread(
                target=self._carry, args=(server_side, client_side, change_offer, bytearray()), daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()

    def _carry(
        self, source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes], kept: bytearray
    ) -> None:
        changed = False
        with source, sink:
            try:
                while head := source.recv(4, socket.MSG_WAITALL):
                    message = source.recv(struct.unpack(">I", head)[0], socket.MSG_WAITALL)
                    kept += head + message
                    if not changed:
                        message, changed = change(message), True
                    sink.sendall(struct.pack(">I", len(message)) + message)
                sink.shutdown(socket.SHUT_WR)
            except OSError:
                return

    def end(self) -> bytes:
        """Closes both ends; returns every byte that the client sent."""
        self.client.close()
        self.server.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        return bytes(self.from_client)


def same(message: bytes) -> bytes:
    return message


def changed_offer(**changes: object) -> Callable[[bytes], bytes]:
    def change(message: bytes) -> bytes:
        offer = msgspec.msgpack.decode(message, type=Offer)
        return msgspec.msgpack.encode(msgspec.structs.replace(offer, **changes))

    return change


def without_x_wing(message: bytes) -> bytes:
    hello = msgspec.msgpack.decode(message, type=Hello)
    return msgspec.msgpack.encode(msgspec.structs.replace(hello, suites=(Suite.X25519,)))


def old_offer() -> bytes:
    """An offer that was made for an earlier hello."""
    client, server = ClientChannel(), server_channel()
    return server.answer(client.hello(), prover(SimAttester(INSTALLATION, MEASUREMENT)))


def relayed(message: bytes) -> bytes:
    """Another enclave, honest and of the same kind, proves itself for the attacker's connection; the keys are the attacker's."""
    return changed_offer(evidence=msgspec.msgpack.decode(old_offer(), type=Offer).evidence)(message)


REFUSALS = {
    "another key": {"offer": changed_offer(key=bytes(range(32)) * 38)},
    "another receipt key": {"offer": changed_offer(receipt_key=b"x" * 32)},
    "another model": {"offer": changed_offer(model_root=b"x" * 32)},
    "another plan": {"offer": changed_offer(plan=b"x" * 32)},
    "another nonce": {"offer": changed_offer(nonce=b"x" * 32)},
    "another version": {"offer": changed_offer(version=2)},
    "no evidence": {"offer": changed_offer(evidence=b"")},
    "evidence of another connection": {"offer": relayed},
    "an old offer": {"offer": lambda message: old_offer()},
    "the stronger suite removed": {"hello": without_x_wing},
    "another hello": {"hello": lambda message: ClientChannel().hello()},
    "a refusal": {"offer": lambda message: REFUSED},
    "nonsense": {"offer": lambda message: b"\xff" * 100},
    "nothing": {"offer": lambda message: b""},
    "an expired collateral": {"check": good_check(age=timedelta(days=400))},
    "a measurement that is not expected": {"check": good_check(measurement=b"x" * 32)},
    "a model that is not wanted": {"check": good_check(root=b"x" * 32)},
    "a stand-in where hardware is wanted": {"check": checker(policy(), Roots.production(), model_roots="any will do")},
}  # fmt: skip


@pytest.fixture
def wire(request: pytest.FixtureRequest) -> Iterator[tuple[Wire, Callable[[bytes, Offer], None]]]:
    case: dict[str, Callable[..., bytes]] = request.param
    yield Wire(case.get("hello", same), case.get("offer", same)), case.get("check", good_check())


def serve(sock: socket.socket, received: list[bytes]) -> None:
    server = SealedServer(sock, server_channel(), prover(SimAttester(INSTALLATION, MEASUREMENT)))
    with closing(server):
        try:
            server.greet()
            while (request := server.next()) is not None:
                received.append(request[0])
                server.send(request[1].seal(b"so it is", final=True))
        except CloisterError:
            return


def talk(wire: Wire, check: Callable[[bytes, Offer], None]) -> tuple[list[bytes], list[bytes], bytes, Exception | None]:
    """Returns what the enclave read, what the client read, every byte that left the client, and the client's error."""
    received: list[bytes] = []
    enclave = threading.Thread(target=serve, args=(wire.server, received), daemon=True)
    enclave.start()
    answer: list[bytes] = []
    error: Exception | None = None
    try:
        with SealedClient(wire.client, check) as client:
            answer = list(client.ask(PROMPT))
    except CloisterError as caught:
        error = caught
    sent = wire.end()
    enclave.join(10)
    return received, answer, sent, error


def length_of_hello() -> int:
    return 4 + len(ClientChannel().hello())


def test_through_an_honest_wire_the_prompt_arrives_sealed() -> None:
    received, answer, sent, error = talk(Wire(same, same), good_check())
    assert (received, answer, error) == ([PROMPT], [b"so it is"], None)
    assert len(sent) > length_of_hello()
    assert PROMPT not in sent


@pytest.mark.parametrize("wire", REFUSALS.values(), ids=REFUSALS.keys(), indirect=True)
def test_nothing_but_the_hello_leaves_when_the_peer_is_refused(
    wire: tuple[Wire, Callable[[bytes, Offer], None]],
) -> None:
    received, answer, sent, error = talk(*wire)
    assert isinstance(error, ChannelError | AttestationError)
    assert received == answer == []
    assert len(sent) == length_of_hello()  # every byte that the client sent was its hello


def test_a_refused_channel_seals_nothing_ever() -> None:
    client, server = ClientChannel(), server_channel()
    offer = server.answer(client.hello(), prover(SimAttester(INSTALLATION, b"x" * 32)))
    with pytest.raises(ChannelError):
        client.seal(PROMPT)
    with pytest.raises(AttestationError):
        client.accept(offer, good_check())
    for _ in range(2):
        with pytest.raises(ChannelError):
            client.seal(PROMPT)
    with pytest.raises(ChannelError):
        client.accept(offer, lambda hello, offer: None)


def test_a_check_that_crashes_leaves_the_channel_closed() -> None:
    client, server = ClientChannel(), server_channel()

    def crash(hello: bytes, offer: Offer) -> None:
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError):
        client.accept(server.answer(client.hello(), prover(SimAttester(INSTALLATION, MEASUREMENT))), crash)
    with pytest.raises(ChannelError):
        client.seal(PROMPT)


def test_a_client_without_a_common_suite_and_a_second_hello_are_refused() -> None:
    client = ClientChannel((Suite.X25519,))
    server = ServerChannel(RECEIPT_KEY, model_root=ROOT, plan=PLAN, measurement=MEASUREMENT, suites=(Suite.X_WING,))
    with pytest.raises(ChannelError, match="no common suite"):
        server.answer(client.hello(), lambda hello, offer: b"")
    _, open_server = connected()
    with pytest.raises(ChannelError, match="second hello"):
        open_server.answer(ClientChannel().hello(), lambda hello, offer: b"")


def test_a_huge_announcement_and_a_silent_peer_are_refused() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(struct.pack(">I", 2**31))
        with pytest.raises(ChannelError, match="at most"):
            SealedClient(ours, good_check())
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(ChannelError):
        SealedClient(ours, good_check())
