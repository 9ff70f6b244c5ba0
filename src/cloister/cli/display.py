"""What a person sees on the terminal: progress while loading, text as it comes with a status line below, incidents."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from unicodedata import category

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from cloister.wire.session import Event, Finished, Meter, StatusReport
from cloister.wire.session import Progress as ProgressMessage

PIPED_WIDTH = 140
"""Columns of tables that go to a file or a pipe."""


def stdout() -> Console:
    """Returns the console for answers; no colour and no control codes when piped."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def stderr() -> Console:
    """Returns the console for everything that is not the answer; lines are broken on a terminal only."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def foreign(text: str) -> Text:
    """Returns a text that may quote others (a server, a file) as it is: no markup, and no character that steers a terminal."""
    return Text("".join("\ufffd" if category(c) in ("Cc", "Cs") and c not in "\t\n" else c for c in text))


def human_bytes(count: float) -> str:
    """Returns a size in the unit that reads best."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """Returns a number shortened to three digits and a letter."""
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}G"


class RateColumn(TextColumn):
    """The speed of a task in its own unit."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: object) -> Text:
        """Returns the rate, or nothing before it is known."""
        speed = getattr(task, "speed", None)
        unit = getattr(task, "fields", {}).get("unit", "")
        return Text(f"{human_count(speed)} {unit}/s" if speed else "", style="dim")


class Display:
    """Listens to a model: shows progress, keeps the newest totals, prints incidents as they happen."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = stderr()
        self._quiet = quiet
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self.meter: Meter | None = None
        self.incidents: list[Event] = []

    def __call__(self, message: ProgressMessage | Event | StatusReport) -> None:
        """Takes a message of the enclave."""
        if isinstance(message, StatusReport):
            self.meter = message.meter
        elif isinstance(message, Event):
            self.incidents.append(message)
            if not self._quiet:
                self._console.print(incident_text(message))
        elif not self._quiet and self._progress is not None:
            self._advance(self._progress, message)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Shows progress bars inside the block, on a terminal."""
        if self._quiet or not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as self._progress:
            yield
        self._progress = None

    def _advance(self, progress: Progress, message: ProgressMessage) -> None:
        if message.stage not in self._tasks:
            self._tasks[message.stage] = progress.add_task(message.stage, total=message.total, unit=message.unit)
        progress.update(self._tasks[message.stage], completed=message.done, total=message.total)


class AnswerView:
    """Shows an answer as it comes: finished lines scroll away, the last one stays above the status line."""

    def __init__(self, display: Display, quiet: bool) -> None:
        self._display = display
        self._console = stdout()
        self._live: Live | None = None
        self._line = ""
        self._tokens = 0
        self._started = time.monotonic()
        if self._console.is_terminal and not quiet:
            self._live = Live(console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> "AnswerView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._console.print(Text(self._line))
        elif kind is None:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def write(self, piece: str, tokens: int = 1) -> None:
        """Shows a piece of the answer."""
        self._tokens += tokens
        if self._live is None:
            sys.stdout.write(piece)
            sys.stdout.flush()
            return
        *finished, self._line = (self._line + piece).split("\n")
        for line in finished:
            self._live.console.print(Text(line))
        self._live.update(Group(Text(self._line), self._status()))

    def _status(self) -> Text:
        rate = self._tokens / max(1e-9, time.monotonic() - self._started)
        meter = self._display.meter
        return status_text(rate, meter) if meter else Text(f"{rate:.1f} tokens/s", style="dim")


def status_text(rate: float, meter: Meter) -> Text:
    """Returns the status line: speed, pads left, products checked, bytes that crossed."""
    crossed = human_bytes(meter.bytes_sent + meter.bytes_received)
    parts = [
        f"{rate:.1f} tokens/s",
        f"{meter.products} products checked",
        f"{crossed} crossed",
    ]
    if meter.pantry_capacity_tokens:
        parts.insert(1, f"pantry {meter.pantry_tokens}/{meter.pantry_capacity_tokens}")
    if meter.enclave_products:
        parts.append(f"{meter.enclave_products} computed in the enclave")
    return Text(" · ".join(parts), style="dim")


def summary_text(finished: Finished) -> Text:
    """Returns the line below a finished answer."""
    rate = finished.completion_tokens / finished.decode_seconds if finished.decode_seconds > 0 else 0.0
    return status_text(rate, finished.meter)


def incident_text(event: Event) -> Text:
    """Returns what an accelerator did and what became of its work."""
    return Text(
        f"! {event.accelerator}, {event.linear}: {event.reason} Its work was {event.outcome}.", style="bold red"
    )
