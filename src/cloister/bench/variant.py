"""One way of running a model, measured in a process of its own: `python -m cloister.bench.variant NAME SHAPE ...`.

A process each keeps peak memory and CPU time apart. Prints one JSON object.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.arith.team import Team, usable_cores
from cloister.assets import demo_model
from cloister.audit.baselines.w8a8 import PlainGate
from cloister.bench.record import peak_memory_bytes
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import EnclaveModel, prepare
from cloister.local.random_model import LLAMA_1_1B, SMOKE, random_model
from cloister.model.directory import open_model
from cloister.settings import AcceleratorSettings, BlindingSettings, Prefill, Settings

OURS: Final = ("unprotected int8", "enclave-only int8", "enclave-only int8, 1 thread", "enclave-only exact", "blinded")
THEIRS: Final = ("transformers bf16",)
WARM_UP: Final = 4
CONTEXT: Final = 128
"""Tokens of context when decoding begins."""


@runtime_checkable
class Runner(Protocol):
    """Something that can be asked for the next logits."""

    def ready(self, tokens: int) -> None:
        """Makes ready for a pass over `tokens` rows, outside the clock."""
        ...

    def reset(self) -> None:
        """Forgets the context."""
        ...

    def step(self, tokens: list[int]) -> None:
        """Runs a pass."""
        ...

    def extra(self) -> dict[str, float]:
        """Returns running totals that only this runner knows."""
        ...


class OurRunner:
    """Our engine, with whatever gate."""

    def __init__(
        self, forward: Forward, gate: Gate | PlainGate, pantry: Pantry | None, worker: SharedMemoryAccelerator | None
    ) -> None:
        self._forward = forward
        self._gate = gate
        self._pantry = pantry
        self._worker = worker

    def ready(self, tokens: int) -> None:
        """Stocks pads."""
        if self._pantry is not None:
            self._pantry.stock(tokens)

    def reset(self) -> None:
        """Empties the cache."""
        self._forward.truncate(0)

    def step(self, tokens: list[int]) -> None:
        """Runs the forward pass."""
        self._forward.run(tokens)

    def extra(self) -> dict[str, float]:
        """Returns the gate's clocks, the worker's CPU time and the bytes that crossed."""
        if not isinstance(self._gate, Gate):
            return {}
        counters = self._gate.counters
        return {
            "blind": counters.blind_seconds,
            "recover": counters.recover_seconds,
            "lent": counters.lent_seconds,
            "bytes": float(counters.bytes_sent + counters.bytes_received),
            "worker_cpu": cpu_seconds_of(self._worker.pid) if self._worker is not None and self._worker.pid else 0.0,
        }


class TransformersRunner:
    """The transformers library in bfloat16, with its own cache."""

    def __init__(self, shape: str) -> None:
        import torch
        import transformers

        self._torch = torch
        torch.set_num_threads(usable_cores())
        if shape == "demo" or Path(shape).is_dir():
            path = demo_model() if shape == "demo" else Path(shape)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        else:
            self._model = self._random(transformers, LLAMA_1_1B if shape == "1.1b" else SMOKE)
        self._model.eval()
        self._cache: Any = None

    def _random(self, transformers: Any, spec: Any) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.ffn_size,
            num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
            max_position_embeddings=spec.max_positions, tie_word_embeddings=False,
        )  # fmt: skip
        default = self._torch.get_default_dtype()
        self._torch.set_default_dtype(self._torch.bfloat16)
        try:
            return transformers.LlamaForCausalLM(config)
        finally:
            self._torch.set_default_dtype(default)

    def ready(self, tokens: int) -> None:
        """Needs nothing."""

    def reset(self) -> None:
        """Drops the cache."""
        self._cache = None

    def step(self, tokens: list[int]) -> None:
        """Runs the model; only the last logits are computed, as ours."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([tokens])
            output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values

    def extra(self) -> dict[str, float]:
        """Returns nothing more."""
        return {}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    prefills: tuple[int, ...]
    tokens: int
    repeats: int


def our_model(shape: str, source: PadSource, team: Team) -> EnclaveModel:
    """Returns the shipped model, a model's folder, or random weights in a stated shape."""
    if shape in ("1.1b", "smoke"):
        return random_model(LLAMA_1_1B if shape == "1.1b" else SMOKE, 1, source, team)
    directory = open_model(demo_model() if shape == "demo" else Path(shape))
    return prepare(directory.checkpoint, directory.spec, BlindingSettings(), source, team=team)


