"""`cloister slice`: a full fine-tune becomes its public base and private low-rank slices."""

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cloister.cli import options as o
from cloister.cli.display import Display, human_bytes, stdout
from cloister.errors import AdapterError
from cloister.wire.session import Progress

if TYPE_CHECKING:
    from cloister.model.slices import Sliced

REPORT = "slice_report.json"
"""Where the report is kept beside the slices."""

SHOWN = 12
"""Most layers in the table: those with the largest error."""


def slice_(
    base: Annotated[Path, typer.Argument(help="Folder of the public base model.", callback=o.model_folder)],
    finetuned: Annotated[Path, typer.Argument(help="Folder of the full fine-tune of it.", callback=o.model_folder)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the slices: a PEFT LoRA adapter.")],
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of every slice.", min=1)] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Instead of a rank: share of each layer's change to keep. Default: 0.99."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to measure the loss on; default: the one that is shipped.")
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", help="Windows of 256 tokens to measure on; 0: do not measure.", min=0)
    ] = 4,
    force: Annotated[bool, typer.Option("--force", help="Replace slices that are in the folder already.")] = False,
    quiet: o.SilentOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Turn a full fine-tune into a public base and private slices, so that the base can be lent.

    [bold]cloister slice Llama-3.2-1B my-finetune --out my-slices --energy 0.99[/bold]

    [bold]cloister chat Llama-3.2-1B --adapter mine=my-slices[/bold]

    Fine-tuning changes each linear layer by a matrix that is often nearly of low rank. A slice is the best approximation of
    that change; norms, biases and embeddings are kept whole. The report says what was lost: look at it before use.
    """
    from cloister.assets import demo_model
    from cloister.model.adapters import CONFIG
    from cloister.model.directory import open_model
    from cloister.model.low_rank import Criterion
    from cloister.model.publish import published
    from cloister.model.slice_check import measure
    from cloister.model.slices import write_slices

    started = time.monotonic()
    criterion = Criterion(rank, 0.99 if rank is None and energy is None else energy)
    content = _read(text or demo_model() / "heldout.txt")
    display = Display(quiet or as_json)

    def progress(stage: str, done: int, total: int) -> None:
        display(Progress(stage, done, total, "windows" if stage == "measuring" else "tensors"))

    public, tuned = open_model(base), open_model(finetuned)
    with public.checkpoint, tuned.checkpoint, published(out, replace_holding=CONFIG if force else "") as work:
        with display.loading():
            sliced = write_slices(public, tuned, work, criterion, progress)
            loss = measure(public, tuned, work, content, windows, partial(progress, "measuring")) if windows else None
        sizes = {"base": public.checkpoint.nbytes, "finetuned": tuned.checkpoint.nbytes}
        report = _report(sliced, sizes, asdict(loss) if loss else None, {"rank": rank, "energy": criterion.energy})
        report |= {"base": str(base), "finetuned": str(finetuned), "seconds": round(time.monotonic() - started, 1)}
        (work / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(report))
    elif not quiet:
        _show(report, out)


def _report(
    sliced: "Sliced", sizes: dict[str, int], loss: dict[str, Any] | None, criterion: dict[str, Any]
) -> dict[str, Any]:
    return {
        "criterion": {key: value for key, value in criterion.items() if value is not None},
        "base_sha256": sliced.base_sha256,
        "bytes": {"slices": sliced.bytes, **sizes},
        "divergence": loss,
        "layers": [asdict(layer) for layer in sliced.layers],
        "whole": sliced.whole,
    }


def _show(report: dict[str, Any], out: Path) -> None:
    console = stdout()
    layers = sorted(report["layers"], key=lambda layer: -layer["relative_error"])
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("layer", "shape", "rank", "error of the weight", "energy kept", "size"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in layers[:SHOWN]:
        table.add_row(
            layer["module"], " x ".join(map(str, layer["shape"])), str(layer["rank"]),
            f"{100 * layer['relative_error']:.4f} %", f"{100 * layer['energy']:.2f} %", human_bytes(layer["bytes"]),
        )  # fmt: skip
    console.print(table)
    if len(layers) > SHOWN:
        console.print(
            f"... and {len(layers) - SHOWN} with a smaller error: {escape(str(out / REPORT))} has them all.",
            style="dim",
        )
    if report["whole"]:
        size = sum(report["whole"].values())
        console.print(f"{len(report['whole'])} tensors kept whole ({human_bytes(size)}): norms, biases, embeddings.")
    if report["divergence"]:
        loss = report["divergence"]
        console.print(
            f"On {loss['tokens']} tokens, KL to the fine-tune: [bold]{loss['kl_nats']:.2e}[/bold] nats per token (the base "
            f"alone: {loss['kl_base_nats']:.2e}); the same likeliest token {100 * loss['same_choice']:.1f} % of the time; "
            f"perplexity {loss['perplexity']:.3f} (fine-tune {loss['perplexity_finetuned']:.3f})."
        )
    sizes = report["bytes"]
    console.print(
        f"{human_bytes(sizes['slices'])} in {escape(str(out))} (the fine-tune: {human_bytes(sizes['finetuned'])})."
    )
    console.print(f"Use it: cloister chat {escape(report['base'])} --adapter mine={escape(str(out))}", soft_wrap=True)


def _read(path: Path) -> str:
    from cloister.model.files import read_bytes

    try:
        return read_bytes(path, kind=AdapterError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} is not UTF-8 text.", remedy="Give another one with --text.") from error
