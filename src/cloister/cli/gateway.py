"""`cloister gateway`: an OpenAI-compatible server on this machine that sanitises what it passes on."""

import asyncio
import gc
import ipaddress
import os
import shlex
import socket
from contextlib import ExitStack, closing
from enum import StrEnum
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cloister.cli import options as o
from cloister.cli.display import stderr
from cloister.cli.ending import until_ended
from cloister.errors import SettingsError
from cloister.gateway.engine import Transport
from cloister.privacy.mechanism import Mechanism

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from cloister.gateway.engine import Engine
    from cloister.gateway.service import Gateway
    from cloister.wire.sanitising import Reference

PORT: Final = 8399
LOOPBACK: Final = "127.0.0.1"
_REPLACED: Final = "What is replaced, and by what"
_BUDGET: Final = "What may be spent"
_ENGINE: Final = "The engine and the owner"
_CLIENTS: Final = "Who may use it"
ENCLAVE: Final = "enclave"
CLOISTER: Final = "cloister://"


class ModeOption(StrEnum):
    """`privacy.detector.Mode`, as the command line spells it."""

    DETECTED = "detected"
    ALL_CONTENT = "all-content"


def gateway(
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="Address of a vLLM or other OpenAI-compatible server, the word enclave, or cloister://HOST:PORT.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            callback=o.model_folder,
            help="Folder of the model that the engine serves (demo: the shipped one), or a sealed package of its embedding "
            "layer (cloister seal --only embeddings). Not with cloister://.",
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            help="With cloister://: TOML file that states which enclave is expected.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    epsilon: Annotated[
        str, typer.Option("--epsilon", help="ε of one replacement: 0.5, 1, 2 or 4.", rich_help_panel=_REPLACED)
    ] = "2",
    budget: Annotated[
        float, typer.Option("--budget", help="ε of a whole session; then prompts are refused.", rich_help_panel=_BUDGET)
    ] = 16.0,
    session: Annotated[
        str,
        typer.Option(
            "--session", help="Session of clients that send no X-Cloister-Session header.", rich_help_panel=_BUDGET
        ),
    ] = "default",
    mode: Annotated[
        ModeOption,
        typer.Option(
            "--mode",
            help="detected: replace what detectors find. all-content: every word but public ones.",
            rich_help_panel=_REPLACED,
        ),
    ] = ModeOption.DETECTED,
    transport: Annotated[
        Transport,
        typer.Option(
            "--transport",
            help="embeds: vLLM with --enable-prompt-embeds. mixed: the same inside chats, vLLM 0.33 or later, for tools. "
            "tokens: any vLLM. text: any OpenAI-compatible server.",
            rich_help_panel=_ENGINE,
        ),
    ] = Transport.EMBEDS,
    mechanism: Annotated[
        Mechanism, typer.Option("--mechanism", help="How replacements are drawn.", rich_help_panel=_REPLACED)
    ] = Mechanism.CHANNEL,
    candidates: Annotated[
        Path | None,
        typer.Option(
            "--candidates", help="Candidate file; default: the one in the model's folder.", rich_help_panel=_REPLACED
        ),
    ] = None,
    broker: Annotated[
        str,
        typer.Option(
            "--broker",
            help="For a sealed package: host:port or unix:PATH of its owner's broker.",
            rich_help_panel=_ENGINE,
        ),
    ] = "",
    detectors: Annotated[
        str,
        typer.Option(
            "--detectors",
            help="rules, presidio, spacy:MODEL, separated by commas; patterns always run.",
            rich_help_panel=_REPLACED,
        ),
    ] = "rules,presidio",
    dictionary: Annotated[
        Path | None,
        typer.Option(
            "--dictionary",
            help="Your own sensitive words: lines `entry` or `entry = label`.",
            rich_help_panel=_REPLACED,
        ),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            "--public-words", help="Words to keep with --mode all-content, one a line.", rich_help_panel=_REPLACED
        ),
    ] = None,
    restore_words: Annotated[
        bool,
        typer.Option(
            "--restore-words",
            help="Put ordinary words back too, not only names, values, identifiers.",
            rich_help_panel=_REPLACED,
        ),
    ] = False,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="The record of what was spent.", rich_help_panel=_BUDGET)
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; other than loopback needs a key.", rich_help_panel=_CLIENTS),
    ] = LOOPBACK,
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.", rich_help_panel=_CLIENTS),
    ] = PORT,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="File with the API key that clients must send.", rich_help_panel=_CLIENTS),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Name or address by which clients reach the gateway, beside --host and loopback; repeat.",
            rich_help_panel=_CLIENTS,
        ),
    ] = None,
    origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", help="Web page that may use the gateway from a browser; repeat.", rich_help_panel=_CLIENTS
        ),
    ] = None,
    served_model: Annotated[
        str, typer.Option("--served-model", help="The model's name at the engine.", rich_help_panel=_ENGINE)
    ] = "",
    engine_key_file: Annotated[
        Path | None, typer.Option("--engine-key-file", help="File with the engine's API key.", rich_help_panel=_ENGINE)
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Longest silence of the engine, in seconds.", rich_help_panel=_ENGINE)
    ] = 120.0,
    quiet: o.SilentOption = False,
) -> None:
    """Serve OpenAI's protocol on this machine; what leaves it is sanitised, counted and restored in the answer.

    [bold]cloister gateway --engine http://gpu-host:8000 --model ~/models/Llama-3.2-1B-Instruct --epsilon 2[/bold]

    Then point any OpenAI client at http://127.0.0.1:8399/v1. Prompts are sanitised in a confined process of its own, the only one
    that opens the model's embedding layer; GET /v1/attestation?nonce=HEX gives its evidence. With [bold]--engine enclave[/bold]
    the model runs in a Cloister enclave on this machine instead, and prompts go to it as they are; with [bold]--engine
    cloister://HOST:PORT[/bold] and [bold]--policy FILE[/bold] in one elsewhere, which is verified before anything leaves.
    """
    _check_installed()
    from cloister.gateway.service import Gateway, GatewaySettings
    from cloister.server.app import application

    key = _secret(key_file)
    _check_exposure(host, key)
    settings = GatewaySettings(session=session, restore_words=restore_words)
    with until_ended(quiet), _listening(host, port) as listener, ExitStack() as stack:
        if engine == ENCLAVE or engine.startswith(CLOISTER):
            service = Gateway(_enclave_engine(engine, model, policy), settings, None)
        else:
            from cloister.local.sanitising import SanitisingEnclave
            from cloister.local.sanitising_restart import RestartingGuard
            from cloister.wire.sanitising import OpenGateway

            _check_engine(engine, timeout)
            asked = OpenGateway(
                model=_absolute(_needed(model, policy)), candidates=_absolute(candidates),
                ledger=_absolute(ledger or ledger_path()), dictionary=_absolute(dictionary),
                public_words=_absolute(public), mechanism=mechanism,
                epsilon=str(_epsilon(epsilon)), budget=budget, mode=str(mode).replace("-", "_"), transport=transport,
                detectors=tuple(name.strip() for name in detectors.split(",") if name.strip()),
            )  # fmt: skip
            with stderr().status("opening the sanitising enclave ..."):
                guard = stack.enter_context(closing(RestartingGuard(partial(SanitisingEnclave, asked, broker))))
            made = _engine(engine, guard.reference, transport, served_model, _secret(engine_key_file), timeout)
            service = Gateway(made, settings, guard)
        hosts = {LOOPBACK, "localhost", "[::1]", host, *(names or ())}
        app = application(service, hosts=tuple(hosts), origins=tuple(origins or ()), key=key)
        spent = f"cloister ledger --ledger {shlex.quote(str(ledger))}" if ledger is not None else "cloister ledger"
        asyncio.run(_serve(service, app, listener, spent, quiet))


