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
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Final

import msgspec

from cloister.errors import ChannelError
from cloister.isolation.secret_memory import wipe_bytes
from cloister.wire.channel_answers import AnswerReader, AnswerSealer
from cloister.wire.channel_keys import KeyPair, seal_to
from cloister.wire.channel_messages import (
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


class _State(Enum):
    NEW = auto()
    ASKED = auto()
    VERIFIED = auto()
    CLOSED = auto()


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

    def seal(self, request: bytes) -> tuple[bytes, AnswerReader]:
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

    def open(self, message: bytes) -> tuple[bytes, AnswerSealer]:
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


def request_info(binding: bytes, number: int) -> bytes:
    """Returns what a request is tied to: the connection and its place there."""
    return b"cloister/request/1" + binding + number.to_bytes(8, "big")
