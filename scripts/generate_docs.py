"""Writes the generated parts of README and docs: what the source says of itself, and tables of benchmark records.

Usage: generate_docs.py [--check]    (--check changes nothing and fails when a part is stale)
"""

import argparse
import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import typer

from record_tables import attention, baselines, gateway, records, restoring, results
from sanitising_tables import sanitising, sanitising_networks, sanitising_short, sanitising_speed
from tables import table

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
        groups = dict.fromkeys([None, *(getattr(parameter, "rich_help_panel", None) for parameter in options)])
        for group in groups:
            rows += [f"| **{group}** | | |"] if group else []
            rows += [_option(one) for one in options if getattr(one, "rich_help_panel", None) == group]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _option(parameter: Any) -> str:
    default = getattr(parameter.default, "value", parameter.default)
    shown = "" if default is None or default is False or callable(default) else f"`{default}`"
    named = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
    meaning = " ".join(str(parameter.help).split()).replace("|", "/").replace("\\[", "[")
    return f"| {', '.join(f'`{flag}`' for flag in named)} | {shown} | {meaning} |"


def _commands(command, name):  # type: ignore[no-untyped-def]
    children = getattr(command, "commands", None)
    if not children:
        yield name, command
        return
    for child, value in children.items():
        yield from _commands(value, f"{name} {child}")


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
    return table(rows, 5)


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
    return table(rows, 4)


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
    "sanitising_short": sanitising_short,
    "sanitising_speed": sanitising_speed,
    "restoring": restoring,
    "gateway": gateway,
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
