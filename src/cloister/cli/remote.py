"""What the commands share that talk to an enclave elsewhere: whom to expect."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from cloister.cli.display import stderr
from cloister.cli.options import MODEL_HELP, model_folder
from cloister.errors import SettingsError

if TYPE_CHECKING:
    from cloister.attest.policy import Policy
    from cloister.attest.roots import Roots
    from cloister.local.remote import RemoteLLM

ELSEWHERE: Final = "A model in an enclave elsewhere"
"""The heading of this group of options in --help."""

ModelArgument = Annotated[Path | None, typer.Argument(help=MODEL_HELP, callback=model_folder)]
ConnectOption = Annotated[
    str | None,
    typer.Option(
        "--connect",
        help="HOST:PORT of a cloister serve, instead of a MODEL here. It is verified first.",
        rich_help_panel=ELSEWHERE,
    ),
]
VerifyPolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--verify-policy",
        help="With --connect: TOML file that states what is expected and who is believed.",
        rich_help_panel=ELSEWHERE,
    ),
]
MeasurementOption = Annotated[
    list[str] | None,
    typer.Option(
        "--measurement",
        help="With --connect and --root: accepted measurement in hexadecimal (repeatable).",
        rich_help_panel=ELSEWHERE,
    ),
]
RootsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--root",
        help="With --connect: sim=FINGERPRINT of a software stand-in that is believed. It is not a TEE.",
        rich_help_panel=ELSEWHERE,
    ),
]
ModelRootOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-root",
        help="With --connect: identity of a sealed model that it must be (repeatable).",
        rich_help_panel=ELSEWHERE,
    ),
]


@dataclass(frozen=True)
class Elsewhere:
    """An enclave elsewhere, and what the command line says of it."""

    address: str
    policy: Path | None
    measurements: tuple[str, ...]
    roots: tuple[str, ...]
    model_roots: tuple[str, ...]

    def connected(self) -> "RemoteLLM":
        """Returns the model there, verified under what the command line states.

        Raises:
            SettingsError: it states nothing, or something impossible. What `cloister.connect` raises is raised too.
        """
        from cloister.attest.evidence import Kind
        from cloister.local.remote import MEASURED, RemoteLLM, tcp

        expected, trusted = self._expected()
        wanted = frozenset(_hex(text, "--model-root") for text in self.model_roots) or MEASURED
        kinds: set[Kind | None] = set()
        llm = RemoteLLM(
            tcp(self.address), expected, trusted, wanted, on_verdict=lambda verdict: kinds.add(verdict.kind)
        )
        if Kind.SIM in kinds:
            stderr().print(
                "[bold yellow]The enclave is a software stand-in: no hardware protects the prompt there.[/bold yellow]"
            )
        if llm.info.warning:
            stderr().print(Text(llm.info.warning, style="bold red"))
        return llm

    @property
    def trust(self) -> str:
        """The options with which `cloister verify` expects and believes the same."""
        stated = [f"--policy {shlex.quote(str(self.policy))}"] if self.policy is not None else []
        stated += [f"--root {text}" for text in self.roots] + [f"--measurement {text}" for text in self.measurements]
        return " ".join([*stated, *(f"--model-root {text}" for text in self.model_roots)])

    def _expected(self) -> "tuple[Policy, Roots]":
        from cloister.attest import policy_file
        from cloister.attest.evidence import Skip
        from cloister.local.remote import NO_POLICY

        if self.policy is None:
            if not (self.measurements and self.roots):
                raise SettingsError("Nothing says which enclave to expect, so nothing is sent.", remedy=NO_POLICY)
            return _stand_in(self.measurements, self.roots)
        if self.measurements or self.roots:
            raise SettingsError(
                "--measurement and --root were given with --verify-policy.", remedy="State them in the file."
            )
        found = policy_file.read(self.policy, Skip("set for each connection"))
        return found.policy, found.roots


def elsewhere(
    model: Path | None,
    address: str | None,
    policy: Path | None,
    measurements: list[str] | None,
    roots: list[str] | None,
    model_roots: list[str] | None,
) -> Elsewhere | None:
    """Returns the enclave that --connect names; None if a model here was named instead.

    Raises:
        SettingsError: neither or both were named, or options of --connect without it.
    """
    if (model is None) == (address is None):
        raise SettingsError("It must be said what answers.", remedy="Give either MODEL or --connect HOST:PORT.")
    if address is not None:
        return Elsewhere(address, policy, tuple(measurements or ()), tuple(roots or ()), tuple(model_roots or ()))
    if any(value is not None for value in (policy, measurements, roots, model_roots)):
        raise SettingsError("Options of --connect were given without it.", remedy="Add --connect HOST:PORT.")
    return None


def voice(use: str | None) -> str:
    """Returns the adapter of an enclave elsewhere that answers, as a request names it: empty for the base."""
    return "" if use in (None, "base") else str(use)


def _stand_in(measurements: tuple[str, ...], roots: tuple[str, ...]) -> "tuple[Policy, Roots]":
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
