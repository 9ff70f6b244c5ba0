"""A whole decode step in one call of compiled code, when every linear layer of it is lent over one line.

The same kernels in the same order as `enclave.forward`, which stays the twin that the tests hold it against, bit for bit, and
which runs whatever this does not: prompts, private layers, adapters, other accelerators, lent attention, and any step that
failed here, again from its start under fresh pads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from cloister.arith.jit import compiled_float
from cloister.blinding.linear import LentLinear
from cloister.enclave.crossing import Desk, Table, cross
from cloister.enclave.kernels import add_rms_norm, attention, rms_norm, rotate_and_store, swiglu
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.prepare import LINEARS_PER_LAYER, EnclaveModel
from cloister.wire.exchange import Line


class Model(NamedTuple):
    """What is the same for every step: the model beside its linears, and its cache."""

    norms: np.ndarray
    """float32 `[2 * layers + 1, hidden]`: before attention and feed-forward of each layer, and the final one."""
    head_norms: np.ndarray
    """float32 `[layers, 2, head_dim]` for queries and keys, or `[layers, 2, 0]`."""
    windows: np.ndarray
    """int64 `[layers]`; 0: the whole context."""
    epsilon: np.float32
    keys: np.ndarray
    values: np.ndarray
    """float32 `[layers, pages, kv_heads, page_tokens, head_dim]`."""


class Rows(NamedTuple):
    """The float32 rows of a step, one of each, and where its token stands."""

    x: np.ndarray
    normed: np.ndarray
    delta: np.ndarray
    mixed: np.ndarray
    qkv: np.ndarray
    gate_up: np.ndarray
    activated: np.ndarray
    query: np.ndarray
    """`[1, heads, head_dim]`."""
    scores: np.ndarray
    """`[heads / kv_heads, context]`."""
    logits: np.ndarray
    rotary: np.ndarray
    """`[2, 1, head_dim / 2]`: cos and sin."""
    where: np.ndarray
    """int32 `[1 + pages]`: the position of the row, then the page table."""


class DecodeStep:
    """Decode steps of one model over one cache."""

    def __init__(self, model: EnclaveModel, linears: Sequence[LentLinear], cache: PagedKVCache) -> None:
        """`linears`: those of the model, all of which may be lent."""
        spec = model.spec
        norms = [norm for layer in model.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        self._model = Model(
            np.stack([*norms, model.final_norm]),
            np.stack([np.stack([layer.query_norm, layer.key_norm]) for layer in model.layers]),
            np.array([window or 0 for window in spec.windows], np.int64),
            np.float32(spec.norm_epsilon),
            cache.keys,
            cache.values,
        )
        self._spec = spec
        self._table = Table.of(linears)
        self.desk = Desk.of(linears)
        """What the last step left beside its result."""

    def run(
        self,
        x: Float32[np.ndarray, "1 hidden"],
        rotary: Float32[np.ndarray, "2 1 half"],
        where: Int32[np.ndarray, " n"],
        pads: Int64[np.ndarray, "linears 2"],
        line: Line,
    ) -> tuple[int, Float32[np.ndarray, "1 vocab"]]:
        """Returns how many linears were lent, and the logits if that is all; else `desk.trouble` says what stopped it."""
        spec = self._spec
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        rows = Rows(
            x=x.copy(),
            normed=_empty(1, x.size),
            delta=_empty(1, x.size),
            mixed=_empty(1, width),
            qkv=_empty(1, width + 2 * kv_width),
            gate_up=_empty(1, 2 * spec.ffn_size),
            activated=_empty(1, spec.ffn_size),
            query=_empty(1, spec.heads, spec.head_dim),
            scores=_empty(spec.heads // spec.kv_heads, int(where[0]) + 1),
            logits=_empty(1, spec.vocab_size),
            rotary=rotary,
            where=where,
        )
        self.desk.seconds[:] = 0.0
        return int(_step(self._model, self._table, pads, line, self.desk, rows)), rows.logits


def _empty(*shape: int) -> Float32[np.ndarray, "*shape"]:
    return np.empty(shape, np.float32)


@compiled_float
def _step(model, table, pads, line, desk, rows):  # type: ignore[no-untyped-def]
    layers, epsilon = len(model.windows), model.epsilon
    rms_norm(rows.x, model.norms[0], epsilon, rows.normed)
    for layer in range(layers):
        keys, values, norms = model.keys[layer], model.values[layer], model.head_norms[layer]
        first = LINEARS_PER_LAYER * layer
        if not cross(table, pads, line, desk, first, rows.normed, rows.qkv):
            return first
        rotate_and_store(rows.qkv, rows.rotary, norms, epsilon, rows.query, keys, values, rows.where)
        attention(rows.query, keys, values, rows.where, model.windows[layer], rows.scores, rows.mixed)
        if not cross(table, pads, line, desk, first + 1, rows.mixed, rows.delta):
            return first + 1
        add_rms_norm(rows.x, rows.delta, model.norms[2 * layer + 1], epsilon, rows.normed)
        if not cross(table, pads, line, desk, first + 2, rows.normed, rows.gate_up):
            return first + 2
        swiglu(rows.gate_up, rows.activated)
        if not cross(table, pads, line, desk, first + 3, rows.activated, rows.delta):
            return first + 3
        add_rms_norm(rows.x, rows.delta, model.norms[2 * layer + 2], epsilon, rows.normed)
    last = LINEARS_PER_LAYER * layers
    return last + cross(table, pads, line, desk, last, rows.normed, rows.logits)
