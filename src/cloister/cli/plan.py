"""`cloister plan`: what runs where, what the accelerator learns, what it costs; all policies side by side."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cloister.cli import options as o
from cloister.cli.display import human_bytes, human_count, stdout
from cloister.cli.plan_subject import Subject, progress_bar
from cloister.errors import PlanError
from cloister.plan.labels import THREATS, Placement
from cloister.plan.policies import POLICIES

if TYPE_CHECKING:
    from cloister.plan.cost import Prediction
    from cloister.plan.report import Report

_COSTS = "What it is planned for"
COMPARED_TOKENS = 32
"""Decoded tokens per policy."""

STYLES = {Placement.ENCLAVE: "green", Placement.BLINDED: "cyan", Placement.PLAIN: "bold red"}

_Objective = Annotated[
    str,
    typer.Option(
        "--objective", help="What the policy auto makes small: latency or enclave-time.", rich_help_panel=_COSTS
    ),
]


def plan(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model, demo, or 1.1b (the shape of TinyLlama, no weights).")
    ] = None,
    policy: o.PolicyOption = None,
    threat: o.ThreatOption = None,
    rules: o.RulesOption = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Folder of a PEFT adapter to plan for; repeatable.")
    ] = None,
    insecure: o.InsecureOption = False,
    shielded: Annotated[
        int | None,
        typer.Option(
            "--shielded-layers",
            help="Layers that the shield-* baselines keep in the enclave.",
            rich_help_panel=o.PLACEMENT,
        ),
    ] = None,
    file: o.SettingsFile = None,
    addresses: o.AddressOption = None,
    pantry: o.PantryOption = None,
    objective: _Objective = "latency",
    enclave_mib: Annotated[
        int, typer.Option("--enclave-memory", help="MiB that the enclave may use; 0: no limit.", rich_help_panel=_COSTS)
    ] = 0,
    round_trip_ms: Annotated[
        float,
        typer.Option(
            "--link-round-trip",
            help="Milliseconds to the accelerator and back, beyond this host's.",
            rich_help_panel=_COSTS,
        ),
    ] = 0.0,
    gigabits: Annotated[
        float, typer.Option("--link-bandwidth", help="Gbit/s to the accelerator; 0: no limit.", rich_help_panel=_COSTS)
    ] = 0.0,
    context: Annotated[
        int, typer.Option("--context", help="Tokens of context to plan for.", rich_help_panel=_COSTS)
    ] = 128,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Time this machine for some seconds to predict speed.",
            rich_help_panel=_COSTS,
        ),
    ] = True,
    attack: Annotated[
        bool, typer.Option("--attack", help="Run the audit's attacks for the bits of an insecure baseline.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the block, coloured by placement: .svg, .png or .pdf.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Time every policy on this machine, side by side.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Describe every policy and threat profile.")] = False,
    as_json: o.JsonOption = False,
) -> None:
    """Show what runs where and why it is safe, what the accelerator learns, and what it costs.

    [bold]cloister plan ~/models/tinyllama --policy secureinfer --picture plan.svg[/bold]

    A plan that would show the accelerator a secret is refused, with the operator and the secret. Speed is predicted from a
    calibration with random weights in the model's shapes: no weight of the model is read, none leaves this program.
    """
    if listing:
        _list(as_json)
        return
    from cloister.plan.planner import Budgets, Objective

    if model is None:
        raise PlanError("There is no model to plan for.", remedy="Give its folder, or: cloister plan demo.")
    if objective not in list(Objective):
        raise PlanError(f"Unknown objective {objective!r}.", remedy=f"Choose one of: {', '.join(Objective)}.")
    options = o.PlanOptions(policy, threat, rules, insecure)
    settings = o.RuntimeOptions(file, None, options, addresses, pantry_mib=pantry).settings()
    if shielded is not None:
        settings = dataclasses.replace(settings, plan=dataclasses.replace(settings.plan, shielded_layers=shielded))
    budgets = Budgets(
        enclave_bytes=enclave_mib * 2**20,
        pantry_bytes=settings.blinding.pantry_bytes,
        link_round_trip_seconds=round_trip_ms / 1e3,
        link_bytes_per_second=gigabits * 1e9 / 8,
        context=context,
    )
    subject = Subject(model, settings, budgets, Objective(objective), tuple(adapter or ()))
    if compare:
        _compare(subject, as_json)
        return
    report = subject.report(calibrate, attack)
    if picture is not None:
        from cloister.cli.plan_picture import draw

        draw(report, picture)
    if as_json:
        print(json.dumps(report.plain()))
    else:
        _show(report)


def _compare(subject: Subject, as_json: bool) -> None:
    """Times every policy on random weights in the model's shapes and shows them side by side."""
    from cloister.bench.plans import compare

    with progress_bar("comparing") as report:
        rows = compare(subject.spec(), subject.settings, subject.budgets.context, COMPARED_TOKENS, report)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in (
        "policy",
        "predicted ms",
        "measured ms",
        "tokens/s",
        "crosses/token",
        "pads/token",
        "accelerator sees",
    ):
        table.add_column(heading, justify="left" if heading in ("policy", "accelerator sees") else "right")
    for row in rows:
        table.add_row(
            Text(row.policy + (" INSECURE" if row.insecure else ""), style="bold red" if row.insecure else ""),
            "" if row.predicted_ms is None else f"{row.predicted_ms:.2f}", f"{row.measured_ms:.2f}",
            f"{1e3 / row.measured_ms:.1f}", human_bytes(row.bytes_crossing), human_bytes(row.pad_bytes), row.sees,
        )  # fmt: skip
    stdout().print(table)
    stdout().print("Decode at batch 1 with pads in stock, random weights, accelerator on this host.", style="dim")


