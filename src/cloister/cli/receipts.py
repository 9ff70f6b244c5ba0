"""What the commands share that keep receipts: three files, and the command that verifies them."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from cloister.cli.display import stderr
from cloister.errors import SettingsError
from cloister.whole_file import whole_file

if TYPE_CHECKING:
    from cloister.local.reply import Reply

ReceiptOption = Annotated[
    Path | None,
    typer.Option(
        "--receipt",
        help="File for the receipt of the answer. What its two hashes are of is written beside it (.request, .response).",
    ),
]
ReceiptsOption = Annotated[
    Path | None,
    typer.Option("--receipts", help="Folder for the receipts of all answers: 001.json, 001.request, 001.response ..."),
]
SUFFIXES: Final = (".request", ".response")
"""Of the files with the bytes that a receipt is about."""


def check_place(path: Path | None) -> None:
    """Raises `SettingsError` if a receipt could not be kept there, before anything is asked."""
    if path is None:
        return
    if path.suffix in SUFFIXES:
        raise SettingsError(f"--receipt is {path}.", remedy="Give it another ending, such as .json.")
    if path.is_dir() or not path.parent.is_dir():
        raise SettingsError(f"The receipt cannot be kept in {path}.", remedy="Name a file in a folder that exists.")


def keep(reply: "Reply", path: Path) -> None:
    """Writes the receipt of a finished answer, with its request and response beside it; each completely or not at all.

    They hold prompt and answer, so each is readable by its owner only.

    Raises:
        SettingsError: they cannot be written. What `Reply.receipt` raises is raised too.
    """
    receipt = reply.receipt
    if receipt is None:
        raise SettingsError(
            "The answer has no end, so it has no receipt.", remedy="Ask again, and let the answer come to its end."
        )
    request, response = (path.with_suffix(suffix) for suffix in SUFFIXES)
    for place, content in ((request, reply.request), (response, reply.response), (path, receipt.encode())):
        _write(place, content)


def keep_numbered(reply: "Reply", folder: Path) -> Path:
    """Writes the receipt of a finished answer under the next free number, and returns its file; raises as `keep` does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(file.stem) for file in folder.glob("*.json") if file.stem.isdecimal()]
    except OSError as error:
        raise SettingsError(
            f"The receipts cannot be kept in {folder}: {error.strerror}.", remedy="Name a folder that you may write."
        ) from error
    path = folder / f"{max(taken, default=0) + 1:03}.json"
    keep(reply, path)
    return path


def tell(path: Path, trust: str) -> None:
    """Prints the command that verifies a receipt; `trust` are the options that say what is expected and who is believed."""
    request, response = (path.with_suffix(suffix) for suffix in SUFFIXES)
    files = shlex.join([str(path), "--request", str(request), "--response", str(response)])
    command = f"cloister verify {files} {trust}"
    stderr().print(Text(f"Receipt kept. To verify it: {command}", style="dim"), soft_wrap=True)


def own_trust(reply: "Reply") -> str:
    """Returns the options that accept the receipt of an enclave of this machine: its stand-in, its measurement."""
    from cloister.local.receipts import own_root

    receipt = reply.receipt
    measurement = receipt.statement.measurement.hex() if receipt is not None else ""
    return f"--root sim={own_root().hex()} --measurement {measurement}"


def _write(path: Path, content: bytes) -> None:
    try:
        with whole_file(path, replace=True) as file:
            file.write(content)
    except OSError as error:
        raise SettingsError(
            f"The receipt {path} cannot be written: {error.strerror}.", remedy="Free space, or name another place."
        ) from error
