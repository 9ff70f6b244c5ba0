"""A short calibration: what each product of a model takes here, through the very code that runs it.

Covers: products of one row (in the enclave, lent, plain) and of many, making pads, and a token's work without products.
Products are timed inside real forward passes, since the same product is twice as fast when its weight is still in a cache
and slower when threads have gone to sleep. The caller sees to it that the model is larger than the caches if the real one is.
Does not cover: load that comes later. A busy machine gives busy numbers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from jaxtyping import Float32

from cloister.accelerator.api import Accelerator
from cloister.arith.team import Team, usable_cores
from cloister.audit.baselines.w8a8 import PlainGate
from cloister.blinding.linear import LentLinear, Linear
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Attention, Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.masked_attention import MaskedAttention
from cloister.enclave.outsource import Gate, Roster
from cloister.enclave.prepare import EnclaveModel
from cloister.enclave.sampling import Sampler, SamplingSettings
from cloister.plan.cost import Calibration, LentAttentionRate, ProductRate
from cloister.settings import AcceleratorSettings, BlindingSettings, Prefill, Settings

SECONDS: Final = 0.7
"""How long each kind of pass is timed, within the bounds below."""

FEWEST, MOST = 12, 250
"""Timed passes of a kind, after some to warm up: small models are over quickly and vary more."""

PAD_ROWS: Final = 32
"""Pads made at once, as the mill makes them."""

PREFILL_ROWS: Final = 16
"""Rows of a product that stands for a prompt's."""

WARM_UP: Final = 3
"""Passes before the clock counts."""

PADS_BYTES: Final = 256 * 2**20
"""Most memory of the pads that lent passes use up."""

CONTEXTS: Final = (64, 512)
"""Tokens of context at which passes are timed; the second tells what attention adds."""

Product = Callable[[int, np.ndarray, np.ndarray], None]
"""Fills `out` with linear `index` of `x`: `(index, x, out)`."""

Timing = tuple[float, float]
"""Wall-clock and CPU seconds of this process."""


