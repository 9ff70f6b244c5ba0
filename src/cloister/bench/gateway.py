"""What the gateway adds to the latency of a vLLM: the same requests, directly and through it, in turns.

The same request is: the same model, as many prompt tokens (what is asked directly is a sanitised letter too), as many answer
tokens, streamed both ways, read by the same client. The bar: at most 5 %.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from cloister.bench import prompts
from cloister.bench.engines import Subject, gateway
from cloister.bench.record import Record
from cloister.errors import EngineProtocolError

TRANSPORTS = ("embeds", "tokens")
WARM_UP = 3
BUDGET = 1e6


@dataclass(frozen=True)
class _Timed:
    """One request."""

    first: float
    """Seconds to the first piece of text."""
    whole: float
    prompt_tokens: int
    answer_tokens: int


def measure(subject: Subject, requests: int, lengths: Sequence[int], console: Console) -> list[dict[str, Any]]:
    """Returns a row for each transport and each length of an answer, of `requests` chats each way."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for transport in TRANSPORTS:
            ledger = Path(folder) / f"{transport}.db"
            with gateway(subject, ledger, transport, BUDGET) as url:
                for tokens in lengths:
                    console.print(f"{subject.name}, {transport}, {tokens} tokens: {requests} requests each way")
                    direct, through = asyncio.run(_measure(subject, url, requests, tokens))
                    rows.append(_row(subject.name, transport, tokens, direct, through))
    return rows


def record(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Record:
    """Returns the record of some rows."""
    return Record(
        "gateway",
        rows,
        {"load average of the machine": os.getloadavg()[0]},
        settings,
        "Streamed chats, directly and through the gateway in turns; medians in milliseconds. Every request names new people, "
        "sums and dates, so each is detected, charged, drawn, sent and restored anew; what is asked directly is a sanitised "
        "letter of the same kind. The budget does not end, so nearly every charge is covered by what the session reserved and "
        "does not wait for the disk. 'spread': between the quartiles of what was added, pair by pair. Engine, gateway and client "
        "share the machine.",
    )


async def _measure(subject: Subject, url: str, requests: int, tokens: int) -> tuple[list[_Timed], list[_Timed]]:
    from cloister.gateway.http import EngineClient
    from cloister.gateway.text_engine import served_model

    times: tuple[list[_Timed], list[_Timed]] = ([], [])
    texts = prompts.letters(tokens)
    async with EngineClient(subject.engine) as direct, EngineClient(url) as through:
        name = (await served_model(direct, ""))[0]
        for number, sanitised in enumerate(islice(_sanitised(subject), WARM_UP + requests)):
            pairs = ((0, direct, sanitised), (1, through, next(texts)))
            for which, client, text in pairs if number % 2 else reversed(pairs):
                timed = await one_request(client, name, text, tokens)
                if number >= WARM_UP:
                    times[which].append(timed)
    return times


async def one_request(client: Any, model: str, text: str, tokens: int) -> _Timed:
    """Asks for a chat's answer of exactly `tokens` tokens, and times it.

    Raises:
        EngineProtocolError: the answer has another length.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    first = 0.0
    usage: dict[str, int] = {}
    begun = time.perf_counter()
    async for event in client.events("/v1/chat/completions", {**body, "ignore_eos": True}):
        if not first and any(choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
            first = time.perf_counter() - begun
        usage = event.get("usage") or usage
    whole = time.perf_counter() - begun
    if usage.get("completion_tokens") != tokens:
        raise EngineProtocolError(
            f"The answer has {usage.get('completion_tokens')} tokens where {tokens} were asked for."
        )
    return _Timed(first or whole, whole, usage.get("prompt_tokens", 0), tokens)


def _sanitised(subject: Subject) -> Iterator[str]:
    """Yields letters as the gateway would send them."""
    from cloister.gateway.protect import detection_for, sampler_for
    from cloister.model.embedding import EmbeddingLayer
    from cloister.privacy import candidate_file
    from cloister.privacy.detector import Mode
    from cloister.privacy.ledger import Ledger
    from cloister.privacy.mechanism import Mechanism
    from cloister.privacy.sanitiser import Sanitiser

    held = candidate_file.read(subject.candidates)
    sampler = sampler_for(held, EmbeddingLayer.open(subject.model), Mechanism.CHANNEL, Fraction(2))
    with tempfile.TemporaryDirectory() as folder, closing(Ledger.open(Path(folder) / "ledger.db")) as ledger:
        sanitiser = Sanitiser(detection_for(held, Mode.DETECTED), sampler, ledger, "bench", BUDGET)
        for text in prompts.letters(0):
            yield sanitiser.sanitise([text]).texts[0]


def _row(name: str, transport: str, tokens: int, direct: list[_Timed], through: list[_Timed]) -> dict[str, Any]:
    def median(times: list[_Timed], what: str) -> float:
        return 1e3 * statistics.median(getattr(timed, what) for timed in times)

    added = [1e3 * (b.whole - a.whole) for a, b in zip(direct, through, strict=True)]
    low, _, high = statistics.quantiles(added, n=4)
    return {
        "model": name,
        "transport": transport,
        "answer": tokens,
        "direct": median(direct, "whole"),
        "through": median(through, "whole"),
        "added": statistics.median(added),
        "added %": 100 * (median(through, "whole") / median(direct, "whole") - 1),
        "spread": high - low,
        "first token, direct": median(direct, "first"),
        "first token, through": median(through, "first"),
        "prompt tokens, direct": statistics.median(timed.prompt_tokens for timed in direct),
        "prompt tokens, through": statistics.median(timed.prompt_tokens for timed in through),
    }
