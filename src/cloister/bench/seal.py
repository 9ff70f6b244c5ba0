"""Sealing and loading a sealed package: bytes per second on one core, beside the ceilings of what loading is made of.

Per core means: one thread, pinned to one core, does everything: reads from the page cache, hashes, decrypts, assembles rows.
By the wall it shares that core with whatever else runs (the load average is in the record); processor time leaves that out.
"""

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from rich.console import Console

from cloister.arith.team import usable_cores
from cloister.bench.record import Record
from cloister.model.checkpoint import Checkpoint
from cloister.seal.manifest import DEFAULT_CHUNK_BYTES, Expected
from cloister.seal.package import Package
from cloister.seal.selection import Privacy
from cloister.seal.signing import SigningKey
from cloister.seal.writer import seal_model

BAR_GB_PER_SECOND: Final = 1.0
SHAPE: Final = (32768, 4096)
"""One bfloat16 matrix of 256 MiB; four of them are a gibibyte."""
ROWS: Final = 512
"""Rows read at once: 4 MiB of bfloat16."""
_CHUNKS: Final = 64
"""Chunks per trial of a primitive."""


def run(smoke: bool, console: Console) -> Record:
    """Returns the record; `smoke` uses one small matrix."""
    shape, count, repeats = ((4096, 512), 1, 1) if smoke else (SHAPE, 4, 7)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"load average before": os.getloadavg()[0]}
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        with tempfile.TemporaryDirectory(prefix="cloister-bench-") as folder:
            model = Path(folder) / "model"
            names = _write_model(model, shape, count)
            size = count * shape[0] * shape[1] * 2
            for label, privacy in (("private", Privacy()), ("public", Privacy(tensors=()))):
                console.print(f"{label} ...")
                started = time.perf_counter()
                made = seal_model(
                    model, Path(folder) / label, SigningKey.generate(), name="m", version=1, privacy=privacy
                )
                sealed_seconds = time.perf_counter() - started
                with Package.open(made.folder, Expected(signers="a benchmark", min_version=1)) as package:
                    wall, processor = seconds(partial(_load, package.checkpoint(made.key), names, shape[0]), repeats)
                rows.append(
                    {
                        "weights": label,
                        "load GB/s, wall": size / wall / 1e9,
                        "load GB/s, processor time": size / processor / 1e9,
                        "seal GB/s, wall, with fsync": size / sealed_seconds / 1e9,
                    }
                )
            rows += ceilings(model / "model.safetensors", repeats)
        private = rows[0]
        facts |= {
            f"private: load GB/s per core, {clock} (bar {BAR_GB_PER_SECOND:g})": private[f"load GB/s, {clock}"]
            for clock in ("processor time", "wall")
        }
        facts["load average after"] = os.getloadavg()[0]
    finally:
        os.sched_setaffinity(0, cores)
    return Record(
        "seal-smoke" if smoke else "seal",
        rows,
        facts,
        {"shape": shape, "tensors": count, "chunk_bytes": DEFAULT_CHUNK_BYTES, "repeats": repeats, "cores": 1,
         "cores_of_machine": usable_cores()},
        "One thread on one core, medians. Processor time leaves out what other programs took of that core. The last row is "
        "what loading could reach at most: its three parts one after the other.",
    )  # fmt: skip


def seconds(action: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Returns the median wall time and the median processor time of an action, in seconds, after one run to warm up."""
    action()
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        action()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return statistics.median(walls), statistics.median(processors)


def ceilings(file: Path, repeats: int) -> list[dict[str, Any]]:
    """Returns rows with GB/s of an unprotected read of `file`, of SHA-256 and of AES-256-GCM, in chunks of the format's size."""
    size = min(DEFAULT_CHUNK_BYTES, file.stat().st_size)
    cipher = AESGCM(bytes(32))
    stored = bytearray(cipher.encrypt(bytes(12), bytes(size), b""))
    out = bytearray(size)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        parts: dict[str, Callable[[], object]] = {
            "(unprotected read alone)": lambda: os.preadv(descriptor, [out], 0),
            "(SHA-256 alone)": lambda: hashlib.sha256(stored).digest(),
            "(AES-256-GCM alone)": lambda: cipher.decrypt_into(bytes(12), stored, b"", out),
        }
        taken = {name: seconds(partial(_repeat, part), repeats) for name, part in parts.items()}
    finally:
        os.close(descriptor)
    taken["(all three in turn)"] = (sum(wall for wall, _ in taken.values()), sum(used for _, used in taken.values()))
    return [
        {
            "weights": name,
            "load GB/s, wall": _CHUNKS * size / wall / 1e9,
            "load GB/s, processor time": _CHUNKS * size / processor / 1e9,
        }
        for name, (wall, processor) in taken.items()
    ]


def _repeat(action: Callable[[], object]) -> None:
    for _ in range(_CHUNKS):
        action()


def _load(checkpoint: Checkpoint, names: list[str], rows: int) -> None:
    for name in names:
        for start in range(0, rows, ROWS):
            checkpoint.raw_rows(name, start, min(start + ROWS, rows))


def _write_model(folder: Path, shape: tuple[int, int], count: int) -> list[str]:
    folder.mkdir()
    nbytes = shape[0] * shape[1] * 2
    names = [f"w{number}" for number in range(count)]
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [at * nbytes, (at + 1) * nbytes]}
        for at, name in enumerate(names)
    }
    encoded = json.dumps(header).encode()
    block = np.random.default_rng(0).integers(0, 2**16, shape, dtype=np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _ in names:
            file.write(block)
    return names
