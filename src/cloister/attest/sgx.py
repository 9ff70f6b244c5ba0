"""SGX enclaves: what a quote whose signatures are good must say about the enclave itself.

Covers: debug, attributes, MRENCLAVE, MRSIGNER, product and version. Does not cover: signatures and patch levels
(`attest.dcap`), report data (`attest.verify`).
Source: Intel Software Developer's Manual, volume 3D, section 36.7 (attributes).
"""

from datetime import datetime
from typing import Final

from cloister.attest import dcap
from cloister.attest.evidence import Check, Claims, Evidence, Kind
from cloister.attest.findings import Findings
from cloister.attest.policy import SgxPolicy
from cloister.attest.quote import EnclaveReport
from cloister.errors import EvidenceError

INIT: Final = 1 << 0
DEBUG: Final = 1 << 1
MODE64BIT: Final = 1 << 2
_HARMLESS: Final = (1 << 6) | (1 << 7) | (1 << 10)
"""CET, key separation and sharing, asynchronous-exit notification: an enclave may have them or not."""


def examine(
    evidence: Evidence, policy: SgxPolicy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    """Returns what the quote says, and notes every finding. What it says is authentic only if `findings.authentic`."""
    quote, report = dcap.examine(evidence, policy.tcb, now, trusted, findings)
    if not isinstance(quote.body, EnclaveReport):
        raise EvidenceError("The evidence says SGX and holds a TDX quote.")
    body = quote.body
    attributes(body, findings)
    findings.member(Check.MEASUREMENT, "MRENCLAVE", body.mrenclave, policy.mrenclave)
    findings.member(Check.SIGNER, "MRSIGNER", body.mrsigner, policy.mrsigner)
    findings.exactly(Check.PRODUCT, "ISVPRODID", body.product, policy.product)
    findings.least(Check.VERSION, "ISVSVN", body.version, policy.min_version)
    return claims(Kind.SGX, body, report)


def attributes(body: EnclaveReport, findings: Findings) -> None:
    """Notes whether the enclave is closed to debuggers and is an initialised 64-bit enclave without further rights."""
    findings.note(
        Check.DEBUG, not body.flags & DEBUG, "not a debug enclave", "a debug enclave: its host reads all of its memory"
    )
    rest = body.flags & ~_HARMLESS & ~DEBUG
    findings.note(
        Check.ATTRIBUTES,
        rest == INIT | MODE64BIT,
        f"attributes are {body.flags:#x}",
        f"attributes are {body.flags:#x}; an initialised 64-bit enclave without further rights has 0x5",
    )


def claims(kind: Kind, body: EnclaveReport, report: dcap.Report | None) -> Claims:
    """Returns the fields of an enclave report as claims."""
    return Claims(
        kind=kind,
        measurement=body.mrenclave,
        report_data=body.report_data,
        debug=bool(body.flags & DEBUG),
        tcb_status=report.status if report else "unstated",
        version=body.version,
        platform=report.ppid if report else b"",
        details=(
            ("mrsigner", body.mrsigner.hex()),
            ("isvprodid", str(body.product)),
            ("attributes", f"{body.flags:#x}"),
            ("advisories", ", ".join(report.advisories) if report else ""),
        ),
    )
