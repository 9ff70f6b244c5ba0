"""The models whose shapes are measured, and which products a layer of each has."""

import dataclasses
from typing import Final

from cloister.local.random_model import LLAMA_1_1B, SMOKE
from cloister.model.spec import ModelSpec

LLAMA_2_7B: Final = dataclasses.replace(
    LLAMA_1_1B,
    hidden_size=4096,
    ffn_size=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    max_positions=4096,
    windows=(None,) * 32,
)

LLAMA_3_8B: Final = dataclasses.replace(LLAMA_2_7B, vocab_size=128256, ffn_size=14336, kv_heads=8, max_positions=8192)

LLAMA_70B: Final = dataclasses.replace(
    LLAMA_3_8B, hidden_size=8192, ffn_size=28672, layers=80, heads=64, windows=(None,) * 80
)

MODELS: Final[dict[str, ModelSpec]] = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3-8b": LLAMA_3_8B,
    "llama-70b": LLAMA_70B,
    "smoke": SMOKE,
}


def products(spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """Returns (d_out, d_in, how many in one token) of each kind of product of a model."""
    width = spec.heads * spec.head_dim
    return {
        "qkv": (width + 2 * spec.kv_heads * spec.head_dim, spec.hidden_size, spec.layers),
        "o": (spec.hidden_size, width, spec.layers),
        "gate_up": (2 * spec.ffn_size, spec.hidden_size, spec.layers),
        "down": (spec.hidden_size, spec.ffn_size, spec.layers),
        "lm_head": (spec.vocab_size, spec.hidden_size, 1),
    }
