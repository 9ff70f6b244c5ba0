"""The sealed channel: what comes through, and what somebody on the path can do to requests and answers."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import ChannelError
from cloister.wire.channel import ClientChannel
from cloister.wire.channel_answers import AnswerSealer
from cloister.wire.channel_keys import seal_to
from cloister.wire.channel_messages import Suite, pad, unpad
from wire.peers import PROMPT, connected, server_channel


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
