"""The messages of the sealed channel, and the padding of what they carry.

    client → enclave   Hello     nonce, suites
    enclave → client   Offer     suite, keys, what it serves, evidence
    client → enclave   Request   number, HPKE ciphertext
    enclave → client   frames    flag 1 | [nonce of the answer 32, first frame only] | AES-256-GCM ciphertext

Covers: strict, bounded decoding; padding, so that the length of a frame does not tell the length of a token.
Does not cover: any secret (`wire.channel`).
"""

import hashlib
from enum import StrEnum
from typing import Annotated, Final, TypeVar

import msgspec

from cloister.errors import ChannelError

VERSION: Final = 1
NONCE_BYTES: Final = 32
MAX_REQUEST_BYTES: Final = 16 * 2**20
"""Longest request before sealing."""
MAX_FRAME_BYTES: Final = 2**20
"""Longest piece of an answer before sealing."""
MAX_HELLO_BYTES: Final = 1024
MAX_OFFER_BYTES: Final = 4 * 2**20
REQUEST_PAD: Final = 256
FRAME_PAD: Final = 64
OVERHEAD_BYTES: Final = 4096
"""More than sealing and encoding add to a message."""

Message = TypeVar("Message", bound=msgspec.Struct)

_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Digest = Annotated[bytes, msgspec.Meta(max_length=64)]


class Suite(StrEnum):
    """How requests are sealed; all with HKDF-SHA256 and AES-256-GCM (RFC 9180)."""

    X_WING = "x-wing"
    """ML-KEM-768 and X25519 together: stays secret if either holds."""
    X25519 = "x25519"


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The client's question: who are you, now?"""

    version: int
    nonce: _Nonce
    suites: Annotated[tuple[Suite, ...], msgspec.Meta(min_length=1, max_length=4)]
    """In order of preference."""


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The enclave's answer. Nothing in it is believed before its evidence was verified."""

    version: int
    suite: Suite
    key: Annotated[bytes, msgspec.Meta(max_length=2048)]
    """The HPKE public key of this connection."""
    receipt_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    """Ed25519: signs receipts."""
    nonce: _Nonce
    """The enclave's own, so that no two connections have one transcript."""
    model_root: _Digest
    plan: _Digest
    measurement: _Digest
    evidence: Annotated[bytes, msgspec.Meta(max_length=MAX_OFFER_BYTES)]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A sealed request; they are numbered from 0."""

    number: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    sealed: Annotated[bytes, msgspec.Meta(max_length=MAX_REQUEST_BYTES + OVERHEAD_BYTES)]


def transcript(hello: bytes, offer: Offer) -> bytes:
    """Returns a hash of everything the two ends said before the first request, but for the evidence, which is malleable."""
    said = msgspec.structs.replace(offer, evidence=b"")
    digest = hashlib.sha256(b"cloister/channel/1")
    for part in (hello, msgspec.msgpack.encode(said)):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def attested_key(hello: bytes, offer: Offer) -> bytes:
    """Returns what the evidence must vouch for as the key: the transcript, so both keys, both nonces and all suites."""
    return transcript(hello, offer)


def decode(content: bytes, kind: type[Message], limit: int) -> Message:
    """Returns the message in `content`.

    Raises:
        ChannelError: too long, or not such a message.
    """
    if len(content) > limit:
        raise ChannelError(f"A {kind.__name__} of {len(content)} bytes; at most {limit} are read.")
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ChannelError(f"The peer's {kind.__name__} does not decode.") from error


def pad(content: bytes, multiple: int) -> bytes:
    """Returns `content` with a mark and zeros behind it, to a multiple of `multiple` bytes."""
    return content + b"\x80" + bytes(-(len(content) + 1) % multiple)


def unpad(padded: bytes) -> bytes:
    """Returns what `pad` was given.

    Raises:
        ChannelError: there is no mark.
    """
    content = padded.rstrip(b"\0")
    if not content.endswith(b"\x80"):
        raise ChannelError("A message has no end mark.")
    return content[:-1]
