"""The sealed channel: a prompt leaves only under a key that evidence vouches for, an answer comes back whole or not at all.

1. The client draws a nonce and says `Hello`.
2. The enclave makes a key pair for this connection alone, binds the transcript of both messages into fresh evidence, and
   answers with an `Offer`.
3. The client verifies the evidence. Until that has succeeded nothing can be sealed: there is no key to seal to.
4. Each request is sealed by HPKE (RFC 9180, base mode) with the transcript and the number of the request as `info`. It
   carries 32 random bytes from which both ends derive the keys of the answer; the enclave adds 32 of its own.
5. The answer is a sequence of AES-256-GCM frames, nonce = base XOR counter, with the counter and a final flag as data.

Covers: reading, changing, cutting, reordering, dropping, repeating and replaying messages; relaying an offer or a request to
another connection; removing the stronger suite from the hello. Both ends are plain objects without input or output.
Guarantees: `ClientChannel.seal` raises unless `accept` returned; after any failure a channel stays closed. One uniform error
goes to the peer (`REFUSED`). Keys of a connection die with it, so recorded traffic stays sealed when a machine falls later. The
enclave's keys are in secret memory but for the moments of their use.
Assumes: `check` verifies what it is given, with the nonce in it; the enclave is what the evidence says.
Does not cover: who the client is; lengths beyond padding, number and times of messages; a peer that stops answering.
Edge cases: an answer may be empty, but has a final frame all the same; a request is opened at most once.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum, auto
from typing import Final, Never

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import ChannelError
from cloister.isolation.secret_memory import Secret, overwrite_leftovers, wipe_bytes
from cloister.wire.channel_messages import (
    FRAME_PAD,
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    MAX_OFFER_BYTES,
    MAX_REQUEST_BYTES,
    NONCE_BYTES,
    OVERHEAD_BYTES,
    REQUEST_PAD,
    VERSION,
    Hello,
    Offer,
    Request,
    Suite,
    decode,
    pad,
    transcript,
    unpad,
)

REFUSED: Final = b"refused"
"""All that a peer learns of any failure."""

Check = Callable[[bytes, Offer], None]
"""Given the hello and the offer, raises unless the offer's evidence is good and made for both."""

Prove = Callable[[bytes, Offer], bytes]
"""Given the hello and the offer (without evidence), returns evidence made for both."""

PublicKey = x25519.X25519PublicKey | hpke.MLKEM768X25519PublicKey

_MLKEM_BYTES: Final = 1184
_MLKEM_SEED_BYTES: Final = 64
_X25519_BYTES: Final = 32


class _State(Enum):
    NEW = auto()
    ASKED = auto()
    VERIFIED = auto()
    CLOSED = auto()


