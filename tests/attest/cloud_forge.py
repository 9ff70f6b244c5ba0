"""A Nitro module and a GPU that sign what real ones never would."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from attest.forge import NOT_HERE, NOW, REPORT_DATA
from cloister.attest import cbor, gpu
from cloister.attest.dcap_pki import certify
from cloister.attest.evidence import Evidence, Kind, Verdict
from cloister.attest.policy import GpuPolicy, NitroPolicy, Policy
from cloister.attest.roots import Roots
from cloister.attest.tpm import bound_bytes
from cloister.attest.verify import verify

WINDOW = (NOW - timedelta(hours=1), NOW + timedelta(hours=2))
PCRS = {0: bytes([1]) * 48, 8: bytes([2]) * 48, 3: bytes(48)}
MILLISECONDS = int(NOW.timestamp() * 1000)


def encode(value: Any) -> bytes:
    """Returns plain CBOR; `cloister.attest.cbor` itself encodes only what a signature needs."""
    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        head = cbor.encode_bytes(b"")  # a byte string's head, from which the integer's is made
        size = next(size for size in (1, 2, 4, 8) if value < 1 << 8 * size)
        return bytes([head[0] & 0x1F | 24 + size.bit_length() - 1]) + value.to_bytes(size, "big")
    if isinstance(value, bytes):
        return cbor.encode_bytes(value)
    if isinstance(value, str):
        return cbor.encode_text(value)
    if isinstance(value, list):
        return cbor.encode_array(*map(encode, value))
    return b"\xbf" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"\xff"


def raw_signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384())))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


@dataclass(frozen=True)
class Aws:
    """A root and one enclave's certificate."""

    root: x509.Certificate
    leaf: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @staticmethod
    def new() -> "Aws":
        root_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
        root = certify("nitro", root_key.public_key(), ("nitro", root_key), WINDOW, path=0)
        return Aws(root, certify("enclave", key.public_key(), ("nitro", root_key), WINDOW), key)

    def payload(self, **changes: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {"module_id": "i-1-enc1", "digest": "SHA384", "timestamp": MILLISECONDS, "pcrs": PCRS}
        fields |= {"certificate": der(self.leaf), "cabundle": [der(self.root)], "public_key": None}
        return fields | {"user_data": REPORT_DATA, "nonce": None} | changes

    def evidence(
        self, payload: bytes | None = None, protected: bytes = bytes.fromhex("a1013822"), **changes: Any
    ) -> Evidence:
        payload = payload or encode(self.payload(**changes))
        signed = encode(["Signature1", protected, b"", payload])
        document = encode([protected, {}, payload, raw_signature(self.key, signed)])
        return Evidence(kind=Kind.NITRO, report=document)

    def verify(self, evidence: Evidence, now: datetime = NOW, **changes: Any) -> Verdict:
        return verify(evidence, self.policy(**changes), now, self.roots)

    @property
    def roots(self) -> Roots:
        return Roots(nitro=frozenset({self.root.fingerprint(hashes.SHA256())}))

    @staticmethod
    def policy(**changes: Any) -> Policy:
        expected: dict[str, Any] = {"pcrs": {0: frozenset({PCRS[0]}), 8: frozenset({PCRS[8]})}, "max_age_seconds": 300}
        return Policy(accept=(NitroPolicy(**(expected | changes)),), report_data=REPORT_DATA)


GPU_RECORD = bytes(range(200))
GPU_MEASUREMENT = hashlib.sha384(GPU_RECORD).digest()
FWID = bytes([5]) * 48
DICE = gpu._SHA384_OID + b"\x04\x30" + FWID


@dataclass(frozen=True)
class Nvidia:
    """A root and one GPU's certificate."""

    root: x509.Certificate
    leaf: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @staticmethod
    def new(dice: bytes = DICE) -> "Nvidia":
        root_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
        root = certify("nvidia", root_key.public_key(), ("nvidia", root_key), WINDOW, path=0)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(root.subject)
            .public_key(key.public_key())
            .serial_number(7)
            .not_valid_before(WINDOW[0])
            .not_valid_after(WINDOW[1])
        )
        if dice:
            builder = builder.add_extension(x509.UnrecognizedExtension(gpu._DICE_TCB, dice), False)
        return Nvidia(root, builder.sign(root_key, hashes.SHA384()), key)

    def report(self, nonce: bytes = bound_bytes(REPORT_DATA), fwid: bytes = FWID, **fields: bytes) -> bytes:
        opaque = {3: b"550.90.07\0", 6: b"\x96\x00", 20: fwid, **{int(key[1:]): value for key, value in fields.items()}}
        encoded = b"".join(k.to_bytes(2, "little") + len(v).to_bytes(2, "little") + v for k, v in opaque.items())
        record = GPU_RECORD
        request = b"\x11\xe0\x01\xff" + nonce + b"\0"
        response = b"\x11\x60\0\0\x01" + len(record).to_bytes(3, "little") + record + bytes(32)
        signed = request + response + len(encoded).to_bytes(2, "little") + encoded
        return signed + raw_signature(self.key, signed)

    def evidence(self, report: bytes | None = None) -> Evidence:
        return Evidence(
            kind=Kind.GPU,
            report=self.report() if report is None else report,
            certificates=(der(self.leaf), der(self.root)),
        )

    def verify(self, evidence: Evidence, **changes: Any) -> Verdict:
        return verify(evidence, self.policy(**changes), NOW, self.roots)

    @property
    def roots(self) -> Roots:
        return Roots(gpu=frozenset({self.root.fingerprint(hashes.SHA256())}))

    @staticmethod
    def policy(**changes: Any) -> Policy:
        expected: dict[str, Any] = {
            "measurement": frozenset({GPU_MEASUREMENT}),
            "driver": frozenset({"550.90.07"}),
            "vbios": frozenset({"9600"}),
            "revocation": NOT_HERE,
        }
        return Policy(accept=(GpuPolicy(**(expected | changes)),), report_data=REPORT_DATA)
