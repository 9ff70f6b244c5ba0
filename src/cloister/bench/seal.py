"""Sealing and loading a sealed package: bytes per second on one core, beside the ceiling of its two primitives."""

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
from cloister.bench.products import median
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


def run(smoke: bool, console: Console) -> Record:
    """Returns the record; `smoke` uses one small matrix."""
    shape, count, repeats = ((1024, 512), 1, 1) if smoke else (SHAPE, 4, 3)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
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
                    checkpoint = package.checkpoint(made.key)

                    load = partial(_load, checkpoint, names, shape[0])
                    seconds = median(load, repeats)
                    busy = processor_seconds(load, repeats)
                rows.append(
                    {
                        "weights": label,
                        "seal GB/s": size / sealed_seconds / 1e9,
                        "load GB/s": size / seconds / 1e9,
                        "load GB per processor second": size / busy / 1e9,
                    }
                )
                facts[f"{label}: load GB per processor second (bar {BAR_GB_PER_SECOND:g})"] = size / busy / 1e9
        facts |= primitives(repeats)
    finally:
        os.sched_setaffinity(0, cores)
    return Record(
        "seal-smoke" if smoke else "seal",
        rows,
        facts,
        {"shape": shape, "tensors": count, "chunk_bytes": DEFAULT_CHUNK_BYTES, "repeats": repeats, "cores": 1,
         "cores_of_machine": usable_cores()},
        "One core; processor seconds leave out what other programs took. Loading reads from the page cache, hashes, "
        "decrypts and assembles rows; sealing includes fsync.",
    )  # fmt: skip


def processor_seconds(action: Callable[[], object], repeats: int) -> float:
    """Returns the median processor time of an action, in seconds: what other programs on the machine do not change much."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return statistics.median(times)


def primitives(repeats: int) -> dict[str, float]:
    """Returns GB/s of SHA-256 and of AES-256-GCM alone, on chunks of the format's size."""
    chunk = bytes(DEFAULT_CHUNK_BYTES)
    cipher = AESGCM(bytes(32))
    stored = cipher.encrypt(bytes(12), chunk, b"")
    out = bytearray(len(chunk))
    hashing = processor_seconds(lambda: [hashlib.sha256(chunk).digest() for _ in range(64)], repeats) / 64
    opening = (
        processor_seconds(lambda: [cipher.decrypt_into(bytes(12), stored, b"", out) for _ in range(64)], repeats) / 64
    )
    return {"SHA-256 alone GB/s": len(chunk) / hashing / 1e9, "AES-256-GCM alone GB/s": len(chunk) / opening / 1e9}


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
