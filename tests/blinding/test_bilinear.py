"""Products of two secrets: exact in the field, right within the stated error, under pads that hide one value each."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.arith.modulus import HALF, P
from cloister.arith.pair import pair_product_reference
from cloister.arith.team import Team
from cloister.audit.uniformity import measure_uniformity
from cloister.blinding import bilinear
from cloister.blinding import bilinear_reference as slow
from cloister.blinding.bilinear import (
    VALUE_LEVELS,
    KeptRows,
    dots_error,
    dots_reach,
    kept_keys,
    kept_values,
    sums_error,
    sums_reach,
)
from cloister.blinding.pads import PadSource
from cloister.errors import (
    AcceleratorProtocolError,
    BlindingError,
    NonFiniteError,
    PadReuseError,
    VerificationError,
    WireError,
)

SECONDS = 30.0
SOURCE = PadSource()


def make_kept(keys: bool, y: np.ndarray, checks: int = 1) -> KeptRows:
    kept = (kept_keys if keys else kept_values)("test", y.shape[0], y.shape[2], checks, SOURCE)
    kept.append(y)
    return kept


def lend(kept: KeptRows, x: np.ndarray, first: int = 0) -> np.ndarray:
    """The whole exchange with an honest accelerator that keeps nothing yet."""
    pair = kept.pair(x, first, 0)
    answer = InProcessAccelerator().multiply_pair(pair.request(0), SECONDS)
    out = np.zeros(answer.shape, np.float32)
    pair.recover(answer.copy(), out)
    return out


def exactly(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([[float(v) for v in row] for row in slow.exact_product(x, y)])


floats = st.floats(-(2.0**40), 2.0**40, width=32)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.data())
def test_dot_products_are_right_within_the_stated_error(width: int, n: int, rows: int, data: st.DataObject) -> None:
    draw = lambda shape: np.array(  # noqa: E731
        data.draw(st.lists(floats, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))), np.float32
    ).reshape(shape)
    x, y = draw((rows, width)), draw((1, n, width))
    lengths = np.linalg.norm(x.astype(float), axis=1)[:, None] * np.linalg.norm(y[0].astype(float), axis=1)
    off = np.abs(lend(make_kept(True, y), x)[0] - exactly(x, y[0].T))
    assert (off <= lengths * (dots_error(width) + 2.0**-23) + 1e-44).all()


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_weighted_sums_are_right_within_the_stated_error(width: int, n: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = (rng.normal(size=(1, n, width)) * 10.0 ** rng.integers(-20, 20, (1, n, 1))).astype(np.float32)
    weights = rng.normal(size=(rows, n)).astype(np.float32)
    kept = make_kept(False, y)
    scaled = (weights * kept.scales[0]).astype(np.float32)
    limit = np.abs(weights.astype(float)) @ np.abs(y[0].astype(float)).max(axis=1)
    off = np.abs(lend(kept, scaled)[0] - exactly(weights, y[0]))
    assert (off <= limit[:, None] * (sums_error(n) + 2.0**-22) + 1e-44).all()


def test_the_stated_error_of_dot_products_is_reached_so_it_is_not_vacuous() -> None:
    """The scale is the length over a reach of some thousands and a half: one element alone is off by half a step."""
    x = np.ones((1, 1), np.float32)
    off = abs(float(lend(make_kept(True, x[None]), x)[0, 0, 0]) - 1.0)
    assert 0.9 * dots_error(1) < off <= dots_error(1) + 2.0**-23


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("count", [1, 300])
def test_no_input_can_wrap(keys: bool, count: int) -> None:
    """Every row as large as it can be, all of one sign: the sum stays below P / 2."""
    width = count if keys else 3
    y = np.full((1, 1 if keys else count, width), 3.0e38, np.float32)
    kept = make_kept(keys, y)
    x = np.full((1, width if keys else count), 3.0e38 if keys else 1e5, np.float32)
    pair = kept.pair(x, 0, 0)
    answer = InProcessAccelerator().multiply_pair(pair.request(0), SECONDS)
    assert pair._sent is not None
    values, pads = kept._rows
    whole = values[0, : kept.rows].astype(np.int64), pads[0, : kept.rows]
    right = (whole[0].T, whole[1].T) if keys else whole
    integers = slow.recover(answer[0], pair._sent[0], pair._sent[1], *right)
    quantized, _ = slow.quantize(x, "length" if keys else "sum", dots_reach(width) if keys else sums_reach(count))
    expected = quantized.astype(object) @ right[0].astype(object)
    assert [[int(v) for v in row] for row in expected] == integers
    assert 0.99 * HALF < max(abs(v) for row in integers for v in row) <= HALF


def test_the_bounds_leave_room_for_the_longest_context() -> None:
    for count in (1, 128, 2048, 65536):
        assert (sums_reach(count) + count / 2) * VALUE_LEVELS <= HALF
        assert sums_reach(count) > 2**18
    for width in (1, 64, 128, 256):
        assert (dots_reach(width) + np.sqrt(width) / 2) ** 2 <= HALF
        assert dots_reach(width) + 0.5 <= 2**15 - 1


@settings(max_examples=40)
@given(
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)
def test_every_step_equals_its_twin_bit_for_bit(
    keys: bool, heads: int, rows: int, n: int, width: int, seed: int
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(heads, n, width)).astype(np.float32)
    x = rng.normal(size=(heads * rows, width if keys else n)).astype(np.float32)
    kept = make_kept(keys, y)
    pair = kept.pair(x, 0, 0)
    assert pair._sent is not None
    left, pad, scales = (a.copy() for a in pair._sent)
    (values, pads), row_scales = kept._rows, kept._scales
    for h in range(heads):
        expected, their_scales = slow.quantize(
            y[h], "length" if keys else "peak", dots_reach(width) if keys else 2048.0
        )
        np.testing.assert_array_equal(values[h, :n], expected)
        np.testing.assert_allclose(row_scales[h, :n], their_scales, rtol=1e-12)
    quantized, _ = slow.quantize(x, "length" if keys else "sum", dots_reach(width) if keys else sums_reach(n))
    assert (np.abs((left.astype(np.int64) - pad - quantized + HALF) % P - HALF) <= (0 if keys else 1)).all()
    assert pair.appended is not None
    sent = pair.appended.rows.reshape(y.shape)
    np.testing.assert_array_equal(sent[0], slow.blind(values[0, :n].astype(np.int64), pads[0, :n]))
    answer = pair_product_reference(left.reshape(heads, rows, -1), sent, keys)
    out = np.zeros(answer.shape, np.float32)
    pair.recover(answer, out)
    for h in range(heads):
        own = slice(h * rows, (h + 1) * rows)
        right = [a.T if keys else a for a in (values[h, :n].astype(np.int64), pads[h, :n])]
        integers = np.array(slow.recover(answer[h], left[own], pad[own], *right), np.float64)
        scale = scales[own, None] * (row_scales[h, None, :n] if keys else 1.0)
        np.testing.assert_array_equal(out[h], (integers * scale).astype(np.float32))


@pytest.mark.parametrize("keys", [True, False])
def test_what_leaves_is_uniform_whatever_it_hides(keys: bool, rng: np.random.Generator) -> None:
    secrets: list[np.ndarray] = [np.zeros((2, 300, 32), np.float32), np.ones((2, 300, 32), np.float32) * 5]
    secrets.append(rng.normal(size=(2, 300, 32)).astype(np.float32))
    for y in secrets:
        kept = make_kept(keys, y)
        x = np.full((2 * 40, 32 if keys else 300), y[0, 0, 0], np.float32)
        pair = kept.pair(x, 0, 0)
        assert pair.appended is not None
        assert measure_uniformity(pair.appended.rows).uniform
        assert measure_uniformity(pair.left.rows).uniform


@pytest.mark.parametrize("keys", [True, False])
def test_a_row_is_sent_as_the_same_bytes_every_time_and_its_successor_as_others(
    keys: bool, rng: np.random.Generator
) -> None:
    y = rng.normal(size=(2, 20, 8)).astype(np.float32)
    kept = make_kept(keys, y)
    sent = kept.blinded(0, 20).rows.reshape(y.shape).copy()
    np.testing.assert_array_equal(kept.blinded(5, 9).rows.reshape(2, 4, 8), sent[:, 5:9])
    kept.append(rng.normal(size=(2, 100, 8)).astype(np.float32))  # the memory moves; what was sent stays
    np.testing.assert_array_equal(kept.blinded(0, 20).rows.reshape(y.shape), sent)
    kept.cut(7)
    kept.append(np.ascontiguousarray(y[:, 7:]))  # the very same values again: their pads are new all the same
    again = kept.blinded(0, 20).rows.reshape(y.shape)
    np.testing.assert_array_equal(again[:, :7], sent[:, :7])
    assert (again[:, 7:] == sent[:, 7:]).mean() < 0.01, "the same pad would show the same rows"
    with pytest.raises(BlindingError, match="no rows 0 to 21"):
        kept.blinded(0, 21)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("grown", range(4))
def test_growth_that_fails_changes_nothing(
    keys: bool, grown: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were zeroed, under pads that were not, would leave as bare pads: they open what was sent before."""
    kept = make_kept(keys, rng.normal(size=(2, 20, 8)).astype(np.float32))
    sent = kept.blinded(0, 20).rows.copy()
    real, calls = bilinear._grown, iter(range(9))

    def short(array: np.ndarray, axis: int, more: int) -> np.ndarray:
        if next(calls) == grown:
            raise MemoryError
        return real(array, axis, more)

    with monkeypatch.context() as patched:
        patched.setattr(bilinear, "_grown", short)
        with pytest.raises(MemoryError):
            kept.append(rng.normal(size=(2, 100, 8)).astype(np.float32))
    np.testing.assert_array_equal(kept.blinded(0, 20).rows, sent)
    kept.append(rng.normal(size=(2, 100, 8)).astype(np.float32))
    np.testing.assert_array_equal(kept.blinded(0, 120).rows.reshape(2, 120, 8)[:, :20], sent.reshape(2, 20, 8))


