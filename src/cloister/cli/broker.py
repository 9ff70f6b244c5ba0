"""`cloister broker`: who gets the keys of sealed models, and what was released to whom."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cloister.cli import options as o
from cloister.cli.display import stderr, stdout
from cloister.cli.ending import until_ended
from cloister.cli.owner import BrokerOption, now_text, unix_time
from cloister.errors import SettingsError
from cloister.local.broker_link import STAND_IN, owner_folder

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Hold the keys of sealed models and release them to attested enclaves. Everything that is released or refused is a line "
        "in an append-only log. A first round: [bold]cloister seal MODEL --out PACKAGE[/bold], [bold]cloister broker allow NAME "
        "--policy policy.toml[/bold], [bold]cloister broker serve[/bold]."
    ),
)

PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="TOML file: kinds, measurements, TCB status and roots that are accepted."),
]
StandInOption = Annotated[
    bool,
    typer.Option("--stand-in", help="Accept this installation's software stand-in. It is not a TEE: for trying out."),
]
MeasurementOption = Annotated[
    list[str] | None,
    typer.Option("--measurement", help="With --stand-in: accepted measurements (see cloister measure)."),
]
RootOption = Annotated[
    str | None,
    typer.Option("--root", help="With --stand-in: the root that another machine's stand-in prints at its start."),
]
MinVersionOption = Annotated[int, typer.Option("--min-version", min=1, help="Oldest version whose key is released.")]
UsesOption = Annotated[int | None, typer.Option("--uses", min=1, help="At most this many releases.")]
UntilOption = Annotated[str | None, typer.Option("--until", help="Last moment, as 2027-01-31 or 2027-01-31T12:00:00Z.")]


@app.command("init")
def init(broker: BrokerOption = None) -> None:
    """Make an empty store. Sealing the first model does it too."""
    from cloister.seal.store import DATABASE, KEY_FILE, Store

    folder = broker or owner_folder()
    Store.open(folder, create=True).close()
    stdout().print(
        f"The broker is in {folder}: {DATABASE} and {KEY_FILE}. Back up both, apart from each other.", soft_wrap=True
    )


@app.command("serve")
def serve(
    listen: Annotated[
        str, typer.Option("--listen", help="host:port, or unix:PATH. What travels is sealed or public.")
    ] = "127.0.0.1:7790",
    broker: BrokerOption = None,
) -> None:
    """Answer enclaves that ask for keys, until Ctrl-C."""
    from cloister.isolation.hardening import harden
    from cloister.seal.broker import Broker
    from cloister.seal.broker_server import BrokerServer
    from cloister.seal.policy import parse_policy
    from cloister.seal.store import Store

    harden()  # it has keys: no core file, no reading by others of this user
    with until_ended(), Store.open(broker or owner_folder()) as store:
        number, _ = store.log.head()  # a store whose log was changed does not serve
        with BrokerServer(Broker(store, parse_policy), listen) as server:
            stderr().print(f"Listening on {server.address}; the log has {number} lines. Ctrl-C ends it.")
            server.serve()


@app.command("allow")
def allow(
    model: Annotated[str, typer.Argument(help="Name of a sealed model (see cloister broker list).")],
    policy: PolicyOption = None,
    stand_in: StandInOption = False,
    measurement: MeasurementOption = None,
    root: RootOption = None,
    min_version: MinVersionOption = 1,
    uses: UsesOption = None,
    until: UntilOption = None,
    broker: BrokerOption = None,
) -> None:
    """Allow enclaves that pass a policy to have the keys of a model."""
    from cloister.seal.policy import parse_policy
    from cloister.seal.store import Store

    if (policy is None) == (not stand_in):
        raise SettingsError("It must be said who may have the key.", remedy="Give either --policy FILE or --stand-in.")
    text = _read(policy) if policy is not None else _stand_in(measurement or [], root)
    parse_policy(text)  # a policy that does not read is refused now, not at the first release
    with Store.open(broker or owner_folder()) as store:
        number = store.allow(
            model, text, now_text(), min_version=min_version, uses=uses, until=unix_time(until) if until else None
        )
    stdout().print(
        f"Grant {number}: {model}, version {min_version} and later. It ends with: cloister broker revoke {number}"
    )


@app.command("revoke")
def revoke(
    grant: Annotated[int, typer.Argument(help="Number of the grant.")],
    broker: BrokerOption = None,
) -> None:
    """End a grant. Enclaves that have the key keep it until they end; seal a new version to shut them out."""
    from cloister.seal.store import Store

    with Store.open(broker or owner_folder()) as store:
        store.revoke(grant, now_text())
    stdout().print(f"Grant {grant} has ended.")


@app.command("list")
def show(broker: BrokerOption = None, as_json: o.JsonOption = False) -> None:
    """List the models whose keys are here, and what is allowed."""
    from cloister.seal.store import Store

    with Store.open(broker or owner_folder()) as store:
        models, grants = store.models(), store.grants()
    if as_json:
        found = [{"name": m.name, "version": m.version, "root": m.root.hex()} for m in models]
        kept = [{"number": g.number, "model": g.name, "min_version": g.min_version, "uses": g.uses, "until": g.until,
                 "revoked": g.revoked, "policy": g.policy} for g in grants]  # fmt: skip
        print(json.dumps({"models": found, "grants": kept}))
        return
    table = Table("model", "version", "identity", box=None, pad_edge=False, header_style="dim")
    for model in models:
        table.add_row(model.name, str(model.version), model.root.hex())
    stdout().print(table)
    table = Table(
        "grant", "model", "from version", "uses left", "until", "state", box=None, pad_edge=False, header_style="dim"
    )
    for grant in grants:
        until = datetime.fromtimestamp(grant.until, UTC).isoformat(timespec="seconds") if grant.until else ""
        uses = "any" if grant.uses is None else str(grant.uses)
        state = Text("ended", style="dim") if grant.revoked else Text("open", style="green")
        table.add_row(str(grant.number), grant.name, str(grant.min_version), uses, until, state)
    stdout().print(table)


@app.command("log")
def log(
    broker: BrokerOption = None,
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="Show this many lines.")] = 50,
    head: Annotated[
        str | None, typer.Option("--head", help="NUMBER:HASH noted earlier; an error if the log does not continue it.")
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Check the whole log and show its end. The last line tells the head: note it elsewhere, and compare with --head."""
    from cloister.errors import BrokerError
    from cloister.seal.store import Store

    with Store.open(broker or owner_folder()) as store:
        lines = list(store.log.lines())
    if head is not None:
        number, _, digest = head.partition(":")
        if (
            not number.isdecimal()
            or int(number) > len(lines)
            or int(number) < 1
            or lines[int(number) - 1].hash.hex() != digest
        ):
            raise BrokerError(
                f"The log does not continue {head[:80]}.", remedy="Its end was cut off, or it is another log."
            )
    for line in lines[-last:]:
        if as_json:
            print(json.dumps({"number": line.number, **line.event, "hash": line.hash.hex()}))
        else:
            shown = {
                key: value for key, value in line.event.items() if key not in ("time", "event", "policy") and value
            }
            text = ", ".join(f"{key} {str(value)[:64]}" for key, value in shown.items())
            style = {"release": "green", "refuse": "red"}.get(line.event["event"], "")
            row = Text(f"{line.number:>6}  {line.event.get('time', '')}  ").append(
                f"{line.event['event']:<8}", style=style
            )
            stdout().print(row.append(f"  {text}"), soft_wrap=True)
    if lines and not as_json:
        stdout().print(f"head {lines[-1].number}:{lines[-1].hash.hex()}", soft_wrap=True)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(2**20).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The policy {path} cannot be read: {error}.", remedy="Give a TOML file.") from error


def _stand_in(measurements: list[str], root: str | None) -> str:
    from cloister.attest.sim import Installation
    from cloister.seal.policy import stand_in_policy

    stderr().print("[bold yellow]A software stand-in is no TEE: whoever runs it can read the weights.[/bold yellow]")
    try:
        if root is not None:
            return stand_in_policy(bytes.fromhex(root), measurements)
        installation = Installation.open(owner_folder() / STAND_IN, datetime.now(UTC))
        return stand_in_policy(installation.fingerprint, measurements)
    except ValueError as error:
        raise SettingsError(
            "A measurement or root is not hexadecimal.", remedy="Copy it from cloister measure or serve."
        ) from error
