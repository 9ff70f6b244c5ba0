"""Evidence inside an SGX enclave run by Gramine: the files under `/dev/attestation`.

Source: Gramine documentation, "Attestation and Secret Provisioning" (low-level DCAP interface).
Covers: asking for a quote. Does not cover: the manifest, which must set `sgx.remote_attestation = "dcap"`.

Edge cases: Gramine stores report data when the file is closed and pads or cuts it silently, so exactly 64 bytes are
written and the file is closed before the quote is read. The files are shared by all threads: one lock covers both steps.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cloister.attest.evidence import MAX_REPORT_BYTES, Evidence, Kind, require_report_data
from cloister.attest.quote import without_padding
from cloister.errors import AttesterError

DEVICE: Final = Path("/dev/attestation")

_LOCK: Final = threading.Lock()
"""One per process, because there is one set of files per process."""


class GramineAttester:
    """Asks Gramine for SGX quotes. `collateral` returns Intel's statements as JSON (see `attest.sources`)."""

    def __init__(self, collateral: Callable[[], bytes], device: Path = DEVICE) -> None:
        self._collateral = collateral
        self._device = device

    @property
    def kind(self) -> Kind:
        """`sgx`."""
        return Kind.SGX

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns evidence with these 64 bytes bound into it.

        Raises:
            AttesterError: not inside Gramine, attestation is off in the manifest, or the quoting service failed.
        """
        require_report_data(report_data)
        try:
            with _LOCK:
                found = (self._device / "attestation_type").read_bytes().strip(b"\0\n ")
                if found != b"dcap":
                    raise AttesterError(
                        f"Gramine attests by {found.decode('ascii', 'replace')[:20]!r} here.",
                        remedy='Set sgx.remote_attestation = "dcap" in the manifest and run gramine-sgx.',
                    )
                with (self._device / "user_report_data").open("wb", buffering=0) as file:
                    if file.write(report_data) != len(report_data):
                        raise AttesterError("Gramine took only a part of the report data.")
                with (self._device / "quote").open("rb") as file:
                    quote = file.read(MAX_REPORT_BYTES + 1)
        except OSError as error:
            raise AttesterError(
                f"Gramine gave no quote: {error.strerror}.",
                remedy="Check that this runs inside gramine-sgx, and that AESM and the quote provider run on the host.",
            ) from error
        if len(quote) > MAX_REPORT_BYTES or not quote:
            raise AttesterError(f"Gramine gave a quote of {len(quote)} bytes.")
        return Evidence(kind=Kind.SGX, report=without_padding(quote), collateral=self._collateral())
