"""The bytes of SGX and TDX quotes, versions 3 to 5, as fields: parsed strictly and built.

Source: Intel SGX ECDSA QuoteLibraryReference DCAP API, appendix A (quote v3), and Intel TDX DCAP Quoting Library API,
appendix A.3 (v4) and A.4 (v5).

Covers: lengths and offsets. Every length must fit exactly; bytes behind the signature data are refused, because they
are signed by nobody and make two different byte strings of one quote.
Does not cover: any signature (`attest.dcap`). What this returns is unverified.
"""

import struct
from dataclasses import dataclass
from typing import Final

from cloister.errors import EvidenceError, EvidenceUnsupportedError

TEE_SGX: Final = 0x00
TEE_TDX: Final = 0x81
ECDSA_P256: Final = 2
QE_VENDOR_INTEL: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

HEADER_BYTES: Final = 48
ENCLAVE_REPORT_BYTES: Final = 384
TD_REPORT_BYTES: Final = 584
TD_REPORT_15_BYTES: Final = 648

CERT_PEM_CHAIN: Final = 5
CERT_QE_REPORT: Final = 6

_HEADER: Final = struct.Struct("<HHIHH16s20s")
_ENCLAVE: Final = struct.Struct("<16sI12s16sQQ32s32s32s32s64sHHH42s16s64s")
_TD: Final = struct.Struct("<16s48s48sQQQ48s48s48s48s48s48s48s48s64s")


@dataclass(frozen=True, kw_only=True)
class EnclaveReport:
    """The body of an SGX quote (384 bytes). Reserved bytes are kept, for they are signed."""

    cpusvn: bytes = bytes(16)
    miscselect: int = 0
    ext_product: bytes = bytes(16)
    flags: int = 0x05
    xfrm: int = 0xE7
    mrenclave: bytes = bytes(32)
    mrsigner: bytes = bytes(32)
    config_id: bytes = bytes(64)
    product: int = 0
    version: int = 0
    config_version: int = 0
    family: bytes = bytes(16)
    report_data: bytes = bytes(64)

    def encode(self) -> bytes:
        """Returns the 384 bytes."""
        return _ENCLAVE.pack(
            self.cpusvn,
            self.miscselect,
            bytes(12),
            self.ext_product,
            self.flags,
            self.xfrm,
            self.mrenclave,
            bytes(32),
            self.mrsigner,
            bytes(32),
            self.config_id,
            self.product,
            self.version,
            self.config_version,
            bytes(42),
            self.family,
            self.report_data,
        )

    @staticmethod
    def decode(body: bytes) -> "EnclaveReport":
        """Returns the fields of exactly 384 bytes."""
        fields = _ENCLAVE.unpack(body)
        return EnclaveReport(
            cpusvn=fields[0],
            miscselect=fields[1],
            ext_product=fields[3],
            flags=fields[4],
            xfrm=fields[5],
            mrenclave=fields[6],
            mrsigner=fields[8],
            config_id=fields[10],
            product=fields[11],
            version=fields[12],
            config_version=fields[13],
            family=fields[15],
            report_data=fields[16],
        )


@dataclass(frozen=True, kw_only=True)
class TdReport:
    """The body of a TDX quote (584 bytes, or 648 with the fields of TDX 1.5 behind)."""

    tee_tcb_svn: bytes = bytes(16)
    mrseam: bytes = bytes(48)
    mrsignerseam: bytes = bytes(48)
    seam_attributes: int = 0
    td_attributes: int = 1 << 28
    xfam: int = 0x61AE7
    mrtd: bytes = bytes(48)
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)
    rtmr: tuple[bytes, bytes, bytes, bytes] = (bytes(48),) * 4
    report_data: bytes = bytes(64)
    tdx_15: bytes = b""
    """TEE_TCB_SVN_2 (16 bytes) and MRSERVICETD (48 bytes) of a TD report 1.5, or nothing."""

    def encode(self) -> bytes:
        """Returns the 584 or 648 bytes."""
        return (
            _TD.pack(
                self.tee_tcb_svn,
                self.mrseam,
                self.mrsignerseam,
                self.seam_attributes,
                self.td_attributes,
                self.xfam,
                self.mrtd,
                self.mrconfigid,
                self.mrowner,
                self.mrownerconfig,
                *self.rtmr,
                self.report_data,
            )
            + self.tdx_15
        )

    @staticmethod
    def decode(body: bytes) -> "TdReport":
        """Returns the fields of exactly 584 or 648 bytes."""
        fields = _TD.unpack(body[:TD_REPORT_BYTES])
        return TdReport(
            tee_tcb_svn=fields[0],
            mrseam=fields[1],
            mrsignerseam=fields[2],
            seam_attributes=fields[3],
            td_attributes=fields[4],
            xfam=fields[5],
            mrtd=fields[6],
            mrconfigid=fields[7],
            mrowner=fields[8],
            mrownerconfig=fields[9],
            rtmr=(fields[10], fields[11], fields[12], fields[13]),
            report_data=fields[14],
            tdx_15=body[TD_REPORT_BYTES:],
        )


