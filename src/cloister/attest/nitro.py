"""AWS Nitro enclaves: the signed attestation document of the Nitro security module.

Covers: the COSE signature, the chain to the AWS root, the document's age, the registers, debug mode.
Does not cover: asking the module for a document (inside an enclave image, by `/dev/nsm`).
Source: AWS, "Validating attestation documents produced by AWS Nitro Enclaves" (aws-nitro-enclaves-nsm-api, docs);
RFC 9052, section 4.4 (COSE_Sign1).

Edge cases: the enclave's certificate lives for about three hours, so that chain and registers are judged at the time that
the document states, and that time must lie within `max_age_seconds` before the verifier's. PCR0 is all zero in debug mode.
Report data is the document's `user_data`.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attest import cbor
from cloister.attest.certificates import fingerprint, invalid_at, load_der, not_issued
from cloister.attest.evidence import Check, Claims, Evidence, Kind, Skip
from cloister.attest.findings import Findings
from cloister.attest.policy import NitroPolicy
from cloister.errors import EvidenceError, EvidenceUnsupportedError

_ES384: Final = bytes.fromhex("a1013822")
"""The protected header {1: -35}."""
_SIGN1_TAG: Final = b"\xd2"
_FUTURE: Final = timedelta(seconds=60)
"""How far the module's clock may run ahead of the verifier's."""


class _Payload(msgspec.Struct, frozen=True):
    module_id: str
    digest: str
    timestamp: int
    pcrs: dict[int, bytes]
    certificate: bytes
    cabundle: list[bytes]
    public_key: bytes | None = None
    user_data: bytes | None = None
    nonce: bytes | None = None


def examine(
    evidence: Evidence, policy: NitroPolicy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    """Returns what the document says, and notes every finding. What it says is authentic only if `findings.authentic`.

    Raises:
        EvidenceError, EvidenceUnsupportedError: the document or a certificate cannot be read.
    """
    protected, raw_payload, signature = _sign1(evidence.report)
    payload = _payload(raw_payload)
    chain = [load_der(certificate) for certificate in (payload.certificate, *reversed(payload.cabundle))]
    findings.passed(Check.FORMAT, f"Nitro document of {payload.module_id[:64]!r}")
    try:
        stated = datetime.fromtimestamp(payload.timestamp / 1000, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise EvidenceError("The document states an impossible time.") from error

    root = fingerprint(chain[-1])
    findings.note(
        Check.ROOT,
        root in trusted,
        f"the chain ends at {root.hex()}",
        f"the chain ends at {root.hex()}, which is not trusted for this kind",
    )
    trouble = invalid_at(chain, stated) or not_issued(chain)
    findings.note(Check.CHAIN, not trouble, f"{len(chain)} certificates, each signed by the next", trouble)
    age = now - stated
    findings.note(
        Check.COLLATERAL_TIME,
        -_FUTURE <= age <= timedelta(seconds=policy.max_age_seconds),
        f"made at {stated:%Y-%m-%d %H:%M:%S}",
        f"made at {stated:%Y-%m-%d %H:%M:%S}; the policy accepts {policy.max_age_seconds} seconds before {now:%Y-%m-%d %H:%M:%S}",
    )
    good = _signed(chain[0], protected, raw_payload, signature)
    findings.note(
        Check.SIGNATURE, good, "signed by the enclave's certificate", "not signed by the enclave's certificate"
    )
    image = payload.pcrs[0]
    findings.note(
        Check.DEBUG, any(image), "PCR0 is set", "PCR0 is zero: an enclave in debug mode, whose console is open"
    )
    if isinstance(policy.pcrs, Skip):
        findings.skipped(Check.REGISTERS, f"no register is compared: {policy.pcrs.reason}")
    else:
        for number in sorted(policy.pcrs):
            findings.member(Check.REGISTERS, f"PCR{number}", payload.pcrs.get(number, b""), policy.pcrs[number])
    return Claims(
        kind=Kind.NITRO,
        measurement=image,
        report_data=payload.user_data or b"",
        debug=not any(image),
        tcb_status="unstated",
        platform=payload.module_id.encode(),
        details=(
            *((f"pcr{number}", value.hex()) for number, value in sorted(payload.pcrs.items()) if any(value)),
            ("made_at", stated.isoformat()),
            ("nonce", (payload.nonce or b"").hex()),
            ("public_key", (payload.public_key or b"").hex()),
        ),
    )


def _sign1(document: bytes) -> tuple[bytes, bytes, bytes]:
    match cbor.decode(document.removeprefix(_SIGN1_TAG)):
        case [bytes(protected), dict(), bytes(payload), bytes(signature)]:
            if protected != _ES384:
                raise EvidenceUnsupportedError("A COSE document that is not signed by ES384.")
            if len(signature) != 96:
                raise EvidenceError("A COSE signature of another length than 96 bytes.")
            return protected, payload, signature
        case _:
            raise EvidenceError("This is not a COSE_Sign1 document.")


def _payload(raw: bytes) -> _Payload:
    try:
        payload = msgspec.convert(cbor.decode(raw), _Payload)
    except msgspec.ValidationError as error:
        raise EvidenceError("The document's payload has another shape than a Nitro document.") from error
    if payload.digest != "SHA384" or any(len(value) != 48 for value in payload.pcrs.values()):
        raise EvidenceUnsupportedError("A Nitro document with registers of another hash than SHA-384.")
    if 0 not in payload.pcrs or not 1 <= len(payload.cabundle) <= 7 or not all(0 <= key < 32 for key in payload.pcrs):
        raise EvidenceError("The document has no PCR0, or registers or certificates that cannot be.")
    return payload


def _signed(leaf: x509.Certificate, protected: bytes, payload: bytes, signature: bytes) -> bool:
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    signed = cbor.encode_array(
        cbor.encode_text("Signature1"), cbor.encode_bytes(protected), cbor.encode_bytes(b""), cbor.encode_bytes(payload)
    )
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    try:
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True
