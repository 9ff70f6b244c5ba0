"""What lent attention costs next to computing it in the enclave: decode by length of the context, and prefill of one layer.

Only attention is measured: its two products, softmax and all that blinding them takes, for every layer of a model's shape
with random keys, values and queries. The linears around it cost the same either way.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from rich.console import Console

from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.arith.team import Team, usable_cores
from cloister.assets import demo_model
from cloister.bench.record import Record
from cloister.bench.variant import cpu_seconds_of
from cloister.blinding.bilinear import attention_error
from cloister.blinding.pads import PadSource
from cloister.enclave.engine import PREFILL_TOKENS
from cloister.enclave.kernels import attention as fused_attention
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.masked_attention import MaskedAttention
from cloister.enclave.outsource import Roster
from cloister.errors import CloisterError
from cloister.local.random_model import LLAMA_1_1B, SMOKE
from cloister.model.directory import open_model
from cloister.model.spec import ModelSpec
from cloister.settings import AcceleratorSettings

WARM_UP: Final = 3
Attention = Callable[..., None]


@dataclass
class Scene:
    """A cache of random keys and values, and attention over it layer by layer."""

    spec: ModelSpec
    cache: PagedKVCache
    generator: np.random.Generator

    @staticmethod
    def of(spec: ModelSpec, tokens: int) -> "Scene":
        """Returns a scene with room for `tokens` tokens."""
        cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, tokens)
        generator = np.random.default_rng(0)
        generator.standard_normal(out=cache.keys, dtype=np.float32)
        generator.standard_normal(out=cache.values, dtype=np.float32)
        return Scene(spec, cache, generator)

    def attend(self, attention: Attention, layers: int, first: int, tokens: int) -> np.ndarray:
        """Returns what `attention` makes of random queries at positions from `first` on, of the last layer."""
        spec, length = self.spec, first + tokens
        pages = np.arange(-(-length // self.cache.page_tokens), dtype=np.int32)
        where = np.concatenate([np.array([first], np.int32), pages])
        query = self.query(first, tokens)
        scores = np.empty((spec.heads // spec.kv_heads, length), np.float32)
        out = np.empty((tokens, spec.heads * spec.head_dim), np.float32)
        for layer in range(layers):
            attention(query, self.cache.keys[layer], self.cache.values[layer], where, 0, scores, out)
        return out

    def error(self, attention: Attention, position: int) -> tuple[float, float]:
        """Returns the largest error of one layer's row and the bound that is stated for it, as shares of the largest value."""
        off = np.abs(self.attend(attention, 1, position, 1) - self.attend(fused_attention, 1, position, 1)).max()
        width = self.spec.head_dim
        longest = (
            np.linalg.norm(self.query(position, 1), axis=2).max() * np.linalg.norm(self.cache.keys[0], axis=3).max()
        )
        bound = attention_error(float(longest) / math.sqrt(width), width, position + 1)
        return float(off / np.abs(self.cache.values[0]).max()), bound

    def query(self, first: int, tokens: int) -> np.ndarray:
        """Returns the queries of positions from `first` on, the same every time."""
        shape = tokens, self.spec.heads, self.spec.head_dim
        return np.random.default_rng(first).standard_normal(shape, np.float32)


def run(shape: str, contexts: list[int], tokens: int, smoke: bool, console: Console) -> Record:
    """Returns the record of one shape: the enclave's own attention and lent attention at each length of the context.

    Raises:
        CloisterError: an accelerator failed, so that what was measured is not lent attention.
    """
    spec = _spec(shape, smoke)
    contexts, tokens = ([16, 32], 2) if smoke else (contexts, tokens)
    rows: list[dict[str, Any]] = []
    facts: dict[str, float] = {}
    with Team() as team:
        for context in contexts:
            console.print(f"context {context} ...")
            scene = Scene.of(spec, context + tokens + WARM_UP)
            own = _decode(scene, fused_attention, context, tokens) | _prefill(scene, fused_attention, context)
            lent, more = _lent(scene, context, tokens, team)
            own["M multiplications/token"] = 2 * spec.layers * spec.heads * spec.head_dim * (context + 1) / 1e6
            rows += [
                {"context": context, "attention": "in the enclave", **own},
                {"context": context, "attention": "lent", **lent},
            ]
            shares = {f"{column}, lent / in the enclave": lent[column] / own[column] for column in own}
            facts |= {f"context {context}: {key}": value for key, value in (shares | more).items()}
    return Record(
        f"attention-{shape}{'-smoke' if smoke else ''}",
        rows,
        facts,
        {
            "shape": shape, "layers": spec.layers, "heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim,
            "contexts": contexts, "tokens": tokens, "batch": 1, "threads": usable_cores(), "checks": 1,
            "load_before": os.getloadavg()[0],
        },
        "All layers of one decoded token, attention alone; medians of wall time, means of CPU. The worker runs on the same "
        "processor and keeps the blinded keys and values. Multiplications: of floats in the enclave's own attention; of field "
        "elements, in the enclave only, where it is lent. Prefill: a whole prompt of that length, one layer. "
        "`load_before` says how busy the machine was with other work: it stretches the wall times, the CPU times much less.",
    )  # fmt: skip


