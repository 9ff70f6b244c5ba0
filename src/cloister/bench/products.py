"""The accelerator's int8 product: bytes and operations per second of each installed backend, beside the ceiling."""

import statistics
import time
from typing import Any, Final

import numpy as np
from rich.console import Console

from cloister.accelerator.cpu import MULTIPLIERS, Multiplier, installed_backends
from cloister.arith.modulus import HALF
from cloister.arith.product import int8_product
from cloister.arith.team import Team, usable_cores
from cloister.bench.record import Record

STREAM_SHAPE: Final = (32768, 8192)
"""256 MiB of weights: far larger than any cache, so that a few rows measure memory."""
BATCH_SHAPE: Final = (5632, 2048)


def run(smoke: bool, console: Console) -> Record:
    """Returns the record; `smoke` uses small shapes."""
    stream = (2048, 2048) if smoke else STREAM_SHAPE
    batch = (512, 512) if smoke else BATCH_SHAPE
    repeats = 2 if smoke else 7
    generator = np.random.default_rng(0)
    big = generator.integers(-127, 128, stream, dtype=np.int8)
    small = generator.integers(-127, 128, batch, dtype=np.int8)
    ceiling = read_bandwidth(big, repeats)
    rows: list[dict[str, Any]] = []
    for backend in installed_backends():
        multiplier = MULTIPLIERS[backend](usable_cores())
        console.print(f"{multiplier.name} ...")
        row: dict[str, Any] = {"product": f"blinded, {multiplier.name}"}
        for tokens in (1, 4):
            row[f"{tokens} row GB/s"] = big.nbytes / seconds(multiplier, big, tokens, repeats) / 1e9
        for tokens in (32, 512):
            operations = 4 * tokens * small.size
            row[f"{tokens} rows GMAC/s"] = operations / seconds(multiplier, small, tokens, repeats) / 1e9
        rows.append(row)
    with Team() as team:
        x = generator.integers(-127, 128, (1, stream[1]), dtype=np.int8)
        out = np.empty((1, stream[0]), np.int32)
        plain = median(lambda: int8_product(big, x, out, team), repeats)
    rows.append({"product": "unprotected int8, numba", "1 row GB/s": big.nbytes / plain / 1e9})
    return Record(
        "products-smoke" if smoke else "products",
        rows,
        {"read bandwidth GB/s (ceiling of 1 row)": ceiling},
        {"stream_shape": stream, "batch_shape": batch, "repeats": repeats, "threads": usable_cores()},
        "A blinded row costs four int8 rows of arithmetic and reads the weights once. Medians.",
    )


def read_bandwidth(block: np.ndarray, repeats: int) -> float:
    """Returns GB/s of summing a block of memory, on all cores: what no product of one row can exceed."""
    words = block.reshape(-1).view(np.int64)
    with Team() as team:
        return block.nbytes / median(lambda: team.run(lambda a, b: _sum(words[a:b]), words.size), repeats) / 1e9


def _sum(words: np.ndarray) -> None:
    words.sum()


def seconds(multiplier: Multiplier, matrix: np.ndarray, tokens: int, repeats: int) -> float:
    """Returns the median time of one product of random rows."""
    weight = multiplier.prepare(matrix)
    rows = np.random.default_rng(1).integers(-HALF, HALF + 1, (tokens, matrix.shape[1]), dtype=np.int32)
    out = np.empty((tokens, matrix.shape[0]), np.int32)
    return median(lambda: multiplier.multiply(weight, rows, out), repeats)


def median(action: Any, repeats: int) -> float:
    """Returns the median time of an action, in seconds, after one run to warm up."""
    action()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
