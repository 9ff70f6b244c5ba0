"""`cloister verify`: is this the enclave that is expected? A table of checks for people, JSON and exit codes for scripts."""

import json
import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cloister.cli import options as o
from cloister.cli.display import stderr, stdout
from cloister.errors import EvidenceError, EvidenceUnsupportedError, SettingsError

if TYPE_CHECKING:
    from cloister.attest.binding import Binding
    from cloister.attest.evidence import Evidence, Skip, Verdict
    from cloister.attest.policy_file import Expectations

EXIT_CODES = {"accepted": 0, "refused": 10, "unsupported": 20, "malformed": 30}
"""What the process returns for each result; 1 is an error of the command itself, such as a host that does not answer."""

ANY = "any"

Target = Annotated[
    str, typer.Argument(help="File with evidence or an attestation, or HOST[:PORT] or URL of a server to ask.")
]
PolicyOption = Annotated[
    Path | None, typer.Option("--policy", help="TOML file that states what is expected and who is believed.")
]
MeasurementOption = Annotated[
    list[str] | None,
    typer.Option("--measurement", help="Without --policy: accepted measurement in hexadecimal (repeatable), or `any`."),
]
RootsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--root", help="Without --policy: KIND=FINGERPRINT believed besides the vendors, for example sim=a1b2..."
    ),
]
ReportDataOption = Annotated[
    str | None, typer.Option("--report-data", help="The 64 bytes that bare evidence must carry, in hexadecimal.")
]
NonceOption = Annotated[
    str | None, typer.Option("--nonce", help="The nonce that a saved attestation must answer, in hexadecimal.")
]
AtOption = Annotated[
    datetime | None,
    typer.Option("--at", help="Judge as of this time (UTC) instead of now.", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
]
KindOption = Annotated[
    str | None, typer.Option("--kind", help="The file is a bare report of this kind: sgx, tdx, snp, nitro, gpu.")
]
CollateralOption = Annotated[
    Path | None, typer.Option("--collateral", help="With --kind: Intel's collateral or AMD's revocation list.")
]
CertificateOption = Annotated[
    list[Path] | None, typer.Option("--certificate", help="With --kind: certificate files, PEM or DER, leaf first.")
]
VectorOption = Annotated[
    bool,
    typer.Option("--vector", help="The file is a conformance vector, which brings its own policy, roots and time."),
]


@dataclass(frozen=True)
class Question:
    """What is asked of one target."""

    evidence: "Evidence"
    binding: "Binding | None"
    nonce: bytes | None
    """The nonce that the binding must hold, if known."""


def verify(
    target: Target,
    policy: PolicyOption = None,
    measurement: MeasurementOption = None,
    root: RootsOption = None,
    report_data: ReportDataOption = None,
    nonce: NonceOption = None,
    at: AtOption = None,
    kind: KindOption = None,
    collateral: CollateralOption = None,
    certificate: CertificateOption = None,
    vector: VectorOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Verify what an enclave shows, before anything is sent to it.

    A host is asked with a fresh nonce and nothing else. Every check is shown with its reason; a check that is skipped
    says why. Exit codes: 0 accepted, 10 refused, 20 a kind or version that cannot be verified here, 30 malformed.

    Without --policy the measurement must be named: `--measurement HEX`, or `--measurement any` to learn what runs there.
    """
    from cloister.attest.evidence import Verdict

    now = at.replace(tzinfo=UTC) if at else datetime.now(UTC)
    verdict: Verdict
    if vector:
        verdict, now = _run_vector(Path(target))
    else:
        try:
            question = _question(target, nonce, kind, collateral, certificate)
        except (EvidenceError, EvidenceUnsupportedError) as error:
            verdict = _unreadable(error)
        else:
            expected = _hex(report_data, "--report-data") if report_data else None
            verdict = _judge(question, policy, measurement, root, expected, now)
    if as_json:
        print(json.dumps(as_record(verdict, target, now)))
    else:
        _show(verdict, target, now)
    raise typer.Exit(EXIT_CODES[verdict.result])


def _question(
    target: str, nonce: str | None, kind: str | None, collateral: Path | None, certificates: list[Path] | None
) -> Question:
    from cloister.attest.document import ask

    path = Path(target)
    given = _hex(nonce, "--nonce") if nonce else None
    if kind is not None:
        return Question(_bare(path, kind, collateral, certificates or []), None, None)
    if path.exists():
        return _read(_content(path), given)
    if "/" in target and "://" not in target:
        raise SettingsError(f"There is no file {target}.", remedy="Give a file, HOST[:PORT] or a URL.")
    fresh = given or secrets.token_bytes(32)
    question = _read(ask(target, fresh), fresh)
    if question.binding is None:
        raise EvidenceError("The host answered with bare evidence, which no nonce is bound to.")
    return question


def _run_vector(path: Path) -> "tuple[Verdict, datetime]":
    from cloister.attest.vector import Vector
    from cloister.attest.verify import verify as decide

    case = Vector.decode(_content(path))
    return decide(case.evidence, case.expectations.policy, case.time, case.expectations.roots), case.time


def _read(document: bytes, nonce: bytes | None) -> Question:
    from cloister.attest import document as documents
    from cloister.attest.evidence import Evidence

    if documents.format_of(document).startswith("cloister-attestation/"):
        found = documents.Attestation.decode(document)
        return Question(found.evidence, found.binding, nonce)
    return Question(Evidence.decode(document), None, None)


def _content(path: Path) -> bytes:
    from cloister.attest.evidence import MAX_EVIDENCE_BYTES

    try:
        with path.open("rb") as file:
            return file.read(MAX_EVIDENCE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from error


def _bare(path: Path, kind: str, collateral: Path | None, certificates: list[Path]) -> "Evidence":
    from cryptography.hazmat.primitives.serialization import Encoding

    from cloister.attest.certificates import load_pem_chain
    from cloister.attest.evidence import Evidence, Kind
    from cloister.attest.quote import without_padding
    from cloister.settings import choice

    chosen, report = choice(Kind, kind, "--kind"), _content(path)
    chain: list[bytes] = []
    for file in certificates:
        content = _content(file)
        if content.startswith(b"-----"):
            chain += [certificate.public_bytes(Encoding.DER) for certificate in load_pem_chain(content)]
        else:
            chain.append(content)
    return Evidence(
        kind=chosen,
        report=without_padding(report) if chosen in (Kind.SGX, Kind.TDX) else report,
        collateral=_content(collateral) if collateral else b"",
        certificates=tuple(chain),
    )


def _judge(
    question: Question,
    policy: Path | None,
    measurements: list[str] | None,
    roots: list[str] | None,
    report_data: bytes | None,
    now: datetime,
) -> "Verdict":
    from cloister.attest import policy_file
    from cloister.attest.evidence import Check, Factor, Outcome, Result, Skip
    from cloister.attest.verify import verify as decide

    bound: bytes | Skip
    if question.binding is not None:
        bound = question.binding.report_data()
    else:
        bound = report_data if report_data is not None else Skip("bare evidence, and no --report-data was given")
    if policy is not None:
        if measurements or roots:
            raise SettingsError("--measurement and --root were given with --policy.", remedy="State them in the file.")
        expectations = policy_file.read(policy, bound)
    else:
        expectations = _from_options(question.evidence, measurements or [], roots or [], bound)
    verdict = decide(question.evidence, expectations.policy, now, expectations.roots)
    factors, added = verdict.factors, []
    if policy is None and not measurements and verdict.result in (Result.ACCEPTED, Result.REFUSED):
        factors = tuple(factor for factor in factors if factor.check is not Check.MEASUREMENT)
        found = verdict.claims.measurement.hex() if verdict.claims else "unknown"
        text = f"nothing says what is expected; it is {found}. Pass --measurement {found} if you know it, or --policy"
        added.append(Factor(Check.MEASUREMENT, Outcome.FAIL, text))
    if question.binding is not None:
        added.append(_fresh(question))
    failed = any(factor.outcome is Outcome.FAIL for factor in added)
    result = Result.REFUSED if failed and verdict.result is Result.ACCEPTED else verdict.result
    return replace(verdict, result=result, factors=(*factors, *added))


def _fresh(question: Question) -> Any:
    from cloister.attest.evidence import Check, Factor, Outcome

    if question.binding is None or question.nonce is None:
        return Factor(Check.NONCE, Outcome.SKIPPED, "a saved attestation, and no --nonce was given: it may be old")
    if question.binding.nonce == question.nonce:
        return Factor(Check.NONCE, Outcome.PASS, "answers this very nonce")
    return Factor(Check.NONCE, Outcome.FAIL, "answers another nonce")


def _from_options(
    evidence: "Evidence", measurements: list[str], roots: list[str], bound: "bytes | Skip"
) -> "Expectations":
    """Returns the policy that a command line without a file states: the measurement, and nothing else that is a choice."""
    from dataclasses import fields

    from cloister.attest import policy_file
    from cloister.attest.evidence import Kind
    from cloister.attest.roots import Roots

    skip = {"skip": "not stated on the command line; use --policy"}
    named = skip if not measurements or measurements == [ANY] else measurements
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


def _unreadable(error: EvidenceError | EvidenceUnsupportedError) -> "Verdict":
    from cloister.attest.evidence import Check, Factor, Outcome, Result, Verdict

    result = Result.MALFORMED if isinstance(error, EvidenceError) else Result.UNSUPPORTED
    return Verdict(None, result, (Factor(Check.FORMAT, Outcome.FAIL, str(error)),), None)


def as_record(verdict: "Verdict", target: str, now: datetime) -> dict[str, Any]:
    """Returns a verdict as what --json prints."""
    claims = verdict.claims
    return {
        "target": target,
        "time": now.isoformat(),
        "result": verdict.result.value,
        "exit_code": EXIT_CODES[verdict.result],
        "kind": verdict.kind.value if verdict.kind else None,
        "hardware": verdict.kind is not None and verdict.kind.value != "sim",
        "failed": sorted({check.value for check in verdict.failed}),
        "factors": [
            {"check": factor.check.value, "outcome": factor.outcome.value, "reason": factor.reason}
            for factor in verdict.factors
        ],
        "claims": None
        if claims is None
        else {
            "measurement": claims.measurement.hex(),
            "report_data": claims.report_data.hex(),
            "debug": claims.debug,
            "tcb_status": claims.tcb_status,
            "version": claims.version,
            "platform": claims.platform.hex(),
            **dict(claims.details),
        },
    }


def _show(verdict: "Verdict", target: str, now: datetime) -> None:
    console = stdout()
    colours = {"PASS": "green", "FAIL": "bold red", "SKIPPED": "yellow"}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("check", "outcome", "reason"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "reason")
    for factor in verdict.factors:
        outcome = Text(factor.outcome.value, style=colours[factor.outcome.value])
        table.add_row(factor.check.value, outcome, Text(factor.reason))
    console.print(table)
    style = "bold green" if verdict.result.value == "accepted" else "bold red"
    console.print(
        Text(f"{target}: {verdict.result.value}, as of {now:%Y-%m-%d %H:%M} UTC", style=style), soft_wrap=True
    )
    if verdict.kind is not None and verdict.kind.value == "sim":
        stderr().print(
            "[bold yellow]This is a software stand-in: no hardware protects what it runs.[/bold yellow]", soft_wrap=True
        )


def _hex(text: str, name: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise SettingsError(f"{name} is {text!r}.", remedy="Give hexadecimal digits.") from error
