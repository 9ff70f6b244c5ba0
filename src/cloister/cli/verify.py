"""`cloister verify`: is this the expected enclave, is this receipt good? A table for people, JSON and exit codes for scripts."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cloister.cli import options as o
from cloister.cli.display import stderr, stdout
from cloister.cli.verify_inputs import Bare, content, exchanged, question
from cloister.cli.verify_judge import Expected, Report, judge, parse_hex, run_vector, unreadable
from cloister.errors import EvidenceError, EvidenceUnsupportedError

_EXPECTED = "What is expected"
_RECEIPT = "Receipts"
_BARE = "Bare reports and vectors"
EXIT_CODES = {"accepted": 0, "refused": 10, "unsupported": 20, "malformed": 30}
"""What the process returns for each result; 1 is an error of the command itself, such as a host that does not answer."""

Target = Annotated[
    str,
    typer.Argument(
        help="File with evidence, an attestation or a receipt; or who is asked: HOST[:PORT] of a cloister serve or of a "
        "gateway, cloister://HOST[:PORT], http(s)://HOST[:PORT]."
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy", help="TOML file that states what is expected and who is believed.", rich_help_panel=_EXPECTED
    ),
]
MeasurementOption = Annotated[
    list[str] | None,
    typer.Option(
        "--measurement",
        help="Without --policy: accepted measurement in hexadecimal (repeatable), or `any`.",
        rich_help_panel=_EXPECTED,
    ),
]
RootsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--root",
        help="Without --policy: KIND=FINGERPRINT believed besides the vendors, for example sim=a1b2...",
        rich_help_panel=_EXPECTED,
    ),
]
ReportDataOption = Annotated[
    str | None,
    typer.Option(
        "--report-data", help="The 64 bytes that bare evidence must carry, in hexadecimal.", rich_help_panel=_EXPECTED
    ),
]
NonceOption = Annotated[
    str | None,
    typer.Option(
        "--nonce", help="The nonce that a saved attestation must answer, in hexadecimal.", rich_help_panel=_EXPECTED
    ),
]
AtOption = Annotated[
    datetime | None,
    typer.Option(
        "--at",
        help="Judge as of this time (UTC) instead of now.",
        formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"],
        rich_help_panel=_EXPECTED,
    ),
]
KindOption = Annotated[
    str | None,
    typer.Option(
        "--kind", help="The file is a bare report of this kind: sgx, tdx, snp, nitro, gpu.", rich_help_panel=_BARE
    ),
]
CollateralOption = Annotated[
    Path | None,
    typer.Option(
        "--collateral", help="With --kind: Intel's collateral or AMD's revocation list.", rich_help_panel=_BARE
    ),
]
CertificateOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--certificate", help="With --kind: certificate files, PEM or DER, leaf first.", rich_help_panel=_BARE
    ),
]
ModelRootOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-root",
        help="Identity of a sealed model that must be served, in hexadecimal (repeatable).",
        rich_help_panel=_EXPECTED,
    ),
]
VectorOption = Annotated[
    bool,
    typer.Option(
        "--vector",
        help="The file is a conformance vector, which brings its own policy, roots and time.",
        rich_help_panel=_BARE,
    ),
]
RequestOption = Annotated[
    Path | None,
    typer.Option(
        "--request",
        help="File with the request that a receipt must be about; beside it, it ends in .request.",
        rich_help_panel=_RECEIPT,
    ),
]
ResponseOption = Annotated[
    Path | None,
    typer.Option(
        "--response",
        help="File with the response that a receipt must be about; beside it: .response.",
        rich_help_panel=_RECEIPT,
    ),
]


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
    request: RequestOption = None,
    response: ResponseOption = None,
    model_root: ModelRootOption = None,
    vector: VectorOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Verify what an enclave shows, before anything is sent to it.

    A host is asked with a fresh nonce and nothing else. Every check is shown with its reason; a check that is skipped
    says why. Exit codes: 0 accepted, 10 refused, 20 a kind or version that cannot be verified here, 30 malformed.

    A receipt is judged with the session that it came in, offline; --at judges its evidence as of the day of the answer.
    Without --policy the measurement must be named: `--measurement HEX`, or `--measurement any` to learn what runs there.
    """
    now = at.replace(tzinfo=UTC) if at else datetime.now(UTC)
    if vector:
        report, now = run_vector(content(Path(target)))
    else:
        expected = Expected(
            policy=policy,
            measurements=tuple(measurement or ()),
            roots=tuple(root or ()),
            report_data=parse_hex(report_data, "--report-data") if report_data else None,
            request=exchanged(request) if request else None,
            response=exchanged(response) if response else None,
            model_roots=frozenset(parse_hex(text, "--model-root") for text in model_root) if model_root else None,
        )
        bare = Bare(kind, collateral, tuple(certificate or ())) if kind else None
        try:
            report = judge(question(target, parse_hex(nonce, "--nonce") if nonce else None, bare), expected, now)
        except (EvidenceError, EvidenceUnsupportedError) as error:
            report = unreadable(error)
    if as_json:
        print(json.dumps(as_record(report, target, now)))
    else:
        _show(report, target, now)
    raise typer.Exit(EXIT_CODES[report.result])


def as_record(report: Report, target: str, now: datetime) -> dict[str, Any]:
    """Returns a report as what --json prints."""
    import msgspec

    claims = report.claims
    return {
        "target": target,
        "time": now.isoformat(),
        "result": report.result.value,
        "exit_code": EXIT_CODES[report.result],
        "kind": report.kind.value if report.kind else None,
        "hardware": report.kind is not None and report.kind.value != "sim",
        "failed": sorted({factor.check.value for factor in report.factors if factor.outcome.value == "FAIL"}),
        "factors": [
            {"check": factor.check.value, "outcome": factor.outcome.value, "reason": factor.reason}
            for factor in report.factors
        ],
        "statement": json.loads(msgspec.json.encode(report.statement)) if report.statement else None,
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


def _show(report: Report, target: str, now: datetime) -> None:
    console = stdout()
    colours = {"PASS": "green", "FAIL": "bold red", "SKIPPED": "yellow"}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("check", "outcome", "reason"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "reason")
    for factor in report.factors:
        outcome = Text(factor.outcome.value, style=colours[factor.outcome.value])
        table.add_row(factor.check.value, outcome, Text(factor.reason))
    console.print(table)
    style = "bold green" if report.result.value == "accepted" else "bold red"
    failed = ", ".join(factor.check.value for factor in report.factors if factor.outcome.value == "FAIL")
    result = report.result.value + (f" ({failed})" if failed else "")
    console.print(Text(f"{target}: {result}, as of {now:%Y-%m-%d %H:%M} UTC", style=style), soft_wrap=True)
    if report.kind is not None and report.kind.value == "sim":
        stderr().print(
            "[bold yellow]This is a software stand-in: no hardware protects what it runs.[/bold yellow]", soft_wrap=True
        )