def our_runner(name: str, shape: str, plan: Plan) -> OurRunner:
    """Returns our engine in one of its variants."""
    source, team = PadSource(), Team()
    model = our_model(shape, source, team)
    spec = model.spec
    cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, min(spec.max_positions, 1024))
    if name in ("unprotected int8", "enclave-only int8", "enclave-only int8, 1 thread"):
        plain = PlainGate(model.public_linears, Team(1) if name.endswith("1 thread") else team)
        return OurRunner(Forward(model, plain, cache), plain, None, None)
    lent = name == "blinded"
    budget = sum(linear.pad_bytes for linear in model.public_linears) * (
        max(*plan.prefills, plan.tokens + WARM_UP, 32) + 1
    )
    settings = Settings(
        blinding=BlindingSettings(prefill=Prefill.BLINDED, pantry_bytes=budget),
        accelerator=AcceleratorSettings(timeout_seconds=120.0),
    )
    worker = SharedMemoryAccelerator.start() if lent else None
    if worker is not None:
        for linear in model.public_linears:
            worker.register(linear.weight)
    pantry = Pantry(model.linears, budget if lent else 0, source, team)
    gate = Gate(model.linears, [worker] if worker else [], pantry, settings, team=Team())
    return OurRunner(Forward(model, gate, cache), gate, pantry if lent else None, worker)


def measure(runner: Runner, plan: Plan, vocab: int) -> dict[str, Any]:
    """Returns prefill and decode times, CPU seconds and peak memory of a runner."""
    generator = np.random.default_rng(0)
    result: dict[str, Any] = {}
    for count in plan.prefills:
        prompt = generator.integers(0, vocab, count).tolist()
        result[f"prefill_{count}_s"] = statistics.median(_timed_prefill(runner, prompt) for _ in range(plan.repeats))
    runner.reset()
    runner.ready(CONTEXT)
    runner.step(generator.integers(0, vocab, min(CONTEXT, plan.prefills[-1])).tolist())
    runner.ready(plan.tokens + WARM_UP)
    tokens = generator.integers(0, vocab, plan.tokens + WARM_UP).tolist()
    for token in tokens[:WARM_UP]:
        runner.step([token])
    gc.collect()
    before, cpu, times = runner.extra(), time.process_time(), []
    for token in tokens[WARM_UP:]:
        started = time.perf_counter()
        runner.step([token])
        times.append(time.perf_counter() - started)
    spent = time.process_time() - cpu
    after = runner.extra()
    result |= {
        "tokens_per_s": plan.tokens / sum(times),
        "p50_ms": 1e3 * statistics.median(times),
        "p95_ms": 1e3 * float(np.percentile(times, 95)),
        "cpu_ms_per_token": 1e3 * spent / plan.tokens,
        "peak_memory_mb": peak_memory_bytes() / 1e6,
    }
    if after:
        per_token = {key: (after[key] - before[key]) / plan.tokens for key in after}
        protocol = per_token["blind"] + per_token["recover"]
        result["worker_cpu_ms_per_token"] = 1e3 * per_token["worker_cpu"]
        result["kb_crossing_per_token"] = per_token["bytes"] / 1e3
        result["blind_verify_unblind_ms"] = 1e3 * protocol
        result["blind_verify_unblind_share"] = protocol * plan.tokens / sum(times)
    return result


def _timed_prefill(runner: Runner, prompt: list[int]) -> float:
    runner.reset()
    runner.ready(len(prompt))
    started = time.perf_counter()
    runner.step(prompt)
    return time.perf_counter() - started


def pad_cost(shape: str, batch: int = 32) -> dict[str, float]:
    """Returns the CPU and wall time of making the pads of one token, in batches as the mill makes them."""
    source = PadSource()
    model = our_model(shape, source, Team())
    budget = sum(linear.pad_bytes for linear in model.public_linears) * 3 * batch
    pantry = Pantry(model.linears, budget, source)
    pantry.stock(3 * batch, batch_tokens=batch)
    for index in range(len(model.linears)):  # steady state: used-up memory is used again
        pantry.take(index, batch)
        pantry.take(index, batch)
    wall, cpu = time.perf_counter(), time.process_time()
    pantry.stock(3 * batch, batch_tokens=batch)
    count = 2 * batch
    return {
        "pad_cpu_ms_per_token": 1e3 * (time.process_time() - cpu) / count,
        "pad_wall_ms_per_token": 1e3 * (time.perf_counter() - wall) / count,
        "pad_kb_per_token": pantry.bytes_per_token / 1e3,
    }


def cpu_seconds_of(pid: int) -> float:
    """Returns the CPU time of another process and of those that it started, as bubblewrap does: user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds_of(int(child)) for child in started)


def main(arguments: list[str] | None = None) -> int:
    """Measures one variant and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*OURS, *THEIRS, "pads"])
    parser.add_argument("shape", help="demo, 1.1b, smoke, or the folder of a model")
    parser.add_argument("--prefills", type=int, nargs="*", default=[16, 128, 512])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    plan = Plan(tuple(options.prefills), options.tokens, options.repeats)
    if options.name == "pads":
        print(json.dumps(pad_cost(options.shape)))
        return 0
    make: Callable[[], Runner] = (
        (lambda: TransformersRunner(options.shape))
        if options.name in THEIRS
        else (lambda: our_runner(options.name, options.shape, plan))
    )
    vocab = SMOKE.vocab_size  # every shape knows at least these tokens
    print(json.dumps(measure(make(), plan, vocab)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
