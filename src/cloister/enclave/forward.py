"""One pass through the model: embedding to logits, with every linear layer sent through the gate.

    tokens -> embedding                                             enclave
      +-> RMSNorm -> [QKV] -> rotary, KV cache -> attention -> [O]    norm, rotary, cache, attention: enclave
      |   add, RMSNorm -> [gate, up] -> SwiGLU -> [down]              [ ]: blinded product on the accelerator,
      +-- x layers                                                         checked before the next line uses it
      RMSNorm -> [LM head] -> logits                                  logits, sampling: enclave

The rows of K and V are checked, like every product, before they enter the cache.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from cloister.blinding.linear import LentLinear, Linear
from cloister.enclave.crossing import Desk
from cloister.enclave.decode import DecodeStep
from cloister.enclave.kernels import add_rms_norm, rms_norm, rotate_and_store, swiglu
from cloister.enclave.kernels import attention as fused_attention
from cloister.enclave.kvcache import CachedSequence, PagedKVCache
from cloister.enclave.outsource import LentStep
from cloister.enclave.prepare import LINEARS_PER_LAYER, EnclaveModel
from cloister.errors import SettingsError
from cloister.model.rope import RotaryEmbedding


@runtime_checkable
class LinearGate(Protocol):
    """Whatever computes linear layers: the gate of `enclave.outsource`, or a baseline."""

    @property
    def linears(self) -> Sequence[Linear]:
        """The linears in the order they are used."""
        ...

    def lends(self, tokens: int) -> bool:
        """Whether a pass over `tokens` rows is lent."""
        ...

    def linear(
        self,
        index: int,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
        lend: bool = True,
    ) -> None:
        """Fills `out` with linear `index` of `x`."""
        ...


@runtime_checkable
class StepGate(LinearGate, Protocol):
    """A gate that can lend a whole decode step to compiled code: that of `enclave.outsource`."""

    step_linears: Sequence[LentLinear]
    """The linears of such a step; none if it cannot be lent whole."""

    def lend_step(self) -> LentStep | None:
        """Returns what a step needs; None if it cannot be lent now."""
        ...

    def settle_step(self, step: LentStep, crossings: int, desk: Desk) -> None:
        """Takes note of a step, whether it succeeded or not."""
        ...


@runtime_checkable
class Attention(Protocol):
    """Whatever computes attention: the fused kernel (see `enclave.kernels.attention`), or one that lends its products."""

    def __call__(
        self,
        query: Float32[np.ndarray, "tokens heads head_dim"],
        keys: Float32[np.ndarray, "pages kv_heads page_tokens head_dim"],
        values: Float32[np.ndarray, "pages kv_heads page_tokens head_dim"],
        where: Int32[np.ndarray, " n"],
        window: int,
        scores: Float32[np.ndarray, "group context"],
        out: Float32[np.ndarray, "tokens width"],
    ) -> None:
        """Fills `out` with the attention of the last rows of a sequence over its cache."""
        ...


class Forward:
    """The forward pass over one paged sequence."""

    def __init__(
        self,
        model: EnclaveModel,
        gate: LinearGate,
        cache: PagedKVCache,
        *,
        shape_hiding: int = 0,
        attention: Attention | None = None,
    ) -> None:
        """`attention`: what computes attention; None is the fused kernel of the enclave.

        Raises:
            SettingsError: `shape_hiding` with another attention, whose products would show the exact lengths.
        """
        if attention is not None and shape_hiding:
            raise SettingsError(
                "shape_hiding does not cover lent attention: its products show the length of the context.",
                remedy="Set blinding.shape_hiding to 0, or keep attention in the enclave.",
            )
        self._model = model
        self._gate = gate
        self._cache = cache
        self._sequence = cache.sequence()
        self._rotary = RotaryEmbedding(model.spec.rope, model.spec.head_dim)
        self._bucket = shape_hiding
        self._attention: Attention = fused_attention if attention is None else attention
        self._norms = _head_norms(model)
        self._epsilon = np.float32(model.spec.norm_epsilon)
        self._lent = self._lendable()

    @property
    def model(self) -> EnclaveModel:
        """The model whose norms and embedding are in use."""
        return self._model

    @property
    def attention(self) -> Attention:
        """What computes attention."""
        return self._attention

    @property
    def vocab_size(self) -> int:
        """How many logits a pass returns."""
        return self._model.spec.vocab_size

    @property
    def max_context(self) -> int:
        """Most tokens of a session."""
        return self._cache.max_tokens

    @property
    def trained_context(self) -> int:
        """Most tokens that the model was trained for."""
        return self._model.spec.max_positions

    @property
    def tokens(self) -> int:
        """How many tokens the cache holds."""
        return self._sequence.tokens

    def use(self, model: EnclaveModel, gate: LinearGate) -> None:
        """Computes with the norms and the embedding of `model` and the products of `gate` from now on; forgets all tokens.

        How an adapter is chosen: `model` is the same base with other small parts.
        """
        self._cache.truncate(self._sequence, 0)
        self._model, self._gate, self._norms = model, gate, _head_norms(model)
        self._lent = self._lendable()

    def piece_tokens(self, most: int) -> int:
        """Returns how many tokens of a prompt a pass takes: `most`, or with `shape_hiding` whole buckets, so that prompts of one
        bucket take passes of one shape.
        """
        return max(self._bucket, most - most % self._bucket) if self._bucket else most

    def truncate(self, tokens: int) -> None:
        """Forgets all but the first `tokens` tokens."""
        self._cache.truncate(self._sequence, tokens)

    def run(self, tokens: list[int], sequence_length: int = 0) -> Float32[np.ndarray, " vocab"]:
        """Returns the logits after the last of `tokens`, which join the cache; on failure the cache is as before.

        `sequence_length`: how long the sequence will be when the prompt is complete, if `tokens` is a piece of one:
        dynamic rotary scaling rotates a whole prompt by its length.

        Raises:
            RequestError: the context is full.
            AcceleratorError: the accelerators failed and the settings say to stop.
            NonFiniteError: the activations overflowed; the error names the layer.
        """
        return self._guarded(tokens, sequence_length, last_only=True)[0]

    def run_all(self, tokens: list[int]) -> Float32[np.ndarray, "tokens vocab"]:
        """Returns the logits after each of `tokens`: for perplexity and comparisons; errors as for `run`."""
        return self._guarded(tokens, 0, last_only=False)

    def _guarded(self, tokens: list[int], sequence_length: int, last_only: bool) -> Float32[np.ndarray, "rows vocab"]:
        before = self._sequence.tokens
        self._cache.grow(self._sequence, len(tokens))
        try:
            return self._pass(tokens, before, sequence_length, last_only)
        except BaseException:
            self._cache.truncate(self._sequence, before)
            raise

    def _pass(
        self, tokens: list[int], first: int, sequence_length: int, last_only: bool
    ) -> Float32[np.ndarray, "rows vocab"]:
        model, spec, gate = self._model, self._model.spec, self._gate
        real = len(tokens)
        rows = self._padded(real, in_prompt=sequence_length > 0)
        lend = gate.lends(rows)
        x = np.zeros((rows, spec.hidden_size), np.float32)
        x[:real] = model.embedding.rows(tokens)
        length = first + real
        rotary = np.stack(self._rotary.at(np.arange(first, length, dtype=np.int64), max(length, sequence_length)))
        where = self._where(self._sequence, first)
        if rows == 1 and self._lent is not None and (logits := self._lend(*self._lent, x, rotary, where)) is not None:
            return logits
        normed = np.empty_like(x)
        delta = np.empty_like(x)
        mixed = np.zeros((rows, spec.heads * spec.head_dim), np.float32)
        qkv = np.empty((rows, (spec.heads + 2 * spec.kv_heads) * spec.head_dim), np.float32)
        gate_up = np.empty((rows, 2 * spec.ffn_size), np.float32)
        activated = np.empty((rows, spec.ffn_size), np.float32)
        query = np.empty((real, spec.heads, spec.head_dim), np.float32)
        scores = np.empty((spec.heads // spec.kv_heads, length), np.float32)

        rms_norm(x, model.layers[0].attention_norm, self._epsilon, normed)
        for index, layer in enumerate(model.layers):
            keys, values = self._cache.keys[index], self._cache.values[index]
            linear = LINEARS_PER_LAYER * index
            gate.linear(linear, normed, qkv, lend)
            rotate_and_store(qkv[:real], rotary, self._norms[index], self._epsilon, query, keys, values, where)
            self._attention(query, keys, values, where, spec.windows[index] or 0, scores, mixed[:real])
            gate.linear(linear + 1, mixed, delta, lend)
            add_rms_norm(x, delta, layer.ffn_norm, self._epsilon, normed)
            gate.linear(linear + 2, normed, gate_up, lend)
            swiglu(gate_up, activated)
            gate.linear(linear + 3, activated, delta, lend)
            final = index + 1 == spec.layers
            norm = model.final_norm if final else model.layers[index + 1].attention_norm
            add_rms_norm(x, delta, norm, self._epsilon, normed)

        kept = np.ascontiguousarray(normed[real - 1 : real] if last_only else normed[:real])
        logits = np.empty((kept.shape[0], spec.vocab_size), np.float32)
        gate.linear(len(gate.linears) - 1, kept, logits, lend)
        return logits

    def _lendable(self) -> tuple[StepGate, DecodeStep] | None:
        """Returns what lends whole decode steps, if this model, gate and attention let it."""
        gate = self._gate
        if self._attention is not fused_attention or not isinstance(gate, StepGate) or not gate.step_linears:
            return None
        return gate, DecodeStep(self._model, gate.step_linears, self._cache)

    def _lend(
        self,
        gate: StepGate,
        step: DecodeStep,
        x: Float32[np.ndarray, "1 hidden"],
        rotary: Float32[np.ndarray, "2 1 half"],
        where: Int32[np.ndarray, " n"],
    ) -> Float32[np.ndarray, "1 vocab"] | None:
        """Returns the logits after one row that was lent whole; None: nothing came of it, compute it otherwise."""
        lent = gate.lend_step()
        if lent is None:
            return None
        crossings, logits = step.run(x, rotary, where, lent.pads.spend(), lent.line)
        gate.settle_step(lent, crossings, step.desk)
        return logits if crossings == len(gate.linears) else None

    def _padded(self, rows: int, in_prompt: bool) -> int:
        """Returns how many rows the accelerator sees for `rows` real ones (zero rows, blinded like any other).

        One row is not padded where it may be a token of the answer; a last piece of a prompt is, however short.
        """
        if not self._bucket or (rows == 1 and not in_prompt):
            return rows
        return -(-rows // self._bucket) * self._bucket

    @staticmethod
    def _where(sequence: CachedSequence, first: int) -> Int32[np.ndarray, " n"]:
        return np.concatenate([np.array([first], np.int32), sequence.table[: sequence.pages]])


def _head_norms(model: EnclaveModel) -> list[Float32[np.ndarray, "2 dim"]]:
    return [np.stack([layer.query_norm, layer.key_norm]) for layer in model.layers]
