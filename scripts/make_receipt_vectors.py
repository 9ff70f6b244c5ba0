"""Writes the conformance vectors of receipts under tests/vectors (receipt-*) from keys of our own, and checks them.

Usage: make_receipt_vectors.py [--check]

As make_vectors.py does for evidence: each case states by hand what must come of it, nothing is written unless our verifier
agrees, and every run gives other bytes, because keys are made anew and thrown away. --check writes nothing and fails when
a case is missing, left over, or expects something else than is stated here.
"""

import base64
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import msgspec  # noqa: E402

from attest.forge import ENCLAVE, MRENCLAVE, MRSIGNER, NOW, Forge  # noqa: E402
from cloister.attest.receipt import Checks  # noqa: E402
from cloister.attest.sim import SimAttester  # noqa: E402
from cloister.attest.vector import ReceiptVector  # noqa: E402
from cloister.errors import EvidenceError, EvidenceUnsupportedError  # noqa: E402
from cloister.wire.channel_messages import VERSION, Suite  # noqa: E402
from receipts import (  # noqa: E402
    MODEL,
    PIECES,
    PLAN,
    REQUEST,
    RESPONSE,
    STAND_IN,
    Case,
    Scene,
    Session,
    SgxAttester,
)
from vectors import run  # noqa: E402


def cases() -> list[Case]:
    """Returns every case."""
    scene = Scene.open()
    parts = (accepted, forged, of_other_sessions, of_other_statements, of_other_answers, under_policies)
    return [case for part in (*parts, of_hardware, damaged, unknown) for case in part(scene)]


def accepted(scene: Scene) -> Iterator[Case]:
    """Yields good receipts."""
    yield Case("receipt-accepted", "the receipt alone", scene.good, scene.policy, request=None, response=None)
    yield Case(
        "receipt-accepted-whole",
        "with request, response and model",
        scene.good,
        scene.policy,
        model_roots=(MODEL, PLAN),
    )


def forged(scene: Scene) -> Iterator[Case]:
    """Yields receipts that nobody signed as they are."""
    yield scene.refused(
        "signature",
        "one bit of the signature is flipped",
        scene.changed(signature=bytes([scene.good.signature[0] ^ 1]) + scene.good.signature[1:]),
        "receipt-signature",
    )
    yield scene.refused(
        "checks-changed",
        "the statement claims more checks than were signed",
        scene.said(checks=Checks(products=272, enclave_products=3, refused=0, checks_per_product=3)),
        "receipt-signature",
    )
    yield scene.refused(
        "time-changed",
        "the statement claims another time than was signed",
        scene.said(issued="2026-06-02T12:00:00+00:00"),
        "receipt-signature",
    )
    yield scene.refused(
        "other-key",
        "signed by the key of another session",
        scene.changed(signature=scene.another.receipt().signature),
        "receipt-signature",
    )
    yield scene.refused(
        "other-session",
        "the session is another one of the same enclave",
        scene.changed(hello=scene.another.hello, offer=scene.another.receipt().offer),
        "receipt-signature",
    )


def of_other_sessions(scene: Scene) -> Iterator[Case]:
    """Yields receipts whose evidence was made for another exchange."""
    thief = Session(
        scene.session.hello,
        msgspec.structs.replace(scene.session.offer, receipt_key=scene.another.key.public_key().public_bytes_raw()),
        scene.another.key,
    )
    yield scene.refused(
        "key-exchanged",
        "the receipt key of the offer was exchanged and signs well: the evidence was made for another",
        thief.receipt(),
        "report-data",
    )
    yield scene.refused(
        "other-nonce",
        "the hello has another nonce than the evidence was made for",
        scene.changed(hello=scene.another.hello),
        "report-data",
    )
    yield scene.refused(
        "evidence-replayed",
        "good evidence of another session",
        scene.offered(evidence=scene.another.offer.evidence),
        "report-data",
    )
    yield scene.refused(
        "suite-changed",
        "the offer names another suite than the evidence was made for",
        scene.offered(suite=Suite.X_WING),
        "report-data",
    )
    yield scene.refused(
        "offer-model-changed",
        "the offer names another model than the evidence was made for",
        scene.offered(model_root=PLAN),
        "report-data",
        "same-session",
    )


def of_other_statements(scene: Scene) -> Iterator[Case]:
    """Yields receipts that an enclave signed, and that contradict its session."""
    yield scene.refused(
        "model-of-session",
        "the enclave signs for another model than that of its session",
        scene.session.receipt(model_root=PLAN),
        "same-session",
    )
    yield scene.refused(
        "plan-of-session",
        "the enclave signs for another plan than that of its session",
        scene.session.receipt(plan=MODEL),
        "same-session",
    )
    yield scene.refused(
        "measurement-of-session",
        "the enclave signs for another measurement than that of its session",
        scene.session.receipt(measurement=PLAN),
        "same-session",
    )
    yield scene.refused(
        "kind-of-session",
        "the enclave signs as hardware and shows a stand-in",
        scene.session.receipt(kind="sgx"),
        "same-session",
    )


