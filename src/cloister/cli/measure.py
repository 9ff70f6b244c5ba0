"""`cloister measure`: what decides what an enclave does, file by file, and the one digest that stands for it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cloister.cli import options as o
from cloister.cli.display import human_bytes, stderr, stdout

if TYPE_CHECKING:
    from cloister.attest.measure import Measurement, Subject

ModelFolder = Annotated[
    Path | None,
    typer.Argument(
        help="Folder of the model to measure along (demo: the shipped one); none: the program alone.",
        callback=o.model_folder,
    ),
]
RootOption = Annotated[
    str | None, typer.Option("--model-root", help="Root of a sealed model, in hexadecimal, instead of a folder.")
]
PlanOption = Annotated[Path | None, typer.Option("--plan", help="Plan file: what runs where.")]
LockOption = Annotated[
    Path | None, typer.Option("--lock", help="Lock file of the installation; default: that of a source checkout.")
]
SanitisingOption = Annotated[
    Path | None,
    typer.Option(
        "--sanitising", help="JSON file with the policy of a sanitising enclave, as GET /v1/privacy shows it."
    ),
]
FilesOption = Annotated[bool, typer.Option("--files", help="List every file with its hash.")]
ExpectOption = Annotated[
    str | None,
    typer.Option("--expect", help="The digest that it should be, in hexadecimal: exit code 10 if it is another."),
]


def measure(
    model: ModelFolder = None,
    model_root: RootOption = None,
    plan: PlanOption = None,
    settings: o.SettingsFile = None,
    lock: LockOption = None,
    sanitising: SanitisingOption = None,
    adapter: o.AdapterOption = None,
    files: FilesOption = False,
    expect: ExpectOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """List what decides what an enclave does, and the one digest that stands for all of it.

    Measured are the package's files, the packages that it needs, the lock file, the interpreter with its standard library, the
    plan, the model and the settings. One changed byte of any of them gives another digest. It is what an enclave of this
    installation finds about itself: what `sim` puts into its evidence, what receipts state, and what a policy names under
    measurement. Hardware measures the same files in its own way.
    """
    from cloister.attest.measure import this_program
    from cloister.errors import SettingsError

    if model is not None and model_root is not None:
        raise SettingsError("A folder and a root were given.", remedy="Give MODEL or --model-root.")
    root = _digest(model_root, "--model-root") if model_root is not None else None
    expected = _digest(expect, "--expect") if expect is not None else None
    chosen = o.RuntimeOptions(settings).settings()
    subject = this_program(
        chosen,
        plan,
        model if root is None else root,
        lock,
        _policy(sanitising),
        adapters=o.adapters(adapter),
        isolated=True,
    )
    found = _with_progress(subject)
    if as_json:
        _print_json(found)
    else:
        _show(found, files)
    if expected is not None and expected != found.digest:
        stderr().print(f"[bold red]It is not the expected {expected.hex()}.[/bold red]", soft_wrap=True)
        raise typer.Exit(10)


def _with_progress(subject: "Subject") -> "Measurement":
    from cloister.attest.measure import measure as take

    columns = (TextColumn("measuring"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as progress:
        sizes = sum(path.stat().st_size for _, _, path in subject.files() if path.is_file())
        task = progress.add_task("measuring", total=sizes)
        return take(subject, lambda size: progress.advance(task, size))


def _policy(path: Path | None) -> bytes:
    from cloister.errors import SettingsError
    from cloister.model.files import parse_object
    from cloister.wire.sanitising import canonical

    if path is None:
        return b""
    try:
        return canonical(parse_object(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise SettingsError(f"There is no policy in {path}: {error}.", remedy="Give a JSON object.") from error


def _digest(text: str, name: str) -> bytes:
    from cloister.errors import SettingsError

    try:
        digest = bytes.fromhex(text)
    except ValueError as error:
        raise SettingsError(f"{name} is {text!r}.", remedy="Give 64 hexadecimal digits.") from error
    if len(digest) != 32:
        raise SettingsError(f"{name} has {len(digest)} bytes.", remedy="Give 64 hexadecimal digits.")
    return digest


def _print_json(found: "Measurement") -> None:
    print(json.dumps({"measurement": found.digest.hex(), "items": [asdict(item) for item in found.items]}))


def _show(found: "Measurement", files: bool) -> None:
    from cloister.attest.measure import Part

    console = stdout()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading, side in (("part", "left"), ("things", "right"), ("size", "right"), ("what", "left")):
        table.add_column(heading, justify="right" if side == "right" else "left")
    for part in Part:
        items = found.part(part)
        what = items[0].name if len(items) == 1 else f"{items[0].name} ... {items[-1].name}" if items else ""
        table.add_row(
            part.value, str(len(items)), human_bytes(sum(item.size for item in items)), Text(what, style="dim")
        )
    if files:
        for item in found.items:
            print(f"{item.sha256}  {item.size:>12}  {item.part}:{item.name}")
    console.print(table)
    console.print(f"measurement [bold]{found.digest.hex()}[/bold]", soft_wrap=True)
