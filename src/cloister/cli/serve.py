"""`cloister serve`: an enclave that answers clients elsewhere, who verify it first."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cloister.cli import options as o
from cloister.cli.display import Display, stderr
from cloister.cli.ending import until_ended
from cloister.errors import IsolationError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.attest.evidence import Attester
    from cloister.settings import Settings

ListenOption = Annotated[str, typer.Option("--listen", help="host:port for clients. What travels is sealed.")]
StandInOption = Annotated[
    bool,
    typer.Option("--stand-in", help="Prove nothing: use the software stand-in. For trying out on a plain machine."),
]
HelperOption = Annotated[
    Path | None,
    typer.Option("--tsm-helper", help="Socket of the helper that owns configfs-tsm (TDX and SEV-SNP guests)."),
]
CollateralOption = Annotated[
    Path | None, typer.Option("--collateral", help="File with the vendor's statements that travel with the evidence.")
]
BrokerAddress = Annotated[
    str | None, typer.Option("--broker", help="For a sealed model: host:port or unix:PATH of its owner's broker.")
]


PolicyOutOption = Annotated[
    Path | None,
    typer.Option("--policy-out", help="With --stand-in: write the policy file that clients verify this enclave with."),
]


def serve(
    model: o.ModelArgument,
    listen: ListenOption = "127.0.0.1:7780",
    stand_in: StandInOption = False,
    policy_out: PolicyOutOption = None,
    tsm_helper: HelperOption = None,
    collateral: CollateralOption = None,
    broker: BrokerAddress = None,
    settings: o.SettingsFile = None,
    accelerator: o.AddressOption = None,
    adapter: o.AdapterOption = None,
) -> None:
    """Serve a model from inside a TEE, through the sealed channel, with evidence per connection and a receipt per answer.

    Start it inside the TEE (see the folder deploy/). It refuses to start without one, unless --stand-in is given: then the
    enclave is a confined process of its own, and proves nothing. Ctrl-C ends it.

    [bold]cloister serve ~/models/tinyllama --stand-in --policy-out policy.toml[/bold]

    A client then runs [bold]cloister generate --connect HOST:7780 --verify-policy policy.toml -p "..."[/bold].
    """
    chosen = o.RuntimeOptions(settings, addresses=accelerator).settings()
    with until_ended():
        if stand_in:
            if tsm_helper is not None or collateral is not None:
                raise SettingsError(
                    "A stand-in has no helper and no collateral.", remedy="Leave --stand-in out in a TEE."
                )
            if broker:
                chosen = replace(chosen, seal=replace(chosen.seal, broker=broker))
            _confined(model, listen, chosen, policy_out, o.adapters(adapter))
        elif policy_out is not None:
            raise SettingsError(
                "A policy for hardware names what the hardware measures.", remedy="Write it from cloister verify HOST."
            )
        else:
            _inside(model, listen, chosen, _attester(tsm_helper, collateral), broker, o.adapters(adapter))


def _confined(
    model: Path, listen: str, settings: "Settings", policy_out: Path | None, adapters: dict[str, Path]
) -> None:
    from cloister.local.confined import ConfinedServer, write_policy

    console, display = stderr(), Display()
    if policy_out is not None and not policy_out.absolute().parent.is_dir():
        raise SettingsError(
            f"There is no folder {policy_out.parent} for the policy.", remedy="Make it, or name another file."
        )
    with display.loading():
        server = ConfinedServer(model, settings, listen=listen, listener=display, adapters=adapters)
    with server:
        if policy_out is not None:
            write_policy(policy_out, server.policy)
        console.print(Text(f"enclave: {server.info.tee}", style="yellow"), soft_wrap=True)
        if server.info.warning:
            console.print(Text(server.info.warning, style="bold red"))
        console.print(f"stand-in root sim={server.stand_in}", soft_wrap=True)
        console.print(f"{server.info.model} at {server.address}, measurement {server.info.measurement}", soft_wrap=True)
        console.print("[bold yellow]This is a software stand-in: no hardware protects what it runs.[/bold yellow]")
        server.serve()


def _inside(
    model: Path,
    listen: str,
    settings: "Settings",
    attester: "Callable[[bytes], Attester]",
    broker: str | None,
    adapters: dict[str, Path],
) -> None:
    from cloister.isolation.hardening import harden
    from cloister.local.client import plain_settings
    from cloister.local.confined import PORT
    from cloister.local.owner import Owner
    from cloister.local.serve import EnclaveServer
    from cloister.seal.client import connect
    from cloister.seal.package import is_package
    from cloister.wire.session import Open
    from cloister.wire.tcp import address_of, parse_address
    from cloister.wire.tcp import listen as tcp_listen

    console = stderr()
    try:
        harden()  # a core file would leave the TEE, with prompts in it
    except IsolationError as error:  # a library OS may know no such call; nothing outside sees into its process
        console.print(Text(f"{error.message} Core files and others of this user are not ruled out.", style="yellow"))
    owner = None
    if is_package(model):
        if not broker:
            raise SettingsError(f"{model} is sealed.", remedy="Name its owner's broker: --broker HOST:PORT.")
        owner = Owner(connect(broker).sock, attester)
    request = Open(
        str(model.resolve()),
        plain_settings(settings),
        adapters={name: str(folder.resolve()) for name, folder in adapters.items()},
    )
    where = parse_address(listen, PORT)
    with console.status("opening the model ..."):
        server = EnclaveServer(request, attester, owner=owner)
    with server, tcp_listen(*where) as listener:
        measurement = server.ready.measurement
        if server.ready.warning:
            console.print(Text(server.ready.warning, style="bold red"))
        console.print(f"{server.ready.model} at {address_of(listener)}, measurement {measurement}", soft_wrap=True)
        server.serve(listener)


def _attester(helper: Path | None, collateral: Path | None) -> "Callable[[bytes], Attester]":
    from cloister.attest.helper import HelperAttester
    from cloister.attest.sources import collateral_file, find_attester

    if helper is not None:
        asked = HelperAttester(helper)
        return lambda _measurement: asked
    found = find_attester(collateral_file(collateral) if collateral is not None else bytes)
    return lambda _measurement: found
