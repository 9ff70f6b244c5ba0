"""What sanitising a prompt costs, stage by stage: prompts that were never seen before, a chat that grows, sessions that begin.

The bar: at most 1 ms for a prompt of 128 tokens once the sanitiser is warm.
"""

import base64
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from cloister.bench import prompts
from cloister.bench.record import Record
from cloister.gateway.protect import detection_for, sampler_for
from cloister.gateway.tensor_file import tensor_file
from cloister.model.embedding import EmbeddingLayer
from cloister.privacy import candidate_file
from cloister.privacy.detector import Detection, Mode
from cloister.privacy.labels import Finding
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Cost, DominatingCurve, Mechanism, Replacement, Sampler, Span
from cloister.privacy.sanitiser import Sanitiser

TOKENS = 128
"""Of the bar's prompt, by the model's own tokenizer."""
WARM_UP = 40
BUDGET = 1e6
"""It does not end, so nearly every prompt is covered by a reservation; the first of a session never is."""
AT_ONCE = f"{TOKENS} tokens, all new, one after the other"
PAUSE = 0.005
"""Seconds before each prompt of the other rows: as requests come, to a processor that slept meanwhile."""
FIRST = "letters, each the first prompt of a session"
TURNS = 8
"""Prompts of a chat, each sent with all before it."""


@dataclass
class _Clock:
    """Adds up the seconds of the stages of one prompt."""

    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, stage: str, action: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        try:
            return action()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun


@dataclass(frozen=True)
class _TimedDetection(Detection):
    """A detection that is timed as a whole: its detectors share what they know of a text."""

    clock: _Clock = field(default_factory=_Clock)

    def find(self, text: str) -> list[Finding]:
        found: list[Finding] = self.clock.run("detect", lambda: Detection.find(self, text))
        return found


@dataclass(frozen=True)
class _TimedSampler:
    inner: Sampler
    clock: _Clock

    @property
    def mechanism(self) -> Mechanism:
        return self.inner.mechanism

    @property
    def epsilon(self) -> float:
        return self.inner.epsilon

    @property
    def tables(self) -> str:
        return self.inner.tables

    def replace(self, spans: Sequence[Span]) -> list[Replacement]:
        made: list[Replacement] = self.clock.run("draw", lambda: self.inner.replace(spans))
        return made

    def cost(self, span: Span) -> Cost:
        return self.inner.cost(span)

    def privacy_loss(self) -> DominatingCurve:
        return self.inner.privacy_loss()


