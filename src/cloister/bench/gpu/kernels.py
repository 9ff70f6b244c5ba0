"""The product kernels: bytes per second beside a device copy where memory is the limit, operations per second beside
`torch._int_mm` where arithmetic is."""

from collections.abc import Callable
from typing import Any, Final

import torch
from rich.console import Console

from cloister.accelerator.cuda.configurations import DECODE_ROWS, family_of
from cloister.accelerator.cuda.products import Products, ResidentWeight
from cloister.accelerator.cuda.runtime import Runtime
from cloister.arith.modulus import HALF
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.shapes import MODELS, products
from cloister.bench.gpu.timing import CACHE_MULTIPLE, Timer, cache_bytes, device_facts, open_device
from cloister.bench.record import Record

DECODE_BAR: Final = 0.70
PREFILL_BAR: Final = 0.60

_NOTE: Final = (
    "Medians of CUDA graph replays timed by device events, over weights of several times the second-level cache. "
    "Bytes: weights once, rows in and out; of a copy, read and written. A blinded row is four int8 rows of arithmetic; the int8 "
    "rate counts all four. At decode the product is timed as a recorded step has it: the kernel that fetches the rows has cut "
    "them into digits ('us, cut before it' adds a launch that does). At prefill the cutting is in the figure."
)

_LEAST_SECONDS: Final = 5.0
"""With less left, no further shape is begun."""

_COPY_BYTES: Final = 2**30
_PEAK_SIDE: Final = 8192


def run(smoke: bool, console: Console, budget: Budget, keep: Callable[[Record], None]) -> Record:
    """Returns the record of every shape: decode (1, 4, 16 rows) and prefill (512 and 2048); `keep` gets it after each shape."""
    runtime, timer = open_device(smoke)
    bench = KernelBench(runtime, timer, repeats=2 if smoke else 20)
    device = device_facts(smoke)
    copy = bench.copy_bytes_per_s(2**16 if smoke else _COPY_BYTES)
    peak = bench.int8_ops_per_s(*(3 * [64 if smoke else _PEAK_SIDE]))
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []

    def so_far() -> Record:
        facts = {**device, "device copy GB/s": copy / 1e9, "torch._int_mm TOP/s, square": peak / 1e12}
        facts["configurations"] = f"{bench.products.family.name}: {bench.products.family.provenance}"
        decode = [row["of copy"] for row in rows if row.get("of copy") and row["rows"] == 1]
        prefill = [row["of int8 peak"] for row in rows if row.get("of int8 peak")]
        if decode and prefill:
            facts[f"worst of copy bandwidth, 1 row (bar {DECODE_BAR:g})"] = min(decode)
            facts[f"worst of the int8 peak, prefill (bar {PREFILL_BAR:g})"] = min(prefill)
        facts["skipped: out of time"] = ", ".join(skipped) or "nothing"
        name = "gpu-kernels-smoke" if smoke else "gpu-kernels"
        return Record(name, list(rows), facts, {"repeats": bench.repeats, "cache_multiple": CACHE_MULTIPLE}, _NOTE)

    for model in ["smoke"] if smoke else ["llama-2-7b", "llama-3-8b", "llama-70b"]:
        for kind, (d_out, d_in, _) in products(MODELS[model]).items():
            name = f"{model} {kind}"
            if not budget.has(_LEAST_SECONDS):
                skipped.append(name)
                continue
            console.print(f"{name}: {d_out} x {d_in} ...")
            figures = {count: bench.decode(d_out, d_in, count, copy) for count in (1, 4, 16)}
            figures |= {count: bench.prefill(d_out, d_in, count, peak) for count in ((20,) if smoke else (512, 2048))}
            rows.extend({"product": name, "rows": count, **found} for count, found in figures.items())
            keep(so_far())
    return so_far()


