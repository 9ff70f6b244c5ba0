"""A miniature of Intel's attestation PKI: makes keys, certificates, collateral and quotes in the real formats.

The software stand-in (`attest.sim`) signs with it, and so do the tests, which forge with it what hardware would never sign.

Covers: the formats. Does not cover: any secrecy. Who holds an `Authority` can sign anything that its root vouches for;
that is why production roots never contain such a root.
Source: Intel SGX PCK Certificate and CRL Profile specification (extension 1.2.840.113741.1.13.1), PCS API v4 (TCB info
version 3, enclave identity version 2), quote formats as in `attest.quote`.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister.attest import der
from cloister.attest.collateral import SGX_EXTENSION
from cloister.attest.quote import (
    CERT_PEM_CHAIN,
    CERT_QE_REPORT,
    ECDSA_P256,
    QE_VENDOR_INTEL,
    TD_REPORT_15_BYTES,
    TEE_TDX,
    EnclaveReport,
    TdReport,
)

PCESVN: Final = 13
FMSPC: Final = bytes.fromhex("00906ea10000")
CPUSVN: Final = bytes([2] * 16)
QE_SIGNER: Final = hashlib.sha256(b"cloister: author of the quoting enclave of no hardware").digest()
VALIDITY: Final = timedelta(days=3650)
_ISO: Final = "%Y-%m-%dT%H:%M:%SZ"
_PREFIX: Final = SGX_EXTENSION.dotted_string

Window = tuple[datetime, datetime]
"""From when until when something is valid."""


@dataclass(frozen=True)
class Signer:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def pem(self) -> str:
        """The certificate as PEM."""
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def sign(self, message: bytes) -> bytes:
        """Returns the signature as r, s: 64 bytes, as quotes and collateral have it."""
        return sign_raw(self.key, message)


@dataclass(frozen=True)
class Authority:
    """Root, platform authority, signer of statements, and one platform."""

    root: Signer
    platform_authority: Signer
    statements: Signer
    platform: Signer

    @property
    def fingerprint(self) -> bytes:
        """The SHA-256 of the root certificate: what a verifier trusts."""
        return self.root.certificate.fingerprint(hashes.SHA256())

    @property
    def pck_chain(self) -> str:
        """Platform, platform authority, root as PEM."""
        return self.platform.pem + self.platform_authority.pem + self.root.pem


def create_authority(now: datetime, name: str, validity: timedelta = VALIDITY) -> Authority:
    """Returns new keys and certificates, valid from a day before `now`; `name` begins every common name."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(4)]
    window = (now - timedelta(days=1), now + validity)
    names = [f"{name} {role}" for role in ("Root CA", "Platform CA", "TCB Signing", "PCK Certificate")]
    root = Signer(certify(names[0], keys[0].public_key(), (names[0], keys[0]), window, path=1), keys[0])
    authority = Signer(certify(names[1], keys[1].public_key(), (names[0], keys[0]), window, path=0), keys[1])
    statements = Signer(certify(names[2], keys[2].public_key(), (names[0], keys[0]), window), keys[2])
    extension = platform_extension(hashlib.sha256(public_point(keys[3])).digest()[:16])
    platform = certify(names[3], keys[3].public_key(), (names[1], keys[1]), window, extension=extension)
    return Authority(root, authority, statements, Signer(platform, keys[3]))


def certify(
    name: str,
    key: ec.EllipticCurvePublicKey,
    issuer: tuple[str, ec.EllipticCurvePrivateKey],
    window: Window,
    *,
    path: int | None = None,
    extension: bytes = b"",
) -> x509.Certificate:
    """Returns a certificate; with `path` (the length of chains below it) it may issue others."""
    issuer_name, issuer_key = issuer
    authority = path is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer_name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(window[0])
        .not_valid_after(window[1])
        .add_extension(x509.BasicConstraints(authority, path), True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=authority,
                crl_sign=authority,
                encipher_only=False,
                decipher_only=False,
            ),
            True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )
    if extension:
        builder = builder.add_extension(x509.UnrecognizedExtension(SGX_EXTENSION, extension), False)
    return builder.sign(issuer_key, hashes.SHA256())


def platform_extension(ppid: bytes) -> bytes:
    """Returns the value of the SGX extension of a platform certificate: PPID, TCB, PCE-ID, FMSPC, SGX type."""

    def member(number: str, value: bytes) -> bytes:
        return der.sequence(der.identifier(f"{_PREFIX}.{number}"), value)

    tcb = [member(f"2.{index + 1}", der.integer(svn)) for index, svn in enumerate(CPUSVN)]
    tcb += [member("2.17", der.integer(PCESVN)), member("2.18", der.octets(CPUSVN))]
    return der.sequence(
        member("1", der.octets(ppid)),
        member("2", der.sequence(*tcb)),
        member("3", der.octets(bytes(2))),
        member("4", der.octets(FMSPC)),
        member("5", der.encode(der.ENUMERATED, b"\0")),
    )


