"""Enrolling a TPM's attestation key: which TPM has it, proven by credential activation against the vendor's certificate.

1. The machine shows its endorsement certificate and the public area of its attestation key (`Shown`).
2. The owner checks the certificate against the vendor's authorities, and encrypts a random secret so that only the TPM with
   the certified endorsement key can read it, and only if the named attestation key is loaded in it (`Credential`).
3. The machine lets its TPM decrypt (`attest.tpm_activation`) and answers with the secret.
4. The owner compares. Now the key's name may be enrolled: `Roots.tpm`, or `roots.tpm` in a policy.

Covers: steps 2 and 4. Guarantees: `accept` returns a name only if a TPM whose endorsement key these authorities certify holds
the attestation key of this name, as a restricted signing key that cannot leave it. A challenge is good for one answer.
Assumes: the authorities are the TPM vendor's own, and certify endorsement keys of genuine TPMs alone.
Does not cover: which machine the TPM is in, and what it started (quotes say that); revocation, for which vendors have no
common form. Endorsement keys other than RSA with 2048 bits and P-256, with the standard's default templates.
Source: TCG TPM Library part 1, sections 11.4.10 (KDFs) and 24 (credential protection), annexes B.10.4 and C.6.1; TCG EK
Credential Profile 2.5, sections 3.2 (certificates) and B.3 (templates L-1 and L-2).
"""

import hmac
import os
import struct
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Final, TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from cloister.attest.certificates import invalid_at, is_authority, load_der, not_issued
from cloister.attest.tpm import signs_only_what_it_made
from cloister.attest.tpm_format import ALG_SHA256, PublicArea
from cloister.errors import EvidenceError, EvidenceRefusedError, EvidenceUnsupportedError

SECRET_BYTES: Final = 32
ENDORSEMENT_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.1")
"""The extended key usage of endorsement certificates, `tcg-kp-EKCertificate`."""
MAX_BYTES: Final = 2**17

_IDENTITY: Final = b"IDENTITY\0"

EndorsementKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
Document = TypeVar("Document", bound=msgspec.Struct)

_Part = Annotated[bytes, msgspec.Meta(max_length=2**15)]


class Shown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a machine shows of its TPM. Nothing in it is secret."""

    certificate: _Part
    """Endorsement certificate, DER."""
    public: _Part
    """TPMT_PUBLIC of the attestation key."""

    def encode(self) -> bytes:
        """Returns it as JSON."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(document: bytes) -> "Shown":
        """Returns what a machine showed; raises `EvidenceError` if it is not that."""
        return _decoded(document, Shown)


class Credential(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A secret that one TPM can read: what TPM2_ActivateCredential takes."""

    blob: _Part
    """TPM2B_ID_OBJECT."""
    seed: _Part
    """TPM2B_ENCRYPTED_SECRET."""

    def encode(self) -> bytes:
        """Returns it as JSON."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(document: bytes) -> "Credential":
        """Returns the credential; raises `EvidenceError` if it is none."""
        return _decoded(document, Credential)


class _Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]


class Enrolment:
    """The owner's side of one enrolment: a challenge that was made, and one answer to it."""

    def __init__(self, name: bytes, secret: bytes) -> None:
        """Takes the name of the attestation key and the secret of its challenge; `begin` is the way to get one."""
        self._name = name
        self._secret: bytes | None = secret

    @staticmethod
    def begin(
        shown: Shown,
        authorities: Sequence[x509.Certificate],
        now: datetime,
        random: Callable[[int], bytes] = os.urandom,
    ) -> "tuple[Enrolment, Credential]":
        """Returns an enrolment, and the challenge for the machine, once what the machine shows was checked.

        `authorities` are the vendor's certificates, issuer first, root last, all trusted.

        Raises:
            EvidenceRefusedError: the certificate is not of these authorities, not for an endorsement key, or the attestation
                key could sign what no TPM made.
            EvidenceError, EvidenceUnsupportedError: it cannot be read, or has keys of other types.
        """
        endorsement = endorsement_key(shown.certificate, authorities, now)
        area = PublicArea.decode(shown.public)
        if not signs_only_what_it_made(area):
            raise EvidenceRefusedError(
                f"The attestation key's attributes are {area.attributes:#x}: it could sign what no TPM made, or leave the TPM."
            )
        secret = random(SECRET_BYTES)
        return Enrolment(area.name, secret), make_credential(endorsement, area.name, secret, random)

    def kept(self) -> bytes:
        """Returns what must be kept, in private, until the machine answers."""
        return msgspec.json.encode(_Kept(name=self._name, secret=self._secret or b""))

    @staticmethod
    def resume(document: bytes) -> "Enrolment":
        """Returns the enrolment that was kept; raises `EvidenceError` if it is none. The caller deletes what was kept."""
        found = _decoded(document, _Kept)
        return Enrolment(found.name, found.secret)

    def accept(self, answer: bytes) -> bytes:
        """Returns the name to enrol, if the TPM could read the secret; the challenge is spent either way.

        Raises:
            EvidenceRefusedError: another answer, or a second one.
        """
        secret, self._secret = self._secret, None
        if secret is None or not hmac.compare_digest(secret, answer):
            raise EvidenceRefusedError(
                "The TPM did not read the challenge: its attestation key is not in the TPM of this certificate.",
                remedy="Begin again with what the machine shows now.",
            )
        return self._name


