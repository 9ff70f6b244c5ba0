"""The enclave's side of receipts: one signing key per start of the enclave, one statement per answer.

Covers: hashing request and answer as they pass, signing at the end, or (in a session with the launcher) when asked to.
Guarantees: the key never leaves the process, lies in memory that is not swapped or dumped while it is not used, and dies with
the enclave. A statement covers exactly the pieces that were given to it.
Does not cover: the copy that the signing library makes while it signs (wiped by it afterwards).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.attest.evidence import Attester
from cloister.attest.receipt import Checks, SignedStatement, Statement
from cloister.attest.session import prover
from cloister.errors import ReceiptError
from cloister.isolation.secret_memory import Secret
from cloister.wire.channel import ServerChannel
from cloister.wire.channel_messages import Offer
from cloister.wire.session import Meter

REMEMBERED: Final = 1024
"""How many answers of a session can still be signed."""

_TOTALS: Final = (
    "products", "enclave_products", "rows", "bytes_sent", "bytes_received", "pads_made_late", "blind_seconds", "lent_seconds",
    "recover_seconds", "enclave_seconds", "cpu_seconds",
)  # fmt: skip


class CheckCounter:
    """Counts, for one enclave, what was done to be sure of an answer."""

    def __init__(self, meter: Callable[[], Meter], checks: int, refused: Callable[[], int]) -> None:
        """`meter` returns running totals; `checks` of each product are made; `refused` returns how many answers failed so far."""
        self.meter = meter
        self._checks = checks
        self._refused = refused

    def start(self) -> Callable[[], Checks]:
        """Returns what counts the checks from now on."""
        before, refused = self.meter(), self._refused()

        def checks() -> Checks:
            made = since(before, self.meter())
            return Checks(
                products=made.products,
                enclave_products=made.enclave_products,
                refused=self._refused() - refused,
                checks_per_product=self._checks,
            )

        return checks

    def nothing(self) -> Checks:
        """Returns the checks of an answer that needed no product."""
        return Checks(products=0, enclave_products=0, refused=0, checks_per_product=self._checks)


def since(before: Meter, after: Meter) -> Meter:
    """Returns totals without those of before."""
    return msgspec.structs.replace(after, **{name: getattr(after, name) - getattr(before, name) for name in _TOTALS})


class ReceiptSigner:
    """The receipt key of an enclave."""

    def __init__(self, kind: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Makes a key; `kind` is that of the enclave's evidence."""
        self._secret = Secret.random(32)
        self._kind = kind
        self._clock = clock
        with self._secret.bytes() as seed:
            self.public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()

    def begin(self, offer: Offer, request: bytes) -> "AnswerReceipt":
        """Returns the receipt of one answer, to be filled as the answer is sent.

        Raises:
            ReceiptError: the offer was made with another receipt key.
        """
        if offer.receipt_key != self.public:
            raise ReceiptError("The session was opened with another receipt key.")
        return AnswerReceipt(self, offer, request)

    def sign(
        self, offer: Offer, request: bytes, response: bytes, checks: Checks, issued: datetime | None = None
    ) -> SignedStatement:
        """Returns the signed statement over two hashes, of an answer that was given at `issued` (default: now)."""
        given = (issued or self._clock()).isoformat(timespec="seconds")
        statement = Statement(
            request=request, response=response, model_root=offer.model_root, plan=offer.plan,
            measurement=offer.measurement, kind=self._kind, issued=given, checks=checks,
        )  # fmt: skip
        with self._secret.bytes() as seed:
            signature = Ed25519PrivateKey.from_private_bytes(seed).sign(statement.signed_bytes())
        return SignedStatement(statement=statement, signature=signature)

    def close(self) -> None:
        """Wipes the key."""
        self._secret.close()


class AnswerReceipt:
    """Hashes one answer as it passes."""

    def __init__(self, signer: ReceiptSigner, offer: Offer, request: bytes) -> None:
        self._signer = signer
        self._offer = offer
        self._request = hashlib.sha256(request).digest()
        self._response = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """Takes the next piece of the answer, as it is sealed."""
        self._response.update(piece)

    def sign(self, checks: Checks) -> SignedStatement:
        """Returns the signed statement over everything added so far."""
        return self._signer.sign(self._offer, self._request, self._response.digest(), checks)


class SessionReceipts:
    """Receipts of a session with the launcher of this machine, which need evidence of this enclave only once one is wanted.

    Guarantees: signs for answers that were noted, and for no others. The program is measured when `offer` is called first:
    an answer that was given before it is attested by what is on the disk then.
    """

    def __init__(
        self, measured: Callable[[], bytes], attester: Callable[[bytes], Attester], counter: CheckCounter,
        *, model_root: bytes, plan: bytes,
    ) -> None:  # fmt: skip
        """`measured` returns the measurement of this program, and may take seconds; given it, `attester` what proves it."""
        self._measured = measured
        self._attester = attester
        self._model_root = model_root
        self._plan = plan
        self._opened: tuple[Attester, bytes, ReceiptSigner] | None = None
        self._offer: Offer | None = None
        self._given: OrderedDict[tuple[bytes, bytes], tuple[Checks, datetime]] = OrderedDict()
        self.counter = counter

    def offer(self, hello: bytes) -> bytes:
        """Returns the offer that answers a hello: evidence for its nonce, the receipt key and what runs here.

        Raises:
            ChannelError: the hello is none. AttesterError, AdapterError: what runs here cannot be measured.
        """
        if self._opened is None:
            digest = self._measured()
            attester = self._attester(digest)
            self._opened = attester, digest, ReceiptSigner(attester.kind.value)
        attester, digest, signer = self._opened
        channel = ServerChannel(signer.public, model_root=self._model_root, plan=self._plan, measurement=digest)
        message = channel.answer(hello, prover(attester))
        self._offer = channel.offer
        channel.close()  # nothing is sealed on this machine: the keys of the offer have no use
        return message

    def note(self, request: bytes, response: bytes, checks: Checks) -> None:
        """Remembers an answer, by the SHA-256 of request and response."""
        self._given[request, response] = checks, datetime.now(UTC)
        self._given.move_to_end((request, response))
        if len(self._given) > REMEMBERED:
            self._given.popitem(last=False)

    def sign(self, request: bytes, response: bytes) -> SignedStatement:
        """Returns the signed statement about an answer that was noted.

        Raises:
            ReceiptError: no such answer was given, it is too long ago, or no hello was answered yet.
        """
        found = self._given.get((request, response))
        if found is None or self._opened is None or self._offer is None:
            raise ReceiptError(
                "The enclave knows no such answer.",
                remedy=f"Ask for the receipts of the last {REMEMBERED} answers only, with the bytes that crossed.",
            )
        return self._opened[2].sign(self._offer, request, response, *found)
