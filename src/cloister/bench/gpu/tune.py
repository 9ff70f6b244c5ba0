"""Measures tile sizes on the GPU at hand and writes a family file with the best for each shape. A tool for who maintains them.

The file holds one entry per shape and number of rows, then the entries that were there before for every other shape.
Candidates that do not fit the GPU, or give a wrong product, are left out.
"""

import dataclasses
import datetime
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from cloister.accelerator.cuda.configurations import (
    DecodeConfiguration,
    Family,
    PrefillConfiguration,
    family_of,
    parse_family,
)
from cloister.accelerator.cuda.products import Products
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.kernels import KernelBench
from cloister.bench.gpu.shapes import MODELS, products
from cloister.bench.gpu.timing import open_device
from cloister.errors import SettingsError

DECODE_ROWS: Final = (4, 16)
PREFILL_ROWS: Final = 1024

Tiles = TypeVar("Tiles", DecodeConfiguration, PrefillConfiguration)


def decode_candidates(smoke: bool) -> list[DecodeConfiguration]:
    """Returns what is tried for few rows: each warp has 32 outputs or more, or it would mostly cut digits."""
    sizes = itertools.product((64, 128, 256), (64, 128, 256), (2, 4, 8), (3, 4, 5), (1, 2, 4, 8, 16))
    made = [
        DecodeConfiguration(block_n=n, block_k=k, warps=warps, stages=stages, per_multiprocessor=1, split_k=split)
        for n, k, warps, stages, split in sizes
        if n // warps >= 32 and n * k * stages <= 2**17
    ]
    return made[:2] if smoke else made


def prefill_candidates(smoke: bool) -> list[PrefillConfiguration]:
    """Returns what is tried for many rows: four accumulators of a tile must fit the registers."""
    sizes = itertools.product((32, 64), (64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (4, 8))
    made = [
        PrefillConfiguration(
            block_r=r, block_n=n, block_k=k, warps=warps, stages=stages, group_r=group, per_multiprocessor=1
        )
        for r, n, k, warps, stages, group in sizes
        if r * n // warps <= 1024
    ]
    return made[:2] if smoke else made


def tune(path: Path, seconds: float, smoke: bool, console: Console) -> Family:
    """Writes the family file at `path` and returns what it holds.

    Raises:
        SettingsError: there is no GPU, or no candidate ran in the time.
    """
    runtime, timer = open_device(smoke)
    budget, before = Budget(seconds), family_of(runtime.capability)
    bench = KernelBench(runtime, timer, repeats=2 if smoke else 7)
    shapes = sorted({(d_out, d_in) for name in _models(smoke) for d_out, d_in, _ in products(MODELS[name]).values()})
    shapes = shapes[:1] if smoke else shapes
    decode: list[DecodeConfiguration] = []
    prefill: list[PrefillConfiguration] = []
    with Progress(console=console) as progress:
        task = progress.add_task("tuning", total=3 * len(shapes))
        for index, (d_out, d_in) in enumerate(shapes):
            share = Budget(budget.left_seconds / (len(shapes) - index))
            for rows in DECODE_ROWS:
                limited = [
                    dataclasses.replace(one, d_out=d_out, d_in=d_in, max_rows=rows) for one in decode_candidates(smoke)
                ]
                part = Budget(share.left_seconds / 2 if rows == DECODE_ROWS[0] else share.left_seconds / 1.5)
                decode += _best(bench, before, limited, rows, part)
                progress.advance(task)
            exact = [dataclasses.replace(one, d_out=d_out, d_in=d_in) for one in prefill_candidates(smoke)]
            prefill += _best(bench, before, exact, 20 if smoke else PREFILL_ROWS, share)
            progress.advance(task)
    if not decode and not prefill:
        raise SettingsError("No candidate was measured in the time.", remedy="Give more with --seconds.")
    provenance = (
        f"Measured on {runtime.name} with torch {torch.__version__}, {datetime.datetime.now(datetime.UTC).date()}, "
        f"by scripts/bench_gpu.py --tune; shapes that are not listed: {before.provenance}"
    )
    capabilities = (runtime.capability,)
    family = Family(
        name=path.stem, capabilities=capabilities, provenance=provenance,
        decode=(*decode, *before.decode), prefill=(*prefill, *before.prefill),
    )  # fmt: skip
    text = as_toml(family)
    parse_family(path.stem, text)  # what is written must be read again
    path.write_text(text, encoding="utf-8")
    return family


def as_toml(family: Family) -> str:
    """Returns the family as the text of its file."""
    lines = [f"capabilities = {[list(pair) for pair in family.capabilities]}", f'provenance = "{family.provenance}"']
    for table, entries in (("decode", family.decode), ("prefill", family.prefill)):
        for entry in entries:
            lines += ["", f"[[{table}]]", *(f"{field} = {value}" for field, value in _set_fields(entry))]
    return "\n".join(lines) + "\n"


def _best(bench: KernelBench, before: Family, candidates: Iterable[Tiles], rows: int, budget: Budget) -> list[Tiles]:
    """Returns the fastest candidate for their shape that gives the same product as the entry before; none if none ran."""
    best: tuple[float, Tiles] | None = None
    for candidate in candidates:
        if best is not None and not budget.has(0):
            break
        if isinstance(candidate, DecodeConfiguration):
            family = dataclasses.replace(before, decode=(candidate,))
        else:
            family = dataclasses.replace(before, prefill=(candidate,))
        tried = Products(bench.products.device, family, bench.products.multiprocessors)
        try:
            if not bench.agree(tried, candidate.d_out, candidate.d_in, rows):
                continue
            seconds = bench.seconds(candidate.d_out, candidate.d_in, rows, tried)
        except Exception:  # noqa: S112  # the compiler and the driver have many ways to say that it does not fit
            continue
        if best is None or seconds < best[0]:
            best = seconds, candidate
    return [best[1]] if best is not None else []


def _models(smoke: bool) -> list[str]:
    return ["smoke"] if smoke else ["llama-2-7b", "llama-3-8b"]


def _set_fields(entry: Any) -> list[tuple[str, int]]:
    """Returns the fields that differ from their defaults."""
    return [
        (field.name, getattr(entry, field.name))
        for field in dataclasses.fields(entry)
        if field.default is dataclasses.MISSING or getattr(entry, field.name) != field.default
    ]