def endorsement_key(certificate: bytes, authorities: Sequence[x509.Certificate], now: datetime) -> EndorsementKey:
    """Returns the endorsement key that a certificate of these authorities is for.

    Raises:
        EvidenceRefusedError: it is not theirs, not valid now, or not for an endorsement key.
        EvidenceError, EvidenceUnsupportedError: it cannot be read, or has a key of another type.
    """
    leaf = load_der(certificate)
    if not authorities:
        raise EvidenceRefusedError("No authority is named.", remedy="Fetch the TPM vendor's certificates.")
    chain = [leaf, *authorities]
    trouble = invalid_at(chain, now) or not_issued(chain)
    if not trouble and (is_authority(leaf) or ENDORSEMENT_USAGE not in _usages(leaf)):
        trouble = "it is not a certificate for an endorsement key"
    if trouble:
        raise EvidenceRefusedError(
            f"The endorsement certificate is refused: {trouble}.", remedy="Name the vendor's authorities, issuer first."
        )
    key = leaf.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size == 2048:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise EvidenceUnsupportedError("The endorsement key is neither RSA with 2048 bits nor on P-256.")


def make_credential(
    endorsement: EndorsementKey, name: bytes, secret: bytes, random: Callable[[int], bytes] = os.urandom
) -> Credential:
    """Returns `secret` (at most 32 bytes), readable by the TPM with this endorsement key for the key with this name alone.

    `name` is the SHA-256 of the public area. Only `random` of RSA's seed can be replaced, for tests; nothing else is random.
    """
    if isinstance(endorsement, rsa.RSAPublicKey):
        seed = random(32)
        oaep = padding.OAEP(padding.MGF1(SHA256()), SHA256(), _IDENTITY)
        encrypted = endorsement.encrypt(seed, oaep)
    else:
        ephemeral = ec.generate_private_key(ec.SECP256R1())
        x, y = _coordinates(ephemeral.public_key())
        info = _IDENTITY + x + _coordinates(endorsement)[0]
        seed = ConcatKDFHash(SHA256(), 32, info).derive(ephemeral.exchange(ec.ECDH(), endorsement))
        encrypted = _sized(x) + _sized(y)
    full_name = struct.pack(">H", ALG_SHA256) + name
    encryptor = Cipher(AES(_kdfa(seed, b"STORAGE", full_name, 16)), CFB(bytes(16))).encryptor()
    hidden = encryptor.update(_sized(secret)) + encryptor.finalize()
    integrity = hmac.digest(_kdfa(seed, b"INTEGRITY", b"", 32), hidden + full_name, "sha256")
    return Credential(blob=_sized(_sized(integrity) + hidden), seed=_sized(encrypted))


def _kdfa(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """Returns KDFa with SHA-256, `size` bytes: NIST SP 800-108 in counter mode."""
    place = CounterLocation.BeforeFixed
    kdf = KBKDFHMAC(SHA256(), Mode.CounterMode, size, 4, 4, place, label=label, context=context, fixed=None)
    return kdf.derive(key)


def _coordinates(key: ec.EllipticCurvePublicKey) -> tuple[bytes, bytes]:
    numbers = key.public_numbers()
    return numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")


def _usages(certificate: x509.Certificate) -> tuple[x509.ObjectIdentifier, ...]:
    try:
        return tuple(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return ()


def _sized(value: bytes) -> bytes:
    return struct.pack(">H", len(value)) + value


def _decoded(document: bytes, kind: type[Document]) -> Document:
    try:
        return msgspec.json.decode(document[: MAX_BYTES + 1], type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise EvidenceError("This is no message of a TPM's enrolment.") from error
