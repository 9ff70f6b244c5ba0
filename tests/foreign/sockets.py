"""Parsers of what arrives over sockets: the sealed channel, sessions, accelerators, engines, clients."""

import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from cloister.gateway.completions import StreamReader
from cloister.gateway.http import _reason
from cloister.server.schema import ChatRequest, CompletionRequest, decoded
from cloister.split import frames
from cloister.wire.asking import FramedSocket, answering_end, asking_end
from cloister.wire.channel import ClientChannel, ServerChannel
from cloister.wire.channel_answers import AnswerReader, AnswerSealer
from cloister.wire.channel_messages import MAX_OFFER_BYTES, Offer, Suite
from cloister.wire.channel_socket import MessageSocket
from cloister.wire.codec import HEADER_BYTES, Frame, Kind, decode, decode_pair, encode_pair_request, peer_text
from cloister.wire.pairs import PairShape
from cloister.wire.sanitising import Done, Embed, OpenSession, Rows
from cloister.wire.session import Generate, Open, Progress, Rehearsal, Sampling, SessionSocket
from foreign.parser import Foreign, arriving, everything


def channels() -> dict[str, Foreign]:
    """Parsers of the sealed channel's messages."""
    offer = Offer(1, Suite.X25519, bytes(31) + b"\x09", bytes(32), bytes(32), b"", b"", b"", evidence=b"")

    def offered(data: bytes) -> object:
        channel = ClientChannel()
        channel.hello()
        channel.accept(data, lambda _hello, _offer: None)
        return channel.seal(b"a request")

    def greeted(data: bytes) -> object:
        return ServerChannel(bytes(32), model_root=b"", plan=b"", measurement=b"").answer(
            data, lambda _hello, _offer: b""
        )

    server = ServerChannel(bytes(32), model_root=b"", plan=b"", measurement=b"", suites=(Suite.X25519,))
    client = ClientChannel((Suite.X25519,))
    client.accept(server.answer(client.hello(), lambda _hello, _offer: b""), lambda _hello, _offer: None)
    request, _ = client.seal(b"a request")
    keys = server._keys

    def requested(data: bytes) -> object:
        server._keys, server._number = keys, 0  # a failure ends a connection
        return server.open(data)

    sealer = AnswerSealer(bytes(bytearray(32)), b"info")
    first, second = sealer.seal(b"a piece"), sealer.seal(b"the end", final=True)

    def answered(data: bytes) -> None:
        reader = AnswerReader(bytes(32), b"info")
        reader.open(data[: len(first)])
        reader.open(data[len(first) :])
        reader.require_end()

    return {
        "channel hello": Foreign(greeted, (ClientChannel().hello(),)),
        "channel offer": Foreign(offered, (msgspec.msgpack.encode(offer),)),
        "channel request": Foreign(requested, (request,)),
        "channel answer": Foreign(answered, (first + second,)),
    }


def wires() -> dict[str, Foreign]:
    """Parsers of what comes over other sockets."""

    def messages(data: bytes) -> None:
        with arriving(data) as sock:
            socket_ = MessageSocket(sock)
            socket_.pending()
            everything(lambda: socket_.receive(MAX_OFFER_BYTES, 1.0))

    def session(data: bytes, method: str) -> None:
        with arriving(data) as sock:
            everything(getattr(SessionSocket(sock), method))

    def accelerated(data: bytes) -> object:
        frame = decode(data[:HEADER_BYTES])
        return decode_pair(frame, data[HEADER_BYTES:]) if frame.kind is Kind.PAIR else peer_text(data[HEADER_BYTES:])

    def event(data: bytes) -> None:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the line's reader has seen to these
            value = msgspec.json.decode(data)
            if isinstance(value, dict):
                StreamReader(1, as_chat=True).read(value)

    def split(data: bytes) -> None:
        def one() -> object | None:
            frame = frames.receive(sock)
            if frame is not None and frame.element is frames.Element.TEXT:
                frame.text()
            return frame

        with arriving(data) as sock:
            everything(one)

    to_enclave = [Open("m", {"cache": {"page_tokens": 16}}, Rehearsal(), {"red": "r"}), Generate(Sampling(), "p")]
    from_enclave = [Progress("weights", 1, 2, "weights")]

    def asked(data: bytes, end: Callable[[socket.socket], "FramedSocket[Any, Any]"]) -> None:
        with arriving(data) as sock:
            everything(end(sock).receive)

    pair = encode_pair_request(1, 2, PairShape(1, 4, 0, 2, 0, False, 2))[0]
    return {
        "channel socket": Foreign(messages, (struct.pack(">I", 5) + b"hello",)),
        "session to enclave": Foreign(
            lambda data: session(data, "receive_to_enclave"), tuple(_framed(m) for m in to_enclave)
        ),
        "session from enclave": Foreign(
            lambda data: session(data, "receive_from_enclave"), tuple(_framed(m) for m in from_enclave)
        ),
        "sanitising question": Foreign(
            lambda data: asked(data, answering_end), tuple(_framed(m) for m in (OpenSession("s"), Embed((5, 6), 2)))
        ),
        "sanitising answer": Foreign(
            lambda data: asked(data, asking_end), tuple(_framed(m) for m in (Done(), Rows(b"rows", 0.5)))
        ),
        "accelerator frame": Foreign(accelerated, (Frame(Kind.MULTIPLY, 1, 0, 2, 3, 4).encode(), pair)),
        "engine event": Foreign(
            event,
            (b'{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}',),
        ),
        "engine error": Foreign(_reason, (b'{"error":{"message":"no such model"}}',)),
        "split frame": Foreign(split, (_split_seed(),)),
        "chat request": Foreign(
            lambda data: decoded(data, ChatRequest),
            (b'{"model":"m","messages":[{"role":"user","content":"x"}],"stream":true}',),
        ),
        "completion request": Foreign(
            lambda data: decoded(data, CompletionRequest), (b'{"model":"m","prompt":"x","max_tokens":3}',)
        ),
    }


def _framed(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(4, "little") + payload


def _split_seed() -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.send(ours, frames.text_frame(frames.Kind.OPEN, 1, {"temperature": 0.5}))
        rows = np.zeros((2, 3), np.float32)
        frames.send(ours, frames.Frame(frames.Kind.STEP, 1, frames.Element.F32, rows))
        return theirs.recv(2**16)
