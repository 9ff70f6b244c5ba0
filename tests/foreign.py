"""What is fuzzed beside attestation: every other parser that meets bytes which somebody else wrote.

Used by the Hypothesis tests and by `scripts/fuzz.py` (atheris). A target returns normally or raises one of `EXPECTED`;
anything else, and anything slow, is a finding.
"""

import hashlib
import json
import mmap
import socket
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.assets import demo_model
from cloister.attest import policy_file
from cloister.attest.evidence import Skip
from cloister.errors import CloisterError
from cloister.gateway.completions import StreamReader
from cloister.gateway.http import _reason
from cloister.model.adapter_config import read_adapter_config
from cloister.model.chat_template import ChatTemplate
from cloister.model.files import HeldFile, HeldFolder
from cloister.model.generation_config import read_generation_defaults
from cloister.model.safetensors_file import STORED, read_header, read_metadata
from cloister.model.spec import read_spec
from cloister.model.tokenizer import Tokenizer
from cloister.plan.rules import read_rules
from cloister.privacy import candidate_file
from cloister.privacy.certificate import TOTAL
from cloister.privacy.ledger import Ledger
from cloister.seal.broker import Broker
from cloister.seal.broker_server import serve_connection
from cloister.seal.client import _ask, connected
from cloister.seal.kbs import open_jwe
from cloister.seal.manifest import (
    MANIFEST,
    SIGNATURE,
    Expected,
    Manifest,
    decode_manifest,
    read_manifest,
    sign_manifest,
)
from cloister.seal.policy import parse_policy, stand_in_policy
from cloister.seal.release import Challenge, Released
from cloister.seal.selection import read_privacy
from cloister.seal.signing import PublicKey, SigningKey
from cloister.seal.store import Store
from cloister.seal.writer import seal_model
from cloister.server.schema import ChatRequest, CompletionRequest, decoded
from cloister.settings import from_toml
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

EXPECTED = (CloisterError,)

NAMES = (
    "seal manifest",
    "seal signature",
    "public key",
    "broker request",
    "broker challenge",
    "broker release",
    "kbs answer",
    "policy",
    "policy file",
    "plan: private",
    "channel hello",
    "channel offer",
    "channel request",
    "channel answer",
    "channel socket",
    "session to enclave",
    "session from enclave",
    "sanitising question",
    "sanitising answer",
    "accelerator frame",
    "engine event",
    "engine error",
    "split frame",
    "chat request",
    "completion request",
    "safetensors",
    "model config",
    "generation config",
    "adapter config",
    "tokenizer",
    "chat template",
    "candidate file",
    "ledger",
    "settings",
    "plan rules",
)

Target = Callable[[bytes], object]


@dataclass(frozen=True)
class Foreign:
    """A parser and well-formed inputs, where mutations begin."""

    target: Target
    seeds: tuple[bytes, ...]


