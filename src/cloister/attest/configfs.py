"""Evidence inside a TDX or SEV-SNP virtual machine: the kernel's configfs-tsm reports (Linux 6.7 and newer).

Source: Linux, Documentation/ABI/testing/configfs-tsm-report.
Covers: asking for a report. Does not cover: the right to do so; configfs belongs to root, so a small helper process
should own this reader and hand reports to the service.

Edge cases: `inblob` takes one write of at most 64 bytes. `generation` counts writes by anyone, so that a report made
from somebody else's write in between is noticed; it is then asked for again under a new name.
"""

import errno
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.attest.certificate_table import chain_of
from cloister.attest.evidence import MAX_COLLATERAL_BYTES, MAX_REPORT_BYTES, Evidence, Kind, require_report_data
from cloister.attest.quote import without_padding
from cloister.errors import AttesterError

REPORTS: Final = Path("/sys/kernel/config/tsm/report")
_ATTEMPTS: Final = 5
_PROVIDERS: Final = {"tdx_guest": Kind.TDX, "sev_guest": Kind.SNP}


@dataclass(frozen=True)
class TsmReport:
    """What the kernel answered."""

    kind: Kind
    report: bytes
    auxiliary: bytes
    """SEV-SNP: the host's table of certificates, often empty."""


class ConfigfsAttester:
    """Asks the kernel for TDX quotes or SEV-SNP reports; which of them, the kernel knows.

    `collateral` returns Intel's statements as JSON; `certificates` stand in for AMD's when the host provides none.
    """

    def __init__(
        self,
        collateral: Callable[[], bytes] = bytes,
        certificates: Sequence[bytes] = (),
        reports: Path = REPORTS,
    ) -> None:
        self._collateral = collateral
        self._certificates = tuple(certificates)
        self._reports = reports

    @property
    def kind(self) -> Kind:
        """`tdx` or `snp`, as the kernel says."""
        with _Entry(self._reports) as entry:
            return entry.provider()

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns evidence with these 64 bytes bound into it.

        Raises:
            AttesterError: no such interface, no right to use it, or the host's quoting service failed.
        """
        require_report_data(report_data)
        found = read_report(report_data, self._reports)
        if found.kind is Kind.TDX:
            return Evidence(kind=Kind.TDX, report=without_padding(found.report), collateral=self._collateral())
        chain, revocations = chain_of(found.auxiliary, self._certificates)
        return Evidence(
            kind=Kind.SNP, report=found.report, certificates=chain, collateral=revocations or self._collateral()
        )


def read_report(report_data: bytes, reports: Path = REPORTS) -> TsmReport:
    """Returns a report over these bytes that nobody else's write can have got into.

    Raises:
        AttesterError: see `ConfigfsAttester.evidence`.
    """
    for _ in range(_ATTEMPTS):
        with _Entry(reports) as entry:
            kind = entry.provider()
            before = entry.generation()
            entry.write("inblob", report_data)
            report = entry.read("outblob", MAX_REPORT_BYTES)
            auxiliary = entry.read("auxblob", MAX_COLLATERAL_BYTES) if kind is Kind.SNP else b""
            if entry.generation() == before + 1 and report:
                return TsmReport(kind, report, auxiliary)
    raise AttesterError(
        "Another program keeps writing to the report entries.", remedy="Let one helper process own configfs."
    )


class _Entry:
    """A report entry that exists while the context is open."""

    def __init__(self, reports: Path) -> None:
        self._path = reports / f"cloister-{os.getpid()}-{secrets.token_hex(8)}"

    def __enter__(self) -> "_Entry":
        try:
            self._path.mkdir()
        except OSError as error:
            raise AttesterError(
                f"The kernel offers no report entry under {self._path.parent}: {error.strerror}.",
                remedy="It needs Linux 6.7 in a TDX or SEV-SNP guest, configfs mounted, and root (or the helper that owns it).",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._path.rmdir()

    def provider(self) -> Kind:
        name = self.read("provider", 64).strip().decode("ascii", "replace")
        if name not in _PROVIDERS:
            raise AttesterError(
                f"The kernel's report provider is {name!r}.", remedy="tdx_guest and sev_guest are known."
            )
        return _PROVIDERS[name]

    def generation(self) -> int:
        text = self.read("generation", 64).strip()
        if not text.isdigit():
            raise AttesterError("The kernel's report entry has no generation.")
        return int(text)

    def write(self, name: str, value: bytes) -> None:
        try:
            descriptor = os.open(self._path / name, os.O_WRONLY)
            try:
                written = os.write(descriptor, value)  # one write: the kernel takes each as a whole blob
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._failure(name, error) from error
        if written != len(value):
            raise AttesterError(f"The kernel took {written} of {len(value)} bytes.")

    def read(self, name: str, limit: int) -> bytes:
        try:
            with (self._path / name).open("rb", buffering=0) as file:
                parts, total = [], 0
                while part := file.read(limit + 1 - total):
                    parts.append(part)
                    total += len(part)
        except FileNotFoundError:
            if name == "auxblob":
                return b""
            raise AttesterError(f"The kernel's report entry has no {name}.") from None
        except OSError as error:
            raise self._failure(name, error) from error
        if total > limit:
            raise AttesterError(f"The kernel's {name} is longer than {limit} bytes.")
        return b"".join(parts)

    def _failure(self, name: str, error: OSError) -> AttesterError:
        reasons = {
            errno.EFBIG: "the report is longer than the kernel's buffer",
            errno.EWOULDBLOCK: "another request changed the entry",
            errno.ETIMEDOUT: "the host's quoting service does not answer",
            errno.EBUSY: "the host's quoting service is busy",
        }
        reason = reasons.get(error.errno or 0, error.strerror)
        return AttesterError(f"The kernel gave no report ({name}): {reason}.", remedy="See the host's quoting service.")
