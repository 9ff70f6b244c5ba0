"""Talking to a model from the terminal: loading it with progress, streaming an answer, Ctrl-C."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.text import Text

from cloister.cli.display import AnswerView, Display, stderr
from cloister.cli.remote import Elsewhere
from cloister.errors import SettingsError
from cloister.local.client import LLM
from cloister.local.remote import RemoteLLM
from cloister.local.reply import Reply
from cloister.settings import Settings
from cloister.wire.session import Rehearsal


@contextmanager
def loaded(
    model: Path,
    settings: Settings,
    display: Display,
    rehearsal: Rehearsal | None = None,
    adapters: Mapping[str, Path] | None = None,
    *,
    receipts: bool = False,
) -> Iterator[LLM]:
    """Yields the model, loaded with progress bars and, for `receipts`, measured; closes it afterwards."""
    with display.loading():
        llm = LLM(model, settings, rehearsal=rehearsal, listener=display, adapters=adapters, receipts=receipts)
    with llm:
        if llm.info.warning:  # also with --quiet: nobody runs a baseline without being told
            stderr().print(Text(llm.info.warning, style="bold red"))
        yield llm


@contextmanager
def opened(
    model: Path | None, there: Elsewhere | None, settings: Settings, display: Display, adapters: Mapping[str, Path],
    *, receipts: bool,
) -> Iterator[LLM | RemoteLLM]:  # fmt: skip
    """Yields the model in a folder here, or in an enclave elsewhere, verified."""
    if there is not None:
        if settings != Settings() or adapters:
            raise SettingsError("How the model runs is the server's choice.", remedy="Give these to cloister serve.")
        with there.connected() as remote:
            yield remote
    elif model is not None:
        with loaded(model, settings, display, adapters=adapters, receipts=receipts) as llm:
            yield llm


@contextmanager
def cancellable(llm: LLM | RemoteLLM) -> Iterator[None]:
    """Makes the first Ctrl-C inside the block stop the generation, and the second one the program."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        llm.cancel()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def stream(reply: Reply, display: Display, quiet: bool) -> None:
    """Shows a reply as it is generated; call it inside `cancellable`."""
    with AnswerView(display, quiet) as view:
        for delta in reply.deltas():
            view.write(delta.text, len(delta.token_ids))
