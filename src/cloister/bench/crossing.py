"""What the sanitising enclave's own process costs: the same requests sanitised here and there, in turns; a split's tokens too."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track

from cloister.bench import prompts
from cloister.bench.record import Record
from cloister.gateway.embedding import PromptMaker
from cloister.gateway.engine import Transport
from cloister.gateway.guard import Guard
from cloister.gateway.protect import detection_for, sampler_for
from cloister.gateway.sanitising import PromptGuard, protection
from cloister.local.sanitising import SanitisingEnclave
from cloister.model.embedding import EmbeddingLayer
from cloister.model.spec import read_spec
from cloister.privacy import candidate_file
from cloister.privacy.detector import Mode
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Mechanism
from cloister.server.schema import ChatRequest
from cloister.split.client import ClientPart, EmbeddingPart
from cloister.split.confined import ConfinedPart
from cloister.split.sanitise import unsanitised
from cloister.wire.sanitising import OpenGateway, OpenSplit

WARM_UP = 20
BUDGET = 1e6
NOTE = (
    "Medians in milliseconds, the two ways in turns, a few milliseconds apart. A request is one turn (or a growing chat of up to "
    "eight) with new names: detected, charged, drawn, replaced, tokenised, embedded, its file written. 'there': in the "
    "sanitising enclave, a confined process on the same machine; 'added' is the median of the differences, pair by pair. "
    "'a token of a split': the embedding of one token that a split server returned."
)


def run(
    model: Path, candidates: Path | None, detectors: Sequence[str], count: int, smoke: bool, console: Console
) -> Record:
    """Measures `count` requests of each sort and as many tokens of a split."""
    warm_up, count = (2, 6) if smoke else (WARM_UP, count)
    place = candidates or model / candidate_file.FILE_NAME
    rows = []
    with tempfile.TemporaryDirectory() as folder, _guards(model, place, detectors, Path(folder)) as (here, there):
        for sort, texts in (("a letter", _letters(1)), ("a chat of up to 8", _chat())):
            pairs = [
                _in_turns(number, partial(_asked, here, request), partial(_asked, there, request))
                for number, request in enumerate(
                    track(islice(texts, warm_up + count), sort, warm_up + count, console=console)
                )
            ]
            rows.append(_row(sort, pairs[warm_up:]))
    with tempfile.TemporaryDirectory() as folder, _parts(model, Path(folder), warm_up + count) as (own, confined):
        pairs = [
            _in_turns(number, lambda: own.following(5), lambda: confined.following(5))
            for number in range(warm_up + count)
        ]
    rows.append(_row("a token of a split", pairs[warm_up:]))
    facts = {"load average of the machine": os.getloadavg()[0]}
    settings = {"model": model.name, "detectors": ",".join(detectors), "requests": count}
    return Record("crossing", rows, facts, settings, NOTE)


@contextmanager
def _guards(model: Path, candidates: Path, detectors: Sequence[str], folder: Path) -> Iterator[tuple[Guard, Guard]]:
    layer, held = EmbeddingLayer.open(model), candidate_file.read(candidates)
    sampler = sampler_for(held, layer, Mechanism.CHANNEL, Fraction(2))
    detection = detection_for(held, Mode.DETECTED, names=detectors)
    maker = PromptMaker(layer, Transport.EMBEDS, read_spec(model / "config.json").max_positions)
    asked = OpenGateway(
        model=str(model.resolve()), candidates=str(candidates.resolve()), ledger=str(folder / "there" / "ledger.db"),
        mechanism=Mechanism.CHANNEL, epsilon="2", budget=BUDGET, mode=Mode.DETECTED, detectors=tuple(detectors),
        transport=Transport.EMBEDS,
    )  # fmt: skip
    here = PromptGuard(protection(detection, sampler, Ledger.open(folder / "here.db")), maker, BUDGET)
    with SanitisingEnclave(asked) as enclave:
        try:
            yield here, enclave.guard
        finally:
            here.close()


@contextmanager
def _parts(model: Path, folder: Path, most: int) -> Iterator[tuple[ClientPart, ClientPart]]:
    layer = EmbeddingLayer.open(model)
    asked = OpenSplit(
        model=str(model.resolve()), ledger=str(folder / "ledger.db"), sanitiser="none", epsilon=1.0, share=0.5,
        budget=BUDGET, session="bench", most=most,
    )  # fmt: skip
    own = EmbeddingPart(layer, unsanitised)
    with SanitisingEnclave(asked) as enclave:
        confined = ConfinedPart(enclave.prompts, enclave.ready.facts, layer.tokenizer)
        for part in (own, confined):
            part.begin([5], most)
        yield own, confined


def _asked(guard: Guard, request: ChatRequest) -> None:
    guard.protect("bench", request)


def _in_turns(number: int, here: Callable[[], object], there: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of both; which goes first alternates."""
    times = [0.0, 0.0]
    for which, action in ((0, here), (1, there))[:: 1 if number % 2 else -1]:
        time.sleep(0.002)
        begun = time.perf_counter()
        action()
        times[which] = time.perf_counter() - begun
    return times[0], times[1]


def _row(sort: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    added = [1e3 * (there - here) for here, there in pairs]
    low, _, high = statistics.quantiles(added, n=4)
    return {
        "what": sort,
        "here": 1e3 * statistics.median(here for here, _ in pairs),
        "there": 1e3 * statistics.median(there for _, there in pairs),
        "added": statistics.median(added),
        "spread": high - low,
    }


def _letters(seed: int) -> Iterator[ChatRequest]:
    return (_request([text]) for text in prompts.letters(seed))


def _chat() -> Iterator[ChatRequest]:
    history: list[str] = []
    for text in prompts.letters(2):
        history = [*history, text] if len(history) < 8 else [text]
        yield _request(history)


def _request(texts: Sequence[str]) -> ChatRequest:
    return msgspec.convert({"messages": [{"role": "user", "content": text} for text in texts]}, ChatRequest)
