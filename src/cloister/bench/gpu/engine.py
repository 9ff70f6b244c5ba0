"""Our engine with a GPU as its accelerator: `python -m cloister.bench.gpu.engine MODEL ...` prints JSON lines.

Weights are random in the stated shape, made once for all variants: blinded (online), the cost of its pads, and the
enclave alone on this host's processor. A batch is measured as that many rows of one sequence: the linear layers have the
same shapes, the attention reads one cache instead of several. The cache holds zeros up to the context: only time is
measured. The enclave's thread watches the ring while it waits, so its CPU time contains the lent time.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from cloister.accelerator.cuda.link import GpuLink
from cloister.arith.team import Team
from cloister.audit.baselines.w8a8 import PlainGate
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.shapes import MODELS
from cloister.bench.gpu.worker import open_link
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import EnclaveModel
from cloister.local.random_model import random_model
from cloister.settings import AcceleratorSettings, BlindingSettings, Prefill, Settings

WARM_UP: Final = 3
PAD_BATCH: Final = 32
ENCLAVE_STEPS: Final = 4

_LEAST_SECONDS: Final = 5.0
"""With less left, nothing more is begun."""


class EngineBench:
    """One model, measured in several ways."""

    def __init__(self, model: str, budget: Budget) -> None:
        self._source, self._team, self._budget = PadSource(), Team(), budget
        self._model: EnclaveModel = random_model(MODELS[model], 1, self._source, self._team)
        self._lent = [linear for linear in self._model.linears if isinstance(linear, LentLinear)]
        self._pad_bytes = sum(linear.pad_bytes for linear in self._lent)

    def blinded(self, link: GpuLink, rows: int, context: int, steps: int) -> dict[str, Any]:
        """Returns the figures of decoding online: the pads were made before."""
        wanted = (steps + WARM_UP) * rows
        pantry = Pantry(self._model.linears, self._pad_bytes * (wanted + PAD_BATCH), self._source, self._team)
        pantry.stock(wanted)
        settings = Settings(
            blinding=BlindingSettings(prefill=Prefill.BLINDED), accelerator=AcceleratorSettings(timeout_seconds=60.0)
        )
        gate = Gate(self._model.linears, [link], pantry, settings, team=self._team)
        step = self._step(gate, rows, context, steps)
        for _ in range(WARM_UP):
            step()
        counters = gate.counters
        before = (counters.blind_seconds, counters.recover_seconds, counters.lent_seconds)
        bytes_before = counters.bytes_sent + counters.bytes_received
        figures = self._timed(step, rows, steps)
        if counters.incidents or counters.enclave_products or counters.pads_made_late:
            raise RuntimeError(f"Not all products were lent under stocked pads: {counters}")
        done = figures["steps"]
        names = ("blind ms/step", "recover ms/step", "lent ms/step")
        after = (counters.blind_seconds, counters.recover_seconds, counters.lent_seconds)
        figures |= {name: 1e3 * (b - a) / done for name, a, b in zip(names, before, after, strict=True)}
        crossed = counters.bytes_sent + counters.bytes_received - bytes_before
        return figures | {"kB over the link/token": crossed / done / rows / 1e3}

    def pads(self) -> dict[str, float]:
        """Returns the wall-clock and processor time of the pads of one token, made in batches."""
        pantry = Pantry(self._model.linears, self._pad_bytes * 4 * PAD_BATCH, self._source, self._team)
        pantry.stock(PAD_BATCH, batch_tokens=PAD_BATCH)
        wall, cpu = time.perf_counter(), time.process_time()
        pantry.stock(2 * PAD_BATCH, batch_tokens=PAD_BATCH)
        return {
            "pad ms/token": 1e3 * (time.perf_counter() - wall) / PAD_BATCH,
            "pad CPU ms/token": 1e3 * (time.process_time() - cpu) / PAD_BATCH,
        }

    def enclave_only(self, kind: str, rows: int, context: int, steps: int) -> dict[str, Any]:
        """Returns the figures of the enclave alone: `exact` as a lent product, or `int8` with 8-bit activations."""
        if kind == "int8":
            gate: Gate | PlainGate = PlainGate(self._lent, self._team)
        else:
            pantry = Pantry(self._model.linears, 0, self._source, self._team)
            gate = Gate(self._model.linears, [], pantry, Settings(), team=self._team)
        step = self._step(gate, rows, context, steps)
        step()
        return self._timed(step, rows, steps)

    def register(self, link: GpuLink) -> None:
        """Makes every weight resident on the GPU."""
        for linear in self._lent:
            link.register(linear.weight)

    def _step(self, gate: Gate | PlainGate, rows: int, context: int, steps: int) -> Callable[[], None]:
        spec = self._model.spec
        most = context + rows * (steps + WARM_UP + 1)
        cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, most)
        forward = Forward(self._model, gate, cache)
        cache.grow(forward._sequence, context)  # there is no need to compute what is there already
        tokens = [1] * rows
        return (lambda: _ignore(forward.run(tokens))) if rows == 1 else (lambda: _ignore(forward.run_all(tokens)))

    def _timed(self, step: Callable[[], None], rows: int, steps: int) -> dict[str, Any]:
        times: list[float] = []
        cpu = time.process_time()
        while len(times) < steps and (not times or self._budget.has(times[-1])):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        spent = time.process_time() - cpu
        return {
            "tokens_per_s": rows * len(times) / sum(times),
            "p50_ms": 1e3 * statistics.median(times),
            "p95_ms": 1e3 * float(np.percentile(times, 95)),
            "enclave CPU ms/token": 1e3 * spent / len(times) / rows,
            "steps": len(times),
        }


def _ignore(_result: object) -> None:
    """Turns a call into an action."""


def run(model: str, batches: list[int], contexts: list[int], steps: int, seconds: float, smoke: bool) -> Iterator[Any]:
    """Yields the figures of every variant as they are measured, one object each; and what was skipped, for want of time.

    The first is what a token's pads cost. What matters most comes first: the smallest batch and context in every variant.
    """
    budget = Budget(seconds)
    bench = EngineBench(model, budget)
    link = open_link(smoke)
    try:
        bench.register(link)
        pads = bench.pads()
        yield {"pads": pads}
        for rows, context in ((rows, context) for rows in batches for context in contexts):
            where = {"batch": rows, "context": context}
            wanted = steps if rows == 1 else max(2, steps // 4)
            pad_seconds = pads["pad ms/token"] * rows * (wanted + WARM_UP) / 1e3
            if budget.has(_LEAST_SECONDS + pad_seconds):
                yield {"result": {"variant": "blinded online", **where, **bench.blinded(link, rows, context, wanted)}}
            else:
                yield {"skipped": f"blinded {where}"}
            for kind in ("int8", "exact"):
                if budget.has(_LEAST_SECONDS):
                    figures = bench.enclave_only(kind, rows, context, min(steps, ENCLAVE_STEPS))
                    yield {"result": {"variant": f"enclave-only {kind}", **where, **figures}}
                else:
                    yield {"skipped": f"enclave-only {kind} {where}"}
        yield {"products over the ring": link.ring_products}
    finally:
        link.close()


def main(arguments: list[str] | None = None) -> int:
    """Measures one model and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=150.0, help="what is not begun by then is skipped")
    options = parser.parse_args(arguments)
    smoke = os.environ.get("TRITON_INTERPRET") == "1"
    for found in run(options.model, options.batches, options.contexts, options.tokens, options.seconds, smoke):
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
