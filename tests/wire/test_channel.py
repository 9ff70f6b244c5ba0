"""The sealed channel: what comes through, and that nothing leaves when the peer is not the enclave that was expected."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attest.evidence import Skip
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.roots import Roots
from cloister.attest.session import checker, prover
from cloister.attest.sim import Installation, SimAttester
from cloister.errors import AttestationError, ChannelError, CloisterError
from cloister.wire.channel import REFUSED, ClientChannel, ServerChannel
from cloister.wire.channel_answers import AnswerSealer
from cloister.wire.channel_keys import seal_to
from cloister.wire.channel_messages import Hello, Offer, Suite, pad, unpad
from cloister.wire.channel_socket import SealedClient, SealedServer

PROMPT = b"the patient is called Margarethe Weissenborn"
MEASUREMENT, ROOT, PLAN = b"m" * 32, b"r" * 32, b"p" * 32
NOW = datetime.now(UTC)
INSTALLATION = Installation.create(NOW)
RECEIPT_KEY = b"k" * 32


def policy(measurement: bytes = MEASUREMENT) -> Policy:
    accepted = SimPolicy(measurement=frozenset({measurement}), min_version=1)
    return Policy(accept=(accepted,), report_data=Skip("set for each exchange"))


def good_check(
    measurement: bytes = MEASUREMENT, root: bytes = ROOT, age: timedelta = timedelta()
) -> Callable[[bytes, Offer], None]:
    roots = Roots(sim=frozenset({INSTALLATION.fingerprint}))
    return checker(policy(measurement), roots, model_roots=frozenset({root}), clock=lambda: datetime.now(UTC) + age)


def server_channel(**changes: bytes) -> ServerChannel:
    claims = {"model_root": ROOT, "plan": PLAN, "measurement": MEASUREMENT, **changes}
    return ServerChannel(RECEIPT_KEY, **claims)


def connected(suites: tuple[Suite, ...] = (Suite.X_WING,)) -> tuple[ClientChannel, ServerChannel]:
    client, server = ClientChannel(suites), server_channel()
    client.accept(server.answer(client.hello(), prover(SimAttester(INSTALLATION, MEASUREMENT))), good_check())
    return client, server


@pytest.mark.parametrize("suite", list(Suite))
def test_requests_and_answers_come_through(suite: Suite) -> None:
    client, server = connected((suite,))
    for number in range(3):
        message, reader = client.seal(PROMPT + bytes([number]))
        assert PROMPT not in message
        request, sealer = server.open(message)
        assert request == PROMPT + bytes([number])
        pieces = [b"one", b"", b"three" * 1000]
        frames = [sealer.seal(piece, final=piece == pieces[-1]) for piece in pieces]
        assert [reader.open(frame) for frame in frames] == pieces
        reader.require_end()


@given(st.binary(max_size=600), st.sampled_from([64, 256]))
def test_padding_can_be_taken_away_and_hides_the_length(content: bytes, multiple: int) -> None:
    padded = pad(content, multiple)
    assert unpad(padded) == content
    assert len(padded) % multiple == 0
    assert len(padded) - len(content) <= multiple


def test_short_pieces_have_one_length() -> None:
    client, server = connected()
    message, _ = client.seal(b"x")
    assert len(message) == len(client.seal(b"x" * 200)[0])
    _, sealer = server.open(message)
    sealer.seal(b"")
    assert len(sealer.seal(b"a")) == len(sealer.seal(b"incomprehensibilities"))


# What someone on the path can do to an answer.


def answer() -> tuple[list[bytes], Callable[[list[bytes]], list[bytes]]]:
    """Five frames, and what a client makes of a list of frames."""
    client, server = connected((Suite.X25519,))
    message, reader = client.seal(PROMPT)
    _, sealer = server.open(message)
    frames = [sealer.seal(b"piece %d" % at, final=at == 4) for at in range(5)]

    def read(received: list[bytes]) -> list[bytes]:
        pieces = [reader.open(frame) for frame in received]
        reader.require_end()
        return pieces

    return frames, read


def test_the_whole_answer_is_read() -> None:
    frames, read = answer()
    assert read(frames)[-1] == b"piece 4"


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f[:3], lambda f: f[:-1], lambda f: [], lambda f: [f[1], f[0], *f[2:]], lambda f: f[:2] + f[3:],
        lambda f: f[:2] + f[1:], lambda f: [*f, f[-1]], lambda f: [f[0], f[0], *f[1:]], lambda f: [f[0], f[4]],
        lambda f: [b"\x01" + f[0][1:]], lambda f: [f[0], b"\x00" + f[4][1:]], lambda f: [b"", *f], lambda f: [f[0][:-1], *f[1:]],
        lambda f: [f[0][:1] + bytes(32) + f[0][33:], *f[1:]], lambda f: [f[0], f[1] + b"\0", *f[2:]],
    ],
    ids=[
        "cut after three", "cut before the last", "nothing", "swapped", "dropped", "repeated", "last repeated", "first repeated",
        "middle dropped", "first marked final", "final unmarked", "empty frame", "first shortened", "another nonce", "appended",
    ],
)  # fmt: skip
def test_a_changed_answer_is_refused(change: Callable[[list[bytes]], list[bytes]]) -> None:
    frames, read = answer()
    with pytest.raises(ChannelError):
        read(change(frames))


def test_any_flipped_bit_of_a_frame_is_refused() -> None:
    frames, _ = answer()
    for at in range(0, len(frames[0]), 7):
        again, read = answer()
        damaged = bytearray(again[0])
        damaged[at] ^= 1
        with pytest.raises(ChannelError):
            read([bytes(damaged), *again[1:]])


def test_an_answer_to_another_request_is_refused() -> None:
    client, server = connected()
    first, reader = client.seal(PROMPT)
    second, _ = client.seal(PROMPT)
    server.open(first)
    _, sealer = server.open(second)
    with pytest.raises(ChannelError):
        reader.open(sealer.seal(b"answer", final=True))


def test_after_a_bad_frame_even_a_good_one_is_refused() -> None:
    frames, read = answer()
    with pytest.raises(ChannelError):
        read([frames[1]])
    with pytest.raises(ChannelError):
        read(frames)


# What someone on the path can do to a request.


def test_a_replayed_or_reordered_request_is_refused_and_ends_the_connection() -> None:
    client, server = connected()
    first, second = client.seal(PROMPT)[0], client.seal(PROMPT)[0]
    server.open(first)
    with pytest.raises(ChannelError, match="out of turn"):
        server.open(first)
    with pytest.raises(ChannelError):
        server.open(second)


def test_a_request_relayed_to_another_connection_is_refused() -> None:
    client, _ = connected()
    _, other = connected()
    with pytest.raises(ChannelError, match="not sealed to this key"):
        other.open(client.seal(PROMPT)[0])


def test_a_request_of_another_number_is_refused() -> None:
    client, server = connected()
    number, sealed = msgspec.msgpack.decode(client.seal(PROMPT)[0])
    with pytest.raises(ChannelError):
        server.open(msgspec.msgpack.encode([number + 1, sealed]))


@settings(max_examples=30)
@given(st.binary(max_size=300))
def test_any_bytes_are_an_error_and_nothing_worse(content: bytes) -> None:
    with pytest.raises(ChannelError):
        server_channel().answer(content, lambda hello, offer: b"")
    client = ClientChannel()
    client.hello()
    with pytest.raises(ChannelError):
        client.accept(content, lambda hello, offer: None)
    _, server = connected((Suite.X25519,))
    with pytest.raises(ChannelError):
        server.open(content)


def test_a_key_of_small_order_or_another_length_is_refused() -> None:
    for suite in Suite:
        for key in (b"", bytes(32), bytes(31), bytes(1216)):
            if (suite, len(key)) == (Suite.X_WING, 1216):
                key = b"\xff" * 1216
            with pytest.raises(ChannelError):
                seal_to(suite, key, PROMPT, b"")


def test_an_answer_has_one_end() -> None:
    sealer = AnswerSealer(bytes(32), b"info")
    sealer.seal(b"", final=True)
    with pytest.raises(ChannelError):
        sealer.seal(b"more")


# Before the first byte of a prompt leaves.


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
