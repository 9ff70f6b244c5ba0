"""Lent attention: the enclave's own numbers within the stated error, nothing but uniform rows leaves, no wrong answer is used."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.audit.observer import Observer
from cloister.audit.tamper import STRATEGIES, Tamper
from cloister.blinding import bilinear_kernels
from cloister.blinding.bilinear import attention_error
from cloister.blinding.pads import PadSource
from cloister.enclave import masked_attention as masked_module
from cloister.enclave.kernels import attention as fused_attention
from cloister.enclave.masked_attention import MaskedAttention
from cloister.enclave.outsource import Fault, Roster
from cloister.errors import AcceleratorTimeoutError, NonFiniteError, SettingsError
from cloister.settings import AcceleratorSettings, OnFailure
from cloister.wire.pairs import PairRequest

PAGE = 4


class Layer:
    """One layer's cache with a shuffled page table, and both ways to attend to it."""

    def __init__(self, kv_heads: int, group: int, width: int, rng: np.random.Generator, tokens: int = 64) -> None:
        self.heads, self.width, self.rng = kv_heads * group, width, rng
        pages = -(-tokens // PAGE)
        shape = (pages, kv_heads, PAGE, width)
        self.keys, self.values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        self.table = rng.permutation(pages).astype(np.int32)
        self.kv_heads = kv_heads

    def write(self, first: int, count: int) -> None:
        for position in range(first, first + count):
            page, slot = self.table[position // PAGE], position % PAGE
            for pool in (self.keys, self.values):
                pool[page, :, slot] = self.rng.normal(size=(self.kv_heads, self.width))

    def attend(self, attention: Callable[..., None], query: np.ndarray, first: int, window: int = 0) -> np.ndarray:
        tokens = query.shape[0]
        length = first + tokens
        where = np.concatenate([np.array([first], np.int32), self.table[: -(-length // PAGE)]])
        scores = np.empty((self.heads // self.kv_heads, length), np.float32)
        out = np.full((tokens, self.heads * self.width), np.nan, np.float32)
        attention(query, self.keys, self.values, where, window, scores, out)
        return out

    def query(self, tokens: int) -> np.ndarray:
        return self.rng.normal(size=(tokens, self.heads, self.width)).astype(np.float32)

    def close_enough(self, attention: Callable[..., None], query: np.ndarray, first: int, window: int = 0) -> None:
        """Raises unless lent and own attention agree within the stated error (and what float32 sums add to both)."""
        mine, theirs = self.attend(fused_attention, query, first, window), self.attend(attention, query, first, window)
        score = float(np.linalg.norm(query, axis=2).max() * np.linalg.norm(self.keys, axis=3).max()) / math.sqrt(
            self.width
        )
        limit = attention_error(score, self.width, first + query.shape[0]) + 1e-5
        assert np.abs(mine - theirs).max() <= limit * np.abs(self.values).max()


def lent(*accelerators: object, **changes: object) -> MaskedAttention:
    roster = Roster(accelerators or [InProcessAccelerator()], AcceleratorSettings(**changes))  # type: ignore[arg-type]
    return MaskedAttention(roster, PadSource())


@settings(max_examples=15)
@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 8, 20, 64]), st.sampled_from([0, 1, 3, 9, 100]),
    st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_shape_window_and_order_of_passes_is_the_enclaves_own_attention(
    kv_heads: int, group: int, width: int, window: int, passes: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    layer, attention, first = Layer(kv_heads, group, width, rng, 80), lent(), 0
    for tokens in passes:
        if rng.random() < 0.3:  # the conversation goes on from an earlier point
            first = int(rng.integers(0, first + 1))
        layer.write(first, tokens)
        layer.close_enough(attention, layer.query(tokens), first, window)
        first += tokens
    assert attention.counters.enclave_passes == 0
    assert not attention.roster.incidents


def test_a_pass_too_large_for_one_request_is_sent_in_pieces(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Layer(16, 8, 8, rng, 100)  # 128 heads by 100 tokens: more rows than a request may have
    attention = lent()
    wide.close_enough(attention, wide.query(100), 0)
    assert attention.counters.products == 2 * 4
    monkeypatch.setattr(masked_module, "MAX_WORDS", 600)
    small, attention = Layer(2, 3, 8, rng, 100), lent()
    small.close_enough(attention, small.query(30), 0, 11)
    assert attention.counters.products == 2 * 10
    assert attention.counters.appends == 0


def test_rows_that_an_accelerator_does_not_keep_yet_are_sent_before_the_product(rng: np.random.Generator) -> None:
    layer = Layer(300, 1, 4, rng, 60)
    attention = lent()
    layer.close_enough(attention, layer.query(2), 50)  # the first 50 positions were computed elsewhere
    assert attention.counters.appends == 2 * 4  # 13 rows of 300 heads fit a request
    layer.close_enough(attention, layer.query(1), 52)
    assert attention.counters.appends == 2 * 4


def test_what_is_kept_crosses_once_and_a_step_sends_one_row(rng: np.random.Generator) -> None:
    observer = Observer(InProcessAccelerator())
    layer, attention = Layer(2, 2, 8, rng), lent(observer)
    layer.attend(attention, layer.query(20), 0)
    before = attention.counters.bytes_sent
    assert before == 4 * (2 * 2 * 20 * 8 + 4 * 20 * 8 + 4 * 20 * 20)
    layer.attend(attention, layer.query(1), 20)
    assert attention.counters.bytes_sent - before == 4 * (2 * 2 * 8 + 4 * 8 + 4 * 21)
    kept = [(label, rows) for label, rows in observer.seen if label.startswith(b"kept")]
    assert [(label, rows.shape) for label, rows in kept] == [
        (b"kept 0", (40, 8)), (b"kept 1", (40, 8)), (b"kept 0", (2, 8)), (b"kept 1", (2, 8)),
    ]  # fmt: skip


def test_no_pad_hides_two_values(rng: np.random.Generator) -> None:
    """Secrets are zero throughout, so that what leaves is the bare pads: none of them may come twice."""
    observer = Observer(InProcessAccelerator())
    layer, attention = Layer(2, 2, 8, rng), lent(observer)
    layer.keys[:], layer.values[:] = 0, 0
    first = 0
    for tokens, back in [(9, 0), (1, 0), (1, 0), (5, 8), (1, 0), (3, 6), (12, 6), (1, 0)]:
        first -= back
        layer.attend(attention, np.zeros((tokens, 4, 8), np.float32), first)
        first += tokens
    pads = np.concatenate(
        [rows.reshape(-1) for label, rows in observer.seen if label in (b"kept 0", b"kept 1", b"pair 0")]
    )
    rows = {row.tobytes() for label, block in observer.seen if block.shape[1] == 8 for row in block}
    assert len(rows) == sum(block.shape[0] for _, block in observer.seen if block.shape[1] == 8)
    assert len(np.unique(pads)) > 0.999 * pads.size


def test_another_accelerator_is_sent_the_same_kept_rows_and_fresh_others(rng: np.random.Generator) -> None:
    first, second = Observer(InProcessAccelerator()), Observer(InProcessAccelerator())
    layer, attention = Layer(2, 2, 8, rng), lent(Tamper(first, "zeros", at_call=3), second)
    layer.close_enough(attention, layer.query(9), 0)
    layer.close_enough(attention, layer.query(1), 9)
    (incident,) = attention.roster.incidents
    assert (incident.linear, incident.outcome) == ("layers.0.attention", Fault.NEXT)

    def seen(observer: Observer, label: bytes) -> np.ndarray:
        parts = [rows.reshape(2, -1, 8) for name, rows in observer.seen if name == label]
        return np.concatenate(parts, axis=1)

    for operand in (b"kept 0", b"kept 1"):
        np.testing.assert_array_equal(seen(second, operand)[:, : seen(first, operand).shape[1]], seen(first, operand))
    (_, failed), (_, retried) = (
        [pair for pair in observer.seen if pair[0] == b"pair 0"][-1] for observer in (first, second)
    )
    assert failed.shape == retried.shape
    assert (failed == retried).mean() < 0.05, "the same pad would show the same rows"


def test_uniform_whatever_is_attended_to(rng: np.random.Generator) -> None:
    observer = Observer(InProcessAccelerator())
    layer, attention = Layer(2, 4, 32, rng), lent(observer)
    layer.keys[:], layer.values[:] = 3.0, -2.0
    for first in range(0, 60, 20):
        layer.attend(attention, np.ones((20, 8, 32), np.float32), first)
    assert observer.uniformity().uniform
    assert observer.uniformity().elements > 20_000


def test_without_pads_the_same_test_fails(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(PadSource):
        def fill(self, elements: np.ndarray) -> None:
            elements.fill(0)

    observer = Observer(InProcessAccelerator())
    layer, attention = Layer(2, 4, 32, rng), MaskedAttention(observer, Bare())
    layer.close_enough(attention, layer.query(40), 0)
    assert not observer.uniformity().uniform
    assert bilinear_kernels.OK == -1


@pytest.mark.parametrize("strategy", [*STRATEGIES, "stale", "lost"])
@pytest.mark.parametrize("at_call", [1, 2, 3, 4])
@pytest.mark.parametrize("spare", [True, False])
def test_every_way_to_cheat_is_caught_and_changes_nothing(
    strategy: str, at_call: int, spare: bool, rng: np.random.Generator
) -> None:
    cheat = Tamper(InProcessAccelerator(), strategy, at_call=at_call)
    layer = Layer(2, 3, 8, rng)
    attention = lent(cheat, *([InProcessAccelerator()] if spare else []))
    layer.close_enough(attention, layer.query(6), 0)
    layer.close_enough(attention, layer.query(2), 6)
    (incident,) = attention.roster.incidents
    assert incident.outcome is (Fault.NEXT if spare else Fault.ENCLAVE)
    assert len(attention.roster.healthy) == int(spare)
    assert attention.counters.enclave_passes == (0 if spare else 1 if at_call > 2 else 2)


def test_a_late_answer_is_not_waited_for(rng: np.random.Generator) -> None:
    layer = Layer(1, 1, 8, rng)
    attention = lent(Tamper(InProcessAccelerator(), "late", at_call=2), timeout_seconds=0.05)
    layer.close_enough(attention, layer.query(3), 0)
    (incident,) = attention.roster.incidents
    assert "0.05 s" in incident.reason
    stopping = lent(Tamper(InProcessAccelerator(), "late", at_call=1), timeout_seconds=0.05, on_failure=OnFailure.STOP)
    with pytest.raises(AcceleratorTimeoutError):
        layer.attend(stopping, layer.query(3), 0)


def test_an_answer_that_changes_after_it_was_given_does_not_matter(rng: np.random.Generator) -> None:
    class Racing(InProcessAccelerator):
        def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> np.ndarray:
            for earlier in given:
                earlier[:] = 12345
            given.append(super().multiply_pair(request, timeout_seconds))
            return given[-1]

    given: list[np.ndarray] = []
    layer, attention = Layer(2, 2, 8, rng), lent(Racing())
    layer.close_enough(attention, layer.query(5), 0)
    layer.close_enough(attention, layer.query(1), 5)
    assert not attention.roster.incidents


def test_a_sequence_in_reused_pages_and_a_full_store_are_forgotten_here_and_there(rng: np.random.Generator) -> None:
    class Counting(InProcessAccelerator):
        def release(self, operand: int, timeout_seconds: float) -> None:
            released.append(operand)
            super().release(operand, timeout_seconds)

    released: list[int] = []
    layer, attention = Layer(2, 2, 8, rng), lent(Counting())
    layer.attend(attention, layer.query(5), 0)
    layer.table = np.roll(layer.table, 1)  # the next sequence has the first one's first page as its second
    layer.write(0, 9)
    layer.close_enough(attention, layer.query(9), 0)
    assert released == [0, 1]
    roomy = attention.kept_bytes
    attention._limit = 1
    layer.table = layer.table[::-1].copy()
    layer.write(0, 4)
    layer.close_enough(attention, layer.query(4), 0)
    assert len(released) == 4
    assert attention.kept_bytes <= roomy
    attention.release()
    assert len(released) == 6
    assert attention.kept_bytes == 0
    layer.close_enough(attention, layer.query(1), 4)


def test_numbers_of_operands_that_run_out_push_the_oldest_out(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.enclave.outsource.MAX_OPERANDS", 2)
    one, two = Layer(1, 2, 8, rng), Layer(1, 2, 8, rng)
    two.table = np.roll(one.table, 5)
    attention = lent()
    for layer in (one, two, one):
        layer.close_enough(attention, layer.query(3), 0)
    assert attention.counters.enclave_passes == 0
    other = Layer(1, 2, 8, rng)  # another layer of the same sequence: no number is left for it, and none may be taken
    other.table = one.table
    other.close_enough(attention, other.query(3), 0)
    assert attention.counters.enclave_passes == 1


def test_what_is_not_finite_is_named_and_the_next_pass_works(rng: np.random.Generator) -> None:
    layer, attention = Layer(1, 2, 8, rng), lent()
    layer.close_enough(attention, layer.query(3), 0)
    query = layer.query(2)
    query[1, 0, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"what multiplies the keys of layers\.0\.attention"):
        layer.attend(attention, query, 3)
    layer.values[layer.table[0], 0, 3, 2] = np.inf
    with pytest.raises(NonFiniteError, match=r"the values of layers\.0\.attention"):
        layer.attend(attention, layer.query(2), 3)
    layer.write(3, 2)
    layer.close_enough(attention, layer.query(2), 3)
    assert not attention.roster.incidents


def test_an_accelerator_that_cannot_is_refused_at_the_start() -> None:
    class Plain:
        name = "plain"

        def register(self, weight: object) -> None: ...

        def multiply(self, weight_id: bytes, blinded: object, timeout_seconds: float) -> np.ndarray:
            return np.zeros((1, 1), np.int32)

        def close(self) -> None: ...

    with pytest.raises(SettingsError, match="two blinded matrices"):
        MaskedAttention(Roster([Plain()], AcceleratorSettings()), PadSource())
