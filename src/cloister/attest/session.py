"""Ties a channel's offer to evidence: what the enclave proves, and what its client checks before it sends anything.

Covers: the two callables that `wire.channel` asks for; asking an enclave for evidence and nothing else.
Guarantees: evidence made for one hello is refused for another; keys, suites, model, plan and measurement are those of the
offer. Does not cover: the decision itself (`attest.verify`).
"""

import socket
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from cloister.attest.binding import Binding
from cloister.attest.document import Attestation
from cloister.attest.evidence import Attester, Evidence, Verdict
from cloister.attest.policy import Policy
from cloister.attest.roots import Roots
from cloister.attest.verify import verify
from cloister.errors import ChannelError, EvidenceRefusedError
from cloister.wire.channel import REFUSED
from cloister.wire.channel_messages import (
    MAX_HELLO_BYTES,
    MAX_OFFER_BYTES,
    OVERHEAD_BYTES,
    VERSION,
    Hello,
    Offer,
    Suite,
    attested_key,
    decode,
)
from cloister.wire.channel_socket import HANDSHAKE_SECONDS, MessageSocket

CONTEXT = b"session"


def session_binding(hello: bytes, offer: Offer) -> Binding:
    """Returns what the evidence of an offer must carry."""
    return Binding(
        nonce=decode(hello, Hello, MAX_HELLO_BYTES).nonce,
        key=attested_key(hello, offer),
        model_root=offer.model_root,
        measurement=offer.measurement,
        plan=offer.plan,
        context=CONTEXT,
    )


def prover(attester: Attester) -> Callable[[bytes, Offer], bytes]:
    """Returns the enclave's side: makes evidence for an offer."""

    def prove(hello: bytes, offer: Offer) -> bytes:
        return attester.evidence(session_binding(hello, offer).report_data()).encode()

    return prove


def checker(
    policy: Policy,
    roots: Roots,
    *,
    model_roots: frozenset[bytes] | str,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    on_verdict: Callable[[Verdict], None] | None = None,
) -> Callable[[bytes, Offer], None]:
    """Returns the client's side: raises unless the evidence of an offer is good and the model is one of `model_roots`.

    `model_roots` as a text is the reason why any model will do; `on_verdict` is shown every verdict, good or bad.
    """

    def check(hello: bytes, offer: Offer) -> None:
        expected = policy.expecting(session_binding(hello, offer).report_data())
        verdict = verify(offer.evidence, expected, clock(), roots)
        if on_verdict is not None:
            on_verdict(verdict)
        verdict.require()
        if not isinstance(model_roots, str) and offer.model_root not in model_roots:
            raise EvidenceRefusedError(
                f"The enclave serves the model {offer.model_root.hex() or 'of an unsealed folder'}, not the one wanted.",
                remedy="Send nothing to this peer.",
                checks=("model-root",),
            )

    return check


def ask(sock: socket.socket, nonce: bytes, seconds: float = HANDSHAKE_SECONDS) -> Attestation:
    """Returns the unverified evidence that an enclave behind the sealed channel shows for a nonce of 32 bytes.

    Sends a hello with the nonce and nothing else, on a connection that is good for nothing afterwards; the caller closes it.

    Raises:
        ChannelError: it does not answer as an enclave does.
        EvidenceError, EvidenceUnsupportedError: what it shows does not decode as evidence.
    """
    messages = MessageSocket(sock)
    hello = msgspec.msgpack.encode(Hello(VERSION, nonce, (Suite.X_WING, Suite.X25519)))
    messages.send(hello)
    message = messages.receive(MAX_OFFER_BYTES + OVERHEAD_BYTES, seconds)
    if message is None or message == REFUSED:
        raise ChannelError("The enclave refuses.", remedy="Ask again; it serves few clients at once.")
    offer = decode(message, Offer, MAX_OFFER_BYTES + OVERHEAD_BYTES)
    return Attestation(evidence=Evidence.decode(offer.evidence), binding=session_binding(hello, offer))
