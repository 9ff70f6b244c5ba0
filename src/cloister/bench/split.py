"""What the published split costs: a decoder whole, split over a connection, and wholly in the enclave; the mechanism's share."""

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cloister.bench.record import Record

PROMPT_WORDS = (
    "Once upon a time there was a little fox who lived near a pond and loved to fly a red kite with a friend. "
)
WHOLE, SPLIT, PUBLISHED_SPLIT = "whole, unprotected (transformers)", "split", "split, as published"
NOTE = (
    "Client and server in one process over a loopback connection; prefill included. 'all in the enclave' is the software "
    "stand-in with int8 weights: another implementation than transformers, so its overhead compares systems, not "
    "placements. The published figures are CMIF's, of its own models and an SGX2 enclave."
)
PUBLISHED = {"overhead of the split": 1.54, "overhead of the TEE before": 6.5, "share of the mechanism": "0.6-0.74 %"}


Way = Callable[[], int]
"""Generates once; returns how many tokens."""


def run(model: Path, tokens: int, repeats: int, epsilon: float, smoke: bool, console: Console) -> Record:
    """Measures greedy generation of `tokens` tokens after a prompt of about a hundred, `repeats` times each, in turns."""
    from cloister.model.embedding import EmbeddingLayer
    from cloister.split.client import EmbeddingPart, Spent, SplitClient
    from cloister.split.model import ServerModel
    from cloister.split.sanitise import AsPublished, rare_tokens, unsanitised
    from cloister.split.server import SplitServer

    if smoke:
        tokens, repeats = min(tokens, 8), 1
    layer = EmbeddingLayer.open(model)
    part = EmbeddingPart(layer, unsanitised)
    prompt = part.tokenizer.encode(PROMPT_WORDS * 4)[:100]
    whole = _whole(model)
    served = ServerModel.open(model, allow_tied=True)
    listener = socket.create_server(("127.0.0.1", 0))
    server = SplitServer(served, listener)
    threading.Thread(target=server.serve, daemon=True).start()
    published = AsPublished(layer, epsilon, rare_tokens(layer.tokenizer, None, 0.5), lambda cost, count: None)
    sanitising = EmbeddingPart(layer, published)
    spent = {SPLIT: Spent(), PUBLISHED_SPLIT: Spent()}
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with SplitClient(part, address) as plain, SplitClient(sanitising, address) as second, _enclave(model) as enclave:

        def in_enclave() -> int:
            reply = enclave.generate(PROMPT_WORDS * 4, temperature=0, max_new_tokens=tokens, ignore_eos=True)
            list(reply.deltas())
            return len(reply.token_ids)

        def split(name: str, client: SplitClient) -> Way:
            return lambda: sum(1 for _ in client.generate(prompt, tokens, spent[name]))

        ways: dict[str, Way] = {
            WHOLE: lambda: _generate_whole(whole, prompt, tokens, part.tokenizer.eos_ids),
            SPLIT: split(SPLIT, plain),
            PUBLISHED_SPLIT: split(PUBLISHED_SPLIT, second),
            "all in the enclave": in_enclave,
        }
        seconds = _seconds_per_token(ways, repeats, console)
    server.close()
    figures = spent[PUBLISHED_SPLIT]
    facts = {
        "hand-offs per token": figures.hand_offs / max(1, len(figures.tokens)),
        "share of the mechanism %": 100 * figures.sanitising / max(1e-9, sum(seconds[PUBLISHED_SPLIT]) * tokens),
        "prompt tokens": len(prompt),
        "load average of the machine": os.getloadavg()[0],
        **{f"published: {key}": value for key, value in PUBLISHED.items()},
    }
    settings = {"tokens": tokens, "repeats": repeats, "epsilon": epsilon}
    return Record(f"split-{model.name}", _rows(seconds), facts, settings, NOTE)


def _seconds_per_token(ways: Mapping[str, Way], repeats: int, console: Console) -> dict[str, list[float]]:
    """Returns the seconds per token of every way in `repeats` turns, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            made = way()
            if turn:
                seconds[name].append((time.perf_counter() - begun) / max(1, made))
        console.print(f"turn {turn} of {repeats}")
    return seconds


def _rows(seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    base = statistics.median(seconds[WHOLE])
    return [
        {
            "variant": name,
            "ms per token": 1e3 * statistics.median(times),
            "spread ms": 1e3 * (max(times) - min(times)),
            "overhead": statistics.median(times) / base,
        }
        for name, times in seconds.items()
    ]


def _generate_whole(whole: Any, prompt: list[int], tokens: int, ends: Container[int]) -> int:
    """Generates greedily with the whole model of transformers; returns how many tokens."""
    import torch
    from transformers import DynamicCache

    inputs, cache = torch.tensor([prompt]), DynamicCache()
    for made in range(tokens):
        with torch.inference_mode():
            out = whole(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].float().argmax())
        if token in ends:
            return made + 1
        inputs = torch.tensor([[token]])
    return tokens


def _whole(model: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True).eval()


def _enclave(model: Path) -> Any:
    from cloister.local.client import LLM
    from cloister.settings import PlanSettings, Settings

    return LLM(model, Settings(plan=PlanSettings(policy="enclave-only")))
