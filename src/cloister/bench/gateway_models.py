"""The models with which the gateway is measured: the shipped one, which answers unnaturally fast, and a larger one."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cloister.assets import demo_model
from cloister.bench.engines import Subject, build_candidates, vllm, write_random_llama
from cloister.bench.gateway import Effort, measure

HIDDEN, LAYERS = 1024, 14
"""Shape of the larger model: 169 million random weights."""


def measure_models(
    program: Path, effort: Effort, lengths: Sequence[int], smoke: bool, console: Console
) -> list[dict[str, Any]]:
    """Starts `program` with each model in turn; returns the rows of both."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for hidden, layers in ((0, 0),) if smoke else ((0, 0), (HIDDEN, LAYERS)):
            model, name = demo_model(), "demo, 2 M weights"
            if hidden:
                model = Path(folder) / "random"
                model.mkdir()
                name = f"random, {write_random_llama(model, demo_model(), hidden, layers):.0f} M weights"
            console.print(f"{name}: building candidates, starting vLLM")
            candidates = Path(folder) / f"{hidden}.candidates"
            build_candidates(model, candidates)
            with vllm(program, model) as engine:
                rows += measure(Subject(name, engine, model, candidates), effort, lengths, console)
    return rows
