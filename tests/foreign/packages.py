"""Parsers of sealed packages, keys, and what brokers and enclaves say to each other."""

import json
import socket
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.assets import demo_model
from cloister.attest import policy_file
from cloister.attest.evidence import Skip
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
from foreign.parser import Foreign, Target, arriving, kept


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


def sealed_jwe(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns a key broker service's answer to this key, made by another implementation."""
    from joserfc import jwe
    from joserfc.jwk import ECKey

    message = jwe.FlattenedJSONEncryption({"alg": "ECDH-ES+A256KW", "enc": "A256GCM"}, b"the content key")
    message.add_recipient(None, ECKey.import_key(key.public_key()))  # type: ignore[arg-type]
    return json.dumps(jwe.encrypt_json(message, None)).encode()


def _documented_policy() -> bytes:
    """The policy of the documentation: every kind, nearly right."""
    text = (Path(__file__).parents[2] / "docs" / "attestation.md").read_text()
    return text.partition("```toml")[2].partition("```")[0].encode()


def _post(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _answer(body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