def calibrate(
    model: EnclaveModel,
    start: Callable[[], Sequence[Accelerator]],
    source: PadSource,
    layers: int,
    report: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Returns the rates of a model of `layers` layers, of which `model` holds the first few; takes seconds.

    `start` returns the accelerators, holding the public weights; it is called when the enclave alone has been timed, since
    a worker changes how fast threads wake. Without accelerators, or for private weights, a lent product counts as one that
    is computed in the enclave.
    """
    share = layers / model.spec.layers
    linears = model.public_linears
    with Team(usable_cores()) as team:

        def tick(done: int) -> None:
            if report is not None:
                report(done, 7)

        enclave = _Passes(model, lambda index, x, out: linears[index].compute(x, out, team))
        one, glue, glue_cpu = enclave.timed(1, CONTEXTS[0])
        tick(1)
        many, _, _ = enclave.timed(PREFILL_ROWS, 0)
        tick(2)
        _, far, _ = enclave.timed(1, CONTEXTS[1])
        slope = max(0.0, far - glue) / max(1, enclave.longest(CONTEXTS[1]) - CONTEXTS[0])
        plain, _, _ = _Passes(model, PlainGate(linears, team).linear).timed(1, CONTEXTS[0])
        tick(3)
        late = _times(linears, lambda linear: linear.make_pad(1, source, team))
        batch = _times(linears, lambda linear: linear.make_pad(PAD_ROWS, source))
        tick(4)
        accelerators = start()
        lent = _lent(model, accelerators, source, 1, CONTEXTS[0])
        tick(5)
        lent_many = _lent(model, accelerators, source, PREFILL_ROWS, 0)
        tick(6)
        attention = _lent_attention(model, accelerators, team, (glue, glue_cpu), far)
    products = {}
    for linear in {_kind(linear): linear for linear in linears}.values():
        kind = _kind(linear)
        online, online_many = lent.get(kind) or one[kind], lent_many.get(kind) or many[kind]
        products[kind] = ProductRate(
            enclave=_wall(one[kind]),
            enclave_cpu=_cpu(one[kind]),
            lent=_wall(online),
            lent_cpu=_cpu(online),
            pad_cpu=_cpu(batch[kind]) / PAD_ROWS,
            pad_late=_wall(late[kind]),
            plain=_wall(plain[kind]),
            enclave_row=_wall(many[kind]) / (1 if kind == "lm_head" else PREFILL_ROWS),
            lent_row=_wall(online_many) / (1 if kind == "lm_head" else PREFILL_ROWS),
            bytes_crossing=4 * (linear.d_in + linear.matrix.shape[0]),
            bytes_plain=linear.d_in + 4 * linear.matrix.shape[0],
            weight_bytes=linear.matrix.nbytes,
        )
    sampling = _sampling(model.spec.vocab_size)
    tick(7)
    return Calibration(products, share * glue, share * glue_cpu, share * slope, sampling, CONTEXTS[0], attention)


def _kind(linear: Linear) -> str:
    return linear.name.rpartition(".")[2]


class _Passes:
    """Forward passes in which every product is timed."""

    def __init__(self, model: EnclaveModel, product: Product, attention: Attention | None = None) -> None:
        spec = model.spec
        self._model = model
        self._gate = _TimedGate(model.linears, product)
        self._cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, spec.max_positions)
        self._forward = Forward(model, self._gate, self._cache, attention=attention)

    def longest(self, context: int) -> int:
        """Returns `context`, or the longest that leaves room for a token."""
        return min(context, self._model.spec.max_positions - 1)

    def fill(self, context: int) -> int:
        """Brings the cache to `context` tokens, unless it holds as many; returns how many it holds then."""
        context = self.longest(context)
        self._forward.truncate(context)
        for start in range(self._forward.tokens, context, 128):
            self._forward.run([0] * min(128, context - start))
        return context

    def timed(self, rows: int, context: int, most: int = MOST) -> tuple[dict[str, list[Timing]], float, float]:
        """Returns the times of products by kind, and the seconds and CPU of a pass without them."""
        forward, gate = self._forward, self._gate
        context = self.fill(context)
        rests: list[Timing] = []
        turns = -WARM_UP
        until = 0.0
        while turns < FEWEST or (turns < most and time.perf_counter() < until):
            forward.truncate(0 if rows > 1 else context)
            if turns == 0:
                gate.times, rests = {}, []
                until = time.perf_counter() + SECONDS
            gate.spent = (0.0, 0.0)
            wall, cpu = time.perf_counter(), time.process_time()
            forward.run([0] * rows)
            rests.append((time.perf_counter() - wall - gate.spent[0], time.process_time() - cpu - gate.spent[1]))
            turns += 1
        return gate.times, _wall(rests), _cpu(rests)


class _TimedGate:
    """Computes linears by a function and notes how long each took."""

    def __init__(self, linears: Sequence[Linear], product: Product) -> None:
        self.linears = linears
        self.times: dict[str, list[Timing]] = {}
        self.spent: Timing = (0.0, 0.0)
        self._product = product

    def lends(self, tokens: int) -> bool:
        """The function decides."""
        return False

    def linear(
        self,
        index: int,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
        lend: bool = True,
    ) -> None:
        """Fills `out` by the function."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._product(index, x, out)
        taken = time.perf_counter() - wall, time.process_time() - cpu
        self.times.setdefault(_kind(self.linears[index]), []).append(taken)
        self.spent = self.spent[0] + taken[0], self.spent[1] + taken[1]


def _lent(
    model: EnclaveModel, accelerators: Sequence[Accelerator], source: PadSource, rows: int, context: int
) -> dict[str, list[Timing]]:
    """Returns the times of lent products with pads in stock."""
    if not accelerators:
        return {}
    per_token = sum(linear.pad_bytes for linear in model.public_linears)
    passes = WARM_UP + max(FEWEST, min(MOST // rows, PADS_BYTES // (rows * per_token)))
    settings = Settings(
        blinding=BlindingSettings(prefill=Prefill.BLINDED, pantry_bytes=per_token * (rows * passes + 1)),
        accelerator=AcceleratorSettings(timeout_seconds=600.0),
    )
    pantry = Pantry(model.linears, settings.blinding.pantry_bytes, source)
    gate = Gate(model.linears, accelerators, pantry, settings)
    filling = True

    def lend(index: int, x: np.ndarray, out: np.ndarray) -> None:
        if filling:
            out.fill(1)
        else:
            gate.linear(index, x, out)

    made = _Passes(model, lend)
    made.fill(context)
    pantry.stock(rows * passes)
    filling = False
    return made.timed(rows, context, passes - WARM_UP)[0]


def _lent_attention(
    model: EnclaveModel, accelerators: Sequence[Accelerator], team: Team, near: Timing, far_wall: float
) -> LentAttentionRate | None:
    """Returns what lending QK^T and AV adds to a pass, beyond the enclave's own attention (its passes: `near`, `far_wall`)."""
    roster = Roster(accelerators, AcceleratorSettings(timeout_seconds=600.0))
    if roster.pair_accelerator() is None:
        return None
    masked = MaskedAttention(roster, PadSource(), team)
    passes = _Passes(model, lambda _index, _x, out: out.fill(1), masked)
    taken: list[tuple[float, float, float]] = []
    for context in CONTEXTS:
        passes.fill(context)
        before, turns = masked.counters.bytes_sent + masked.counters.bytes_received, masked.counters.products
        _, wall, cpu = passes.timed(1, context, FEWEST)
        sent = masked.counters.bytes_sent + masked.counters.bytes_received - before
        products = (masked.counters.products - turns) / 2  # two a layer
        taken.append((wall, cpu, sent / max(1.0, products)))
    masked.release()
    layers, span = model.spec.layers, max(1, passes.longest(CONTEXTS[1]) - CONTEXTS[0])
    (wall, cpu, crossed), (far, _, far_crossed) = taken
    return LentAttentionRate(
        seconds=max(0.0, wall - near[0]) / layers,
        cpu=max(0.0, cpu - near[1]) / layers,
        seconds_per_context=max(0.0, (far - far_wall) - (wall - near[0])) / span / layers,
        bytes_crossing=crossed,
        bytes_per_context=max(0.0, far_crossed - crossed) / span,
    )


def _times(linears: Sequence[LentLinear], action: Callable[[LentLinear], object]) -> dict[str, list[Timing]]:
    """Returns the times of an action on every linear, by kind; three turns after one to warm up."""
    times: dict[str, list[Timing]] = {}
    for turn in range(4):
        for linear in linears:
            wall, cpu = time.perf_counter(), time.process_time()
            action(linear)
            if turn:
                times.setdefault(_kind(linear), []).append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def _sampling(vocab: int) -> float:
    sampler = Sampler(SamplingSettings(temperature=0.0), vocab, [])
    logits = np.random.default_rng(0).standard_normal(vocab, np.float32)
    times = []
    for _ in range(MOST):
        started = time.perf_counter()
        sampler.sample(logits)
        times.append((time.perf_counter() - started, 0.0))
    return _wall(times)


def _wall(times: Sequence[Timing]) -> float:
    """Returns the mean without the slowest tenth: products add up to a pass by their means, not by their medians."""
    ordered = sorted(wall for wall, _ in times)
    return statistics.fmean(ordered[: max(1, len(ordered) - len(ordered) // 10)])


def _cpu(times: Sequence[Timing]) -> float:
    """Returns the mean; the clock of CPU time is coarse on some machines."""
    return statistics.fmean(cpu for _, cpu in times)
