"""The picture of a plan: a decoder block with every operator coloured by where it runs (SVG, PNG or PDF, by suffix)."""

from pathlib import Path
from typing import Any, Final

from cloister.errors import PlanError
from cloister.plan.labels import Placement
from cloister.plan.report import Report, Row
from cloister.whole_file import whole_file

COLOURS: Final = {Placement.ENCLAVE: "#2e7d32", Placement.BLINDED: "#1565c0", Placement.PLAIN: "#c62828"}
"""Green stays inside, blue goes out blinded, red is seen."""

MEANINGS: Final = {
    Placement.ENCLAVE: "in the enclave",
    Placement.BLINDED: "on the accelerator, blinded (0 bits)",
    Placement.PLAIN: "on the accelerator, in plain",
}

_ROWS: Final = (
    ("embedding",),
    ("attention norm",),
    ("Q projection", "K projection", "V projection"),
    ("rotary",),
    ("QK^T", "softmax", "AV"),
    ("O projection",),
    ("FFN norm",),
    ("gate projection", "up projection"),
    ("activation",),
    ("down projection",),
    ("LoRA A", "LoRA B"),
    ("final norm",),
    ("LM head",),
    ("sampling",),
)
"""Top to bottom as data flows; what runs side by side stands side by side."""

_BLOCK: Final = (1, 10)
"""Rows of the figure that belong to a decoder block."""


def draw(report: Report, path: Path) -> None:
    """Writes the picture of a plan; the suffix chooses the format.

    Raises:
        PlanError: matplotlib is not installed, or the file cannot be written in that format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError(
            "Pictures need matplotlib, which is not installed.",
            remedy="Install it with: pip install 'cloister[plots]'.",
        ) from error
    figure = Figure(figsize=(9, 10))
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.9))
    axes.set_xlim(0, 12)
    axes.set_ylim(-len(_ROWS) - 0.6, 0.6)
    axes.axis("off")
    top, bottom = -_BLOCK[0] + 0.42, -_BLOCK[1] - 0.42
    axes.add_patch(_box(0.3, bottom, 11.4, top - bottom, "#f5f5f5", edge="#9e9e9e"))
    axes.text(0.45, top - 0.25, "decoder\nblock", va="top", fontsize=8, color="#616161", rotation=0)
    rows: dict[str, list[Row]] = {}
    for row in report.rows:
        rows.setdefault(row.operator, []).append(row)
    for line, kinds in enumerate(_ROWS):
        present = [kind for kind in kinds if kind in rows]
        width = 9.0 / max(1, len(present))
        for place, kind in enumerate(present):
            _operator(axes, 1.5 + place * width, -line, width, kind, rows[kind])
    for place, (placement, colour) in enumerate(COLOURS.items()):
        axes.add_patch(_box(0.4 + 3.9 * place, -len(_ROWS) - 0.3, 0.4, 0.4, colour))
        axes.text(0.9 + 3.9 * place, -len(_ROWS) - 0.1, MEANINGS[placement], va="center", fontsize=9)
    warning = "INSECURE  " if report.insecure else ""
    figure.suptitle(f"{warning}{report.model}: {report.policy}, {report.threat} (decode)", fontsize=13)
    try:
        with whole_file(path, mode=0o666, replace=True) as file:
            dated = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(file, format=path.suffix[1:] or None, metadata=dated)
    except ValueError as error:
        raise PlanError(
            f"Cannot write {path}: {error}.", remedy="Give a path that ends in .svg, .png or .pdf."
        ) from error
    except OSError as error:
        raise PlanError(f"Cannot write {path}: {error.strerror}.", remedy="Name a file in another folder.") from error


def _operator(axes: Any, left: float, top: float, width: float, kind: str, rows: list[Row]) -> None:
    """Draws one operator; where layers differ, one part for each placement."""
    total = sum(row.count for row in rows)
    start = left
    for row in rows:
        share = (width - 0.2) * row.count / total
        axes.add_patch(_box(start, top - 0.36, share, 0.72, COLOURS[Placement(row.decode)]))
        label = kind if len(rows) == 1 else f"{kind}\nlayers {row.layers}"
        bits = "" if not row.learned_prompt_bits else f"\n{row.learned_prompt_bits:.1f} bits/token"
        axes.text(
            start + share / 2,
            top,
            label + bits,
            ha="center",
            va="center",
            color="white",
            fontsize=8 if share > 1.5 else 6,
        )
        start += share


def _box(left: float, bottom: float, width: float, height: float, colour: str, edge: str = "none") -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=edge
    )
