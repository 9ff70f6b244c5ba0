"""Measures what slicing lost: the slices over their base against the full fine-tune, on a text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float32

from cloister.errors import AdapterError
from cloister.model.adapters import open_adapter
from cloister.model.directory import ModelDirectory
from cloister.model.divergence import cross_entropy, kl, perplexity, token_windows
from cloister.model.llama import Llama, TensorSource
from cloister.model.merged import MergedWeights
from cloister.model.spec import ModelSpec

WINDOW: Final = 256
"""Tokens per window; each is scored with the context of its own window only."""

RESIDENT_PARAMETERS: Final = 50_000_000
"""Models up to this size are kept in memory; of larger ones, one tensor at a time is read for each window."""


@dataclass(frozen=True)
class Divergence:
    """How far the base, and the slices over it, are from the fine-tune."""

    tokens: int
    kl_nats: float
    """Mean KL divergence of the slices from the fine-tune, per token."""
    kl_base_nats: float
    """The same of the base alone: what the slices have to make up for."""
    same_choice: float
    """Share of tokens after which the slices' likeliest token is the fine-tune's."""
    perplexity: float
    """Of the slices over the base."""
    perplexity_finetuned: float


def measure(
    base: ModelDirectory,
    tuned: ModelDirectory,
    slices: Path,
    text: str,
    windows: int,
    progress: Callable[[int, int], None],
) -> Divergence:
    """Returns how far the slices in a directory are from the fine-tune, in float32, on whole windows of `text`.

    Raises:
        AdapterError: the text is too short.
    """
    tokens = tuned.tokenizer.encode(text)
    length = min(WINDOW, base.spec.max_positions)
    if len(tokens) < 2:
        raise AdapterError(f"The text has {len(tokens)} tokens.", remedy="Give a longer one with --text.")
    pieces = token_windows(tokens, length, windows)
    adapter = open_adapter("slices", slices, base.spec, base.checkpoint)
    merged = MergedWeights(base.spec, base.checkpoint, adapter)
    models = (
        _model(tuned.spec, tuned.checkpoint),
        _model(merged.spec, merged),
        _model(base.spec, base.checkpoint),
    )
    results = []
    for done, piece in enumerate(pieces, 1):
        expected, ours, before = (model.forward(piece) for model in models)
        results.append(_compare(piece, expected, ours, before))
        progress(done, len(pieces))
    kl_slices, kl_base, same, loss, loss_tuned = np.mean(results, axis=0).tolist()
    count = sum(len(piece) for piece in pieces)
    return Divergence(count, kl_slices, kl_base, same, perplexity([loss]), perplexity([loss_tuned]))


def _model(spec: ModelSpec, source: TensorSource) -> Llama:
    return Llama(spec, source, streamed=spec.parameters > RESIDENT_PARAMETERS)


def _compare(
    tokens: list[int],
    expected: Float32[np.ndarray, "tokens vocab"],
    ours: Float32[np.ndarray, "tokens vocab"],
    before: Float32[np.ndarray, "tokens vocab"],
) -> tuple[float, float, float, float, float]:
    same = float((expected.argmax(axis=1) == ours.argmax(axis=1)).mean())
    return kl(expected, ours), kl(expected, before), same, cross_entropy(ours, tokens), cross_entropy(expected, tokens)
