"""Plots the record of `cloister bench sanitize`: accuracy against exact ε, and against the best attack's success."""

from pathlib import Path
from typing import Any

from cloister.bench.record import Record
from cloister.bench.sanitize_systems import CHANNEL, MAIN

COLOURS = ("#0b7a75", "#e07a5f", "#6d6875", "#3d5a80", "#f2a65a", "#98c1d9", "#b5838d", "#293241", "#8d99ae", "#c9ada7")
LEVELS = {"accuracy": "trained on clean text", "trained sanitised": "trained on sanitised text"}


def plot(record: Record, folder: Path) -> Path | None:
    """Writes `sanitize.svg` beside the record and returns its path; nothing without matplotlib.

    The first task against ε and against the attack, below it each other task against ε, both for the main mechanisms.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in record.rows))
    with mpl.rc_context({"svg.hashsalt": "cloister", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(10.5, 3.2 * (1 + (len(tasks) > 1))), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.add_gridspec(1 + (len(tasks) > 1), 12)
        top = [figure.add_subplot(grid[0, start : start + 4]) for start in (0, 4, 8)]
        for axes, level in zip(top, LEVELS, strict=False):
            _against(axes, record, tasks[0], level, "ε")
        _against(top[2], record, tasks[0], "trained sanitised", "uniform %")
        width = 12 // max(1, len(tasks) - 1)
        for place, task in enumerate(tasks[1:]):
            axes = figure.add_subplot(grid[1, place * width : (place + 1) * width])
            _against(axes, record, task, "trained sanitised", "ε")
        figure.legend(*top[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        path = folder / "sanitize.svg"
        figure.savefig(path, metadata={"Date": None})
    return path


def _against(axes: Any, record: Record, task: str, level: str, column: str) -> None:
    for name, colour in zip(MAIN, COLOURS, strict=False):
        rows = [row for row in record.rows if row["task"] == task and row["mechanism"] == name]
        rows.sort(key=lambda row: row[column])
        style = {"color": colour, "lw": 2.2 if name == CHANNEL else 1.2, "ms": 3}
        axes.plot([row[column] for row in rows], [100 * row[level] for row in rows], "o-", label=name, **style)
    axes.axhline(100 * record.facts[f"clean accuracy, {task}"], color="#999", lw=0.8, ls=":", label="clean text")
    axes.set_xscale("log", base=2 if column == "ε" else 10)
    axes.set_xlabel("exact ε" if column == "ε" else "the best attacker names the word, %")
    axes.set_title(f"{task}: accuracy, %,\n{LEVELS[level]}")
    axes.grid(alpha=0.25)
