"""SEV-SNP virtual machines: the report, the chip's certificate, and AMD's chain above it.

Covers: ARK, ASK and VCEK or VLEK; the report's signature; that the certificate is the one of this chip at this patch
level; the guest policy's bits; launch measurement, host data, identity block; minimum firmware.
Does not cover: fetching certificates (they travel with the evidence), report data (`attest.verify`).
Source: AMD SEV-SNP Firmware ABI (56860); VCEK Certificate and KDS Interface Specification (57230), table 8 (extensions).

Edge cases: the 352 bytes behind the signature are signed by nobody; they must be zero, so that a report has one form.
AMD's certificates have the serial number 0, which `cryptography` only warns about today.
"""

from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attest import der
from cloister.attest.certificates import UNREADABLE, fingerprint, invalid_at, load_der, not_issued
from cloister.attest.evidence import Check, Claims, Evidence, Kind, Skip
from cloister.attest.findings import Findings
from cloister.attest.policy import SnpPolicy, SnpTcb
from cloister.attest.snp_report import FAMILY_TURIN, SIGNED_BYTES, SnpReport, signature
from cloister.errors import EvidenceError, EvidenceUnsupportedError

ECDSA_P384_SHA384: Final = 1
_AMD: Final = "1.3.6.1.4.1.3704.1"
BOOTLOADER_SPL: Final = x509.ObjectIdentifier(f"{_AMD}.3.1")
TEE_SPL: Final = x509.ObjectIdentifier(f"{_AMD}.3.2")
SNP_SPL: Final = x509.ObjectIdentifier(f"{_AMD}.3.3")
MICROCODE_SPL: Final = x509.ObjectIdentifier(f"{_AMD}.3.8")
FMC_SPL: Final = x509.ObjectIdentifier(f"{_AMD}.3.9")
HARDWARE_ID: Final = x509.ObjectIdentifier(f"{_AMD}.4")
CSP_ID: Final = x509.ObjectIdentifier(f"{_AMD}.5")

SMT: Final = 1 << 16
ALWAYS_ONE: Final = 1 << 17
MIGRATE_MA: Final = 1 << 18
DEBUG: Final = 1 << 19
_KNOWN: Final = (1 << 25) - 1
"""ABI version, and the bits up to CIPHERTEXT_HIDING; those above are reserved and must be zero."""
_MASK_CHIP_KEY: Final = 1 << 1
_VCEK: Final = 0
_VLEK: Final = 1
_SIGNATURE_END: Final = SIGNED_BYTES + 2 * 72


