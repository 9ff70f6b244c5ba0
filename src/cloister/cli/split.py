"""`cloister split-server` and `cloister split-client`: the published split of a model, at the embedding layer."""

import json
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cloister.cli import options as o
from cloister.cli.display import stderr
from cloister.errors import RequestError, SettingsError

if TYPE_CHECKING:
    from cloister.privacy.mechanism import Cost
    from cloister.split.client import EmbeddingPart, Sanitise, Spent, SplitClient

PORT: Final = 8398


def split_server(
    model: o.ModelArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")] = PORT,
    allow_tied: Annotated[
        bool,
        typer.Option("--allow-tied", help="Serve a model whose LM head is its table: the table is then no secret."),
    ] = False,
    quiet: o.QuietOption = False,
) -> None:
    """Serve every layer of a model but its embedding table: embeddings in, the next token (or a text's scores) out.

    The table is not loaded and may be absent from the folder. Needs PyTorch and transformers.

    [bold]cloister split-server ~/models/Llama-2-7b-hf --host 0.0.0.0[/bold]
    """
    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise SettingsError(f"A split server needs {', '.join(missing)}.", remedy="Run `pip install cloister[split]`.")
    from cloister.split.model import ServerModel
    from cloister.split.server import SplitServer

    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {host}:{port}: {error.strerror}.", remedy="Choose another --port, or stop what uses it."
        ) from error
    served = ServerModel.open(model, allow_tied=allow_tied)
    if not quiet:
        address = ":".join(str(part) for part in listener.getsockname()[:2])
        stderr().print(
            f"Serving a {served.kind} without its embedding table at {address}", soft_wrap=True, highlight=False
        )
        if allow_tied:
            stderr().print("[bold red]Its LM head is its embedding table: the table is no secret here.[/bold red]")
    server = SplitServer(served, listener)
    try:
        server.serve()
    finally:
        server.close()


def split_client(
    model: o.ModelArgument,
    server: Annotated[str, typer.Option("--server", help="host:port of the split server.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text; '-' or a pipe: standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Treat the prompt as a user's message.")] = False,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published", help="Sanitise as CMIF does: rare tokens, Report-Noisy-Max over the vocabulary."
        ),
    ] = False,
    unsanitised: Annotated[
        bool, typer.Option("--unsanitised", help="Send the prompt as it is: the server can read it. For comparison.")
    ] = False,
    epsilon: Annotated[float, typer.Option("--epsilon", help="ε of one token.")] = 1.0,
    share: Annotated[float, typer.Option("--share", help="Share of the vocabulary that counts as rare.")] = 0.5,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Public text to count tokens in; else their rank stands for it.")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="ε of a whole session.")] = 1000.0,
    session: Annotated[str, typer.Option("--session", help="The session of the ledger.")] = "split",
    ledger: Annotated[Path | None, typer.Option("--ledger", help="The record of what was spent.")] = None,
    max_tokens: o.TokensOption = 128,
    temperature: o.TemperatureOption = 0.0,
    top_k: o.TopKOption = None,
    top_p: o.TopPOption = None,
    seed: o.SeedOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Embed and sanitise a prompt here, and let a split server compute the rest; each new token is embedded here too.

    [bold]cloister split-client ~/models/Llama-2-7b-hf --server gpu-host:8398 --as-published -p "Once upon a time"[/bold]
    """
    if as_published == unsanitised:
        raise SettingsError(
            "Say what happens to the prompt.",
            remedy="Give --as-published, or --unsanitised; else use `cloister gateway`.",
        )
    from cloister.split.client import EmbeddingPart, Spent, SplitClient
    from cloister.split.sanitise import unsanitised as as_it_is

    text = _prompt(prompt)
    part = EmbeddingPart(model)
    sanitise = as_it_is if unsanitised else _published(part, epsilon, share, corpus, budget, session, ledger)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    spent = Spent()
    with SplitClient(part, server) as client:
        if client.hello.get("kind") == "classifier":
            print(json.dumps(client.classify(part.tokenizer.encode(text), sanitise, spent)))
            return
        tokens = (
            part.tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else part.tokenizer.encode(text)
        )
        given = {name: value for name, value in options.items() if value is not None}
        _answer(client, part, tokens, max_tokens or 128, sanitise, spent, given, as_json)


def _answer(
    client: "SplitClient",
    part: "EmbeddingPart",
    tokens: list[int],
    most: int,
    sanitise: "Sanitise",
    spent: "Spent",
    sampling: dict[str, float],
    as_json: bool,
) -> None:
    shown = ""
    for _ in client.generate(tokens, most, sanitise, spent, **sampling):
        text = part.tokenizer.decode(spent.tokens)
        if not as_json and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    if as_json:
        record = {
            "text": part.tokenizer.decode(spent.tokens),
            "tokens": len(spent.tokens),
            "hand_offs": spent.hand_offs,
            "bytes_sent": spent.bytes_sent,
            "seconds": spent.total,
            "share_of_mechanism": spent.share_of_mechanism,
        }
        print(json.dumps(record))
    else:
        print()


def _published(
    part: "EmbeddingPart",
    epsilon: float,
    share: float,
    corpus: Path | None,
    budget: float,
    session: str,
    path: Path | None,
) -> "Sanitise":
    from cloister.cli.gateway import ledger_path
    from cloister.privacy.accounting import Charge, pure
    from cloister.privacy.ledger import Entry, Ledger
    from cloister.split.sanitise import AsPublished, rare_tokens

    book = Ledger.open(path or ledger_path())
    book.open_session(
        session, budget, pure(epsilon), f"detected; rare tokens ({share:g}); as published, ε = {epsilon:g} per token"
    )

    def pay(cost: "Cost", count: int) -> None:
        book.charge(session, [Entry("token", Charge(cost, count, sampled=False))])

    return AsPublished(part, epsilon, rare_tokens(part.tokenizer, corpus, share), pay)


def _prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise RequestError("There is no prompt.", remedy='Give one with -p "...", or pipe it in.')
    return sys.stdin.read()
