"""Turns a model directory into what the enclave runs: quantised public linears, and the small float parts.

Covers: quantising every large weight, one slice of rows at a time, straight into the memory that is shared with workers
of this host (sealed against writing by anyone); drawing the check keys; keeping embeddings, norms and biases here.
Guarantees: beyond the quantised model, peak memory grows only by one slice: source pages are released as they are used.
A product that the plan calls secret lies in the enclave's private memory: it is never shared, hashed or given a check key,
and has a type (`PrivateLinear`) that no accelerator takes.
Does not cover: which weights are secret (`cloister.plan`).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from cloister.arith.team import Team
from cloister.blinding.checks import CheckKey
from cloister.blinding.linear import LentLinear, Linear, PrivateLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.quantize import Reach, quantize_rows
from cloister.errors import CheckpointError
from cloister.model.checkpoint import Checkpoint, widen
from cloister.model.spec import ModelSpec
from cloister.settings import BlindingSettings, Weights
from cloister.wire.messages import PublicWeight, weight_hash
from cloister.wire.sealed_memory import SealedMatrix

SLICE_BYTES: Final = 8 * 2**20
"""Float32 bytes of a weight that are in memory at once while it is quantised."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all)."""

LINEARS_PER_LAYER: Final = 4
"""Products per decoder block: fused QKV, output projection, fused gate and up, down projection."""


@dataclass(frozen=True)
class LayerWeights:
    """The small float parts of one decoder block."""

    attention_norm: Float32[np.ndarray, " hidden"]
    ffn_norm: Float32[np.ndarray, " hidden"]
    query_norm: Float32[np.ndarray, " head_dim"]
    """Empty where the family has no per-head norm."""
    key_norm: Float32[np.ndarray, " head_dim"]


@dataclass(frozen=True)
class EnclaveModel:
    """A model ready to run: linears in the order they are used (four a layer, the LM head last)."""

    spec: ModelSpec
    linears: tuple[Linear, ...]
    layers: tuple[LayerWeights, ...]
    final_norm: Float32[np.ndarray, " hidden"]
    embedding: "EmbeddingTable"
    quantized_bytes: int = field(default=0)

    @property
    def public_linears(self) -> tuple[LentLinear, ...]:
        """The linears whose weights an accelerator may be given."""
        return tuple(linear for linear in self.linears if isinstance(linear, LentLinear))


@runtime_checkable
class EmbeddingTable(Protocol):
    """Looks embeddings up, inside the enclave."""

    def rows(self, tokens: list[int]) -> Float32[np.ndarray, "tokens hidden"]:
        """Returns the embeddings of `tokens`."""
        ...


class Embedding:
    """The embedding table, kept in the enclave in the checkpoint's own precision."""

    def __init__(self, table: np.ndarray) -> None:
        """`table`: `[vocab, hidden]` as stored: float32, float16, or uint16 for bfloat16 bits."""
        self._table = table
        self.nbytes = self._table.nbytes

    def rows(self, tokens: list[int]) -> Float32[np.ndarray, "tokens hidden"]:
        """Returns the embeddings of `tokens`."""
        return widen(self._table[np.asarray(tokens, np.int64)])


