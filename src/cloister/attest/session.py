"""Ties a channel's offer to evidence: what the enclave proves, and what its client checks before it sends anything.

Covers: the two callables that `wire.channel` asks for. Guarantees: evidence made for one hello is refused for another; keys,
suites, model, plan and measurement are those of the offer. Does not cover: the decision itself (`attest.verify`).
"""

from collections.abc import Callable
from datetime import UTC, datetime

from cloister.attest.binding import Binding
from cloister.attest.evidence import Attester, Verdict
from cloister.attest.policy import Policy
from cloister.attest.roots import Roots
from cloister.attest.verify import verify
from cloister.errors import EvidenceRefusedError
from cloister.wire.channel_messages import MAX_HELLO_BYTES, Hello, Offer, attested_key, decode

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
