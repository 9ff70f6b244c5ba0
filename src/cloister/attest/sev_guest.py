"""Evidence inside a SEV-SNP virtual machine without configfs-tsm: the ioctl of `/dev/sev-guest` (Linux 5.19 and newer).

Source: Linux, include/uapi/linux/sev-guest.h and Documentation/virt/coco/sev-guest.rst.
Covers: `SNP_GET_EXT_REPORT`, which returns the report with the host's certificates. Does not cover: derived keys.
TDX has no such way out: the ioctl of `/dev/tdx_guest` returns a report that only the same machine can check.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cloister.attest.certificate_table import chain_of
from cloister.attest.evidence import Evidence, Kind, require_report_data
from cloister.attest.snp_report import REPORT_BYTES
from cloister.errors import AttesterError

DEVICE: Final = Path("/dev/sev-guest")
SNP_GET_EXT_REPORT: Final = 0xC0205302
_RESPONSE_BYTES: Final = 4000
_HEADER_BYTES: Final = 32
_CERTIFICATE_BYTES: Final = 4 * 4096
_MAX_CERTIFICATE_BYTES: Final = 2**20
_VMM_INVALID_LENGTH: Final = 1


class ReportRequest(ctypes.Structure):
    """`struct snp_report_req`."""

    _fields_ = (("user_data", ctypes.c_uint8 * 64), ("vmpl", ctypes.c_uint32), ("reserved", ctypes.c_uint8 * 28))


class ExtendedRequest(ctypes.Structure):
    """`struct snp_ext_report_req`."""

    _fields_ = (("data", ReportRequest), ("certs_address", ctypes.c_uint64), ("certs_len", ctypes.c_uint32))


class GuestRequest(ctypes.Structure):
    """`struct snp_guest_request_ioctl`."""

    _fields_ = (
        ("msg_version", ctypes.c_uint8),
        ("req_data", ctypes.c_uint64),
        ("resp_data", ctypes.c_uint64),
        ("fw_error", ctypes.c_uint32),
        ("vmm_error", ctypes.c_uint32),
    )


class SevGuestAttester:
    """Asks the SEV guest device for reports; `certificates` stand in for the chain when the host provides none."""

    def __init__(self, certificates: Sequence[bytes] = (), revocations: bytes = b"", device: Path = DEVICE) -> None:
        self._certificates = tuple(certificates)
        self._revocations = revocations
        self._device = device

    @property
    def kind(self) -> Kind:
        """`snp`."""
        return Kind.SNP

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns evidence with these 64 bytes bound into it.

        Raises:
            AttesterError: no such device, no right to use it, the firmware refused, or no certificates.
        """
        require_report_data(report_data)
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise AttesterError(
                f"{self._device} cannot be opened: {error.strerror}.", remedy="This needs a SEV-SNP guest and root."
            ) from error
        try:
            report, table = _request(descriptor, report_data)
        finally:
            os.close(descriptor)
        chain, revocations = chain_of(table, self._certificates)
        return Evidence(kind=Kind.SNP, report=report, certificates=chain, collateral=revocations or self._revocations)


def _request(descriptor: int, report_data: bytes) -> tuple[bytes, bytes]:
    room = _CERTIFICATE_BYTES
    for _ in range(2):
        table = ctypes.create_string_buffer(room)
        response = ctypes.create_string_buffer(_RESPONSE_BYTES)
        request = ExtendedRequest()
        request.data.user_data[:] = report_data
        request.certs_address = ctypes.addressof(table)
        request.certs_len = room
        guest = GuestRequest(1, ctypes.addressof(request), ctypes.addressof(response), 0, 0)
        try:
            fcntl.ioctl(descriptor, SNP_GET_EXT_REPORT, guest)
        except OSError as error:
            wanted = int(request.certs_len)
            short = error.errno == errno.ENOSPC or guest.vmm_error == _VMM_INVALID_LENGTH
            if short and room < wanted <= _MAX_CERTIFICATE_BYTES:
                room = wanted
                continue
            raise AttesterError(
                f"The SEV firmware gave no report: {error.strerror} (firmware {guest.fw_error:#x}, host {guest.vmm_error:#x})."
            ) from error
        status, size = int.from_bytes(response.raw[:4], "little"), int.from_bytes(response.raw[4:8], "little")
        if status or size != REPORT_BYTES:
            raise AttesterError(f"The SEV firmware answered status {status:#x} and {size} bytes.")
        return response.raw[_HEADER_BYTES : _HEADER_BYTES + REPORT_BYTES], table.raw
    raise AttesterError("The host's certificate table keeps growing.")
