"""`cloister chat`: a conversation on the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from cloister.cli import options as o
from cloister.cli import remote as r
from cloister.cli.display import Display, foreign, human_bytes, stderr, stdout, summary_text
from cloister.cli.receipts import ReceiptsOption, check_place, keep, keep_numbered
from cloister.cli.session import cancellable, opened, stream
from cloister.cli.streams import not_utf8, strict_input
from cloister.errors import CloisterError, GenerationError, SettingsError
from cloister.local.client import LLM
from cloister.local.remote import RemoteLLM
from cloister.local.reply import Reply

HELP = (
    "/reset forgets the conversation · /adapter NAME switches (base: none) · /status shows the totals · /receipt FILE keeps "
    "the last answer's receipt · /exit or Ctrl-D leaves · Ctrl-C stops an answer"
)


def chat(
    model: r.ModelArgument = None,
    system: Annotated[str | None, typer.Option("--system", help="Instructions for the model.")] = None,
    max_tokens: o.TokensOption = None,
    temperature: o.TemperatureOption = None,
    top_k: o.TopKOption = None,
    top_p: o.TopPOption = None,
    min_p: o.MinPOption = None,
    seed: o.SeedOption = None,
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
    receipts: ReceiptsOption = None,
    quiet: o.QuietOption = False,
) -> None:
    """Talk to a model. Earlier turns stay in the enclave's KV cache; Ctrl-C stops an answer, not the session.

    [bold]cloister chat ~/models/Llama-3.2-1B-Instruct[/bold]

    With --connect the model runs in an enclave elsewhere ([bold]cloister serve[/bold]). It is verified before anything of a
    prompt leaves. Every answer comes with a receipt: --receipts keeps them all, and /receipt FILE the last one.
    """
    there = r.elsewhere(model, connect, verify_policy, measurement, root, model_root)
    plan = o.PlanOptions(policy, threat, rules, insecure)
    runtime = o.RuntimeOptions(
        file, weights, plan, addresses, workers, backend, pantry, when_empty, prefill, on_failure, timeout, context
    )
    sampling = o.sampling(max_tokens, temperature, top_k, top_p, min_p, seed, None)
    display = Display(quiet)
    adapters = o.adapters(adapter)
    voice = r.voice(use) if there else o.adapter_in_use(use, adapters)
    with opened(model, there, runtime.settings(), display, adapters, receipts=receipts is not None) as llm:
        if not _has_template(llm, voice):
            llm.chat([{"role": "user", "content": "?"}], adapter=voice).text  # noqa: B018 - raises the error with its remedy
        if not quiet:
            info = llm.info
            stderr().print(
                Text(f"{info.model} · {info.parameters / 1e6:.1f} M parameters · {', '.join(info.accelerators)}")
            )
            stderr().print(Text(f"enclave: {info.tee}", style="yellow"))
            stderr().print(Text(HELP, style="dim"))
            for line in adapter_texts(llm, voice):
                stderr().print(line)
        Conversation(llm, display, sampling, system, quiet, voice, receipts).run()


class Conversation:
    """The turns of a chat and the loop that adds to them."""

    def __init__(
        self,
        llm: LLM | RemoteLLM,
        display: Display,
        sampling: dict[str, Any],
        system: str | None,
        quiet: bool,
        adapter: str = "",
        receipts: Path | None = None,
    ) -> None:
        self._adapter = adapter
        self._receipts = receipts
        self._last: Reply | None = None
        self._llm = llm
        self._display = display
        self._sampling = sampling
        self._start = [{"role": "system", "content": system}] if system else []
        self._turns = list(self._start)
        self._quiet = quiet
        self._console = stdout()

    def run(self) -> None:
        """Reads and answers until the end of input."""
        strict_input()
        while True:
            try:
                line = self._console.input("[bold]> [/bold]" if self._console.is_terminal else "")
            except EOFError:
                return
            except UnicodeDecodeError as error:
                not_utf8(error)
            except KeyboardInterrupt:
                self._console.print()
                continue
            command = line.strip()
            if command in ("/exit", "/quit"):
                return
            if command == "/reset":
                self._turns = list(self._start)
            elif command == "/status":
                self._status()
            elif command.split()[:1] == ["/receipt"]:
                self._keep(command.removeprefix("/receipt").strip())
            elif command == "/help":
                stderr().print(HELP)
            elif command.split()[:1] == ["/adapter"]:
                self._switch(command.removeprefix("/adapter").strip())
            elif command:
                self._answer(line)

    def _status(self) -> None:
        if isinstance(self._llm, RemoteLLM):
            stderr().print("The totals of an enclave elsewhere are not shown to its clients.")
        else:
            stderr().print_json(data=_plain(self._llm))

    def _keep(self, name: str) -> None:
        """Writes the receipt of the last answer."""
        try:
            if self._last is None or not name:
                raise SettingsError("There is nothing to keep.", remedy="After an answer: /receipt FILE")
            check_place(Path(name))
            keep(self._last, Path(name))
            stderr().print(Text(f"Receipt kept in {name}.", style="dim"))
        except CloisterError as error:
            stderr().print(Text(f"error: {error}", style="bold red"))

    def _switch(self, name: str) -> None:
        """Makes the adapter called `name` answer from now on, `base` for none; without a name, lists them."""
        known = ["base", *(info.name for info in self._llm.info.adapters)]
        if name and name not in known:
            stderr().print(Text(f"There is no adapter {name!r}. Loaded: {', '.join(known)}.", style="bold red"))
            return
        if name:
            self._adapter = "" if name == "base" else name
        for text in adapter_texts(self._llm, self._adapter) or [
            Text("No adapter is loaded: start with --adapter NAME=FOLDER.")
        ]:
            stderr().print(text)

    def _answer(self, line: str) -> None:
        turns = [*self._turns, {"role": "user", "content": line}]
        try:
            with cancellable(self._llm):
                reply = self._llm.chat(turns, adapter=self._adapter, **self._sampling)
                stream(reply, self._display, self._quiet)
        except GenerationError as error:  # too long, or refused by the template: the conversation goes on
            stderr().print("[bold red]error:[/bold red]", foreign(str(error)))
            if self._turns != self._start:
                stderr().print(Text("Earlier turns are part of the prompt: /reset forgets them.", style="dim"))
            return
        self._turns = [*turns, {"role": "assistant", "content": reply.text}]
        self._last = reply
        if self._receipts is not None:
            keep_numbered(reply, self._receipts)
        if reply.finished is not None and not self._quiet:
            stderr().print(summary_text(reply.finished))


def adapter_texts(llm: LLM | RemoteLLM, in_use: str) -> list[Text]:
    """Returns a line for each adapter that is loaded, and one for the base; none if there is no adapter."""
    if not llm.info.adapters:
        return []
    lines = [Text(f"{'*' if not in_use else ' '} base", style="dim")]
    for info in llm.info.adapters:
        parts = f"{info.products} products of rank {info.largest_rank} or less, {info.replaced} tensors of its own"
        mark = "*" if info.name == in_use else " "
        lines.append(Text(f"{mark} {info.name}: {parts}, {human_bytes(info.memory_bytes)} in the enclave", style="dim"))
    return lines


def _has_template(llm: LLM | RemoteLLM, adapter: str) -> bool:
    own = [info.has_chat_template for info in llm.info.adapters if info.name == adapter]
    return own[0] if own else llm.info.has_chat_template


def _plain(llm: LLM) -> object:
    import msgspec

    return msgspec.to_builtins(llm.status().meter)