def _spec(shape: str, smoke: bool) -> ModelSpec:
    if shape == "demo":
        return open_model(demo_model()).spec
    return SMOKE if smoke else LLAMA_1_1B


def _decode(scene: Scene, attention: Attention, context: int, tokens: int) -> dict[str, float]:
    """Returns wall and CPU time of a decoded token once `context` tokens are there."""
    layers = scene.spec.layers
    for step in range(WARM_UP):
        scene.attend(attention, layers, context + step, 1)
    times, cpu = [], time.process_time()
    for step in range(tokens):
        started = time.perf_counter()
        scene.attend(attention, layers, context + WARM_UP + step, 1)
        times.append(time.perf_counter() - started)
    spent = time.process_time() - cpu
    return {"ms/token": 1e3 * statistics.median(times), "enclave CPU ms/token": 1e3 * spent / tokens}


def _prefill(scene: Scene, attention: Attention, context: int) -> dict[str, float]:
    """Returns the time of a prompt's attention in one layer, in the pieces that the engine makes."""
    started = time.perf_counter()
    for first in range(0, context, PREFILL_TOKENS):
        scene.attend(attention, 1, first, min(PREFILL_TOKENS, context - first))
    return {"prefill ms/layer": 1e3 * (time.perf_counter() - started)}


def _lent(scene: Scene, context: int, tokens: int, team: Team) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the columns of the table for lent attention, and further figures."""
    spec = scene.spec
    worker = SharedMemoryAccelerator.start()
    try:
        roster = Roster([worker], AcceleratorSettings(timeout_seconds=120.0))
        lent = MaskedAttention(roster, PadSource(), team)
        scene.attend(lent, spec.layers, context - 1, 1)  # everything before it is sent at once
        seen, steps = _counted(lent, worker), tokens + WARM_UP
        result = _decode(scene, lent, context, tokens)
        per_token = {key: (value - seen[key]) / steps for key, value in _counted(lent, worker).items()}
        kept = lent.kept_bytes
        error, bound = scene.error(lent, context)
        lent.release()
        result |= _prefill(scene, lent, context)
        if roster.incidents:
            raise CloisterError(f"The worker failed: {roster.incidents[0].reason}", remedy="Run the benchmark again.")
    finally:
        worker.close()
    sent = per_token["bytes_sent"] / 1e3
    result |= {
        "M multiplications/token": per_token["multiplications"] / 1e6,
        "worker CPU ms/token": 1e3 * per_token["worker_cpu"],
        "kB sent/token": sent,
        "kB received/token": per_token["bytes_received"] / 1e3,
        "exchanges/token": per_token["products"] + per_token["appends"],
    }
    whole = 2 * 4 * spec.layers * spec.kv_heads * spec.head_dim * context / 1e3
    return result, {
        "keep and blind ms/token": 1e3 * (per_token["keep_seconds"] + per_token["blind_seconds"]),
        "wait for the worker ms/token": 1e3 * per_token["lent_seconds"],
        "softmax ms/token": 1e3 * per_token["softmax_seconds"],
        "check and unblind ms/token": 1e3 * per_token["recover_seconds"],
        "kB sent/token if keys and values crossed each time": sent + whole,
        "MB kept in the enclave beside the cache": kept / 1e6,
        "largest error / largest value": error,
        "largest error that is stated / largest value": bound,
    }


def _counted(lent: MaskedAttention, worker: SharedMemoryAccelerator) -> dict[str, float]:
    if worker.pid is None:
        raise CloisterError("The worker is gone.", remedy="Run the benchmark again.")
    return {
        **{key: float(value) for key, value in vars(lent.counters).items()},
        "worker_cpu": cpu_seconds_of(worker.pid),
    }
