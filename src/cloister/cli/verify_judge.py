"""How `cloister verify` judges: the policy of a file or of the command line, and what is added to a verdict."""

from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.cli.verify_inputs import Question
from cloister.errors import EvidenceError, EvidenceUnsupportedError, SettingsError

if TYPE_CHECKING:
    from cloister.attest.evidence import Claims, Evidence, Factor, Kind, Result, Skip, Verdict
    from cloister.attest.policy_file import Expectations
    from cloister.attest.receipt import ReceiptFactor, ReceiptVerdict, Statement

ANY = "any"


@dataclass(frozen=True)
class Expected:
    """What the command line says about expectations."""

    policy: Path | None = None
    measurements: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    report_data: bytes | None = None
    request: bytes | None = None
    """The request that a receipt must be about."""
    response: bytes | None = None
    """The response that a receipt must be about."""
    model_roots: frozenset[bytes] | None = None
    """Identities of sealed models, one of which must be served."""


@dataclass(frozen=True)
class Report:
    """What came of it, to be shown."""

    kind: "Kind | None"
    result: "Result"
    factors: "tuple[Factor | ReceiptFactor, ...]"
    claims: "Claims | None"
    statement: "Statement | None" = None
    """What a good receipt states."""

    @staticmethod
    def of(verdict: "Verdict") -> "Report":
        """Returns a verdict as it is."""
        return Report(verdict.kind, verdict.result, verdict.factors, verdict.claims)

    @staticmethod
    def of_receipt(verdict: "ReceiptVerdict") -> "Report":
        """Returns a verdict on a receipt as it is."""
        from cloister.attest.evidence import Result

        found = verdict.evidence
        factors: tuple[Factor | ReceiptFactor, ...] = (*found.factors, *verdict.own_factors)
        statement = verdict.statement if verdict.result is Result.ACCEPTED else None
        return Report(found.kind, verdict.result, factors, found.claims, statement)


def judge(question: Question, expected: Expected, now: datetime) -> Report:
    """Returns what comes of a question at this time.

    Raises:
        SettingsError: the policy or an option cannot be used.
    """
    from cloister.attest.evidence import Outcome, Result
    from cloister.attest.receipt import model_factor, verify_receipt
    from cloister.attest.verify import verify as decide

    expectations = _expectations(question, expected)
    verdict = decide(question.evidence, expectations.policy, now, expectations.roots)
    factors: list[Factor | ReceiptFactor] = list(verdict.factors)
    if expected.policy is None and not expected.measurements and verdict.result in (Result.ACCEPTED, Result.REFUSED):
        factors = _nothing_expected(verdict)
    if question.binding is not None:
        factors.append(_fresh(question))
    statement = None
    if question.receipt is not None:
        found = verify_receipt(
            question.receipt,
            expectations.policy,
            now,
            expectations.roots,
            request=expected.request,
            response=expected.response,
            model_roots=expected.model_roots,
        )
        factors += found.own_factors
        statement = found.statement
    elif question.binding is not None:
        factors.append(model_factor(question.binding.model_root, expected.model_roots))
    failed = any(factor.outcome is Outcome.FAIL for factor in factors)
    result = Result.REFUSED if failed and verdict.result is Result.ACCEPTED else verdict.result
    return Report(
        verdict.kind, result, tuple(factors), verdict.claims, statement if result is Result.ACCEPTED else None
    )


def unreadable(error: EvidenceError | EvidenceUnsupportedError) -> Report:
    """Returns what comes of a document that cannot be read."""
    from cloister.attest.evidence import Check, Factor, Outcome, Result

    result = Result.MALFORMED if isinstance(error, EvidenceError) else Result.UNSUPPORTED
    return Report(None, result, (Factor(Check.FORMAT, Outcome.FAIL, str(error)),), None)


def run_vector(document: bytes) -> tuple[Report, datetime]:
    """Returns what comes of a conformance vector, of evidence or of a receipt, and as of when."""
    from cloister.attest.document import format_of
    from cloister.attest.vector import RECEIPT_FORMAT, ReceiptVector, Vector
    from cloister.attest.verify import verify as decide

    if format_of(document) == RECEIPT_FORMAT:
        receipt = ReceiptVector.decode(document)
        try:
            return Report.of_receipt(receipt.verdict()), receipt.time
        except (EvidenceError, EvidenceUnsupportedError) as error:
            return unreadable(error), receipt.time
    case = Vector.decode(document)
    return Report.of(decide(case.evidence, case.expectations.policy, case.time, case.expectations.roots)), case.time


