"""Reading X.509 certificates that come from peers: bounded, silent, and with one error.

Covers: loading DER and PEM, fingerprints, validity at a passed time, the names. Does not cover: which key may sign what.
"""

import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from cloister.errors import EvidenceError

UNREADABLE: Final = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""Everything that `cryptography` raises for hostile certificates and lists; the x509 errors are no `ValueError`."""

_MAX_PEM_BYTES = 2**16
_MAX_CHAIN = 8


def load_der(der: bytes) -> x509.Certificate:
    """Returns a certificate.

    AMD's endorsement certificates have the serial number 0, of which the library warns; that is not an error here.

    Raises:
        EvidenceError: this is no certificate.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            certificate = x509.load_der_x509_certificate(der)
            _readable(certificate)
        except UNREADABLE as error:
            raise EvidenceError("A certificate of the evidence cannot be read.") from error
    return certificate


def load_pem_chain(pem: bytes) -> list[x509.Certificate]:
    """Returns the certificates of a PEM chain in their order.

    Raises:
        EvidenceError: too long, too many, or no certificates.
    """
    if len(pem) > _MAX_PEM_BYTES:
        raise EvidenceError(f"A certificate chain of {len(pem)} bytes is longer than {_MAX_PEM_BYTES}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            chain = x509.load_pem_x509_certificates(pem)
            for certificate in chain:
                _readable(certificate)
        except UNREADABLE as error:
            raise EvidenceError("A certificate chain of the evidence cannot be read.") from error
    if not 1 <= len(chain) <= _MAX_CHAIN:
        raise EvidenceError(f"A certificate chain of {len(chain)} certificates.")
    return chain


def fingerprint(certificate: x509.Certificate) -> bytes:
    """Returns the SHA-256 of the DER certificate."""
    return certificate.fingerprint(SHA256())


def common_name(certificate: x509.Certificate) -> str:
    """Returns the common name of the subject, printable, or an empty string."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = str(found[0].value) if found else ""
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in text[:100])


def is_authority(certificate: x509.Certificate) -> bool:
    """Returns whether the certificate says that it may issue others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def invalid_at(chain: Sequence[x509.Certificate], now: datetime) -> str:
    """Returns which certificate is not valid at this time and why, or an empty string."""
    for certificate in chain:
        if now < certificate.not_valid_before_utc:
            return f"{common_name(certificate)} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} on"
        if now > certificate.not_valid_after_utc:
            return f"{common_name(certificate)} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M}"
    return ""


def not_issued(chain: Sequence[x509.Certificate]) -> str:
    """Returns which certificate is not signed by the next (the last by itself) or may not sign, or an empty string."""
    for child, parent in zip(chain, [*chain[1:], chain[-1]], strict=True):
        if not is_authority(parent):
            return f"{common_name(parent)} is no certificate authority"
        try:
            child.verify_directly_issued_by(parent)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            return f"{common_name(child)} is not signed by {common_name(parent)}"
    return ""


def _readable(certificate: x509.Certificate) -> None:
    """Touches what is parsed lazily, so that a hostile certificate fails here and nowhere later."""
    _ = certificate.extensions, certificate.subject, certificate.issuer, certificate.signature_hash_algorithm
    _ = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    certificate.public_key()
    if certificate.serial_number < 0:
        raise ValueError("a negative serial number")  # no revocation list can name it
