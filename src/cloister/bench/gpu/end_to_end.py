"""Whole models in the shapes of Llama-2-7B and Llama-3-8B, random weights: every variant in its own process, side by side."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Final

from rich.console import Console

from cloister.bench.gpu.baselines import KINDS
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.shapes import MODELS, products
from cloister.bench.gpu.timing import device_facts
from cloister.bench.record import Record

BASELINES: Final = {
    "transformers": "transformers bf16, eager",
    "bf16": "unprotected bf16, CUDA graph",
    "int8": "unprotected int8, CUDA graph",
}

LATENCY_BAR: Final = 1.5
ENCLAVE_BAR: Final = 10.0

_NOTE: Final = (
    "Decode; random weights. Blinded: the enclave is a software stand-in on this host's processor, a batch is rows of one "
    "sequence, and its CPU time contains the wait for the GPU, which it spends watching the ring. 'Kernel' is the sum of "
    "the products as measured alone, 'link' the rest of the lent time, 'enclave' the rest of the step."
)

_LEAST_SECONDS: Final = 10.0
"""With less, no child is started."""

_ENGINE_SECONDS: Final = 240.0
_ENGINE_SHARE: Final = 0.65
"""Most of a model's time that our engine may take; the rest is for what it is compared with."""

_BASELINE_SECONDS: Final = 90.0
_MARGIN_SECONDS: Final = 20.0
"""Kept for writing records and the plot."""


def run(
    smoke: bool, console: Console, budget: Budget, kernels: Record | None, keep: Callable[[Record], None]
) -> Record:
    """Returns the record; `keep` gets it as far as it is, after every child. What does not fit the budget is named as skipped.

    `kernels` tells how long the products take.
    """
    models = ["smoke"] if smoke else ["llama-3-8b", "llama-2-7b"]
    batches, contexts, tokens = ([1, 16], [16], 2) if smoke else ([1, 16], [128, 2048], 32)
    arguments = [*_list("--batches", batches), *_list("--contexts", contexts), "--tokens", str(tokens)]
    device = device_facts(smoke)
    found: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
    skipped: list[str] = []

    def so_far() -> Record:
        rows = [{"model": model, **figures} for model in models for figures in found[model]]
        facts = dict(device)
        for model in models:
            facts |= ratios(model, found[model])
        facts["skipped"] = "; ".join(skipped) or "nothing"
        return Record(
            "gpu-end-to-end-smoke" if smoke else "gpu-end-to-end",
            rows,
            facts,
            {"batches": batches, "contexts": contexts, "tokens": tokens, "models": models},
            _NOTE,
        )

    for index, model in enumerate(models):
        share = Budget((budget.left_seconds - _MARGIN_SECONDS) / (len(models) - index))
        console.print(f"{model}: blinded, pads, enclave-only ...")
        limit = min(_ENGINE_SECONDS, share.left_seconds * _ENGINE_SHARE)
        # What the child does not begin within two thirds of its time it skips; the rest is for what it has begun.
        lines, why = child("engine", [model, *arguments, "--seconds", str(limit * 2 / 3)], limit)
        found[model] += of_engine(lines, model, kernels)
        skipped += [f"{model}, {line['skipped']}" for line in lines if "skipped" in line]
        skipped += [f"{model}, our engine: {why}"] if why else []
        keep(so_far())
        for kind in KINDS:
            console.print(f"{model}: {BASELINES[kind]} ...")
            lines, why = child("baselines", [kind, model, *arguments], min(_BASELINE_SECONDS, share.left_seconds))
            found[model] += [{"variant": BASELINES[kind], **line["result"]} for line in lines]
            skipped += [f"{model}, {BASELINES[kind]}: {why}"] if why else []
            keep(so_far())
    return so_far()