def run(
    model: Path,
    candidates: Path | None,
    detectors: Sequence[str],
    data: Path | None,
    count: int,
    smoke: bool,
    console: Console,
) -> Record:
    """Measures `count` prompts of each sort, one at a time: one after the other, and `PAUSE` apart, as requests come.

    A processor that has slept takes longer for the same work; the difference is the machine's, and users have it too.
    """
    layer = EmbeddingLayer.open(model)
    held = candidate_file.read(candidates or model / candidate_file.FILE_NAME)
    sampler = sampler_for(held, layer, Mechanism.CHANNEL, Fraction(2))
    warm_up, count = (2, 10) if smoke else (WARM_UP, count)
    length: Callable[[str], int] = lambda text: len(layer.tokenizer.encode(text))  # noqa: E731
    sorts: dict[str, Callable[[], Iterator[list[str]]]] = {
        AT_ONCE: lambda: ([text] for text in prompts.of_tokens(4, TOKENS, length)),
        f"{TOKENS} tokens, all new": lambda: ([text] for text in prompts.of_tokens(5, TOKENS, length)),
        "letters, all new": lambda: ([text] for text in prompts.letters(1)),
        f"a chat's turn, up to {TURNS} before it": _chat,
        FIRST: lambda: ([text] for text in prompts.letters(3)),
    }
    if data is not None:
        sorts[data.name] = lambda: ([text] for text in prompts.of_file(data))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (sort, made) in enumerate(sorts.items()):
            clock = _Clock()
            detection = detection_for(held, Mode.DETECTED, names=detectors)
            timed = _TimedDetection(detection.detectors, detection.mode, detection.kept, clock)
            with closing(Ledger.open(Path(folder) / f"{number}.db")) as ledger:
                plain = ledger.charge
                ledger.charge = lambda *a, **k: clock.run("charge", lambda: plain(*a, **k))  # type: ignore[method-assign] # noqa: B023
                sanitiser = Sanitiser(timed, _TimedSampler(sampler, clock), ledger, "bench", BUDGET)
                times: list[_Timed] = []
                asked = list(islice(made(), warm_up + count))
                gc.freeze()  # as the sanitising enclave does: its lists and detectors stay
                for place, texts in enumerate(track(asked, sort, console=console)):
                    if sort == FIRST:
                        sanitiser = Sanitiser(timed, _TimedSampler(sampler, clock), ledger, f"bench {place}", BUDGET)
                    if sort != AT_ONCE:
                        time.sleep(PAUSE)
                    timed_prompt = _one(sanitiser, layer, texts, clock)
                    if place >= warm_up:
                        times.append(timed_prompt)
            gc.unfreeze()
            rows.append(_row(sort, times))
    facts = {
        "detectors": detection.policy,
        "load average of the machine": os.getloadavg()[0],
    }
    note = (
        "Milliseconds, median, 10th and 95th percentile, one prompt at a time. 'tokens' are the model's, of a prompt's newest "
        f"text, 'spans' what is replaced, medians. Prompts are {1e3 * PAUSE:g} ms apart, but for the first row. 'whole' is the "
        "sanitiser: detect, charge, draw and replace; 'embed' comes after it: tokens, rows of the table, the file that is sent. "
        "ε = 2, a budget that does not end: the charge of a session's first prompt waits for the disk, nearly all others are "
        "covered by what the session reserved."
    )
    settings = {"model": model.name, "detectors": ",".join(detectors), "prompts": count}
    return Record("sanitize-speed", rows, facts, settings, note)


@dataclass(frozen=True)
class _Timed:
    """One prompt: the seconds of its stages, the tokens of its newest text, its spans."""

    seconds: dict[str, float]
    tokens: int
    spans: int


def _one(sanitiser: Sanitiser, layer: EmbeddingLayer, texts: list[str], clock: _Clock) -> _Timed:
    clock.seconds.clear()
    sanitised = clock.run("whole", lambda: sanitiser.sanitise(texts))
    newest = sanitised.texts[-1]
    clock.run("embed", lambda: _embedded(layer, newest))
    seconds = dict(clock.seconds)
    stages = ("detect", "charge", "draw")
    seconds["replace"] = seconds["whole"] - sum(seconds.get(stage, 0.0) for stage in stages)
    return _Timed(seconds, len(layer.tokenizer.encode(texts[-1])), sum(sanitised.counts.values()))


def _embedded(layer: EmbeddingLayer, text: str) -> bytes:
    rows = layer.rows(layer.tokenizer.encode(text))
    return base64.b64encode(tensor_file(rows, layer.dtype, layer.width))


def _row(sort: str, times: list[_Timed]) -> dict[str, Any]:
    def median(stage: str) -> float:
        return 1e3 * statistics.median(one.seconds.get(stage, 0.0) for one in times)

    whole = sorted(one.seconds["whole"] for one in times)
    return {
        "prompt": sort,
        "tokens": statistics.median(one.tokens for one in times),
        "spans": statistics.median(one.spans for one in times),
        "whole": median("whole"),
        "whole p10": 1e3 * whole[len(whole) // 10],
        "whole p95": 1e3 * whole[int(0.95 * (len(whole) - 1))],
        **{stage: median(stage) for stage in ("detect", "charge", "draw", "replace", "embed")},
    }


def _chat() -> Iterator[list[str]]:
    history: list[str] = []
    for text in prompts.letters(2):
        history = [*history, text] if len(history) <= TURNS else [text]
        yield list(history)
