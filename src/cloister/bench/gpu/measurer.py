"""Tries tile sizes in a process of its own: `python -m cloister.bench.gpu.measurer` reads JSON lines and answers each with one.

A candidate that does not compile, does not fit or gives a wrong product is answered with the reason. One that hangs or takes the
driver down costs this process, not the tuning: `tune` ends it and starts another.
"""

import dataclasses
import json
import os
import sys
from typing import Any, Final

import numpy as np
import torch

from cloister.accelerator.cuda.configurations import DECODE_ROWS, DecodeConfiguration, PrefillConfiguration, family_of
from cloister.accelerator.cuda.products import Products, resident
from cloister.arith.modulus import HALF
from cloister.arith.product import modular_product
from cloister.bench.gpu.kernels import KernelBench
from cloister.bench.gpu.tiles import Tiles
from cloister.bench.gpu.timing import cache_bytes, open_device

REPEATS: Final = 7

_POISON: Final = -(2**31)


class Measurer:
    """The GPU at hand, and what it measures."""

    def __init__(self, smoke: bool) -> None:
        self._runtime, timer = open_device(smoke)
        self._bench = KernelBench(self._runtime, timer, repeats=2 if smoke else REPEATS)
        self._before = family_of(self._runtime.capability)

    def works(self) -> bool:
        """Returns whether the device still does anything: after some errors the driver refuses a process for good."""
        try:
            self._runtime.synchronise()
        except RuntimeError:
            return False
        return True

    def facts(self) -> dict[str, Any]:
        """Returns what `tune` must know of the device."""
        return {
            "name": self._runtime.name,
            "capability": list(self._runtime.capability),
            "multiprocessors": self._runtime.multiprocessors,
            "cache_bytes": cache_bytes(self._runtime.device),
            "torch": torch.__version__,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns `{"us": ...}`, or `{"error": ...}`. A request with `time` false only compiles and checks, on a small weight."""
        kind = DecodeConfiguration if request["decode"] else PrefillConfiguration
        one: Tiles = kind(**request["tiles"])
        if isinstance(one, DecodeConfiguration):
            family = dataclasses.replace(self._before, decode=(one,))
        else:
            family = dataclasses.replace(self._before, prefill=(one,))
        tried = Products(self._runtime.device, family, self._runtime.multiprocessors)
        d_out, d_in, rows = request["d_out"], request["d_in"], request["rows"]
        if not request["time"]:
            return self._checked(tried, one)
        if not self._bench.agree(tried, d_out, d_in, rows):
            return {"error": "wrong product"}
        return {"us": 1e6 * self._bench.seconds(d_out, d_in, rows, tried, cut=rows > DECODE_ROWS)}

    def _checked(self, tried: Products, one: Tiles) -> dict[str, Any]:
        """Compares with the CPU: every element, ragged in every direction and even, with extreme digits."""
        rng = np.random.default_rng()
        decode = isinstance(one, DecodeConfiguration)
        counts = (1, one.max_rows) if isinstance(one, DecodeConfiguration) else (one.block_r + 1,)
        split = one.split_k or 1 if isinstance(one, DecodeConfiguration) else 1
        for d_out, d_in in ((one.block_n + 7, one.block_k * split + 40), (2 * one.block_n, 2 * one.block_k * split)):
            matrix = rng.integers(-127, 128, (d_out, d_in), dtype=np.int8)
            weight = resident(matrix, self._runtime.device)
            for rows in counts:
                count = max(rows, 1 if decode else DECODE_ROWS + 1)
                x = rng.integers(-HALF, HALF + 1, (count, d_in), dtype=np.int32)
                x[0] = rng.choice([HALF, -HALF, 0x7F7F7F, -0x808080], d_in)
                out = torch.full((count, d_out), _POISON, dtype=torch.int32, device=self._runtime.device)
                tried.multiply(weight, torch.from_numpy(x).to(self._runtime.device), out)
                self._runtime.synchronise()
                expected = np.empty((count, d_out), np.int32)
                modular_product(matrix, x, expected)
                if not np.array_equal(out.cpu().numpy(), expected):
                    return {"error": "wrong product"}
        return {"us": 0.0}


def main() -> int:
    """Answers until the input ends."""
    measurer = Measurer(os.environ.get("TRITON_INTERPRET") == "1")
    print(json.dumps(measurer.facts()), flush=True)
    for line in sys.stdin:
        try:
            answer = measurer.answer(json.loads(line))
        except Exception as error:  # the compiler and the driver have many ways to say that it does not fit
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), flush=True)
        if "error" in answer and not measurer.works():
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
