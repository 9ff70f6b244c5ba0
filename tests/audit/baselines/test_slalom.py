"""Slalom: the plain model's numbers, uniform rows modulo its prime, lies refused, sums that wrap found and mended."""

import inspect
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister.arith.team import Team
from cloister.audit.baselines.exposure import ExposedWeight, ExposureObserver
from cloister.audit.baselines.slalom import NEVER_WRAPS, InProcessSlalomAccelerator, SlalomGate, open_slalom
from cloister.audit.baselines.slalom_field import HALF, Q, add, field_product, subtract, uniform_elements
from cloister.audit.baselines.w8a8 import PlainGate
from cloister.audit.uniformity import chi_square_p, kolmogorov_p
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.enclave.forward import LinearGate
from cloister.enclave.prepare import EnclaveModel
from cloister.errors import NonFiniteError, VerificationError
from tests.blinding.test_blinded_product import make_linear

elements = st.integers(-HALF, HALF)


def centred(values: np.ndarray) -> np.ndarray:
    residues = values % Q
    return np.where(residues > HALF, residues - Q, residues)


def assert_uniform(values: np.ndarray) -> None:
    """Fails for uniform elements once in a million: 256 equal shares by chi-square, the distribution by Kolmogorov."""
    flat = np.sort(values.reshape(-1).astype(np.int64) + HALF)
    counts = np.bincount(flat * 256 // Q, minlength=256)
    expected = flat.size / 256
    assert chi_square_p(float(((counts - expected) ** 2).sum() / expected), 255) > 1e-6
    steps = np.arange(1, flat.size + 1) / flat.size
    distance = float(np.abs(steps - flat / Q).max())
    assert kolmogorov_p(distance, flat.size) > 1e-6


def test_the_modulus_is_a_prime() -> None:
    assert all(Q % divisor for divisor in range(2, int(Q**0.5) + 1))


@settings(max_examples=60)
@given(
    hnp.arrays(np.int32, st.tuples(st.integers(1, 4), st.just(9)), elements=elements),
    hnp.arrays(np.int8, st.tuples(st.integers(1, 7), st.just(9)), elements=st.integers(-127, 127)),
)
@example(np.full((1, 9), HALF, np.int32), np.full((2, 9), 127, np.int8))
@example(np.full((1, 9), -HALF, np.int32), np.full((2, 9), 127, np.int8))
def test_field_arithmetic_is_that_of_big_integers(rows: np.ndarray, matrix: np.ndarray) -> None:
    exact = rows.astype(object) @ matrix.T.astype(object)
    np.testing.assert_array_equal(field_product(matrix, rows), centred(exact).astype(np.int64))
    other = rows[::-1].copy()
    np.testing.assert_array_equal(add(rows, other), centred(rows.astype(np.int64) + other))
    np.testing.assert_array_equal(subtract(rows, other), centred(rows.astype(np.int64) - other))


def test_a_long_row_of_the_largest_elements_is_exact() -> None:
    rows = np.full((1, 65536), HALF, np.int32)
    matrix = np.full((3, 65536), -127, np.int8)
    np.testing.assert_array_equal(field_product(matrix, rows), centred(np.full((1, 3), -127 * 65536 * HALF)))


def test_pads_are_uniform_and_fresh() -> None:
    source = PadSource()
    first, second = uniform_elements(source, 40, 2000), uniform_elements(source, 40, 2000)
    assert np.abs(first).max() <= HALF
    assert_uniform(first)
    assert_uniform(subtract(first, second))


class Scripted:
    """A pad source that gives chosen elements first."""

    def __init__(self, script: list[int]) -> None:
        self._script = script

    def elements(self, rows: int, columns: int) -> np.ndarray:
        taken, self._script = self._script[: rows * columns], self._script[rows * columns :]
        return np.array(taken, np.int32).reshape(rows, columns)


def test_elements_beyond_the_last_whole_multiple_are_drawn_again() -> None:
    last = (2**31 - 1) // Q * Q  # in [0, P); centred: minus P
    script = [5, last - (2**31 - 1), last - 1 - (2**31 - 1), -1, -1, last + 7 - (2**31 - 1), 9, 8]
    drawn = inspect.unwrap(uniform_elements)(Scripted(script), 1, 4)
    # The second and fourth were refused, then their successors again, once.
    assert drawn.tolist() == [[5, 9, -1, 8]]


def test_slalom_gives_the_plain_model_and_shows_uniform_rows(
    model: EnclaveModel,
    team: Team,
    tokens: list[int],
    logits_of: Callable[[LinearGate], np.ndarray],
    plain_logits: np.ndarray,
) -> None:
    observer = ExposureObserver()
    gate = open_slalom(model.linears, team, observer=observer)
    gate.stock(2)
    np.testing.assert_array_equal(logits_of(gate), plain_logits)
    assert gate.counters.products == len(model.linears)
    assert gate.counters.pads_made_late == len(tokens) * len(model.linears)
    seen = [observer.newest(index) for index in range(len(model.linears))]
    assert_uniform(np.concatenate([rows.reshape(-1) for rows in seen if rows is not None]))
    assert gate.wrapped_rows <= gate.counters.rows // 100


def test_stocked_pads_are_used_once_each(team: Team, rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(20, 50)), bias=True)
    observer = ExposureObserver()
    gate = open_slalom([linear], team, observer=observer)
    gate.stock(6)
    x = np.repeat(rng.normal(size=(1, 50)), 3, axis=0).astype(np.float32)
    out, plain = np.empty((3, 20), np.float32), np.empty((3, 20), np.float32)
    PlainGate([linear], team).linear(0, x, plain)
    for _ in range(3):
        gate.linear(0, x, out)
        np.testing.assert_array_equal(out, plain)
    assert gate.counters.pads_made_late == 3
    seen = observer.newest(0)
    assert seen is not None
    assert len({row.tobytes() for row in seen}) == 9, "one input, nine times, never looks the same"


