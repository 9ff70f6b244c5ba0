"""Is the GPU right? Fresh random inputs, poisoned outputs, bit for bit against the CPU: `python -m cloister.bench.gpu.checks`.

Prints one JSON object; exits with 1 if anything differs. `--kernels-only` is small enough to run under compute-sanitizer.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from cloister.accelerator.api import Accelerator
from cloister.accelerator.cuda.configurations import family_of
from cloister.accelerator.cuda.products import Products, resident
from cloister.accelerator.cuda.runtime import Runtime
from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.arith.modulus import HALF
from cloister.arith.product import modular_product
from cloister.arith.team import Team
from cloister.assets import demo_model
from cloister.bench.gpu.timing import open_device
from cloister.bench.gpu.worker import open_link
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import EnclaveModel, prepare
from cloister.model.directory import open_model
from cloister.settings import BlindingSettings, Prefill, Settings

POISON: Final = -(2**31)
"""Not an element of the field: an output that was not written is seen."""

SMALL_SHAPES: Final = ((24, 40), (130, 257), (256, 384))
LARGE_SHAPES: Final = ((4096, 4096), (12288, 4096), (4096, 14336), (1000, 11008))
SANITIZERS: Final = ("memcheck", "racecheck")
"""Accesses outside of what was allocated; races between threads in shared memory."""

_LEAST_SECONDS: Final = 20.0
"""Less is not enough to import PyTorch under the sanitizer."""

ROWS: Final = (1, 3, 4, 5, 16, 17, 64, 512)

PROMPT: Final = "Once upon a time, there was a kind fox named Mia, and she was brave."


def check_products(runtime: Runtime, shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> Iterator[str]:
    """Yields a line for every product that differs from the CPU's."""
    rng = np.random.default_rng()  # fresh inputs each time: the kernel must be right for any
    products = Products(runtime.device, family_of(runtime.capability), runtime.multiprocessors)
    with Team() as team:
        for d_out, d_in in shapes:
            for kind in ("random", "all -127"):
                low, high = (-127, 127) if kind == "random" else (-127, -127)
                matrix = rng.integers(low, high + 1, (d_out, d_in), dtype=np.int8)
                weight = resident(matrix, runtime.device)
                for count in rows:
                    x = rng.integers(-HALF, HALF + 1, (count, d_in), dtype=np.int32)
                    x[0] = rng.choice([HALF, -HALF, 0x7F7F7F, -0x808080], d_in)
                    out = torch.full((count, d_out), POISON, dtype=torch.int32, device=runtime.device)
                    products.multiply(weight, torch.from_numpy(x).to(runtime.device), out)
                    runtime.synchronise()
                    expected = np.empty((count, d_out), np.int32)
                    modular_product(matrix, x, expected, team)
                    wrong = int((out.cpu().numpy() != expected).sum())
                    if wrong:
                        yield f"{count} rows of {d_out} x {d_in}, {kind} weights: {wrong} elements differ"


def check_model(link: Accelerator, model: str, steps: int) -> Iterator[str]:
    """Yields a line for every pass through a real model whose logits differ from the CPU worker's."""
    directory = open_model(demo_model() if model == "demo" else Path(model))
    prepared = prepare(directory.checkpoint, directory.spec, BlindingSettings(), PadSource())
    tokens = directory.tokenizer.encode(PROMPT)
    ours = _logits(prepared, link, tokens, steps)
    theirs = _logits(prepared, InProcessAccelerator(), tokens, steps)
    for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        if not np.array_equal(left, right):
            yield f"pass {index} of {model}: {int((left != right).sum())} logits differ"


def _logits(model: EnclaveModel, accelerator: Accelerator, tokens: list[int], steps: int) -> list[np.ndarray]:
    for linear in model.linears:
        if isinstance(linear, LentLinear):
            accelerator.register(linear.weight)
    pantry = Pantry(model.linears, 2**28, PadSource())
    gate = Gate(model.linears, [accelerator], pantry, Settings(blinding=BlindingSettings(prefill=Prefill.BLINDED)))
    spec = model.spec
    forward = Forward(model, gate, PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, 256))
    return [forward.run(tokens), *(forward.run([token]) for token in tokens[:steps])]


def sanitizer(tool: str, seconds: float) -> str:
    """Returns what one tool of compute-sanitizer found in the kernels: clean, its last lines, or why it did not run."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: compute-sanitizer is not installed"
    if seconds < _LEAST_SECONDS:
        return "not run: out of time"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", __name__, "--kernels-only"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    return "clean" if done.returncode == 0 else " | ".join((done.stdout + done.stderr).strip().splitlines()[-5:])


def run(smoke: bool, model: str = "demo", steps: int = 8, kernels_only: bool = False) -> dict[str, Any]:
    """Returns what was checked and every difference that was found."""
    runtime, _ = open_device(smoke)
    rows = (1, 17) if smoke else ROWS[:6] if kernels_only else ROWS
    shapes = SMALL_SHAPES if smoke or kernels_only else SMALL_SHAPES + LARGE_SHAPES
    differences = list(check_products(runtime, shapes, rows))
    result: dict[str, Any] = {"products checked": 2 * len(shapes) * len(rows), "differences": differences}
    if not kernels_only:
        link = open_link(smoke)
        try:
            differences.extend(check_model(link, model, 1 if smoke else steps))
        finally:
            link.close()
        result |= {"whole model": model, "products over the ring": link.ring_products, "worker": link.name}
    return result


def main(arguments: list[str] | None = None) -> int:
    """Checks, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels-only", action="store_true", help="small shapes, no worker process")
    parser.add_argument("--model", default="demo", help="demo, or the folder of a model")
    options = parser.parse_args(arguments)
    result = run(os.environ.get("TRITON_INTERPRET") == "1", options.model, kernels_only=options.kernels_only)
    print(json.dumps(result))
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