class KeyPair:
    """The enclave's HPKE keys of one connection, or of one release of a key; the private ones rest in secret memory."""

    def __init__(self, suite: Suite) -> None:
        """Makes the keys from seeds that are drawn here.

        Raises:
            IsolationError: no memory can be kept for them.
        """
        self.suite = suite
        self._curve = Secret.random(_X25519_BYTES)
        self._lattice = Secret.random(_MLKEM_SEED_BYTES) if suite is Suite.X_WING else None
        with self._loaded() as (lattice, curve):
            self.public = b"" if lattice is None else lattice.public_key().public_bytes_raw()
            self.public += curve.public_key().public_bytes_raw()
        overwrite_leftovers()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Returns what was sealed to `public` under the same `info`.

        Raises:
            ChannelError: it was not.
            IsolationError: the keys were closed.
        """
        try:
            with self._loaded() as (lattice, curve):
                private = curve if lattice is None else hpke.MLKEM768X25519PrivateKey(lattice, curve)
                return _suite(self.suite).decrypt(sealed, private, info)
        except (InvalidTag, ValueError) as error:
            raise ChannelError("A message was not sealed to this key, or not for this place.") from error
        finally:
            overwrite_leftovers()

    def close(self) -> None:
        """Overwrites the keys; harmless when already closed."""
        self._curve.close()
        if self._lattice is not None:
            self._lattice.close()

    @contextmanager
    def _loaded(self) -> Iterator[tuple[mlkem.MLKEM768PrivateKey | None, x25519.X25519PrivateKey]]:
        """Yields the keys as the library has them, which overwrites its memory when they go: keep none beyond the block."""
        with ExitStack() as seeds:
            lattice = None
            if self._lattice is not None:
                lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(seeds.enter_context(self._lattice.bytes()))
            yield lattice, x25519.X25519PrivateKey.from_private_bytes(seeds.enter_context(self._curve.bytes()))


def seal_to(suite: Suite, public: bytes, content: bytes, info: bytes) -> bytes:
    """Returns `content` sealed to a public key under `info`.

    Raises:
        ChannelError: the bytes are not a public key of this suite.
    """
    try:
        key: PublicKey
        if suite is Suite.X_WING:
            if len(public) != _MLKEM_BYTES + _X25519_BYTES:
                raise ValueError("another length")
            key = hpke.MLKEM768X25519PublicKey(
                mlkem.MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_BYTES]),
                x25519.X25519PublicKey.from_public_bytes(public[_MLKEM_BYTES:]),
            )
        else:
            key = x25519.X25519PublicKey.from_public_bytes(public)
        return _suite(suite).encrypt(content, key, info)
    except ValueError as error:
        raise ChannelError(f"The peer's {suite.value} key is not one.") from error


class ClientChannel:
    """The client's end of one connection."""

    def __init__(self, suites: Iterable[Suite] = (Suite.X_WING, Suite.X25519)) -> None:
        self._suites = tuple(suites)
        self._state = _State.NEW
        self._hello = b""
        self._offer: Offer | None = None
        self._transcript = b""
        self._number = 0
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def hello(self) -> bytes:
        """Returns the first message."""
        self._expect(_State.NEW)
        self._hello = msgspec.msgpack.encode(Hello(VERSION, self.nonce, self._suites))
        self._state = _State.ASKED
        return self._hello

    def accept(self, message: bytes, check: Check) -> Offer:
        """Returns the enclave's offer once `check` found its evidence good; only now can a request be sealed.

        Raises:
            ChannelError: the offer is malformed, or of another version or suite. Whatever `check` raises is raised too.
        """
        self._expect(_State.ASKED)
        self._state = _State.CLOSED  # until everything below has passed
        offer = decode(message, Offer, MAX_OFFER_BYTES + OVERHEAD_BYTES)
        if offer.version != VERSION:
            raise ChannelError(
                f"The peer speaks version {offer.version} of the channel.", remedy="Use the same version."
            )
        if offer.suite not in self._suites:
            raise ChannelError(f"The peer chose {offer.suite.value}, which was not offered.")
        check(self._hello, offer)
        self._offer = offer
        self._transcript = transcript(self._hello, offer)
        self._state = _State.VERIFIED
        return offer

    def seal(self, request: bytes) -> "tuple[bytes, AnswerReader]":
        """Returns the sealed message of a request, and the reader of its answer.

        Raises:
            ChannelError: no evidence was verified on this channel, or the request is too long.
        """
        self._expect(_State.VERIFIED)
        if len(request) > MAX_REQUEST_BYTES:
            raise ChannelError(f"A request of {len(request)} bytes; at most {MAX_REQUEST_BYTES} can be sent.")
        offer = self._offer
        if offer is None:
            raise ChannelError("The channel is not open.")
        secret = secrets.token_bytes(NONCE_BYTES)
        number = self._number
        self._number += 1
        info = request_info(self._transcript, number)
        sealed = seal_to(offer.suite, offer.key, secret + pad(request, REQUEST_PAD), info)
        return msgspec.msgpack.encode(Request(number, sealed)), AnswerReader(secret, info)

    def close(self) -> None:
        """Ends the channel: nothing can be sealed any more."""
        self._state = _State.CLOSED

    def _expect(self, state: _State) -> None:
        if self._state is not state:
            raise ChannelError(
                "Nothing may be sent: the peer was not verified, or was refused.", remedy="Open a new connection."
            )


class ServerChannel:
    """The enclave's end of one connection."""

    def __init__(
        self, receipt_key: bytes, *, model_root: bytes, plan: bytes, measurement: bytes,
        suites: Iterable[Suite] = (Suite.X_WING, Suite.X25519),
    ) -> None:  # fmt: skip
        self._receipt_key = receipt_key
        self._claims = (model_root, plan, measurement)
        self._suites = frozenset(suites)
        self._keys: KeyPair | None = None
        self._transcript = b""
        self._number = 0
        self.hello = b""
        self.offer: Offer | None = None

    def answer(self, message: bytes, prove: Prove) -> bytes:
        """Returns the offer that answers a hello; once per connection.

        Raises:
            ChannelError: the hello is malformed, of another version, without a common suite, or the second one.
        """
        if self._keys is not None:
            raise ChannelError("A second hello on one connection.")
        hello = decode(message, Hello, MAX_HELLO_BYTES)
        suite = next((suite for suite in hello.suites if suite in self._suites), None)
        if hello.version != VERSION or suite is None:
            raise ChannelError("The client speaks another version, or no common suite.", remedy="Use the same version.")
        keys = KeyPair(suite)
        offer = Offer(
            VERSION,
            suite,
            keys.public,
            self._receipt_key,
            secrets.token_bytes(NONCE_BYTES),
            *self._claims,
            evidence=b"",
        )
        offer = msgspec.structs.replace(offer, evidence=prove(message, offer))
        self._keys, self._transcript = keys, transcript(message, offer)
        self.hello, self.offer = message, offer
        return msgspec.msgpack.encode(offer)

    def open(self, message: bytes) -> "tuple[bytes, AnswerSealer]":
        """Returns the next request in clear, and the sealer of its answer.

        Raises:
            ChannelError: not sealed for this connection, out of turn, or seen before. The channel is closed by it.
        """
        if self._keys is None:
            raise ChannelError("A request before the hello.")
        keys, self._keys = self._keys, None  # any failure below ends the connection
        request = decode(message, Request, MAX_REQUEST_BYTES + 2 * OVERHEAD_BYTES)
        if request.number != self._number:
            raise ChannelError("A request out of turn, or a second time.")
        info = request_info(self._transcript, request.number)
        opened = keys.open(request.sealed, info)
        try:
            content = unpad(opened[NONCE_BYTES:])
            sealer = AnswerSealer(opened[:NONCE_BYTES], info)
        finally:
            wipe_bytes(opened)
        self._number += 1
        self._keys = keys
        return content, sealer

    def close(self) -> None:
        """Overwrites the keys of this connection."""
        if self._keys is not None:
            self._keys.close()
        self._keys = None