def test_a_left_pad_serves_one_attempt_and_is_gone_afterwards(rng: np.random.Generator) -> None:
    kept = make_kept(True, rng.normal(size=(1, 30, 16)).astype(np.float32))
    x = rng.normal(size=(4, 16)).astype(np.float32)
    first, second = kept.pair(x, 0, 0), kept.pair(x, 0, 0)
    assert (first.left.rows == second.left.rows).mean() < 0.1
    answer = InProcessAccelerator().multiply_pair(first.request(0), SECONDS)
    assert first._sent is not None
    pad = first._sent[1]
    assert pad.any()
    out = np.zeros(answer.shape, np.float32)
    first.recover(answer, out)
    assert not pad.any()
    with pytest.raises(PadReuseError, match="twice"):
        first.recover(answer, out)


def test_what_was_sent_cannot_be_changed_by_whoever_is_shown_it(rng: np.random.Generator) -> None:
    """The check and the recovery read those rows again: to change both would be to change the result unseen."""
    pair = make_kept(True, rng.normal(size=(1, 9, 8)).astype(np.float32)).pair(np.ones((1, 8), np.float32), 0, 0)
    with pytest.raises(ValueError, match="read-only"):
        pair.left.rows[0, 0] = 1


@pytest.mark.parametrize("keys", [True, False])
def test_cut_rows_are_zeroed(keys: bool, rng: np.random.Generator) -> None:
    kept = make_kept(keys, rng.normal(size=(2, 20, 8)).astype(np.float32))
    old = kept._stored
    kept.append(rng.normal(size=(2, 100, 8)).astype(np.float32))
    assert not any(array.any() for array in old), "memory that was outgrown holds nothing"
    kept.cut(3)
    for array in (*kept._rows, kept._scales):
        assert array[:, :3].any()
        assert not array[:, 3:].any()


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("checks", [1, 2])
def test_every_wrong_element_is_refused_and_nothing_is_recovered(
    keys: bool, checks: int, rng: np.random.Generator
) -> None:
    y = rng.normal(size=(2, 9, 5)).astype(np.float32)
    x = rng.normal(size=(6, 5 if keys else 9)).astype(np.float32)
    kept = make_kept(keys, y, checks)
    answer = InProcessAccelerator().multiply_pair(kept.pair(x, 0, 0).request(0), SECONDS)
    for index in np.ndindex(answer.shape):
        pair = kept.pair(x, 0, 0)
        wrong = InProcessAccelerator().multiply_pair(pair.request(0), SECONDS)
        wrong[index] += 1 if wrong[index] < HALF else -1
        out = np.ones(answer.shape, np.float32)
        with pytest.raises(VerificationError, match="test is wrong"):
            pair.recover(wrong, out)
        assert not out.any()
    for form in (P, -P):  # the right residue in another form
        pair = kept.pair(x, 0, 0)
        wide = InProcessAccelerator().multiply_pair(pair.request(0), SECONDS).astype(np.int64)
        index = tuple(np.argwhere(np.sign(wide) == -np.sign(form))[0])
        wide[index] += form
        with pytest.raises(VerificationError):
            pair.recover(wide.astype(np.int32), np.ones(answer.shape, np.float32))
    with pytest.raises(AcceleratorProtocolError, match="asked"):
        kept.pair(x, 0, 0).recover(answer[:, :, :-1].copy(), np.ones((2, 3, answer.shape[2] - 1), np.float32))


