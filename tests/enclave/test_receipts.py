"""Receipts: what an honest enclave signs is accepted; everything that is changed, mixed or borrowed is refused."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attest.evidence import Outcome, Result, Skip
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.receipt import Checks, Receipt, ReceiptCheck, verify_receipt
from cloister.attest.roots import Roots
from cloister.attest.session import prover
from cloister.attest.sim import Installation, SimAttester
from cloister.enclave.receipts import ReceiptSigner
from cloister.errors import EvidenceError, EvidenceUnsupportedError, IsolationError, ReceiptError
from cloister.wire.channel import ClientChannel, ServerChannel
from cloister.wire.channel_messages import Offer

NOW = datetime.now(UTC)
INSTALLATION = Installation.create(NOW)
MEASUREMENT, ROOT, PLAN = b"m" * 32, b"r" * 32, b"p" * 32
ROOTS = Roots(sim=frozenset({INSTALLATION.fingerprint}))
POLICY = Policy(
    accept=(SimPolicy(measurement=frozenset({MEASUREMENT}), min_version=1),), report_data=Skip("set for each session")
)
REQUEST, PIECES = b'{"prompt":"secret"}', [b"the ", b"answer"]
CHECKS = Checks(products=136, enclave_products=0, refused=1, checks_per_product=1)


def answered(signer: ReceiptSigner, measurement: bytes = MEASUREMENT) -> Receipt:
    """One request over a sealed channel, with its receipt as the client keeps it."""
    client = ClientChannel()
    server = ServerChannel(signer.public, model_root=ROOT, plan=PLAN, measurement=measurement)
    hello = client.hello()
    message = server.answer(hello, prover(SimAttester(INSTALLATION, measurement)))
    offer = client.accept(message, lambda hello, offer: None)
    request, sealer = server.open(client.seal(REQUEST)[0])
    assert server.offer is not None
    receipt = signer.begin(server.offer, request)
    for piece in PIECES:
        receipt.add(piece)
        sealer.seal(piece)
    return Receipt.of(receipt.sign(CHECKS), hello, offer)


@pytest.fixture(scope="module")
def receipt() -> Receipt:
    return Receipt.decode(answered(ReceiptSigner("sim")).encode())


def test_an_honest_receipt_is_accepted_offline(receipt: Receipt) -> None:
    wanted = frozenset({ROOT, b"another"})
    verdict = verify_receipt(
        receipt, POLICY, NOW, ROOTS, request=REQUEST, response=b"".join(PIECES), model_roots=wanted
    )
    assert verdict.require().checks == CHECKS
    assert verdict.result is Result.ACCEPTED
    assert all(factor.outcome is Outcome.PASS for factor in verdict.factors)


def test_what_is_not_given_is_skipped_by_name(receipt: Receipt) -> None:
    verdict = verify_receipt(receipt, POLICY, NOW, ROOTS)
    skipped = {factor.check for factor in verdict.factors if factor.outcome is Outcome.SKIPPED}
    assert skipped == {ReceiptCheck.REQUEST, ReceiptCheck.RESPONSE, ReceiptCheck.MODEL}
    assert verdict.result is Result.ACCEPTED


def said(**changes: object) -> Callable[[Receipt], Receipt]:
    return lambda r: msgspec.structs.replace(r, statement=msgspec.structs.replace(r.statement, **changes))


def offered(**changes: object) -> Callable[[Receipt], Receipt]:
    def change(receipt: Receipt) -> Receipt:
        offer = msgspec.msgpack.decode(receipt.offer, type=Offer)
        return msgspec.structs.replace(receipt, offer=msgspec.msgpack.encode(msgspec.structs.replace(offer, **changes)))

    return change


def of_another_session(receipt: Receipt) -> Receipt:
    other = answered(ReceiptSigner("sim"))
    return msgspec.structs.replace(receipt, hello=other.hello, offer=other.offer)


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (said(request=b"x" * 32), ReceiptCheck.SIGNATURE),
        (said(response=b"x" * 32), ReceiptCheck.SIGNATURE),
        (said(model_root=b"x" * 32), ReceiptCheck.SIGNATURE),
        (said(kind="sgx"), ReceiptCheck.SESSION),
        (said(checks=Checks(products=1, enclave_products=0, refused=0, checks_per_product=2)), ReceiptCheck.SIGNATURE),
        (said(issued="2020-01-01T00:00:00+00:00"), ReceiptCheck.SIGNATURE),
        (offered(receipt_key=ReceiptSigner("sim").public), ReceiptCheck.EVIDENCE),
        (offered(model_root=b"x" * 32), ReceiptCheck.EVIDENCE),
        (offered(evidence=b""), ReceiptCheck.EVIDENCE),
        (of_another_session, ReceiptCheck.SIGNATURE),
        (lambda r: msgspec.structs.replace(r, signature=bytes(64)), ReceiptCheck.SIGNATURE),
        (lambda r: msgspec.structs.replace(r, hello=ClientChannel().hello()), ReceiptCheck.EVIDENCE),
    ],
)
def test_a_changed_receipt_is_refused(
    receipt: Receipt, change: Callable[[Receipt], Receipt], failed: ReceiptCheck
) -> None:
    verdict = verify_receipt(change(receipt), POLICY, NOW, ROOTS)
    assert verdict.result is not Result.ACCEPTED
    assert failed in {factor.check for factor in verdict.factors if factor.outcome is Outcome.FAIL}
    with pytest.raises(ReceiptError, match=failed.value):
        verdict.require()


def test_another_request_or_response_is_refused(receipt: Receipt) -> None:
    for content in ({"request": REQUEST + b" "}, {"response": b"the answer."}, {"response": b""}):
        assert verify_receipt(receipt, POLICY, NOW, ROOTS, **content).result is Result.REFUSED


def test_a_receipt_of_another_model_is_refused(receipt: Receipt) -> None:
    for wanted in (frozenset({b""}), frozenset({b"x" * 32}), frozenset()):
        verdict = verify_receipt(receipt, POLICY, NOW, ROOTS, model_roots=wanted)
        assert verdict.result is Result.REFUSED
        assert [f.check for f in verdict.factors if f.outcome is Outcome.FAIL] == [ReceiptCheck.MODEL]


def test_a_stranger_an_unknown_measurement_and_old_collateral_are_refused(receipt: Receipt) -> None:
    assert verify_receipt(receipt, POLICY, NOW, Roots.production()).result is Result.REFUSED
    assert verify_receipt(receipt, POLICY, NOW + timedelta(days=400), ROOTS).result is Result.REFUSED
    other = answered(ReceiptSigner("sim"), measurement=b"x" * 32)
    assert verify_receipt(other, POLICY, NOW, ROOTS).result is Result.REFUSED


def test_a_signer_signs_for_its_own_sessions_until_it_is_closed(receipt: Receipt) -> None:
    offer = msgspec.msgpack.decode(receipt.offer, type=Offer)
    with pytest.raises(ReceiptError, match="another receipt key"):
        ReceiptSigner("sim").begin(offer, REQUEST)
    signer = ReceiptSigner("sim")
    signer.close()
    with pytest.raises(IsolationError):
        answered(signer)


@settings(max_examples=50)
@given(st.binary(max_size=300))
def test_any_bytes_are_an_error_and_nothing_worse(content: bytes) -> None:
    with pytest.raises((EvidenceError, EvidenceUnsupportedError)):
        Receipt.decode(content)


def test_another_format_is_unsupported_and_a_broken_session_malformed(receipt: Receipt) -> None:
    with pytest.raises(EvidenceUnsupportedError):
        Receipt.decode(receipt.encode().replace(b"cloister-receipt/1", b"cloister-receipt/9"))
    with pytest.raises(EvidenceError):
        verify_receipt(msgspec.structs.replace(receipt, offer=b"x"), POLICY, NOW, ROOTS)
