"""Models with random weights in a stated shape, for measurements: no file, the quantised form at once."""

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np
from jaxtyping import Int8

from cloister.arith.team import Team
from cloister.blinding.checks import CheckKey
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.quantize import Reach
from cloister.enclave.prepare import EnclaveModel, LayerWeights
from cloister.model.spec import Family, ModelSpec, RopeKind, RopeSpec
from cloister.wire.messages import PublicWeight, weight_hash
from cloister.wire.sealed_memory import SealedMatrix

LLAMA_1_1B: Final = ModelSpec(
    family=Family.LLAMA, vocab_size=32000, hidden_size=2048, ffn_size=5632, layers=22, heads=32, kv_heads=4, head_dim=64,
    norm_epsilon=1e-5, max_positions=2048, rope=RopeSpec(RopeKind.DEFAULT, 10000.0, original_positions=2048),
    windows=(None,) * 22, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, tied_embeddings=False,
)  # fmt: skip

SMOKE: Final = dataclasses.replace(
    LLAMA_1_1B,
    vocab_size=512,
    hidden_size=128,
    ffn_size=256,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    windows=(None,) * 2,
)

_STRETCH: Final = 2**22 - 3
"""Weights that are drawn before they repeat: a prime, so that no two rows are alike."""


class RandomEmbedding:
    """An embedding table of small random float16 values."""

    def __init__(self, vocab: int, hidden: int, generator: np.random.Generator) -> None:
        self._table = generator.standard_normal((vocab, hidden), np.float32).astype(np.float16)
        self.nbytes = self._table.nbytes

    def rows(self, tokens: list[int]) -> np.ndarray:
        """Returns the embeddings of `tokens`."""
        return self._table[np.asarray(tokens)].astype(np.float32)


def random_model(spec: ModelSpec, checks: int, source: PadSource, team: Team) -> EnclaveModel:
    """Returns a model of `spec` with uniform int8 weights and a fixed seed."""
    generator = np.random.default_rng(0)
    linears = tuple(random_linear(name, shape, checks, source, team, generator) for name, shape in _shapes(spec))
    ones, none = np.ones(spec.hidden_size, np.float32), np.empty(0, np.float32)
    layer = LayerWeights(ones, ones, none, none)
    embedding = RandomEmbedding(spec.vocab_size, spec.hidden_size, generator)
    size = sum(linear.weight.matrix.nbytes for linear in linears) + embedding.nbytes
    return EnclaveModel(spec, linears, (layer,) * spec.layers, ones, embedding, size)


def _shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    width = spec.heads * spec.head_dim
    for index in range(spec.layers):
        yield f"layers.{index}.qkv", (width + 2 * spec.kv_heads * spec.head_dim, spec.hidden_size)
        yield f"layers.{index}.o", (spec.hidden_size, width)
        yield f"layers.{index}.gate_up", (2 * spec.ffn_size, spec.hidden_size)
        yield f"layers.{index}.down", (spec.hidden_size, spec.ffn_size)
    yield "lm_head", (spec.vocab_size, spec.hidden_size)


def random_linear(
    name: str, shape: tuple[int, int], checks: int, source: PadSource, team: Team, generator: np.random.Generator
) -> LentLinear:
    """Returns a linear of `shape` (d_out, d_in) with uniform int8 weights, ready to be lent."""
    memory = SealedMatrix.create(shape)
    _fill(memory.array.reshape(-1), generator)
    memory.seal()
    weight = PublicWeight(memory.array, weight_hash(memory.array), memory)
    scale = np.full((1, shape[0]), 1.0 / (73.0 * shape[1] ** 0.5), np.float32)  # keeps activations of order one
    key = CheckKey.draw(weight, checks, source, team)
    return LentLinear(name, weight, scale, Reach.of(127.0 * shape[1] ** 0.5, shape[1]), key, np.empty(0, np.float32))


def _fill(weights: Int8[np.ndarray, " n"], generator: np.random.Generator) -> None:
    """Overwrites `weights` with uniform levels; large ones repeat a long random stretch."""
    stretch = generator.integers(-127, 128, min(weights.size, _STRETCH), np.int8)
    for start in range(0, weights.size, stretch.size):
        piece = weights[start : start + stretch.size]
        piece[:] = stretch[: piece.size]
