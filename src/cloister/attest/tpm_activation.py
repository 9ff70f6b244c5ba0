"""The machine's side of enrolling its attestation key: what it shows of its TPM, and reading the owner's challenge.

Source: TCG TPM Library part 3: StartAuthSession 11.1, ActivateCredential 12.5, PolicySecret 23.4, NV_ReadPublic 31.6, NV_Read
31.13; TCG EK Credential Profile 2.5: certificate indices (2.2.1.4), default templates L-1 and L-2 (B.3.3, B.3.4).
Covers: RSA (2048 bits) and P-256 endorsement keys with the default templates. Does not cover: any decision, which is the
owner's (`attest.tpm_enrolment`).
"""

import struct
from pathlib import Path
from typing import Final

from cloister.attest import tpm_format as f
from cloister.attest.tpm_client import (
    PASSWORD,
    RH_ENDORSEMENT,
    RS_PASSWORD,
    ST_NO_SESSIONS,
    ST_SESSIONS,
    TpmClient,
    sized,
)
from cloister.attest.tpm_enrolment import Credential, Shown
from cloister.errors import AttesterError, EvidenceError

_RH_NULL: Final = 0x40000007
_CC_ACTIVATE_CREDENTIAL: Final = 0x147
_CC_NV_READ: Final = 0x14E
_CC_POLICY_SECRET: Final = 0x151
_CC_NV_READ_PUBLIC: Final = 0x169
_CC_START_AUTH_SESSION: Final = 0x176
_POLICY_SESSION: Final = 1
_NV_PIECE: Final = 512
_MAX_CERTIFICATE_BYTES: Final = 4096

_ATTRIBUTES: Final = f.FIXED_TPM | f.FIXED_PARENT | f.SENSITIVE_ORIGIN | 1 << 7 | f.RESTRICTED | f.DECRYPT
_POLICY: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret of the endorsement hierarchy: the default templates' condition for use."""
_AES_128_CFB: Final = struct.pack(">HHH", 0x0006, 128, 0x0043)


def _template(kind: int, parameters: bytes, unique: bytes) -> bytes:
    return struct.pack(">HHI", kind, f.ALG_SHA256, _ATTRIBUTES) + sized(_POLICY) + _AES_128_CFB + parameters + unique


TEMPLATES: Final = (
    (0x01C00002, _template(f.ALG_RSA, struct.pack(">HHI", f.ALG_NULL, 2048, 0), sized(bytes(256)))),
    (0x01C0000A, _template(f.ALG_ECC, struct.pack(">HHH", f.ALG_NULL, f.ECC_P256, f.ALG_NULL), sized(bytes(32)) * 2)),
)
"""Where a TPM keeps a certificate, and the template of the key that it certifies."""


def show(path: Path) -> Shown:
    """Returns what the machine shows of the TPM at `path`: its first endorsement certificate, and its attestation key.

    Raises:
        AttesterError: no TPM, or it has no endorsement certificate of a kind that is known here.
    """
    with TpmClient(path) as tpm:
        certificate = next((found for index, _ in TEMPLATES if (found := _certificate(tpm, index))), b"")
        if not certificate:
            raise AttesterError(
                "The TPM holds no endorsement certificate (RSA 2048 or P-256).",
                remedy="Enrol its attestation key by name, in person; or have its vendor certify it.",
            )
        handle, public = tpm.create_attestation_key()
        tpm.flush(handle)
    return Shown(certificate=certificate, public=public)


def activate(path: Path, credential: Credential) -> bytes:
    """Returns the secret that the owner sent to the TPM at `path`.

    Raises:
        AttesterError: the credential is not for this TPM and its attestation key.
    """
    with TpmClient(path) as tpm:
        refusal: AttesterError | None = None
        for index, template in TEMPLATES:
            if not _certificate(tpm, index):
                continue
            endorsement, _ = tpm.create_primary(template)
            try:
                attestation, _ = tpm.create_attestation_key()
                try:
                    return _activated(tpm, attestation, endorsement, credential)
                except AttesterError as error:
                    refusal = error
                finally:
                    tpm.flush(attestation)
            finally:
                tpm.flush(endorsement)
    raise AttesterError("The challenge is not for this TPM and its attestation key.") from refusal


def _activated(tpm: TpmClient, attestation: int, endorsement: int, credential: Credential) -> bytes:
    session = _policy_session(tpm)
    try:
        secret = struct.pack(">II", RH_ENDORSEMENT, session) + PASSWORD + sized(b"") * 3 + bytes(4)
        tpm.command(ST_SESSIONS, _CC_POLICY_SECRET, secret)
        by_password = struct.pack(">IHBH", RS_PASSWORD, 0, 0, 0)
        by_policy = struct.pack(">IHBH", session, 0, 1, 0)  # kept until it is flushed below
        both = by_password + by_policy
        body = struct.pack(">III", attestation, endorsement, len(both)) + both + credential.blob + credential.seed
        reader = f.Reader(tpm.command(ST_SESSIONS, _CC_ACTIVATE_CREDENTIAL, body))
        try:
            reader.number(4)  # size of the parameters
            return reader.sized()
        except EvidenceError as error:
            raise AttesterError("The TPM's answer cannot be read.") from error
    finally:
        tpm.flush(session)


def _policy_session(tpm: TpmClient) -> int:
    body = struct.pack(">II", _RH_NULL, _RH_NULL) + sized(bytes(16)) + sized(b"")
    body += struct.pack(">BHH", _POLICY_SESSION, f.ALG_NULL, f.ALG_SHA256)
    return int.from_bytes(tpm.command(ST_NO_SESSIONS, _CC_START_AUTH_SESSION, body)[:4], "big")


def _certificate(tpm: TpmClient, index: int) -> bytes:
    """Returns the certificate at an index, or nothing where there is none."""
    try:
        reader = f.Reader(tpm.command(ST_NO_SESSIONS, _CC_NV_READ_PUBLIC, struct.pack(">I", index)))
        area = f.Reader(reader.sized())
        area.take(4 + 2 + 4)  # index, hash, attributes
        area.sized()  # policy
        size = min(area.number(2), _MAX_CERTIFICATE_BYTES)
        content = b""
        while len(content) < size:
            take = min(_NV_PIECE, size - len(content))
            body = struct.pack(">II", index, index) + PASSWORD + struct.pack(">HH", take, len(content))
            piece = f.Reader(tpm.command(ST_SESSIONS, _CC_NV_READ, body))
            piece.number(4)
            content += piece.sized()
    except (AttesterError, EvidenceError):
        return b""
    return _without_padding(content)


def _without_padding(content: bytes) -> bytes:
    """Returns a DER structure without what follows it: indices are often larger than their certificate."""
    if len(content) < 4 or content[:2] != b"\x30\x82":
        return content
    return content[: 4 + int.from_bytes(content[2:4], "big")]