def _list(as_json: bool) -> None:
    """Describes policies and threat profiles."""
    if as_json:
        policies = [
            {"name": p.name, "summary": p.summary, "sees": p.sees, "insecure": p.insecure, "source": p.source}
            for p in POLICIES.values()
        ]
        threats = [{"name": t.name, "description": t.description} for t in THREATS.values()]
        print(json.dumps({"policies": policies, "threats": threats}))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("policy", "what runs where", "the accelerator sees"):
        table.add_column(heading)
    for policy in POLICIES.values():
        name = Text(policy.name, style="bold red" if policy.insecure else "bold")
        table.add_row(name, ("INSECURE. " if policy.insecure else "") + policy.summary, policy.sees)
    stdout().print(table)
    for threat in THREATS.values():
        stdout().print(f"\nthreat [bold]{threat.name}[/bold]: {threat.description}")


def _show(report: "Report") -> None:
    console = stdout()
    style = "bold red" if report.insecure else "bold"
    warning = "INSECURE " if report.insecure else ""
    console.print(Text(f"{warning}{report.model}: {report.policy} under {report.threat}", style=style))
    console.print(report.summary, style="dim")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("operator", "layers", "prefill", "decode", "MACs", "weights", "ops/byte", "sensitivity", "learned"):
        table.add_column(heading, justify="left" if heading in ("operator", "layers", "prefill", "decode") else "right")
    for row in report.rows:
        sign = "≥ " if row.measured else "≤ " if row.learned_prompt_bits else ""
        weights = f" + {human_count(row.learned_weight_bits)}bit of weights" if row.learned_weight_bits else ""
        table.add_row(
            row.operator, row.layers,
            Text(row.prefill, style=STYLES[Placement(row.prefill)]), Text(row.decode, style=STYLES[Placement(row.decode)]),
            human_count(row.multiply_adds), human_bytes(row.weight_bytes), f"{row.intensity:.2f}",
            f"{row.sensitivity_bits:.1f}", f"{sign}{row.learned_prompt_bits:.1f}{weights}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "sensitivity, learned: bits about the prompt per token, seen in plain and at this placement (≤ bound, ≥ attack)",
        style="dim",
    )
    for line in report.learns:
        console.print(f"  · {line}", style="bold red" if "LEARNS" in line else "")
    if report.prediction is not None:
        _costs(report.prediction)
    console.print(f"plan {report.digest}", style="dim")


def _costs(cost: "Prediction") -> None:
    stdout().print(
        f"Predicted: {1e3 * cost.decode_seconds:.2f} ms a token ({cost.tokens_per_second:.1f} tokens/s) with pads in stock, "
        f"{1e3 * cost.decode_seconds_without_pads:.2f} ms without; enclave CPU {1e3 * cost.enclave_cpu_seconds:.2f} ms "
        f"+ {1e3 * cost.pad_cpu_seconds:.2f} ms of pads; {cost.round_trips} round trips, "
        f"{human_bytes(cost.bytes_crossing)} cross and {human_bytes(cost.pad_bytes)} of pads a token; "
        f"{human_bytes(cost.enclave_weight_bytes)} of weights in the enclave."
    )
    if cost.lent_attention_seconds:
        stdout().print(
            f"Of each token, {1e3 * cost.lent_attention_seconds:.2f} ms are what lending QK^T and AV adds to computing them in "
            "the enclave: taking the pads off costs more than the products (docs/masked_attention.md)."
        )