def product_parts(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the name of each product and the modules that it stacks: those that read the same input."""
    for index in range(spec.layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        yield f"layers.{index}.qkv", tuple(f"{attention}{part}_proj" for part in "qkv")
        yield f"layers.{index}.o", (f"{attention}o_proj",)
        yield f"layers.{index}.gate_up", (f"{mlp}gate_proj", f"{mlp}up_proj")
        yield f"layers.{index}.down", (f"{mlp}down_proj",)
    yield "lm_head", ("model.embed_tokens" if spec.tied_embeddings else "lm_head",)


def prepare(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    settings: BlindingSettings,
    source: PadSource,
    *,
    team: Team | None = None,
    progress: Progress | None = None,
    secret: Collection[str] = (),
) -> EnclaveModel:
    """Returns the quantised model of a checked checkpoint.

    `secret`: the products whose weights stay private, by name, e.g. `layers.0.qkv`.

    Raises:
        CheckpointError: a weight is NaN or infinite; the error names it.
    """
    builder = _Builder(checkpoint, spec, settings, source, team, progress, frozenset(secret))
    linears = tuple(builder.linears())
    layers = tuple(builder.layer(index) for index in range(spec.layers))
    final_norm = checkpoint.tensor("model.norm.weight")
    embedding = Embedding(checkpoint.raw("model.embed_tokens.weight"))
    checkpoint.release()
    size = sum(linear.matrix.nbytes for linear in linears) + embedding.nbytes
    return EnclaveModel(spec, linears, layers, final_norm, embedding, size)


class _Builder:
    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        settings: BlindingSettings,
        source: PadSource,
        team: Team | None,
        progress: Progress | None,
        secret: frozenset[str],
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._settings = settings
        self._planes = 2 if settings.weights is Weights.INT8X2 else 1
        self._source = source
        self._team = team
        self._progress = progress
        self._secret = secret
        self._done = 0
        self._total = sum(self._weights_in(parts) for _, parts in product_parts(self._spec))

    def linears(self) -> Iterator[Linear]:
        for name, parts in product_parts(self._spec):
            yield self._linear(name, parts)

    def layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        empty = np.empty(0, np.float32)
        tensor = self._checkpoint.tensor
        return LayerWeights(
            attention_norm=tensor(f"{prefix}input_layernorm.weight"),
            ffn_norm=tensor(f"{prefix}post_attention_layernorm.weight"),
            query_norm=tensor(f"{prefix}self_attn.q_norm.weight") if self._spec.qk_norm else empty,
            key_norm=tensor(f"{prefix}self_attn.k_norm.weight") if self._spec.qk_norm else empty,
        )

    def _weights_in(self, parts: tuple[str, ...]) -> int:
        shapes = [self._checkpoint.shape(f"{part}.weight") for part in parts]
        return sum(rows * columns for rows, columns in shapes)

    def _linear(self, name: str, parts: tuple[str, ...]) -> Linear:
        shapes = [self._checkpoint.shape(f"{part}.weight") for part in parts]
        d_out, d_in = sum(shape[0] for shape in shapes), shapes[0][1]
        rows_in_all = self._planes * d_out
        memory = None if name in self._secret else SealedMatrix.create((rows_in_all, d_in))
        matrix = np.empty((rows_in_all, d_in), np.int8) if memory is None else memory.array
        planes = matrix.reshape(self._planes, d_out, d_in)
        scales = np.empty((self._planes, d_out), np.float32)
        norm = 0.0
        first = 0
        for part, shape in zip(parts, shapes, strict=True):
            for start, stop in _slices(shape[0], d_in):
                rows = slice(first + start, first + stop)
                norm = max(norm, self._quantize(f"{part}.weight", start, stop, planes[:, rows], scales[:, rows]))
                self._report((stop - start) * d_in)
            first += shape[0]
        reach, bias = Reach.of(norm, d_in), self._bias(parts, shapes)
        if memory is None:
            return PrivateLinear(name, matrix, scales, reach, bias)
        memory.seal()
        weight = PublicWeight(matrix, weight_hash(matrix), memory)
        key = CheckKey.draw(weight, self._settings.checks, self._source, self._team)
        return LentLinear(name, weight, scales, reach, key, bias)

    def _quantize(self, name: str, start: int, stop: int, planes: np.ndarray, scales: np.ndarray) -> float:
        try:
            norm = quantize_rows(self._checkpoint.rows(name, start, stop), planes, scales)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error.message}", remedy=error.remedy) from error
        self._checkpoint.release()
        return norm

    def _bias(self, parts: tuple[str, ...], shapes: list[tuple[int, ...]]) -> Float32[np.ndarray, " bias"]:
        names = [f"{part}.bias" for part in parts]
        if not any(name in self._checkpoint.names() for name in names):
            return np.empty(0, np.float32)
        pieces = [
            self._checkpoint.tensor(name) if name in self._checkpoint.names() else np.zeros(shape[0], np.float32)
            for name, shape in zip(names, shapes, strict=True)
        ]
        return np.concatenate(pieces)

    def _report(self, weights: int) -> None:
        self._done += weights
        if self._progress is not None:
            self._progress("quantising", self._done, self._total)


def _slices(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, SLICE_BYTES // (4 * columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