@contextmanager
def arriving(data: bytes) -> Iterator[socket.socket]:
    """Yields a socket on which these bytes arrive and then the end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(2)
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        yield ours


def everything(receive: Callable[[], object | None]) -> None:
    """Receives until the end."""
    while receive() is not None:
        pass


def kept(folder: Path, read: Callable[[Path], object]) -> Target:
    """Returns a target that puts the bytes into a file first, alone in a folder below `folder`."""
    own = Path(tempfile.mkdtemp(dir=folder))

    def target(data: bytes) -> object:
        for old in own.iterdir():
            old.unlink()
        path = own / "file"
        path.write_bytes(data)
        return read(path)

    return target


def packages(folder: Path) -> dict[str, Foreign]:
    """Parsers of sealed packages, keys, and what brokers and enclaves say to each other."""
    owner = SigningKey.generate()
    sealed = seal_model(Path(demo_model()), folder / "demo", owner, name="demo", version=1)
    whole = {name: getattr(sealed.manifest, name) for name in Manifest.__struct_fields__}
    short = Manifest(**whole | {"tensors": sealed.manifest.tensors[:2], "files": sealed.manifest.files[:2]})
    content, signature = sign_manifest(short, owner)
    signed_folder = Path(tempfile.mkdtemp(dir=folder))
    (signed_folder / MANIFEST).write_bytes(content)

    def signed(data: bytes) -> object:
        (signed_folder / SIGNATURE).write_bytes(data)
        return read_manifest(signed_folder, Expected(signers="a fuzzer", min_version=1))

    broker = Broker(
        Store(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False), bytes(range(32))),
        parse_policy,
    )
    broker._store._prepare(Path(":memory:"))

    def asked(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            with suppress(BlockingIOError):
                theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            serve_connection(broker, ours)

    def told(kind: type[Challenge] | type[Released]) -> Target:
        def target(data: bytes) -> object:
            with arriving(data) as sock, closing(connected(sock)) as connection:
                return _ask(connection, "/v1/challenge", b"{}", kind)

        return target

    key = ec.generate_private_key(ec.SECP256R1())
    policy = stand_in_policy(bytes(32), ["00" * 32]).encode()
    nonce = msgspec.json.encode(Challenge(bytes(32)))
    empty = dict.fromkeys(("measurement", "plan", "evidence"), "")
    release = json.dumps(
        {"nonce": "A" * 43 + "=", "suite": "x-wing", "key": "AAAA", "root": "A" * 43 + "=", **empty}
    ).encode()
    return {
        "seal manifest": Foreign(lambda data: decode_manifest(Path("p"), data).root(), (content,)),
        "seal signature": Foreign(signed, (signature,)),
        "public key": Foreign(lambda data: PublicKey.parse(data.decode("latin-1")), (str(owner.public).encode(),)),
        "broker request": Foreign(
            asked, (_post("/v1/challenge", b"{}"), _post("/v1/release", release), _post("/v1/health", b""))
        ),
        "broker challenge": Foreign(told(Challenge), (_answer(nonce),)),
        "broker release": Foreign(told(Released), (_answer(msgspec.json.encode(Released(b"x" * 64))),)),
        "kbs answer": Foreign(lambda data: open_jwe(data, key), (sealed_jwe(key),)),
        "policy": Foreign(lambda data: parse_policy(data.decode("utf-8", "replace")), (policy,)),
        "policy file": Foreign(
            kept(folder, lambda path: policy_file.read(path, Skip("fuzzing"))), (policy, _documented_policy())
        ),
        "plan: private": Foreign(
            kept(folder, read_privacy),
            (b'[private]\ntensors=["*"]\npublic=["a*"]\n[private.adapters]\ntensors=["*"]\n',),
        ),
    }


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


def files(folder: Path) -> dict[str, Foreign]:
    """Parsers of model directories, candidate files, ledgers, settings."""
    demo = demo_model()
    config, tokenizer = ((demo / name).read_bytes() for name in ("config.json", "tokenizer.json"))
    small = json.loads(tokenizer)
    vocabulary = small["model"].get("vocab")
    if isinstance(vocabulary, dict):
        small["model"]["vocab"] = dict(list(vocabulary.items())[:300])
        small["model"]["merges"] = []

    def tensors(data: bytes) -> None:
        with closing(mmap.mmap(-1, max(1, len(data)))) as mapped:
            mapped[: len(data)] = data
            for tensor in read_header(Path("f"), mapped).values():
                if tensor.dtype in STORED:
                    tensor.view()
            read_metadata(Path("f"), mapped)

    def held(read: Callable[[HeldFile], object]) -> Target:
        return lambda data: read(HeldFile(Path("f"), data))

    def tokens(data: bytes) -> object:
        settings = (demo / "tokenizer_config.json").read_bytes()
        made = Tokenizer.open(
            HeldFolder(Path("m"), {"tokenizer.json": data, "tokenizer_config.json": settings, "config.json": config})
        )
        return made.decode(made.encode("Once upon a time")[:4])

    def candidates(data: bytes) -> object:
        header, _, stream = data.partition(b"\0\0")
        packed = zlib.compress(header, 1)
        sizes = len(header).to_bytes(4, "little") + len(packed).to_bytes(4, "little")
        whole = candidate_file.MAGIC + bytes([candidate_file.VERSION]) + sizes + packed + stream
        return candidate_file._decode(whole + hashlib.sha256(whole).digest())

    def ledger(path: Path) -> None:
        with closing(Ledger.open(path)) as opened:
            for name in opened.sessions():
                opened.report(name)
                opened.prompts(name)

    place = folder / "ledger.db"
    Ledger.open(place).close()
    empty_ledger = place.read_bytes()
    adapter = b'{"peft_type":"LORA","r":8,"lora_alpha":16,"target_modules":["q_proj"],"base_model_name_or_path":"x"}'
    stream = candidate_file._pack((np.full((2, 2), TOTAL // 2, np.int64),))
    header = {
        "model": "m", "embedding_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "vocabulary": 4, "members": 2,
        "classes": [{"kind": "word", "type": "t", "members": ["a", "b"], "tokens": [0, 1]}],
        "sets": [{
            "mechanism": "channel", "epsilon": "1/2", "attacks": [0.5], "curve_first": 0.0, "curve_gap": 0.1, "curve": [0.5, 0.1],
            "stream_bytes": len(stream),
        }],
    }  # fmt: skip
    safetensors = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}
    ).encode()
    template = (
        b"{% for m in messages %}{{ m['role'] }}{% if loop.first %}{{ raise_exception('x') }}{% endif %}{% endfor %}"
    )
    return {
        "safetensors": Foreign(tensors, (struct.pack("<Q", len(safetensors)) + safetensors + bytes(8),)),
        "model config": Foreign(held(read_spec), (config,)),
        "generation config": Foreign(
            held(read_generation_defaults), (b'{"eos_token_id":[1,2],"temperature":0.7,"top_p":0.9}',)
        ),
        "adapter config": Foreign(held(read_adapter_config), (adapter,)),
        "tokenizer": Foreign(tokens, (json.dumps(small).encode(),)),
        "chat template": Foreign(lambda data: ChatTemplate(data.decode("utf-8", "replace"), {}), (template,)),
        "candidate file": Foreign(candidates, (json.dumps(header).encode() + b"\0\0" + stream,)),
        "ledger": Foreign(kept(folder, ledger), (empty_ledger,)),
        "settings": Foreign(kept(folder, from_toml), (b'[blinding]\nchecks = 2\n[plan]\npolicy = "amulet"\n',)),
        "plan rules": Foreign(
            kept(folder, read_rules), (b'[tensors]\n"model.layers.0.*" = "secret"\n"lm_head.*" = ["public"]\n',)
        ),
    }


def all_targets(folder: Path) -> dict[str, Foreign]:
    """Returns every target by name, in the order of `NAMES`; `folder` is for the files that some need."""
    made = {**packages(folder), **channels(), **wires(), **files(folder)}
    return {name: made[name] for name in NAMES}


def sealed_jwe(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns a key broker service's answer to this key, made by another implementation."""
    from joserfc import jwe
    from joserfc.jwk import ECKey

    message = jwe.FlattenedJSONEncryption({"alg": "ECDH-ES+A256KW", "enc": "A256GCM"}, b"the content key")
    message.add_recipient(None, ECKey.import_key(key.public_key()))  # type: ignore[arg-type]
    return json.dumps(jwe.encrypt_json(message, None)).encode()


def _documented_policy() -> bytes:
    """The policy of the documentation: every kind, nearly right."""
    text = (Path(__file__).parents[1] / "docs" / "attestation.md").read_text()
    return text.partition("```toml")[2].partition("```")[0].encode()


def _post(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _answer(body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


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
