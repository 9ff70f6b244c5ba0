"""Writes the conformance vectors of receipts under tests/vectors (receipt-*) from keys of our own, and checks them.

Usage: make_receipt_vectors.py [--check]

As make_vectors.py does for evidence: each case states by hand what must come of it, nothing is written unless our verifier
agrees, and every run gives other bytes, because keys are made anew and thrown away. --check writes nothing and fails when
a case is missing, left over, or expects something else than is stated here.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import msgspec  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

from attest.forge import ENCLAVE, MRENCLAVE, MRSIGNER, NOW, Forge  # noqa: E402
from cloister.attest.dcap_pki import create_authority  # noqa: E402
from cloister.attest.evidence import Attester, Evidence, Kind  # noqa: E402
from cloister.attest.receipt import Checks, Receipt, SignedStatement, Statement  # noqa: E402
from cloister.attest.session import prover  # noqa: E402
from cloister.attest.sim import Installation, SimAttester  # noqa: E402
from cloister.attest.vector import RECEIPT_FORMAT, ReceiptVector  # noqa: E402
from cloister.errors import EvidenceError, EvidenceUnsupportedError  # noqa: E402
from cloister.wire.channel_messages import VERSION, Hello, Offer, Suite  # noqa: E402
from vectors import run  # noqa: E402

MEASURED, MODEL, PLAN = bytes([8]) * 32, bytes([9]) * 32, bytes([10]) * 32
REQUEST, PIECES = b"the request as it was sealed", (b"the first piece, ", b"the second, ", b"the end")
RESPONSE = b"".join(PIECES)


@dataclass(frozen=True)
class SgxAttester:
    """Signs what it is given as an SGX enclave would."""

    forge: Forge
    flags: int = ENCLAVE.flags

    @property
    def kind(self) -> Kind:
        """`sgx`."""
        return Kind.SGX

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns a quote with good collateral."""
        return self.forge.evidence(replace(ENCLAVE, report_data=report_data, flags=self.flags))


@dataclass(frozen=True)
class Session:
    """A session of a client with an enclave whose receipt key we hold."""

    hello: bytes
    offer: Offer
    key: Ed25519PrivateKey

    @staticmethod
    def open(attester: Attester, nonce: int = 1, measurement: bytes = MEASURED) -> "Session":
        """Returns a session under fresh keys."""
        key = Ed25519PrivateKey.generate()
        hello = msgspec.msgpack.encode(Hello(VERSION, bytes([nonce]) * 32, (Suite.X25519,)))
        offer = Offer(
            VERSION, Suite.X25519, bytes([11]) * 32, key.public_key().public_bytes_raw(), bytes([12]) * 32,
            MODEL, PLAN, measurement, evidence=b"",
        )  # fmt: skip
        return Session(hello, msgspec.structs.replace(offer, evidence=prover(attester)(hello, offer)), key)

    def receipt(self, kind: str = "sim", **changes: Any) -> Receipt:
        """Returns the receipt of the answer, its statement changed before it was signed."""
        statement = Statement(
            request=hashlib.sha256(REQUEST).digest(), response=hashlib.sha256(RESPONSE).digest(),
            model_root=self.offer.model_root, plan=self.offer.plan, measurement=self.offer.measurement, kind=kind,
            issued=NOW.isoformat(), checks=Checks(products=272, enclave_products=3, refused=1, checks_per_product=2),
        )  # fmt: skip
        statement = msgspec.structs.replace(statement, **changes)
        signed = SignedStatement(statement=statement, signature=self.key.sign(statement.signed_bytes()))
        return Receipt.of(signed, self.hello, self.offer)


@dataclass(frozen=True)
class Case:
    """One vector, with what must come of it."""

    name: str
    description: str
    receipt: Receipt | bytes
    policy: Mapping[str, Any]
    result: str = "accepted"
    failed: tuple[str, ...] = ()
    time: datetime = NOW
    request: bytes | None = REQUEST
    response: bytes | None = RESPONSE
    model_roots: tuple[bytes, ...] | None = None

    def document(self) -> bytes:
        """Returns input.json."""
        receipt = self.receipt.encode() if isinstance(self.receipt, Receipt) else self.receipt
        return json.dumps(
            {
                "format": RECEIPT_FORMAT,
                "description": self.description,
                "time": self.time.isoformat(),
                "policy": self.policy,
                "model_roots": None if self.model_roots is None else [root.hex() for root in self.model_roots],
                "request": None if self.request is None else base64.b64encode(self.request).decode(),
                "response": None if self.response is None else base64.b64encode(self.response).decode(),
                "receipt": receipt.decode(),
            },
            indent=1,
        ).encode()


