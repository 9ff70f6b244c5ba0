"""Prefill and decode, side by side in one run: unprotected, enclave-only, blinded online, blinded online and pads."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from cloister.bench.record import Record
from cloister.errors import CloisterError

ENCLAVE_ONLY = ("enclave-only int8", "enclave-only exact", "transformers bf16")
"""What an enclave that computes everything could run (transformers: torch inside a confidential virtual machine)."""

VARIANTS = (
    "transformers bf16", "unprotected int8", "enclave-only int8", "enclave-only int8, 1 thread", "enclave-only exact", "blinded",
)  # fmt: skip


def run(shape: str, tokens: int, smoke: bool, console: Console) -> Record:
    """Returns the record of one shape: every variant in a process of its own, one after the other."""
    prefills = [16] if smoke else [16, 128, 512] if shape == "1.1b" else [16, 128, 384]
    tokens = 4 if smoke else tokens
    arguments = ["--tokens", str(tokens), "--repeats", "1" if smoke else "3", "--prefills", *map(str, prefills)]
    place = "smoke" if smoke and shape == "1.1b" else shape
    results: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        if variant.startswith("transformers") and importlib.util.find_spec("transformers") is None:
            console.print(f"{variant}: skipped, transformers is not installed (make setup)")
            continue
        console.print(f"{variant} ...")
        results[variant] = _measured(variant, place, arguments)
    console.print("pads ...")
    pads = _measured("pads", place, [])
    rows = [{"variant": name, **_row(result)} for name, result in results.items()]
    rows.append({"variant": "blinded + pads", **_row(_with_pads(results["blinded"], pads))})
    name = Path(shape).resolve().name if Path(shape).is_dir() else shape
    return Record(
        f"latency-{name}{'-smoke' if smoke else ''}",
        rows,
        ratios(results, pads) | pads,
        {"shape": name, "tokens": tokens, "prefills": prefills, "context": 128, "batch": 1},
        "CPU is of the trusted process (all of it, for the unprotected and enclave-only variants). Decode at batch 1. "
        "'exact' computes in the enclave the very numbers that a lent product gives; 'int8' uses 8-bit activations.",
    )


def ratios(results: dict[str, dict[str, Any]], pads: dict[str, float]) -> dict[str, float]:
    """Returns the figures that the bars are about."""
    blinded = results["blinded"]
    fastest = max(
        (results[name] for name in ENCLAVE_ONLY if name in results), key=lambda result: result["tokens_per_s"]
    )
    enclave, online = fastest["cpu_ms_per_token"], blinded["cpu_ms_per_token"]
    single = results["enclave-only int8, 1 thread"]["cpu_ms_per_token"]
    facts = {
        "trusted CPU, blinded online / fastest enclave-only (bar 0.10)": online / enclave,
        "trusted CPU, online + pads / fastest enclave-only (bar 0.33)": (online + pads["pad_cpu_ms_per_token"])
        / enclave,
        "trusted CPU, blinded online / enclave-only on 1 thread": online / single,
        "trusted CPU, online + pads / enclave-only on 1 thread": (online + pads["pad_cpu_ms_per_token"]) / single,
        "tokens/s, blinded / unprotected int8 (bar 0.7)": blinded["tokens_per_s"]
        / results["unprotected int8"]["tokens_per_s"],
        "blind + verify + unblind share of a decode step (bar 0.05)": blinded["blind_verify_unblind_share"],
    }
    if "transformers bf16" in results:
        facts["tokens/s, blinded / transformers bf16 (bar 1.5)"] = (
            blinded["tokens_per_s"] / results["transformers bf16"]["tokens_per_s"]
        )
    return facts


def _with_pads(blinded: dict[str, Any], pads: dict[str, float]) -> dict[str, Any]:
    """Returns the decode figures when each token's pads are made just before it."""
    together = 1e3 / blinded["tokens_per_s"] + pads["pad_wall_ms_per_token"]
    return {
        "tokens_per_s": 1e3 / together,
        "p50_ms": blinded["p50_ms"] + pads["pad_wall_ms_per_token"],
        "cpu_ms_per_token": blinded["cpu_ms_per_token"] + pads["pad_cpu_ms_per_token"],
        "worker_cpu_ms_per_token": blinded["worker_cpu_ms_per_token"],
    }


def _row(result: dict[str, Any]) -> dict[str, Any]:
    labels = {
        "tokens_per_s": "tokens/s", "p50_ms": "p50 ms", "p95_ms": "p95 ms", "cpu_ms_per_token": "trusted CPU ms/token",
        "worker_cpu_ms_per_token": "worker CPU ms/token", "kb_crossing_per_token": "kB crossing/token",
        "blind_verify_unblind_ms": "blind+verify+unblind ms", "peak_memory_mb": "peak MB",
    }  # fmt: skip
    prefills = {f"prefill {key.split('_')[1]} s": value for key, value in result.items() if key.startswith("prefill")}
    return prefills | {label: result[key] for key, label in labels.items() if key in result}


def _measured(variant: str, shape: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "cloister.bench.variant", variant, shape, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CloisterError(
            f"The variant {variant} failed: {done.stderr.strip().splitlines()[-1:]}",
            remedy=f"Run it alone: {' '.join(command[1:])}",
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
