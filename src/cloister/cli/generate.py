"""`cloister generate`: continue one prompt, or answer one request."""

import json
from typing import Annotated, Any

import msgspec
import typer

from cloister.cli import options as o
from cloister.cli import receipts
from cloister.cli import remote as r
from cloister.cli.display import Display, stderr, summary_text
from cloister.cli.session import cancellable, opened, stream
from cloister.cli.streams import read_prompt
from cloister.local.client import LLM
from cloister.local.remote import RemoteLLM
from cloister.local.reply import Reply


def generate(
    model: r.ModelArgument = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; '-' or a pipe: standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat the prompt as a user's message (needs a chat template).")
    ] = False,
    max_tokens: o.TokensOption = None,
    temperature: o.TemperatureOption = None,
    top_k: o.TopKOption = None,
    top_p: o.TopPOption = None,
    min_p: o.MinPOption = None,
    seed: o.SeedOption = None,
    stop: o.StopOption = None,
    file: o.SettingsFile = None,
    weights: o.WeightsOption = None,
    policy: o.PolicyOption = None,
    threat: o.ThreatOption = None,
    rules: o.RulesOption = None,
    insecure: o.InsecureOption = False,
    addresses: o.AddressOption = None,
    workers: o.WorkersOption = None,
    backend: o.BackendOption = None,
    pantry: o.PantryOption = None,
    when_empty: o.WhenEmptyOption = None,
    prefill: o.PrefillOption = None,
    on_failure: o.OnFailureOption = None,
    timeout: o.TimeoutOption = None,
    context: o.ContextOption = None,
    adapter: o.AdapterOption = None,
    use: o.UseOption = None,
    connect: r.ConnectOption = None,
    verify_policy: r.VerifyPolicyOption = None,
    measurement: r.MeasurementOption = None,
    root: r.RootsOption = None,
    model_root: r.ModelRootOption = None,
    receipt: receipts.ReceiptOption = None,
    quiet: o.QuietOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Continue a prompt, with every large product blinded, lent and checked.

    [bold]cloister generate ~/models/tinyllama -p "Once upon a time" -n 100[/bold]

    With --connect the model runs in an enclave elsewhere ([bold]cloister serve[/bold]). It is verified before anything of the
    prompt leaves. Every answer comes with a receipt: --receipt keeps it, and [bold]cloister verify[/bold] checks it.
    """
    there = r.elsewhere(model, connect, verify_policy, measurement, root, model_root)
    plan = o.PlanOptions(policy, threat, rules, insecure)
    runtime = o.RuntimeOptions(
        file, weights, plan, addresses, workers, backend, pantry, when_empty, prefill, on_failure, timeout, context
    )
    receipts.check_place(receipt)
    text = read_prompt(prompt)
    sampling = o.sampling(max_tokens, temperature, top_k, top_p, min_p, seed, stop)
    display = Display(quiet or as_json)
    adapters = o.adapters(adapter)
    voice = r.voice(use) if there else o.adapter_in_use(use, adapters)
    with opened(model, there, runtime.settings(), display, adapters, receipts=receipt is not None) as llm:
        with cancellable(llm):
            reply = _ask(llm, text, chat, voice, sampling)
            if as_json:
                print(json.dumps(_record(reply, display)))
            else:
                stream(reply, display, quiet)
        if receipt is not None:
            receipts.keep(reply, receipt)
            if not quiet:
                receipts.tell(receipt, there.trust if there else receipts.own_trust(reply))
        if reply.finished is not None and not quiet and not as_json:
            stderr().print(summary_text(reply.finished))


def _ask(llm: LLM | RemoteLLM, text: str, chat: bool, adapter: str, sampling: dict[str, Any]) -> Reply:
    if chat:
        return llm.chat([{"role": "user", "content": text}], adapter=adapter, **sampling)
    return llm.generate(text, adapter=adapter, **sampling)


def _record(reply: Reply, display: Display) -> dict[str, object]:
    text = reply.text
    finished = msgspec.to_builtins(reply.finished)
    finished.pop("type", None)
    return {
        "text": text,
        "token_ids": reply.token_ids,
        **finished,
        "incidents": [msgspec.to_builtins(event) for event in display.incidents],
    }
