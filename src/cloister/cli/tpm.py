"""`cloister tpm`: enrol the attestation key of a machine's TPM, proven by its vendor's certificate."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.display import stdout
from cloister.errors import AttestationError

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Enrol the attestation key of a machine's TPM: only the TPM that its vendor certifies, with that key in it, can answer "
        "the owner's challenge. On the machine: [bold]cloister tpm show[/bold], on the owner's side [bold]cloister tpm "
        "challenge[/bold], on the machine [bold]cloister tpm answer[/bold], on the owner's side [bold]cloister tpm enrol[/bold]."
    ),
)

DeviceOption = Annotated[Path, typer.Option("--device", help="The TPM: a device, or the socket of a software TPM.")]
DEVICE = Path("/dev/tpmrm0")


@app.command("show")
def show(
    out: Annotated[Path, typer.Option("--out", help="File to write, for the owner. Nothing in it is secret.")],
    device: DeviceOption = DEVICE,
) -> None:
    """On the machine: write its endorsement certificate and its attestation key."""
    from cloister.attest.tpm_activation import show as shown

    _write(out, shown(device).encode())


@app.command("challenge")
def challenge(
    machine: Annotated[Path, typer.Argument(help="What the machine showed.")],
    authorities: Annotated[
        Path, typer.Option("--authorities", help="PEM file of the TPM vendor's certificates: issuer first, root last.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write, for the machine.")],
    keep: Annotated[Path, typer.Option("--keep", help="File to write and to keep private until the machine answers.")],
) -> None:
    """On the owner's side: check the certificate, and write a challenge that this TPM alone can read."""
    from cloister.attest.certificates import load_pem_chain
    from cloister.attest.tpm_enrolment import Enrolment, Shown
    from cloister.seal.signing import write_private

    shown, trusted = Shown.decode(_read(machine)), load_pem_chain(_read(authorities))
    enrolment, credential = Enrolment.begin(shown, trusted, datetime.now(UTC))
    write_private(keep, enrolment.kept())
    _write(out, credential.encode())


@app.command("answer")
def answer(
    challenge: Annotated[Path, typer.Argument(help="The owner's challenge.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, for the owner.")],
    device: DeviceOption = DEVICE,
) -> None:
    """On the machine: let the TPM read the challenge, and write what it says."""
    from cloister.attest.tpm_activation import activate
    from cloister.attest.tpm_enrolment import Credential

    _write(out, json.dumps({"answer": activate(device, Credential.decode(_read(challenge))).hex()}).encode())


@app.command("enrol")
def enrol(
    answer: Annotated[Path, typer.Argument(help="The machine's answer.")],
    keep: Annotated[
        Path, typer.Option("--keep", help="What was kept; it is deleted once ANSWER is read: it is good for one.")
    ],
) -> None:
    """On the owner's side: compare the answer, and print the line that enrols the key in a policy."""
    from cloister.attest.tpm_enrolment import Enrolment
    from cloister.seal.signing import read_private

    try:
        said = bytes.fromhex(json.loads(_read(answer))["answer"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AttestationError(
            f"{answer} is not an answer.", remedy="Name the file that cloister tpm answer wrote."
        ) from error
    enrolment = Enrolment.resume(read_private(keep))
    keep.unlink()
    name = enrolment.accept(said)
    stdout().print(f'[roots]\ntpm = ["{name.hex()}"]', markup=False, highlight=False, soft_wrap=True)


def _read(path: Path) -> bytes:
    from cloister.attest.tpm_enrolment import MAX_BYTES

    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AttestationError(f"{path} cannot be read: {error.strerror}.", remedy="Name the right file.") from error


def _write(path: Path, content: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise AttestationError(f"{path} cannot be written: {error.strerror}.", remedy="Name another file.") from error
