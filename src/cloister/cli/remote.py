"""What the commands share that talk to an enclave elsewhere: whom to expect, saving receipts."""

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cloister.cli.display import stderr
from cloister.errors import SettingsError

if TYPE_CHECKING:
    from cloister.attest.policy import Policy
    from cloister.attest.receipt import Receipt
    from cloister.attest.roots import Roots
    from cloister.local.remote import RemoteLLM

ConnectOption = Annotated[
    str | None,
    typer.Option("--connect", help="HOST:PORT of a cloister serve, instead of a MODEL here. It is verified first."),
]
VerifyPolicyOption = Annotated[
    Path | None,
    typer.Option("--verify-policy", help="With --connect: TOML file that states what is expected and who is believed."),
]
MeasurementOption = Annotated[
    list[str] | None,
    typer.Option("--measurement", help="With --connect and --root: accepted measurement in hexadecimal (repeatable)."),
]
RootsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--root", help="With --connect: sim=FINGERPRINT of a software stand-in that is believed. It is not a TEE."
    ),
]
ModelRootOption = Annotated[
    list[str] | None,
    typer.Option("--model-root", help="With --connect: identity of a sealed model that it must be (repeatable)."),
]
ReceiptOption = Annotated[
    Path | None, typer.Option("--receipt", help="With --connect: file for the receipt of the answer.")
]


def connected(
    address: str,
    policy: Path | None,
    measurements: list[str] | None,
    roots: list[str] | None,
    model_roots: list[str] | None,
) -> "RemoteLLM":
    """Returns the model in the enclave at `address`, verified under what the command line states.

    Raises:
        SettingsError: it states nothing, or something impossible. What `cloister.connect` raises is raised too.
    """
    from cloister.attest import policy_file
    from cloister.attest.evidence import Kind, Skip
    from cloister.local.remote import MEASURED, NO_POLICY, RemoteLLM

    if policy is not None:
        if measurements or roots:
            raise SettingsError(
                "--measurement and --root were given with --verify-policy.", remedy="State them in the file."
            )
        found = policy_file.read(policy, Skip("set for each connection"))
        expected, trusted = found.policy, found.roots
    elif measurements and roots:
        expected, trusted = _stand_in(measurements, roots)
    else:
        raise SettingsError("Nothing says which enclave to expect, so nothing is sent.", remedy=NO_POLICY)
    wanted = frozenset(_hex(text, "--model-root") for text in model_roots) if model_roots else MEASURED
    kinds: set[Kind | None] = set()
    llm = RemoteLLM(address, expected, trusted, wanted, on_verdict=lambda verdict: kinds.add(verdict.kind))
    if Kind.SIM in kinds:
        stderr().print(
            "[bold yellow]The enclave is a software stand-in: no hardware protects the prompt there.[/bold yellow]"
        )
    if llm.info.warning:
        stderr().print(Text(llm.info.warning, style="bold red"))
    return llm


def save(receipt: "Receipt", path: Path) -> None:
    """Writes a receipt, completely or not at all.

    Raises:
        SettingsError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(receipt.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SettingsError(f"The receipt {path} cannot be written: {error.strerror}.") from error


def _stand_in(measurements: list[str], roots: list[str]) -> "tuple[Policy, Roots]":
    from cloister.seal.policy import parse_policy, stand_in_policy

    family, _, fingerprint = roots[0].partition("=")
    if len(roots) != 1 or family != "sim":
        raise SettingsError(
            f"--root is {', '.join(roots)}.", remedy="Give one sim=FINGERPRINT; for hardware use --verify-policy."
        )
    named = [_hex(text, "--measurement").hex() for text in measurements]
    return parse_policy(stand_in_policy(_hex(fingerprint, "--root"), named))


def _hex(text: str, name: str) -> bytes:
    from cloister.cli.verify_judge import parse_hex

    return parse_hex(text, name)