def examine(
    evidence: Evidence, policy: SnpPolicy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    """Returns what the report says, and notes every finding. What it says is authentic only if `findings.authentic`.

    Raises:
        EvidenceError, EvidenceUnsupportedError: the report or a certificate cannot be read.
    """
    report = SnpReport.decode(evidence.report)
    if len(evidence.certificates) != 3:
        raise EvidenceError(
            f"SEV-SNP evidence comes with {len(evidence.certificates)} certificates.",
            remedy="It needs three: VCEK or VLEK, ASK, ARK. AMD's key server has them; the host may provide them too.",
        )
    if any(evidence.report[_SIGNATURE_END:]):
        raise EvidenceError("The unsigned end of the report is not zero.")
    if report.algorithm != ECDSA_P384_SHA384:
        raise EvidenceUnsupportedError(f"A SEV-SNP report signed by algorithm {report.algorithm}.")
    chain = [load_der(certificate) for certificate in evidence.certificates]
    findings.passed(Check.FORMAT, f"SEV-SNP report, version {report.version}")
    _chain(chain, now, trusted, findings)
    _revocation(evidence, chain, policy, now, findings)
    _signature(evidence.report, report, chain[0], findings)
    _leaf(report, chain[0], findings)
    _guest_policy(report, policy, findings)
    _firmware(report, policy, findings)
    findings.member(Check.MEASUREMENT, "the launch measurement", report.measurement, policy.measurement)
    findings.member(Check.REGISTERS, "the host data", report.host_data, policy.host_data)
    findings.member(Check.SIGNER, "the identity block's key", report.id_key_digest, policy.id_key)
    findings.least(Check.VERSION, "the guest SVN", report.guest_svn, policy.min_version)
    findings.member(Check.PLATFORM, "the chip", report.chip_id, policy.platforms)
    return Claims(
        kind=Kind.SNP,
        measurement=report.measurement,
        report_data=report.report_data,
        debug=bool(report.policy & DEBUG),
        tcb_status="unstated",
        version=report.guest_svn,
        platform=report.chip_id,
        details=(
            ("policy", f"{report.policy:#x}"),
            ("vmpl", str(report.vmpl)),
            ("reported_tcb", str(report.tcb(report.reported_tcb))),
            ("host_data", report.host_data.hex()),
            ("id_key_digest", report.id_key_digest.hex()),
        ),
    )


def _chain(chain: list[x509.Certificate], now: datetime, trusted: frozenset[bytes], findings: Findings) -> None:
    root = fingerprint(chain[-1])
    findings.note(
        Check.ROOT,
        root in trusted,
        f"the chain ends at {root.hex()}",
        f"the chain ends at {root.hex()}, which is not trusted for this kind",
    )
    trouble = invalid_at(chain, now) or not_issued(chain)
    if not trouble and not all(isinstance(issuer.public_key(), rsa.RSAPublicKey) for issuer in chain[1:]):
        trouble = "an issuer has a key of another type than AMD's"
    findings.note(Check.CHAIN, not trouble, "chip, intermediate and root, each signed by the next", trouble)


def _revocation(
    evidence: Evidence, chain: list[x509.Certificate], policy: SnpPolicy, now: datetime, findings: Findings
) -> None:
    if isinstance(policy.revocation, Skip):
        findings.skipped(Check.REVOCATION, policy.revocation.reason)
        return
    if not evidence.collateral:
        findings.failure(Check.REVOCATION, "the evidence comes without AMD's revocation list")
        return
    try:
        crl = x509.load_der_x509_crl(evidence.collateral)
        key = chain[-1].public_key()
        signed = isinstance(key, rsa.RSAPublicKey) and crl.is_signature_valid(key)
        end, start = crl.next_update_utc, crl.last_update_utc
        numbers = {entry.serial_number for entry in crl}
    except UNREADABLE as error:
        raise EvidenceError("AMD's revocation list cannot be read.") from error
    trouble = ""
    if not signed or crl.issuer != chain[-1].subject:
        trouble = "the revocation list is not signed by the root"
    elif end is None or not start <= now <= end:
        trouble = "the revocation list is not valid at this time"
    elif chain[1].serial_number in numbers or (chain[0].serial_number and chain[0].serial_number in numbers):
        trouble = "a certificate is revoked"
    findings.note(Check.REVOCATION, not trouble, "no certificate is on the revocation list", trouble)


def _signature(raw: bytes, report: SnpReport, leaf: x509.Certificate, findings: Findings) -> None:
    key = leaf.public_key()
    good = False
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        try:
            key.verify(encode_dss_signature(*signature(raw)), raw[:SIGNED_BYTES], ec.ECDSA(SHA384()))
            good = not report.flags & _MASK_CHIP_KEY
        except InvalidSignature:
            pass
    findings.note(
        Check.SIGNATURE, good, "the report is signed by the chip's key", "the report is not signed by the chip's key"
    )


def _leaf(report: SnpReport, leaf: x509.Certificate, findings: Findings) -> None:
    """Notes whether the certificate is for this chip (or provider) and for exactly the patch level of the report."""
    values = {
        extension.oid: extension.value.value
        for extension in leaf.extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }
    signer = report.flags >> 2 & 7
    if HARDWARE_ID in values:
        chip = values[HARDWARE_ID]
        chip = chip if len(chip) in (8, 64) else der.read(chip, der.OCTETS)
        matches = signer == _VCEK and report.chip_id == chip.ljust(64, b"\0") and any(chip)
    else:
        matches = signer == _VLEK and CSP_ID in values
    findings.note(
        Check.CHAIN, matches, "the certificate is that of the report's chip", "the certificate is that of another chip"
    )
    reported = report.tcb(report.reported_tcb)
    try:
        certified = SnpTcb(
            bootloader=der.read_integer(values[BOOTLOADER_SPL]),
            tee=der.read_integer(values[TEE_SPL]),
            snp=der.read_integer(values[SNP_SPL]),
            microcode=der.read_integer(values[MICROCODE_SPL]),
            fmc=der.read_integer(values[FMC_SPL]) if report.cpu_family == FAMILY_TURIN and report.version >= 3 else 0,
        )
    except KeyError as error:
        raise EvidenceError("The chip's certificate does not state a patch level.") from error
    findings.note(
        Check.TCB,
        certified == reported,
        f"certificate and report agree on {reported}",
        f"the report says {reported}, the certificate is for {certified}",
    )


def _guest_policy(report: SnpReport, policy: SnpPolicy, findings: Findings) -> None:
    findings.note(
        Check.DEBUG,
        not report.policy & DEBUG,
        "the guest policy forbids debugging",
        f"the guest policy is {report.policy:#x}: the host may debug the guest and read all of its memory",
    )
    findings.note(
        Check.ATTRIBUTES,
        bool(report.policy & ALWAYS_ONE) and not report.policy & MIGRATE_MA and not report.policy & ~_KNOWN,
        f"the guest policy is {report.policy:#x}",
        f"the guest policy is {report.policy:#x}: a migration agent is allowed or a reserved bit is wrong",
    )
    findings.note(
        Check.ATTRIBUTES,
        report.vmpl <= policy.max_vmpl,
        f"asked for at VMPL {report.vmpl}",
        f"asked for at VMPL {report.vmpl}; the policy allows {policy.max_vmpl}",
    )


def _firmware(report: SnpReport, policy: SnpPolicy, findings: Findings) -> None:
    if isinstance(policy.min_tcb, Skip):
        findings.skipped(Check.TCB, f"the least firmware is not compared: {policy.min_tcb.reason}")
        return
    least = policy.min_tcb
    for name, raw in (("reported", report.reported_tcb), ("committed", report.committed_tcb)):
        found = report.tcb(raw)
        pairs = (
            (found.bootloader, least.bootloader),
            (found.tee, least.tee),
            (found.snp, least.snp),
            (found.microcode, least.microcode),
            (found.fmc, least.fmc),
        )
        findings.note(
            Check.TCB,
            all(have >= want for have, want in pairs),
            f"the {name} firmware is {found}",
            f"the {name} firmware is {found}, below {least}",
        )