def of_other_answers(scene: Scene) -> Iterator[Case]:
    """Yields good receipts of another request, response or model than is asked about."""
    yield scene.refused("other-request", "about another request", scene.good, "request", request=REQUEST + b".")
    yield scene.refused("other-response", "about another response", scene.good, "response", response=RESPONSE + b".")
    yield scene.refused(
        "response-cut",
        "the last piece of the response is missing",
        scene.good,
        "response",
        response=b"".join(PIECES[:-1]),
    )
    yield scene.refused(
        "response-reordered",
        "two pieces of the response are exchanged",
        scene.good,
        "response",
        response=b"".join(reversed(PIECES)),
    )
    yield scene.refused(
        "request-and-response",
        "request and response are exchanged",
        scene.good,
        "request",
        "response",
        request=RESPONSE,
        response=REQUEST,
    )
    yield scene.refused(
        "other-model", "the model is not one that is wanted", scene.good, "model-root", model_roots=(PLAN,)
    )
    yield scene.refused(
        "plain-model-wanted", "an unsealed model was wanted", scene.good, "model-root", model_roots=(b"",)
    )


def under_policies(scene: Scene) -> Iterator[Case]:
    """Yields good receipts that a policy or the time refuses."""
    yield scene.refused(
        "other-measurement",
        "the enclave is another than the policy names",
        Session.open(SimAttester(scene.stand_in, PLAN, clock=lambda: NOW), measurement=PLAN).receipt(),
        "measurement",
    )
    yield scene.refused(
        "stale",
        "judged when the vendor's statements in the evidence have expired",
        scene.good,
        "collateral-time",
        "signature",
        time=NOW + timedelta(days=60),
    )
    yield scene.refused(
        "early",
        "judged before the vendor's statements in the evidence are valid",
        scene.good,
        "collateral-time",
        "signature",
        time=NOW - timedelta(hours=2),
    )
    yield scene.refused(
        "stand-in-under-vendors",
        "a stand-in, and only the vendors' roots are believed",
        scene.good,
        "root",
        policy=STAND_IN,
    )
    yield scene.refused(
        "stand-in-not-accepted",
        "a stand-in, where the policy asks for SGX",
        scene.good,
        "kind",
        policy=sgx_policy(Forge.new()),
    )


def damaged(scene: Scene) -> Iterator[Case]:
    """Yields what cannot be read."""
    list_of_offer = msgspec.msgpack.decode(scene.good.offer)
    yield scene.malformed("truncated", "the document is cut", scene.good.encode()[:-40])
    yield scene.malformed("trailing", "something follows the document", scene.good.encode() + b"{}")
    yield scene.malformed("unknown-field", "a field that no receipt has", scene.edited(verified=True))
    yield scene.malformed(
        "unknown-statement-field", "a field that no statement has", scene.edited_statement(hardware=True)
    )
    yield scene.malformed(
        "missing-field",
        "the signature is missing",
        json.dumps({name: value for name, value in scene.plain().items() if name != "signature"}).encode(),
    )
    yield scene.malformed(
        "short-hash", "a hash of 31 bytes", scene.edited_statement(request=base64.b64encode(bytes(31)).decode())
    )
    yield scene.malformed(
        "negative-count",
        "a negative count",
        scene.edited_statement(checks=scene.plain()["statement"]["checks"] | {"refused": -1}),
    )
    yield scene.malformed("offer-cut", "the offer is cut", scene.changed(offer=scene.good.offer[:-1]))
    yield scene.malformed(
        "offer-longer", "the offer has a field more", scene.changed(offer=msgspec.msgpack.encode([*list_of_offer, 1]))
    )
    yield scene.malformed(
        "hello-short-nonce",
        "the hello has a nonce of 16 bytes",
        scene.changed(hello=msgspec.msgpack.encode([VERSION, bytes(16), ["x25519"]])),
    )
    yield scene.malformed(
        "evidence-empty", "there is no evidence in the offer", scene.offered(evidence=b""), "same-session"
    )
    yield scene.malformed("not-json", "no JSON", b"receipt")


def unknown(scene: Scene) -> Iterator[Case]:
    """Yields what a later version may read."""
    yield Case(
        "receipt-unknown-version",
        "a receipt of a later format",
        scene.edited(format="cloister-receipt/2"),
        scene.policy,
        "unsupported",
        ("format",),
    )
    yield Case(
        "receipt-unknown-kind",
        "evidence of a kind that nobody knows",
        scene.offered(evidence=scene.session.offer.evidence.replace(b'"sim"', b'"abc"')),
        scene.policy,
        "unsupported",
        ("format", "same-session"),
    )


def sgx_policy(forge: Forge) -> dict[str, Any]:
    """Returns the policy that accepts the enclave of a forge."""
    expected = {"mrenclave": [MRENCLAVE.hex()], "mrsigner": [MRSIGNER.hex()], "product": 7, "min_version": 3}
    return {"roots": {"dcap": [forge.authority.fingerprint.hex()]}, "sgx": expected}


def of_hardware(_: Scene) -> Iterator[Case]:
    """Yields receipts whose evidence has the format of hardware."""
    forge = Forge.new()
    session = Session.open(SgxAttester(forge))
    debug = Session.open(SgxAttester(forge, ENCLAVE.flags | 2))
    policy = sgx_policy(forge)
    yield Case("receipt-sgx-accepted", "an SGX enclave", session.receipt("sgx"), policy, model_roots=(MODEL,))
    yield Case("receipt-sgx-debug", "a debug enclave", debug.receipt("sgx"), policy, "refused", ("debug", "signature"))
    as_stand_in = session.receipt("sim")
    yield Case(
        "receipt-sgx-as-stand-in",
        "an SGX enclave that signs as a stand-in",
        as_stand_in,
        policy,
        "refused",
        ("same-session",),
    )


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
