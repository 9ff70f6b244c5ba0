"""One JSON record per run: what was measured, on what, with which command, from which commit."""

import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cloister import __version__
from cloister.whole_file import whole_file

CHANGED = "+changes"
"""What follows a commit if the code was changed since."""


@dataclass(frozen=True)
class Record:
    """The result of a benchmark: `rows` are what the table shows, in order; every number is in `rows` or `facts`."""

    name: str
    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    settings: dict[str, Any]
    note: str = ""
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    command: str = field(default_factory=lambda: command_line(sys.argv[1:]))
    time: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def write(self, folder: Path) -> Path:
        """Writes the record as JSON, whole or not at all; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        with whole_file(path, mode=0o644, replace=True) as file:
            file.write(json.dumps(asdict(self), indent=1).encode() + b"\n")
        return path

    def show(self, console: Console) -> None:
        """Prints the rows as a table, then the facts."""
        table = Table(title=self.name, box=None, header_style="dim", title_justify="left")
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        for column in columns:
            first = column == columns[0]
            table.add_column(column, justify="left" if first else "right", no_wrap=first)
        for row in self.rows:
            table.add_row(*(readable(row.get(column, "")) for column in columns))
        console.print(table)
        for key, value in self.facts.items():
            console.print(f"  {key}: {readable(value)}")
        if self.note:
            console.print(f"  [dim]{self.note}[/dim]")


def command_line(arguments: list[str]) -> str:
    """Returns the command as a reader would repeat it: of a path, only the name counts."""
    return " ".join(["cloister", *(Path(part).name if Path(part).is_absolute() else part for part in arguments)])


def readable(value: object) -> str:
    """Returns a value as a person would write it."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def machine() -> dict[str, Any]:
    """Returns what a reader needs to know of this machine."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else ""
    versions = {}
    for name in ("numpy", "numba", "llvmlite", "torch", "triton", "transformers", "onnxruntime"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cloister": __version__,
        "commit": commit(),
        "versions": versions,
    }


def peak_memory_bytes() -> int:
    """Returns the most memory that this program has had resident (`ru_maxrss` would count its parent's as well)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def commit() -> str:
    """Returns the commit of the checkout that this code runs from, marked if it was changed; empty outside one."""
    here = Path(__file__).parent
    head = _git(["rev-parse", "--short", "HEAD"], here)
    return head + (CHANGED if head and _git(["status", "--porcelain", "."], here.parent) else "")


def _git(arguments: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