def parse_hex(text: str, name: str) -> bytes:
    """Returns the bytes of an option in hexadecimal."""
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise SettingsError(f"{name} is {text!r}.", remedy="Give hexadecimal digits.") from error


def _expectations(question: Question, expected: Expected) -> "Expectations":
    from cloister.attest import policy_file
    from cloister.attest.evidence import Skip

    bound: bytes | Skip
    if question.binding is not None:
        bound = question.binding.report_data()
    elif expected.report_data is not None:
        bound = expected.report_data
    else:
        bound = Skip("bare evidence, and no --report-data was given")
    if expected.policy is None:
        return _from_options(question.evidence, expected.measurements, expected.roots, bound)
    if expected.measurements or expected.roots:
        raise SettingsError("--measurement and --root were given with --policy.", remedy="State them in the file.")
    return policy_file.read(expected.policy, bound)


def _nothing_expected(verdict: "Verdict") -> "list[Factor | ReceiptFactor]":
    from cloister.attest.evidence import Check, Factor, Outcome

    text = "nothing says what is expected: give --policy FILE, or --measurement HEX"
    if verdict.claims is not None:
        text += f"; it is {verdict.claims.measurement.hex()}"
    kept = [factor for factor in verdict.factors if factor.check is not Check.MEASUREMENT]
    return [*kept, Factor(Check.MEASUREMENT, Outcome.FAIL, text)]


def _fresh(question: Question) -> "Factor":
    from cloister.attest.evidence import Check, Factor, Outcome

    if question.binding is None or question.nonce is None:
        what = "a receipt" if question.receipt else "a saved attestation"
        return Factor(Check.NONCE, Outcome.SKIPPED, f"{what}, and no --nonce was given: it may be old")
    if question.binding.nonce == question.nonce:
        return Factor(Check.NONCE, Outcome.PASS, "answers this very nonce")
    return Factor(Check.NONCE, Outcome.FAIL, "answers another nonce")


def _from_options(
    evidence: "Evidence", measurements: tuple[str, ...], roots: tuple[str, ...], bound: "bytes | Skip"
) -> "Expectations":
    """Returns the policy that a command line without a file states: the measurement, and nothing else that is a choice."""
    from dataclasses import replace

    from cloister.attest import policy_file
    from cloister.attest.evidence import Kind
    from cloister.attest.roots import Roots

    skip = {"skip": "not stated on the command line; use --policy"}
    named = skip if not measurements or measurements == (ANY,) else list(measurements)
    tables: dict[Kind, dict[str, Any]] = {
        Kind.SGX: {"mrenclave": named, "mrsigner": skip, "product": skip, "min_version": skip},
        Kind.TDX: {"mrtd": named, "rtmr": [skip] * 4, "mrconfigid": skip},
        Kind.SNP: {"measurement": named, "min_tcb": skip, "revocation": skip}
        | {"host_data": skip, "min_version": skip, "id_key": skip},
        Kind.TPM: {"pcrs": skip, "resets": skip, "firmware": skip},
        Kind.NITRO: {"pcrs": skip, "max_age_seconds": 300},
        Kind.GPU: {"measurement": named, "driver": skip, "vbios": skip, "revocation": skip},
        Kind.SIM: {"measurement": named, "min_version": skip},
    }
    if named is not skip and evidence.kind in (Kind.TPM, Kind.NITRO):
        raise SettingsError(f"Evidence of kind {evidence.kind} has several measurements.", remedy="Use --policy.")
    expectations = policy_file.from_mapping({evidence.kind.value: tables[evidence.kind]}, bound)
    trusted = {field.name: getattr(expectations.roots, field.name) for field in fields(Roots)}
    for text in roots:
        family, _, value = text.partition("=")
        if family not in trusted:
            raise SettingsError(
                f"--root is {text!r}.", remedy=f"Give KIND=FINGERPRINT, KIND one of {', '.join(trusted)}."
            )
        trusted[family] |= {policy_file.parse_root("--root", value)}
    return replace(expectations, roots=Roots(**trusted))
