"""The stacked plot of a decode step: where the time of a blinded token goes, beside what unprotected steps take."""

from pathlib import Path
from typing import Any, Final

from cloister.bench.record import Record

PARTS: Final = {
    "enclave ms": ("enclave", "#1b6e6e"),
    "link ms": ("link", "#e0a030"),
    "kernel ms": ("kernel", "#7a4fa3"),
    "link and kernel ms": ("link and kernel", "#b07ab8"),
}
OTHERS: Final = ("unprotected bf16, CUDA graph", "unprotected int8, CUDA graph", "transformers bf16, eager")


def draw(record: Record, folder: Path) -> Path | None:
    """Writes `gpu-where-time-goes.png` beside the records; returns its path, or None where nothing was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = bars_of(record)
    if not bars:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.35 * len(bars)), layout="constrained")
    labelled: set[str] = set()
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for name, milliseconds, colour in parts:
            axes.barh(place, milliseconds, left=left, color=colour, label=None if name in labelled else name)
            labelled.add(name)
            left += milliseconds
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one decode step")
    axes.legend(loc="lower right")
    figure.suptitle(str(record.facts["device"]))
    path = folder / f"{record.name.replace('end-to-end', 'where-time-goes')}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def bars_of(record: Record) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Returns the bars: a label and its parts as (name, milliseconds, colour); a blinded step, then what it is compared with."""
    bars: list[tuple[str, list[tuple[str, float, str]]]] = []
    for row in record.rows:
        if row["variant"] == "blinded online":
            where = (row["model"], row["batch"], row["context"])
            bars.append((_label("blinded", where), [(PARTS[k][0], row[k], PARTS[k][1]) for k in PARTS if k in row]))
            bars += [
                (_label(other["variant"], where), [("unprotected", other["p50_ms"], "#b8b8b8")])
                for other in record.rows
                if other["variant"] in OTHERS and (other["model"], other["batch"], other["context"]) == where
            ]
    return bars


def _label(variant: str, where: tuple[Any, ...]) -> str:
    model, batch, context = where
    return f"{model}, batch {batch}, context {context}: {variant}"