def cases() -> list[Case]:
    """Returns every case."""
    stand_in = Installation(create_authority(NOW, "Test stand-in"))
    attester = SimAttester(stand_in, MEASURED, clock=lambda: NOW)
    session, another = Session.open(attester), Session.open(attester, nonce=2)
    roots = {"sim": [stand_in.fingerprint.hex()]}
    tables = {"sim": {"measurement": [MEASURED.hex()], "min_version": 1}}
    policy: dict[str, Any] = {"roots": roots, **tables}
    good = session.receipt()

    def refused(name: str, description: str, receipt: Receipt | bytes, *failed: str, **more: Any) -> Case:
        return Case(f"receipt-{name}", description, receipt, more.pop("policy", policy), "refused", failed, **more)

    def malformed(name: str, description: str, receipt: Receipt | bytes, *failed: str) -> Case:
        return Case(f"receipt-{name}", description, receipt, policy, "malformed", ("format", *failed))

    def changed(**fields: Any) -> Receipt:
        return msgspec.structs.replace(good, **fields)

    def said(**fields: Any) -> Receipt:
        return changed(statement=msgspec.structs.replace(good.statement, **fields))

    def offered(**fields: Any) -> Receipt:
        return changed(offer=msgspec.msgpack.encode(msgspec.structs.replace(session.offer, **fields)))

    def edited(**fields: Any) -> bytes:
        return json.dumps(plain | fields).encode()

    def edited_statement(**fields: Any) -> bytes:
        return edited(statement=plain["statement"] | fields)

    plain: dict[str, Any] = json.loads(good.encode())
    thief = Session(session.hello, msgspec.structs.replace(
        session.offer, receipt_key=another.key.public_key().public_bytes_raw()
    ), another.key)  # fmt: skip
    list_of_offer = msgspec.msgpack.decode(good.offer)
    return [
        Case("receipt-accepted", "the receipt alone", good, policy, request=None, response=None),
        Case("receipt-accepted-whole", "with request, response and model", good, policy, model_roots=(MODEL, PLAN)),
        refused(
            "signature",
            "one bit of the signature is flipped",
            changed(signature=bytes([good.signature[0] ^ 1]) + good.signature[1:]),
            "receipt-signature",
        ),
        refused(
            "checks-changed",
            "the statement claims more checks than were signed",
            said(checks=Checks(products=272, enclave_products=3, refused=0, checks_per_product=3)),
            "receipt-signature",
        ),
        refused(
            "time-changed",
            "the statement claims another time than was signed",
            said(issued="2026-06-02T12:00:00+00:00"),
            "receipt-signature",
        ),
        refused(
            "other-key",
            "signed by the key of another session",
            changed(signature=another.receipt().signature),
            "receipt-signature",
        ),
        refused(
            "other-session",
            "the session is another one of the same enclave",
            changed(hello=another.hello, offer=another.receipt().offer),
            "receipt-signature",
        ),
        refused(
            "key-exchanged",
            "the receipt key of the offer was exchanged and signs well: the evidence was made for another",
            thief.receipt(),
            "report-data",
        ),
        refused(
            "other-nonce",
            "the hello has another nonce than the evidence was made for",
            changed(hello=another.hello),
            "report-data",
        ),
        refused(
            "evidence-replayed",
            "good evidence of another session",
            offered(evidence=another.offer.evidence),
            "report-data",
        ),
        refused(
            "suite-changed",
            "the offer names another suite than the evidence was made for",
            offered(suite=Suite.X_WING),
            "report-data",
        ),
        refused(
            "offer-model-changed",
            "the offer names another model than the evidence was made for",
            offered(model_root=PLAN),
            "report-data",
            "same-session",
        ),
        refused(
            "model-of-session",
            "the enclave signs for another model than that of its session",
            session.receipt(model_root=PLAN),
            "same-session",
        ),
        refused(
            "plan-of-session",
            "the enclave signs for another plan than that of its session",
            session.receipt(plan=MODEL),
            "same-session",
        ),
        refused(
            "measurement-of-session",
            "the enclave signs for another measurement than that of its session",
            session.receipt(measurement=PLAN),
            "same-session",
        ),
        refused(
            "kind-of-session",
            "the enclave signs as hardware and shows a stand-in",
            session.receipt(kind="sgx"),
            "same-session",
        ),
        refused("other-request", "about another request", good, "request", request=REQUEST + b"."),
        refused("other-response", "about another response", good, "response", response=RESPONSE + b"."),
        refused(
            "response-cut",
            "the last piece of the response is missing",
            good,
            "response",
            response=b"".join(PIECES[:-1]),
        ),
        refused(
            "response-reordered",
            "two pieces of the response are exchanged",
            good,
            "response",
            response=b"".join(reversed(PIECES)),
        ),
        refused(
            "request-and-response",
            "request and response are exchanged",
            good,
            "request",
            "response",
            request=RESPONSE,
            response=REQUEST,
        ),
        refused("other-model", "the model is not one that is wanted", good, "model-root", model_roots=(PLAN,)),
        refused("plain-model-wanted", "an unsealed model was wanted", good, "model-root", model_roots=(b"",)),
        refused(
            "other-measurement",
            "the enclave is another than the policy names",
            Session.open(SimAttester(stand_in, PLAN, clock=lambda: NOW), measurement=PLAN).receipt(),
            "measurement",
        ),
        refused(
            "stale",
            "judged when the vendor's statements in the evidence have expired",
            good,
            "collateral-time",
            "signature",
            time=NOW + timedelta(days=60),
        ),
        refused(
            "early",
            "judged before the vendor's statements in the evidence are valid",
            good,
            "collateral-time",
            "signature",
            time=NOW - timedelta(hours=2),
        ),
        refused(
            "stand-in-under-vendors",
            "a stand-in, and only the vendors' roots are believed",
            good,
            "root",
            policy=tables,
        ),
        refused(
            "stand-in-not-accepted",
            "a stand-in, where the policy asks for SGX",
            good,
            "kind",
            policy=sgx_policy(Forge.new()),
        ),
        *sgx_cases(),
        malformed("truncated", "the document is cut", good.encode()[:-40]),
        malformed("trailing", "something follows the document", good.encode() + b"{}"),
        malformed("unknown-field", "a field that no receipt has", edited(verified=True)),
        malformed("unknown-statement-field", "a field that no statement has", edited_statement(hardware=True)),
        malformed(
            "missing-field",
            "the signature is missing",
            json.dumps({name: value for name, value in plain.items() if name != "signature"}).encode(),
        ),
        malformed("short-hash", "a hash of 31 bytes", edited_statement(request=base64.b64encode(bytes(31)).decode())),
        malformed(
            "negative-count",
            "a negative count",
            edited_statement(checks=plain["statement"]["checks"] | {"refused": -1}),
        ),
        malformed("offer-cut", "the offer is cut", changed(offer=good.offer[:-1])),
        malformed(
            "offer-longer", "the offer has a field more", changed(offer=msgspec.msgpack.encode([*list_of_offer, 1]))
        ),
        malformed(
            "hello-short-nonce",
            "the hello has a nonce of 16 bytes",
            changed(hello=msgspec.msgpack.encode([VERSION, bytes(16), ["x25519"]])),
        ),
        malformed("evidence-empty", "there is no evidence in the offer", offered(evidence=b""), "same-session"),
        malformed("not-json", "no JSON", b"receipt"),
        Case(
            "receipt-unknown-version",
            "a receipt of a later format",
            edited(format="cloister-receipt/2"),
            policy,
            "unsupported",
            ("format",),
        ),
        Case(
            "receipt-unknown-kind",
            "evidence of a kind that nobody knows",
            offered(evidence=session.offer.evidence.replace(b'"sim"', b'"abc"')),
            policy,
            "unsupported",
            ("format", "same-session"),
        ),
    ]


