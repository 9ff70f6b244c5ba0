"""A miniature of AMD's key hierarchy: root, intermediate and chip certificates with AMD's extensions, and signed reports."""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from attest.forge import NOW, REPORT_DATA
from cloister.attest import der, snp
from cloister.attest.evidence import Evidence, Kind, Skip, Verdict
from cloister.attest.policy import Policy, Required, SnpPolicy, SnpTcb
from cloister.attest.roots import Roots
from cloister.attest.snp_report import SnpReport, encode_signature
from cloister.attest.verify import verify

TCB = SnpTcb(bootloader=3, tee=1, snp=8, microcode=115)
RAW_TCB = int.from_bytes(bytes([3, 1, 0, 0, 0, 0, 8, 115]), "little")
RAW_TCB_TURIN = int.from_bytes(bytes([2, 3, 1, 8, 0, 0, 0, 115]), "little")
MEASUREMENT = bytes([9]) * 48
HOST_DATA = bytes([10]) * 32
ID_KEY = bytes([11]) * 48
CHIP = bytes(range(64))
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
REPORT = SnpReport(
    guest_svn=4,
    report_data=REPORT_DATA,
    measurement=MEASUREMENT,
    host_data=HOST_DATA,
    id_key_digest=ID_KEY,
    chip_id=CHIP,
    current_tcb=RAW_TCB,
    reported_tcb=RAW_TCB,
    committed_tcb=RAW_TCB,
)


@dataclass(frozen=True)
class Amd:
    """Root key, intermediate key and one chip's key."""

    ark_key: rsa.RSAPrivateKey = field(repr=False)
    ask_key: rsa.RSAPrivateKey = field(repr=False)
    chip_key: ec.EllipticCurvePrivateKey = field(repr=False)
    ark: x509.Certificate
    ask: x509.Certificate

    @staticmethod
    def new() -> "Amd":
        ark_key, ask_key = (
            rsa.generate_private_key(65537, 2048) for _ in range(2)
        )  # AMD's have 4096 bits: slow to make
        ark = _certificate("ARK-Test", ark_key.public_key(), "ARK-Test", ark_key, authority=True)
        ask = _certificate("SEV-Test", ask_key.public_key(), "ARK-Test", ark_key, authority=True)
        return Amd(ark_key, ask_key, ec.generate_private_key(ec.SECP384R1()), ark, ask)

    @property
    def roots(self) -> Roots:
        return Roots(snp=frozenset({self.ark.fingerprint(hashes.SHA256())}))

    def vcek(
        self, chip: bytes | None = CHIP, tcb: SnpTcb = TCB, turin: bool = False, **window: datetime
    ) -> x509.Certificate:
        """Returns a chip's certificate; with `chip=None` a provider's (VLEK)."""
        extensions = {
            snp.BOOTLOADER_SPL: der.integer(tcb.bootloader),
            snp.TEE_SPL: der.integer(tcb.tee),
            snp.SNP_SPL: der.integer(tcb.snp),
            snp.MICROCODE_SPL: der.integer(tcb.microcode),
        }
        if turin:
            extensions[snp.FMC_SPL] = der.integer(tcb.fmc)
        if chip is None:
            extensions[snp.CSP_ID] = der.encode(0x16, b"provider")
        else:
            extensions[snp.HARDWARE_ID] = chip
        return _certificate(
            "SEV-VCEK", self.chip_key.public_key(), "SEV-Test", self.ask_key, extensions=extensions, **window
        )

    def sign(self, report: SnpReport) -> bytes:
        """Returns a report signed by the chip."""
        signed = report.encode_signed_part()
        r, s = decode_dss_signature(self.chip_key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return signed + encode_signature(r, s)

    def evidence(
        self, report: SnpReport = REPORT, vcek: x509.Certificate | None = None, revocations: bytes = b""
    ) -> Evidence:
        chain = (vcek or self.vcek(), self.ask, self.ark)
        certificates = tuple(certificate.public_bytes(Encoding.DER) for certificate in chain)
        return Evidence(kind=Kind.SNP, report=self.sign(report), certificates=certificates, collateral=revocations)

    def revocations(self, *revoked: x509.Certificate, until: datetime = NOW + timedelta(days=30)) -> bytes:
        """Returns the root's revocation list."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.ark.subject)
            .last_update(NOW - timedelta(days=1))
            .next_update(until)
        )
        for certificate in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(NOW)
            builder = builder.add_revoked_certificate(entry.build())
        crl = builder.sign(self.ark_key, hashes.SHA384(), rsa_padding=PSS)
        return crl.public_bytes(Encoding.DER)

    def verify(self, evidence: Evidence, policy: Policy | None = None, now: datetime = NOW) -> Verdict:
        return verify(evidence, policy or snp_policy(), now, self.roots)


def snp_policy(report_data: bytes = REPORT_DATA, **changes: Any) -> Policy:
    """Returns the policy that exactly accepts `REPORT`."""
    expected: dict[str, Any] = {
        "measurement": frozenset({MEASUREMENT}),
        "host_data": frozenset({HOST_DATA}),
        "min_version": 4,
        "min_tcb": TCB,
        "id_key": frozenset({ID_KEY}),
        "revocation": Skip("no list in this test"),
        "platforms": frozenset({CHIP}),
    }
    return Policy(accept=(SnpPolicy(**(expected | changes)),), report_data=report_data)


def with_list() -> Policy:
    return snp_policy(revocation=Required.REQUIRED)


def changed(**changes: Any) -> SnpReport:
    return replace(REPORT, **changes)


def _certificate(
    name: str,
    key: Any,
    issuer: str,
    issuer_key: rsa.RSAPrivateKey,
    authority: bool = False,
    extensions: dict[x509.ObjectIdentifier, bytes] | None = None,
    after: datetime = NOW - timedelta(days=100),
    before: datetime = NOW + timedelta(days=2000),
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(after)
        .not_valid_after(before)
    )
    if authority:
        builder = builder.add_extension(x509.BasicConstraints(True, None), True)
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), False)
    return builder.sign(issuer_key, hashes.SHA384(), rsa_padding=PSS)
