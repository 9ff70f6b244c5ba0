"""Checks, then measures, within a budget of time; writes one record per part and a plot. The door is `make bench-gpu`."""

import dataclasses
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cloister.bench.gpu import checks, end_to_end, kernels, plot, roundtrip
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.timing import device_facts
from cloister.bench.record import Record

COMMAND: Final = "make bench-gpu"

_SANITIZER_SECONDS: Final = 60.0
_KERNEL_SHARE: Final = 0.3
"""Most of the remaining time that the kernels may take; the rest is for whole models."""


def run(out: Path, seconds: float, smoke: bool, model: str, console: Console) -> int:
    """Writes the records into `out`; returns 1 if the GPU gave a wrong product (then nothing is measured), else 0.

    `model` is checked whole, bit for bit: demo, or the folder of a model.

    Raises:
        SettingsError: there is no GPU, and this is no smoke run.
    """
    budget = Budget(seconds)
    checked = check(smoke, model, console)
    _keep(checked, out, console)
    if checked.facts["differences"] != "none":
        console.print("[bold red]The GPU gives wrong products: nothing is measured.[/bold red]")
        return 1
    _keep(roundtrip.run(smoke, console), out, console)
    products = kernels.run(smoke, console, Budget(budget.left_seconds * _KERNEL_SHARE))
    _keep(products, out, console)
    whole = end_to_end.run(smoke, console, budget, products)
    _keep(whole, out, console)
    if path := plot.draw(whole, out):
        console.print(f"plot: {path}")
    console.print(f"{seconds - budget.left_seconds:.0f} of {seconds:.0f} s used; records in {out}")
    return 0


def check(smoke: bool, model: str, console: Console) -> Record:
    """Returns the record of what was compared bit for bit with the CPU, and what compute-sanitizer says."""
    console.print("checking the kernels and a whole model, bit for bit ...")
    found = checks.run(smoke, model)
    differences: list[str] = found.pop("differences")
    rows: list[dict[str, Any]] = [{"check": name, "result": value} for name, value in found.items()]
    if not smoke:
        console.print("compute-sanitizer ...")
        rows.append(
            {"check": "compute-sanitizer memcheck, small shapes", "result": checks.sanitizer(_SANITIZER_SECONDS)}
        )
    return Record(
        "gpu-checks-smoke" if smoke else "gpu-checks",
        rows,
        {"differences": "; ".join(differences) or "none", **device_facts(smoke)},
        {"rows": list(checks.ROWS), "model": Path(model).name},
        "Fresh random inputs each run, outputs poisoned before each product, every element compared with the CPU.",
    )


def _keep(record: Record, out: Path, console: Console) -> None:
    record = dataclasses.replace(record, command=COMMAND)
    record.write(out)
    record.show(console)