@dataclass(frozen=True)
class Quote:
    """An unverified quote."""

    version: int
    body: EnclaveReport | TdReport
    qe_report: EnclaveReport
    pck_chain: bytes
    """PEM certificates of the platform, leaf first."""


def parse(quote: bytes) -> Quote:
    """Returns the fields of a quote.

    Raises:
        EvidenceError: truncated, trailing bytes, or a length that contradicts another.
        EvidenceUnsupportedError: a version, key type or certificate form that this verifier does not know.
    """
    cursor = _Cursor(quote)
    version, key_type, tee, _qe_svn, _pce_svn, vendor, _user = _HEADER.unpack(cursor.take(HEADER_BYTES))
    if version not in (3, 4, 5):
        raise EvidenceUnsupportedError(f"A quote of version {version}.", remedy="Versions 3, 4 and 5 are verified.")
    if key_type != ECDSA_P256 or vendor != QE_VENDOR_INTEL:
        raise EvidenceUnsupportedError("The quote was not signed by Intel's ECDSA quoting enclave.")
    if version == 3:
        tee = TEE_SGX  # these bytes are reserved in version 3
    body = _body(cursor, version, tee)
    auth = _Cursor(cursor.take(cursor.number(4)))
    cursor.end("the signature data")
    auth.take(64 + 64)  # signature over header and body, attestation key
    if version > 3:
        if (kind := auth.number(2)) != CERT_QE_REPORT:
            raise EvidenceUnsupportedError(f"Certification data of type {kind} around the quoting enclave's report.")
        nested = _Cursor(auth.take(auth.number(4)))
        auth.end("the certification data")
        auth = nested
    qe_report = EnclaveReport.decode(auth.take(ENCLAVE_REPORT_BYTES))
    auth.take(64)  # signature over the quoting enclave's report
    auth.take(auth.number(2))  # its authentication data
    if (kind := auth.number(2)) != CERT_PEM_CHAIN:
        raise EvidenceUnsupportedError(
            f"Certification data of type {kind}.",
            remedy="Configure the quote provider to embed the PCK chain (type 5).",
        )
    chain = auth.take(auth.number(4))
    auth.end("the certificates")
    return Quote(version, body, qe_report, chain.rstrip(b"\0"))


def _body(cursor: "_Cursor", version: int, tee: int) -> EnclaveReport | TdReport:
    if version == 5:
        kind, size = cursor.number(2), cursor.number(4)
        sizes = {2: TD_REPORT_BYTES, 3: TD_REPORT_15_BYTES}
        if kind not in sizes:
            raise EvidenceUnsupportedError(
                f"A version 5 quote with a body of type {kind}.", remedy="TD reports are read."
            )
        if sizes[kind] != size or tee != TEE_TDX:
            raise EvidenceError("The quote's body is not of the size or the TEE that its header says.")
        return TdReport.decode(cursor.take(size))
    if tee == TEE_SGX:
        return EnclaveReport.decode(cursor.take(ENCLAVE_REPORT_BYTES))
    if tee == TEE_TDX:
        return TdReport.decode(cursor.take(TD_REPORT_BYTES))
    raise EvidenceUnsupportedError(f"A quote of TEE type {tee:#x}.")


def without_padding(quote: bytes) -> bytes:
    """Returns a quote without the zeros that quote providers put behind it; for readers, never for verifiers.

    Anything but zeros is left where it is, so that `parse` refuses it.
    """
    length_at = HEADER_BYTES + ENCLAVE_REPORT_BYTES
    version, tee = int.from_bytes(quote[:2], "little"), int.from_bytes(quote[4:8], "little")
    if version == 4 and tee == TEE_TDX:
        length_at = HEADER_BYTES + TD_REPORT_BYTES
    elif version == 5:
        length_at = HEADER_BYTES + 6 + int.from_bytes(quote[HEADER_BYTES + 2 : HEADER_BYTES + 6], "little")
    end = length_at + 4 + int.from_bytes(quote[length_at : length_at + 4], "little")
    return quote if quote[end:].strip(b"\0") else quote[:end]


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise EvidenceError(f"The quote ends {size - len(self._data) + self._at} bytes early.")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def end(self, what: str) -> None:
        if self._at != len(self._data):
            raise EvidenceError(f"{len(self._data) - self._at} bytes follow {what}; nobody signed them.")