def of_engine(lines: list[dict[str, Any]], model: str, kernels: Record | None) -> list[dict[str, Any]]:
    """Returns the figures in the lines of an engine: with pads as well where it got so far, and where the time of a step goes."""
    results = [line["result"] for line in lines if "result" in line]
    pads = next((line["pads"] for line in lines if "pads" in line), None)
    found = with_pads(results, pads) if pads else results
    for figures in found:
        if figures["variant"] == "blinded online":
            figures |= where_time_goes(figures, model, kernels)
    return found


def with_pads(results: list[dict[str, Any]], pads: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the results and, for each blinded one, what it is when each token's pads are made just before it."""
    joined = list(results)
    for one in results:
        if one["variant"] == "blinded online":
            extra = pads["pad ms/token"] * one["batch"]
            joined.append(
                {
                    "variant": "blinded, pads included",
                    "batch": one["batch"],
                    "context": one["context"],
                    "tokens_per_s": 1e3 * one["batch"] / (1e3 * one["batch"] / one["tokens_per_s"] + extra),
                    "p50_ms": one["p50_ms"] + extra,
                    "p95_ms": one["p95_ms"] + extra,
                    "enclave CPU ms/token": one["enclave CPU ms/token"] + pads["pad CPU ms/token"],
                }
            )
    return joined


def where_time_goes(figures: dict[str, Any], model: str, kernels: Record | None) -> dict[str, float]:
    """Returns the parts of a blinded step in milliseconds: enclave, link and kernel (with `kernels` for this batch)."""
    step = 1e3 * figures["batch"] / figures["tokens_per_s"]
    lent = figures["lent ms/step"]
    kernel = None if kernels is None else kernel_ms(model, figures["batch"], kernels)
    if kernel is None:
        return {"enclave ms": step - lent, "link and kernel ms": lent}
    return {"enclave ms": step - lent, "link ms": max(0.0, lent - kernel), "kernel ms": kernel}


def kernel_ms(model: str, rows: int, kernels: Record) -> float | None:
    """Returns the time of all products of one step as measured alone; None if one of them was not measured."""
    measured = {(row["product"], row["rows"]): row["us"] for row in kernels.rows}
    total = 0.0
    for kind, (_, _, count) in products(MODELS[model]).items():
        us = measured.get((f"{model} {kind}", rows))
        if us is None:
            return None
        total += count * us / 1e3
    return total


def ratios(model: str, found: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the figures that the bars are about, for each batch and context that has them."""
    facts: dict[str, float] = {}
    by = {(one["variant"], one["batch"], one["context"]): one for one in found}
    for (variant, batch, context), one in by.items():
        if variant != "blinded online":
            continue
        where = f"{model}, batch {batch}, context {context}"
        graph = by.get((BASELINES["bf16"], batch, context))
        if graph:
            name = f"{where}: blinded / unprotected bf16 with CUDA graphs, p50 (bar {LATENCY_BAR:g})"
            facts[name] = one["p50_ms"] / graph["p50_ms"]
        alone = [by[key] for key in by if key[0].startswith("enclave-only") and key[1:] == (batch, context)]
        if alone:
            fastest = max(enclave["tokens_per_s"] for enclave in alone)
            name = f"{where}: blinded / fastest enclave-only, tokens/s (bar {ENCLAVE_BAR:g})"
            facts[name] = one["tokens_per_s"] / fastest
    return facts


def child(module: str, arguments: list[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Returns the JSON lines that a benchmark printed, and why there are no more; nothing if it ended well."""
    if seconds < _LEAST_SECONDS:
        return [], "out of time"
    command = [sys.executable, "-m", f"cloister.bench.gpu.{module}", *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        why = ""
        try:
            code = subprocess.run(command, stdout=out, stderr=errors, check=False, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            why = f"not finished within {seconds:.0f} s"
        else:
            errors.seek(0)
            if code:
                why = f"failed ({code}): {(errors.read().strip().splitlines() or ['no message'])[-1][:300]}"
        out.seek(0)
        whole = [line for line in out if line.startswith("{") and line.endswith("}\n")]
    return [json.loads(line) for line in whole], why


def _list(option: str, values: list[int]) -> list[str]:
    return [option, *map(str, values)]
