"""A TPM that signs what a real one never would."""

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from attest.forge import REPORT_DATA
from cloister.attest import tpm_format
from cloister.attest.evidence import Evidence, Kind
from cloister.attest.roots import Roots
from cloister.attest.tpm import TpmCollateral, bound_bytes

PCRS = {0: bytes(32), 12: bytes([1]) * 32}
GOOD_ATTRIBUTES = tpm_format.FIXED_TPM | tpm_format.FIXED_PARENT | tpm_format.SENSITIVE_ORIGIN
GOOD_ATTRIBUTES |= tpm_format.RESTRICTED | tpm_format.SIGN | 1 << 6


def sized(value: bytes) -> bytes:
    return struct.pack(">H", len(value)) + value


@dataclass(frozen=True)
class FakeTpm:
    """Signs what a real TPM never would."""

    key: ec.EllipticCurvePrivateKey

    def public(self, attributes: int = GOOD_ATTRIBUTES) -> bytes:
        numbers = self.key.public_key().public_numbers()
        head = (
            struct.pack(">HHI", 0x23, 0x0B, attributes) + sized(b"") + struct.pack(">HHHHH", 0x10, 0x18, 0x0B, 3, 0x10)
        )
        return head + sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big"))

    def attest(self, pcrs: dict[int, bytes] | None = None, **changes: Any) -> bytes:
        pcrs = PCRS if pcrs is None else pcrs
        f: dict[str, Any] = {
            "magic": 0xFF544347,
            "kind": 0x8018,
            "extra": bound_bytes(REPORT_DATA),
            "safe": 1,
            "resets": 5,
        }
        f |= {"banks": 1, "bank": 0x0B, "digest": hashlib.sha256(b"".join(pcrs[n] for n in sorted(pcrs))).digest()}
        f |= changes
        mask = sum(1 << number for number in pcrs).to_bytes(3, "little")
        return (
            struct.pack(">IH", f["magic"], f["kind"])
            + sized(b"\0\x0b" + bytes(32))
            + sized(f["extra"])
            + struct.pack(">QIIBQ", 1000, f["resets"], 1, f["safe"], 0x77)
            + struct.pack(">IHB", f["banks"], f["bank"], 3)
            + mask
            + sized(f["digest"])
        )

    def evidence(
        self,
        attest: bytes | None = None,
        pcrs: dict[int, bytes] | None = None,
        public: bytes | None = None,
        certificates: tuple[bytes, ...] = (),
    ) -> Evidence:
        attest = attest or self.attest()
        r, s = decode_dss_signature(self.key.sign(attest, ec.ECDSA(hashes.SHA256())))
        signature = struct.pack(">HH", 0x18, 0x0B) + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))
        values = {str(number): value for number, value in (PCRS if pcrs is None else pcrs).items()}
        collateral = TpmCollateral(public=public or self.public(), pcrs=values)
        return Evidence(
            kind=Kind.TPM, report=sized(attest) + signature, collateral=collateral.encode(), certificates=certificates
        )

    @property
    def roots(self) -> Roots:
        return Roots(tpm=frozenset({hashlib.sha256(self.public()).digest()}))