def tcb_info(window: Window, *, tdx: bool = False, status: str = "UpToDate", **changes: Any) -> dict[str, Any]:
    """Returns TCB info of version 3 with one level. `changes` replace or add members; `least_svn`, `advisories` adjust it."""
    start, end = (time.strftime(_ISO) for time in window)
    tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": changes.pop("least_svn", 0)}] * 16, "pcesvn": 0}
    level = {"tcb": tcb, "tcbDate": start, "tcbStatus": status, "advisoryIDs": list(changes.pop("advisories", ()))}
    info: dict[str, Any] = {
        "id": "TDX" if tdx else "SGX",
        "version": 3,
        "issueDate": start,
        "nextUpdate": end,
        "fmspc": FMSPC.hex().upper(),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": 20,
        "tcbLevels": [level],
    }
    if tdx:
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        tcb["tdxtcbcomponents"] = [{"svn": 0}] * 16
        info["tdxModule"] = module
        levels = [{"tcb": {"isvsvn": 1}, "tcbDate": start, "tcbStatus": "UpToDate"}]
        info["tdxModuleIdentities"] = [{"id": "TDX_01", **module, "tcbLevels": levels}]
    return info | changes


def qe_identity(window: Window, *, tdx: bool = False, signer: bytes = QE_SIGNER, **changes: Any) -> dict[str, Any]:
    """Returns the identity of the quoting enclave, version 2, with one level. `changes` replace or add members."""
    start, end = (time.strftime(_ISO) for time in window)
    return {
        "id": "TD_QE" if tdx else "QE",
        "version": 2,
        "issueDate": start,
        "nextUpdate": end,
        "tcbEvaluationDataNumber": 20,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11" + "00" * 15,
        "attributesMask": "FB" + "FF" * 7 + "00" * 8,
        "mrsigner": signer.hex().upper(),
        "isvprodid": 1,
        "tcbLevels": [{"tcb": {"isvsvn": 1}, "tcbDate": start, "tcbStatus": changes.pop("status", "UpToDate")}],
    } | changes


def collateral(
    authority: Authority,
    tcb: Mapping[str, Any],
    identity: Mapping[str, Any],
    window: Window,
    revoked: Sequence[x509.Certificate] = (),
) -> dict[str, str]:
    """Returns the nine statements, signed; `json.dumps` of it is what evidence carries."""
    tcb_text, identity_text = (json.dumps(document, separators=(",", ":")) for document in (tcb, identity))
    chain = authority.statements.pem + authority.root.pem
    return {
        "pck_crl_issuer_chain": authority.platform_authority.pem + authority.root.pem,
        "root_ca_crl": revocations(authority.root, window, revoked).hex(),
        "pck_crl": revocations(authority.platform_authority, window, revoked).hex(),
        "tcb_info_issuer_chain": chain,
        "tcb_info": tcb_text,
        "tcb_info_signature": authority.statements.sign(tcb_text.encode()).hex(),
        "qe_identity_issuer_chain": chain,
        "qe_identity": identity_text,
        "qe_identity_signature": authority.statements.sign(identity_text.encode()).hex(),
    }


def revocations(issuer: Signer, window: Window, revoked: Sequence[x509.Certificate] = ()) -> bytes:
    """Returns the DER revocation list of an issuer."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(window[0])
        .next_update(window[1])
        .add_extension(x509.CRLNumber(1), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False)
    )
    for certificate in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(window[0])
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.DER)


def sign_quote(
    authority: Authority,
    body: EnclaveReport | TdReport,
    *,
    version: int = 0,
    qe_signer: bytes = QE_SIGNER,
    qe_flags: int = 0x11,
) -> bytes:
    """Returns a quote over `body`: version 3 for an enclave, 4 for a TD, 5 on request, by a fresh attestation key."""
    tdx = isinstance(body, TdReport)
    version = version or (4 if tdx else 3)
    encoded = body.encode()
    header = struct.pack("<HHIHH", version, ECDSA_P256, TEE_TDX if tdx else 0, 1, PCESVN) + QE_VENDOR_INTEL + bytes(20)
    if version == 5:
        kind = 1 if not tdx else 3 if len(encoded) == TD_REPORT_15_BYTES else 2
        header += struct.pack("<HI", kind, len(encoded))
    key = ec.generate_private_key(ec.SECP256R1())
    point, authentication = public_point(key), bytes(range(32))
    qe_report = EnclaveReport(
        mrenclave=hashlib.sha256(QE_SIGNER).digest(),
        mrsigner=qe_signer,
        product=1,
        version=1,
        flags=qe_flags,
        report_data=hashlib.sha256(point + authentication).digest() + bytes(32),
    ).encode()
    chain = authority.pck_chain.encode()
    certification = (
        qe_report
        + authority.platform.sign(qe_report)
        + struct.pack("<H", len(authentication))
        + authentication
        + struct.pack("<HI", CERT_PEM_CHAIN, len(chain))
        + chain
    )
    if version > 3:
        certification = struct.pack("<HI", CERT_QE_REPORT, len(certification)) + certification
    signature = sign_raw(key, header + encoded) + point + certification
    return header + encoded + struct.pack("<I", len(signature)) + signature


def sign_raw(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Returns the ECDSA signature over SHA-256 as r, s: 64 bytes."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def public_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns x, y of the public key: 64 bytes."""
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
