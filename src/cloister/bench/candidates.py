"""How long building candidates takes, by size of the vocabulary: classes in full, tables by a sample of them.

The table is synthetic (clusters of directions, as embeddings have them), so that any size can be measured anywhere. Tables of
different classes are independent and take the same time each, so that the time of all follows from a sample; the record says
what was measured and what was projected.
"""

import os
import statistics
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.console import Console

from cloister.bench.record import Record, peak_memory_bytes
from cloister.privacy.build import classes, make_table
from cloister.privacy.mechanism import Kind, Mechanism
from cloister.privacy.vocabulary import Entry

SPREAD = 0.8
"""How far words lie from the centre of their cluster, beside a distance between centres of about 1.4."""
TYPES = (("lower", 0.35), ("capitalised", 0.2), ("upper", 0.05), ("inside a word", 0.4))


@dataclass(frozen=True)
class Size:
    """A vocabulary."""

    tokens: int
    hidden: int
    members: int


SIZES = (Size(32_000, 2048, 64), Size(128_256, 2048, 64), Size(128_256, 2048, 128))
SMOKE_SIZES = (Size(2_000, 64, 16),)


def run(smoke: bool, console: Console) -> Record:
    """Returns the record of all sizes."""
    rows = []
    for size in SMOKE_SIZES if smoke else SIZES:
        console.print(f"{size.tokens} tokens, K = {size.members}", style="dim")
        rows.append(measure(size, 3))
    return Record(
        "candidates",
        rows,
        {"largest peak memory GB": peak_memory_bytes() / 1e9},
        {"smoke": smoke, "epsilon": 2, "mechanism": "channel"},
        "Synthetic embeddings. Classes are built in full; tables are timed on a few classes by CPU seconds, and the minutes on "
        "2 cores are projected from them.",
    )


def measure(size: Size, sample: int) -> dict[str, Any]:
    """Returns a row: seconds for the classes, CPU seconds for a table, minutes for all."""
    vectors = embeddings(size)
    rng = np.random.default_rng(1)
    types = rng.choice([name for name, _ in TYPES], size.tokens, p=[share for _, share in TYPES])
    entries = [Entry(f"w{token}", token, Kind.WORD, (Kind.WORD, str(kind))) for token, kind in enumerate(types)]
    started, cpu = time.perf_counter(), time.process_time()
    groups = classes(entries, vectors, size.members, lambda *_: None)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    spent = []
    for number in np.linspace(0, len(groups) - 1, sample).astype(int):
        before = time.process_time()
        make_table(groups[number].scores, groups[number].prior, Mechanism.CHANNEL, Fraction(2))
        spent.append(time.process_time() - before)
    table = statistics.mean(spent)
    return {
        "tokens": size.tokens,
        "hidden": size.hidden,
        "K": size.members,
        "classes": len(groups),
        "classes s": wall,
        "classes CPU s": cpu,
        "table CPU s": table,
        "all tables, min on 2 cores": table * len(groups) / 2 / 60,
        "cores here": len(os.sched_getaffinity(0)),
    }


def embeddings(size: Size) -> Float32[np.ndarray, "tokens hidden"]:
    """Returns clustered directions."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((size.tokens // 200 + 1, size.hidden), dtype=np.float32)
    vectors = rng.standard_normal((size.tokens, size.hidden), dtype=np.float32)
    vectors *= np.float32(SPREAD)
    vectors += centres[rng.integers(0, len(centres), size.tokens)]
    return vectors
