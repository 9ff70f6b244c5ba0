"""The 1184 bytes of a SEV-SNP attestation report, as fields.

Source: AMD SEV-SNP Firmware ABI specification (56860), table 23; TCB_VERSION in table 3 and, for Turin, table 4.
Covers: offsets and lengths. Does not cover: any check (`attest.snp`). What this returns is unverified.
"""

import struct
from dataclasses import dataclass
from typing import Final

from cloister.attest.policy import SnpTcb
from cloister.errors import EvidenceError, EvidenceUnsupportedError

REPORT_BYTES: Final = 1184
SIGNED_BYTES: Final = 0x2A0
_NUMBER_BYTES: Final = 72
FAMILY_TURIN: Final = 0x1A

_FIELDS: Final = struct.Struct("<IIQ16s16sIIQQII64s48s32s48s48s32s32sQBBB21s64sQ")


@dataclass(frozen=True, kw_only=True)
class SnpReport:
    """An unverified report. TCB versions are the raw 64 bits; `tcb` splits them."""

    version: int = 2
    guest_svn: int = 0
    policy: int = 0x30000
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    vmpl: int = 0
    algorithm: int = 1
    current_tcb: int = 0
    platform_info: int = 0
    flags: int = 0
    report_data: bytes = bytes(64)
    measurement: bytes = bytes(48)
    host_data: bytes = bytes(32)
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)
    report_id: bytes = bytes(32)
    report_id_ma: bytes = bytes(32)
    reported_tcb: int = 0
    cpu_family: int = 0
    cpu_model: int = 0
    cpu_stepping: int = 0
    chip_id: bytes = bytes(64)
    committed_tcb: int = 0

    @staticmethod
    def decode(report: bytes) -> "SnpReport":
        """Returns the fields of a report.

        Raises:
            EvidenceError: not 1184 bytes.
            EvidenceUnsupportedError: a version that this verifier does not know.
        """
        if len(report) != REPORT_BYTES:
            raise EvidenceError(f"A SEV-SNP report has {REPORT_BYTES} bytes, this one {len(report)}.")
        found = _FIELDS.unpack_from(report)
        if found[0] not in (2, 3, 4, 5):
            raise EvidenceUnsupportedError(
                f"A SEV-SNP report of version {found[0]}.", remedy="Versions 2 to 5 are read."
            )
        return SnpReport(
            version=found[0],
            guest_svn=found[1],
            policy=found[2],
            family_id=found[3],
            image_id=found[4],
            vmpl=found[5],
            algorithm=found[6],
            current_tcb=found[7],
            platform_info=found[8],
            flags=found[9],
            report_data=found[11],
            measurement=found[12],
            host_data=found[13],
            id_key_digest=found[14],
            author_key_digest=found[15],
            report_id=found[16],
            report_id_ma=found[17],
            reported_tcb=found[18],
            cpu_family=found[19],
            cpu_model=found[20],
            cpu_stepping=found[21],
            chip_id=found[23],
            committed_tcb=found[24],
        )

    def encode_signed_part(self) -> bytes:
        """Returns the 672 bytes that the signature covers, unused ones zero."""
        return _FIELDS.pack(
            self.version,
            self.guest_svn,
            self.policy,
            self.family_id,
            self.image_id,
            self.vmpl,
            self.algorithm,
            self.current_tcb,
            self.platform_info,
            self.flags,
            0,
            self.report_data,
            self.measurement,
            self.host_data,
            self.id_key_digest,
            self.author_key_digest,
            self.report_id,
            self.report_id_ma,
            self.reported_tcb,
            self.cpu_family,
            self.cpu_model,
            self.cpu_stepping,
            bytes(21),
            self.chip_id,
            self.committed_tcb,
        ).ljust(SIGNED_BYTES, b"\0")

    def tcb(self, raw: int) -> SnpTcb:
        """Returns the components of a TCB version; Turin has another layout, and only reports of version 3 say so."""
        parts = raw.to_bytes(8, "little")
        if self.version >= 3 and self.cpu_family == FAMILY_TURIN:
            return SnpTcb(fmc=parts[0], bootloader=parts[1], tee=parts[2], snp=parts[3], microcode=parts[7])
        return SnpTcb(bootloader=parts[0], tee=parts[1], snp=parts[6], microcode=parts[7])


def signature(report: bytes) -> tuple[int, int]:
    """Returns r and s of a report of 1184 bytes, each 72 bytes in little endian."""
    start, middle = SIGNED_BYTES, SIGNED_BYTES + _NUMBER_BYTES
    return (
        int.from_bytes(report[start:middle], "little"),
        int.from_bytes(report[middle : middle + _NUMBER_BYTES], "little"),
    )


def encode_signature(r: int, s: int) -> bytes:
    """Returns the 512 bytes behind the signed part."""
    return (r.to_bytes(_NUMBER_BYTES, "little") + s.to_bytes(_NUMBER_BYTES, "little")).ljust(
        REPORT_BYTES - SIGNED_BYTES, b"\0"
    )
