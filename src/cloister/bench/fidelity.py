"""What quantisation costs: perplexity on held-out text and KL divergence, against the float32 model.

The products are computed here rather than lent: the numbers are the same bit for bit (a test holds them equal).
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from cloister.arith.team import Team
from cloister.assets import demo_model
from cloister.bench.record import Record
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import prepare
from cloister.enclave.release import Release
from cloister.model.directory import ModelDirectory, open_model
from cloister.model.divergence import cross_entropy, kl, perplexity, token_windows
from cloister.model.llama import Llama
from cloister.settings import BlindingSettings, Settings, Weights

NOISES: Final = (0.1, 0.3, 1.0)
"""Standard deviations of the noise on logits, in nats, whose effect is measured."""

WINDOW: Final = 256
"""Tokens per window; each is scored with the context of its own window only."""


def run(model: str, text: Path | None, smoke: bool, console: Console) -> Record:
    """Returns the record for the shipped model (`demo`) or a model's folder."""
    path = demo_model() if model == "demo" else Path(model)
    directory = open_model(path)
    content = (text or demo_model() / "heldout.txt").read_text(encoding="utf-8")
    windows = token_windows(directory.tokenizer.encode(content), WINDOW, 3 if smoke else 10**9)
    console.print(f"{len(windows)} windows of {WINDOW} tokens; float32 ...")
    oracle = Llama(directory.spec, directory.checkpoint)
    expected = [oracle.forward(window) for window in windows]
    losses = [cross_entropy(logits, window) for logits, window in zip(expected, windows, strict=True)]
    rows: list[dict[str, Any]] = [{"weights": "float32", "perplexity": perplexity(losses)}]
    base = perplexity(losses)
    served: list[np.ndarray] = []

    def score(label: str, actual: list[np.ndarray]) -> None:
        losses = [cross_entropy(logits, window) for logits, window in zip(actual, windows, strict=True)]
        agree = [float((e.argmax(axis=1) == a.argmax(axis=1)).mean()) for e, a in zip(expected, actual, strict=True)]
        rows.append(
            {
                "weights": label,
                "perplexity": perplexity(losses),
                "change %": 100 * (perplexity(losses) / base - 1),
                "mean KL nats": float(np.mean([kl(e, a) for e, a in zip(expected, actual, strict=True)])),
                "same top token": float(np.mean(agree)),
            }
        )

    for weights in Weights:
        console.print(f"{weights.value} ...")
        forward = quantised(directory, weights)
        actual = []
        for window in windows:
            forward.truncate(0)
            actual.append(forward.run_all(window))
        score(weights.value, actual)
        served = served or actual
    for noise in NOISES:
        release = Release(noise)
        noisy = [
            np.stack([release.apply(row, window[: at + 1]) for at, row in enumerate(logits)])
            for logits, window in zip(served, windows, strict=True)
        ]
        score(f"int8, logit noise {noise}", noisy)
    name = path.resolve().name
    return Record(
        f"fidelity-{name}{'-smoke' if smoke else ''}",
        rows,
        {"tokens scored": len(windows) * (WINDOW - 1)},
        {"model": name, "window": WINDOW},
        "Activations are scaled by the bound of the blinded product; bars: 0.1 % for int8, 0.001 % for int8x2.",
    )


def quantised(directory: ModelDirectory, weights: Weights) -> Forward:
    """Returns a forward pass with quantised weights, computed here."""
    settings = Settings(blinding=BlindingSettings(weights=weights))
    source, team, spec = PadSource(), Team(), directory.spec
    model = prepare(directory.checkpoint, spec, settings.blinding, source, team=team)
    gate = Gate(model.linears, [], Pantry(model.linears, 0, source), settings, team=team)
    return Forward(model, gate, PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, WINDOW))
