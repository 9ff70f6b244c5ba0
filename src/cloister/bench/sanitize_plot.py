"""Plots the record of `cloister bench sanitize`: accuracy against exact ε, and against the best attack's success."""

from pathlib import Path

from cloister.bench.record import Record

COLOURS = ("#0b7a75", "#b5838d", "#6d6875", "#e07a5f", "#f2a65a", "#3d5a80", "#98c1d9", "#293241", "#8d99ae")


def plot(record: Record, folder: Path) -> Path | None:
    """Writes `sanitize.svg` beside the record and returns its path; nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "cloister", "font.size": 9}):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        names = list(dict.fromkeys(row["mechanism"] for row in record.rows))
        for name, colour in zip(names, COLOURS * 2, strict=False):
            rows = [row for row in record.rows if row["mechanism"] == name]
            levels = [row["accuracy"] for row in rows]
            width = 2.2 if name == "channel" else 1.1
            left.errorbar(
                [row["ε"] for row in rows],
                levels,
                yerr=[row["± sd"] for row in rows],
                label=name,
                color=colour,
                lw=width,
            )
            right.plot([row["attack %"] for row in rows], levels, "o-", color=colour, lw=width, ms=3)
        for axes in (left, right):
            axes.axhline(record.facts["clean accuracy"], color="#999", lw=0.8, ls=":")
            axes.grid(alpha=0.25)
        left.set_xscale("log", base=2)
        left.set_xlabel("ε (exact, but for RANTEXT and 'as published')")
        left.set_ylabel("SST-2 accuracy, classifier trained on clean text")
        right.set_xlabel("the best attacker names the word, %")
        right.set_xscale("log")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        path = folder / "sanitize.svg"
        figure.savefig(path, metadata={"Date": None})
    return path