def test_the_check_follows_windows_cuts_and_growth(rng: np.random.Generator) -> None:
    """Its vector is grown and shrunk, never computed anew in the common case: every order must end at the same sums."""
    y = rng.normal(size=(2, 60, 8)).astype(np.float32)
    kept = kept_keys("test", 2, 8, 2, SOURCE)
    x = rng.normal(size=(2, 8)).astype(np.float32)
    for step in range(120):
        if step % 7 == 3:
            kept.cut(int(rng.integers(0, kept.rows + 1)))
        if kept.rows < 60:
            count = int(rng.integers(1, 61 - kept.rows))
            kept.append(np.ascontiguousarray(y[:, kept.rows : kept.rows + count]))
        first = int(rng.integers(0, kept.rows))
        np.testing.assert_allclose(
            lend(kept, x, first)[:, 0], np.einsum("hd,hnd->hn", x, y[:, first : kept.rows]), atol=1e-2
        )


@pytest.mark.parametrize("keys", [True, False])
def test_a_team_recovers_the_same(keys: bool, rng: np.random.Generator) -> None:
    y = rng.normal(size=(3, 50, 16)).astype(np.float32)
    x = rng.normal(size=(3 * 7, 16 if keys else 50)).astype(np.float32)
    kept = make_kept(keys, y)
    with Team(2) as team:
        pair = kept.pair(x, 0, 0, team)
        answer = InProcessAccelerator().multiply_pair(pair.request(0), SECONDS)
        out = np.zeros(answer.shape, np.float32)
        pair.recover(answer, out, team=team)
        np.testing.assert_array_equal(out, lend(kept, x))
        pair = kept.pair(x, 0, 0, team)
        answer = InProcessAccelerator().multiply_pair(pair.request(0), SECONDS)
        answer[2, 6, 3] = 0
        with pytest.raises(VerificationError, match="row 20"):
            pair.recover(answer, out, team=team)


