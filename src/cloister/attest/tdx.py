"""TDX virtual machines: what a quote whose signatures are good must say about the virtual machine itself.

Covers: debug, attributes, MRTD, the run-time registers, the configuration. Does not cover: signatures and patch levels
(`attest.dcap`), report data (`attest.verify`), the event log behind the registers: the policy names their final values.
Source: Intel TDX Module ABI specification, sections on TD attributes and XFAM.
"""

from datetime import datetime
from typing import Final

from cloister.attest import dcap
from cloister.attest.evidence import Check, Claims, Evidence, Kind
from cloister.attest.findings import Findings
from cloister.attest.policy import TdxPolicy
from cloister.attest.quote import TdReport
from cloister.errors import EvidenceError

DEBUG: Final = 1 << 0
SEPT_VE_DISABLE: Final = 1 << 28
MIGRATABLE: Final = 1 << 29
PKS: Final = 1 << 30
PERFMON: Final = 1 << 63
_XFAM_ALWAYS: Final = 0x3
"""x87 and SSE state: every 64-bit machine has them."""
_UNTRUSTED: Final = 0xFF
"""The group of attributes that take a TD out of trust: debug and its reserved neighbours."""


def examine(
    evidence: Evidence, policy: TdxPolicy, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> Claims:
    """Returns what the quote says, and notes every finding. What it says is authentic only if `findings.authentic`."""
    quote, report = dcap.examine(evidence, policy.tcb, now, trusted, findings)
    if not isinstance(quote.body, TdReport):
        raise EvidenceError("The evidence says TDX and holds an SGX quote.")
    body = quote.body
    findings.note(
        Check.DEBUG,
        not body.td_attributes & _UNTRUSTED,
        "not a debug TD",
        f"attributes are {body.td_attributes:#x}: a debug TD, whose host reads all of its memory",
    )
    rest = body.td_attributes & ~_UNTRUSTED
    findings.note(
        Check.ATTRIBUTES,
        rest == SEPT_VE_DISABLE and body.xfam & _XFAM_ALWAYS == _XFAM_ALWAYS,
        f"attributes are {body.td_attributes:#x}, XFAM {body.xfam:#x}",
        f"attributes are {body.td_attributes:#x}, XFAM {body.xfam:#x}: SEPT_VE_DISABLE must be set, and migration, "
        "protection keys and performance monitoring must not",
    )
    findings.member(Check.MEASUREMENT, "MRTD", body.mrtd, policy.mrtd)
    for number, (found, accepted) in enumerate(zip(body.rtmr, policy.rtmr, strict=True)):
        findings.member(Check.REGISTERS, f"RTMR{number}", found, accepted)
    findings.member(Check.PRODUCT, "MRCONFIGID", body.mrconfigid, policy.mrconfigid)
    return Claims(
        kind=Kind.TDX,
        measurement=body.mrtd,
        report_data=body.report_data,
        debug=bool(body.td_attributes & _UNTRUSTED),
        tcb_status=report.status if report else "unstated",
        platform=report.ppid if report else b"",
        details=(
            *((f"rtmr{number}", value.hex()) for number, value in enumerate(body.rtmr)),
            ("mrconfigid", body.mrconfigid.hex()),
            ("mrowner", body.mrowner.hex()),
            ("mrseam", body.mrseam.hex()),
            ("attributes", f"{body.td_attributes:#x}"),
            ("advisories", ", ".join(report.advisories) if report else ""),
        ),
    )
