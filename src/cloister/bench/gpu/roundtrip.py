"""The link: how long a product takes from the enclave's call to the restored row, beside a product of almost nothing."""

import statistics
import time
from typing import Any, Final

import numpy as np
from rich.console import Console

from cloister.accelerator.cuda.link import GpuLink
from cloister.arith.modulus import HALF
from cloister.arith.team import Team
from cloister.bench.gpu.timing import CACHE_MULTIPLE, cache_bytes, device_facts, open_device
from cloister.bench.gpu.worker import open_link
from cloister.bench.record import Record
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.outsource import Gate
from cloister.local.random_model import random_linear
from cloister.settings import AcceleratorSettings, BlindingSettings, Prefill, Settings
from cloister.wire.codec import received_rows

BAR_US: Final = 25.0
EMPTY: Final = (16, 16)
SIDE: Final = 4096


def run(smoke: bool, console: Console) -> Record:
    """Returns the record: an empty product and one of 4096 x 4096, over the ring and over the socket; then the gate."""
    side, count = (64, 3) if smoke else (SIDE, 200)
    runtime, _ = open_device(smoke)
    copies = (
        2 + CACHE_MULTIPLE * cache_bytes(runtime.device) // side**2
    )  # no weight is in a cache when its turn comes again
    source, generator = PadSource(), np.random.default_rng(0)
    with Team() as team:
        linears = [random_linear("empty", EMPTY, 1, source, team, generator)]
        linears += [random_linear("full", (side, side), 1, source, team, generator) for _ in range(copies)]
    link = open_link(smoke)
    try:
        for linear in linears:
            link.register(linear.weight)
        console.print("products over the ring ...")
        empty, *full = over_the_ring(link, linears, count)
        rows = [
            {"what": "empty product, 1 row, ring", **_spread(empty)},
            {"what": f"{side} x {side}, 1 row, ring", **_spread([us for times in full for us in times])},
        ]
        console.print("the gate ...")
        gate_us = [1e6 * seconds for seconds in through_the_gate(link, linears, source, count)]
        rows.append({"what": f"outsource call to restored row, {side} x {side}, 1 row", **_spread(gate_us)})
        console.print("products over the socket ...")
        socket_us = over_the_socket(link, linears[0], count)
        rows.append({"what": "empty product, 17 rows, socket", **_spread(socket_us)})
    finally:
        link.close()
    facts: dict[str, Any] = {
        f"outsource call to restored row, median us (bar {BAR_US:g})": statistics.median(gate_us),
        **device_facts(smoke),
    }
    return Record(
        "gpu-roundtrip-smoke" if smoke else "gpu-roundtrip",
        rows,
        facts,
        {"side": side, "count": count, "weights": copies},
        "Wall-clock microseconds on the enclave's thread. The worker is a process of its own on the same host; rows and "
        "answers lie in memory that the GPU reads and writes itself. The weights take turns, so none is in a cache by chance.",
    )


def over_the_ring(link: GpuLink, linears: list[LentLinear], count: int) -> list[list[float]]:
    """Returns the microseconds of `count` one-row products of each linear, in turn, as a decode step has them."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(-HALF, HALF + 1, linear.d_in, dtype=np.int32) for linear in linears]
    blinded = [received_rows(words, 1, words.size) for words in rows]
    times: list[list[float]] = [[] for _ in linears]
    for turn in range(count + count // 10 + 1):
        for index, linear in enumerate(linears):
            started = time.perf_counter()
            link.multiply(linear.weight.weight_id, blinded[index], 60.0)
            if turn > count // 10:
                times[index].append(1e6 * (time.perf_counter() - started))
    return times


def over_the_socket(link: GpuLink, linear: LentLinear, count: int) -> list[float]:
    """Returns the microseconds of products of 17 rows, which go over the worker's socket while the ring pauses."""
    words = np.zeros(17 * linear.d_in, np.int32)
    blinded = received_rows(words, 17, linear.d_in)
    times = []
    for _ in range(max(2, count // 20)):
        started = time.perf_counter()
        link.multiply(linear.weight.weight_id, blinded, 60.0)
        times.append(1e6 * (time.perf_counter() - started))
    return times[1:]


def through_the_gate(link: GpuLink, linears: list[LentLinear], source: PadSource, count: int) -> list[float]:
    """Returns the seconds of the larger linears through the gate: pad taken, blinded, multiplied, checked, recovered."""
    pantry = Pantry(linears, (count + 64) * sum(linear.pad_bytes for linear in linears), source)
    settings = Settings(
        blinding=BlindingSettings(prefill=Prefill.BLINDED), accelerator=AcceleratorSettings(timeout_seconds=60.0)
    )
    gate = Gate(linears, [link], pantry, settings)
    rng = np.random.default_rng(2)
    inputs = [rng.standard_normal((1, linear.d_in), np.float32) for linear in linears]
    outputs = [np.empty((1, linear.d_out), np.float32) for linear in linears]
    pantry.stock(count + 1)
    times = []
    for turn in range(count):
        for index in range(len(linears)):
            started = time.perf_counter()
            gate.linear(index, inputs[index], outputs[index])
            if turn and index:
                times.append(time.perf_counter() - started)
    return times


def _spread(microseconds: list[float]) -> dict[str, float]:
    return {
        "median us": statistics.median(microseconds),
        "p95 us": float(np.percentile(microseconds, 95)),
        "least us": min(microseconds),
    }
