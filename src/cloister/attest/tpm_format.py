"""The structures of TPM 2.0 that a quote consists of: parsed strictly.

Source: TCG Trusted Platform Module Library, part 2 (structures), revision 1.59: TPMS_ATTEST 10.12.8, TPMT_SIGNATURE
11.3.4, TPMT_PUBLIC 12.2.4. All numbers are big endian.
Covers: lengths and tags. Does not cover: any check (`attest.tpm`). What this returns is unverified.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.errors import EvidenceError, EvidenceUnsupportedError

MAGIC: Final = 0xFF544347
ST_ATTEST_QUOTE: Final = 0x8018
ALG_RSA: Final = 0x0001
ALG_SHA256: Final = 0x000B
ALG_NULL: Final = 0x0010
ALG_RSASSA: Final = 0x0014
ALG_RSAPSS: Final = 0x0016
ALG_ECDSA: Final = 0x0018
ALG_ECC: Final = 0x0023
ECC_P256: Final = 0x0003

FIXED_TPM: Final = 1 << 1
FIXED_PARENT: Final = 1 << 4
SENSITIVE_ORIGIN: Final = 1 << 5
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18


class Reader:
    """Takes big-endian numbers and sized fields from bytes, and says so when they end early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        """Returns the next `size` bytes."""
        if size > len(self._data) - self._at:
            raise EvidenceError("A TPM structure ends early.")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        """Returns the next number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """Returns the next field that begins with its length in two bytes."""
        return self.take(self.number(2))

    def end(self) -> None:
        """Raises unless everything was taken."""
        if self._at != len(self._data):
            raise EvidenceError(f"{len(self._data) - self._at} bytes follow a TPM structure.")


@dataclass(frozen=True, kw_only=True)
class Attest:
    """TPMS_ATTEST of a quote."""

    magic: int
    kind: int
    signer: bytes
    """Qualified name of the key that signed."""
    extra_data: bytes
    """What the caller bound into the quote."""
    resets: int
    restarts: int
    safe: bool
    """Whether the clock has not run backwards."""
    firmware: int
    selection: tuple[int, ...]
    """Numbers of the SHA-256 registers that are quoted."""
    digest: bytes

    @staticmethod
    def decode(attest: bytes) -> "Attest":
        """Returns the fields.

        Raises:
            EvidenceError: truncated, or trailing bytes.
            EvidenceUnsupportedError: registers of another bank than SHA-256.
        """
        reader = Reader(attest)
        magic, kind = reader.number(4), reader.number(2)
        if kind != ST_ATTEST_QUOTE:  # checked here, for the rest has another shape otherwise
            raise EvidenceError(f"A TPM signed a structure of type {kind:#x}, not a quote.")
        signer, extra = reader.sized(), reader.sized()
        reader.take(8)  # clock
        resets, restarts, safe = reader.number(4), reader.number(4), reader.number(1)
        firmware, selections = reader.number(8), reader.number(4)
        if selections != 1:
            raise EvidenceUnsupportedError(
                f"A TPM quote over {selections} banks.", remedy="Quote the SHA-256 bank alone."
            )
        bank, mask = reader.number(2), reader.take(reader.number(1))
        if bank != ALG_SHA256 or len(mask) > 3:
            raise EvidenceUnsupportedError("A TPM quote over another bank.", remedy="Quote the SHA-256 bank alone.")
        selected = tuple(bit for bit in range(8 * len(mask)) if mask[bit // 8] >> bit % 8 & 1)
        digest = reader.sized()
        reader.end()
        return Attest(
            magic=magic,
            kind=kind,
            signer=signer,
            extra_data=extra,
            resets=resets,
            restarts=restarts,
            safe=bool(safe),
            firmware=firmware,
            selection=selected,
            digest=digest,
        )


@dataclass(frozen=True)
class PublicArea:
    """TPMT_PUBLIC of an attestation key."""

    attributes: int
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    name: bytes
    """SHA-256 of the encoded area: what an owner enrols (the TPM's name without its algorithm)."""

    @staticmethod
    def decode(area: bytes) -> "PublicArea":
        """Returns the key and its attributes.

        Raises:
            EvidenceError: truncated, trailing bytes, or no point on the curve.
            EvidenceUnsupportedError: another key type than P-256 or RSA with SHA-256 names.
        """
        reader = Reader(area)
        kind, name_hash, attributes = reader.number(2), reader.number(2), reader.number(4)
        reader.sized()  # policy
        if name_hash != ALG_SHA256 or kind not in (ALG_ECC, ALG_RSA):
            raise EvidenceUnsupportedError("An attestation key of another type than P-256 or RSA.")
        if reader.number(2) != ALG_NULL:
            raise EvidenceUnsupportedError("The key is a storage key, not an attestation key.")
        if reader.number(2) != ALG_NULL:  # the scheme, followed by its hash
            reader.number(2)
        key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
        try:
            if kind == ALG_ECC:
                if reader.number(2) != ECC_P256 or reader.number(2) != ALG_NULL:
                    raise EvidenceUnsupportedError("An attestation key on another curve than P-256.")
                x, y = (int.from_bytes(reader.sized(), "big") for _ in range(2))
                key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
            else:
                reader.number(2)  # bits
                exponent = reader.number(4) or 65537
                key = rsa.RSAPublicNumbers(exponent, int.from_bytes(reader.sized(), "big")).public_key()
                if not 2048 <= key.key_size <= 4096:
                    raise EvidenceUnsupportedError(f"An RSA attestation key of {key.key_size} bits.")
        except (ValueError, UnsupportedAlgorithm) as error:
            raise EvidenceError("The attestation key is not a valid key.") from error
        reader.end()
        return PublicArea(attributes, key, hashlib.sha256(area).digest())


def split_quote(answer: bytes) -> tuple[bytes, bytes]:
    """Returns attest and signature of the answer to TPM2_Quote: TPM2B_ATTEST, then TPMT_SIGNATURE."""
    reader = Reader(answer)
    attest = reader.sized()
    return attest, answer[2 + len(attest) :]


def signature_holds(area: PublicArea, attest: bytes, signature: bytes) -> bool:
    """Returns whether a TPMT_SIGNATURE over `attest` is by this key.

    Raises:
        EvidenceError, EvidenceUnsupportedError: it cannot be read, or uses another algorithm.
    """
    reader = Reader(signature)
    scheme, digest = reader.number(2), reader.number(2)
    if digest != ALG_SHA256:
        raise EvidenceUnsupportedError("A TPM signature over another hash than SHA-256.")
    try:
        if isinstance(area.key, ec.EllipticCurvePublicKey):
            if scheme != ALG_ECDSA:
                raise EvidenceUnsupportedError(f"A TPM signature of scheme {scheme:#x}.")
            r, s = (int.from_bytes(reader.sized(), "big") for _ in range(2))
            reader.end()
            area.key.verify(encode_dss_signature(r, s), attest, ec.ECDSA(SHA256()))
        else:
            blob = reader.sized()
            reader.end()
            if scheme == ALG_RSASSA:
                area.key.verify(blob, attest, padding.PKCS1v15(), SHA256())
            elif scheme == ALG_RSAPSS:
                scheme_of = padding.PSS(padding.MGF1(SHA256()), padding.PSS.AUTO)
                area.key.verify(blob, attest, scheme_of, SHA256())
            else:
                raise EvidenceUnsupportedError(f"A TPM signature of scheme {scheme:#x}.")
    except InvalidSignature:
        return False
    return True