class AnswerSealer:
    """Seals one answer, frame by frame. Not for two threads at once. Its key rests in secret memory between frames."""

    def __init__(self, secret: bytes, info: bytes) -> None:
        """Takes over `secret`: it is overwritten."""
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        key, self._base = _answer_keys(secret, info, self._nonce)
        self._key = Secret.take(key)
        wipe_bytes(secret)
        self._count = 0
        self._done = False

    def seal(self, content: bytes, *, final: bool = False) -> bytes:
        """Returns the next frame; after the final one there is none.

        Raises:
            ChannelError: the answer has ended, or the piece is too long.
        """
        if self._done or len(content) > MAX_FRAME_BYTES:
            raise ChannelError("The answer has ended, or a piece of it is too long.")
        with self._key.bytes() as key:
            sealed = AESGCM(key).encrypt(
                _frame_nonce(self._base, self._count), pad(content, FRAME_PAD), _frame_data(self._count, final)
            )
        overwrite_leftovers()
        head = bytes([final]) + (self._nonce if self._count == 0 else b"")
        self._count += 1
        self._done = final
        if final:
            self._key.close()
        return head + sealed


class AnswerReader:
    """Opens one answer, frame by frame, in order. `finished` is true only after the final frame."""

    def __init__(self, secret: bytes, info: bytes) -> None:
        self._secret = secret
        self._info = info
        self._cipher: AESGCM | None = None
        self._base = b""
        self._count = 0
        self.finished = False

    def open(self, frame: bytes) -> bytes:
        """Returns the content of the next frame.

        Raises:
            ChannelError: changed, out of turn, repeated, of another answer, or after the end.
        """
        head = 1 + (NONCE_BYTES if self._count == 0 else 0)
        if self.finished or len(frame) <= head or len(frame) > MAX_FRAME_BYTES + OVERHEAD_BYTES or frame[0] > 1:
            self._broken()
        if self._count == 0:
            key, self._base = _answer_keys(self._secret, self._info, frame[1:head])
            self._cipher = AESGCM(key)
        if self._cipher is None:
            self._broken()
        try:
            padded = self._cipher.decrypt(
                _frame_nonce(self._base, self._count), frame[head:], _frame_data(self._count, bool(frame[0]))
            )
        except InvalidTag:
            self._broken()
        self._count += 1
        self.finished = bool(frame[0])
        return unpad(padded)

    def require_end(self) -> None:
        """Raises `ChannelError` unless the final frame was read: what stops earlier was cut."""
        if not self.finished:
            raise ChannelError("The answer was cut off.", remedy="Ask again; what came so far may be incomplete.")

    def _broken(self) -> Never:
        self._cipher = None
        self._count = max(1, self._count)
        raise ChannelError(
            "A piece of the answer is not what the enclave sent, or not the next one.",
            remedy="Ask again on a new connection.",
        )


def request_info(binding: bytes, number: int) -> bytes:
    """Returns what a request is tied to: the connection and its place there."""
    return b"cloister/request/1" + binding + number.to_bytes(8, "big")


def _answer_keys(secret: bytes, info: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """Returns key and base nonce of an answer."""
    made = HKDF(hashes.SHA256(), 44, salt=nonce, info=b"cloister/answer/1" + info).derive(secret)
    parts = made[:32], made[32:]
    wipe_bytes(made)
    return parts


def _frame_nonce(base: bytes, count: int) -> bytes:
    return (int.from_bytes(base, "big") ^ count).to_bytes(12, "big")


def _frame_data(count: int, final: bool) -> bytes:
    return b"cloister/frame/1" + count.to_bytes(8, "big") + bytes([final])


def _suite(suite: Suite) -> hpke.Suite:
    kem = hpke.KEM.MLKEM768_X25519 if suite is Suite.X_WING else hpke.KEM.X25519
    return hpke.Suite(kem, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
