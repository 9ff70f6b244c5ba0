"""What the gateway adds to the latency of a vLLM: the same requests in turns, directly and through it.

Three ways of asking. 'direct': a chat, as any client sends it. 'prepared': the prompt as the gateway sends it (embeddings or
tokens, made beforehand), straight to the engine; what it differs by from 'direct' is the engine's. 'through': the gateway.
The same request is: the same model, as many prompt tokens (what is asked directly is a sanitised letter too), as many answer
tokens, streamed, read by the same client. The bar: at most 5 % over 'direct'.
"""

import asyncio
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cloister.bench import prompts
from cloister.bench.engines import Subject, gateway
from cloister.bench.record import Record
from cloister.errors import EngineProtocolError
from cloister.gateway.embedding import PromptMaker
from cloister.gateway.engine import Transport
from cloister.gateway.http import EngineClient
from cloister.gateway.protect import detection_for, sampler_for
from cloister.gateway.sanitising import PromptGuard, protection
from cloister.gateway.text_engine import served_model
from cloister.model.embedding import EmbeddingLayer
from cloister.model.spec import read_spec
from cloister.privacy import candidate_file
from cloister.privacy.detector import Mode
from cloister.privacy.ledger import Ledger
from cloister.privacy.mechanism import Mechanism
from cloister.server.schema import ChatRequest, Message
from cloister.wire.sanitising import Protected

TRANSPORTS: Final = (Transport.EMBEDS, Transport.TOKENS)
WAYS: Final = ("direct", "prepared", "through")
WARM_UP: Final = 3
LEAST: Final = 4
"""Requests each way, however long they take."""
BUDGET: Final = 1e6


@dataclass(frozen=True)
class Effort:
    """How much is measured for each transport and length."""

    requests: int
    """Requests each way."""
    seconds: float
    """After so long no further ones are begun, of which there are then fewer, but at least `LEAST`."""


@dataclass(frozen=True)
class _Timed:
    """One request."""

    first: float
    """Seconds to the first piece of text."""
    whole: float
    prompt_tokens: int


Times = Mapping[str, list[_Timed]]
"""The requests of each way; equal places were asked one after another."""


def measure(subject: Subject, effort: Effort, lengths: Sequence[int], console: Console) -> list[dict[str, Any]]:
    """Returns a row for each transport and each length of an answer."""
    rows = []
    for transport in TRANSPORTS:
        with _asked(subject, transport) as asked:
            for tokens in lengths:
                console.print(f"{subject.name}, {transport}, {tokens} tokens")
                rows.append(_row(subject.name, transport, tokens, asyncio.run(asked.times(effort, tokens))))
    return rows


