"""What the gateway adds to the latency of a vLLM: the same requests, directly and through it, in turns."""

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from cloister.bench.record import Record
from cloister.errors import GatewayError

NAMES = (
    "Anna Schmidt",
    "Peter Novak",
    "Maria Lopez",
    "Laura Rossi",
    "Oscar Dubois",
    "Ivan Larsen",
    "Nina Silva",
    "Paul Moreau",
)
CITIES = ("Paris", "Berlin", "Vienna", "Oslo", "Madrid", "Rome", "Lisbon", "Prague")
LETTER = (
    "Letter {number}. Please answer the letter of {name} from {city}: the meeting of last week went well, the figures of "
    "the second quarter look better than expected, and the invoice over {sum} euros was paid in time. The next step is to "
    "talk about the plan for the summer, about who takes care of the garden, and about the trip that we have wanted to make "
    "for years. Keep it short and kind."
)
WARM_UP = 3


def run(engine: str, model: Path, candidates: Path, requests: int, tokens: int, console: Console) -> Record:
    """Measures `requests` chats of about a hundred words each way; the engine must serve `model` with prompt embeddings."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        own: dict[str, Any] = {}
        for transport in ("embeds", "tokens"):
            with _gateway(engine, model, candidates, Path(folder) / f"{transport}.db", transport) as url:
                console.print(f"{transport}: {requests} requests each way")
                direct, through, report = asyncio.run(_measure(engine, url, requests, tokens))
            added = [b - a for a, b in zip(direct, through, strict=True)]
            rows.append(
                {
                    "transport": transport,
                    "direct ms": 1e3 * statistics.median(direct),
                    "through ms": 1e3 * statistics.median(through),
                    "added ms": 1e3 * statistics.median(added),
                    "added %": 100 * (statistics.median(through) / statistics.median(direct) - 1),
                    "spread ms": 1e3 * (statistics.quantiles(added, n=4)[2] - statistics.quantiles(added, n=4)[0]),
                }
            )
            own = report
    return Record(
        "gateway",
        rows,
        {
            "replaced in a request": own.get("replaced", {}),
            "drawn for it": own.get("drawn", 0),
            "load average of the machine": os.getloadavg()[0],
        },
        {"requests": requests, "tokens": tokens, "model": model.name},
        "Every request names people and new sums, so each is charged to the ledger (one synced write), drawn and restored. "
        "Medians; 'spread': between the quartiles of what was added, pair by pair.",
    )


async def _measure(
    engine: str, url: str, requests: int, tokens: int
) -> tuple[list[float], list[float], dict[str, Any]]:
    from cloister.gateway.http import EngineClient
    from cloister.gateway.text_engine import served_model

    times: tuple[list[float], list[float]] = ([], [])
    report: dict[str, Any] = {}
    async with EngineClient(engine) as direct, EngineClient(url) as through:
        name = (await served_model(direct, ""))[0]
        for number in range(WARM_UP + requests):
            for which, client in ((0, direct), (1, through)) if number % 2 else ((1, through), (0, direct)):
                text = LETTER.format(
                    number=2 * number + which,
                    name=NAMES[number % len(NAMES)],
                    city=CITIES[number // len(NAMES) % len(CITIES)],
                    sum=10_000 + 37 * number,
                )
                body = {
                    "model": name,
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": tokens,
                    "temperature": 0,
                }
                begun = time.perf_counter()
                answer = await client.post("/v1/chat/completions", {**body, "ignore_eos": True})
                if number >= WARM_UP:
                    times[which].append(time.perf_counter() - begun)
                report = answer.get("cloister", report)
    return times[0], times[1], report


@contextmanager
def _gateway(engine: str, model: Path, candidates: Path, ledger: Path, transport: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "cloister", "gateway", "--engine", engine, "--model", str(model), "--port", str(port),
        "--candidates", str(candidates), "--ledger", str(ledger), "--transport", transport, "--detectors", "rules",
        "--budget", "1e9", "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        for _ in range(240):
            if process.poll() is not None:
                said = process.stderr.read() if process.stderr else b""
                raise GatewayError("The gateway did not start.", remedy=said.decode())
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as probe:
                    probe.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    if probe.recv(64):
                        break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        if process.stderr:
            process.stderr.close()
