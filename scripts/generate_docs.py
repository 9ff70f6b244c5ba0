"""Writes the generated parts of README and docs: folder table, contracts, errors, settings, commands, results.

Usage: generate_docs.py [--check]    (--check changes nothing and fails when a part is stale)
"""

import argparse
import ast
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "cloister"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def folders() -> str:
    """Returns a table of the packages and their one job."""
    rows = ["| folder | its one job |", "| --- | --- |"]
    for init in sorted(SOURCE.glob("*/__init__.py")):
        doc = ast.get_docstring(ast.parse(init.read_text())) or ""
        rows.append(f"| `{init.parent.name}/` | {' '.join(doc.split())} |")
    return "\n".join(rows)


def contracts() -> str:
    """Returns the layers and the names of the contracts that CI enforces."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in config if contract["type"] == "layers")
    names = [f"- {contract['name']}" for contract in config]
    order = " > ".join(f"`{layer.replace('cloister.', '')}`" for layer in layers["layers"])
    return "Higher may import lower, never the reverse:\n\n" + order + "\n\nEnforced in CI:\n\n" + "\n".join(names)


def errors() -> str:
    """Returns the exception tree from the docstring of `errors.py`."""
    doc = ast.get_docstring(ast.parse((SOURCE / "errors.py").read_text())) or ""
    return doc[doc.index("```") :]


def settings() -> str:
    """Returns one table per settings class, from its fields and the sentences under them."""
    tree = ast.parse((SOURCE / "settings.py").read_text())
    parts = []
    tables = {
        "BlindingSettings": "blinding",
        "AcceleratorSettings": "accelerator",
        "CacheSettings": "cache",
        "PlanSettings": "plan",
        "SealSettings": "seal",
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in tables:
            rows = [
                f"## `[{tables[node.name]}]`",
                "",
                "| key | type | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    default = ast.unparse(field.value) if field.value else ""
                    kind = ast.unparse(field.annotation).replace("|", "or")
                    rows.append(
                        f"| `{ast.unparse(field.target)}` | {kind} | `{default}` | {' '.join(str(text.value.value).split())} |"
                    )
            parts.append("\n".join(rows))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "StrEnum" for base in node.bases):
            values = [ast.literal_eval(item.value) for item in node.body if isinstance(item, ast.Assign)]
            parts.append(f"**{node.name}**: {', '.join(f'`{value}`' for value in values)}. {ast.get_docstring(node)}")
    return "\n\n".join(parts)


def checks() -> str:
    """Returns a table of the checks of evidence, from the enumeration and the sentences under its members."""
    tree = ast.parse((SOURCE / "attest" / "evidence.py").read_text())
    check = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Check")
    rows = ["| check | passes when |", "| --- | --- |"]
    for member, text in zip(check.body, check.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr):
            rows.append(
                f"| `{ast.literal_eval(member.value)}` | {' '.join(str(ast.literal_eval(text.value)).split())} |"
            )
    return "\n".join(rows)


def cli() -> str:
    """Returns every command with its options, from the program itself."""
    from cloister.cli.main import app

    root = typer.main.get_command(app)
    parts = []
    for name, command in _commands(root, "cloister"):
        rows = [f"## `{name}`", "", re.sub(r"\[/?bold\]", "`", (command.help or "").strip())]
        options = [
            parameter for parameter in command.params if getattr(parameter, "help", None) and parameter.name != "help"
        ]
        if options:
            rows += ["", "| option | default | meaning |", "| --- | --- | --- |"]
        for parameter in options:
            default = getattr(parameter.default, "value", parameter.default)
            shown = "" if default is None or default is False or callable(default) else f"`{default}`"
            named = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            meaning = " ".join(str(parameter.help).split()).replace("|", "/")
            rows.append(f"| {', '.join(f'`{flag}`' for flag in named)} | {shown} | {meaning} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _commands(command, name):  # type: ignore[no-untyped-def]
    children = getattr(command, "commands", None)
    if not children:
        yield name, command
        return
    for child, value in children.items():
        yield from _commands(value, f"{name} {child}")


def records() -> str:
    """Returns the table of every benchmark record."""
    parts = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text())
        machine = record["machine"]
        where = f"{machine['cores']} cores of {machine['processor'] or 'a processor'}"
        parts.append(
            f"## {record['name']}\n\n`{record['command']}` on {where}, commit `{machine['commit']}`, {record['time'][:10]}: "
            f"`bench/results/{path.name}`\n\n"
            + _table(record["rows"])
            + "\n\n"
            + "\n".join(f"- {key}: **{_number(value)}**" for key, value in record["facts"].items())
            + f"\n\n{record['note']}"
        )
    return "\n\n".join(parts) or "No record yet: run `make bench`."


def baselines() -> str:
    """Returns one row per insecure baseline: where it is from, what runs inside, what is seen, what was recovered."""
    from cloister.audit.baselines.schemes import SCHEMES

    path = ROOT / "bench" / "results" / "leakage-demo.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    measured = {row["policy"].removesuffix(" (INSECURE)"): row for row in record["rows"]}
    rows = [
        {
            "scheme": f"`{scheme.name}`",
            "from": scheme.policy.source,
            "linears in the enclave": scheme.inside,
            "what the accelerator sees": scheme.policy.sees,
            "the attack it falls to": scheme.policy.broken_by,
            **_recovered(measured.get(scheme.name, {})),
        }
        for scheme in SCHEMES.values()
    ]
    sound = [
        {"policy": f"`{name}`", **_recovered(measured.get(name, {}))} for name in ("blinded", "slalom", "enclave-only")
    ]
    guessing = next((_number(row["guessing %"]) for row in record["rows"] if row["guessing %"] != ""), "?")
    facts = "".join(f"- {key}: **{_number(value)}**\n" for key, value in record.get("facts", {}).items())
    return (
        f"{_table(rows, 5)}\n\nThe same attacks on policies that expose no row (the most common token every time is right "
        f"for {guessing} %):\n\n{_table(sound)}\n\n"
        f"`{record.get('command', 'not measured yet')}`, `bench/results/{path.name}`:\n\n{facts}"
    )


def policies() -> str:
    """Returns one row per policy: what runs where and what the accelerator sees."""
    from cloister.plan.policies import POLICIES

    rows: list[dict[str, object]] = [
        {
            "policy": f"`{policy.name}`" + (" **INSECURE**" if policy.insecure else ""),
            "what runs where": policy.summary,
            "the accelerator sees": policy.sees,
            "how that is exploited": policy.broken_by,
            "from": policy.source,
        }
        for policy in POLICIES.values()
    ]
    return _table(rows, 5)


def threats() -> str:
    """Returns one row per threat profile."""
    from cloister.plan.labels import THREATS, Party

    rows: list[dict[str, object]] = [
        {
            "threat profile": f"`{threat.name}`",
            "in words": threat.description,
            **{f"secret from the {party}": ", ".join(sorted(threat.secret[party])) for party in Party},
        }
        for threat in THREATS.values()
    ]
    return _table(rows, 4)


def _recovered(row: dict[str, object]) -> dict[str, object]:
    if not row:
        return {}
    read = f"{_number(row['tokens read %'])} %" if row["tokens read %"] != "" else "no row to attack"
    return {
        "prompt tokens read": read,
        "bits per token, at least": row["bits per token"],
        "private weights known": row["weights known"],
    }


def results() -> str:
    """Returns the one table for the README: decode of the 1.1-billion shape and the bars."""
    path = ROOT / "bench" / "results" / "latency-1.1b.json"
    if not path.exists():
        return "No record yet: run `make bench`."
    record = json.loads(path.read_text())
    wanted = ("variant", "tokens/s", "p50 ms", "p95 ms", "trusted CPU ms/token", "worker CPU ms/token")
    rows = [{key: row[key] for key in wanted if key in row} for row in record["rows"]]
    machine = record["machine"]
    return (
        f"Decode at batch 1, a Llama shape of 1.1 billion parameters with random weights, on {machine['cores']} cores of "
        f"{machine['processor']} (`{record['command']}`, [record](bench/results/{path.name})):\n\n{_table(rows)}\n\n"
        "[All results](docs/results.md), among them fidelity: perplexity changes by less than 0.1 % with int8 weights."
    )


def attention() -> str:
    """Returns the table of what lent attention costs, and where its time goes."""
    path = ROOT / "bench" / "results" / "attention-1.1b.json"
    if not path.exists():
        return "No record yet: run `make bench`."
    record = json.loads(path.read_text())
    machine = record["machine"]
    contexts = [f"context {count}: " for count in record["settings"]["contexts"]]
    names = list(dict.fromkeys(key.split(": ", 1)[1] for key in record["facts"]))
    facts = [
        {"": name, **{of.rstrip(": "): record["facts"][of + name] for of in contexts if of + name in record["facts"]}}
        for name in names
    ]
    where = f"{machine['cores']} cores of {machine['processor'] or 'a processor'}"
    return (
        f"{_table(record['rows'])}\n\n{_table(facts)}\n\n`{record['command']}` on {where}, commit `{machine['commit']}`, "
        f"{record['time'][:10]}. {record['note']}"
    )


def sanitising() -> str:
    """Returns the tables of what sanitising costs: accuracy and attacks by ε, the leads of `channel`, the other tasks."""
    path = ROOT / "bench" / "results" / "sanitize.json"
    if not path.exists():
        return "No record yet: run `cloister bench sanitize`."
    record = json.loads(path.read_text())
    machine, facts = record["machine"], record["facts"]
    tasks = list(dict.fromkeys(row["task"] for row in record["rows"]))
    parts = [
        f"`{record['command']}` on {machine['cores']} cores of {machine['processor'] or 'a processor'}, commit "
        f"`{machine['commit']}`, {record['time'][:10]}. On clean text: "
        + ", ".join(f"{task} {100 * facts[f'clean accuracy, {task}']:.1f} %" for task in tasks)
        + "."
    ]
    titles = {
        "accuracy": f"{tasks[0]}: accuracy, %, classifier trained on clean text",
        "trained sanitised": f"{tasks[0]}: accuracy, %, classifier trained on sanitised text",
        "uniform %": "the best attack, %, all words equally frequent",
        "attack %": "the best attack, %, by one who knows the words' frequencies in this text",
    }
    by_task = {task: [row for row in record["rows"] if row["task"] == task] for task in tasks}
    parts += [_by_epsilon(by_task[tasks[0]], key, title) for key, title in titles.items()]
    parts += [
        _by_epsilon(by_task[task], "trained sanitised", f"{task}: accuracy, %, classifier trained on sanitised text")
        for task in tasks[1:]
    ]
    epsilons = [f"ε = {epsilon:g}" for epsilon in record["settings"]["epsilons"]]
    equal: list[dict[str, object]] = []
    caps: list[dict[str, object]] = []
    others: list[dict[str, object]] = []
    for key, value in facts.items():
        task, _, name = key.partition(": ")
        if ", equal ε, " in name:
            equal.append(
                {
                    "task": task,
                    "equal ε": name.replace(", equal ε", ""),
                    **dict(zip(epsilons, value.split(", "), strict=True)),
                }
            )
        elif ", other cap, " in name and task == tasks[0]:
            caps.append({"equal ε, another cap": name.replace(", other cap", ""), "points": value})
        elif ", equal attack" in name and task == tasks[0]:
            others.append({"equal attack": name.replace(", equal attack", ""), "points, at what rate": value})
    parts += [
        _interval_line(record),
        _table([_verdict(line) for line in equal], 5),
        "The same in points:",
        _table(equal, 2),
        *([_table(caps, 2)] if caps else []),
    ]
    parts.append("The same at the success of the best attack that the other has, where it lies between ours:")
    return "\n\n".join([*parts, _table(others, 2)])


def _interval_line(record: dict[str, Any]) -> str:
    over = record["settings"].get("intervals", "draws alone")
    return f"Who leads by more than the 95 % confidence interval of the lead, which is over {over}, at which ε:"


def _verdict(line: dict[str, object]) -> dict[str, object]:
    """Returns at which ε a line of leads ("+4.4±1.5") is ahead or behind by more than its interval."""
    held: dict[str, list[str]] = {"channel leads": [], "neither": [], "the other leads": []}
    for column, value in line.items():
        if column.startswith("ε = "):
            points, _, half = str(value).partition("±")
            which = 1 if abs(float(points)) <= float(half or "inf") else 0 if float(points) > 0 else 2
            held[list(held)[which]].append(column.removeprefix("ε = "))
    return {key: value for key, value in line.items() if not key.startswith("ε")} | {
        key: ", ".join(values) or "-" for key, values in held.items()
    }


def sanitising_networks() -> str:
    """Returns the tables of SST-2 with neural networks: what is sensitive, accuracy and attack by ε, leads."""
    path = ROOT / "bench" / "results" / "sanitize-network.json"
    if not path.exists():
        return "No record yet: run `cloister bench sanitize --classifier network`."
    record = json.loads(path.read_text())
    machine, facts = record["machine"], record["facts"]
    parts = [
        f"`{record['command']}` on {machine['cores']} cores of {machine['processor'] or 'a processor'}, commit "
        f"`{machine['commit']}`, {record['time'][:10]}. On clean text: {100 * facts['clean accuracy']:.1f} %; a linear "
        f"classifier alone: {100 * facts['clean accuracy, linear']:.1f} %."
    ]
    for sensitive in dict.fromkeys(row["sensitive"] for row in record["rows"]):
        own = [row for row in record["rows"] if row["sensitive"] == sensitive]
        for row in own:
            row["mechanism"] += ", trained on sanitised text" if row["trained"] == "sanitised" else ""
        title = f"{sensitive} ({own[0]['replaced %']:.0f} % of the words replaced): accuracy, %"
        parts.append(_by_epsilon(own, "accuracy", title))
        own = [row for row in own if row["trained"] == "clean"]
        parts.append(_by_epsilon(own, "uniform %", f"{sensitive}: the best attack, %, all words equally frequent"))
        parts.append(_by_epsilon(own, "exact ε", f"{sensitive}: exact ε"))
    leads = []
    for key, value in facts.items():
        sensitive, _, name = key.partition(": ")
        if name:
            by_epsilon = {epsilon: points for points, epsilon in (part.split(" at ") for part in value.split(", "))}
            leads.append({"sensitive": sensitive, "lead, points": name, **by_epsilon})
    leads.sort(key=lambda line: len(line), reverse=True)
    parts += [
        _interval_line(record),
        _table([_verdict(line) for line in leads], 5),
        "The same in points:",
        _table(leads, 2),
    ]
    return "\n\n".join(parts)


def restoring() -> str:
    """Returns the table of what restoring gives back."""
    path = ROOT / "bench" / "results" / "restoring.json"
    if not path.exists():
        return "No record yet: run `cloister bench restoring`."
    record = json.loads(path.read_text())
    return f"{_table(record['rows'])}\n\n`{record['command']}`, commit `{record['machine']['commit']}`."


def _by_epsilon(rows: list[dict[str, Any]], key: str, title: str) -> str:
    """Returns one row per mechanism and one column per ε."""
    held: dict[str, dict[str, object]] = {}
    for row in rows:
        line = held.setdefault(row["mechanism"], {title: row["mechanism"]})
        line[f"ε = {row['ε']:g}"] = (
            f"{row[key] * (1 if key.endswith(('%', 'ε')) else 100):.{2 if key == 'exact ε' else 1}f}"
        )
    lines = sorted(held.values(), key=len, reverse=True)  # whole lines first: they have every column
    return _table(lines)


def _table(rows: list[dict[str, object]], words: int = 1) -> str:
    """Returns a table whose first `words` columns are words, and whose others are numbers."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "| --- " * words + "| ---: " * (len(columns) - words) + "|"]
    lines += ["| " + " | ".join(_number(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


BLOCKS = {
    "folders": folders,
    "contracts": contracts,
    "errors": errors,
    "settings": settings,
    "checks": checks,
    "cli": cli,
    "records": records,
    "baselines": baselines,
    "policies": policies,
    "threats": threats,
    "results": results,
    "attention": attention,
    "sanitising": sanitising,
    "sanitising_networks": sanitising_networks,
    "restoring": restoring,
}


def main() -> int:
    """Rewrites or checks every page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when a part is stale")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = text
        for name in re.findall(r"<!-- generated:(\w+) -->", text):
            block = f"<!-- generated:{name} -->\n{BLOCKS[name]()}\n<!-- /generated -->"
            made = re.sub(
                rf"<!-- generated:{name} -->.*?<!-- /generated -->", lambda _, b=block: b, made, flags=re.DOTALL
            )
        if made != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(made, encoding="utf-8")
    if stale and check:
        print(f"stale: {', '.join(stale)}; run: make docs", file=sys.stderr)
        return 1
    print(f"{'checked' if check else 'wrote'} {len(PAGES)} pages, {len(stale)} {'stale' if check else 'changed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
