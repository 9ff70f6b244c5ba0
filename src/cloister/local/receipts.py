"""Receipts of an enclave of this machine, from the side of the program that started it.

Covers: the hello, the check of the offer, asking for the statement of an answer, verifying the receipt that it makes.
Guarantees: a receipt that is returned names the bytes of its answer and verifies under this installation's stand-in.
Does not cover: any hardware. An enclave that this program started proves no more than that it knows the installation's key;
its measurement is taken when the first receipt is asked for (or when the model is opened, if they were ordered then).
"""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from cloister.attest.evidence import Skip
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.receipt import Receipt, SignedStatement, verify_receipt
from cloister.attest.roots import Roots
from cloister.attest.session import checker
from cloister.attest.sim import Installation
from cloister.errors import ChannelError
from cloister.local.broker_link import stand_in_file
from cloister.local.reply import Record
from cloister.wire.channel import ClientChannel
from cloister.wire.channel_messages import Offer, Suite
from cloister.wire.session import AskOffer, AskReceipt, Offered, Signed

OWN = "the enclave was started by this program"
"""Why no model has to be named."""


class LocalReceipts:
    """The receipts of one session with an enclave of this machine."""

    def __init__(self, ask_offer: Callable[[AskOffer], Offered], ask_receipt: Callable[[AskReceipt], Signed]) -> None:
        """The two callables send a question to the enclave and return its answer."""
        self._ask_offer = ask_offer
        self._ask_receipt = ask_receipt
        self._session: tuple[bytes, Offer] | None = None

    def open(self) -> tuple[bytes, Offer]:
        """Returns hello and offer of this session; the first call has the enclave measure itself, which takes a second or more.

        Raises:
            AdapterError, AttesterError: the enclave cannot be measured, or has no keys.
            EvidenceRefusedError: the offer is not that of this installation.
        """
        if self._session is None:
            channel = ClientChannel((Suite.X25519,))
            hello = channel.hello()
            offer = channel.accept(self._ask_offer(AskOffer(hello)).offer, _check)
            channel.close()
            self._session = hello, offer
        return self._session

    def receipt(self, record: Record) -> Receipt:
        """Returns the receipt of an answer, verified.

        Raises:
            ReceiptError: the enclave gave no such answer, or signs something else. What `open` raises is raised too.
        """
        hello, offer = self.open()
        request, response = (hashlib.sha256(content).digest() for content in (record.request, record.response))
        statement = self._ask_receipt(AskReceipt(request, response)).statement
        try:
            signed = msgspec.msgpack.decode(statement, type=SignedStatement)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ChannelError("The receipt does not decode.") from error
        receipt = Receipt.of(signed, hello, offer)
        policy, roots = _own(offer)
        now = datetime.now(UTC)
        verify_receipt(receipt, policy, now, roots, request=record.request, response=record.response).require()
        return receipt


def own_root() -> bytes:
    """Returns the fingerprint of this installation's stand-in, which a verifier of its receipts is told to believe."""
    return Installation.open(stand_in_file(), datetime.now(UTC)).fingerprint


def _own(offer: Offer) -> tuple[Policy, Roots]:
    accepted = SimPolicy(measurement=frozenset({offer.measurement}), min_version=1)
    return Policy(accept=(accepted,), report_data=Skip("set for each session")), Roots(sim=frozenset({own_root()}))


def _check(hello: bytes, offer: Offer) -> None:
    policy, roots = _own(offer)
    checker(policy, roots, model_roots=OWN)(hello, offer)
