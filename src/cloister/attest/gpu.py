"""NVIDIA GPUs in confidential mode: the signed SPDM measurement report.

Covers: the chain to NVIDIA's root, that the certificate is for the firmware that runs (FWID), the signature, the nonce,
driver and VBIOS versions, and the measurements as one digest.
Does not cover: comparing single measurements with NVIDIA's reference values (RIM files), and revocation, for which NVIDIA
answers only online (OCSP): a policy must skip it by name. In this project a GPU is untrusted anyway.
Source: DMTF DSP0274 (SPDM 1.1), section 10.11; NVIDIA attestation SDK, opaque data fields.

Edge cases: the nonce is 32 bytes, so what is bound is the SHA-256 of the report data.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attest.certificates import fingerprint, invalid_at, load_der, not_issued
from cloister.attest.evidence import Check, Claims, Evidence, Kind, Skip
from cloister.attest.findings import Findings
from cloister.attest.policy import GpuPolicy
from cloister.errors import EvidenceError, EvidenceUnsupportedError

_REQUEST_BYTES: Final = 37
_NONCE: Final = slice(4, 36)
_SIGNATURE_BYTES: Final = 96
_SPDM_11: Final = 0x11
_GET_MEASUREMENTS: Final = 0xE0
_MEASUREMENTS: Final = 0x60
_DICE_TCB: Final = x509.ObjectIdentifier("2.23.133.5.4.1")
_SHA384_OID: Final = bytes.fromhex("0609608648016503040202")
_DRIVER: Final = 3
_VBIOS: Final = 6
_FWID: Final = 20


@dataclass(frozen=True)
class Report:
    """An unverified report."""

    nonce: bytes
    record: bytes
    """All measurement blocks."""
    opaque: dict[int, bytes]
    signed: bytes
    signature: bytes


def parse(report: bytes) -> Report:
    """Returns the fields of a report: request, then response.

    Raises:
        EvidenceError: truncated, trailing bytes, or a field twice.
        EvidenceUnsupportedError: another SPDM version or message.
    """
    if len(report) < _REQUEST_BYTES + 8 + 32 + 2 + _SIGNATURE_BYTES:
        raise EvidenceError("The GPU report ends early.")
    request, response = report[:_REQUEST_BYTES], report[_REQUEST_BYTES:]
    if request[:2] != bytes([_SPDM_11, _GET_MEASUREMENTS]) or response[:2] != bytes([_SPDM_11, _MEASUREMENTS]):
        raise EvidenceUnsupportedError("The GPU report is not an SPDM 1.1 measurement.")
    record_end = 8 + int.from_bytes(response[5:8], "little")
    opaque_start = record_end + 32 + 2
    size = int.from_bytes(response[opaque_start - 2 : opaque_start], "little")
    if opaque_start + size + _SIGNATURE_BYTES != len(response):
        raise EvidenceError("The GPU report's lengths do not add up.")
    return Report(
        nonce=request[_NONCE],
        record=response[8:record_end],
        opaque=_opaque(response[opaque_start : opaque_start + size]),
        signed=report[:-_SIGNATURE_BYTES],
        signature=report[-_SIGNATURE_BYTES:],
    )


def examine(
    evidence: Evidence, policy: GpuPolicy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    """Returns what the report says, and notes every finding. What it says is authentic only if `findings.authentic`.

    Raises:
        EvidenceError, EvidenceUnsupportedError: the report or a certificate cannot be read.
    """
    report = parse(evidence.report)
    if len(evidence.certificates) < 2:
        raise EvidenceError("GPU evidence comes with its certificate chain, device first.")
    chain = [load_der(certificate) for certificate in evidence.certificates]
    findings.passed(Check.FORMAT, "SPDM 1.1 measurement report")
    root = fingerprint(chain[-1])
    findings.note(
        Check.ROOT,
        root in trusted,
        f"the chain ends at {root.hex()}",
        f"the chain ends at {root.hex()}, which is not trusted for this kind",
    )
    trouble = invalid_at(chain, now) or not_issued(chain) or _other_firmware(chain[0], report)
    findings.note(Check.CHAIN, not trouble, f"{len(chain)} certificates, each signed by the next", trouble)
    findings.skipped(Check.REVOCATION, policy.revocation.reason)
    findings.note(
        Check.SIGNATURE,
        _signed(chain[0], report),
        "signed by the GPU's key",
        "the report is not signed by the GPU's key",
    )
    measurement = hashlib.sha384(report.record).digest()
    findings.member(Check.MEASUREMENT, "the digest of the measurements", measurement, policy.measurement)
    driver = report.opaque.get(_DRIVER, b"").rstrip(b"\0").decode("ascii", "replace")
    vbios = report.opaque.get(_VBIOS, b"").hex()
    _named(Check.VERSION, "the driver", driver, policy.driver, findings)
    _named(Check.PRODUCT, "the VBIOS", vbios, policy.vbios, findings)
    return Claims(
        kind=Kind.GPU,
        measurement=measurement,
        report_data=report.nonce,
        debug=False,
        tcb_status="unstated",
        platform=fingerprint(chain[0]),
        details=(("driver", driver), ("vbios", vbios)),
    )


def _opaque(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        kind, size = int.from_bytes(data[at : at + 2], "little"), int.from_bytes(data[at + 2 : at + 4], "little")
        if at + 4 + size > len(data) or kind in found:
            raise EvidenceError("A field of the GPU report ends early or is there twice.")
        found[kind] = data[at + 4 : at + 4 + size]
        at += 4 + size
    return found


def _other_firmware(leaf: x509.Certificate, report: Report) -> str:
    """Returns why the certificate is not for the firmware that runs, or an empty string.

    The certificate names the firmware's hash (TCG DICE, DiceTcbInfo.fwids); a report that names one must name the same.
    """
    for extension in leaf.extensions:
        if extension.oid == _DICE_TCB and isinstance(extension.value, x509.UnrecognizedExtension):
            _, found, rest = extension.value.value.partition(_SHA384_OID)
            if not found or rest[:2] != b"\x04\x30" or len(rest) != 50:
                return "the certificate names its firmware in another form"
            if report.opaque.get(_FWID, rest[2:]) != rest[2:]:
                return "the certificate is for other firmware"
            return ""
    return "the certificate does not name its firmware"


def _signed(leaf: x509.Certificate, report: Report) -> bool:
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    half = _SIGNATURE_BYTES // 2
    r, s = int.from_bytes(report.signature[:half], "big"), int.from_bytes(report.signature[half:], "big")
    try:
        key.verify(encode_dss_signature(r, s), report.signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _named(check: Check, name: str, found: str, accepted: frozenset[str] | Skip, findings: Findings) -> None:
    shown = f"{name} is {found!r}"
    if isinstance(accepted, Skip):
        findings.skipped(check, f"{shown}, not compared: {accepted.reason}")
    else:
        findings.note(check, found in accepted, shown, f"{shown}, which the policy does not name")
