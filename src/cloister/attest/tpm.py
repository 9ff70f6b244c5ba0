"""TPM 2.0 quotes: which software a machine measured as it started, signed by a key that never leaves its TPM.

Covers: the attestation key (enrolled by name, or by a certificate), the quote, the registers, reset counter, firmware.
Does not cover: secrecy. A TPM proves what was started; it does not hide memory from the machine's owner. Registers 16
and 23 can be reset and extended again by any program of the machine; findings about them say so.
Source: TCG TPM Library part 1, sections 11.4 and 36 (attestation); PC Client Platform Firmware Profile, section 3.3.

Edge cases: a TPM takes less than 64 bytes of extra data, so what is bound is the SHA-256 of the report data.
"""

import hashlib
from datetime import datetime
from typing import Final

import msgspec

from cloister.attest.certificates import fingerprint, invalid_at, load_der, not_issued
from cloister.attest.evidence import Check, Claims, Evidence, Kind, Skip
from cloister.attest.findings import Findings
from cloister.attest.policy import TpmPolicy
from cloister.attest.tpm_format import (
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    MAGIC,
    RESTRICTED,
    SENSITIVE_ORIGIN,
    SIGN,
    Attest,
    PublicArea,
    signature_holds,
    split_quote,
)
from cloister.errors import EvidenceError

_ATTESTATION_KEY: Final = FIXED_TPM | FIXED_PARENT | SENSITIVE_ORIGIN | RESTRICTED | SIGN
_RESETTABLE: Final = frozenset({16, 23})


class TpmCollateral(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a quote refers to: the key's public area, and the registers whose digest is signed."""

    public: bytes
    """TPMT_PUBLIC of the attestation key."""
    pcrs: dict[str, bytes]
    """SHA-256 values by register number."""

    def encode(self) -> bytes:
        """Returns it as JSON."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(document: bytes) -> tuple[bytes, dict[int, bytes]]:
        """Returns the public area and the registers.

        Raises:
            EvidenceError: unreadable, or not 1 to 24 registers of 32 bytes.
        """
        try:
            found = msgspec.json.decode(document, type=TpmCollateral)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise EvidenceError("The key and registers behind the TPM quote cannot be read.") from error
        numbered = {str(number): number for number in range(24)}
        if not found.pcrs or any(key not in numbered or len(value) != 32 for key, value in found.pcrs.items()):
            raise EvidenceError("The registers behind the TPM quote are not 1 to 24 SHA-256 values.")
        return found.public, {numbered[key]: value for key, value in found.pcrs.items()}


def examine(
    evidence: Evidence, policy: TpmPolicy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    """Returns what the quote says, and notes every finding. What it says is authentic only if `findings.authentic`.

    Raises:
        EvidenceError, EvidenceUnsupportedError: the quote, the key or a certificate cannot be read.
    """
    raw_attest, raw_signature = split_quote(evidence.report)
    attest = Attest.decode(raw_attest)
    public, pcrs = TpmCollateral.decode(evidence.collateral)
    area = PublicArea.decode(public)
    signed = signature_holds(area, raw_attest, raw_signature)
    findings.passed(Check.FORMAT, f"TPM 2.0 quote over {len(attest.selection)} registers")
    _key(evidence, area, now, trusted, findings)
    findings.note(
        Check.SIGNATURE,
        signed and attest.magic == MAGIC,
        "made inside the TPM and signed by the attestation key",
        "not signed by the attestation key, or not made inside the TPM",
    )
    ordered = b"".join(pcrs[number] for number in sorted(pcrs))
    complete = set(attest.selection) == set(pcrs) and hashlib.sha256(ordered).digest() == attest.digest
    findings.note(
        Check.SIGNATURE,
        complete,
        "the registers are those that were signed",
        "the registers are not those that were signed",
    )
    _registers(pcrs, policy, findings)
    findings.note(
        Check.ATTRIBUTES, attest.safe, "the TPM's clock is safe", "the TPM lost power without saving its clock"
    )
    findings.exactly(Check.VERSION, "the reset counter", attest.resets, policy.resets)
    if isinstance(policy.firmware, Skip):
        findings.skipped(Check.PRODUCT, f"firmware {attest.firmware:#x}, not compared: {policy.firmware.reason}")
    else:
        known = attest.firmware in policy.firmware
        findings.note(
            Check.PRODUCT,
            known,
            f"the firmware is {attest.firmware:#x}",
            f"the firmware is {attest.firmware:#x}, which the policy does not name",
        )
    return Claims(
        kind=Kind.TPM,
        measurement=attest.digest,
        report_data=attest.extra_data,
        debug=False,
        tcb_status="unstated",
        platform=area.name,
        details=(
            *((f"pcr{number}", pcrs[number].hex()) for number in sorted(pcrs)),
            ("resets", str(attest.resets)),
            ("restarts", str(attest.restarts)),
            ("firmware", f"{attest.firmware:#x}"),
        ),
    )


def bound_bytes(report_data: bytes) -> bytes:
    """Returns what stands for report data where 64 bytes do not fit: its SHA-256."""
    return hashlib.sha256(report_data).digest()


def signs_only_what_it_made(area: PublicArea) -> bool:
    """Returns whether a key is a restricted signing key that was made in its TPM and cannot leave it."""
    return area.attributes & (_ATTESTATION_KEY | DECRYPT) == _ATTESTATION_KEY


def _key(evidence: Evidence, area: PublicArea, now: datetime, trusted: frozenset[bytes], findings: Findings) -> None:
    findings.note(
        Check.ATTRIBUTES,
        signs_only_what_it_made(area),
        "a restricted signing key that cannot leave the TPM",
        f"the key's attributes are {area.attributes:#x}: it could sign what no TPM made, or leave the TPM",
    )
    if not evidence.certificates:
        findings.note(
            Check.ROOT,
            area.name in trusted,
            f"the attestation key {area.name.hex()} is enrolled",
            f"the attestation key {area.name.hex()} is not enrolled",
        )
        findings.passed(Check.CHAIN, "no chain: the key itself is enrolled")
        return
    chain = [load_der(certificate) for certificate in evidence.certificates]
    root = fingerprint(chain[-1])
    findings.note(
        Check.ROOT,
        root in trusted,
        f"the chain ends at {root.hex()}",
        f"the chain ends at {root.hex()}, which is not trusted for this kind",
    )
    trouble = invalid_at(chain, now) or not_issued(chain)
    if not trouble and chain[0].public_key() != area.key:
        trouble = "the certificate is for another key"
    findings.note(Check.CHAIN, not trouble, f"{len(chain)} certificates, each signed by the next", trouble)


def _registers(pcrs: dict[int, bytes], policy: TpmPolicy, findings: Findings) -> None:
    if isinstance(policy.pcrs, Skip):
        findings.skipped(Check.REGISTERS, f"no register is compared: {policy.pcrs.reason}")
        return
    for number in sorted(policy.pcrs):
        name = f"PCR{number}" + (" (resettable by any program of the machine)" if number in _RESETTABLE else "")
        if number in pcrs:
            findings.member(Check.REGISTERS, name, pcrs[number], policy.pcrs[number])
        else:
            findings.failure(Check.REGISTERS, f"{name} is not in the quote")
