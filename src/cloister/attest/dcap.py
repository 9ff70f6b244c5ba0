"""SGX and TDX quotes under Intel's roof: what every such quote must show, whoever the root is.

Covers: root, chain, revocation, who signed the collateral and until when it holds, the signatures and the patch level
(by `dcap_qvl`), and which patch levels and advisories the policy accepts.
Does not cover: what the enclave is (`attest.sgx`, `attest.tdx`, `attest.sim`).

Guarantees: `dcap_qvl` is never believed alone. It returns `OutOfDate` as a success, takes statements signed by any leaf
under the root, and ignores bytes behind a quote; each of the three is refused here before or after its call. It ends the
whole process on a chain whose names do not fit together: it gets no chain that was not found good here first.
Assumes: the caller's clock. Collateral that is valid but old is accepted unless the policy sets `min_evaluation`.
"""

from dataclasses import dataclass
from datetime import datetime

import dcap_qvl
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attest import collateral as statements_of
from cloister.attest import quote as quotes
from cloister.attest.certificates import fingerprint, invalid_at, load_pem_chain, not_issued
from cloister.attest.evidence import Check, Evidence, Skip
from cloister.attest.findings import Findings
from cloister.attest.policy import IntelTcb
from cloister.errors import EvidenceError


@dataclass(frozen=True)
class Report:
    """What `dcap_qvl` says of a quote whose signatures are good."""

    status: str
    """The word for the whole."""
    statuses: frozenset[str]
    """The words for the whole, the quoting enclave and the platform: the policy must accept each."""
    advisories: tuple[str, ...]
    ppid: bytes


class _Part(msgspec.Struct, frozen=True):
    status: str
    advisory_ids: tuple[str, ...]


class _Answer(msgspec.Struct, frozen=True):
    status: str
    advisory_ids: tuple[str, ...]
    ppid: str
    qe_status: _Part
    platform_status: _Part


def examine(
    evidence: Evidence, tcb: IntelTcb, now: datetime, trusted: frozenset[bytes], findings: Findings
) -> tuple[quotes.Quote, Report | None]:
    """Returns the quote, and what its platform is unless it is forged, and notes every finding on the way.

    Raises:
        EvidenceError, EvidenceUnsupportedError: the quote or its collateral cannot be read.
    """
    quote = quotes.parse(evidence.report)
    statements = statements_of.read(evidence.collateral)
    chain = load_pem_chain(quote.pck_chain)
    tdx = isinstance(quote.body, quotes.TdReport)
    if statements.identity != ("TDX" if tdx else "SGX"):
        raise EvidenceError("The collateral is about another kind of TEE than the quote.")
    findings.passed(Check.FORMAT, f"{'TDX' if tdx else 'SGX'} quote, version {quote.version}")

    roots = {fingerprint(statements.root), fingerprint(chain[-1])}
    findings.note(
        Check.ROOT,
        len(roots) == 1 and roots <= trusted,
        f"the chain ends at {next(iter(roots)).hex()}",
        f"the chain ends at {' and '.join(sorted(root.hex() for root in roots))}, which is not trusted for this kind",
    )
    unfit = _unissued(chain, statements)
    trouble = invalid_at([*chain, *statements.signers[0], *statements.signers[1]], now) or unfit
    findings.note(Check.CHAIN, not trouble, f"{len(chain)} certificates, each signed by the next", trouble)
    trouble = statements_of.revoked(statements, chain)
    findings.note(Check.REVOCATION, not trouble, "no certificate is on a revocation list", trouble)
    trouble = statements_of.wrong_signer(statements)
    findings.note(Check.COLLATERAL_SIGNER, not trouble, "patch levels are signed by the TCB signer", trouble)
    trouble = statements_of.outside_window(statements, now)
    earliest = min(end for _, _, end in statements.windows)
    findings.note(
        Check.COLLATERAL_TIME, not trouble, f"the collateral is valid until {earliest:%Y-%m-%d %H:%M}", trouble
    )
    findings.least(Check.COLLATERAL_VERSION, "the TCB evaluation number", statements.evaluation, tcb.min_evaluation)

    report = None
    if unfit := unfit or _mixed(chain, statements):
        findings.failure(Check.SIGNATURE, f"not tried: {unfit}")
    else:
        report = _library(evidence, statements, now, findings)
    if report is None:
        for check in (Check.TCB, Check.ADVISORIES, Check.PLATFORM):
            findings.skipped(check, "unknown, for the signatures are not good")
    else:
        _tcb(report, tcb, findings)
    return quote, report


def _unissued(chain: list[x509.Certificate], statements: statements_of.Statements) -> str:
    return next(filter(None, map(not_issued, (chain, *statements.signers, statements.list_signers))), "")


def _mixed(chain: list[x509.Certificate], statements: statements_of.Statements) -> str:
    ends = {fingerprint(found[-1]) for found in (chain, *statements.signers, statements.list_signers)}
    return "the chains end at different roots" if len(ends) > 1 else ""


def _library(
    evidence: Evidence, statements: statements_of.Statements, now: datetime, findings: Findings
) -> Report | None:
    root = statements.root.public_bytes(Encoding.DER)
    try:
        collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.collateral.decode())
        verified = dcap_qvl.verify_with_root_ca(evidence.report, collateral, root, int(now.timestamp()))
        answer = msgspec.json.decode(verified.to_json(), type=_Answer)
        parts = (answer, answer.qe_status, answer.platform_status)
        report = Report(
            answer.status,
            frozenset(part.status for part in parts),
            tuple(sorted({advisory for part in parts for advisory in part.advisory_ids})),
            bytes.fromhex(answer.ppid),
        )
    except (ValueError, TypeError, OverflowError) as error:  # the library has no error codes, only texts
        text = " ".join(str(error).split())[:200]
        findings.failure(Check.SIGNATURE, f"the quote does not verify: {text}")
        return None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by Rust code on a bug; it derives from BaseException
            raise
        findings.failure(Check.SIGNATURE, "the quote does not verify: the verifier gave up on it")
        return None
    findings.passed(Check.SIGNATURE, "report, quoting enclave and platform are signed")
    return report


def _tcb(report: Report, tcb: IntelTcb, findings: Findings) -> None:
    accepted = {status.value for status in tcb.statuses}
    findings.note(
        Check.TCB,
        report.statuses <= accepted,
        f"the platform is {' and '.join(sorted(report.statuses))}",
        f"the platform is {' and '.join(sorted(report.statuses))}; the policy accepts {', '.join(sorted(accepted))}",
    )
    if isinstance(tcb.advisories, Skip):
        findings.skipped(Check.ADVISORIES, f"{', '.join(report.advisories) or 'none'}: {tcb.advisories.reason}")
    else:
        open_ones = sorted(set(report.advisories) - tcb.advisories)
        findings.note(
            Check.ADVISORIES,
            not open_ones,
            f"known and accepted: {', '.join(report.advisories) or 'none'}",
            f"open and not accepted: {', '.join(open_ones)}",
        )
    findings.member(Check.PLATFORM, "the platform (PPID)", report.ppid, tcb.platforms)
