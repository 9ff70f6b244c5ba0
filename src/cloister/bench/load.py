"""How much memory and time it takes to load a model: a checkpoint of a stated size is written, then quantised.

The checkpoint is made of one random block over and over; loading it takes a process of its own, whose peak is read.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from cloister.arith.team import Team
from cloister.bench.record import Record, peak_memory_bytes
from cloister.blinding.pads import PadSource
from cloister.enclave.prepare import prepare
from cloister.errors import CloisterError
from cloister.model.checkpoint import Checkpoint, check_tensors, expected_tensors
from cloister.model.spec import Family, ModelSpec, RopeKind, RopeSpec
from cloister.settings import BlindingSettings

BLOCK_BYTES: Final = 8 * 2**20
BAR: Final = 1.3


def spec_of(size_bytes: int) -> ModelSpec:
    """Returns a Llama shape whose bfloat16 checkpoint has at least `size_bytes` (and about that many)."""
    hidden = 3072 if size_bytes > 2**31 else 1024
    base = ModelSpec(
        family=Family.LLAMA, vocab_size=32000, hidden_size=hidden, ffn_size=hidden * 8 // 3 // 64 * 64, layers=1,
        heads=hidden // 128, kv_heads=hidden // 512, head_dim=128, norm_epsilon=1e-5, max_positions=2048,
        rope=RopeSpec(RopeKind.DEFAULT, 10000.0, original_positions=2048), windows=(None,), qkv_bias=False, output_bias=False,
        mlp_bias=False, qk_norm=False, tied_embeddings=False,
    )  # fmt: skip
    one, two = base.parameters, dataclasses.replace(base, layers=2, windows=(None,) * 2).parameters
    layers = max(1, -(-(size_bytes // 2 - one) // (two - one)) + 1)
    return dataclasses.replace(base, layers=layers, windows=(None,) * layers)


def write_checkpoint(directory: Path, spec: ModelSpec) -> int:
    """Writes a bfloat16 checkpoint of `spec` with random weights; returns its size in bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in expected_tensors(spec).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    weights = np.random.default_rng(0).normal(0, 0.02, BLOCK_BYTES // 2).astype(np.float32)
    block = (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, offset, BLOCK_BYTES):
            file.write(block[: min(BLOCK_BYTES, offset - start)])
    return offset


def measure(directory: Path, size_bytes: int) -> dict[str, float]:
    """Loads and quantises the checkpoint in this process; returns peak memory beyond the bare program, and seconds."""
    spec = spec_of(size_bytes)
    before = peak_memory_bytes()
    started = time.perf_counter()
    checkpoint = Checkpoint.open(directory)
    check_tensors(checkpoint, spec)
    model = prepare(checkpoint, spec, BlindingSettings(), PadSource(), team=Team())
    seconds = time.perf_counter() - started
    peak = peak_memory_bytes() - before
    return {"quantised_bytes": model.quantized_bytes, "peak_bytes": peak, "seconds": seconds}


def measured_in_a_process(size_bytes: int) -> dict[str, float]:
    """Returns what a fresh process needs to load a checkpoint of `size_bytes`, and the checkpoint's true size."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_checkpoint(Path(folder), spec_of(size_bytes))
        command = [sys.executable, "-m", "cloister.bench.load", folder, str(size_bytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CloisterError(f"Loading failed: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result | {"checkpoint_bytes": written}


def run(gigabytes: float, smoke: bool, console: Console) -> Record:
    """Returns the record for a checkpoint of that many gigabytes (`smoke`: a tenth of one)."""
    size = int((0.1 if smoke else gigabytes) * 1e9)
    console.print(f"writing and loading {size / 1e9:.1f} GB ...")
    result = measured_in_a_process(size)
    ratio = result["peak_bytes"] / result["quantised_bytes"]
    row = {
        "checkpoint GB": result["checkpoint_bytes"] / 1e9,
        "quantised GB": result["quantised_bytes"] / 1e9,
        "peak GB": result["peak_bytes"] / 1e9,
        "seconds": result["seconds"],
    }
    return Record(
        f"load{'-smoke' if smoke else ''}",
        [row],
        {f"peak / quantised (bar {BAR})": ratio},
        {"gigabytes": size / 1e9},
        "Peak is resident memory beyond the bare program; quantised counts int8 weights and the 16-bit embedding table.",
    )


def main() -> int:
    """Measures one load and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("size_bytes", type=int)
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, options.size_bytes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
