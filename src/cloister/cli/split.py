"""`cloister split-server` and `cloister split-client`: the published split of a model, at the embedding layer."""

import json
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cloister.cli import options as o
from cloister.cli.display import foreign, stderr
from cloister.cli.ending import until_ended
from cloister.cli.streams import read_prompt
from cloister.errors import SettingsError

if TYPE_CHECKING:
    from cloister.model.tokenizer import Tokenizer
    from cloister.split.client import Spent, SplitClient

PORT: Final = 8398
_SANITISING: Final = "How the prompt is sanitised"


def split_server(
    model: o.ModelArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")] = PORT,
    allow_tied: Annotated[
        bool,
        typer.Option("--allow-tied", help="Serve a model whose LM head is its table: the table is then no secret."),
    ] = False,
    quiet: o.SilentOption = False,
) -> None:
    """Serve every layer of a model but its embedding table: embeddings in, the next token (or a text's scores) out.

    The table is not loaded and may be absent from the folder. Needs PyTorch and transformers.

    [bold]cloister split-server ~/models/Llama-2-7b-hf --host 0.0.0.0[/bold]
    """
    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"A split server needs {', '.join(missing)}.", remedy="Run `pip install 'cloister[split]'`."
        )
    from cloister.split.model import ServerModel
    from cloister.split.server import SplitServer
    from cloister.wire.tcp import address_of, listen

    try:
        listener = listen(host, port)
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {host}:{port}: {error.strerror}.", remedy="Choose another --port, or stop what uses it."
        ) from error
    served = ServerModel.open(model, allow_tied=allow_tied)
    with until_ended(quiet), closing(SplitServer(served, listener)) as server:
        if not quiet:
            stderr().print(
                f"Serving a {served.kind} without its embedding table at {address_of(listener)}",
                soft_wrap=True,
                highlight=False,
            )
            if allow_tied:
                stderr().print("[bold red]Its LM head is its embedding table: the table is no secret here.[/bold red]")
        server.serve()


def split_client(
    model: o.ModelArgument,
    server: Annotated[str, typer.Option("--server", help="host:port of the split server.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text; '-' or a pipe: standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Treat the prompt as a user's message.")] = False,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published",
            help="Sanitise as CMIF does: rare tokens, Report-Noisy-Max over the vocabulary.",
            rich_help_panel=_SANITISING,
        ),
    ] = False,
    unsanitised: Annotated[
        bool,
        typer.Option(
            "--unsanitised",
            help="Send the prompt as it is: the server can read it. For comparison.",
            rich_help_panel=_SANITISING,
        ),
    ] = False,
    epsilon: Annotated[float, typer.Option("--epsilon", help="ε of one token.", rich_help_panel=_SANITISING)] = 1.0,
    share: Annotated[
        float, typer.Option("--share", help="Share of the vocabulary that counts as rare.", rich_help_panel=_SANITISING)
    ] = 0.5,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            help="Public text to count tokens in; else their rank stands for it.",
            rich_help_panel=_SANITISING,
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget", help="ε of a whole session.", rich_help_panel=_SANITISING)
    ] = 1000.0,
    session: Annotated[
        str, typer.Option("--session", help="The session of the ledger.", rich_help_panel=_SANITISING)
    ] = "split",
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="The record of what was spent.", rich_help_panel=_SANITISING)
    ] = None,
    broker: Annotated[
        str, typer.Option("--broker", help="For a sealed package: host:port or unix:PATH of its owner's broker.")
    ] = "",
    max_tokens: o.TokensOption = 128,
    temperature: o.TemperatureOption = 0.0,
    top_k: o.TopKOption = None,
    top_p: o.TopPOption = None,
    seed: o.SeedOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Embed and sanitise a prompt here, and let a split server compute the rest; each new token is embedded here too.

    A confined process holds the embedding table and does both. MODEL may be a sealed package (cloister seal --only embeddings).

    [bold]cloister split-client ~/models/Llama-2-7b-hf --server gpu-host:8398 --as-published -p "Once upon a time"[/bold]
    """
    if as_published == unsanitised:
        raise SettingsError(
            "Say what happens to the prompt.",
            remedy="Give --as-published, or --unsanitised; else use `cloister gateway`.",
        )
    from cloister.cli.gateway import ledger_path
    from cloister.local.client_part import client_folder
    from cloister.local.sanitising import SanitisingEnclave
    from cloister.split.client import Spent, SplitClient
    from cloister.split.confined import ConfinedPart
    from cloister.wire.sanitising import OpenSplit

    text = read_prompt(prompt)
    asked = OpenSplit(
        model=str(model.resolve()), ledger=str((ledger or ledger_path()).resolve()), budget=budget, session=session,
        sanitiser="none" if unsanitised else "as-published", epsilon=epsilon, share=share,
        corpus=str(corpus.resolve()) if corpus else "", most=max_tokens or 128,
    )  # fmt: skip
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    spent = Spent()
    with client_folder(model) as folder:
        tokenizer = folder.tokenizer()
    with SanitisingEnclave(asked, broker) as enclave:
        if not as_json:
            stderr().print(f"Embedded in: {enclave.ready.tee}", style="yellow", soft_wrap=True, highlight=False)
        part = ConfinedPart(enclave.prompts, enclave.ready.facts, tokenizer)
        with SplitClient(part, server) as client:
            if client.hello.get("kind") == "classifier":
                print(json.dumps(client.classify(tokenizer.encode(text), spent)))
                return
            tokens = tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)
            given = {name: value for name, value in options.items() if value is not None}
            _answer(client, tokenizer, tokens, asked.most, spent, given, as_json)


def _answer(
    client: "SplitClient",
    tokenizer: "Tokenizer",
    tokens: list[int],
    most: int,
    spent: "Spent",
    sampling: dict[str, float],
    as_json: bool,
) -> None:
    shown = ""
    on_terminal = sys.stdout.isatty()
    for _ in client.generate(tokens, most, spent, **sampling):
        text = tokenizer.decode(spent.tokens)
        if not as_json and not text.endswith("\ufffd"):
            piece = text[len(shown) :]
            print(foreign(piece).plain if on_terminal else piece, end="", flush=True)  # the server names every token
            shown = text
    if as_json:
        record = {
            "text": tokenizer.decode(spent.tokens),
            "tokens": len(spent.tokens),
            "hand_offs": spent.hand_offs,
            "bytes_sent": spent.bytes_sent,
            "seconds": spent.total,
            "share_of_mechanism": spent.share_of_mechanism,
        }
        print(json.dumps(record))
    else:
        print()
