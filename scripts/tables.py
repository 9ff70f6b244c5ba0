"""What the makers of documentation share: Markdown tables, numbers as they are shown, and where a record was measured."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def read(name: str) -> dict[str, Any] | None:
    """Returns the record of a benchmark; None if it was not measured yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measured_on(record: dict[str, Any]) -> str:
    """Returns command, machine, commit and day of a record."""
    return f"`{record['command']}` on {machine(record)}, commit `{record['machine']['commit']}`, {record['time'][:10]}"


def machine(record: dict[str, Any]) -> str:
    """Returns what a record was measured on."""
    return f"{record['machine']['cores']} cores of {record['machine']['processor'] or 'a processor'}"


def table(rows: list[dict[str, object]], words: int = 1) -> str:
    """Returns a table whose first `words` columns are words, and whose others are numbers."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "| --- " * words + "| ---: " * (len(columns) - words) + "|"]
    lines += ["| " + " | ".join(number(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def number(value: object) -> str:
    """Returns a value as tables show it: three digits, thousands apart."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