def sgx_policy(forge: Forge) -> dict[str, Any]:
    """Returns the policy that accepts the enclave of a forge."""
    expected = {"mrenclave": [MRENCLAVE.hex()], "mrsigner": [MRSIGNER.hex()], "product": 7, "min_version": 3}
    return {"roots": {"dcap": [forge.authority.fingerprint.hex()]}, "sgx": expected}


def sgx_cases() -> list[Case]:
    """Returns the cases whose evidence has the format of hardware."""
    forge = Forge.new()
    session = Session.open(SgxAttester(forge))
    debug = Session.open(SgxAttester(forge, ENCLAVE.flags | 2))
    policy = sgx_policy(forge)
    return [
        Case("receipt-sgx-accepted", "an SGX enclave", session.receipt("sgx"), policy, model_roots=(MODEL,)),
        Case("receipt-sgx-debug", "a debug enclave", debug.receipt("sgx"), policy, "refused", ("debug", "signature")),
        Case(
            "receipt-sgx-as-stand-in",
            "an SGX enclave that signs as a stand-in",
            session.receipt("sim"),
            policy,
            "refused",
            ("same-session",),
        ),
    ]


def judged(document: bytes) -> tuple[str, list[str], str | None]:
    """Returns result, failed checks and measurement, as our verifier finds them."""
    try:
        verdict = ReceiptVector.decode(document).verdict()
    except EvidenceError:
        return "malformed", ["format"], None
    except EvidenceUnsupportedError:
        return "unsupported", ["format"], None
    claims = verdict.evidence.claims
    return verdict.result.value, list(verdict.failed), claims.measurement.hex() if claims else None


if __name__ == "__main__":
    run(__doc__, receipts=True, cases=cases, judged=judged)