class KernelBench:
    """Times products of random rows with random weights on one device."""

    def __init__(self, runtime: Runtime, timer: Timer, repeats: int) -> None:
        self.products = Products(runtime.device, family_of(runtime.capability), runtime.multiprocessors)
        self.repeats = repeats
        self._device = runtime.device
        self._timer = timer
        self._generator = torch.Generator(device=runtime.device)
        self._generator.manual_seed(1)

    def copy_bytes_per_s(self, size: int) -> float:
        """Returns the bytes read and written per second by a copy of `size` bytes on the device."""
        source, target = self._integers(-127, 127, (size,), torch.int8), torch.empty(size, dtype=torch.int8)
        target = target.to(self._device)
        return 2 * size / self._timer.seconds([lambda: _ignore(target.copy_(source))], self.repeats)

    def int8_ops_per_s(self, rows: int, d_in: int, d_out: int) -> float:
        """Returns the operations per second (two per multiply-add) of `torch._int_mm`."""
        x = self._integers(-127, 127, (rows, d_in), torch.int8)
        w = self._integers(-127, 127, (d_out, d_in), torch.int8).t()
        out = torch.empty((rows, d_out), dtype=torch.int32, device=self._device)
        seconds = self._timer.seconds([lambda: _ignore(torch._int_mm(x, w, out=out))], self.repeats)
        return 2.0 * rows * d_in * d_out / seconds

    def agree(self, other: Products, d_out: int, d_in: int, rows: int) -> bool:
        """Returns whether `other` gives the same product as this device's own configuration."""
        weight, x = self._weight(d_out, d_in), self._integers(-HALF, HALF, (rows, d_in), torch.int32)
        results = [torch.full((rows, d_out), -(2**31), dtype=torch.int32, device=self._device) for _ in range(2)]
        for one, out in zip((self.products, other), results, strict=True):
            one.multiply(weight, x, out)
        return bool(torch.equal(*results))

    def seconds(self, d_out: int, d_in: int, rows: int, tried: Products | None = None, cut: bool = True) -> float:
        """Returns the time of one product, its weights and rows not in any cache; `tried`: instead of the own products.

        `cut`: whether the cutting into digits is in the figure, where the product takes digits.
        """
        used = tried or self.products
        copies = 1 + CACHE_MULTIPLE * cache_bytes(self._device) // (d_out * d_in)
        x = self._integers(-HALF, HALF, (rows, d_in), torch.int32)
        weights = [self._weight(d_out, d_in) for _ in range(copies)]
        out = torch.empty((rows, d_out), dtype=torch.int32, device=self._device)
        for weight in weights:
            used.reserve(weight, min(rows, DECODE_ROWS))
        if not cut and rows <= DECODE_ROWS and used.takes_digits(weights[0], rows):
            digits, order = used.cut(weights[0], x), torch.tensor([rows, 0], dtype=torch.int32, device=self._device)
            actions = [lambda weight=weight: used.decode(weight, digits, out, order, 0, rows) for weight in weights]
        else:
            actions = [lambda weight=weight: used.multiply(weight, x, out) for weight in weights]
        return self._timer.seconds(actions, self.repeats)

    def decode(self, d_out: int, d_in: int, rows: int, copy: float) -> dict[str, Any]:
        """Returns the figures of a product that memory limits."""
        seconds = self.seconds(d_out, d_in, rows, cut=False)
        moved = d_out * d_in + 4 * rows * (d_in + d_out)
        return {
            "us": 1e6 * seconds,
            "us, cut before it": 1e6 * self.seconds(d_out, d_in, rows),
            "GB/s": moved / seconds / 1e9,
            "of copy": moved / seconds / copy,
        }

    def prefill(self, d_out: int, d_in: int, rows: int, peak: float) -> dict[str, Any]:
        """Returns the figures of a product that arithmetic limits."""
        seconds = self.seconds(d_out, d_in, rows)
        operations = 8.0 * rows * d_in * d_out
        same = self.int8_ops_per_s(4 * rows, d_in, d_out)
        return {
            "us": 1e6 * seconds,
            "TOP/s": operations / seconds / 1e12,
            "of int8 peak": operations / seconds / peak,
            "of _int_mm, same operations": operations / seconds / same,
        }

    def _integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, dtype=dtype, device=self._device, generator=self._generator)

    def _weight(self, d_out: int, d_in: int) -> ResidentWeight:
        stride = -(-d_in // 128) * 128
        matrix = torch.zeros((d_out, stride), dtype=torch.int8, device=self._device)
        matrix[:, :d_in] = self._integers(-127, 127, (d_out, d_in), torch.int8)
        return ResidentWeight(matrix, d_in)


def _ignore(_result: object) -> None:
    """Turns a call into an action."""
