"""How long building candidates takes, by size of the vocabulary, and how long a gateway then takes to read them.

The embedding table is synthetic (clusters of directions, as embeddings have them), so that any size can be measured anywhere.
Classes of 64 are built in whole: classes, one certified table each, the file. For larger classes only a few tables are made;
tables of different classes are independent and take about the same time each, so that the time of all follows, and the
record says that it was projected.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.console import Console
from rich.progress import Progress

from cloister.bench.record import Record, peak_memory_bytes
from cloister.privacy import candidate_file
from cloister.privacy.build import Group, classes, make_table, table_set
from cloister.privacy.candidates import CandidateClass, Candidates, Provenance
from cloister.privacy.mechanism import Kind, Mechanism
from cloister.privacy.vocabulary import Entry

EPSILON = Fraction(2)

SPREAD = 0.8
"""How far words lie from the centre of their cluster, beside a distance between centres of about 1.4."""
TYPES = (("lower", 0.35), ("capitalised", 0.2), ("upper", 0.05), ("inside a word", 0.4))


@dataclass(frozen=True)
class Size:
    """A vocabulary."""

    tokens: int
    hidden: int
    members: int
    sample: int | None = None
    """How many tables to make; None: all of them, and the file."""


SIZES = (Size(32_000, 2048, 64), Size(128_256, 2048, 64), Size(128_256, 2048, 128, sample=3))
SMOKE_SIZES = (Size(400, 16, 16), Size(400, 16, 32, sample=1))


def run(smoke: bool, console: Console) -> Record:
    """Returns the record of all sizes."""
    return Record(
        "candidates",
        [measure(size, console) for size in (SMOKE_SIZES if smoke else SIZES)],
        {
            "largest peak memory of the main process, GB": peak_memory_bytes() / 1e9,
            "load average of the machine": os.getloadavg()[0],
        },
        {"smoke": smoke, "epsilon": float(EPSILON), "mechanism": "channel"},
        "Synthetic embeddings, one process for each core. Where the minutes of all tables are projected, a few tables were timed "
        "in one process.",
    )


def measure(size: Size, console: Console) -> dict[str, Any]:
    """Returns a row: seconds for the classes, minutes for the tables, seconds to write and to read the file."""
    name = f"{size.tokens} tokens, K = {size.members}"
    console.print(name, style="dim")
    vectors = embeddings(size)
    rng = np.random.default_rng(1)
    types = rng.choice([name for name, _ in TYPES], size.tokens, p=[share for _, share in TYPES])
    entries = [Entry(f"w{token}", token, Kind.WORD, (Kind.WORD, str(kind))) for token, kind in enumerate(types)]
    started = time.perf_counter()
    groups = classes(entries, vectors, size.members, lambda *_: None)
    row: dict[str, Any] = {
        "tokens": size.tokens, "hidden": size.hidden, "K": size.members, "classes": len(groups),
        "classes s": time.perf_counter() - started,
    }  # fmt: skip
    row |= _whole(groups, size, console) if size.sample is None else _projected(groups, size.sample)
    return row | {"cores": len(os.sched_getaffinity(0))}


def _whole(groups: list[Group], size: Size, console: Console) -> dict[str, Any]:
    """Makes all tables as `cloister candidates build` does, writes the file and reads it again."""
    started = time.perf_counter()
    with Progress(console=console, transient=True) as bars:
        bar = bars.add_task("tables")
        made = table_set(
            groups,
            Mechanism.CHANNEL,
            EPSILON,
            lambda done, total: bars.update(bar, completed=done, total=total),
        )
    minutes = (time.perf_counter() - started) / 60
    named = tuple(
        CandidateClass(
            Kind.WORD, "", tuple(one.text for one in group.entries), tuple(one.token for one in group.entries)
        )
        for group in groups
    )
    origin = Provenance("synthetic", "0" * 64, "0" * 64, size.tokens, size.members)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidates"
        started = time.perf_counter()
        candidate_file.write(Candidates(origin, named, (made,)), path)
        written = time.perf_counter()
        candidate_file.read(path)
        return {
            "all tables, min": minutes,
            "projected": "no",
            "write s": written - started,
            "read s": time.perf_counter() - written,
            "file MB": path.stat().st_size / 1e6,
        }


def _projected(groups: list[Group], sample: int) -> dict[str, Any]:
    """Makes a few tables and multiplies."""
    spent = []
    for number in np.linspace(0, len(groups) - 1, sample).astype(int):
        before = time.process_time()
        make_table(groups[number].scores, groups[number].prior, Mechanism.CHANNEL, EPSILON)
        spent.append(time.process_time() - before)
    cores = len(os.sched_getaffinity(0))
    return {"all tables, min": statistics.mean(spent) * len(groups) / cores / 60, "projected": "yes"}


def embeddings(size: Size) -> Float32[np.ndarray, "tokens hidden"]:
    """Returns clustered directions."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((size.tokens // 200 + 1, size.hidden), dtype=np.float32)
    vectors = rng.standard_normal((size.tokens, size.hidden), dtype=np.float32)
    vectors *= np.float32(SPREAD)
    vectors += centres[rng.integers(0, len(centres), size.tokens)]
    return vectors