class Liar:
    """Multiplies, and then changes one answer."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self._honest = InProcessSlalomAccelerator()
        self._change = change
        self.calls = 0

    def register(self, index: int, weight: ExposedWeight) -> None:
        self._honest.register(index, weight)

    def multiply(self, index: int, rows: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self._change(self._honest.multiply(index, rows))


def one_more(answer: np.ndarray) -> np.ndarray:
    answer[-1, 0] += 1 if answer[-1, 0] < HALF else -1
    return answer


LIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one more": one_more,
    "zeros": np.zeros_like,
    "rows swapped": lambda answer: answer[::-1].copy(),
    "outside the field": lambda answer: answer + np.int32(Q),
    "short": lambda answer: answer[:, :-1].copy(),
    "floats": lambda answer: answer.astype(np.float32),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_and_the_liar_gets_no_more_work(lie: str, team: Team, rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(20, 50)))
    liar = Liar(LIES[lie])
    gate = SlalomGate([linear], liar, team)
    x, out = rng.normal(size=(2, 50)).astype(np.float32), np.zeros((2, 20), np.float32)
    with pytest.raises(VerificationError, match="layer"):
        gate.linear(0, x, out)
    assert (out == 0).all()
    assert gate.accelerators == ()
    assert not gate.lends(2)
    gate.linear(0, x, out)
    plain = np.empty_like(out)
    PlainGate([linear], team).linear(0, x, plain)
    np.testing.assert_array_equal(out, plain)
    assert liar.calls == 1


def wrapping_linear() -> LentLinear:
    """Rows of one sign against weights of one sign: sums far outside the field."""
    return make_linear(np.ones((4, 2 * NEVER_WRAPS)))


def test_a_sum_that_wraps_is_computed_again_and_counted(team: Team, rng: np.random.Generator) -> None:
    linear = wrapping_linear()
    gate = open_slalom([linear], team)
    x = rng.normal(size=(5, linear.d_in)).astype(np.float32) / 100
    x[[1, 3]] = 1.0
    out, plain = np.empty((5, 4), np.float32), np.empty((5, 4), np.float32)
    gate.linear(0, x, out)
    PlainGate([linear], team).linear(0, x, plain)
    np.testing.assert_array_equal(out, plain)
    assert plain[1] == pytest.approx(np.full(4, linear.d_in), rel=0.02)
    assert gate.wrapped_rows == 2
    assert gate.accelerators != ()


def test_a_lie_does_not_hide_behind_a_wrap(team: Team) -> None:
    linear = wrapping_linear()
    gate = SlalomGate([linear], Liar(one_more), team)
    with pytest.raises(VerificationError):
        gate.linear(0, np.ones((2, linear.d_in), np.float32), np.empty((2, 4), np.float32))


def test_the_longest_row_that_never_wraps_does_not(team: Team) -> None:
    linear = make_linear(np.ones((2, NEVER_WRAPS)))
    gate = open_slalom([linear], team)
    gate.linear(0, np.ones((1, NEVER_WRAPS), np.float32), np.empty((1, 2), np.float32))
    assert gate.wrapped_rows == 0
    longer = make_linear(np.ones((2, NEVER_WRAPS + 1)))
    gate = open_slalom([longer], team)
    gate.linear(0, np.ones((1, NEVER_WRAPS + 1), np.float32), np.empty((1, 2), np.float32))
    assert gate.wrapped_rows == 1


def test_rows_that_are_not_finite_are_refused_before_a_pad_is_spent(team: Team, rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(4, 8)))
    observer = ExposureObserver()
    gate = open_slalom([linear], team, observer=observer)
    gate.stock(1)
    with pytest.raises(NonFiniteError):
        gate.linear(0, np.full((1, 8), np.nan, np.float32), np.empty((1, 4), np.float32))
    assert observer.products == 0
    assert gate.counters.pads_made_late == 0


def test_not_lent_is_computed_here(team: Team, rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(4, 8)))
    observer = ExposureObserver()
    gate = open_slalom([linear], team, observer=observer)
    gate.linear(0, rng.normal(size=(1, 8)).astype(np.float32), np.empty((1, 4), np.float32), lend=False)
    assert (observer.products, gate.counters.enclave_products) == (0, 1)