def ledger_path() -> Path:
    """Returns where the ledger is kept: `$XDG_STATE_HOME/cloister/ledger.db`, by default under `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "cloister" / "ledger.db"


async def _serve(service: "Gateway", app: "Starlette", listener: socket.socket, spent: str, quiet: bool) -> None:
    import uvicorn

    from cloister.wire.tcp import address_of

    try:
        await service.start()
        listener.listen()  # whoever reads the address may connect; until the server runs, connections wait
        address = address_of(listener)
        if not quiet:
            described = await service.attestation("")
            console = stderr()
            console.print(f"Listening on http://{address}/v1", soft_wrap=True, highlight=False)
            console.print(f"  {described['statement']}", soft_wrap=True)
            if "sanitiser" in described:
                console.print(f"  Sanitised in: {described['sanitiser']['tee']}", soft_wrap=True, highlight=False)
                console.print(
                    f"  What was replaced and spent: http://{address}/v1/privacy, `{spent}`.",
                    soft_wrap=True,
                    highlight=False,
                )
        gc.freeze()  # going through the libraries' objects again would stop every answer for a moment
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
        await uvicorn.Server(config).serve(sockets=[listener])
    finally:
        await service.close()


def _check_engine(address: str, timeout: float) -> None:
    if not address.startswith(("http://", "https://")):
        raise SettingsError(
            f"--engine is {address!r}.", remedy="Give http(s)://HOST:PORT, cloister://HOST:PORT or enclave."
        )
    if "@" in address:
        raise SettingsError(
            "--engine holds a user name or password, which /health would show.", remedy="Use --engine-key-file."
        )
    if not 0 < timeout <= 3600:
        raise SettingsError(f"--timeout is {timeout}.", remedy="Allowed: above 0, up to 3600 seconds.")


def _engine(
    address: str, reference: "Reference", transport: Transport, served_model: str, key: str, timeout: float
) -> "Engine":
    from cloister.gateway.http import EngineClient
    from cloister.gateway.text_engine import TextEngine
    from cloister.gateway.vllm_engine import VllmEngine

    client = EngineClient(address, key, timeout)
    if transport is Transport.TEXT:
        return TextEngine(client, served_model)
    return VllmEngine(client, reference, transport, served_model)


def _enclave_engine(engine: str, model: Path | None, policy: Path | None) -> "Engine":
    from cloister.cli.remote import elsewhere
    from cloister.gateway.enclave_engine import EnclaveEngine
    from cloister.local.own_enclave import OwnEnclave

    if engine == ENCLAVE:
        folder = _needed(model, policy).expanduser().resolve()
        return EnclaveEngine(OwnEnclave(folder), folder.name)
    if model is not None or policy is None:
        raise SettingsError(
            f"{engine} takes --policy and no --model.",
            remedy="Whoever runs it has its policy file (cloister serve --stand-in --policy-out FILE writes it).",
        )
    address = engine.removeprefix(CLOISTER).rstrip("/")
    there = elsewhere(None, address, policy, None, None, None)
    if there is None:
        raise SettingsError(f"--engine is {engine!r}.", remedy="Give cloister://HOST:PORT.")
    connected = there.connected()
    return EnclaveEngine(connected, connected.info.model, address)


def _needed(model: Path | None, policy: Path | None) -> Path:
    if model is None or policy is not None:
        raise SettingsError(
            "This engine needs --model, and takes no --policy.", remedy="A policy is for cloister://HOST:PORT."
        )
    return model


def _absolute(path: Path | None) -> str:
    return "" if path is None else str(path.expanduser().resolve())


def _check_installed() -> None:
    missing = [name for name in ("dp_accounting", "httpx2", "starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise SettingsError(f"The gateway needs {', '.join(missing)}.", remedy="Run `pip install 'cloister[gateway]'`.")


def _epsilon(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 16:
        raise SettingsError(f"--epsilon is {text!r}.", remedy="Give a number above 0 and at most 16, such as 2 or 0.5.")
    return value


def _secret(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"Cannot read the key in {path}: {error}.", remedy="Give a text file.") from error
    if not (key and key.isprintable() and key.isascii()):
        raise SettingsError(f"There is no usable key in {path}.", remedy="It must be one line of ASCII.")
    return key


def _check_exposure(host: str, key: str) -> None:
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not key:
        raise SettingsError(
            f"--host {host} would let others on the network spend this session's budget and read its answers.",
            remedy="Set --key-file, or stay on 127.0.0.1.",
        )


def _listening(host: str, port: int) -> socket.socket:
    from cloister.wire.tcp import bind

    try:
        return bind(host, port)
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {host}:{port}: {error.strerror}.",
            remedy="Stop what uses the port, or choose another --port.",
        ) from error
