"""What the vectors of receipts are made of: sessions whose receipt key we hold, a case, and changes of a good receipt."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attest.forge import ENCLAVE, NOW, Forge
from cloister.attest.dcap_pki import create_authority
from cloister.attest.evidence import Attester, Evidence, Kind
from cloister.attest.receipt import Checks, Receipt, SignedStatement, Statement
from cloister.attest.session import prover
from cloister.attest.sim import Installation, SimAttester
from cloister.attest.vector import RECEIPT_FORMAT
from cloister.wire.channel_messages import VERSION, Hello, Offer, Suite

MEASURED, MODEL, PLAN = bytes([8]) * 32, bytes([9]) * 32, bytes([10]) * 32
REQUEST, PIECES = b"the request as it was sealed", (b"the first piece, ", b"the second, ", b"the end")
RESPONSE = b"".join(PIECES)
STAND_IN = {"sim": {"measurement": [MEASURED.hex()], "min_version": 1}}
"""What a policy states of the enclave; it names no root."""


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


@dataclass(frozen=True)
class Scene:
    """What the cases begin with: two sessions under one stand-in, the receipt of the first, and a policy that accepts it."""

    stand_in: Installation
    session: Session
    another: Session
    good: Receipt

    @staticmethod
    def open() -> "Scene":
        """Returns a scene under fresh keys."""
        stand_in = Installation(create_authority(NOW, "Test stand-in"))
        attester = SimAttester(stand_in, MEASURED, clock=lambda: NOW)
        session = Session.open(attester)
        return Scene(stand_in, session, Session.open(attester, nonce=2), session.receipt())

    @property
    def policy(self) -> dict[str, Any]:
        """Accepts the good receipt."""
        return {"roots": {"sim": [self.stand_in.fingerprint.hex()]}, **STAND_IN}

    def refused(self, name: str, description: str, receipt: Receipt | bytes, *failed: str, **more: Any) -> Case:
        """Returns a case that is read and refused."""
        return Case(f"receipt-{name}", description, receipt, more.pop("policy", self.policy), "refused", failed, **more)

    def malformed(self, name: str, description: str, receipt: Receipt | bytes, *failed: str) -> Case:
        """Returns a case that cannot be read."""
        return Case(f"receipt-{name}", description, receipt, self.policy, "malformed", ("format", *failed))

    def changed(self, **fields: Any) -> Receipt:
        """Returns the good receipt with other fields."""
        return msgspec.structs.replace(self.good, **fields)

    def said(self, **fields: Any) -> Receipt:
        """Returns the good receipt with a statement that was changed after it was signed."""
        return self.changed(statement=msgspec.structs.replace(self.good.statement, **fields))

    def offered(self, **fields: Any) -> Receipt:
        """Returns the good receipt with a changed offer."""
        return self.changed(offer=msgspec.msgpack.encode(msgspec.structs.replace(self.session.offer, **fields)))

    def plain(self) -> dict[str, Any]:
        """Returns the good receipt as JSON."""
        return json.loads(self.good.encode())

    def edited(self, **fields: Any) -> bytes:
        """Returns the good receipt with other JSON."""
        return json.dumps(self.plain() | fields).encode()

    def edited_statement(self, **fields: Any) -> bytes:
        """Returns the good receipt with other JSON in its statement."""
        return self.edited(statement=self.plain()["statement"] | fields)
