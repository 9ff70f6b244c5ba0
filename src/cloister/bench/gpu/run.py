"""Checks, then measures, within a budget of time; each part writes its record at once. The door is `make bench-gpu`."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from cloister.bench.gpu import checks, confined, end_to_end, kernels, plot, roundtrip
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.timing import device_facts, open_device
from cloister.bench.record import Record
from cloister.errors import SettingsError

PARTS: Final = ("checks", "roundtrip", "kernels", "models", "confined", "sanitizer")
"""In the order in which they run: what the others rest on first, what is slow and decides nothing last."""

RIGHT: Final = 0
WRONG: Final = 1
FAILED: Final = 3
"""Exit codes: every part ran, the GPU gave a wrong product, a part failed (2 is kept for what is missing on the machine)."""

_KERNEL_SHARE: Final = 0.4
"""Most of the remaining time that the kernels may take if whole models are to be measured as well."""

_LAST_SECONDS: Final = 60.0
"""Kept for the parts after the models, if they are wanted."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to run."""

    out: Path
    """Folder of the records."""
    seconds: float = 570.0
    """What is not begun by then is skipped."""
    parts: Sequence[str] = PARTS
    smoke: bool = False
    """Toy sizes in Triton's interpreter."""
    model: str = "demo"
    """Checked whole, bit for bit: demo, or the folder of a model."""
    command: str = "make bench-gpu"
    commit: str = ""
    """What the records name where the checkout has no history of its own."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise SettingsError(f"There is no part {unknown[0]!r}.", remedy=f"The parts are {', '.join(PARTS)}.")


def run(wanted: Wanted, console: Console) -> int:
    """Writes the records; returns an exit code. After a wrong product nothing is measured; after a failed part the others run.

    Raises:
        SettingsError: there is no GPU, and this is no smoke run.
    """
    open_device(wanted.smoke)
    return Run(wanted, console).all_parts()


class Run:
    """One run of some parts."""

    def __init__(self, wanted: Wanted, console: Console) -> None:
        self._wanted = wanted
        self._console = console
        self._budget = Budget(wanted.seconds)

    def all_parts(self) -> int:
        """Runs the wanted parts in their order; returns the exit code."""
        code = RIGHT
        actions: dict[str, Callable[[], int]] = {
            "checks": self._checks,
            "roundtrip": lambda: self._keep(roundtrip.run(self._wanted.smoke, self._console)),
            "kernels": self._kernels,
            "models": self._models,
            "confined": lambda: self._keep(confined.run(self._wanted.smoke)),
            "sanitizer": self._sanitizer,
        }
        for part in PARTS:
            if part not in self._wanted.parts:
                continue
            if not self._budget.has(0):
                self._console.print(f"{part}: skipped, out of time")
                continue
            try:
                code = max(code, actions[part]())
            except Exception:  # whatever a driver raises: the other parts may still tell something
                self._console.print(f"[bold red]{part} failed:[/bold red]")
                self._console.print_exception(max_frames=12)
                code = max(code, FAILED)
            if code == WRONG:
                self._console.print("[bold red]The GPU gives wrong products: nothing is measured.[/bold red]")
                return WRONG
        left = self._budget.left_seconds
        self._console.print(
            f"{self._wanted.seconds - left:.0f} of {self._wanted.seconds:.0f} s used; records in {self._wanted.out}"
        )
        return code

    def _checks(self) -> int:
        self._console.print("checking the kernels and a whole model, bit for bit ...")
        found = checks.run(self._wanted.smoke, self._wanted.model)
        differences: list[str] = found.pop("differences")
        self._keep(
            Record(
                self._named("gpu-checks"),
                [{"check": name, "result": value} for name, value in found.items()],
                {"differences": "; ".join(differences) or "none", **device_facts(self._wanted.smoke)},
                {"rows": list(checks.ROWS), "model": Path(self._wanted.model).name},
                "Fresh random inputs each run, outputs poisoned before each product, every element compared with the CPU.",
            )
        )
        return WRONG if differences else RIGHT

    def _kernels(self) -> int:
        share = _KERNEL_SHARE if "models" in self._wanted.parts else 1.0
        budget = Budget(self._budget.left_seconds * share)
        return self._keep(kernels.run(self._wanted.smoke, self._console, budget, self._write))

    def _models(self) -> int:
        last = _LAST_SECONDS if {"confined", "sanitizer"} & set(self._wanted.parts) else 0.0
        budget = Budget(self._budget.left_seconds - last)
        measured = self._kept("gpu-kernels")
        whole = end_to_end.run(self._wanted.smoke, self._console, budget, measured, self._write)
        self._keep(whole)
        if importlib.util.find_spec("matplotlib") is None:
            self._console.print("no plot: matplotlib is not installed")
        elif path := plot.draw(whole, self._wanted.out):
            self._console.print(f"plot: {path}")
        return RIGHT

    def _sanitizer(self) -> int:
        rows = []
        for tool in checks.SANITIZERS:
            if self._wanted.smoke:
                result = "not run: a smoke run has no GPU"
            else:
                self._console.print(f"compute-sanitizer {tool} ...")
                result = checks.sanitizer(tool, self._budget.left_seconds)
            rows.append({"check": f"compute-sanitizer {tool}, small shapes", "result": result})
        return self._keep(Record(self._named("gpu-sanitizer"), rows, device_facts(self._wanted.smoke), {}))

    def _named(self, name: str) -> str:
        return f"{name}-smoke" if self._wanted.smoke else name

    def _kept(self, name: str) -> Record | None:
        """Returns a record that an earlier part, or an earlier run, wrote; None if there is none."""
        try:
            values = json.loads((self._wanted.out / f"{self._named(name)}.json").read_text(encoding="utf-8"))
            return Record(**values)
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, record: Record) -> None:
        commit = record.machine["commit"] or self._wanted.commit
        machine = {**record.machine, "commit": commit}
        dataclasses.replace(record, command=self._wanted.command, machine=machine).write(self._wanted.out)

    def _keep(self, record: Record) -> int:
        self._write(record)
        record.show(self._console)
        return RIGHT
