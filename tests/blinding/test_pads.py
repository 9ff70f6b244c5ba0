"""Pads are uniform, never shared, never reused; the pantry hands each out once and respects its budget."""

import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from cloister.arith.modulus import HALF, P
from cloister.audit.uniformity import chi_square_p, kolmogorov_p, measure_uniformity
from cloister.blinding import field, pads
from cloister.blinding import pantry as pantry_module
from cloister.blinding.kernels import field_elements
from cloister.blinding.linear import LentLinear
from cloister.blinding.mill import BATCH_TOKENS, Mill
from cloister.blinding.pads import PadSource, _redraw
from cloister.blinding.pantry import Pantry
from cloister.errors import BlindingError, PadReuseError, PantryEmptyError
from tests.blinding.test_blinded_product import make_linear


@pytest.fixture
def linears(rng: np.random.Generator) -> list[LentLinear]:
    return [make_linear(rng.normal(size=(d_out, d_in))) for d_out, d_in in ((8, 16), (24, 8), (5, 16))]


def test_pad_elements_are_uniform_and_centred() -> None:
    elements = PadSource().elements(100, 5000)
    assert elements.min() >= -HALF
    assert elements.max() <= HALF
    assert measure_uniformity(elements).uniform


def test_two_sources_never_share_a_stream_and_one_source_never_repeats() -> None:
    source = PadSource()
    first, second, other = source.elements(1, 4096), source.elements(1, 4096), PadSource().elements(1, 4096)
    assert not (first == second).all()
    assert not (first == other).all()


def test_small_and_large_draws_are_distinct_pieces_of_one_stream() -> None:
    source = PadSource()
    drawn = [source.elements(1, size)[0] for size in (3, 5000, 1, 4000, 4096, 4096, 4097, 20_000, 2) for _ in range(3)]
    every = np.concatenate(drawn)
    assert abs(every).max() <= HALF
    assert np.unique(every).size > every.size - 20  # uniform values of 31 bits hardly ever meet
    assert measure_uniformity(every.reshape(1, -1)).uniform


