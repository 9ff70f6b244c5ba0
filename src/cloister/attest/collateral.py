"""Intel's statements that travel with a quote: patch levels, the quoting enclave's identity, revocation lists.

Covers: the bounded reading of the JSON, who signed it, until when it is valid, what is revoked.
Does not cover: the signatures themselves and the choice of the patch level, which are `dcap_qvl`'s work (`attest.dcap`).

Why the signer is checked here: the library accepts statements signed by any leaf under the root, for example by one
leaked platform key, which then declares every forged enclave up to date. Intel's own verifier wants the signer that
Intel made for this; so does this module (compare CVE-2026-22696).
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from cryptography import x509

from cloister.attest.certificates import UNREADABLE, common_name, is_authority, load_pem_chain
from cloister.errors import EvidenceError

SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
"""What platform (PCK) certificates carry; a signer of statements never does."""


class Collateral(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The nine statements, as every DCAP tool exchanges them."""

    pck_crl_issuer_chain: str
    root_ca_crl: str
    pck_crl: str
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: str
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: str
    pck_certificate_chain: str | None = None


class _Statement(msgspec.Struct, frozen=True, rename="camel"):
    id: str
    issue_date: datetime
    next_update: datetime
    tcb_evaluation_data_number: int


@dataclass(frozen=True)
class Statements:
    """What was read, unverified."""

    collateral: Collateral
    signers: tuple[tuple[x509.Certificate, ...], tuple[x509.Certificate, ...]]
    """The chains behind the patch levels and behind the quoting enclave's identity."""
    list_signers: tuple[x509.Certificate, ...]
    """The chain behind the platform revocation list."""
    root_crl: x509.CertificateRevocationList
    pck_crl: x509.CertificateRevocationList
    windows: tuple[tuple[str, datetime, datetime], ...]
    """What is valid from when until when."""
    evaluation: int
    """The smaller TCB evaluation data number of the two statements."""
    identity: str
    """Whose patch levels these are: `SGX` or `TDX`."""

    @property
    def root(self) -> x509.Certificate:
        """The last certificate behind the patch levels."""
        return self.signers[0][-1]


def read(document: bytes) -> Statements:
    """Returns the statements in a JSON document.

    Raises:
        EvidenceError: a part is missing, unknown or unreadable.
    """
    if not document:
        raise EvidenceError(
            "The evidence comes without collateral.",
            remedy="The attester must send Intel's collateral along (dcap-qvl, PCCS or the quote provider fetches it).",
        )
    try:
        collateral = msgspec.json.decode(document, type=Collateral)
        statements = [
            msgspec.json.decode(text.encode(), type=_Statement)
            for text in (collateral.tcb_info, collateral.qe_identity)
        ]
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise EvidenceError("The collateral cannot be read.") from error
    tcb, identity = statements
    root_crl, pck_crl = _revocations(collateral.root_ca_crl), _revocations(collateral.pck_crl)
    windows = [("TCB info", _utc(tcb.issue_date), _utc(tcb.next_update))]
    windows.append(("QE identity", _utc(identity.issue_date), _utc(identity.next_update)))
    for name, crl in (("root revocation list", root_crl), ("platform revocation list", pck_crl)):
        if crl.next_update_utc is None:
            raise EvidenceError(f"The {name} does not say until when it is valid.")
        windows.append((name, crl.last_update_utc, crl.next_update_utc))
    return Statements(
        collateral=collateral,
        signers=(
            tuple(load_pem_chain(collateral.tcb_info_issuer_chain.encode())),
            tuple(load_pem_chain(collateral.qe_identity_issuer_chain.encode())),
        ),
        list_signers=tuple(load_pem_chain(collateral.pck_crl_issuer_chain.encode())),
        root_crl=root_crl,
        pck_crl=pck_crl,
        windows=tuple(windows),
        evaluation=min(tcb.tcb_evaluation_data_number, identity.tcb_evaluation_data_number),
        identity=tcb.id,
    )


def wrong_signer(statements: Statements) -> str:
    """Returns why a statement was not signed by the vendor's signer for statements, or an empty string."""
    for name, chain in zip(("TCB info", "QE identity"), statements.signers, strict=True):
        signer = chain[0]
        if len(chain) != 2:
            return f"the chain behind the {name} has {len(chain)} certificates, not signer and root"
        if not common_name(signer).endswith("TCB Signing"):
            return f"the {name} is signed by {common_name(signer)!r}, not by the TCB signer"
        if is_authority(signer) or _is_platform(signer):
            return f"the {name} is signed by a certificate of another purpose"
        if chain[1] != statements.root:
            return "the two statements end at different roots"
    return ""


def outside_window(statements: Statements, now: datetime) -> str:
    """Returns which statement is not valid at this time, or an empty string."""
    for name, start, end in statements.windows:
        if now < start:
            return f"the {name} is valid only from {start:%Y-%m-%d %H:%M} on"
        if now > end:
            return f"the {name} expired at {end:%Y-%m-%d %H:%M}"
    return ""


def revoked(statements: Statements, pck_chain: list[x509.Certificate]) -> str:
    """Returns which certificate is revoked, or an empty string."""
    lists = [(pck_chain[0], statements.pck_crl)]
    lists += [
        (certificate, statements.root_crl) for certificate in (*pck_chain[1:], *(c[0] for c in statements.signers))
    ]
    for certificate, crl in lists:
        if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            return f"{common_name(certificate)} is revoked"
    return ""


def _is_platform(certificate: x509.Certificate) -> bool:
    return any(extension.oid == SGX_EXTENSION for extension in certificate.extensions)


def _revocations(text: str) -> x509.CertificateRevocationList:
    try:
        crl = x509.load_der_x509_crl(bytes.fromhex(text))
        _ = crl.next_update_utc, crl.last_update_utc, crl.extensions, crl.issuer
    except UNREADABLE as error:
        raise EvidenceError("A revocation list of the collateral cannot be read.") from error
    return crl


def _utc(time: datetime) -> datetime:
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
