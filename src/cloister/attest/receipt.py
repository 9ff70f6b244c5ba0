"""Receipts: a statement about one answer, signed by a key that evidence vouches for, and its verification without a network.

    statement   hashes of request and response, model root, plan, measurement, what was checked
    signature   Ed25519 by the receipt key of the session
    session     hello and offer of the sealed channel; the offer holds the receipt key and the evidence

Covers: the format; deciding on a receipt from its bytes alone, at a time, under a policy and roots that the caller passes.
Guarantees: accepted only if the evidence is good, was made for this session, and the statement is signed by the key in it and
names the model, plan and measurement of the session.
Does not cover: whether the answer is true; that an enclave sent no other answer; secrecy: a hash lets a reader test a guess
about a short prompt, so show receipts to whom you would show the prompt.
Edge cases: request, response and model that the caller does not name are SKIPPED by name. Times in statements are the enclave's.
"""

import hashlib
import hmac
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.attest.evidence import Outcome, Result, Verdict
from cloister.attest.policy import Policy
from cloister.attest.roots import Roots
from cloister.attest.session import session_binding
from cloister.attest.verify import verify
from cloister.errors import ChannelError, EvidenceError, EvidenceUnsupportedError, ReceiptError
from cloister.wire.channel_messages import MAX_HELLO_BYTES, MAX_OFFER_BYTES, OVERHEAD_BYTES, Hello, Offer, decode

FORMAT: Final = "cloister-receipt/1"
MAX_RECEIPT_BYTES: Final = 2 * (MAX_OFFER_BYTES + OVERHEAD_BYTES)

_Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Digest = Annotated[bytes, msgspec.Meta(max_length=64)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Checks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the enclave did to be sure of the numbers behind an answer."""

    products: _Count
    """Products that were lent to an accelerator; each was checked before it was used."""
    enclave_products: _Count
    """Products that the enclave computed by itself."""
    refused: _Count
    """Failures of accelerators (wrong, late or no answer); the work was done again elsewhere."""
    checks_per_product: _Count
    """Independent Freivalds checks of each product."""


class Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is signed."""

    request: _Hash
    """SHA-256 of the request as it was sealed."""
    response: _Hash
    """SHA-256 of all pieces of the answer, one after the other."""
    model_root: _Digest
    plan: _Digest
    measurement: _Digest
    kind: Annotated[str, msgspec.Meta(max_length=16)]
    """What signed the evidence; `sim` is the stand-in."""
    issued: Annotated[str, msgspec.Meta(max_length=40)]
    """ISO time, by the enclave's clock."""
    checks: Checks

    def signed_bytes(self) -> bytes:
        """Returns the bytes under the signature."""
        return b"cloister/receipt/1\0" + msgspec.json.encode(self)


class SignedStatement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an enclave sends with an answer."""

    statement: Statement
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A statement with everything that it takes to verify it."""

    statement: Statement
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    hello: Annotated[bytes, msgspec.Meta(max_length=MAX_HELLO_BYTES)]
    offer: Annotated[bytes, msgspec.Meta(max_length=MAX_OFFER_BYTES + OVERHEAD_BYTES)]
    format: str = FORMAT

    @staticmethod
    def of(signed: SignedStatement, hello: bytes, offer: Offer) -> "Receipt":
        """Returns the receipt that a client keeps of an answer, with the session that it came in."""
        return Receipt(
            statement=signed.statement, signature=signed.signature, hello=hello, offer=msgspec.msgpack.encode(offer)
        )

    def encode(self) -> bytes:
        """Returns JSON, bytes in base64."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(document: bytes) -> "Receipt":
        """Returns the receipt in a JSON document.

        Raises:
            EvidenceError: it is not one.
            EvidenceUnsupportedError: one of another format version.
        """
        if len(document) > MAX_RECEIPT_BYTES:
            raise EvidenceError(f"A receipt of {len(document)} bytes is longer than {MAX_RECEIPT_BYTES}.")
        try:
            found = msgspec.json.decode(document, type=Receipt)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EvidenceError("This is not a receipt.") from error
        if found.format != FORMAT:
            raise EvidenceUnsupportedError("A receipt of another format.", remedy=f"This version reads {FORMAT}.")
        return found


class ReceiptCheck(StrEnum):
    """What is checked of a receipt; the names are stable."""

    EVIDENCE = "evidence"
    """The session's evidence is good and was made for this session."""
    SIGNATURE = "receipt-signature"
    """The statement is signed by the receipt key of the session."""
    SESSION = "same-session"
    """The statement names the model, plan, measurement and kind of the session."""
    MODEL = "model-root"
    """The model is one of those that are wanted."""
    REQUEST = "request"
    """The request is the one in the statement."""
    RESPONSE = "response"
    """The response is the one in the statement."""


@dataclass(frozen=True)
class ReceiptFactor:
    """One check and how it ended."""

    check: ReceiptCheck
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class ReceiptVerdict:
    """What came of verifying a receipt."""

    result: Result
    factors: tuple[ReceiptFactor, ...]
    evidence: Verdict
    statement: Statement

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed: those of the evidence, and those of the receipt."""
        own = {factor.check.value for factor in self.own_factors if factor.outcome is Outcome.FAIL}
        return tuple(sorted({check.value for check in self.evidence.failed} | own))

    @property
    def own_factors(self) -> tuple[ReceiptFactor, ...]:
        """The checks of the receipt alone: what is in `evidence` is left out."""
        return tuple(factor for factor in self.factors if factor.check is not ReceiptCheck.EVIDENCE)

    def require(self) -> Statement:
        """Returns the statement of an accepted receipt.

        Raises:
            ReceiptError: a check failed.
        """
        if self.result is Result.ACCEPTED:
            return self.statement
        failed = "; ".join(f"{f.check}: {f.reason}" for f in self.factors if f.outcome is Outcome.FAIL)
        raise ReceiptError(f"The receipt is refused: {failed}.", remedy="Believe nothing that it says.")


def verify_receipt(
    receipt: Receipt,
    policy: Policy,
    now: datetime,
    roots: Roots,
    *,
    request: bytes | None = None,
    response: bytes | None = None,
    model_roots: frozenset[bytes] | None = None,
) -> ReceiptVerdict:
    """Returns the verdict on a receipt, at the time `now`: pass the time of the answer to judge the evidence as of then.

    `model_roots`: identities of sealed models, one of which it must be; empty bytes are that of an unsealed folder.

    Raises:
        EvidenceError: hello or offer do not decode.
    """
    try:
        decode(receipt.hello, Hello, MAX_HELLO_BYTES)
        offer = decode(receipt.offer, Offer, MAX_OFFER_BYTES + OVERHEAD_BYTES)
        binding = session_binding(receipt.hello, offer)
    except ChannelError as error:
        raise EvidenceError(f"The receipt's session does not decode: {error.message}") from error
    evidence = verify(offer.evidence, policy.expecting(binding.report_data()), now, roots)
    said = receipt.statement
    kind = evidence.kind.value if evidence.kind is not None else ""
    same = (said.model_root, said.plan, said.measurement, said.kind) == (
        offer.model_root, offer.plan, offer.measurement, kind,
    )  # fmt: skip
    factors = (
        _factor(ReceiptCheck.EVIDENCE, evidence.result is Result.ACCEPTED, f"{kind} evidence: {evidence.result.value}"),
        _factor(ReceiptCheck.SIGNATURE, _signed(receipt, offer), "by the receipt key of the session"),
        _factor(ReceiptCheck.SESSION, same, "model, plan, measurement and kind of the session"),
        model_factor(said.model_root, model_roots),
        _compared(ReceiptCheck.REQUEST, said.request, request),
        _compared(ReceiptCheck.RESPONSE, said.response, response),
    )
    result = evidence.result
    if result is Result.ACCEPTED and any(factor.outcome is Outcome.FAIL for factor in factors):
        result = Result.REFUSED
    return ReceiptVerdict(result, factors, evidence, said)


def _signed(receipt: Receipt, offer: Offer) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(offer.receipt_key).verify(
            receipt.signature, receipt.statement.signed_bytes()
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def _factor(check: ReceiptCheck, holds: bool, reason: str) -> ReceiptFactor:
    return ReceiptFactor(check, Outcome.PASS if holds else Outcome.FAIL, reason if holds else f"not: {reason}")


def model_factor(root: bytes, wanted: frozenset[bytes] | None) -> ReceiptFactor:
    """Returns whether a model's identity is one of those that are wanted; None: any."""
    name = f"the model is {root.hex() or 'an unsealed folder, which the measurement covers'}"
    if wanted is None:
        return ReceiptFactor(ReceiptCheck.MODEL, Outcome.SKIPPED, f"{name}, not compared: none was named")
    if root in wanted:
        return ReceiptFactor(ReceiptCheck.MODEL, Outcome.PASS, name)
    return ReceiptFactor(ReceiptCheck.MODEL, Outcome.FAIL, f"{name}, not one that is wanted")


def _compared(check: ReceiptCheck, expected: bytes, content: bytes | None) -> ReceiptFactor:
    if content is None:
        return ReceiptFactor(check, Outcome.SKIPPED, f"the {check} was not given")
    holds = hmac.compare_digest(hashlib.sha256(content).digest(), expected)
    return _factor(check, holds, f"the {check} whose hash is in the statement")
