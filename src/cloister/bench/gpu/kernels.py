"""The product kernels: bytes per second beside a device copy where memory is the limit, operations per second beside
`torch._int_mm` where arithmetic is."""

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

_COPY_BYTES: Final = 2**30
_PEAK_SIDE: Final = 8192


def run(smoke: bool, console: Console, budget: Budget) -> Record:
    """Returns the record of every shape: decode (1, 4, 16 rows) and prefill (512 and 2048 rows)."""
    runtime, timer = open_device(smoke)
    bench = KernelBench(runtime, timer, repeats=2 if smoke else 20)
    facts: dict[str, Any] = device_facts(smoke)
    copy = bench.copy_bytes_per_s(2**16 if smoke else _COPY_BYTES)
    peak = bench.int8_ops_per_s(*(3 * [64 if smoke else _PEAK_SIDE]))
    facts |= {"device copy GB/s": copy / 1e9, "torch._int_mm TOP/s, square": peak / 1e12}
    facts["configurations"] = f"{bench.products.family.name}: {bench.products.family.provenance}"
    rows: list[dict[str, Any]] = []
    models = ["smoke"] if smoke else ["llama-2-7b", "llama-3-8b", "llama-70b"]
    skipped = []
    for model in models:
        for kind, (d_out, d_in, _) in products(MODELS[model]).items():
            name = f"{model} {kind}"
            if not budget.has(5):
                skipped.append(name)
                continue
            console.print(f"{name}: {d_out} x {d_in} ...")
            figures = {count: bench.decode(d_out, d_in, count, copy) for count in (1, 4, 16)}
            figures |= {count: bench.prefill(d_out, d_in, count, peak) for count in ((20,) if smoke else (512, 2048))}
            rows.extend({"product": name, "rows": count, **found} for count, found in figures.items())
    decode = [row["of copy"] for row in rows if row.get("of copy") and row["rows"] == 1]
    prefill = [row["of int8 peak"] for row in rows if row.get("of int8 peak")]
    if decode and prefill:
        facts[f"worst of copy bandwidth, 1 row (bar {DECODE_BAR:g})"] = min(decode)
        facts[f"worst of the int8 peak, prefill (bar {PREFILL_BAR:g})"] = min(prefill)
    facts["skipped: out of time"] = ", ".join(skipped) or "nothing"
    return Record(
        "gpu-kernels-smoke" if smoke else "gpu-kernels",
        rows,
        facts,
        {"repeats": bench.repeats, "cache_multiple": CACHE_MULTIPLE},
        "Medians of CUDA graph replays timed by device events, over weights of several times the second-level cache. "
        "Bytes: weights once, rows in and out. A blinded row is four int8 rows of arithmetic; the int8 rate counts all four.",
    )


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

    def seconds(self, d_out: int, d_in: int, rows: int, tried: Products | None = None) -> float:
        """Returns the time of one product, its weights and rows not in any cache; `tried`: instead of the own products."""
        used = tried or self.products
        copies = 1 + CACHE_MULTIPLE * cache_bytes(self._device) // (d_out * d_in)
        x = self._integers(-HALF, HALF, (rows, d_in), torch.int32)
        weights = [self._weight(d_out, d_in) for _ in range(copies)]
        out = torch.empty((rows, d_out), dtype=torch.int32, device=self._device)
        for weight in weights:
            used.reserve(weight, min(rows, DECODE_ROWS))
        actions = [lambda weight=weight: used.multiply(weight, x, out) for weight in weights]
        return self._timer.seconds(actions, self.repeats)

    def decode(self, d_out: int, d_in: int, rows: int, copy: float) -> dict[str, Any]:
        """Returns the figures of a product that memory limits."""
        seconds = self.seconds(d_out, d_in, rows)
        moved = d_out * d_in + 4 * rows * (d_in + d_out)
        return {"us": 1e6 * seconds, "GB/s": moved / seconds / 1e9, "of copy": moved / seconds / copy}

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
