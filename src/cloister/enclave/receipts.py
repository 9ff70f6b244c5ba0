"""The enclave's side of receipts: one signing key per start of the enclave, one statement per answer.

Covers: hashing request and answer as they pass, signing at the end.
Guarantees: the key never leaves the process, lies in memory that is not swapped or dumped while it is not used, and dies with
the enclave. A statement covers exactly the pieces that were given to it.
Does not cover: the copy that the signing library makes while it signs (wiped by it afterwards).
"""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.attest.receipt import Checks, SignedStatement, Statement
from cloister.errors import ReceiptError
from cloister.isolation.secret_memory import Secret
from cloister.wire.channel_messages import Offer


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

    def sign(self, offer: Offer, request: bytes, response: bytes, checks: Checks) -> SignedStatement:
        """Returns the signed statement over two hashes."""
        statement = Statement(
            request=request, response=response, model_root=offer.model_root, plan=offer.plan,
            measurement=offer.measurement, kind=self._kind, issued=self._clock().isoformat(timespec="seconds"), checks=checks,
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
