"""Attention whose two products, Q K^T and A V, are lent under one-time pads on both operands (policy `secureinfer-strict`).

    query --> blind --> [ Q K^T ] --> check, unblind --> softmax --> blind --> [ A V ] --> check, unblind --> out
              enclave   accelerator   enclave                                 accelerator  enclave

Covers: a decoder layer's attention over the paged cache, grouped-query, causal, with a sliding window; two exchanges a
layer and pass (more only where a pass is too large for one request). The accelerator keeps the blinded keys and values, so
that each row crosses once; here their pads and quantised forms are kept.
Guarantees: only `Blinded` rows leave, under the pads of `blinding.bilinear`; nothing is used before its check passed. After
a failure the accelerator is quarantined as by the gate, with which the roster is shared; the work goes to the next one, which
is sent the same blinded rows, or is done by the enclave's own kernel, by the settings.
Assumes: positions below a pass' first one hold what they held before: whoever rewrites a cached row passes a first position
that is not above it. A sequence starts at position 0, and its first page is its own.
Does not cover: shapes and timing (every request shows the length of the context), and any gain in speed: taking the pads
off costs two products of the same size, so this is slower than the fused kernel by construction (docs/masked_attention.md).
"""

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Float32, Int32

from cloister.arith.modulus import MAX_D_IN
from cloister.arith.team import Team
from cloister.blinding.bilinear import TEAM_WORK, BlindedPair, KeptRows, kept_keys, kept_values
from cloister.blinding.pads import PadSource
from cloister.enclave.kernels import attention as fused_attention
from cloister.enclave.masked_kernels import gather_rows, weigh
from cloister.enclave.outsource import Holder, Roster
from cloister.errors import AcceleratorError, SettingsError
from cloister.settings import AcceleratorSettings
from cloister.wire.messages import MAX_ROWS
from cloister.wire.pairs import MAX_HEADS, PairRequest, PairShape

MAX_WORDS: Final = 2**22
"""Most scores of one request: bounds the memory of a pass to a few times 16 MiB."""

DEFAULT_KEPT_BYTES: Final = 2**30
"""Most enclave memory for what is kept of all sequences before the one unused for longest is forgotten."""


@dataclass
class MaskedCounters:
    """What was lent and what it cost here. Times are wall-clock seconds on the engine's thread."""

    products: int = 0
    appends: int = 0
    """Requests that only made up for rows that an accelerator did not keep yet."""
    enclave_passes: int = 0
    """Layers that the enclave's own kernel computed, in whole or in part."""
    bytes_sent: int = 0
    bytes_received: int = 0
    multiplications: int = 0
    """Multiplications in the field, in the enclave, to check answers and take pads off."""
    keep_seconds: float = 0.0
    blind_seconds: float = 0.0
    lent_seconds: float = 0.0
    recover_seconds: float = 0.0
    softmax_seconds: float = 0.0
    enclave_seconds: float = 0.0


@dataclass
class _Side:
    """The keys or the values of one layer and sequence: what is kept here, and who keeps how many blinded rows."""

    kept: KeptRows = field(repr=False)
    operand: int
    held: int = 0

    def cut(self, rows: int) -> None:
        self.kept.cut(rows)
        self.held = min(self.held, rows)


@dataclass
class _Layer:
    """One layer of one sequence."""

    name: str
    keys: _Side
    values: _Side
    holder: Holder | None = None

    @property
    def nbytes(self) -> int:
        return self.keys.kept.nbytes + self.values.kept.nbytes

    def cut(self, rows: int) -> None:
        self.keys.cut(rows)
        self.values.cut(rows)


