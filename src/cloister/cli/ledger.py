"""`cloister ledger`: what each session has spent, and what the figures mean."""

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cloister.cli import options as o
from cloister.cli.display import stdout

if TYPE_CHECKING:
    from cloister.privacy.ledger import Ledger, SessionReport


def ledger(
    session: Annotated[str | None, typer.Option("--session", help="One session, with its last prompts.")] = None,
    path: Annotated[Path | None, typer.Option("--ledger", help="The ledger; default: the gateway's.")] = None,
    last: Annotated[int, typer.Option("--last", min=1, max=1000, help="How many prompts of a session.")] = 20,
    as_json: o.JsonOption = False,
) -> None:
    """Show what the gateway's sessions have spent: ε of a span, of a prompt and of a session, by three bounds.

    [bold]cloister ledger --session default[/bold]
    """
    from cloister.cli.gateway import ledger_path
    from cloister.privacy.ledger import Ledger

    book = Ledger.open(path or ledger_path(), create=False)
    try:
        reports = [book.report(name) for name in ([session] if session else book.sessions())]
        if as_json:
            print(json.dumps([_record(book, report, last if session else 0) for report in reports]))
            return
        console = stdout()
        console.print(_sessions(reports))
        for report in reports if session else ():
            console.print(_prompts(book, report, last))
            for sentence in _meaning(report):
                console.print(sentence, soft_wrap=True)
    finally:
        book.close()


def _sessions(reports: list["SessionReport"]) -> Table:
    table = Table(
        title="Sessions",
        caption="ε of a session is the least of basic, zCDP and PLD; the last two at δ = 1e-6. Reserved (a sum of ε): not "
        "in them, may have been spent since, and stays if a gateway was killed.",
    )
    for name in (
        "session",
        "prompts",
        "spans",
        "repeated",
        "pseudonyms",
        "ε span",
        "basic",
        "zCDP",
        "PLD",
        "reserved",
        "budget",
        "left",
    ):
        table.add_column(name, justify="left" if name == "session" else "right")
    for report in reports:
        spent = report.spent
        table.add_row(
            report.name,
            *(str(count) for count in (report.prompts, report.spans, report.repeated, report.pseudonyms)),
            f"{report.of_a_span:.4g}",
            *(
                f"[bold]{value:.4g}[/bold]" if bound == spent.bound else f"{value:.4g}"
                for bound, value in (("basic", spent.basic), ("zCDP", spent.zcdp), ("PLD", spent.pld))
            ),
            f"{report.reserved.epsilon:.4g}",
            f"{report.budget:g} ({report.rule})",
            f"{max(0.0, 1 - report.used / report.most):.0%}",
        )
    return table


def _prompts(book: "Ledger", report: "SessionReport", last: int) -> Table:
    table = Table(title=f"Last prompts of {report.name}")
    for name in ("prompt", "at", "ε", "bound", "new spans", "repeated", "pseudonyms"):
        table.add_column(name)
    for prompt in book.prompts(report.name, last):
        kinds = ", ".join(f"{count} {kind} at {epsilon:.4g}" for kind, epsilon, count in prompt.kinds) or "none"
        at = datetime.fromtimestamp(prompt.at).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(
            str(prompt.prompt), at, f"{prompt.spent.epsilon:.4g}", prompt.spent.bound, kinds,
            str(prompt.repeated), str(prompt.pseudonyms),
        )  # fmt: skip
    return table


def _meaning(report: "SessionReport") -> list[str]:
    from cloister.privacy.statements import ADJACENCY, CLASS_POLICY, FORMATS, POSITIONS

    mode = report.policy.partition(";")[0]
    return [
        f"Policy: {report.policy}.",
        f"Adjacency: {ADJACENCY}",
        f"Classes: {CLASS_POLICY}",
        f"Positions: {POSITIONS.get(mode, POSITIONS['detected'])}",
        f"Formats: {FORMATS}",
    ]


def _record(book: "Ledger", report: "SessionReport", last: int) -> dict[str, Any]:
    record = dataclasses.asdict(report)
    record["of_a_span"] = report.of_a_span
    record["spent"] |= {"epsilon": report.spent.epsilon, "bound": report.spent.bound}
    most = report.at_most
    record["at_most"] = dataclasses.asdict(most) | {"epsilon": most.epsilon, "bound": most.bound}
    record["meaning"] = _meaning(report)
    if last:
        record["last"] = [dataclasses.asdict(prompt) for prompt in book.prompts(report.name, last)]
    return record