def record(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Record:
    """Returns the record of some rows."""
    return Record(
        "gateway",
        rows,
        {"load average of the machine": os.getloadavg()[0]},
        settings,
        "Streamed chats in turns: directly, directly with the prompt in the gateway's form ('prepared'), through the gateway; "
        "medians in milliseconds. 'added': the median of through less direct, pair by pair; it lies between 'at least' and 'at "
        "most' with 95 % confidence. 'of these the engine': the median of prepared less direct; 'the gateway': of through less "
        "prepared. Every request names new people, sums and dates, so each is detected, charged, drawn, sent and restored anew; "
        "what is asked directly is a sanitised letter of the same kind. The budget does not end, so nearly every charge is "
        "covered by what the session reserved and does not wait for the disk. Engine, gateway and client share the machine.",
    )


class _Asked:
    """The three ways to an engine."""

    def __init__(self, engine: str, gateway: str, guard: PromptGuard) -> None:
        self._engine = engine
        self._gateway = gateway
        self._guard = guard
        self._letters = {way: prompts.letters(seed) for seed, way in enumerate(WAYS)}

    async def times(self, effort: Effort, tokens: int) -> Times:
        """Asks each way in turn, in another order every time."""
        times: dict[str, list[_Timed]] = {way: [] for way in WAYS}
        async with EngineClient(self._engine) as engine, EngineClient(self._gateway) as through:
            name = (await served_model(engine, ""))[0]
            end = time.monotonic() + effort.seconds
            for number in range(WARM_UP + effort.requests):
                if number >= WARM_UP + LEAST and time.monotonic() > end:
                    break
                for way in _order(number):
                    path, body = self._request(way)
                    client = through if way == "through" else engine
                    timed = await one_request(client, path, {"model": name, **body}, tokens)
                    if number >= WARM_UP:
                        times[way].append(timed)
        return times

    def _request(self, way: str) -> tuple[str, dict[str, Any]]:
        letter = next(self._letters[way])
        if way == "through":
            return "/v1/chat/completions", _chat(letter)
        protected = self._protected(letter)
        if way == "prepared":
            return "/v1/completions", protected.prompt
        return "/v1/chat/completions", _chat(protected.messages[0]["content"])

    def _protected(self, letter: str) -> Protected:
        return self._guard.protect("bench", ChatRequest(messages=[Message(role="user", content=letter)]))


async def one_request(client: EngineClient, path: str, prompt: Mapping[str, Any], tokens: int) -> _Timed:
    """Asks for an answer of exactly `tokens` tokens, and times it.

    Raises:
        EngineProtocolError: the answer has another length.
    """
    body = {**prompt, "max_tokens": tokens, "temperature": 0, "stream_options": {"include_usage": True}}
    first = 0.0
    usage: dict[str, int] = {}
    begun = time.perf_counter()
    async for event in client.events(path, {**body, "ignore_eos": True}):
        if not first and any(_text(choice) for choice in event.get("choices", ())):
            first = time.perf_counter() - begun
        usage = event.get("usage") or usage
    whole = time.perf_counter() - begun
    if usage.get("completion_tokens") != tokens:
        raise EngineProtocolError(
            f"The answer has {usage.get('completion_tokens')} tokens where {tokens} were asked for."
        )
    return _Timed(first or whole, whole, usage.get("prompt_tokens", 0))


@contextmanager
def _asked(subject: Subject, transport: Transport) -> Iterator[_Asked]:
    """Starts a gateway, and opens what it would open to make prompts beforehand."""
    held, layer = candidate_file.read(subject.candidates), EmbeddingLayer.open(subject.model)
    sampler = sampler_for(held, layer, Mechanism.CHANNEL, Fraction(2))
    maker = PromptMaker(layer, transport, read_spec(subject.model / "config.json").max_positions)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ledger = Ledger.open(folder / "own.db")
        names = subject.detectors.split(",")
        parts = protection(detection_for(held, Mode.DETECTED, names=names), sampler, ledger)
        guard = stack.enter_context(closing(PromptGuard(parts, maker, BUDGET)))
        url = stack.enter_context(gateway(subject, folder / "gateway" / "ledger.db", str(transport), BUDGET))
        yield _Asked(subject.engine, url, guard)


def _order(number: int) -> tuple[str, ...]:
    """Returns the ways in one of their six orders, so that each follows each equally often."""
    turned = WAYS[number % 3 :] + WAYS[: number % 3]
    return turned if number // 3 % 2 else turned[::-1]


def _chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def _text(choice: Mapping[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def _row(name: str, transport: Transport, tokens: int, times: Times) -> dict[str, Any]:
    def median(way: str, what: str) -> float:
        return statistics.median(getattr(timed, what) for timed in times[way])

    added = _differences(times, "through", "direct")
    low, high = median_interval(added)
    whole = {way: 1e3 * median(way, "whole") for way in WAYS}
    first = {f"first token, {way}": 1e3 * median(way, "first") for way in WAYS}
    return {
        "model": name,
        "transport": str(transport),
        "answer": tokens,
        "requests": len(added),
        **whole,
        "added": statistics.median(added),
        "at least": low,
        "at most": high,
        "added %": 100 * statistics.median(added) / whole["direct"],
        "of these the engine": statistics.median(_differences(times, "prepared", "direct")),
        "the gateway": statistics.median(_differences(times, "through", "prepared")),
        **first,
        "prompt tokens, direct": median("direct", "prompt_tokens"),
        "prompt tokens, through": median("through", "prompt_tokens"),
    }


def _differences(times: Times, more: str, less: str) -> list[float]:
    return [1e3 * (b.whole - a.whole) for a, b in zip(times[less], times[more], strict=True)]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Returns between which values the median of their distribution lies with this confidence, whatever the distribution.

    The k-th smallest and the k-th largest, with the largest k for which a fair coin thrown once for each value shows fewer
    than k heads with probability at most (1 - confidence) / 2. Five values or fewer cannot give 95 %: the extremes.
    """
    ordered = sorted(values)
    most = (1 - confidence) / 2 * 2 ** len(ordered)
    k, fewer = 0, 1  # `fewer`: throws with at most k heads
    while fewer <= most:
        k += 1
        fewer += math.comb(len(ordered), k)
    return ordered[max(k, 1) - 1], ordered[-max(k, 1)]