class MaskedAttention:
    """Takes the place of the fused kernel: `enclave.forward.Forward(..., attention=MaskedAttention(...))`."""

    def __init__(
        self,
        accelerator: Holder | Roster,
        source: PadSource,
        team: Team | None = None,
        *,
        checks: int = 1,
        kept_bytes: int = DEFAULT_KEPT_BYTES,
        settings: AcceleratorSettings | None = None,
    ) -> None:
        """`accelerator`: the gate's roster (`Gate.roster`), so that whoever cheats at one gets no work at the other; or one
        accelerator alone, with `settings` for its timeout and what follows a failure.

        Raises:
            SettingsError: none of the accelerators multiplies two blinded matrices.
        """
        if isinstance(accelerator, Roster):
            self._roster = accelerator
        else:
            self._roster = Roster([accelerator], settings or AcceleratorSettings())
        if self._roster.healthy and self._roster.pair_accelerator() is None:
            raise SettingsError(
                "None of the accelerators multiplies two blinded matrices, which lent attention needs.",
                remedy="Use workers of this version, or keep attention in the enclave.",
            )
        self.counters = MaskedCounters()
        self._source = source
        self._team = team
        self._checks = checks
        self._limit = kept_bytes
        self._numbers: dict[int, int] = {}  # of layers, by the address of their keys
        self._sequences: OrderedDict[int, dict[int, _Layer]] = OrderedDict()  # by first page, least recently used first

    @property
    def roster(self) -> Roster:
        """The accelerators, and what they failed at."""
        return self._roster

    @property
    def kept_bytes(self) -> int:
        """Bytes of enclave memory for what is kept."""
        return sum(layer.nbytes for layers in self._sequences.values() for layer in layers.values())

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
        """Fills `out` as `enclave.kernels.attention` does, up to the error of fixed-point numbers.

        Raises:
            AcceleratorError: the accelerator failed and the settings say to stop.
            NonFiniteError: a row of Q, K or V holds NaN or infinity.
        """
        tokens, heads, _ = query.shape
        done, first = 0, int(where[0])
        if heads <= MAX_HEADS and first + tokens <= MAX_D_IN and (layer := self._layer(keys, where)) is not None:
            layer.cut(first)
            while done < tokens and (accelerator := self._roster.pair_accelerator()) is not None:
                count = min(tokens - done, _at_once(heads, first + tokens))
                part = slice(done, done + count)
                try:
                    self._lend(
                        accelerator, layer, query[part], (keys, values), (where, first + done, window), out[part]
                    )
                except AcceleratorError as error:
                    self._roster.quarantine(accelerator, layer.name, error)
                else:
                    done += count
        if done < tokens:
            started = time.perf_counter()
            rest = where.copy()
            rest[0] = first + done
            fused_attention(query[done:], keys, values, rest, window, scores, out[done:])
            self.counters.enclave_passes += 1
            self.counters.enclave_seconds += time.perf_counter() - started

    def release(self) -> None:
        """Forgets every sequence, here and at the accelerators."""
        for first_page in list(self._sequences):
            self._forget(first_page)

    def _lend(
        self,
        accelerator: Holder,
        layer: _Layer,
        query: Float32[np.ndarray, "tokens heads head_dim"],
        cache: tuple[np.ndarray, np.ndarray],
        place: tuple[np.ndarray, int, int],
        out: Float32[np.ndarray, "tokens width"],
    ) -> None:
        """Computes some rows: both products, one exchange each."""
        where, position, window = place
        tokens, heads, width = query.shape
        kv_heads, stop = layer.keys.kept.heads, position + tokens
        rows, start = tokens * heads // kv_heads, max(0, position + 1 - window) if window else 0
        if layer.holder is not accelerator:
            layer.holder, layer.keys.held, layer.values.held = accelerator, 0, 0
        for side, pool in zip((layer.keys, layer.values), cache, strict=True):
            self._keep(side.kept, pool, where, stop)
            self._catch_up(accelerator, side, tokens)
        spans = _spans(position - start, tokens, heads // kv_heads, window)
        left = query.reshape(tokens, kv_heads, -1, width).transpose(1, 0, 2, 3).reshape(kv_heads * rows, width)
        weights = np.empty((kv_heads, rows, stop - start), np.float32)
        self._product(accelerator, layer.keys, left, start, weights, spans)
        self._soften(weights, spans, layer.values.kept.scales[:, start:], width)
        mixed = np.empty((kv_heads, rows, width), np.float32)
        self._product(accelerator, layer.values, weights.reshape(kv_heads * rows, -1), start, mixed, None)
        np.copyto(
            out.reshape(tokens, kv_heads, -1, width), mixed.reshape(kv_heads, tokens, -1, width).transpose(1, 0, 2, 3)
        )

    def _product(
        self,
        accelerator: Holder,
        side: _Side,
        left: Float32[np.ndarray, "n inner"],
        start: int,
        out: Float32[np.ndarray, "kv_heads rows outer"],
        spans: Int32[np.ndarray, "2 rows"] | None,
    ) -> None:
        """Blinds, lends, checks and recovers one product; the accelerator keeps all rows afterwards."""
        counters, started = self.counters, time.perf_counter()
        pair = side.kept.pair(np.ascontiguousarray(left), start, side.held, self._team)
        request = pair.request(side.operand)
        blinded = time.perf_counter()
        counters.blind_seconds += blinded - started
        counters.bytes_sent += _bytes(request)
        try:
            answer = self._roster.lend_pair(accelerator, request)
        finally:
            answered = time.perf_counter()
            counters.lent_seconds += answered - blinded
        side.held = side.kept.rows
        pair.recover(answer, out, spans, self._team)
        counters.recover_seconds += time.perf_counter() - answered
        counters.bytes_received += answer.nbytes
        counters.products += 1
        counters.multiplications += _multiplications(pair, spans, self._checks)

    def _keep(
        self,
        kept: KeptRows,
        pool: Float32[np.ndarray, "pages kv_heads page_tokens width"],
        where: np.ndarray,
        stop: int,
    ) -> None:
        """Takes the cached rows up to position `stop` in, as far as they are not kept yet."""
        if kept.rows == stop:
            return
        started = time.perf_counter()
        fresh = np.empty((kept.heads, stop - kept.rows, kept.width), np.float32)
        gather_rows(pool, where, kept.rows, fresh)
        kept.append(fresh)
        fresh.fill(0)
        self.counters.multiplications += fresh.size * self._checks
        self.counters.keep_seconds += time.perf_counter() - started

    def _catch_up(self, accelerator: Holder, side: _Side, tokens: int) -> None:
        """Sends blinded rows that the accelerator lacks, all but what can travel with a product of `tokens` rows."""
        kept = side.kept
        most = max(1, MAX_ROWS // kept.heads)
        while side.held < kept.rows - min(tokens, most):
            stop = min(kept.rows - min(tokens, most), side.held + most)
            shape = PairShape(kept.heads, kept.width, side.held, stop - side.held, 0, kept.transposed, 0)
            request = PairRequest(side.operand, shape, kept.blinded(side.held, stop), None)
            started = time.perf_counter()
            try:
                self._roster.lend_pair(accelerator, request)
            finally:
                self.counters.lent_seconds += time.perf_counter() - started
            self.counters.appends += 1
            self.counters.bytes_sent += _bytes(request)
            side.held = stop

    def _soften(
        self,
        scores: Float32[np.ndarray, "kv_heads rows n"],
        spans: Int32[np.ndarray, "2 rows"],
        scales: np.ndarray,
        width: int,
    ) -> None:
        started = time.perf_counter()
        factors = scales.astype(np.float32)
        total = scores.shape[0] * scores.shape[1]
        if self._team is None or scores.size < TEAM_WORK:
            weigh(scores, spans, factors, width, 0, total)
        else:
            self._team.run(lambda a, b: weigh(scores, spans, factors, width, a, b), total)
        self.counters.softmax_seconds += time.perf_counter() - started

    def _layer(self, keys: np.ndarray, where: np.ndarray) -> _Layer | None:
        """Returns what is kept of this layer and sequence, new if need be; None if there is no room for more."""
        address, page = keys.ctypes.data, int(where[1])
        if page not in self._sequences or self._numbers.get(address) == 0:
            for ended in self._sequences.keys() & set(where[2:].tolist()):
                self._forget(ended)  # its first page is in use by this sequence now
        layers = self._sequences.setdefault(page, {})
        self._sequences.move_to_end(page)
        while len(self._sequences) > 1 and self.kept_bytes > self._limit:
            self._forget(next(iter(self._sequences)))
        return layers.get(address) or self._new_layer(layers, keys)

    def _new_layer(self, layers: dict[int, _Layer], keys: np.ndarray) -> _Layer | None:
        address, (_, kv_heads, _, width) = keys.ctypes.data, keys.shape
        name = f"layers.{self._numbers.setdefault(address, len(self._numbers))}.attention"
        operands = self._roster.new_operands(2)
        while operands is None and len(self._sequences) > 1:
            self._forget(next(iter(self._sequences)))
            operands = self._roster.new_operands(2)
        if operands is None:
            return None
        made = _Layer(
            name,
            _Side(kept_keys(f"the keys of {name}", kv_heads, width, self._checks, self._source), operands[0]),
            _Side(kept_values(f"the values of {name}", kv_heads, width, self._checks, self._source), operands[1]),
        )
        layers[address] = made
        return made

    def _forget(self, first_page: int) -> None:
        for layer in self._sequences.pop(first_page).values():
            layer.cut(0)
            self._roster.release(layer.keys.operand, layer.holder)
            self._roster.release(layer.values.operand, layer.holder)


def _at_once(heads: int, context: int) -> int:
    """Returns how many tokens fit one request."""
    return max(1, min(MAX_ROWS // heads, MAX_WORDS // (heads * context)))


def _spans(position: int, tokens: int, group: int, window: int) -> Int32[np.ndarray, "2 rows"]:
    """Returns the columns that each row attends to: its own position (of the first row: `position`) and those before."""
    last = np.repeat(np.arange(position, position + tokens, dtype=np.int32) + 1, group)
    first = np.maximum(0, last - window) if window else np.zeros_like(last)
    return np.stack([first, last]).astype(np.int32)


def _bytes(request: PairRequest) -> int:
    return 4 * (request.shape.appended_words + request.shape.left_words)


def _multiplications(pair: BlindedPair, spans: Int32[np.ndarray, "2 rows"] | None, checks: int) -> int:
    """Returns the multiplications of the field that checking and recovering a product took."""
    shape = pair.shape
    rows = shape.heads * shape.rows
    corrected = rows * shape.d_in * shape.d_out
    if spans is not None:
        corrected = shape.heads * shape.width * int((spans[1] - spans[0]).sum())
    return 2 * corrected + checks * rows * (shape.d_in + shape.d_out)