def test_a_draw_that_was_interrupted_leaves_nothing_that_a_pad_could_be_made_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_stream: object, words: np.ndarray) -> None:
        words[:] = 0
        raise KeyboardInterrupt

    source = PadSource()
    with monkeypatch.context() as patched:
        patched.setattr(pads, "_random", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.elements(1, 64)
    assert source.elements(1, 64).all(), "rows under pads of zeros would leave as they are"


def test_the_key_after_a_draw_does_not_lead_back_to_it() -> None:
    source = PadSource(bytes(32))
    before = source.elements(1, 10_000)
    with source._key.bytes() as key:
        assert bytes(key) != bytes(32)
        later = PadSource(bytes(key))
    np.testing.assert_array_equal(later.elements(1, 10_000), source.elements(1, 10_000))
    assert not (PadSource(bytes(32)).elements(1, 10_000) != before).any()


def test_the_one_word_that_is_no_element_is_redrawn() -> None:
    words = np.array([P, P + 2**31, 0, HALF, HALF + 1, P - 1], np.uint32)
    assert field_elements(words) == 2
    np.testing.assert_array_equal(words.view(np.int32)[2:], [0, HALF, -HALF, -1])
    redrawn = np.array([HALF + 1, 5], np.uint32)
    _redraw(PadSource()._stream(), redrawn)
    assert redrawn[1] == 5
    assert abs(int(redrawn.view(np.int32)[0])) <= HALF


def test_a_forked_process_is_refused_the_pad_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PadSource()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(BlindingError, match="forked"):
        source.elements(1, 4)


def test_the_statistics_agree_with_scipy() -> None:
    for statistic in (200.0, 255.0, 300.0, 380.0):
        assert chi_square_p(statistic, 255) == pytest.approx(stats.chi2.sf(statistic, 255), rel=0.05)
    for distance in (0.005, 0.01, 0.02):
        assert kolmogorov_p(distance, 10_000) == pytest.approx(stats.kstwo.sf(distance, 10_000), rel=0.05)


def test_the_pantry_hands_out_whole_pads_once_and_then_is_empty(linears: list[LentLinear]) -> None:
    pantry = Pantry(linears, 10**6, PadSource())
    assert pantry.level_tokens == 0
    seen: list[tuple[int, int]] = []
    pantry.stock(70, lambda done, total: seen.append((done, total)))
    assert pantry.level_tokens == 70
    assert seen[-1] == (70, 70)
    x = np.ones((40, 16), np.float32)
    product = {}
    for _ in range(1):
        blinded, opening = pantry.take(0, 40).blind(x)
        product["rows"] = blinded.rows
        out = np.empty((40, 8), np.float32)
        opening.recover(field.product(blinded.rows, linears[0].weight.matrix), out)
        here = np.empty_like(out)
        linears[0].compute(x, here)
        np.testing.assert_array_equal(out, here)
    assert pantry.level_tokens == 30
    with pytest.raises(PantryEmptyError, match="30 are stocked"):
        pantry.take(0, 31)
    taken = pantry.take(0, 30)
    taken.blind(np.ones((30, 16), np.float32))
    with pytest.raises(PadReuseError):
        taken.blind(np.ones((30, 16), np.float32))


def test_no_two_pads_of_a_pantry_are_alike(linears: list[LentLinear]) -> None:
    pantry = Pantry(linears, 10**6, PadSource())
    pantry.stock(64)
    zeros = np.zeros((1, 16), np.float32)  # a blinded zero row is the pad itself
    rows = {pantry.take(0, 1).blind(zeros)[0].rows.tobytes() for _ in range(64)}
    assert len(rows) == 64


def test_the_budget_in_bytes_is_kept(linears: list[LentLinear]) -> None:
    per_token = 4 * sum(a.d_in + a.d_out for a in linears)
    pantry = Pantry(linears, 10 * per_token + per_token - 1, PadSource())
    assert pantry.bytes_per_token == per_token
    assert pantry.capacity_tokens == 10
    pantry.stock(1000)
    assert pantry.level_tokens == 10


def test_pads_made_on_the_spot_recover_as_well(linears: list[LentLinear]) -> None:
    pantry = Pantry(linears, 0, PadSource())
    x = np.ones((2, 8), np.float32)
    blinded, opening = pantry.make(1, 2).blind(x)
    out, here = np.empty((2, 24), np.float32), np.empty((2, 24), np.float32)
    opening.recover(field.product(blinded.rows, linears[1].weight.matrix), out)
    linears[1].compute(x, here)
    np.testing.assert_array_equal(out, here)


def test_the_mill_fills_the_pantry_when_idle_and_for_a_waiter(linears: list[LentLinear]) -> None:
    pantry = Pantry(linears, 10**6, PadSource())
    mill = Mill(pantry, 100)
    try:
        assert all(pantry.wait_for(index, 100, 30.0) for index in range(3))
        with mill.paused():
            pantry.take(0, 100)
            assert not pantry.wait_for(
                0, BATCH_TOKENS + 1, 0.3
            )  # still while the engine works, but for a batch in hand
            assert mill.wait_for(0, 50, 30.0)  # unless it waits for pads
        assert pantry.wait_for(0, 100, 30.0)  # and again when idle
    finally:
        mill.close()
    assert not any(thread.name == "pad-mill" for thread in threading.enumerate())


def test_memory_of_used_pads_is_used_again_but_never_while_a_pad_holds_it(linears: list[LentLinear]) -> None:
    pantry = Pantry(linears, 10**6, PadSource())
    pantry.stock(32)
    held = pantry.take(0, 32)  # the block is used up, and this pad still needs it
    pantry.stock(32)
    x = np.ones((32, 16), np.float32)
    blinded, opening = held.blind(x)
    out, here = np.empty((32, 8), np.float32), np.empty((32, 8), np.float32)
    opening.recover(field.product(blinded.rows, linears[0].weight.matrix), out)
    linears[0].compute(x, here)
    np.testing.assert_array_equal(out, here)
    del held, opening
    first = pantry._shelves[0].retired[0][0].ctypes.data
    pantry.take(0, 32)
    pantry.stock(32)
    assert pantry._shelves[0].blocks[0][0].ctypes.data == first


def test_a_pad_keeps_its_memory_also_where_python_counts_borrowed_references_otherwise(
    linears: list[LentLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since Python 3.14 a function that is called with a variable borrows it: `sys.getrefcount` returns one less."""
    counts = SimpleNamespace(getrefcount=lambda array: sys.getrefcount(array) - 2)  # this function holds one itself
    monkeypatch.setattr(pantry_module, "sys", counts)
    stocked = Pantry(linears, 10**6, PadSource())
    stocked.stock(32)
    held = stocked.take(0, 32)
    before = held._r.copy()
    stocked.stock(32)
    np.testing.assert_array_equal(held._r, before)
    assert (stocked.take(0, 32)._r != before).any(), "two pads that are one pad"


def test_threads_that_draw_at_the_same_time_never_share_a_piece_of_the_stream() -> None:
    source, drawn = PadSource(bytes(32)), []

    def draw() -> None:
        drawn.extend(source.elements(1, 100_000)[0] for _ in range(8))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = PadSource(bytes(32))
    expected = sorted(alone.elements(1, 100_000)[0].tobytes() for _ in range(32))
    assert sorted(row.tobytes() for row in drawn) == expected
