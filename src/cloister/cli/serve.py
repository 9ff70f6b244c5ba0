"""`cloister serve`: an enclave that answers clients elsewhere, who verify it first."""

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.cli import options as o
from cloister.cli.display import stderr
from cloister.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.attest.evidence import Attester

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


def serve(
    model: o.ModelArgument,
    listen: ListenOption = "127.0.0.1:7780",
    stand_in: StandInOption = False,
    tsm_helper: HelperOption = None,
    collateral: CollateralOption = None,
    broker: BrokerAddress = None,
    settings: o.SettingsFile = None,
    accelerator: o.AddressOption = None,
) -> None:
    """Serve a model from inside a TEE, through the sealed channel, with evidence per connection and a receipt per answer.

    Start it inside the TEE (see the folder deploy/). It refuses to start without one, unless --stand-in is given.
    """
    from cloister.attest.measure import measure, this_program
    from cloister.local.client import plain_settings
    from cloister.local.opening import Owner
    from cloister.local.serve import EnclaveServer
    from cloister.seal.client import connect
    from cloister.seal.manifest import Expected
    from cloister.seal.package import Package, is_package
    from cloister.wire.session import Open

    attester = _attester(stand_in, tsm_helper, collateral)
    chosen = o.RuntimeOptions(settings, addresses=accelerator).settings()
    owner, root = None, None
    if is_package(model):
        if not broker:
            raise SettingsError(f"{model} is sealed.", remedy="Name its owner's broker: --broker HOST:PORT.")
        connection = connect(broker)
        owner = Owner(connection.sock, attester)
        with Package.open(model, Expected(signers="the broker knows its packages", min_version=1)) as package:
            root = package.root
    digest = measure(this_program(chosen, model=root)).digest
    console = stderr()
    request = Open(str(model.resolve()), plain_settings(chosen))
    host, _, port = listen.rpartition(":")
    if not port.isdecimal():
        raise SettingsError(f"{listen!r} is not host:port.", remedy="Write 0.0.0.0:7780.")
    with console.status("opening the model ..."):
        server = EnclaveServer(request, attester, digest, owner)
    with server, socket.create_server((host.strip("[]") or "127.0.0.1", int(port))) as listener:
        bound, number = listener.getsockname()[:2]
        console.print(f"{server.ready.model} at {bound}:{number}, measurement {digest.hex()}", soft_wrap=True)
        if stand_in:
            console.print("[bold yellow]This is a software stand-in: no hardware protects what it runs.[/bold yellow]")
        server.serve(listener)


def _attester(stand_in: bool, helper: Path | None, collateral: Path | None) -> "Callable[[bytes], Attester]":
    from cloister.attest.helper import HelperAttester
    from cloister.attest.sim import Installation
    from cloister.attest.sources import collateral_file, find_attester
    from cloister.local.broker_link import stand_in_file
    from cloister.local.opening import stand_in as make

    if stand_in:
        if helper is not None or collateral is not None:
            raise SettingsError("A stand-in has no helper and no collateral.", remedy="Leave --stand-in out in a TEE.")
        file = stand_in_file()
        fingerprint = Installation.open(file, datetime.now(UTC)).fingerprint
        stderr().print(f"stand-in with the root {fingerprint.hex()}", soft_wrap=True)
        return make(file)
    if helper is not None:
        asked = HelperAttester(helper)
        return lambda _measurement: asked
    found = find_attester(collateral_file(collateral) if collateral is not None else bytes)
    return lambda _measurement: found