def test_only_the_wanted_columns_are_written(rng: np.random.Generator) -> None:
    y = rng.normal(size=(1, 6, 4)).astype(np.float32)
    kept = make_kept(True, y)
    pair = kept.pair(rng.normal(size=(2, 4)).astype(np.float32), 0, 0)
    out = np.full((1, 2, 6), 7.0, np.float32)
    spans = np.array([[0, 2], [3, 5]], np.int32)
    pair.recover(InProcessAccelerator().multiply_pair(pair.request(0), SECONDS), out, spans)
    assert (out[0] == 7.0).tolist() == [[False] * 3 + [True] * 3, [True] * 2 + [False] * 3 + [True]]


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_and_nothing_is_kept(keys: bool, bad: float, rng: np.random.Generator) -> None:
    y = rng.normal(size=(2, 5, 4)).astype(np.float32)
    kept = make_kept(keys, y)
    more = y[:, :3].copy()
    more[1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match="Row 2 of test"):
        kept.append(more)
    assert kept.rows == 5
    x = np.ones((2, 4 if keys else 5), np.float32)
    x[1, 1] = bad
    with pytest.raises(NonFiniteError, match="what multiplies test"):
        kept.pair(x, 0, 0)
    assert np.isfinite(lend(kept, np.ones_like(x))).all()


@pytest.mark.parametrize("keys", [True, False])
def test_zero_and_denormal_rows_are_like_any_other(keys: bool) -> None:
    y = np.zeros((1, 4, 8), np.float32)
    y[0, 1] = 1e-45
    y[0, 2] = 3e38
    kept = make_kept(keys, y)
    out = lend(kept, np.zeros((1, 8 if keys else 4), np.float32))
    assert (out == 0).all()
    assert measure_uniformity(kept.blinded(0, 4).rows).kolmogorov_smirnov_p > 1e-6


def test_shapes_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    kept = make_kept(True, rng.normal(size=(2, 9, 5)).astype(np.float32))
    with pytest.raises(BlindingError, match="do not fit"):
        kept.pair(np.zeros((4, 6), np.float32), 0, 0)
    with pytest.raises(BlindingError, match="do not fit"):
        kept.pair(np.zeros((3, 5), np.float32), 0, 0)
    with pytest.raises(WireError, match="limits|multiplies"):
        kept.pair(np.zeros((4, 5), np.float32), 9, 0)
    with pytest.raises(WireError, match="limits"):
        kept.pair(np.zeros((5000, 5), np.float32), 0, 0)
    assert dataclasses.is_dataclass(kept.pair(np.zeros((4, 5), np.float32), 0, 0))
